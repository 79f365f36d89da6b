#include "convert.h"

#include <cuda_runtime.h>

#include <memory>
#include <new>

#include "device_guard.h"
#include "functions.h"

namespace launcher::cuda {
namespace {

template <typename From, typename To, typename Table>
__global__ void __launch_bounds__(kConvertThreads) pack_kernel(const __grid_constant__ Table table) {
  pack<From, To>(table, blockIdx.x, threadIdx.x, kConvertThreads);
}

template <typename Wire>
__global__ void __launch_bounds__(kConvertThreads)
    compress_kernel(std::uint16_t* target, const float* source, float* error, std::uint64_t count) {
  const std::uint64_t begin = static_cast<std::uint64_t>(blockIdx.x) * kCompressChunk;
  const std::uint64_t left = count - begin;
  compress<Wire>(target + begin, source + begin, error != nullptr ? error + begin : nullptr,
                 static_cast<std::uint32_t>(left < kCompressChunk ? left : kCompressChunk), threadIdx.x,
                 kConvertThreads);
}

template <typename Wire>
__global__ void __launch_bounds__(kConvertThreads)
    decompress_kernel(float* target, const std::uint16_t* source, std::uint64_t count) {
  const std::uint64_t begin = static_cast<std::uint64_t>(blockIdx.x) * kCompressChunk;
  const std::uint64_t left = count - begin;
  convert<Wire, Float32>(source + begin, target + begin,
                         static_cast<std::uint32_t>(left < kCompressChunk ? left : kCompressChunk), 1.0F, threadIdx.x,
                         kConvertThreads);
}

template <typename Table>
using PackKernel = void (*)(Table);

template <typename From, typename Table>
PackKernel<Table> kernel_to(DType to) {
  switch (to) {
    case DType::float32:
      return pack_kernel<From, Float32, Table>;
    case DType::float16:
      return pack_kernel<From, Float16, Table>;
    case DType::bfloat16:
      return pack_kernel<From, BFloat16, Table>;
    default:
      return nullptr;
  }
}

template <typename Table>
PackKernel<Table> kernel_for(DType from, DType to) {
  switch (from) {
    case DType::float32:
      return kernel_to<Float32, Table>(to);
    case DType::float16:
      return kernel_to<Float16, Table>(to);
    case DType::bfloat16:
      return kernel_to<BFloat16, Table>(to);
    default:
      return nullptr;
  }
}

// `next`: the first tensor that is still to be done, here and afterwards.
template <typename Table>
cudaError_t launch(const LauncherCudaPack& job, PackKernel<Table> kernel, Table& table, std::uint64_t& next) {
  table.chunk = job.chunk == 0 ? kDefaultChunk : job.chunk;
  table.unpack = job.unpack;
  table.scale = static_cast<float>(job.scale);
  table.bucket = job.bucket;
  next = fill(table, job.tensors, job.tensor_count, next);
  const std::uint32_t chunks = table.first_chunks[table.tensor_count];
  if (chunks == 0) {
    return next == job.tensor_count ? cudaSuccess : cudaErrorInvalidValue;  // a tensor that no grid is large enough for
  }
  kernel<<<chunks, kConvertThreads, 0, stream_of(job.stream)>>>(table);
  return cudaGetLastError();
}

template <typename Table>
cudaError_t launch_all(const LauncherCudaPack& job) {
  const auto tensor_dtype = static_cast<DType>(job.tensor_dtype);
  const auto bucket_dtype = static_cast<DType>(job.bucket_dtype);
  const PackKernel<Table> kernel =
      job.unpack != 0 ? kernel_for<Table>(bucket_dtype, tensor_dtype) : kernel_for<Table>(tensor_dtype, bucket_dtype);
  if (kernel == nullptr || job.chunk % kChunkUnit != 0) {
    return cudaErrorInvalidValue;
  }
  const std::unique_ptr<Table> table(new (std::nothrow) Table);
  if (table == nullptr) {
    return cudaErrorMemoryAllocation;
  }
  for (std::uint64_t next = 0; next < job.tensor_count;) {
    if (const cudaError_t status = launch(job, kernel, *table, next); status != cudaSuccess) {
      return status;
    }
  }
  return cudaSuccess;
}

}  // namespace

int pack(const LauncherCudaPack* job) {
  const DeviceGuard guard(job->device);
  if (guard.status() != cudaSuccess) {
    return reported(guard.status());
  }
  constexpr std::uint64_t kSmall = sizeof SmallTable::pointers / sizeof SmallTable::pointers[0];
  return reported(job->tensor_count <= kSmall ? launch_all<SmallTable>(*job) : launch_all<LargeTable>(*job));
}

int compress(const LauncherCudaCompress* job) {
  const DeviceGuard guard(job->device);
  if (guard.status() != cudaSuccess) {
    return reported(guard.status());
  }
  if (job->count == 0) {
    return cudaSuccess;
  }
  const auto wire_dtype = static_cast<DType>(job->wire_dtype);
  const std::uint64_t blocks = (job->count - 1) / kCompressChunk + 1;
  if (blocks > kMaxBlocks || (wire_dtype != DType::float16 && wire_dtype != DType::bfloat16)) {
    return cudaErrorInvalidValue;
  }
  auto* values = reinterpret_cast<float*>(job->values);
  auto* wire = reinterpret_cast<std::uint16_t*>(job->wire);
  auto* error = reinterpret_cast<float*>(job->error);
  const bool half = wire_dtype == DType::float16;
  const auto grid = static_cast<unsigned>(blocks);
  const cudaStream_t stream = stream_of(job->stream);
  if (job->decompress != 0) {
    const auto kernel = half ? decompress_kernel<Float16> : decompress_kernel<BFloat16>;
    kernel<<<grid, kConvertThreads, 0, stream>>>(values, wire, job->count);
  } else {
    const auto kernel = half ? compress_kernel<Float16> : compress_kernel<BFloat16>;
    kernel<<<grid, kConvertThreads, 0, stream>>>(wire, values, error, job->count);
  }
  return reported(cudaGetLastError());
}

}  // namespace launcher::cuda
