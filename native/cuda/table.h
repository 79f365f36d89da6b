// The one interface between the package's native code and the CUDA library, which is a separate shared object that is
// opened at run time: the package works the same where it was built without nvcc, where there is no driver and where
// there is no GPU. Plain C types only; any change of layout or meaning raises `kLauncherCudaAbi`.
#ifndef LAUNCHER_CUDA_TABLE_H
#define LAUNCHER_CUDA_TABLE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { kLauncherCudaAbi = 1 };

typedef struct {
  char name[256];
  char pci_bus_id[32];  // domain:bus:device.function
  uint64_t total_bytes;
  int32_t compute_major;
  int32_t compute_minor;
} LauncherCudaDevice;

// Every function returns 0, or the number of a CUDA error that `describe` puts into words. None of them throws.
typedef struct {
  uint32_t abi;   // kLauncherCudaAbi; checked before anything else is read
  uint32_t size;  // sizeof(LauncherCudaTable)
  const char* (*describe)(int status);
  int (*device_count)(int* count);
  int (*device)(int index, LauncherCudaDevice* out);
  // Makes a context on the device (some hundred MB of its memory, for as long as the process lives).
  int (*memory)(int index, uint64_t* free_bytes, uint64_t* total_bytes);
} LauncherCudaTable;

// The library's only symbol; the table lives as long as the library is loaded.
#define LAUNCHER_CUDA_SYMBOL "launcher_cuda_table"
typedef const LauncherCudaTable* (*LauncherCudaEntry)(void);

#ifdef __cplusplus
}
#endif

#endif
