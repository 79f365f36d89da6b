// Batches of records that the GPU holds: which records are in one, and their rows. The work of one thread.
#ifndef LAUNCHER_CUDA_GATHER_H
#define LAUNCHER_CUDA_GATHER_H

#include <cstdint>

#include "../data/feistel.h"
#include "table.h"
#include "target.h"

namespace launcher::cuda {

constexpr std::uint32_t kGatherThreads = 256;
constexpr std::uint32_t kGatherAhead = 4;  // loads that a thread has under way
// Blocks that fill any GPU of today: with fewer, each thread has one access only.
constexpr std::uint32_t kManyBlocks = 1024;

// ---- which records

struct Numbering {
  data::Feistel network;
  const std::uint16_t* table;
  std::uint64_t* numbers;
  std::uint64_t records, begin, padding, rows, valid;
  LauncherCudaOrder order;
};

// Goes to a kernel as a parameter, so the epoch's keys need no memory of their own on the GPU.
static_assert(sizeof(Numbering) <= 4096);

inline data::Feistel network_of(const LauncherCudaNetwork& given) {
  static_assert(sizeof given.keys == sizeof data::Feistel::keys, "as many rounds");
  data::Feistel network = {given.n, given.low_bits, given.low_mask, given.high_mask, {}};
  for (std::size_t round = 0; round < data::kFeistelRounds; ++round) {
    network.keys[round] = {given.keys[round][0], given.keys[round][1]};
  }
  return network;
}

LAUNCHER_DEVICE void number_row(const Numbering& job, std::uint64_t row) {
  if (row >= job.rows) {
    return;
  }
  const std::uint64_t position = row < job.valid ? job.begin + row : (job.padding + (row - job.valid)) % job.records;
  std::uint64_t record = position;
  if (job.order == kLauncherCudaByTable) {
    record = job.table[position];
  } else if (job.order == kLauncherCudaByNetwork) {
    record = data::walk(job.network, position);
  }
  job.numbers[row] = record;
}

// ---- their rows

// Division by a number that is the same for a whole grid, as a product: exact for values below 2^31 and divisors from 1
// to 2^31 (Granlund, Montgomery: Division by Invariant Integers using Multiplication, PLDI 1994).
class Divider {
 public:
  explicit Divider(std::uint32_t divisor) : shift_(31) {
    std::uint64_t power = 1;
    while (power < divisor) {
      power *= 2;
      ++shift_;
    }
    magic_ = static_cast<std::uint32_t>(((power << 31) + divisor - 1) / divisor);
  }
  LAUNCHER_HOST_DEVICE std::uint32_t quotient(std::uint32_t value) const {
    return static_cast<std::uint32_t>(static_cast<std::uint64_t>(value) * magic_ >> shift_);
  }

 private:
  std::uint32_t magic_;
  std::uint32_t shift_;
};

// A row is `units` of type Unit. Block b copies the units b * chunk to (b + 1) * chunk of the target.
template <typename Unit>
struct Gathering {
  const Unit* source;
  Unit* target;
  const std::uint64_t* numbers;
  std::uint64_t total;  // units of all rows
  std::uint32_t units;
  std::uint32_t chunk;
  Divider by_units;
};

// A unit's place in its block's rows is then below 2^31.
constexpr std::uint32_t kMostUnits = (1U << 31) - kGatherThreads * kGatherAhead;

// Bytes that divide all of it, 16 at most.
inline std::uint32_t access_bytes(std::uint64_t source, std::uint64_t target, std::uint64_t row_bytes) {
  const std::uint64_t all = source | target | row_bytes | 16;
  return static_cast<std::uint32_t>(all & (~all + 1));
}

inline std::uint32_t chunk_of(std::uint64_t total) {
  return total <= std::uint64_t{kManyBlocks} * kGatherThreads ? kGatherThreads : kGatherThreads * kGatherAhead;
}

// Neighbouring threads have neighbouring units, of the target and, within a row, of the source. The numbers of the rows
// are asked for before the first of them is needed, and all units before the first is stored.
template <typename Unit>
LAUNCHER_DEVICE void gather(const Gathering<Unit>& job, std::uint32_t block, std::uint32_t thread,
                            std::uint32_t threads) {
  const std::uint64_t begin = static_cast<std::uint64_t>(block) * job.chunk;
  const std::uint64_t first_row = begin / job.units;
  const auto in_row = static_cast<std::uint32_t>(begin - first_row * job.units);
  const std::uint64_t left = job.total - begin;
  const std::uint32_t count = left < job.chunk ? static_cast<std::uint32_t>(left) : job.chunk;
  for (std::uint32_t first = thread; first < count; first += kGatherAhead * threads) {
    std::uint64_t places[kGatherAhead] = {};
    LAUNCHER_UNROLL
    for (std::uint32_t ahead = 0; ahead < kGatherAhead; ++ahead) {
      if (first + ahead * threads < count) {
        const std::uint32_t place = in_row + first + ahead * threads;
        const std::uint32_t row = job.by_units.quotient(place);
        places[ahead] = job.numbers[first_row + row] * job.units + (place - row * job.units);
      }
    }
    Unit loaded[kGatherAhead] = {};
    LAUNCHER_UNROLL
    for (std::uint32_t ahead = 0; ahead < kGatherAhead; ++ahead) {
      if (first + ahead * threads < count) {
        loaded[ahead] = load_once(job.source + places[ahead]);
      }
    }
    LAUNCHER_UNROLL
    for (std::uint32_t ahead = 0; ahead < kGatherAhead; ++ahead) {
      if (first + ahead * threads < count) {
        store(job.target + begin + first + ahead * threads, loaded[ahead]);
      }
    }
  }
}

}  // namespace launcher::cuda

#endif
