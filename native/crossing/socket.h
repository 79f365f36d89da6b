// What a leg listens at, sends and receives over, and is woken by.
#ifndef LAUNCHER_CROSSING_SOCKET_H
#define LAUNCHER_CROSSING_SOCKET_H

#include <cstdint>
#include <utility>

namespace launcher::crossing {

// Owns a descriptor that a fork's child does not hold: it is closed there at once, since a peer learns of this
// process's end from the end of its connections. What owns it is not looked at for that, as another thread may have
// been changing it when the process was forked.
class Socket {
 public:
  Socket() noexcept = default;
  explicit Socket(int fd) noexcept;
  Socket(Socket&& other) noexcept
      : fd_(std::exchange(other.fd_, -1)), generation_(std::exchange(other.generation_, 0)) {}
  Socket& operator=(Socket&& other) noexcept {
    std::swap(fd_, other.fd_);
    std::swap(generation_, other.generation_);
    return *this;
  }
  Socket(const Socket&) = delete;
  Socket& operator=(const Socket&) = delete;
  ~Socket();
  int get() const noexcept { return fd_; }
  explicit operator bool() const noexcept { return fd_ >= 0; }

 private:
  int fd_ = -1;
  std::uint64_t generation_ = 0;  // in a fork the number may be somebody else's
};

}  // namespace launcher::crossing

#endif
