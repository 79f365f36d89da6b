// Types of elements on the GPU: how they lie in memory, what they are folded in, and how they are rounded. The bits are
// those of native/collectives/kernels.h on the CPU, a NaN's included (it has one form in a result).
#ifndef LAUNCHER_CUDA_NUMBERS_H
#define LAUNCHER_CUDA_NUMBERS_H

#include <cstdint>
#include <type_traits>

#include "launcher/elements.h"
#include "target.h"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

namespace launcher::cuda {

using collectives::DType;
using collectives::ReduceOp;

constexpr std::uint32_t kNan = 0x7fc00000U;
constexpr std::uint16_t kHalfMost = 0x7bffU;  // 65504, of binary16 the largest finite number

LAUNCHER_HOST_DEVICE float canonical(float value) { return value == value ? value : bits<float>(kNan); }
LAUNCHER_HOST_DEVICE double canonical(double value) {
  return value == value ? value : bits<double>(std::uint64_t{0x7ff8000000000000U});
}

// ---- bfloat16: the upper half of a float

LAUNCHER_HOST_DEVICE float from_bfloat16(std::uint16_t value) {
  return bits<float>(static_cast<std::uint32_t>(value) << 16);
}

// To nearest even, by integers. NaN: canonical.
LAUNCHER_HOST_DEVICE std::uint16_t to_bfloat16(float value) {
  const std::uint32_t word = bits<std::uint32_t>(canonical(value));
  return static_cast<std::uint16_t>((word + 0x7fffU + (word >> 16 & 1U)) >> 16);
}

// ---- float16: IEEE 754 binary16. The GPU has instructions; the host's tests need their definition.

LAUNCHER_HOST_DEVICE float from_float16(std::uint16_t value) {
#ifdef __CUDA_ARCH__
  return __half2float(bits<__half>(value));
#else
  const std::uint32_t sign = (value & 0x8000U) << 16;
  const std::uint32_t exponent = value >> 10 & 0x1fU;
  const std::uint32_t fraction = value & 0x3ffU;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(fraction) * 0x1p-24F;
    return sign != 0 ? -magnitude : magnitude;
  }
  const std::uint32_t moved = exponent == 0x1f ? 0xffU : exponent + (127U - 15U);
  return bits<float>(sign | moved << 23 | fraction << 13);
#endif
}

// To nearest even; beyond 65519.99 infinity. NaN: canonical.
LAUNCHER_HOST_DEVICE std::uint16_t to_float16(float value) {
#ifdef __CUDA_ARCH__
  const std::uint16_t rounded = bits<std::uint16_t>(__float2half_rn(value));
  return value == value ? rounded : std::uint16_t{0x7e00U};
#else
  const std::uint32_t word = bits<std::uint32_t>(value);
  const std::uint32_t sign = word >> 16 & 0x8000U;
  const std::uint32_t magnitude = word & 0x7fffffffU;
  if (magnitude > 0x7f800000U) {
    return 0x7e00U;
  }
  if (magnitude >= 0x477ff000U) {  // 65520: half way to what would be the next number
    return static_cast<std::uint16_t>(sign | 0x7c00U);
  }
  if (magnitude < 0x38800000U) {  // 2^-14: a multiple of 2^-24, which is the last place of a float near 0.5
    const float shifted = bits<float>(magnitude) + 0.5F;
    return static_cast<std::uint16_t>(sign | (bits<std::uint32_t>(shifted) - 0x3f000000U));
  }
  const std::uint32_t rounded = magnitude - (112U << 23) + 0xfffU + (magnitude >> 13 & 1U);
  return static_cast<std::uint16_t>(sign | rounded >> 13);
#endif
}

// ---- types

struct Float32 {
  static constexpr DType kDType = DType::float32;
  using Memory = float;
  using Scalar = float;  // folded and scaled in it
  LAUNCHER_HOST_DEVICE static Scalar read(Memory value) { return value; }
  LAUNCHER_HOST_DEVICE static Memory write(Scalar value) { return canonical(value); }
};
struct Float64 {
  static constexpr DType kDType = DType::float64;
  using Memory = double;
  using Scalar = double;
  LAUNCHER_HOST_DEVICE static Scalar read(Memory value) { return value; }
  LAUNCHER_HOST_DEVICE static Memory write(Scalar value) { return canonical(value); }
};
struct Float16 {
  static constexpr DType kDType = DType::float16;
  using Memory = std::uint16_t;
  using Scalar = float;
  LAUNCHER_HOST_DEVICE static Scalar read(Memory value) { return from_float16(value); }
  LAUNCHER_HOST_DEVICE static Memory write(Scalar value) { return to_float16(value); }
};
struct BFloat16 {
  static constexpr DType kDType = DType::bfloat16;
  using Memory = std::uint16_t;
  using Scalar = float;
  LAUNCHER_HOST_DEVICE static Scalar read(Memory value) { return from_bfloat16(value); }
  LAUNCHER_HOST_DEVICE static Memory write(Scalar value) { return to_bfloat16(value); }
};
template <typename Lane, DType kType>
struct Integer {
  static constexpr DType kDType = kType;
  using Memory = Lane;
  using Scalar = Lane;
  LAUNCHER_HOST_DEVICE static Scalar read(Memory value) { return value; }
  LAUNCHER_HOST_DEVICE static Memory write(Scalar value) { return value; }
};
using Int32 = Integer<std::int32_t, DType::int32>;
using Int64 = Integer<std::int64_t, DType::int64>;

// Elements that one access of a thread holds.
template <typename T>
constexpr int kLanes = static_cast<int>(sizeof(Wide) / sizeof(typename T::Memory));

// sum, minimum or maximum, as kernels_body.h folds them: NaN if any is NaN; of equal numbers (-0 and 0) the first.
// Integers wrap around.
template <typename Scalar>
LAUNCHER_HOST_DEVICE Scalar fold(Scalar folded, Scalar next, ReduceOp op) {
  if (op == ReduceOp::minimum) {
    return next < folded || next != next ? next : folded;
  }
  if (op == ReduceOp::maximum) {
    return next > folded || next != next ? next : folded;
  }
  if constexpr (std::is_integral_v<Scalar>) {
    using Unsigned = std::make_unsigned_t<Scalar>;
    return static_cast<Scalar>(static_cast<Unsigned>(folded) + static_cast<Unsigned>(next));
  } else {
    return folded + next;
  }
}

template <typename Scalar>
LAUNCHER_HOST_DEVICE Scalar scaled(Scalar value, double scale) {
  if constexpr (std::is_integral_v<Scalar>) {
    return value;  // integers have no scale: whoever takes the call refuses it
  } else {
    return value * static_cast<Scalar>(scale);
  }
}

}  // namespace launcher::cuda

#endif
