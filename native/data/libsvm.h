// Records of libsvm's and SVMlight's format: "label [qid:number] index:value ... [# comment]", a row of a sparse
// matrix.
#ifndef LAUNCHER_DATA_LIBSVM_H
#define LAUNCHER_DATA_LIBSVM_H

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "index.h"
#include "source.h"

namespace launcher::data {

// Lines without blank ones and those that are all comment. What LibsvmFacts has of the file becomes the index's note.
FileIndex scan_libsvm(const File& file, bool skip);

// What all records together tell, and no single one. Of lines that are malformed nothing is told: whoever decodes them
// will hear of it.
struct LibsvmFacts {
  std::uint64_t smallest = 0, largest = 0;  // of the indices; both 0 where there are none
  bool any = false;                         // a record has an index
  bool queries = false;                     // a record has a qid
};
// Throws std::invalid_argument: an index that scan_libsvm() has not made.
LibsvmFacts libsvm_facts(const Index& index);

struct LibsvmRules {
  std::uint64_t features = 0;    // columns of the matrix
  bool zero_based = false;       // whether the first column is index 0, else 1
  DType dtype = DType::float32;  // of labels and values: float32 or float64
  bool queries = false;          // whether the qid becomes a field; otherwise it is passed over
};

// Fields: "label_values" (1,), sparse "values" (features,), and "qid", an int64, if asked for. Throws DataError,
// mismatch: an index that is not above the one before it, or outside of the matrix; several labels; a qid that is
// missing. malformed: anything else that is no record of this format.
class LibsvmCodec {
 public:
  struct State {};

  // Throws std::invalid_argument: another dtype.
  explicit LibsvmCodec(const LibsvmRules& rules);
  const std::vector<Field>& fields() const noexcept { return fields_; }
  void decode(std::span<const std::byte> record, const Place& place, const File& file, std::size_t row, Batch& batch,
              State& state) const;

 private:
  template <typename T>
  void decode_as(std::span<const std::byte> record, const Place& place, const File& file, std::size_t row,
                 Batch& batch) const;

  LibsvmRules rules_;
  std::vector<Field> fields_;
};

std::shared_ptr<const Source> libsvm_source(Index index, const LibsvmRules& rules);

}  // namespace launcher::data

#endif
