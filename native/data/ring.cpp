#include "ring.h"

#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>

namespace launcher::data {
namespace {

constexpr std::size_t kHeaderBytes = 65536;  // a multiple of any page size: the data behind it is mapped by itself
constexpr std::size_t kLine = 128;           // two lines: prefetchers fetch them in pairs

[[noreturn]] void throw_system(const std::string& what) {
  throw std::system_error(errno, std::generic_category(), what);
}

}  // namespace

struct Ring::Header {
  std::uint32_t magic = kRingMagic;
  std::uint64_t capacity = 0;
  alignas(kLine) std::atomic<std::uint64_t> head{0};
  alignas(kLine) std::atomic<std::uint64_t> tail{0};
  alignas(kLine) std::atomic<std::uint32_t> reader_sleeps{0};
  std::atomic<std::uint32_t> writer_sleeps{0};
};
static_assert(std::atomic<std::uint64_t>::is_always_lock_free && std::atomic<std::uint32_t>::is_always_lock_free);

Descriptor Ring::create(std::size_t bytes) {
  const std::size_t capacity = std::bit_ceil(std::max(bytes, kHeaderBytes));
  Descriptor memory(::memfd_create("launcher-records", MFD_CLOEXEC));
  if (!memory) {
    throw_system("memfd_create");
  }
  if (::ftruncate(memory.get(), static_cast<off_t>(kHeaderBytes + capacity)) != 0) {
    throw_system("shared memory of " + std::to_string(kHeaderBytes + capacity) + " bytes");
  }
  void* address = ::mmap(nullptr, kHeaderBytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory.get(), 0);
  if (address == MAP_FAILED) {
    throw_system("mmap of shared memory");
  }
  (new (address) Header)->capacity = capacity;
  ::munmap(address, kHeaderBytes);
  return memory;
}

Ring::Ring(int memory) {
  struct stat info;
  if (::fstat(memory, &info) != 0) {
    throw_system("fstat of shared memory");
  }
  const auto size = static_cast<std::uint64_t>(info.st_size);
  if (size <= kHeaderBytes || !std::has_single_bit(size - kHeaderBytes)) {
    throw std::invalid_argument("shared memory of " + std::to_string(size) + " bytes is no ring of records");
  }
  capacity_ = static_cast<std::size_t>(size - kHeaderBytes);
  // One reservation, so that nothing else can come between its parts.
  const std::size_t whole = kHeaderBytes + 2 * capacity_;
  void* address = ::mmap(nullptr, whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (address == MAP_FAILED) {
    throw_system("address space of " + std::to_string(whole) + " bytes");
  }
  header_ = static_cast<Header*>(address);
  data_ = static_cast<std::byte*>(address) + kHeaderBytes;
  constexpr int access = PROT_READ | PROT_WRITE, how = MAP_SHARED | MAP_FIXED;
  if (::mmap(address, kHeaderBytes + capacity_, access, how, memory, 0) == MAP_FAILED ||
      ::mmap(data_ + capacity_, capacity_, access, how, memory, static_cast<off_t>(kHeaderBytes)) == MAP_FAILED) {
    const int error = errno;
    ::munmap(address, whole);
    errno = error;
    throw_system("mmap of shared memory of " + std::to_string(size) + " bytes");
  }
  if (header_->magic != kRingMagic || header_->capacity != capacity_) {
    ::munmap(address, whole);
    throw std::invalid_argument("the ring of records is of another build of this package");
  }
}

Ring::~Ring() { ::munmap(header_, kHeaderBytes + 2 * capacity_); }

bool Ring::has_room(std::size_t bytes) noexcept {
  if (capacity_ - (head_ - seen_) >= bytes) {
    return true;
  }
  seen_ = header_->tail.load(std::memory_order_seq_cst);
  return capacity_ - (head_ - seen_) >= bytes;
}

bool Ring::publish() noexcept {
  // There the flag, then a look at the head; here the head, then a look at the flag: one of the two sees the other.
  header_->head.store(head_, std::memory_order_seq_cst);
  return header_->reader_sleeps.load(std::memory_order_seq_cst) != 0 &&
         header_->reader_sleeps.exchange(0, std::memory_order_seq_cst) != 0;
}

void Ring::announce_writer_sleep(bool sleeps) noexcept {
  header_->writer_sleeps.store(sleeps ? 1 : 0, std::memory_order_seq_cst);
}

const std::byte* Ring::next() noexcept {
  if (seen_ == tail_) {
    seen_ = header_->head.load(std::memory_order_seq_cst);
  }
  return seen_ == tail_ ? nullptr : data_ + (tail_ & (capacity_ - 1));
}

void Ring::release(std::size_t bytes) noexcept {
  tail_ += bytes;
  header_->tail.store(tail_, std::memory_order_release);
}

bool Ring::writer_sleeps() noexcept {
  header_->tail.store(tail_, std::memory_order_seq_cst);
  return header_->writer_sleeps.load(std::memory_order_seq_cst) != 0 &&
         header_->writer_sleeps.exchange(0, std::memory_order_seq_cst) != 0;
}

void Ring::announce_reader_sleep(bool sleeps) noexcept {
  header_->reader_sleeps.store(sleeps ? 1 : 0, std::memory_order_seq_cst);
}

void knock(int socket) noexcept {
  const char byte = 0;
  static_cast<void>(::send(socket, &byte, 1, MSG_DONTWAIT | MSG_NOSIGNAL));
}

bool answer(int socket) noexcept {
  std::array<char, 64> bytes;
  for (;;) {
    const ssize_t count = ::recv(socket, bytes.data(), bytes.size(), MSG_DONTWAIT);
    if (count == 0 || (count < 0 && errno != EAGAIN && errno != EINTR)) {
      return false;
    }
    if (count < 0 && errno == EAGAIN) {
      return true;
    }
  }
}

}  // namespace launcher::data
