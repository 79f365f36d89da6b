#include "order.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <utility>

namespace launcher::data {
namespace {

// SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014).
constexpr std::uint64_t kGolden = 0x9E3779B97F4A7C15;

constexpr std::uint64_t mix(std::uint64_t value) noexcept {
  value += kGolden;
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EB;
  return value ^ (value >> 31);
}

// A key of its own for each `part` of what `key` is for.
constexpr std::uint64_t derive(std::uint64_t key, std::uint64_t part) noexcept { return mix(key + part); }

class Generator {
 public:
  explicit Generator(std::uint64_t seed) noexcept : state_(seed) {}
  std::uint64_t operator()() noexcept {
    const std::uint64_t value = mix(state_);
    state_ += kGolden;
    return value;
  }

 private:
  std::uint64_t state_;
};

// 0 .. range-1, each with the same probability (Lemire: Fast Random Integer Generation in an Interval, 2019).
std::uint32_t draw(Generator& generator, std::uint32_t range) noexcept {
  const std::uint32_t biased = (0U - range) % range;
  for (;;) {
    const std::uint64_t product = (generator() >> 32) * range;
    if (static_cast<std::uint32_t>(product) >= biased) {
      return static_cast<std::uint32_t>(product >> 32);
    }
  }
}

// Numbers that go through the network side by side: loops over them become vector instructions.
constexpr std::size_t kGroup = 32;
constexpr std::size_t kBlock = 256;  // numbers that are walked together

}  // namespace

struct Walks {
  [[gnu::always_inline]] static inline void half_round(const std::uint32_t (&from)[kGroup], std::uint32_t (&to)[kGroup],
                                                       FeistelKey key, std::uint32_t mask) noexcept {
    for (std::size_t i = 0; i < kGroup; ++i) {
      std::uint32_t word = from[i];
      scramble(word, key);
      to[i] ^= word & mask;
    }
  }

  // The network once for each of `groups` groups of values, in place.
  [[gnu::always_inline]] static inline void pass(const Feistel& network, std::uint64_t* values,
                                                 std::size_t groups) noexcept {
    const unsigned shift = network.low_bits;
    for (std::size_t group = 0; group < groups; ++group) {
      std::uint64_t* const own = values + group * kGroup;
      std::uint32_t low[kGroup], high[kGroup];
      for (std::size_t i = 0; i < kGroup; ++i) {
        low[i] = static_cast<std::uint32_t>(own[i]) & network.low_mask;
        high[i] = static_cast<std::uint32_t>(own[i] >> shift);
      }
      for (std::size_t round = 0; round < kFeistelRounds; round += 2) {
        half_round(low, high, network.keys[round], network.high_mask);
        half_round(high, low, network.keys[round + 1], network.low_mask);
      }
      for (std::size_t i = 0; i < kGroup; ++i) {
        own[i] = (std::uint64_t{high[i]} << shift) | low[i];
      }
    }
  }

  // Of begin .. begin + count, count <= kBlock.
  [[gnu::always_inline]] static inline void block(const Feistel& network, std::uint64_t begin, std::size_t count,
                                                  std::uint64_t* out) noexcept {
    const auto groups_of = [](std::size_t values) { return (values + kGroup - 1) / kGroup; };
    const std::uint64_t n = network.n;
    std::uint64_t values[kBlock];
    for (std::size_t i = 0; i < kBlock; ++i) {
      values[i] = begin + i;
    }
    pass(network, values, groups_of(count));
    std::memcpy(out, values, count * sizeof *out);
    // Those that came out of 0 .. n-1 go on, packed together.
    std::uint16_t outside[kBlock + 1];
    std::size_t left = 0;
    for (std::size_t i = 0; i < count; ++i) {
      outside[left] = static_cast<std::uint16_t>(i);
      left += values[i] >= n;
    }
    for (std::size_t i = 0; i < left; ++i) {
      values[i] = values[outside[i]];
    }
    while (left > 0) {
      pass(network, values, groups_of(left));
      std::size_t still = 0;
      for (std::size_t i = 0; i < left; ++i) {
        const std::uint64_t value = values[i];
        const std::uint16_t place = outside[i];
        out[place] = value;
        values[still] = value;
        outside[still] = place;
        still += value >= n;
      }
      left = still;
    }
  }

  using Function = void (*)(const Feistel&, std::uint64_t, std::size_t, std::uint64_t*);

  static void plain(const Feistel& network, std::uint64_t begin, std::size_t count, std::uint64_t* out) {
    block(network, begin, count, out);
  }
#ifdef __x86_64__
  [[gnu::target("avx2")]] static void avx2(const Feistel& network, std::uint64_t begin, std::size_t count,
                                           std::uint64_t* out) {
    block(network, begin, count, out);
  }
  [[gnu::target("avx512f,avx512bw,avx512dq,avx512vl")]] static void avx512(const Feistel& network, std::uint64_t begin,
                                                                           std::size_t count, std::uint64_t* out) {
    block(network, begin, count, out);
  }
#endif

  static Function best() noexcept {
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      return avx512;
    }
    if (__builtin_cpu_supports("avx2")) {
      return avx2;
    }
#endif
    return plain;
  }
};

Network::Network(std::uint64_t n, std::uint64_t key) noexcept {
  constexpr unsigned least = 4;  // with fewer bits there are too few different networks
  const unsigned bits = std::max(least, static_cast<unsigned>(std::bit_width(std::max<std::uint64_t>(n, 1) - 1)));
  const auto mask = [](unsigned width) { return static_cast<std::uint32_t>((std::uint64_t{1} << width) - 1); };
  numbers_.n = n;
  numbers_.low_bits = bits / 2;
  numbers_.low_mask = mask(numbers_.low_bits);
  numbers_.high_mask = mask(bits - numbers_.low_bits);
  Generator generator(key);
  for (FeistelKey& round : numbers_.keys) {
    const std::uint64_t value = generator();
    round = {static_cast<std::uint32_t>(value), static_cast<std::uint32_t>(value >> 32)};
  }
}

std::uint64_t Network::operator()(std::uint64_t index) const noexcept { return walk(numbers_, index); }

std::uint64_t Network::inverse(std::uint64_t image) const noexcept {
  const Feistel& own = numbers_;
  if (own.n <= 1) {
    return image;
  }
  do {
    std::uint32_t low = static_cast<std::uint32_t>(image) & own.low_mask;
    std::uint32_t high = static_cast<std::uint32_t>(image >> own.low_bits);
    for (std::size_t round = kFeistelRounds; round > 0; round -= 2) {
      std::uint32_t word = high;
      scramble(word, own.keys[round - 1]);
      low ^= word & own.low_mask;
      word = low;
      scramble(word, own.keys[round - 2]);
      high ^= word & own.high_mask;
    }
    image = (std::uint64_t{high} << own.low_bits) | low;
  } while (image >= own.n);
  return image;
}

void Network::fill(std::uint64_t begin, std::size_t count, std::uint64_t* out) const noexcept {
  constexpr std::size_t few = 4;  // for which a group is not worth it
  if (numbers_.n <= 1 || count <= few) {
    for (std::size_t i = 0; i < count; ++i) {
      out[i] = (*this)(begin + i);
    }
    return;
  }
  static const Walks::Function best = Walks::best();
  for (std::size_t done = 0; done < count; done += kBlock) {
    best(numbers_, begin + done, std::min(kBlock, count - done), out + done);
  }
}

Permutation::Permutation(std::uint64_t n, std::uint64_t key) : network_(n, key) {
  if (n > kTableRecords) {
    return;
  }
  table_.resize(static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < table_.size(); ++i) {
    table_[i] = static_cast<std::uint16_t>(i);
  }
  Generator generator(key);
  for (std::size_t left = table_.size(); left > 1; --left) {
    std::swap(table_[left - 1], table_[draw(generator, static_cast<std::uint32_t>(left))]);
  }
}

std::uint64_t Permutation::operator()(std::uint64_t index) const noexcept {
  return table_.empty() ? network_(index) : table_[static_cast<std::size_t>(index)];
}

std::uint64_t Permutation::inverse(std::uint64_t image) const noexcept {
  if (table_.empty()) {
    return network_.inverse(image);
  }
  const auto found = std::find(table_.begin(), table_.end(), static_cast<std::uint16_t>(image));
  return static_cast<std::uint64_t>(found - table_.begin());
}

void Permutation::fill(std::uint64_t begin, std::size_t count, std::uint64_t* out) const noexcept {
  if (table_.empty()) {
    network_.fill(begin, count, out);
  } else {
    std::copy_n(table_.begin() + static_cast<std::ptrdiff_t>(begin), count, out);
  }
}

namespace {

const OrderParameters& checked(const OrderParameters& parameters) {
  if (parameters.extent == 0 || parameters.window == 0 || parameters.lanes == 0) {
    throw std::invalid_argument("extent, window and lanes of an order must be at least 1");
  }
  return parameters;
}

std::uint64_t extents_of(const OrderParameters& parameters) noexcept {
  if (parameters.shuffle != Shuffle::blocks) {
    return 0;
  }
  return parameters.records / parameters.extent + (parameters.records % parameters.extent != 0);
}

std::uint64_t product(std::uint64_t left, std::uint64_t right) noexcept {
  std::uint64_t result = 0;
  return __builtin_mul_overflow(left, right, &result) ? std::numeric_limits<std::uint64_t>::max() : result;
}

// What the keys of an epoch's permutations are derived with.
enum Part : std::uint64_t { kRecords = 0, kExtents = 1, kWindows = 2 };

}  // namespace

Order::Order(const OrderParameters& parameters)
    : parameters_(checked(parameters)),
      key_(derive(mix(parameters.seed), parameters.epoch)),
      records_(parameters.shuffle == Shuffle::full ? parameters.records : 0, derive(key_, kRecords)),
      extents_(extents_of(parameters), derive(key_, kExtents)),
      chunk_(product(parameters.extent, parameters.window)) {
  const std::uint64_t extents = extents_of(parameters);
  if (extents != 0) {
    lacking_ = (parameters.extent - parameters.records % parameters.extent) % parameters.extent;
    // Without a short extent it does not matter where the last one is. No overflow: it begins inside the records.
    short_begin_ = lacking_ == 0 ? parameters.records : extents_.inverse(extents - 1) * parameters.extent;
  }
}

// The chunk of a lane in which an index is: `begin` among the extents as they are moved.
struct Order::Stretch {
  std::uint64_t begin, index, records;
  Network network;
};

Order::Stretch Order::stretch(std::uint64_t lane, std::uint64_t index) const noexcept {
  const std::uint64_t each = parameters_.records / parameters_.lanes, longer = parameters_.records % parameters_.lanes;
  const std::uint64_t lane_begin = lane * each + std::min(lane, longer);
  const std::uint64_t lane_records = each + (lane < longer);
  const std::uint64_t chunk = index / chunk_;
  const std::uint64_t records = std::min(chunk_, lane_records - chunk * chunk_);
  return {lane_begin + chunk * chunk_, index - chunk * chunk_, records,
          Network(records, derive(derive(derive(key_, kWindows), lane), chunk))};
}

std::uint64_t Order::record_of(std::uint64_t place) const noexcept {
  if (place >= short_begin_ && place - short_begin_ >= parameters_.extent - lacking_) {
    place += lacking_;  // as if the short extent were a whole one
  }
  return extents_(place / parameters_.extent) * parameters_.extent + place % parameters_.extent;
}

std::uint64_t Order::at(std::uint64_t position) const noexcept {
  switch (parameters_.shuffle) {
    case Shuffle::none:
      return position;
    case Shuffle::full:
      return records_(position);
    case Shuffle::blocks:
      break;
  }
  const Stretch own = stretch(position % parameters_.lanes, position / parameters_.lanes);
  return record_of(own.begin + own.network(own.index));
}

void Order::fill_lane(std::uint64_t first, std::size_t count, std::uint64_t* out) const noexcept {
  if (parameters_.shuffle != Shuffle::blocks) {
    for (std::size_t i = 0; i < count; ++i) {
      out[i] = at(first + i * parameters_.lanes);
    }
    return;
  }
  const std::uint64_t lane = first % parameters_.lanes;
  std::uint64_t index = first / parameters_.lanes;
  while (count > 0) {
    const Stretch own = stretch(lane, index);
    const auto some = static_cast<std::size_t>(std::min<std::uint64_t>(count, own.records - own.index));
    own.network.fill(own.index, some, out);
    for (std::size_t i = 0; i < some; ++i) {
      out[i] = record_of(own.begin + out[i]);
    }
    index += some;
    out += some;
    count -= some;
  }
}

void Order::fill(std::uint64_t begin, std::size_t count, std::uint64_t* out) const noexcept {
  if (parameters_.shuffle == Shuffle::full) {
    records_.fill(begin, count, out);
    return;
  }
  if (parameters_.shuffle == Shuffle::blocks && parameters_.lanes == 1) {
    fill_lane(begin, count, out);
    return;
  }
  for (std::size_t i = 0; i < count; ++i) {
    out[i] = at(begin + i);
  }
}

}  // namespace launcher::data
