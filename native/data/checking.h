// Reads records to see whether they can be read.
#ifndef LAUNCHER_DATA_CHECKING_H
#define LAUNCHER_DATA_CHECKING_H

#include <cstddef>
#include <cstdint>
#include <vector>

#include "error.h"
#include "source.h"

namespace launcher::data {

struct Checked {
  std::uint64_t bad = 0;          // records that can not be read
  std::vector<DataError> errors;  // of the first of them, `most` at most
};

// Reads the records begin .. end, each once, and goes on after those that can not be read.
Checked check_records(const Source& source, std::uint64_t begin, std::uint64_t end, std::size_t most);

}  // namespace launcher::data

#endif
