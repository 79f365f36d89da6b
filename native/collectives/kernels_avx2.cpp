// Compiled for AVX2 and F16C.
#include <immintrin.h>

#include "kernels_table.h"

namespace launcher::collectives {
namespace {

constexpr std::size_t kWidth = 32;

}  // namespace
}  // namespace launcher::collectives

#include "kernels_vector.h"

namespace launcher::collectives {
namespace {

inline F32 from_half(Half16 bits) { return (F32)_mm256_cvtph_ps((__m128i)bits); }
inline Half16 to_half(F32 value) {
  return (Half16)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

}  // namespace
}  // namespace launcher::collectives

#include "kernels_body.h"

namespace launcher::collectives {

constinit const KernelTable kAvx2Kernels = make_table();

}  // namespace launcher::collectives
