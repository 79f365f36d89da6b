#include <sys/random.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <new>

#include "device_guard.h"
#include "functions.h"

namespace cuda = launcher::cuda;

struct LauncherCudaComm {
  enum class Order { none, flags, host };  // who orders the steps: fixed by the first call

  int device = 0;
  uint32_t rank = 0;
  uint32_t size = 1;
  uint64_t staging_bytes = 0;
  uint64_t shared_bytes = 0;
  uint64_t segment_bytes = 0;
  unsigned char* segment = nullptr;
  cuda::HostPage* page = nullptr;    // as the host maps it
  cuda::HostPage* mapped = nullptr;  // as the GPU maps it
  cudaEvent_t events[2][2] = {};     // [step][call & 1], may be shared with other processes
  cudaEvent_t last = nullptr;        // behind the last call
  cudaStream_t stream = nullptr;     // of the last call; only compared
  bool called = false;
  bool connected = false;
  Order order = Order::none;
  uint32_t calls = 0;  // begun, where the host orders the steps
  uint32_t blocks = 1;
  unsigned char* peers[cuda::kMaxRanks] = {};
  cudaEvent_t peer_events[cuda::kMaxRanks][2][2] = {};
  bool foreign[cuda::kMaxRanks] = {};  // of another process: mapped, to be unmapped
};

namespace launcher::cuda {
namespace {

// cudaMalloc gives smaller allocations out of one larger, and a handle would share that.
constexpr uint64_t kSegmentUnit = uint64_t{2} << 20;

// Tells threads of one process, who may use each other's addresses, from processes, whose ids can be equal when each is
// in a namespace of its own.
const unsigned char* process_token() {
  static unsigned char token[sizeof LauncherCudaPeer::process];
  static std::once_flag once;
  static bool good = false;
  std::call_once(once, [] { good = getrandom(token, sizeof token, 0) == sizeof token; });
  return good ? token : nullptr;
}

bool same_process(const LauncherCudaPeer& a, const LauncherCudaPeer& b) {
  return std::memcmp(a.process, b.process, sizeof a.process) == 0;
}

// Work that no default stream waits for, and that waits for none.
cudaError_t clear(void* memory, uint64_t bytes) {
  cudaStream_t stream = nullptr;
  cudaError_t status = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (status != cudaSuccess) {
    return status;
  }
  status = cudaMemsetAsync(memory, 0, bytes, stream);
  if (status == cudaSuccess) {
    status = cudaStreamSynchronize(stream);
  }
  const cudaError_t destroyed = cudaStreamDestroy(stream);
  return status == cudaSuccess ? destroyed : status;
}

cudaError_t make(LauncherCudaComm& comm) {
  cudaError_t status = load_allreduce();
  if (status == cudaSuccess) {
    status = cudaMalloc(reinterpret_cast<void**>(&comm.segment), comm.segment_bytes);
  }
  if (status == cudaSuccess) {
    status = clear(comm.segment, comm.segment_bytes);
  }
  void* page = nullptr;
  if (status == cudaSuccess) {
    status = cudaHostAlloc(&page, sizeof(HostPage), cudaHostAllocMapped | cudaHostAllocPortable);
  }
  if (status == cudaSuccess) {
    comm.page = new (page) HostPage{};
    status = cudaHostGetDevicePointer(reinterpret_cast<void**>(&comm.mapped), page, 0);
  }
  for (auto& step : comm.events) {
    for (cudaEvent_t& event : step) {
      if (status == cudaSuccess) {
        status = cudaEventCreateWithFlags(&event, cudaEventInterprocess | cudaEventDisableTiming);
        if (status == cudaErrorNotSupported) {  // no CUDA IPC here: threads of one process do without
          (void)cudaGetLastError();
          status = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
        }
      }
    }
  }
  if (status == cudaSuccess) {
    status = cudaEventCreateWithFlags(&comm.last, cudaEventDisableTiming);
  }
  return status;
}

void free_all(LauncherCudaComm& comm) {
  for (auto& step : comm.events) {
    for (cudaEvent_t event : step) {
      if (event != nullptr) {
        (void)cudaEventDestroy(event);
      }
    }
  }
  if (comm.last != nullptr) {
    (void)cudaEventDestroy(comm.last);
  }
  if (comm.page != nullptr) {
    (void)cudaFreeHost(comm.page);
  }
  if (comm.segment != nullptr) {
    (void)cudaFree(comm.segment);
  }
}

// Makes the peer's memory and events usable here.
cudaError_t open(LauncherCudaComm& comm, uint32_t rank, const LauncherCudaPeer& peer, bool same) {
  if (same) {
    if (peer.device != comm.device) {
      const cudaError_t status = cudaDeviceEnablePeerAccess(peer.device, 0);
      if (status != cudaSuccess && status != cudaErrorPeerAccessAlreadyEnabled) {
        return status;
      }
      (void)cudaGetLastError();
    }
    comm.peers[rank] = reinterpret_cast<unsigned char*>(peer.segment);
    for (int step = 0; step < 2; ++step) {
      for (int turn = 0; turn < 2; ++turn) {
        comm.peer_events[rank][step][turn] = reinterpret_cast<cudaEvent_t>(peer.event_addresses[step][turn]);
      }
    }
    return cudaSuccess;
  }
  if (peer.share_status != cudaSuccess) {
    return static_cast<cudaError_t>(peer.share_status);
  }
  cudaIpcMemHandle_t memory;
  static_assert(sizeof memory == sizeof peer.segment_handle);
  std::memcpy(&memory, peer.segment_handle, sizeof memory);
  void* address = nullptr;
  cudaError_t status = cudaIpcOpenMemHandle(&address, memory, cudaIpcMemLazyEnablePeerAccess);
  if (status != cudaSuccess) {
    return status;
  }
  comm.peers[rank] = static_cast<unsigned char*>(address);
  comm.foreign[rank] = true;
  for (int step = 0; step < 2 && status == cudaSuccess; ++step) {
    for (int turn = 0; turn < 2 && status == cudaSuccess; ++turn) {
      cudaIpcEventHandle_t event;
      static_assert(sizeof event == sizeof peer.event_handles[0][0]);
      std::memcpy(&event, peer.event_handles[step][turn], sizeof event);
      status = cudaIpcOpenEventHandle(&comm.peer_events[rank][step][turn], event);
    }
  }
  return status;
}

bool capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &status) != cudaSuccess) {
    (void)cudaGetLastError();  // the default stream while another is captured: not to be used now
    return true;
  }
  return status != cudaStreamCaptureStatusNone;
}

bool valid(const LauncherCudaComm& comm, const LauncherCudaAllreduce& job) {
  const uint64_t element = allreduce_element(job.dtype);
  const bool in_place = job.algorithm == kLauncherCudaInPlace;
  const bool op = job.op == static_cast<uint8_t>(ReduceOp::sum) || job.op == static_cast<uint8_t>(ReduceOp::minimum) ||
                  job.op == static_cast<uint8_t>(ReduceOp::maximum);
  if (!comm.connected || element == 0 || !op || job.algorithm > kLauncherCudaInPlace || job.count == 0 ||
      job.part < kLauncherCudaWhole || job.part > 2) {
    return false;
  }
  const auto order = job.part == kLauncherCudaWhole ? LauncherCudaComm::Order::flags : LauncherCudaComm::Order::host;
  if (comm.order != LauncherCudaComm::Order::none && comm.order != order) {
    return false;
  }
  if (in_place) {
    return job.offset % sizeof(Wide) == 0 && job.offset <= comm.shared_bytes &&
           job.count <= (comm.shared_bytes - job.offset) / element;
  }
  return job.count <= comm.staging_bytes / element && job.source % element == 0 && job.target % element == 0;
}

cudaError_t wait_for_peers(const LauncherCudaComm& comm, int step, uint32_t call, cudaStream_t stream) {
  for (uint32_t peer = 0; peer < comm.size; ++peer) {
    if (peer != comm.rank) {
      const cudaError_t status = cudaStreamWaitEvent(stream, comm.peer_events[peer][step][call & 1], 0);
      if (status != cudaSuccess) {
        return status;
      }
    }
  }
  return cudaSuccess;
}

// One of the three steps that the host orders. Between two of them all ranks meet on the host, so that each has
// recorded its event before another waits for it; the event of a call is recorded again two calls later, after
// everybody's wait for it has been enqueued.
cudaError_t run_part(LauncherCudaComm& comm, const LauncherCudaAllreduce& job, Call& call, cudaStream_t stream) {
  if (capturing(stream)) {
    return cudaErrorStreamCaptureUnsupported;
  }
  const bool one_shot = job.algorithm == kLauncherCudaOneShot;
  const bool in_place = job.algorithm == kLauncherCudaInPlace;
  comm.calls += job.part == 0 ? 1 : 0;
  call.number = comm.calls;
  const uint32_t turn = comm.calls & 1;
  cudaError_t status = cudaSuccess;
  if (job.part != 0) {
    status = wait_for_peers(comm, job.part - 1, comm.calls, stream);
  }
  constexpr uint32_t kSteps[] = {kStage, kReduce, kGather};
  const bool nothing = in_place ? job.part != 1 : one_shot && job.part == 2;
  if (status == cudaSuccess && !nothing) {
    call.steps = kSteps[job.part];
    status = launch_allreduce(call, job.dtype, job.algorithm, comm.blocks, stream);
  }
  if (status == cudaSuccess && job.part < 2) {
    status = cudaEventRecord(comm.events[job.part][turn], stream);
  }
  return status;
}

}  // namespace

int comm_create(int device, int rank, int size, uint64_t staging_bytes, uint64_t shared_bytes, LauncherCudaComm** out) {
  *out = nullptr;
  constexpr uint64_t kMost = uint64_t{1} << 40;
  if (size < 1 || size > kMaxRanks || rank < 0 || rank >= size || staging_bytes > kMost || shared_bytes > kMost) {
    return cudaErrorInvalidValue;
  }
  const DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) {
    return reported(guard.status());
  }
  auto* comm = new (std::nothrow) LauncherCudaComm;
  if (comm == nullptr) {
    return cudaErrorMemoryAllocation;
  }
  comm->device = device;
  comm->rank = static_cast<uint32_t>(rank);
  comm->size = static_cast<uint32_t>(size);
  comm->staging_bytes = round_up(staging_bytes, kRounding);
  comm->shared_bytes = round_up(shared_bytes, kRounding);
  comm->segment_bytes = round_up(kControlBytes + 2 * comm->staging_bytes + comm->shared_bytes, kSegmentUnit);
  if (const cudaError_t status = make(*comm); status != cudaSuccess) {
    free_all(*comm);
    delete comm;
    return reported(status);
  }
  *out = comm;
  return cudaSuccess;
}

int comm_describe(LauncherCudaComm* comm, LauncherCudaPeer* out) {
  const DeviceGuard guard(comm->device);
  if (guard.status() != cudaSuccess) {
    return reported(guard.status());
  }
  *out = {};
  const unsigned char* token = process_token();
  if (token == nullptr) {
    return cudaErrorOperatingSystem;
  }
  std::memcpy(out->process, token, sizeof out->process);
  cudaError_t status = cudaDeviceGetPCIBusId(out->pci_bus_id, sizeof out->pci_bus_id, comm->device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&out->processors, cudaDevAttrMultiProcessorCount, comm->device);
  }
  if (status != cudaSuccess) {
    return reported(status);
  }
  out->device = comm->device;
  out->segment = reinterpret_cast<uint64_t>(comm->segment);
  out->segment_bytes = comm->segment_bytes;
  out->staging_bytes = comm->staging_bytes;
  out->shared_bytes = comm->shared_bytes;
  cudaIpcMemHandle_t memory;
  status = cudaIpcGetMemHandle(&memory, comm->segment);
  if (status == cudaSuccess) {
    std::memcpy(out->segment_handle, &memory, sizeof memory);
  }
  for (int step = 0; step < 2; ++step) {
    for (int turn = 0; turn < 2; ++turn) {
      out->event_addresses[step][turn] = reinterpret_cast<uint64_t>(comm->events[step][turn]);
      cudaIpcEventHandle_t event;
      if (status == cudaSuccess) {
        status = cudaIpcGetEventHandle(&event, comm->events[step][turn]);
      }
      if (status == cudaSuccess) {
        std::memcpy(out->event_handles[step][turn], &event, sizeof event);
      }
    }
  }
  out->share_status = reported(status);
  return cudaSuccess;
}

int comm_connect(LauncherCudaComm* comm, const LauncherCudaPeer* peers, LauncherCudaConnection* out) {
  *out = {};
  out->culprit = -1;
  const DeviceGuard guard(comm->device);
  if (guard.status() != cudaSuccess) {
    return reported(guard.status());
  }
  const LauncherCudaPeer& own = peers[comm->rank];
  for (uint32_t rank = 0; rank < comm->size; ++rank) {
    const LauncherCudaPeer& peer = peers[rank];
    out->culprit = static_cast<int32_t>(rank);
    if (peer.segment_bytes != own.segment_bytes || peer.staging_bytes != own.staging_bytes ||
        peer.shared_bytes != own.shared_bytes) {
      return cudaErrorInvalidConfiguration;
    }
    if (const cudaError_t status = open(*comm, rank, peer, same_process(own, peer)); status != cudaSuccess) {
      return reported(status);
    }
  }
  out->culprit = -1;
  // The same on every rank: it decides how many blocks meet. All blocks of all ranks that wait for each other must run
  // at once, each on a multiprocessor of its own.
  uint32_t blocks = kMaxMeetings;
  for (uint32_t rank = 0; rank < comm->size; ++rank) {
    uint32_t sharers = 0;
    for (uint32_t other = 0; other < comm->size; ++other) {
      if (std::strncmp(peers[rank].pci_bus_id, peers[other].pci_bus_id, sizeof own.pci_bus_id) == 0) {
        ++sharers;
        out->processes_share |= same_process(peers[rank], peers[other]) ? 0U : 1U;
      }
    }
    out->ranks_per_device = std::max(out->ranks_per_device, sharers);
    blocks = std::min(blocks, static_cast<uint32_t>(std::max(peers[rank].processors, 1)) / sharers);
  }
  comm->blocks = std::max(blocks, 1U);
  out->blocks = comm->blocks;
  comm->connected = true;
  return cudaSuccess;
}

int comm_allreduce(LauncherCudaComm* comm, const LauncherCudaAllreduce* job) {
  const DeviceGuard guard(comm->device);
  if (guard.status() != cudaSuccess) {
    return reported(guard.status());
  }
  if (!valid(*comm, *job)) {
    return cudaErrorInvalidValue;
  }
  const cudaStream_t stream = stream_of(job->stream);
  const bool captured = capturing(stream);
  if (!captured && comm->called && stream != comm->stream) {
    // Calls follow each other whatever their streams: the turns of staging areas stand on it.
    if (const cudaError_t status = cudaStreamWaitEvent(stream, comm->last, 0); status != cudaSuccess) {
      return reported(status);
    }
  }
  Call call{};
  std::copy(std::begin(comm->peers), std::end(comm->peers), call.segments);
  call.host = comm->mapped;
  call.source = reinterpret_cast<const void*>(job->source);
  call.target = reinterpret_cast<void*>(job->target);
  call.count = job->count;
  call.staging_offset = kControlBytes;
  call.staging_bytes = comm->staging_bytes;
  call.shared_offset = kControlBytes + 2 * comm->staging_bytes + job->offset;
  call.timeout_ns = job->timeout_ns;
  call.scale = job->scale;
  call.rank = comm->rank;
  call.size = comm->size;
  call.op = job->op;
  cudaError_t status = cudaSuccess;
  if (job->part == kLauncherCudaWhole) {
    comm->order = LauncherCudaComm::Order::flags;
    call.steps = kAllSteps;
    status = launch_allreduce(call, job->dtype, job->algorithm, comm->blocks, stream);
  } else {
    comm->order = LauncherCudaComm::Order::host;
    status = run_part(*comm, *job, call, stream);
  }
  if (status == cudaSuccess && !captured) {
    status = cudaEventRecord(comm->last, stream);
    comm->stream = stream;
    comm->called = true;
  }
  return reported(status);
}

uint64_t comm_shared(const LauncherCudaComm* comm) {
  return reinterpret_cast<uint64_t>(comm->segment) + kControlBytes + 2 * comm->staging_bytes;
}

void comm_status(const LauncherCudaComm* comm, LauncherCudaStatus* out) {
  *out = {};
  out->state = static_cast<int32_t>(__atomic_load_n(&comm->page->state, __ATOMIC_ACQUIRE));
  if (out->state != kLauncherCudaGood) {
    out->culprit = static_cast<int32_t>(__atomic_load_n(&comm->page->culprit, __ATOMIC_RELAXED));
    out->call = __atomic_load_n(&comm->page->call, __ATOMIC_RELAXED);
  }
}

void comm_abort(LauncherCudaComm* comm) { __atomic_store_n(&comm->page->abort, 1U, __ATOMIC_RELEASE); }

int comm_disconnect(LauncherCudaComm* comm) {
  const DeviceGuard guard(comm->device);
  cudaError_t status = guard.status();
  if (status == cudaSuccess && comm->called) {
    status = cudaEventSynchronize(comm->last);
  }
  comm->connected = false;
  for (uint32_t rank = 0; rank < comm->size; ++rank) {
    if (comm->foreign[rank]) {
      comm->foreign[rank] = false;
      for (auto& step : comm->peer_events[rank]) {
        for (cudaEvent_t& event : step) {
          if (event != nullptr) {
            (void)cudaEventDestroy(event);
            event = nullptr;
          }
        }
      }
      const cudaError_t closed = cudaIpcCloseMemHandle(comm->peers[rank]);
      status = status == cudaSuccess ? closed : status;
    }
    comm->peers[rank] = nullptr;
  }
  return reported(status);
}

int comm_destroy(LauncherCudaComm* comm) {
  const DeviceGuard guard(comm->device);
  const cudaError_t status = guard.status();
  if (status == cudaSuccess) {
    free_all(*comm);
  }
  delete comm;
  return reported(status);
}

}  // namespace launcher::cuda
