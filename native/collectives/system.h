// What a group needs of the operating system, each with an owner that gives it back.
#ifndef LAUNCHER_COLLECTIVES_SYSTEM_H
#define LAUNCHER_COLLECTIVES_SYSTEM_H

#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "launcher/descriptor.h"

namespace launcher::collectives {

[[noreturn]] void throw_system(const std::string& what);  // std::system_error from errno

// Memory without a name, which goes when the last descriptor and mapping of it are gone: nothing to clean up after a
// rank that is killed, and not bound by the size of /dev/shm.
Descriptor make_memory(const char* label, std::size_t bytes);

class Mapping {
 public:
  Mapping() noexcept = default;
  // Throws std::system_error; std::invalid_argument when the file is shorter than `bytes` (touching it would be
  // SIGBUS).
  Mapping(const Descriptor& memory, std::size_t bytes);
  Mapping(Mapping&& other) noexcept
      : address_(std::exchange(other.address_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Mapping& operator=(Mapping&& other) noexcept {
    std::swap(address_, other.address_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping();
  std::byte* address() const noexcept { return static_cast<std::byte*>(address_); }
  std::size_t bytes() const noexcept { return bytes_; }

 private:
  void* address_ = nullptr;
  std::size_t bytes_ = 0;
};

// Sleeps while `word` is `expected`, `limit` at most. Spurious returns are possible.
void futex_wait(std::atomic<std::uint32_t>& word, std::uint32_t expected, std::chrono::nanoseconds limit) noexcept;
void futex_wake_all(std::atomic<std::uint32_t>& word) noexcept;

// A full fence in every thread of this machine that runs at this moment in a process that has allowed it: the slow half
// of a pair of fences, whose other half then costs nothing. False: the kernel has no such call (membarrier(2), Linux
// 4.16), or forbids it.
bool allow_remote_fences() noexcept;
void remote_fence() noexcept;

// Another process of this machine, told apart from a later one of the same number.
class Process {
 public:
  Process() noexcept = default;
  explicit Process(pid_t pid);
  pid_t pid() const noexcept { return pid_; }
  bool alive() const noexcept;    // false also for a zombie
  bool stopped() const noexcept;  // by SIGSTOP or a debugger

 private:
  pid_t pid_ = 0;
  Descriptor handle_;  // none where pidfd_open is forbidden: /proc tells then
  std::uint64_t started_ = 0;
};

// Counts the forks that led to this process: what was made in another generation is not this process's to use.
std::uint64_t fork_generation() noexcept;

inline void relax() noexcept {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");
#endif
}

inline void prefetch_for_writing(const void* line) noexcept {
#if defined(__x86_64__)
  asm volatile("prefetchw %0" ::"m"(*static_cast<const char*>(line)));  // does nothing where the CPU has none
#else
  __builtin_prefetch(line, 1);
#endif
}

}  // namespace launcher::collectives

#endif
