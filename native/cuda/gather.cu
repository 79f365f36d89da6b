#include "gather.h"

#include <cuda_runtime.h>

#include "convert.h"
#include "device_guard.h"
#include "functions.h"

namespace launcher::cuda {
namespace {

__global__ void __launch_bounds__(kGatherThreads) number_kernel(const __grid_constant__ Numbering job) {
  number_row(job, static_cast<std::uint64_t>(blockIdx.x) * kGatherThreads + threadIdx.x);
}

template <typename Unit>
__global__ void __launch_bounds__(kGatherThreads) gather_kernel(const __grid_constant__ Gathering<Unit> job) {
  gather<Unit>(job, blockIdx.x, threadIdx.x, kGatherThreads);
}

template <typename Unit>
cudaError_t launch(const LauncherCudaGather& job) {
  const std::uint64_t units = job.row_bytes / sizeof(Unit);
  if (units > kMostUnits || job.rows > ~std::uint64_t{0} / units) {
    return cudaErrorInvalidValue;
  }
  const std::uint64_t total = units * job.rows;
  const std::uint32_t chunk = chunk_of(total);
  const std::uint64_t blocks = (total - 1) / chunk + 1;
  if (blocks > kMaxBlocks) {
    return cudaErrorInvalidValue;
  }
  const auto in_row = static_cast<std::uint32_t>(units);
  const Gathering<Unit> gathering = {reinterpret_cast<const Unit*>(job.source),
                                     reinterpret_cast<Unit*>(job.target),
                                     reinterpret_cast<const std::uint64_t*>(job.numbers),
                                     total,
                                     in_row,
                                     chunk,
                                     Divider(in_row)};
  gather_kernel<Unit><<<static_cast<unsigned>(blocks), kGatherThreads, 0, stream_of(job.stream)>>>(gathering);
  return cudaGetLastError();
}

cudaError_t launch_widest(const LauncherCudaGather& job) {
  switch (access_bytes(job.source, job.target, job.row_bytes)) {
    case 16:
      return launch<Wide>(job);
    case 8:
      return launch<Narrow>(job);
    case 4:
      return launch<std::uint32_t>(job);
    case 2:
      return launch<std::uint16_t>(job);
    default:
      return launch<std::uint8_t>(job);
  }
}

}  // namespace

int number_records(const LauncherCudaNumbering* job) {
  const DeviceGuard guard(job->device);
  if (guard.status() != cudaSuccess) {
    return reported(guard.status());
  }
  if (job->rows == 0) {
    return cudaSuccess;
  }
  const std::uint64_t blocks = (job->rows - 1) / kGatherThreads + 1;
  const auto order = static_cast<LauncherCudaOrder>(job->order);
  const bool known = order == kLauncherCudaInOrder || order == kLauncherCudaByTable || order == kLauncherCudaByNetwork;
  if (blocks > kMaxBlocks || !known || job->records == 0) {
    return cudaErrorInvalidValue;
  }
  const Numbering numbering = {network_of(job->network),
                               reinterpret_cast<const std::uint16_t*>(job->table),
                               reinterpret_cast<std::uint64_t*>(job->numbers),
                               job->records,
                               job->begin,
                               job->padding,
                               job->rows,
                               job->valid,
                               order};
  number_kernel<<<static_cast<unsigned>(blocks), kGatherThreads, 0, stream_of(job->stream)>>>(numbering);
  return reported(cudaGetLastError());
}

int gather(const LauncherCudaGather* job) {
  const DeviceGuard guard(job->device);
  if (guard.status() != cudaSuccess) {
    return reported(guard.status());
  }
  if (job->rows == 0 || job->row_bytes == 0) {
    return cudaSuccess;
  }
  return reported(launch_widest(*job));
}

}  // namespace launcher::cuda
