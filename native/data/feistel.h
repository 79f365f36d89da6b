// The walk of data::Network in plain numbers: one text for the host's compiler (C++20) and for nvcc (C++17), so that an
// order has the same records on a GPU.
#ifndef LAUNCHER_DATA_FEISTEL_H
#define LAUNCHER_DATA_FEISTEL_H

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define LAUNCHER_FEISTEL __host__ __device__ __forceinline__
#else
#define LAUNCHER_FEISTEL __attribute__((always_inline)) inline
#endif

namespace launcher::data {

constexpr std::size_t kFeistelRounds = 8;  // even: a pair of rounds changes both halves

struct FeistelKey {
  std::uint32_t first, second;
};

struct Feistel {
  std::uint64_t n;  // permutes 0 .. n-1
  std::uint32_t low_bits;
  std::uint32_t low_mask, high_mask;  // of the halves, of which `high` may have one bit more
  FeistelKey keys[kFeistelRounds];
};

// The integer hash "lowbias32" with keys before its two products (Wellons: Prospecting for Hash Functions, 2018).
LAUNCHER_FEISTEL void scramble(std::uint32_t& word, FeistelKey key) noexcept {
  word = (word ^ key.first) * 0x7FEB352DU;
  word = ((word ^ (word >> 15)) + key.second) * 0x846CA68BU;
  word ^= word >> 16;
}

// The place of `index` (below n): the network is applied until its result is below n, fewer than twice on average for
// any n but the smallest (it has at least four bits).
LAUNCHER_FEISTEL std::uint64_t walk(const Feistel& network, std::uint64_t index) noexcept {
  if (network.n <= 1) {
    return index;
  }
  do {
    std::uint32_t low = static_cast<std::uint32_t>(index) & network.low_mask;
    std::uint32_t high = static_cast<std::uint32_t>(index >> network.low_bits);
    for (std::size_t round = 0; round < kFeistelRounds; round += 2) {
      std::uint32_t word = low;
      scramble(word, network.keys[round]);
      high ^= word & network.high_mask;
      word = high;
      scramble(word, network.keys[round + 1]);
      low ^= word & network.low_mask;
    }
    index = (static_cast<std::uint64_t>(high) << network.low_bits) | low;
  } while (index >= network.n);
  return index;
}

}  // namespace launcher::data

#endif
