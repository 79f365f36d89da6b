// Records that all have the same number of bytes: raw binary files, .npy.
#ifndef LAUNCHER_DATA_FIXED_SOURCE_H
#define LAUNCHER_DATA_FIXED_SOURCE_H

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "file.h"
#include "source.h"

namespace launcher::data {

// A field and where it begins in the record. Its kind is fixed.
struct FixedField {
  Field field;
  std::uint64_t offset = 0;
};

// `headers`: the bytes before each file's first record. Throws DataError: a file that ends inside a record or in its
// header (truncated). std::invalid_argument: a stride of 0, a field that is not inside the record.
std::shared_ptr<const Source> fixed_source(Files files, std::vector<std::uint64_t> headers, std::uint64_t stride,
                                           std::vector<FixedField> fields);

}  // namespace launcher::data

#endif
