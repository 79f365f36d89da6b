// What the loops of the collectives must give, element by element, with nothing of theirs in it.
#ifndef LAUNCHER_TESTS_REFERENCE_H
#define LAUNCHER_TESTS_REFERENCE_H

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"

namespace reference {

using namespace launcher::collectives;

// ---- 16-bit floating point by its definition: `fraction` bits after the leading one, exponents from `lowest`

struct Small {
  int fraction;
  int lowest;
  int highest;
};
inline constexpr Small kHalf{10, -14, 15};
inline constexpr Small kBFloat{7, -126, 127};

inline double decode(Small format, std::uint16_t bits) {
  const int exponent = (bits & 0x7fff) >> format.fraction;
  const int fraction = bits & ((1 << format.fraction) - 1);
  const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
  if (exponent == (0x7fff >> format.fraction)) {
    return fraction == 0 ? sign * std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
  }
  const int leading = exponent == 0 ? 0 : 1 << format.fraction;
  return sign * std::ldexp(leading + fraction, std::max(exponent, 1) - 1 + format.lowest - format.fraction);
}

inline std::uint16_t encode(Small format, double value) {
  const int infinity = (format.highest - format.lowest + 2) << format.fraction;
  if (std::isnan(value)) {
    return static_cast<std::uint16_t>(infinity | 1 << (format.fraction - 1));
  }
  const int sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isinf(value)) {
    return static_cast<std::uint16_t>(sign | infinity);
  }
  int exponent = format.lowest;
  if (value != 0.0) {
    exponent = std::max(std::ilogb(value), format.lowest);
  }
  const double units = std::nearbyint(std::ldexp(std::fabs(value), format.fraction - exponent));  // ties to even
  // A carry out of the fraction counts the exponent up, as it should.
  const int bits = ((exponent - format.lowest) << format.fraction) + static_cast<int>(units);
  return static_cast<std::uint16_t>(sign | std::min(bits, infinity));
}

// ---- reference of the fold, for one element

template <typename Real>
Real fold_real(ReduceOp op, Real folded, Real next) {
  switch (op) {
    case ReduceOp::minimum:
      return std::isnan(next) || next < folded ? next : folded;
    case ReduceOp::maximum:
      return std::isnan(next) || next > folded ? next : folded;
    case ReduceOp::product:
      return folded * next;
    default:
      return folded + next;
  }
}

template <typename Real>
Real reference_real(ReduceOp op, const std::vector<Real>& values, const double* prescale, double scale) {
  Real folded = 0;
  for (std::size_t number = 0; number < values.size(); ++number) {
    const Real next = prescale == nullptr ? values[number] : values[number] * static_cast<Real>(prescale[number]);
    folded = number == 0 ? next : fold_real(op, folded, next);
  }
  folded *= static_cast<Real>(scale);
  return std::isnan(folded) ? std::numeric_limits<Real>::quiet_NaN() : folded;
}

template <typename Whole>
Whole fold_whole(ReduceOp op, bool boolean, Whole folded, Whole next) {
  const auto left = static_cast<std::uint64_t>(folded);
  const auto right = static_cast<std::uint64_t>(next);
  switch (op) {
    case ReduceOp::minimum:
      return std::min(folded, next);
    case ReduceOp::maximum:
      return std::max(folded, next);
    case ReduceOp::product:
      return static_cast<Whole>(left * right);
    case ReduceOp::bit_and:
      return static_cast<Whole>(left & right);
    case ReduceOp::bit_or:
      return static_cast<Whole>(left | right);
    case ReduceOp::bit_xor:
      return static_cast<Whole>(left ^ right);
    default:
      return static_cast<Whole>(boolean ? left | right : left + right);
  }
}

template <typename Value>
std::vector<Value> gather(const std::vector<const char*>& sources, std::size_t element) {
  std::vector<Value> values(sources.size());
  for (std::size_t number = 0; number < sources.size(); ++number) {
    std::memcpy(&values[number], sources[number] + element * sizeof(Value), sizeof(Value));
  }
  return values;
}

struct Case {
  DType dtype;
  ReduceOp op;
  std::size_t count;
  const double* prescale;
  Finish finish;
};

template <typename Whole>
void reference_whole(const Case& given, const std::vector<const char*>& sources, std::size_t element, char* target) {
  const std::vector<Whole> values = gather<Whole>(sources, element);
  Whole folded = values[0];
  for (std::size_t number = 1; number < values.size(); ++number) {
    folded = fold_whole(given.op, given.dtype == DType::boolean, folded, values[number]);
  }
  if (given.finish.divisor != 1) {
    folded = static_cast<Whole>(folded / static_cast<Whole>(given.finish.divisor));
  }
  std::memcpy(target, &folded, sizeof folded);
}

template <typename Real>
void reference_floating(const Case& given, const std::vector<const char*>& sources, std::size_t element, char* target) {
  const Real folded = reference_real(given.op, gather<Real>(sources, element), given.prescale, given.finish.scale);
  std::memcpy(target, &folded, sizeof folded);
}

inline void reference_small(const Case& given, const std::vector<const char*>& sources, std::size_t element,
                            char* target) {
  const Small format = given.dtype == DType::float16 ? kHalf : kBFloat;
  std::vector<float> values;
  for (const std::uint16_t bits : gather<std::uint16_t>(sources, element)) {
    values.push_back(static_cast<float>(decode(format, bits)));
  }
  const std::uint16_t folded =
      encode(format, static_cast<double>(reference_real(given.op, values, given.prescale, given.finish.scale)));
  std::memcpy(target, &folded, sizeof folded);
}

inline void element_of(const Case& given, const std::vector<const char*>& sources, std::size_t element, char* target) {
  switch (given.dtype) {
    case DType::float32:
      return reference_floating<float>(given, sources, element, target);
    case DType::float64:
      return reference_floating<double>(given, sources, element, target);
    case DType::float16:
    case DType::bfloat16:
      return reference_small(given, sources, element, target);
    case DType::int8:
      return reference_whole<std::int8_t>(given, sources, element, target);
    case DType::int16:
      return reference_whole<std::int16_t>(given, sources, element, target);
    case DType::int32:
      return reference_whole<std::int32_t>(given, sources, element, target);
    case DType::int64:
      return reference_whole<std::int64_t>(given, sources, element, target);
    case DType::uint8:
    case DType::boolean:
      return reference_whole<std::uint8_t>(given, sources, element, target);
    case DType::uint16:
      return reference_whole<std::uint16_t>(given, sources, element, target);
    case DType::uint32:
      return reference_whole<std::uint32_t>(given, sources, element, target);
    case DType::uint64:
      return reference_whole<std::uint64_t>(given, sources, element, target);
  }
}

}  // namespace reference

#endif
