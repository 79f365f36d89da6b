#include "table.h"

#include <cuda_runtime.h>

#include <cstring>

namespace {

const char* describe(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

int device_count(int* count) {
  const cudaError_t status = cudaGetDeviceCount(count);
  if (status != cudaSuccess) {
    *count = 0;
    (void)cudaGetLastError();  // it is reported here; left set, the next caller would find it
  }
  return status;
}

int device(int index, LauncherCudaDevice* out) {
  cudaDeviceProp properties;
  cudaError_t status = cudaGetDeviceProperties(&properties, index);
  if (status == cudaSuccess) {
    status = cudaDeviceGetPCIBusId(out->pci_bus_id, sizeof out->pci_bus_id, index);
  }
  if (status != cudaSuccess) {
    (void)cudaGetLastError();
    return status;
  }
  static_assert(sizeof out->name == sizeof properties.name);
  std::memcpy(out->name, properties.name, sizeof out->name);
  out->name[sizeof out->name - 1] = '\0';
  out->total_bytes = properties.totalGlobalMem;
  out->compute_major = properties.major;
  out->compute_minor = properties.minor;
  return cudaSuccess;
}

int memory(int index, uint64_t* free_bytes, uint64_t* total_bytes) {
  int previous = 0;
  cudaError_t status = cudaGetDevice(&previous);
  if (status == cudaSuccess) {
    status = cudaSetDevice(index);
  }
  size_t available = 0;
  size_t total = 0;
  if (status == cudaSuccess) {
    status = cudaMemGetInfo(&available, &total);
    const cudaError_t restored = cudaSetDevice(previous);  // the caller's current device is not ours to change
    status = status == cudaSuccess ? restored : status;
  }
  if (status != cudaSuccess) {
    (void)cudaGetLastError();
    return status;
  }
  *free_bytes = available;
  *total_bytes = total;
  return cudaSuccess;
}

const LauncherCudaTable table = {kLauncherCudaAbi, sizeof(LauncherCudaTable), describe, device_count, device, memory};

}  // namespace

extern "C" __attribute__((visibility("default"))) const LauncherCudaTable* launcher_cuda_table(void) { return &table; }
