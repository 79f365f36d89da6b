#ifndef LAUNCHER_CUDA_DEVICE_GUARD_H
#define LAUNCHER_CUDA_DEVICE_GUARD_H

#include <cuda_runtime.h>

#include <cstdint>

namespace launcher::cuda {

// Makes `device` current while it lives: the caller's current device is not ours to change.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : status_(cudaGetDevice(&previous_)) {
    if (status_ == cudaSuccess) {
      status_ = cudaSetDevice(device);
      restore_ = status_ == cudaSuccess && previous_ != device;
    }
  }
  ~DeviceGuard() {
    if (restore_) {
      (void)cudaSetDevice(previous_);
    }
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t status() const { return status_; }

 private:
  int previous_ = 0;
  bool restore_ = false;
  cudaError_t status_;
};

inline cudaStream_t stream_of(std::uint64_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

// For the table: the error goes to the caller; left set, whoever asks the runtime next would find it.
inline int reported(cudaError_t status) {
  if (status != cudaSuccess) {
    (void)cudaGetLastError();
  }
  return status;
}

}  // namespace launcher::cuda

#endif
