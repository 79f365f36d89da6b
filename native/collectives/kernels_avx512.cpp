// Compiled for AVX-512 F, BW, DQ and VL.
#include <immintrin.h>

#include "kernels_table.h"

namespace launcher::collectives {
namespace {

constexpr std::size_t kWidth = 64;

}  // namespace
}  // namespace launcher::collectives

#include "kernels_vector.h"

namespace launcher::collectives {
namespace {

// The forms with a mask, though it is full: gcc 12 warns about what its headers do in the others (its bug 105593).
constexpr __mmask16 kAll = 0xffff;
inline F32 from_half(Half16 bits) { return (F32)_mm512_maskz_cvtph_ps(kAll, (__m256i)bits); }
inline Half16 to_half(F32 value) {
  return (Half16)_mm512_maskz_cvtps_ph(kAll, (__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

}  // namespace
}  // namespace launcher::collectives

#include "kernels_body.h"

namespace launcher::collectives {

constinit const KernelTable kAvx512Kernels = make_table();

}  // namespace launcher::collectives
