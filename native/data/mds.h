// Shards of MosaicML streaming (MDS, version 2).
//
// A shard is: u32 the number n of samples; n + 1 times u32, where each sample begins in the file and where the last one
// ends; a header of JSON with the columns; the samples. A sample is: u32 for each column of no fixed size, the bytes of
// its value; then the values, in the order of the columns. All numbers are little-endian.
#ifndef LAUNCHER_DATA_MDS_H
#define LAUNCHER_DATA_MDS_H

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "index.h"
#include "indexed_source.h"

namespace launcher::data {

// The samples of a shard. Throws DataError: truncated, malformed. `skip`: of a shard that was cut, the samples that are
// whole are kept and the loss is noted; a table that can not be right is an error all the same.
FileIndex scan_mds(const File& file, bool skip);
// The same of bytes in memory that stand for `size` bytes of a file: of which at least the table must be there.
FileIndex scan_mds(std::span<const std::byte> table, std::uint64_t size, const std::string& path, bool skip);

// The JSON of the header. Throws DataError.
std::string mds_header(const File& file);

enum class MdsCoding : std::uint8_t {
  plain = 0,   // the value's bytes as they are: of a fixed size, or ragged
  shaped = 1,  // an array with its shape before it, of one dimension: ragged
};

struct MdsColumn {
  Field field;
  std::uint64_t bytes = 0;  // of each value; 0: the sample says
  MdsCoding coding = MdsCoding::plain;
  bool wanted = true;
};

class MdsCodec {
 public:
  struct State {
    std::vector<std::span<const std::byte>> values;
  };

  // Throws std::invalid_argument: a column's size is not that of its field.
  explicit MdsCodec(std::vector<MdsColumn> columns);
  const std::vector<Field>& fields() const noexcept { return fields_; }
  void decode(std::span<const std::byte> record, const Place& place, const File& file, std::size_t row, Batch& batch,
              State& state) const;

 private:
  std::vector<MdsColumn> columns_;
  std::vector<Field> fields_;  // of the columns that are wanted
};

std::shared_ptr<const Source> mds_source(Index index, std::vector<MdsColumn> columns);

}  // namespace launcher::data

#endif
