#include "system.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <linux/membarrier.h>
#include <poll.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <system_error>

namespace launcher::collectives {
namespace {

std::atomic<std::uint64_t> generation{0};

struct Stat {
  char state = '?';
  std::uint64_t started = 0;  // clock ticks since boot
};

// Fields 3 and 22 of /proc/PID/stat (proc(5)); false, with errno ENOENT or ESRCH: no such process.
bool read_stat(pid_t pid, Stat& out) noexcept {
  std::array<char, 64> path;
  static_cast<void>(std::snprintf(path.data(), path.size(), "/proc/%d/stat", static_cast<int>(pid)));
  const Descriptor file(::open(path.data(), O_RDONLY | O_CLOEXEC));
  if (!file) {
    return false;
  }
  std::array<char, 1024> text;
  const ssize_t count = ::read(file.get(), text.data(), text.size() - 1);
  if (count <= 0) {
    errno = count == 0 ? ESRCH : errno;
    return false;
  }
  text[static_cast<std::size_t>(count)] = '\0';
  const char* at = std::strrchr(text.data(), ')');  // the name before it may hold anything
  if (at == nullptr || at[1] != ' ') {
    errno = EPROTO;
    return false;
  }
  at += 2;
  out.state = *at;
  for (int field = 3; field < 22 && at != nullptr; ++field) {
    at = std::strchr(at, ' ');
    at = at == nullptr ? nullptr : at + 1;
  }
  out.started = at == nullptr ? 0 : std::strtoull(at, nullptr, 10);
  return true;
}

}  // namespace

void throw_system(const std::string& what) { throw std::system_error(errno, std::generic_category(), what); }

Descriptor make_memory(const char* label, std::size_t bytes) {
  Descriptor memory(::memfd_create(label, MFD_CLOEXEC));
  if (!memory) {
    throw_system("memfd_create");
  }
  if (::ftruncate(memory.get(), static_cast<off_t>(bytes)) != 0) {
    throw_system("shared memory of " + std::to_string(bytes) + " bytes");
  }
  return memory;
}

Mapping::Mapping(const Descriptor& memory, std::size_t bytes) : bytes_(bytes) {
  struct stat info;
  if (::fstat(memory.get(), &info) != 0) {
    throw_system("fstat of shared memory");
  }
  if (static_cast<std::size_t>(info.st_size) < bytes) {
    throw std::invalid_argument("shared memory of " + std::to_string(info.st_size) + " bytes, expected " +
                                std::to_string(bytes));
  }
  void* address = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory.get(), 0);
  if (address == MAP_FAILED) {
    throw_system("mmap of shared memory of " + std::to_string(bytes) + " bytes");
  }
  address_ = address;
  static_cast<void>(::madvise(address_, bytes_, MADV_HUGEPAGE));  // a wish; small pages work as well
}

Mapping::~Mapping() {
  if (address_ != nullptr) {
    ::munmap(address_, bytes_);
  }
}

void futex_wait(std::atomic<std::uint32_t>& word, std::uint32_t expected, std::chrono::nanoseconds limit) noexcept {
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(limit);
  const timespec relative{static_cast<time_t>(seconds.count()), static_cast<long>((limit - seconds).count())};
  ::syscall(SYS_futex, &word, FUTEX_WAIT, expected, &relative, nullptr, 0);
}

void futex_wake_all(std::atomic<std::uint32_t>& word) noexcept {
  ::syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

bool allow_remote_fences() noexcept {
  return ::syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED, 0, 0) == 0;
}

void remote_fence() noexcept { ::syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL_EXPEDITED, 0, 0); }

Process::Process(pid_t pid) : pid_(pid) {
  Stat stat;
  if (read_stat(pid, stat)) {
    started_ = stat.started;
  }
#ifdef SYS_pidfd_open
  handle_ = Descriptor(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
  if (!handle_ && (errno == EMFILE || errno == ENFILE)) {  // then /proc could not be asked either
    throw_system("handle of process " + std::to_string(pid));
  }
#endif
}

bool Process::alive() const noexcept {
  if (pid_ == 0) {
    return true;
  }
  if (handle_) {
    pollfd ended{handle_.get(), POLLIN, 0};
    return ::poll(&ended, 1, 0) != 1;
  }
  Stat stat;
  if (!read_stat(pid_, stat)) {
    return errno != ENOENT && errno != ESRCH;  // no descriptor is left to look with, say: nothing is known then
  }
  return stat.started == started_ && stat.state != 'Z' && stat.state != 'X';
}

bool Process::stopped() const noexcept {
  Stat stat;
  return pid_ != 0 && read_stat(pid_, stat) && (stat.state == 'T' || stat.state == 't');
}

std::uint64_t fork_generation() noexcept {
  static const bool watched = [] {
    ::pthread_atfork(nullptr, nullptr, [] { generation.fetch_add(1, std::memory_order_relaxed); });
    return true;
  }();
  static_cast<void>(watched);
  return generation.load(std::memory_order_relaxed);
}

}  // namespace launcher::collectives
