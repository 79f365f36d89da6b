#include "logfile.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

namespace launcher::guardian {

CappedFile::CappedFile(std::string path, std::uint64_t cap_bytes) : path_(std::move(path)), cap_bytes_(cap_bytes) {
  if (!path_.empty()) open();
}

CappedFile::~CappedFile() {
  if (fd_ >= 0) ::close(fd_);
}

void CappedFile::open() {
  fd_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (fd_ < 0) fail("open");
}

void CappedFile::fail(const char* what) {
  error_ =
      "cannot " + std::string(what) + " " + path_ + ": " + std::strerror(errno) + "; its text goes to the console only";
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

void CappedFile::write(std::string_view bytes) {
  while (fd_ >= 0 && !bytes.empty()) {
    if (cap_bytes_ != 0 && size_ >= cap_bytes_ / 2) {
      ::close(fd_);
      fd_ = -1;
      if (std::rename(path_.c_str(), (path_ + ".1").c_str()) != 0) return fail("rotate");
      size_ = 0;
      open();
      continue;
    }
    const ssize_t written = ::write(fd_, bytes.data(), bytes.size());
    if (written < 0) {
      if (errno == EINTR) continue;
      return fail("write");
    }
    size_ += static_cast<std::uint64_t>(written);
    bytes.remove_prefix(static_cast<std::size_t>(written));
  }
}

std::string CappedFile::take_error() {
  std::string error = std::move(error_);
  error_.clear();
  return error;
}

}  // namespace launcher::guardian
