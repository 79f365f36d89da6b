// Types of elements and the operations that fold them.
#ifndef LAUNCHER_ELEMENTS_H
#define LAUNCHER_ELEMENTS_H

#include <cstddef>
#include <cstdint>

namespace launcher::collectives {

// The numbers are part of the Python face (launcher/collectives/elements.py) and do not change.
enum class DType : std::uint8_t {
  float32 = 0,
  float64 = 1,
  float16 = 2,
  bfloat16 = 3,
  int8 = 4,
  uint8 = 5,
  int16 = 6,
  int32 = 7,
  int64 = 8,
  boolean = 9,  // one byte, 0 or 1
  uint16 = 10,
  uint32 = 11,
  uint64 = 12,
};
inline constexpr int kDTypes = 13;

enum class ReduceOp : std::uint8_t {
  sum = 0,
  average = 1,
  minimum = 2,
  maximum = 3,
  product = 4,
  bit_and = 5,
  bit_or = 6,
  bit_xor = 7,
};
inline constexpr int kReduceOps = 8;

constexpr std::size_t size_of(DType dtype) noexcept {
  constexpr std::size_t sizes[kDTypes] = {4, 8, 2, 2, 1, 1, 2, 4, 8, 1, 2, 4, 8};
  return sizes[static_cast<std::size_t>(dtype)];
}

constexpr bool is_floating(DType dtype) noexcept { return static_cast<int>(dtype) < 4; }

}  // namespace launcher::collectives

#endif
