// The loops over elements, for the instruction set of this machine.
#ifndef LAUNCHER_COLLECTIVES_KERNELS_H
#define LAUNCHER_COLLECTIVES_KERNELS_H

#include <cstddef>
#include <cstdint>

#include "launcher/elements.h"

namespace launcher::collectives {

enum class Isa : std::uint8_t { plain, avx2, avx512 };
const char* name(Isa isa) noexcept;
// The best that CPU and operating system have; the environment's LAUNCHER_ISA=plain|avx2|avx512 asks for less.
Isa isa() noexcept;

struct Finish {
  double scale = 1.0;         // floating point: the folded value is multiplied by it, before the one rounding
  std::uint64_t divisor = 1;  // integers: the folded value is divided by it, towards zero
};

// targets[t][i] = finish(fold over s, in order, of prescale[s] * sources[s][i]), for i < count and all t.
//
// float16 and bfloat16 are folded in float32 and rounded once, to nearest even; NaN stays NaN; integers wrap around;
// boolean: sum and maximum are "or", product and minimum "and". minimum/maximum of floating point: NaN if any is NaN,
// and of equal values (both zeros) the first. A result that is NaN has one form, positive and quiet. The same bits on
// every instruction set. A target may be one of the sources (same address), no other overlap. prescale: null when all
// are 1; never given for integers.
using ReduceFunction = void (*)(void* const* targets, std::size_t target_count, const void* const* sources,
                                std::size_t source_count, std::size_t count, const double* prescale,
                                const Finish& finish);

// Null where the operation is not defined: bit operations of floating point, average of boolean. `average` is the fold
// of `sum`: the caller gives the scale or divisor in Finish.
ReduceFunction reduce_function(DType dtype, ReduceOp op, Isa isa) noexcept;

// Copies what another core has just written: several places at a time. `bytes` may be 0, the addresses not null.
void copy_fresh(void* target, const void* source, std::size_t bytes, Isa isa) noexcept;

// What goes over the wire between hosts in 16 bits. wire: bfloat16 or float16, rounded to nearest even. With `error`
// (float32, count elements, null: none) the rounding error of this call is kept and added in the next one:
// v = source + error; target = round(v); error = v - target. float16 saturates at +-65504 where v is finite.
void compress(std::uint16_t* target, const float* source, float* error, std::size_t count, DType wire,
              Isa isa) noexcept;
void decompress(float* target, const std::uint16_t* source, std::size_t count, DType wire, Isa isa) noexcept;

}  // namespace launcher::collectives

#endif
