#include "memory.h"

#include <algorithm>
#include <exception>
#include <fstream>
#include <string>

namespace launcher::data {
namespace {

std::uint64_t available_of_machine() {
  std::ifstream lines("/proc/meminfo");
  std::string name;
  for (std::uint64_t kibibytes = 0; lines >> name >> kibibytes; lines.ignore(64, '\n')) {
    if (name == "MemAvailable:") {
      return kibibytes * 1024;
    }
  }
  return 0;
}

// Of the cgroup and of all above it. In a container the path may be the host's: what can not be read limits nothing,
// and the top of what is mounted is the container's own.
std::uint64_t lower(std::uint64_t bytes, const std::string& mount, std::string path, const char* limit) {
  for (;;) {
    std::uint64_t found = 0;
    if (std::ifstream(mount + path + "/" + limit) >> found) {  // "max" is no number
      bytes = std::min(bytes, found);
    }
    if (path.empty()) {
      return bytes;
    }
    path.resize(path.rfind('/'));
  }
}

}  // namespace

std::uint64_t available_memory() noexcept {
  try {
    std::uint64_t bytes = available_of_machine();
    std::ifstream groups("/proc/self/cgroup");
    for (std::string line; std::getline(groups, line);) {  // hierarchy:controllers:path
      const std::size_t controllers = line.find(':'), path = line.find(':', controllers + 1);
      if (path == std::string::npos || line[path + 1] != '/') {
        continue;
      }
      std::string names = line.substr(controllers, path - controllers + 1);  // ":memory:", ":cpu,memory:", "::"
      std::replace(names.begin(), names.end(), ',', ':');
      if (names == "::") {
        bytes = lower(bytes, "/sys/fs/cgroup", line.substr(path + 1), "memory.max");
      } else if (names.find(":memory:") != std::string::npos) {
        bytes = lower(bytes, "/sys/fs/cgroup/memory", line.substr(path + 1), "memory.limit_in_bytes");
      }
    }
    return bytes;
  } catch (const std::exception&) {
    return 0;  // no memory for a line: then there is none to keep files in either
  }
}

}  // namespace launcher::data
