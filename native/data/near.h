// Bringing records near the processor before they are copied, and copying them.
#ifndef LAUNCHER_DATA_NEAR_H
#define LAUNCHER_DATA_NEAR_H

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace launcher::data {

inline constexpr std::size_t kNearBytes = 4096;  // of a longer record the rest comes while its beginning is copied
inline constexpr std::size_t kLineBytes = 64;

// Functions that prefetch are always inlined: to GCC one that does nothing else does nothing, and it leaves its calls
// out.
[[gnu::always_inline]] inline void bring_line(const std::byte* begin, std::size_t number) noexcept {
  constexpr int kForReading = 0, kSecondCache = 2;
  __builtin_prefetch(begin + number * kLineBytes, kForReading, kSecondCache);
}

// The lines that `bytes` (1 at least) from `begin` on are in; no more than kNearBytes. Into the second cache: it may
// wait for more lines at a time than the first. Unrolled, because the processor looks ahead over a number of
// instructions, and records that it does not reach do not come.
[[gnu::always_inline]] inline void bring_near(const std::byte* begin, std::size_t bytes) noexcept {
  const auto first = reinterpret_cast<std::uintptr_t>(begin) / kLineBytes;
  const std::size_t wanted = std::min(bytes, kNearBytes);
  std::size_t lines = (reinterpret_cast<std::uintptr_t>(begin) + wanted - 1) / kLineBytes - first + 1;
  for (; lines >= 8; lines -= 8, begin += 8 * kLineBytes) {
    bring_line(begin, 0);
    bring_line(begin, 1);
    bring_line(begin, 2);
    bring_line(begin, 3);
    bring_line(begin, 4);
    bring_line(begin, 5);
    bring_line(begin, 6);
    bring_line(begin, 7);
  }
  switch (lines) {
    case 7:
      bring_line(begin, 6);
      [[fallthrough]];
    case 6:
      bring_line(begin, 5);
      [[fallthrough]];
    case 5:
      bring_line(begin, 4);
      [[fallthrough]];
    case 4:
      bring_line(begin, 3);
      [[fallthrough]];
    case 3:
      bring_line(begin, 2);
      [[fallthrough]];
    case 2:
      bring_line(begin, 1);
      [[fallthrough]];
    case 1:
      bring_line(begin, 0);
      [[fallthrough]];
    default:
      break;
  }
}

// Records that visit() has located and not yet taken, at most.
inline constexpr std::size_t kVisitAhead = 32;

// Calls take(0) ... take(count - 1); locate(i) has been called before, in the same order, and gave the bytes of record
// i (none: there is nothing to bring near), which are near by then.
//
// Records are located by the group, and the first and last lines of a group's are asked for one right after the other:
// what is slow then is that the processor looks up where their pages are, and it only looks up several side by side if
// there is little between them.
template <typename Locate, typename Take>
void visit(std::size_t count, Locate locate, Take take) {
  constexpr std::size_t kGroup = kVisitAhead / 2, kAhead = 8;
  std::array<std::span<const std::byte>, kVisitAhead> found;  // a ring: of this group, and of the next
  const auto locate_group = [&](std::size_t begin) __attribute__((always_inline)) {
    const std::size_t end = std::min(begin + kGroup, count);
    for (std::size_t i = begin; i < end; ++i) {
      found[i % found.size()] = locate(i);
    }
    for (std::size_t i = begin; i < end; ++i) {
      const std::span<const std::byte> record = found[i % found.size()];
      if (!record.empty()) {
        bring_line(record.data(), 0);
        bring_line(&record.back(), 0);
      }
    }
  };
  const auto bring = [&](std::size_t i) __attribute__((always_inline)) {
    const std::span<const std::byte> record = found[i % found.size()];
    if (!record.empty()) {
      bring_near(record.data(), record.size());
    }
  };
  locate_group(0);
  for (std::size_t i = 0; i < std::min(kAhead, count); ++i) {
    bring(i);
  }
  for (std::size_t i = 0; i < count; ++i) {
    if (i % kGroup == 0 && i + kGroup < count) {
      locate_group(i + kGroup);
    }
    if (i + kAhead < count) {
      bring(i + kAhead);
    }
    take(i);
  }
}

// Of more than kNearBytes whose beginning is near: what comes next is brought near meanwhile.
void copy_long(std::byte* to, const std::byte* from, std::size_t bytes) noexcept;

// memcpy() for values out of a record whose beginning is near. Both may be null where `bytes` is 0.
inline void copy_near(std::byte* to, const std::byte* from, std::size_t bytes) noexcept {
  if (bytes == sizeof(std::uint64_t)) {
    std::memcpy(to, from, sizeof(std::uint64_t));
  } else if (bytes > kNearBytes) {
    copy_long(to, from, bytes);
  } else if (bytes != 0) {
    std::memcpy(to, from, bytes);
  }
}

}  // namespace launcher::data

#endif
