// Messages of more than 2 GiB.
#ifndef LAUNCHER_TESTS_LONG_MEMORY_H
#define LAUNCHER_TESTS_LONG_MEMORY_H

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>

#include "check.h"
#include "launcher/collectives.h"

inline constexpr std::size_t kLongPeriod = std::size_t{4} << 20;
inline constexpr std::size_t kLongBytes = (std::size_t{2} << 30) + kLongPeriod;
inline constexpr std::size_t kLongTail = std::size_t{1} << 20;
inline constexpr std::size_t kLongMessage = kLongBytes + kLongTail;

// `bytes` of address space: the same kLongPeriod again and again, then kLongTail of its own. A message longer than its
// memory, of which the end shows that it was reached.
class LongMemory {
 public:
  explicit LongMemory(std::size_t bytes = kLongBytes) : bytes_(bytes) {
    const int file = memfd_create("launcher_test", MFD_CLOEXEC);
    CHECK(file >= 0 && ftruncate(file, static_cast<off_t>(kLongPeriod + kLongTail)) == 0);
    data_ = static_cast<char*>(
        mmap(nullptr, bytes + kLongTail, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (std::size_t offset = 0; offset < bytes; offset += kLongPeriod) {
      map(file, offset, std::min(kLongPeriod, bytes - offset), 0);
    }
    map(file, bytes, kLongTail, kLongPeriod);
    close(file);
  }
  LongMemory(const LongMemory&) = delete;
  LongMemory& operator=(const LongMemory&) = delete;
  ~LongMemory() { munmap(data_, bytes_ + kLongTail); }

  char* data() const { return data_; }
  template <typename Value>
  void fill(Value all, Value tail) const {
    std::fill_n(values<Value>(0), kLongPeriod / sizeof(Value), all);
    std::fill_n(values<Value>(bytes_), kLongTail / sizeof(Value), tail);
  }
  template <typename Value>
  bool holds(Value all, Value tail) const {
    const auto is = [](const Value* from, std::size_t bytes, Value value) {
      return std::all_of(from, from + bytes / sizeof(Value), [value](Value other) { return other == value; });
    };
    return is(values<Value>(0), kLongPeriod, all) && is(values<Value>(bytes_), kLongTail, tail);
  }

 private:
  template <typename Value>
  Value* values(std::size_t offset) const {
    return reinterpret_cast<Value*>(data_ + offset);
  }
  void map(int file, std::size_t offset, std::size_t bytes, std::size_t from) {
    CHECK(mmap(data_ + offset, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_POPULATE, file,
               static_cast<off_t>(from)) == data_ + offset);
  }
  std::size_t bytes_;
  char* data_;
};

// The sum of two ranks.
template <typename Value>
void expect_long_sum(launcher::collectives::Group& group, launcher::collectives::DType dtype, const LongMemory& source,
                     const LongMemory& target) {
  const auto own = static_cast<Value>(3 + group.rank());
  source.fill<Value>(own, static_cast<Value>(own + 10));
  target.fill<Value>(0, 0);
  const launcher::collectives::Piece piece{source.data(), target.data(), kLongMessage / sizeof(Value)};
  group.allreduce({&piece, 1}, dtype, launcher::collectives::ReduceOp::sum);
  CHECK(target.holds<Value>(7, 27));
}

#endif
