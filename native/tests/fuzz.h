// What each fuzz target has. fuzz/<x>.cpp is built with libFuzzer (LAUNCHER_FUZZ), and with fuzz_replay.cpp, which runs
// it over its seeds and what comes of them by chance.
#ifndef LAUNCHER_TESTS_FUZZ_H
#define LAUNCHER_TESTS_FUZZ_H

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "file.h"

// Anything may come in; a fault ends the process.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace launcher::fuzz {

// Inputs that are of the format, to begin with.
std::vector<std::string> seeds();

// CHECK of check.h goes on; a fuzzer wants the process to end there, in any build.
inline void require(bool good, const char* what) {
  if (!good) {
    std::fprintf(stderr, "fuzz: not so: %s\n", what);
    std::abort();
  }
}

// A file with these bytes, in memory.
class MemoryFile {
 public:
  MemoryFile(const std::uint8_t* data, std::size_t size) : descriptor_(memfd_create("fuzz", MFD_CLOEXEC)) {
    require(descriptor_ >= 0 && write(descriptor_, data, size) == static_cast<ssize_t>(size), "a file in memory");
  }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  ~MemoryFile() { close(descriptor_); }

  std::string path() const { return "/proc/self/fd/" + std::to_string(descriptor_); }
  std::shared_ptr<const data::File> open(data::Access access) const {
    return std::make_shared<data::File>(path(), access);
  }

 private:
  int descriptor_;
};

}  // namespace launcher::fuzz

#endif
