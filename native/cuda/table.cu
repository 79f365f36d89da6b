#include "table.h"

#include <cuda_runtime.h>

#include <cstring>
#include <new>

#include "device_guard.h"
#include "functions.h"

namespace {

using launcher::cuda::DeviceGuard;
using launcher::cuda::reported;
using launcher::cuda::stream_of;

const char* describe(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

int device_count(int* count) {
  const cudaError_t status = cudaGetDeviceCount(count);
  if (status != cudaSuccess) {
    *count = 0;
  }
  return reported(status);
}

int device(int index, LauncherCudaDevice* out) {
  cudaDeviceProp properties;
  cudaError_t status = cudaGetDeviceProperties(&properties, index);
  if (status == cudaSuccess) {
    status = cudaDeviceGetPCIBusId(out->pci_bus_id, sizeof out->pci_bus_id, index);
  }
  if (status != cudaSuccess) {
    return reported(status);
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
  const DeviceGuard guard(index);
  cudaError_t status = guard.status();
  size_t available = 0;
  size_t total = 0;
  if (status == cudaSuccess) {
    status = cudaMemGetInfo(&available, &total);
  }
  if (status == cudaSuccess) {
    *free_bytes = available;
    *total_bytes = total;
  }
  return reported(status);
}

// Stream 0 is another one on each device.
struct Event {
  cudaEvent_t event;
  int device;
};

Event& event_of(uint64_t event) { return *reinterpret_cast<Event*>(event); }

int event_create(int index, uint64_t* event) {
  const DeviceGuard guard(index);
  cudaError_t status = guard.status();
  auto* made = new (std::nothrow) Event{nullptr, index};
  if (made == nullptr) {
    return cudaErrorMemoryAllocation;
  }
  if (status == cudaSuccess) {
    status = cudaEventCreate(&made->event);
  }
  if (status != cudaSuccess) {
    delete made;
    return reported(status);
  }
  *event = reinterpret_cast<uint64_t>(made);
  return cudaSuccess;
}

int event_record(uint64_t event, uint64_t stream) {
  const DeviceGuard guard(event_of(event).device);
  return reported(guard.status() == cudaSuccess ? cudaEventRecord(event_of(event).event, stream_of(stream))
                                                : guard.status());
}

int event_done(uint64_t event, int* done) {
  const cudaError_t status = cudaEventQuery(event_of(event).event);
  *done = status == cudaSuccess;
  return status == cudaErrorNotReady ? reported(status), cudaSuccess : reported(status);
}

int event_elapsed(uint64_t begin, uint64_t end, float* milliseconds) {
  cudaError_t status = cudaEventSynchronize(event_of(end).event);
  if (status == cudaSuccess) {
    status = cudaEventElapsedTime(milliseconds, event_of(begin).event, event_of(end).event);
  }
  return reported(status);
}

int event_destroy(uint64_t event) {
  const cudaError_t status = cudaEventDestroy(event_of(event).event);
  delete &event_of(event);
  return reported(status);
}

const LauncherCudaTable table = {
    kLauncherCudaAbi,
    sizeof(LauncherCudaTable),
    describe,
    device_count,
    device,
    memory,
    launcher::cuda::pack,
    launcher::cuda::compress,
    launcher::cuda::number_records,
    launcher::cuda::gather,
    event_create,
    event_record,
    event_done,
    event_elapsed,
    event_destroy,
    launcher::cuda::comm_create,
    launcher::cuda::comm_describe,
    launcher::cuda::comm_connect,
    launcher::cuda::comm_allreduce,
    launcher::cuda::comm_shared,
    launcher::cuda::comm_status,
    launcher::cuda::comm_abort,
    launcher::cuda::comm_disconnect,
    launcher::cuda::comm_destroy,
};

}  // namespace

extern "C" __attribute__((visibility("default"))) const LauncherCudaTable* launcher_cuda_table(void) { return &table; }
