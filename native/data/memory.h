// The memory that this process could still get.
#ifndef LAUNCHER_DATA_MEMORY_H
#define LAUNCHER_DATA_MEMORY_H

#include <cstdint>

namespace launcher::data {

// Bytes: what the machine has available (with the page cache that it could give up), and no more than the limit of any
// cgroup this process is in. 0: it can not be told.
std::uint64_t available_memory() noexcept;

}  // namespace launcher::data

#endif
