// The order and the shares, by their properties; the tests in Python hold them against a slow reference.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"
#include "order.h"
#include "share.h"

namespace {

using namespace launcher::data;
using Numbers = std::vector<std::uint64_t>;

template <typename Mapping>
Numbers filled(const Mapping& mapping, std::uint64_t begin, std::size_t count) {
  Numbers out(count);
  mapping.fill(begin, count, out.data());
  return out;
}

bool is_permutation_of_all(const Numbers& numbers) {
  std::vector<bool> seen(numbers.size());
  for (const std::uint64_t number : numbers) {
    if (number >= numbers.size() || seen[number]) {
      return false;
    }
    seen[number] = true;
  }
  return true;
}

// F12, whole orders: by table, and by network, whose worst lengths are just above a power of two.
void test_bijections() {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  constexpr std::uint64_t stride = 97;  // many times slower
#else
  constexpr std::uint64_t stride = 1;
#endif
  for (std::uint64_t n = 1; n <= 5000; n += n < 300 ? 1 : stride) {
    CHECK(is_permutation_of_all(filled(Permutation(n, n * 7 + 1), 0, n)));
    CHECK(is_permutation_of_all(filled(Network(n, n * 7 + 1), 0, n)));
  }
  for (const unsigned bits : {10U, 13U, 16U, 17U}) {
    for (const std::uint64_t n : {(1ULL << bits) - 1, 1ULL << bits, (1ULL << bits) + 1}) {
      CHECK(is_permutation_of_all(filled(Permutation(n, bits), 0, n)));
      CHECK(is_permutation_of_all(filled(Network(n, bits), 0, n)));
    }
  }
}

// F12, parts of orders that are too long to go through: what comes out goes back to where it came from.
void test_inverses() {
  for (unsigned bits = 1; bits <= 64; ++bits) {
    const std::uint64_t power = bits == 64 ? 0 : 1ULL << bits;  // 2^64 - 1 is as far as it goes
    for (const std::uint64_t n : {power - 1, power, power + 1}) {
      if (n == 0 || (bits == 64 && n < 2)) {
        continue;
      }
      const Permutation permutation(n, bits);
      const Network network(n, bits);
      for (const std::uint64_t begin : {std::uint64_t{0}, n / 3, n - std::min<std::uint64_t>(n, 70)}) {
        const auto count = static_cast<std::size_t>(std::min<std::uint64_t>(70, n - begin));
        const Numbers numbers = filled(permutation, begin, count), others = filled(network, begin, count);
        for (std::size_t i = 0; i < count; ++i) {
          CHECK(numbers[i] < n && permutation(begin + i) == numbers[i]);
          CHECK(others[i] < n && network(begin + i) == others[i] && network.inverse(others[i]) == begin + i);
          if (n > Permutation::kTableRecords || i == 0) {
            CHECK(permutation.inverse(numbers[i]) == begin + i);
          }
        }
      }
    }
  }
}

// Loose: it is to find a network that is broken, not one that is a little worse.
void test_it_looks_random() {
  constexpr std::uint64_t n = 100'000;
  constexpr std::size_t cells = 32;
  for (const std::uint64_t seed : {1U, 2U}) {
    const Numbers numbers = filled(Order({Shuffle::full, seed, 0, n}), 0, n);
    const Numbers next = filled(Order({Shuffle::full, seed, 1, n}), 0, n);
    std::vector<double> table(cells * cells);
    double lag = 0, across = 0;
    std::size_t fixed = 0;
    const auto centred = [](std::uint64_t value) { return static_cast<double>(value) / n - 0.5; };
    for (std::uint64_t i = 0; i < n; ++i) {
      table[i * cells / n * cells + numbers[i] * cells / n] += 1;
      lag += i == 0 ? 0 : centred(numbers[i - 1]) * centred(numbers[i]);
      across += centred(numbers[i]) * centred(next[i]);
      fixed += numbers[i] == i;
    }
    double chi = 0;
    const double expected = static_cast<double>(n) / static_cast<double>(table.size());
    for (const double count : table) {
      chi += (count - expected) * (count - expected) / expected;
    }
    CHECK(std::abs(chi - (cells - 1) * (cells - 1)) < 6 * std::sqrt(2.0 * (cells - 1) * (cells - 1)));
    CHECK(std::abs(lag * 12 / n) < 0.02);
    CHECK(std::abs(across * 12 / n) < 0.02);
    CHECK(fixed < 12);
  }
}

void test_blocks() {
  for (const std::uint64_t n : {1ULL, 63ULL, 1000ULL, 4099ULL}) {
    for (const std::uint64_t lanes : {1ULL, 3ULL, 8ULL}) {
      const Order order({Shuffle::blocks, 3, 1, n, 10, 6, lanes});
      const Numbers numbers = filled(order, 0, n);
      CHECK(is_permutation_of_all(numbers));
      for (std::uint64_t lane = 0; lane < std::min(lanes, n); ++lane) {
        Numbers own((n - lane + lanes - 1) / lanes);
        order.fill_lane(lane, own.size(), own.data());
        for (std::size_t i = 0; i < own.size(); ++i) {
          CHECK(own[i] == numbers[lane + i * lanes]);
        }
      }
    }
  }
  CHECK_THROWS(std::invalid_argument, Order({Shuffle::blocks, 0, 0, 5, 0, 1, 1}));
  CHECK(filled(Order({Shuffle::full, 0, 0, 0}), 0, 0).empty());
}

// F13 and F14: shares of all ranks before and after a change of world size and batch, each record once.
void test_shares() {
  constexpr std::uint64_t n = 1003;
  for (const std::uint64_t lanes : {1ULL, 4ULL}) {
    const Order order({Shuffle::blocks, 9, 2, n, 16, 4, lanes});
    for (const std::uint64_t world : {1ULL, 2ULL, 3ULL, 5ULL, 8ULL}) {
      std::vector<int> seen(n);
      const auto read = [&](ShareParameters share, std::uint64_t limit) {
        const std::uint64_t count = std::min(steps(share), limit);
        for (share.rank = 0; share.rank < share.world; ++share.rank) {
          Numbers out(share.batch);
          for (std::uint64_t step = 0; step < count; ++step) {
            const Rows rows = rows_of(share, order, step, out.data());
            CHECK(rows.valid <= rows.rows && rows.rows <= share.batch);
            for (std::size_t i = 0; i < rows.valid; ++i) {
              ++seen[out[i]];
            }
          }
        }
        return share.base + count * share.world * share.batch;
      };
      const std::uint64_t position = read({n, 0, 4, 0, 7, lanes, Tail::drop}, 11);
      CHECK(position == 308);
      read({n, position, world, 0, 6, lanes, world % 2 == 0 ? Tail::pad : Tail::short_one}, n);
      CHECK(std::all_of(seen.begin(), seen.end(), [](int times) { return times == 1; }));
    }
  }
}

// One order, used by several threads.
void test_threads() {
  constexpr std::uint64_t n = 70'001;
  const Order order({Shuffle::full, 4, 4, n});
  const Numbers wanted = filled(order, 0, 4096);
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] { CHECK(filled(order, 0, 4096) == wanted); });
  }
  for (auto& thread : threads) {
    thread.join();
  }
}

}  // namespace

int main() {
  check::run("bijections", test_bijections);
  check::run("inverses", test_inverses);
  check::run("looks random", test_it_looks_random);
  check::run("blocks", test_blocks);
  check::run("shares", test_shares);
  check::run("threads", test_threads);
  return check::failures == 0 ? 0 : 1;
}
