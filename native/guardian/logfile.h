// One log file with a bound on its size.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace launcher::guardian {

// Appends to `path`; when half of `cap_bytes` is reached the file becomes `path` + ".1" (replacing an older one) and a
// new one is begun, so the last cap/2 bytes at least are kept and the disk never holds more than `cap_bytes`.
// An error (disk full, read-only) is remembered once and ends the writing: a log must never stop a training.
class CappedFile {
 public:
  CappedFile(std::string path, std::uint64_t cap_bytes);
  CappedFile(const CappedFile&) = delete;
  CappedFile& operator=(const CappedFile&) = delete;
  ~CappedFile();

  void write(std::string_view bytes);
  // "" or what went wrong, with path and reason; cleared by the call.
  std::string take_error();

 private:
  void open();
  void fail(const char* what);

  std::string path_;
  std::uint64_t cap_bytes_;
  std::uint64_t size_ = 0;
  int fd_ = -1;
  std::string error_;
};

}  // namespace launcher::guardian
