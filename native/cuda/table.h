// The one interface between the package's native code and the CUDA library, which is a separate shared object that is
// opened at run time: the package works the same where it was built without nvcc, where there is no driver and where
// there is no GPU. Plain C types only; any change of layout or meaning raises `kLauncherCudaAbi`.
//
// Work on a stream is only enqueued: a function returns before it is done, and what it is told of memory must stay
// valid until then. Addresses and streams are integers; stream 0 is the default stream. Types of elements and
// operations are numbered as in launcher/elements.h.
#ifndef LAUNCHER_CUDA_TABLE_H
#define LAUNCHER_CUDA_TABLE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { kLauncherCudaAbi = 3, kLauncherCudaMaxRanks = 8 };

typedef struct {
  char name[256];
  char pci_bus_id[32];  // domain:bus:device.function
  uint64_t total_bytes;
  int32_t compute_major;
  int32_t compute_minor;
} LauncherCudaDevice;

// A tensor's place on the GPU and in a bucket. Pointers and offsets are multiples of the element's size; both sides go
// by 16 bytes where they are multiples of that.
typedef struct {
  uint64_t pointer;
  uint64_t count;   // elements
  uint64_t offset;  // in the bucket, elements
} LauncherCudaTensor;

typedef struct {
  const LauncherCudaTensor* tensors;
  uint64_t tensor_count;
  uint64_t bucket;
  double scale;  // elements are multiplied by it, in float32
  uint64_t stream;
  int32_t device;
  uint32_t chunk;        // elements that a block of threads takes, a multiple of 8; 0: chosen
  uint8_t tensor_dtype;  // float32, float16, bfloat16
  uint8_t bucket_dtype;  // the same
  uint8_t unpack;        // 1: from the bucket to the tensors
} LauncherCudaPack;

typedef struct {
  uint64_t values;  // float32
  uint64_t wire;    // float16 or bfloat16
  uint64_t error;   // float32, kept from call to call; 0: none. Not for decompression.
  uint64_t count;
  uint64_t stream;
  int32_t device;
  uint8_t wire_dtype;
  uint8_t decompress;  // 1: from wire to values
} LauncherCudaCompress;

// ---- batches of records that the GPU holds (native/cuda/gather.h)

typedef enum {
  kLauncherCudaInOrder = 0,    // the record of a position is the position
  kLauncherCudaByTable = 1,    // a table says it
  kLauncherCudaByNetwork = 2,  // it is computed
} LauncherCudaOrder;

// The numbers of launcher::data::Feistel (native/data/feistel.h).
typedef struct {
  uint64_t n;
  uint32_t low_bits;
  uint32_t low_mask;
  uint32_t high_mask;
  uint32_t keys[8][2];
} LauncherCudaNetwork;

// The records of a batch, by launcher::data::Span (native/data/share.h): row r < valid is at the position begin + r of
// the order, a row after it at (padding + r - valid) % records.
typedef struct {
  LauncherCudaNetwork network;  // kLauncherCudaByNetwork
  uint64_t table;               // kLauncherCudaByTable: uint16, one for each record
  uint64_t numbers;             // uint64, one for each row: the result
  uint64_t records;
  uint64_t begin;
  uint64_t padding;
  uint64_t rows;
  uint64_t valid;
  uint64_t stream;
  int32_t device;
  uint8_t order;  // LauncherCudaOrder
} LauncherCudaNumbering;

// Row r of `target` is record numbers[r] of `source`. What is copied at a time, up to 16 bytes, is what divides both
// addresses and the length of a row.
typedef struct {
  uint64_t source;
  uint64_t target;
  uint64_t numbers;  // uint64, one for each row
  uint64_t rows;
  uint64_t row_bytes;
  uint64_t stream;
  int32_t device;
} LauncherCudaGather;

// ---- allreduce between the GPUs of one host (native/cuda/allreduce.h says how)

typedef enum {
  kLauncherCudaOneShot = 0,
  kLauncherCudaTwoShot = 1,
  kLauncherCudaInPlace = 2,
} LauncherCudaAlgorithm;

typedef enum {
  kLauncherCudaGood = 0,
  kLauncherCudaTimedOut = 1,    // `culprit` was not seen in time
  kLauncherCudaPeerGaveUp = 2,  // `culprit` did, and has told this rank
  kLauncherCudaAborted = 3,     // by this rank's own host
} LauncherCudaState;

typedef struct {
  int32_t state;  // LauncherCudaState; but for good the communicator is unusable
  int32_t culprit;
  uint32_t call;  // number of the call, from 1
} LauncherCudaStatus;

// What a rank tells the others, as bytes: all ranks are on one host and have the same build.
typedef struct {
  uint8_t process[16];  // random, drawn once per process
  char pci_bus_id[32];
  uint64_t segment;  // address in its own process
  uint64_t segment_bytes;
  uint64_t staging_bytes;
  uint64_t shared_bytes;
  uint64_t event_addresses[2][2];  // [step][call & 1]
  uint8_t segment_handle[64];
  uint8_t event_handles[2][2][64];
  int32_t device;        // its number in its own process
  int32_t processors;    // multiprocessors of the device
  int32_t share_status;  // 0, or the CUDA error of making the handles: threads of one process do without
} LauncherCudaPeer;

typedef struct {
  uint32_t ranks_per_device;  // the most that share one
  uint32_t processes_share;   // 1: two processes share a device
  uint32_t blocks;            // the most that a call starts
  int32_t culprit;            // when `connect` fails: the rank it failed with, -1: none
} LauncherCudaConnection;

// One launch may do all (flags), or the host orders the steps (`part` 0, 1, 2) and its ranks meet between them.
enum { kLauncherCudaWhole = -1 };

typedef struct {
  uint64_t source;
  uint64_t target;  // may be `source`; neither is looked at for kLauncherCudaInPlace
  uint64_t offset;  // kLauncherCudaInPlace: of the message in the shared area, a multiple of 16
  uint64_t count;   // elements, at least 1; staged: at most staging_bytes
  uint64_t stream;
  uint64_t timeout_ns;
  double scale;  // floating point: the folded value is multiplied by it, before the one rounding; else 1
  int32_t part;
  uint8_t dtype;      // float32, float64, float16, bfloat16, int32, int64
  uint8_t op;         // sum, minimum, maximum
  uint8_t algorithm;  // LauncherCudaAlgorithm
} LauncherCudaAllreduce;

typedef struct LauncherCudaComm LauncherCudaComm;

// Every function returns 0, or the number of a CUDA error that `describe` puts into words. None of them throws, and all
// leave the calling thread's current device as it was.
typedef struct {
  uint32_t abi;   // kLauncherCudaAbi; checked before anything else is read
  uint32_t size;  // sizeof(LauncherCudaTable)
  const char* (*describe)(int status);
  int (*device_count)(int* count);
  int (*device)(int index, LauncherCudaDevice* out);
  // Makes a context on the device (some hundred MB of its memory, for as long as the process lives).
  int (*memory)(int index, uint64_t* free_bytes, uint64_t* total_bytes);

  // May be captured into a CUDA graph.
  int (*pack)(const LauncherCudaPack* job);
  int (*compress)(const LauncherCudaCompress* job);
  int (*number_records)(const LauncherCudaNumbering* job);
  int (*gather)(const LauncherCudaGather* job);

  // What times work on a stream. `event` is an address.
  int (*event_create)(int device, uint64_t* event);
  int (*event_record)(uint64_t event, uint64_t stream);
  int (*event_done)(uint64_t event, int* done);
  int (*event_elapsed)(uint64_t begin, uint64_t end, float* milliseconds);  // waits for `end`
  int (*event_destroy)(uint64_t event);

  // Life of a communicator: create, describe it to all, connect with what all have said, disconnect, (all ranks have
  // disconnected), destroy. One thread at a time calls it, `comm_abort` and `comm_status` apart.
  int (*comm_create)(int device, int rank, int size, uint64_t staging_bytes, uint64_t shared_bytes,
                     LauncherCudaComm** out);
  int (*comm_describe)(LauncherCudaComm* comm, LauncherCudaPeer* out);
  int (*comm_connect)(LauncherCudaComm* comm, const LauncherCudaPeer* peers, LauncherCudaConnection* out);
  // The whole in one launch may be captured into a CUDA graph.
  int (*comm_allreduce)(LauncherCudaComm* comm, const LauncherCudaAllreduce* job);
  uint64_t (*comm_shared)(const LauncherCudaComm* comm);  // address of the shared area
  void (*comm_status)(const LauncherCudaComm* comm, LauncherCudaStatus* out);
  void (*comm_abort)(LauncherCudaComm* comm);
  int (*comm_disconnect)(LauncherCudaComm* comm);
  int (*comm_destroy)(LauncherCudaComm* comm);
} LauncherCudaTable;

// The library's only symbol; the table lives as long as the library is loaded.
#define LAUNCHER_CUDA_SYMBOL "launcher_cuda_table"
typedef const LauncherCudaTable* (*LauncherCudaEntry)(void);

#ifdef __cplusplus
}
#endif

#endif
