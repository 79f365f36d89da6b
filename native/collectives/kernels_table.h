// What each instruction set's translation unit gives to kernels.cpp.
#ifndef LAUNCHER_COLLECTIVES_KERNELS_TABLE_H
#define LAUNCHER_COLLECTIVES_KERNELS_TABLE_H

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace launcher::collectives {

struct KernelTable {
  ReduceFunction reduce[kDTypes][kReduceOps];
  void (*copy_fresh)(void* target, const void* source, std::size_t bytes);
  void (*compress[2])(std::uint16_t* target, const float* source, float* error,
                      std::size_t count);  // bfloat16, float16
  void (*decompress[2])(float* target, const std::uint16_t* source, std::size_t count);
};

extern const KernelTable kPlainKernels;
#ifdef LAUNCHER_KERNELS_X86
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
#endif

}  // namespace launcher::collectives

#endif
