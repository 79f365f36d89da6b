// The same numbers in every run.
#ifndef LAUNCHER_TESTS_SEEDED_RANDOM_H
#define LAUNCHER_TESTS_SEEDED_RANDOM_H

#include <cstddef>
#include <cstdint>

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15U) {}
  std::uint64_t bits() {
    std::uint64_t mixed = state_ += 0x9e3779b97f4a7c15U;
    mixed = (mixed ^ mixed >> 30) * 0xbf58476d1ce4e5b9U;
    mixed = (mixed ^ mixed >> 27) * 0x94d049bb133111ebU;
    return mixed ^ mixed >> 31;
  }
  std::size_t below(std::size_t limit) { return static_cast<std::size_t>(bits() % limit); }
  bool one_in(std::size_t number) { return below(number) == 0; }
  double unit() { return static_cast<double>(bits() >> 11) * 0x1p-52 - 1.0; }  // [-1, 1)
  template <typename Value, std::size_t kSize>
  Value of(const Value (&values)[kSize]) {
    return values[below(kSize)];
  }

 private:
  std::uint64_t state_;
};

#endif
