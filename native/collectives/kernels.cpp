#include "kernels.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels_table.h"
#ifdef LAUNCHER_KERNELS_X86
#include <cpuid.h>
#endif

namespace launcher::collectives {
namespace {

constexpr const char* kNames[] = {"plain", "avx2", "avx512"};

// The compiler's builtin also asks whether the operating system saves the wider registers.
Isa best() noexcept {
#ifdef LAUNCHER_KERNELS_X86
  __builtin_cpu_init();
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
  if (__builtin_cpu_supports("avx2") && f16c) {
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 ? Isa::avx512 : Isa::avx2;
  }
#endif
  return Isa::plain;
}

Isa choose() noexcept {
  const Isa most = best();
  const char* wish = std::getenv("LAUNCHER_ISA");
  if (wish == nullptr || *wish == '\0') {
    return most;
  }
  for (std::uint8_t number = 0; number < 3; ++number) {
    if (std::strcmp(wish, kNames[number]) == 0) {
      return number < static_cast<std::uint8_t>(most) ? static_cast<Isa>(number) : most;
    }
  }
  std::fprintf(stderr, "launcher: LAUNCHER_ISA=%.32s is not one of plain, avx2, avx512; %s is used\n", wish,
               name(most));
  return most;
}

const KernelTable& table(Isa isa) noexcept {
#ifdef LAUNCHER_KERNELS_X86
  if (isa == Isa::avx512) {
    return kAvx512Kernels;
  }
  if (isa == Isa::avx2) {
    return kAvx2Kernels;
  }
#else
  static_cast<void>(isa);
#endif
  return kPlainKernels;
}

}  // namespace

const char* name(Isa isa) noexcept { return kNames[static_cast<std::uint8_t>(isa)]; }

Isa isa() noexcept {
  static const Isa chosen = choose();
  return chosen;
}

ReduceFunction reduce_function(DType dtype, ReduceOp op, Isa isa) noexcept {
  return table(isa).reduce[static_cast<std::size_t>(dtype)][static_cast<std::size_t>(op)];
}

void copy_fresh(void* target, const void* source, std::size_t bytes, Isa isa) noexcept {
  table(isa).copy_fresh(target, source, bytes);
}

void compress(std::uint16_t* target, const float* source, float* error, std::size_t count, DType wire,
              Isa isa) noexcept {
  table(isa).compress[wire == DType::float16 ? 1 : 0](target, source, error, count);
}

void decompress(float* target, const std::uint16_t* source, std::size_t count, DType wire, Isa isa) noexcept {
  table(isa).decompress[wire == DType::float16 ? 1 : 0](target, source, count);
}

}  // namespace launcher::collectives
