#include "socket.h"

#include <pthread.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstddef>

#include "system.h"

namespace launcher::crossing {
namespace {

// By descriptor. One with a higher number stays open in a child that does not exec.
std::array<std::atomic<bool>, 65'536> held{};
std::atomic<int> highest{-1};

bool fits(int fd) noexcept { return fd >= 0 && static_cast<std::size_t>(fd) < held.size(); }

void watch_forks() noexcept {
  static const int watched = ::pthread_atfork(nullptr, nullptr, [] {
    for (int fd = highest.load(std::memory_order_relaxed); fd >= 0; --fd) {
      if (held[static_cast<std::size_t>(fd)].exchange(false, std::memory_order_relaxed)) {
        ::close(fd);
      }
    }
  });
  static_cast<void>(watched);
}

}  // namespace

Socket::Socket(int fd) noexcept : fd_(fd), generation_(collectives::fork_generation()) {
  watch_forks();
  if (fits(fd)) {
    int before = highest.load(std::memory_order_relaxed);
    while (before < fd && !highest.compare_exchange_weak(before, fd, std::memory_order_relaxed)) {
    }
    held[static_cast<std::size_t>(fd)].store(true, std::memory_order_relaxed);
  }
}

Socket::~Socket() {
  if (fd_ < 0 || generation_ != collectives::fork_generation()) {
    return;
  }
  if (fits(fd_)) {
    held[static_cast<std::size_t>(fd_)].store(false, std::memory_order_relaxed);
  }
  ::close(fd_);
}

}  // namespace launcher::crossing
