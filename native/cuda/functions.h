// What the parts of the CUDA library put into its table; table.h says what each does.
#ifndef LAUNCHER_CUDA_FUNCTIONS_H
#define LAUNCHER_CUDA_FUNCTIONS_H

#include <cuda_runtime.h>

#include "allreduce.h"
#include "table.h"

namespace launcher::cuda {

int pack(const LauncherCudaPack* job);
int compress(const LauncherCudaCompress* job);
int number_records(const LauncherCudaNumbering* job);
int gather(const LauncherCudaGather* job);

int comm_create(int device, int rank, int size, uint64_t staging_bytes, uint64_t shared_bytes, LauncherCudaComm** out);
int comm_describe(LauncherCudaComm* comm, LauncherCudaPeer* out);
int comm_connect(LauncherCudaComm* comm, const LauncherCudaPeer* peers, LauncherCudaConnection* out);
int comm_allreduce(LauncherCudaComm* comm, const LauncherCudaAllreduce* job);
uint64_t comm_shared(const LauncherCudaComm* comm);
void comm_status(const LauncherCudaComm* comm, LauncherCudaStatus* out);
void comm_abort(LauncherCudaComm* comm);
int comm_disconnect(LauncherCudaComm* comm);
int comm_destroy(LauncherCudaComm* comm);

// allreduce.cu, for the communicator.

// Before the first launch, all kernels go to the current device: the driver loads a kernel when it is first launched,
// and may wait for running ones to do so, which would be those that wait for this one.
cudaError_t load_allreduce();
// Bytes of an element; 0: a type that is not folded here.
uint64_t allreduce_element(uint8_t dtype);
cudaError_t launch_allreduce(const Call& call, uint8_t dtype, uint8_t algorithm, uint32_t most_blocks,
                             cudaStream_t stream);

}  // namespace launcher::cuda

#endif
