// Mapped files that can not be read any more: the signal becomes zeros and a note of where they are.
//
// A page of a mapping whose file was cut, or whose disk fails, is SIGBUS for whoever touches it. The handler looks the
// address up in a table, puts zeros where the page was, notes it, and lets the reader go on; the reader asks
// afterwards. Jumping out of the reader would leave its locks and objects as they are, in a parser or in memcpy. A
// signal that is none of ours goes to the handler that was there before (Python's faulthandler).
#ifndef LAUNCHER_DATA_FAULT_H
#define LAUNCHER_DATA_FAULT_H

#include <cstddef>
#include <cstdint>

namespace launcher::data {

// Faults of the process so far. It never goes down, and is 0 in almost every process: whoever has read checks no more
// than this while it is.
std::uint64_t file_faults() noexcept;

inline constexpr std::size_t kNoRegion = ~std::size_t{0};

// Watches `bytes` of a mapping from `begin` (page-aligned) on. kNoRegion: the table is full.
std::size_t watch_region(const std::byte* begin, std::uint64_t bytes) noexcept;
// Puts a handler that was installed after ours behind it, if there is one: it would not know our regions.
void watch_again() noexcept;
// Before it is unmapped.
void forget_region(std::size_t region) noexcept;
// The first byte within [offset, offset + bytes) of the region that reads as zeros because of a fault; kNowhere: none.
std::uint64_t lost_byte(std::size_t region, std::uint64_t offset, std::uint64_t bytes) noexcept;

}  // namespace launcher::data

#endif
