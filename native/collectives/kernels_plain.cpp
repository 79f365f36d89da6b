// Compiled for what every machine of this architecture has: 16-byte vectors are SSE2 on x86-64 and NEON on AArch64.
#ifdef LAUNCHER_KERNELS_X86
#include <emmintrin.h>
#endif

#include "kernels_table.h"

namespace launcher::collectives {
namespace {

constexpr std::size_t kWidth = 16;

}  // namespace
}  // namespace launcher::collectives

#include "kernels_vector.h"

namespace launcher::collectives {
namespace {

// The bits that VCVTPH2PS and VCVTPS2PH give, by moving the fields of the number. Denormals take the way over a float
// addition: of 2^-14 they are the fraction, and adding 0.5 to a float leaves a unit of 2^-24 in its last place.
constexpr std::uint32_t kHalfExponent = 0x7c00U << 13;
constexpr std::uint32_t kRebias = (127U - 15U) << 23;
constexpr std::uint32_t kQuiet = 0x00400000U;

inline F32 from_half(Half16 bits) {
  const U32 half = __builtin_convertvector(bits, U32);
  const U32 field = (half & 0x7fffU) << 13;
  const U32 exponent = field & kHalfExponent;
  const U32 normal = field + kRebias;
  const U32 special = normal + ((128U - 16U) << 23);
  const F32 smallest = (F32)(U32{} + (113U << 23));
  const U32 denormal = (U32)((F32)(normal + (1U << 23)) - smallest);
  U32 value = exponent == 0U ? denormal : normal;
  value = exponent == kHalfExponent ? (field > kHalfExponent ? special | kQuiet : special) : value;
  return (F32)(value | (half & 0x8000U) << 16);
}

inline Half16 to_half(F32 number) {
  const U32 bits = (U32)number;
  const U32 sign = bits & 0x80000000U;
  const U32 value = bits ^ sign;
  const U32 nan = 0x7e00U | (value >> 13 & 0x3ffU);
  const U32 special = value > (255U << 23) ? nan : U32{} + 0x7c00U;
  const U32 half = U32{} + (126U << 23);
  const U32 denormal = (U32)((F32)value + (F32)half) - half;
  const U32 odd = value >> 13 & 1U;
  const U32 normal = (value - kRebias + 0xfffU + odd) >> 13;
  U32 result = value < (113U << 23) ? denormal : normal;
  result = value >= (143U << 23) ? special : result;
  return __builtin_convertvector(result | sign >> 16, Half16);
}

#ifdef LAUNCHER_KERNELS_X86
#else
#endif

}  // namespace
}  // namespace launcher::collectives

#include "kernels_body.h"

namespace launcher::collectives {

constinit const KernelTable kPlainKernels = make_table();

}  // namespace launcher::collectives
