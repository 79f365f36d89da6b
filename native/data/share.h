// Which positions of the order a rank reads at a step. Pure arithmetic.
//
// Step s of `world` ranks with `batch` rows each covers the positions base + s * G .. base + (s + 1) * G of the epoch,
// G = world * batch; rank r has rows r * batch .. of them, sorted by lane first (with one lane: as they come). So the
// union of what the ranks read is each position once, whatever the world size and the batch were before `base`.
#ifndef LAUNCHER_DATA_SHARE_H
#define LAUNCHER_DATA_SHARE_H

#include <cstddef>
#include <cstdint>

#include "order.h"

namespace launcher::data {

enum class Tail : std::uint8_t {
  drop = 0,       // the records that do not fill a step of all ranks are left out
  pad = 1,        // the last step is filled up with records from the order's start, masked
  short_one = 2,  // the last step has fewer rows, on some ranks perhaps none
};

inline constexpr std::uint64_t kNotAgreed = ~std::uint64_t{0};

struct ShareParameters {
  std::uint64_t records = 0;  // of the epoch, n
  std::uint64_t base = 0;     // the position to begin at
  std::uint64_t world = 1, rank = 0;
  std::uint64_t batch = 1;
  std::uint64_t lanes = 1;  // as the order's
  Tail tail = Tail::drop;
  // What ranks with different records (each host has its own) have agreed upon, in place of what follows from the
  // above. A rank whose records are used up before that has steps of padding only (pad) or of no rows (short).
  std::uint64_t agreed_steps = kNotAgreed;
};

// The number of steps from `base` to the epoch's end: the same on all ranks.
std::uint64_t steps(const ShareParameters& parameters) noexcept;

struct Rows {
  std::size_t rows = 0;  // as Span has them
  std::size_t valid = 0;
};

// Where a step's rows of this rank are in the order. With one lane, row r < valid has the position begin + r, and each
// one after it, which is padding, (padding + r - valid) % records.
struct Span {
  std::uint64_t begin = 0;    // meaningless with more lanes, or without valid rows
  std::uint64_t padding = 0;  // below `records`
  std::size_t rows = 0;       // to fetch; fewer than `batch` only in a short last step
  std::size_t valid = 0;      // the first of them; those after it are padding, masked 0
};
Span span_of(const ShareParameters& parameters, std::uint64_t step) noexcept;

// The records of step `step` for this rank, in `out` (room for `batch`).
Rows rows_of(const ShareParameters& parameters, const Order& order, std::uint64_t step, std::uint64_t* out) noexcept;

}  // namespace launcher::data

#endif
