// The CUDA library (native/cuda), opened when it is first needed.
#ifndef LAUNCHER_PYTHON_CUDA_LIBRARY_H
#define LAUNCHER_PYTHON_CUDA_LIBRARY_H

#include <string>

#include "../cuda/table.h"
#include "module.h"

namespace launcher::python {

struct CudaLibrary {
  const LauncherCudaTable* table = nullptr;
  std::string reason;  // why there is none
};

const CudaLibrary& cuda_library();
std::string cuda_failure(const LauncherCudaTable& table, const char* what, int status);

void bind_cuda_work(nb::module_& module);

}  // namespace launcher::python

#endif
