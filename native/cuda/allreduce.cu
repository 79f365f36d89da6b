#include "allreduce.h"

#include <cuda_runtime.h>

#include "functions.h"

namespace launcher::cuda {
namespace {

// A block of the kernel's body, on the GPU: each thread does its own part.
class DeviceBlock {
 public:
  __device__ std::uint32_t index() const { return blockIdx.x; }
  __device__ std::uint32_t count() const { return gridDim.x; }
  __device__ std::uint32_t threads() const { return kReduceThreads; }
  __device__ void sync() { __syncthreads(); }
  template <typename Work>
  __device__ void each(Work work) {
    work(threadIdx.x);
  }
  // Whether it is so for all threads; each gets the answer, after all have given theirs.
  template <typename Test>
  __device__ bool all(Test test) {
    return __syncthreads_and(test(threadIdx.x)) != 0;
  }
};

template <typename T, LauncherCudaAlgorithm kAlgorithm>
__global__ void __launch_bounds__(kReduceThreads, 1) allreduce_kernel(const __grid_constant__ Call call) {
  DeviceBlock block;
  allreduce<T, kAlgorithm>(block, call);
}

using Kernel = void (*)(Call);

template <typename T>
Kernel kernel_of(uint8_t algorithm) {
  switch (algorithm) {
    case kLauncherCudaOneShot:
      return allreduce_kernel<T, kLauncherCudaOneShot>;
    case kLauncherCudaTwoShot:
      return allreduce_kernel<T, kLauncherCudaTwoShot>;
    case kLauncherCudaInPlace:
      return allreduce_kernel<T, kLauncherCudaInPlace>;
    default:
      return nullptr;
  }
}

Kernel kernel_for(uint8_t dtype, uint8_t algorithm) {
  switch (static_cast<DType>(dtype)) {
    case DType::float32:
      return kernel_of<Float32>(algorithm);
    case DType::float64:
      return kernel_of<Float64>(algorithm);
    case DType::float16:
      return kernel_of<Float16>(algorithm);
    case DType::bfloat16:
      return kernel_of<BFloat16>(algorithm);
    case DType::int32:
      return kernel_of<Int32>(algorithm);
    case DType::int64:
      return kernel_of<Int64>(algorithm);
    default:
      return nullptr;
  }
}

}  // namespace

cudaError_t load_allreduce() {
  for (int dtype = 0; dtype < collectives::kDTypes; ++dtype) {
    for (int algorithm = 0; algorithm < 3; ++algorithm) {
      const Kernel kernel = kernel_for(static_cast<uint8_t>(dtype), static_cast<uint8_t>(algorithm));
      if (kernel == nullptr) {
        continue;
      }
      cudaFuncAttributes attributes;
      if (const cudaError_t status = cudaFuncGetAttributes(&attributes, kernel); status != cudaSuccess) {
        return status;
      }
    }
  }
  return cudaSuccess;
}

uint64_t allreduce_element(uint8_t dtype) {
  return kernel_for(dtype, kLauncherCudaOneShot) == nullptr ? 0 : collectives::size_of(static_cast<DType>(dtype));
}

cudaError_t launch_allreduce(const Call& call, uint8_t dtype, uint8_t algorithm, uint32_t most_blocks,
                             cudaStream_t stream) {
  const Kernel kernel = kernel_for(dtype, algorithm);
  if (kernel == nullptr) {
    return cudaErrorInvalidValue;
  }
  const std::uint64_t lanes = sizeof(Wide) / allreduce_element(dtype);
  const std::uint64_t vectors = (call.count + lanes - 1) / lanes;
  const std::uint64_t longest = algorithm == kLauncherCudaOneShot ? vectors : part_begin(vectors, 1, call.size);
  kernel<<<meetings_of(longest, most_blocks), kReduceThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace launcher::cuda
