// One batch: a column for each field, in memory that is used again and again.
#ifndef LAUNCHER_DATA_BATCH_H
#define LAUNCHER_DATA_BATCH_H

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "launcher/elements.h"

namespace launcher::data {

using collectives::DType;
using collectives::size_of;

// The numbers are part of the Python face (launcher/data/fields.py).
enum class Kind : std::uint8_t {
  fixed = 0,   // the same number of values in each record
  ragged = 1,  // any number of values: bytes of an image, a line of text
  sparse = 2,  // keys and values: a row of a sparse matrix
};

struct Field {
  std::string name;
  Kind kind = Kind::fixed;
  DType dtype = DType::uint8;
  // fixed: of one record, empty for a scalar. sparse: of the dense record. ragged: empty.
  std::vector<std::uint64_t> shape;

  std::uint64_t values() const noexcept;  // of one dense record: the product of the shape
  bool operator==(const Field&) const = default;
};

// Bytes that are not initialised, page-aligned, and kept when less is needed. What grows it must not throw it away:
// `registered` memory (pinned for a GPU) is unregistered by whoever registered it, see the engine.
class Buffer {
 public:
  Buffer() noexcept = default;
  explicit Buffer(std::size_t bytes);
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer();

  std::byte* data() noexcept { return data_; }
  const std::byte* data() const noexcept { return data_; }
  std::size_t capacity() const noexcept { return capacity_; }
  // At least `bytes`, of which the first `kept` stay as they are. Grows by half at least. Throws std::bad_alloc.
  void reserve(std::size_t bytes, std::size_t kept);

 private:
  std::byte* data_ = nullptr;
  std::size_t capacity_ = 0;  // a multiple of the page size
};

// fixed: `values` has rows * Field::values() values in place, allocated for all rows of the batch.
// ragged: row r is values[offsets[r] .. offsets[r + 1]), in elements; offsets has rows + 1 entries, offsets[0] == 0.
// sparse: the same, with `keys` (uint64, one for each value) beside it: CSR.
struct Column {
  Buffer values;
  Buffer keys;
  std::vector<std::int64_t> offsets;

  template <typename T>
  T* fixed_row(std::size_t row, std::size_t values_per_row) noexcept {
    return reinterpret_cast<T*>(values.data()) + row * values_per_row;
  }
};

struct Batch {
  // For `capacity` rows of these fields.
  Batch(const std::vector<Field>& fields, std::size_t capacity);

  std::vector<Column> columns;  // as the source's fields
  std::size_t rows = 0;         // that are complete
  std::size_t capacity;
};

// Room for `count` more values of `bytes` each at the end of a ragged or sparse column whose row `row` comes next:
// where they go. The caller then sets offsets[row + 1]; a row that fails before that has changed nothing.
std::byte* append(Column& column, std::size_t row, std::size_t count, std::size_t bytes);
std::uint64_t* append_keys(Column& column, std::size_t row, std::size_t count);

}  // namespace launcher::data

#endif
