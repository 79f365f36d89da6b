// The order of an epoch: which record is at which position. A pure function of its parameters, never of who asks.
#ifndef LAUNCHER_DATA_ORDER_H
#define LAUNCHER_DATA_ORDER_H

#include <cstddef>
#include <cstdint>
#include <vector>

#include "feistel.h"

namespace launcher::data {

// A change of any order's result needs another number: saved states name it.
inline constexpr std::uint32_t kOrderVersion = 1;

enum class Shuffle : std::uint8_t {
  none = 0,    // as the files have them
  full = 1,    // any record at any position
  blocks = 2,  // whole extents of neighbouring records are moved, then the records of some of them mixed
};

struct OrderParameters {
  Shuffle shuffle = Shuffle::full;
  std::uint64_t seed = 0;
  std::uint64_t epoch = 0;
  std::uint64_t records = 0;
  // blocks only:
  std::uint64_t extent = 1;  // records that stay together on their way to a window
  std::uint64_t window = 1;  // extents whose records are mixed
  std::uint64_t lanes = 1;   // parts of the order that different hosts read; position p is in lane p % lanes
};

// A keyed permutation of 0 .. n-1 in constant memory: a Feistel network whose halves may differ by a bit, applied again
// while its result is n or more (cycle walking). Made in some 20 ns. Of few bits it is not uniform over all orders:
// where that matters, and n is small, Permutation takes a table.
class Network {
 public:
  Network(std::uint64_t n, std::uint64_t key) noexcept;
  std::uint64_t operator()(std::uint64_t index) const noexcept;  // index < n
  std::uint64_t inverse(std::uint64_t image) const noexcept;
  // operator() of begin, begin + 1, ...: several at a time.
  void fill(std::uint64_t begin, std::size_t count, std::uint64_t* out) const noexcept;

  const Feistel& numbers() const noexcept { return numbers_; }

 private:
  Feistel numbers_;
};

// A keyed permutation of 0 .. n-1: a shuffled table (Fisher-Yates, unbiased draws) up to kTableRecords, above a
// Network.
class Permutation {
 public:
  Permutation(std::uint64_t n, std::uint64_t key);
  std::uint64_t operator()(std::uint64_t index) const noexcept;  // index < n
  std::uint64_t inverse(std::uint64_t image) const noexcept;     // of a table: looks through it
  // operator() of begin, begin + 1, ...: several at a time.
  void fill(std::uint64_t begin, std::size_t count, std::uint64_t* out) const noexcept;
  const std::vector<std::uint16_t>& table() const noexcept { return table_; }  // empty: the network
  const Network& network() const noexcept { return network_; }

  static constexpr std::uint64_t kTableRecords = 65536;

 private:
  std::vector<std::uint16_t> table_;  // empty: the network
  Network network_;
};

// One part of an order. The positions lane, lane + lanes, lane + 2 * lanes, ... are its indices 0, 1, 2, ...
class Order {
 public:
  // Throws std::invalid_argument: extent, window or lanes of 0.
  explicit Order(const OrderParameters& parameters);
  const OrderParameters& parameters() const noexcept { return parameters_; }
  const Permutation& records() const noexcept { return records_; }                       // full: at() is this one's
  std::uint64_t at(std::uint64_t position) const noexcept;                               // position < records
  void fill(std::uint64_t begin, std::size_t count, std::uint64_t* out) const noexcept;  // of consecutive positions
  // Of the positions first, first + lanes, ...: those of one lane that follow `first`.
  void fill_lane(std::uint64_t first, std::size_t count, std::uint64_t* out) const noexcept;

 private:
  struct Stretch;  // of a lane: records that are mixed with each other
  Stretch stretch(std::uint64_t lane, std::uint64_t index) const noexcept;
  std::uint64_t record_of(std::uint64_t place) const noexcept;  // among the extents as they are moved

  OrderParameters parameters_;
  std::uint64_t key_;
  Permutation records_;  // full
  Permutation extents_;  // blocks
  std::uint64_t chunk_;  // blocks: records of a window
  // blocks: where the last extent begins, which may be a short one, and how many records it lacks.
  std::uint64_t short_begin_ = 0, lacking_ = 0;
};

}  // namespace launcher::data

#endif
