// Every operation x type x size x alignment x path, for a number of ranks, against a reference in wider numbers.
//
// A result is compared in two steps. What a fold of all inputs must give is made once for each type and operation, by
// the plain loops, and compared element by element with a reference of its own: exactly for integers, within the bounds
// of docs/collectives.md for floating point. Then every rank's result of every call must have these bits: the same on
// all ranks, at all sizes, in aligned and unaligned memory, and on all paths.
#ifndef LAUNCHER_TESTS_COLLECTIVES_MATRIX_H
#define LAUNCHER_TESTS_COLLECTIVES_MATRIX_H

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <span>
#include <vector>

#include "check.h"
#include "collectives_steps.h"
#include "reference.h"

namespace matrix {

using namespace launcher::collectives;
using steps::Step;

inline constexpr std::size_t kSlotBytes = 1024;  // the least that eight ranks take is half of it
inline constexpr int kMostRanks = 8;
inline constexpr std::size_t kSizes = 6;  // 0, 1, odd, a slot, a slot and an element, several slots and an odd rest
inline constexpr std::size_t kShifts = 2;

// Elements of one slot, or of one rank's part of it.
inline std::size_t slot_elements(Operation operation, DType dtype, int ranks) {
  if (operation == Operation::reduce_scatter || operation == Operation::all_to_all) {
    return kSlotBytes / static_cast<std::size_t>(ranks) / 64 * 64 / size_of(dtype);
  }
  return kSlotBytes / size_of(dtype);
}

inline std::vector<std::size_t> counts_of(Operation operation, DType dtype, int ranks, std::size_t size) {
  const std::size_t slot = slot_elements(operation, dtype, ranks);
  const std::size_t sizes[kSizes] = {0, 1, 7, slot, slot + 1, 3 * slot + 5};
  const auto many = static_cast<std::size_t>(ranks);
  switch (operation) {
    case Operation::reduce_scatter:
    case Operation::all_gather:
    case Operation::all_to_all: {
      std::vector<std::size_t> counts(operation == Operation::all_to_all ? many * many : many, sizes[size]);
      if (size + 1 == kSizes) {  // no two neighbours the same
        for (std::size_t part = 0; part < counts.size(); ++part) {
          counts[part] -= part % 3;
        }
      }
      return counts;
    }
    default:
      return {sizes[size]};
  }
}

// The paths that an operation has. Reading a peer's memory needs processes; a small one is a message in one slot.
inline std::vector<Path> paths_of(Operation operation, bool pulled) {
  if (pulled) {
    return operation == Operation::allreduce ? std::vector{Path::pulled} : std::vector<Path>{};
  }
  switch (operation) {
    case Operation::allreduce:
      return {Path::small, Path::pipelined, Path::shared};
    case Operation::reduce:
      return {Path::pipelined};
    default:
      return {Path::pipelined, Path::shared};
  }
}

inline Path taken(const Step& step, int ranks) {
  const std::size_t bytes = step.counts[0] * size_of(step.dtype);
  if (ranks == 1 || (step.path == Path::pulled && bytes == 0)) {
    return Path::automatic;
  }
  return step.path == Path::small && bytes > kSlotBytes ? Path::pipelined : step.path;
}

// `pulled`: that path alone; else all others.
inline std::vector<Step> program(int ranks, bool pulled) {
  std::vector<Step> steps;
  std::size_t combination = 0;
  for (const Operation operation : {Operation::allreduce, Operation::reduce_scatter, Operation::all_gather,
                                    Operation::broadcast, Operation::reduce, Operation::all_to_all}) {
    const bool folds =
        operation == Operation::allreduce || operation == Operation::reduce_scatter || operation == Operation::reduce;
    for (int type = 0; type < kDTypes; ++type) {
      const auto dtype = static_cast<DType>(type);
      for (int op = 0; op < (folds ? kReduceOps : 1); ++op) {
        if (reduce_function(dtype, static_cast<ReduceOp>(op), Isa::plain) == nullptr) {
          continue;
        }
        for (const Path path : paths_of(operation, pulled)) {
          ++combination;
          for (std::size_t cell = 0; cell < kSizes * kShifts; ++cell) {
            const std::size_t size = cell % kSizes;
            Step step;
            step.operation = operation;
            step.dtype = dtype;
            step.op = static_cast<ReduceOp>(op);
            step.path = path;
            step.placement = path != Path::shared            ? steps::Placement::heap
                             : (size + combination) % 2 == 0 ? steps::Placement::allocated
                                                             : steps::Placement::file;
            step.shift = cell < kSizes ? 0 : static_cast<int>(size_of(dtype));
            step.in_place = (cell + combination / 2) % 2 == 0;
            step.root = static_cast<int>((cell + combination) % static_cast<std::size_t>(ranks));
            step.counts = counts_of(operation, dtype, ranks, size);
            step.taken = taken(step, ranks);
            steps.push_back(step);
          }
        }
      }
    }
  }
  return steps;
}

// What half a unit in the last place of `dtype` is near `value`.
inline long double half_unit(DType dtype, long double value) {
  struct Format {
    int fraction;
    int lowest;
  };
  constexpr Format kFormats[] = {{23, -126},
                                 {52, -1022},
                                 {reference::kHalf.fraction, reference::kHalf.lowest},
                                 {reference::kBFloat.fraction, reference::kBFloat.lowest}};
  const Format format = kFormats[static_cast<std::size_t>(dtype)];
  const int exponent = value == 0 ? format.lowest : std::max(std::ilogb(value), format.lowest);
  return std::ldexp(1.0L, exponent - format.fraction - 1);
}

inline long double number_at(DType dtype, const char* bytes, std::size_t element) {
  const char* from = bytes + element * size_of(dtype);
  if (dtype == DType::float32) {
    float value = 0;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  if (dtype == DType::float64) {
    double value = 0;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  std::uint16_t bits = 0;
  std::memcpy(&bits, from, sizeof bits);
  return reference::decode(dtype == DType::float16 ? reference::kHalf : reference::kBFloat, bits);
}

// `got`, folded from these by a sum, average, minimum, maximum or product.
inline bool near_enough(DType dtype, ReduceOp op, std::span<const long double> values, long double got) {
  const auto ranks = static_cast<long double>(values.size());
  const long double rounding = std::ldexp(1.0L, dtype == DType::float64 ? -53 : -24);
  switch (op) {
    case ReduceOp::minimum:
      return got == *std::min_element(values.begin(), values.end());
    case ReduceOp::maximum:
      return got == *std::max_element(values.begin(), values.end());
    case ReduceOp::product: {
      const long double exact = std::accumulate(values.begin(), values.end(), 1.0L, std::multiplies<>());
      return std::fabs(got - exact) <= half_unit(dtype, exact) + (ranks - 1) * rounding * std::fabs(exact);
    }
    default: {
      const long double share = op == ReduceOp::average ? 1 / ranks : 1;
      const long double roundings = ranks - 1 + (op == ReduceOp::average ? 2 : 0);  // the share's, and of the product
      long double exact = 0;
      long double magnitude = 0;
      for (const long double value : values) {
        exact += value * share;
        magnitude += std::fabs(value) * share;
      }
      return std::fabs(got - exact) <= half_unit(dtype, exact) + roundings * rounding * magnitude;
    }
  }
}

// What goes into all calls of a number of ranks, and must come out, made once.
class Table final : public steps::Contents {
 public:
  Table(int ranks, const std::vector<Step>& program) : ranks_(ranks) {
    std::array<std::size_t, kDTypes> most{};
    for (const Step& step : program) {
      std::size_t& elements = most[static_cast<std::size_t>(step.dtype)];
      const bool parts = step.operation == Operation::all_to_all;  // each has an input of its own
      elements = std::max(elements, parts ? *std::max_element(step.counts.begin(), step.counts.end())
                                          : std::accumulate(step.counts.begin(), step.counts.end(), std::size_t{0}));
    }
    for (std::size_t type = 0; type < kDTypes; ++type) {
      Step step;
      step.dtype = static_cast<DType>(type);
      for (int rank = 0; rank < ranks; ++rank) {
        for (int part = 0; part < ranks; ++part) {
          inputs_[type].push_back(Contents::input(step, rank, static_cast<std::size_t>(part), most[type]));
        }
      }
      for (std::size_t op = 0; op < kReduceOps; ++op) {
        step.op = static_cast<ReduceOp>(op);
        if (reduce_function(step.dtype, step.op, Isa::plain) != nullptr) {
          folded_[type][op] = Contents::folded(step, ranks, 0, most[type]);
          check(step, most[type]);
        }
      }
    }
  }

  std::vector<char> input(const Step& step, int rank, std::size_t part, std::size_t count) const override {
    return head(of(step.dtype, rank, part), step, count);
  }
  std::vector<char> folded(const Step& step, int, std::size_t, std::size_t count) const override {
    return head(folded_[static_cast<std::size_t>(step.dtype)][static_cast<std::size_t>(step.op)], step, count);
  }

 private:
  const std::vector<char>& of(DType dtype, int rank, std::size_t part) const {
    return inputs_[static_cast<std::size_t>(dtype)][static_cast<std::size_t>(rank * ranks_) + part];
  }
  static std::vector<char> head(const std::vector<char>& bytes, const Step& step, std::size_t count) {
    return {bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(count * size_of(step.dtype))};
  }

  void check(const Step& step, std::size_t count) const {
    const std::vector<char>& got = folded_[static_cast<std::size_t>(step.dtype)][static_cast<std::size_t>(step.op)];
    reference::Case given{step.dtype, step.op, count, nullptr, {}};
    given.finish.divisor = step.op == ReduceOp::average ? static_cast<std::uint64_t>(ranks_) : 1;
    std::vector<const char*> sources;
    for (int rank = 0; rank < ranks_; ++rank) {
      sources.push_back(of(step.dtype, rank, 0).data());
    }
    std::vector<long double> values(sources.size());
    std::array<char, 8> expected{};
    for (std::size_t element = 0; element < count; ++element) {
      bool good = true;
      if (is_floating(step.dtype)) {
        std::transform(sources.begin(), sources.end(), values.begin(),
                       [&](const char* source) { return number_at(step.dtype, source, element); });
        good = near_enough(step.dtype, step.op, values, number_at(step.dtype, got.data(), element));
      } else {
        reference::element_of(given, sources, element, expected.data());
        good = std::memcmp(expected.data(), got.data() + element * size_of(step.dtype), size_of(step.dtype)) == 0;
      }
      if (!good) {
        std::fprintf(stderr, "%d ranks, dtype %d, op %d: element %zu is not what the reference has\n", ranks_,
                     static_cast<int>(step.dtype), static_cast<int>(step.op), element);
        CHECK(good);
        return;
      }
    }
  }

  int ranks_;
  std::array<std::vector<std::vector<char>>, kDTypes> inputs_;  // of each rank, for each part
  std::array<std::array<std::vector<char>, kReduceOps>, kDTypes> folded_;
};

}  // namespace matrix

#endif
