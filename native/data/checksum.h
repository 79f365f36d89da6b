// The sum over what a sidecar says.
#ifndef LAUNCHER_DATA_CHECKSUM_H
#define LAUNCHER_DATA_CHECKSUM_H

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace launcher::data {

// Four sums side by side, as each step waits for the one before it. It finds accidents, not attacks.
inline std::uint64_t checksum(std::span<const std::byte> bytes) noexcept {
  constexpr std::uint64_t kFactor = 0x9E3779B97F4A7C15;  // 2^64 by the golden ratio, odd
  constexpr std::size_t kLanes = 4;
  std::array<std::uint64_t, kLanes> sums = {1, 2, 3, 4};
  const auto mix = [](std::uint64_t sum, std::uint64_t word) {
    sum = (sum ^ word) * kFactor;
    return sum ^ (sum >> 32);
  };
  std::size_t at = 0;
  for (; bytes.size() - at >= sizeof sums; at += sizeof sums) {
    std::array<std::uint64_t, kLanes> words;
    std::memcpy(words.data(), bytes.data() + at, sizeof words);
    for (std::size_t i = 0; i < kLanes; ++i) {
      sums[i] = mix(sums[i], words[i]);
    }
  }
  std::array<std::uint64_t, kLanes> rest{};
  if (at < bytes.size()) {
    std::memcpy(rest.data(), bytes.data() + at, bytes.size() - at);
  }
  std::uint64_t all = bytes.size();
  for (std::size_t i = 0; i < kLanes; ++i) {
    all = mix(all, mix(sums[i], rest[i]));
  }
  return all;
}

}  // namespace launcher::data

#endif
