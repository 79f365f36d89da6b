// Records that were decoded before, row by row, into a file of ours: where the format itself can not be read in place.
#ifndef LAUNCHER_DATA_DECODED_SOURCE_H
#define LAUNCHER_DATA_DECODED_SOURCE_H

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "file.h"
#include "source.h"

namespace launcher::data {

// Row r is at byte r * stride of the file. A fixed field has its values there, at its offset in the row; a ragged field
// two u64: the byte of the file where its values begin, and how many they are.
struct DecodedField {
  Field field;
  std::uint64_t offset = 0;
};

struct Decoded {
  std::shared_ptr<const File> file;  // mapped
  std::uint64_t records = 0, stride = 0;
  std::vector<DecodedField> fields;
  // The files that the records were in: each one's path and first record, ascending.
  std::vector<std::pair<std::string, std::uint64_t>> origins;
  // Whether the file has a name, so that others may change it; else it is memory that only this process has.
  bool named = false;
};

// Throws std::invalid_argument: rows or fields that are not inside what they are in.
std::shared_ptr<const Source> decoded_source(Decoded decoded);

}  // namespace launcher::data

#endif
