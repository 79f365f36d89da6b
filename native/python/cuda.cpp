#include <dlfcn.h>
#include <nanobind/stl/string.h>

#include <string>

#include "cuda_library.h"

namespace launcher::python {
namespace {

std::string own_folder() {
  Dl_info info;
  if (::dladdr(reinterpret_cast<const void*>(&own_folder), &info) == 0 || info.dli_fname == nullptr) {
    return ".";
  }
  const std::string file = info.dli_fname;
  const std::size_t slash = file.rfind('/');
  return slash == std::string::npos ? "." : file.substr(0, slash);
}

CudaLibrary load() {
  const std::string path = own_folder() + "/liblauncher_cuda.so";
  void* handle = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    return {nullptr, std::string("the CUDA library is not usable: ") + ::dlerror()};
  }
  const auto entry = reinterpret_cast<LauncherCudaEntry>(::dlsym(handle, LAUNCHER_CUDA_SYMBOL));
  if (entry == nullptr) {
    return {nullptr, path + " does not export " LAUNCHER_CUDA_SYMBOL};
  }
  const LauncherCudaTable* table = entry();
  if (table->abi != kLauncherCudaAbi) {
    return {nullptr, path + " has interface " + std::to_string(table->abi) + ", this build needs " +
                         std::to_string(static_cast<int>(kLauncherCudaAbi)) + ": reinstall the package"};
  }
  return {table, ""};
}

}  // namespace

// Opened once and never closed: a CUDA runtime can not be unloaded safely.
const CudaLibrary& cuda_library() {
  static const CudaLibrary loaded = load();
  return loaded;
}

std::string cuda_failure(const LauncherCudaTable& table, const char* what, int status) {
  return std::string(what) + ": " + table.describe(status) + " (CUDA error " + std::to_string(status) + ")";
}

namespace {

nb::tuple unusable(const std::string& reason) { return nb::make_tuple(nb::list(), reason); }

nb::tuple cuda_devices(bool free_memory) {
  const CudaLibrary& cuda = cuda_library();
  if (cuda.table == nullptr) {
    return unusable(cuda.reason);
  }
  const LauncherCudaTable& table = *cuda.table;
  int count = 0;
  if (const int status = table.device_count(&count); status != 0) {
    return unusable(cuda_failure(table, "no usable GPU or driver", status));
  }
  if (count == 0) {
    return unusable("no GPU is visible to this process");
  }
  nb::list devices;
  for (int index = 0; index < count; ++index) {
    LauncherCudaDevice device;
    if (const int status = table.device(index, &device); status != 0) {
      return unusable(cuda_failure(table, ("GPU " + std::to_string(index)).c_str(), status));
    }
    nb::dict entry;
    entry["index"] = index;
    entry["name"] = device.name;
    entry["pci_bus_id"] = device.pci_bus_id;
    entry["compute_capability"] = nb::make_tuple(device.compute_major, device.compute_minor);
    entry["total_bytes"] = device.total_bytes;
    entry["free_bytes"] = nb::none();
    if (free_memory) {
      std::uint64_t available = 0;
      std::uint64_t total = 0;
      if (const int status = table.memory(index, &available, &total); status != 0) {
        return unusable(cuda_failure(table, ("memory of GPU " + std::to_string(index)).c_str(), status));
      }
      entry["free_bytes"] = available;
    }
    devices.append(entry);
  }
  return nb::make_tuple(devices, "");
}

}  // namespace

void bind_cuda(nb::module_& module) {
  module.def("cuda_devices", &cuda_devices, nb::kw_only(), nb::arg("free_memory") = false,
             "(devices, reason): the GPUs this process sees, or an empty list and why there are none. free_memory "
             "costs a CUDA context on each GPU. Starts the CUDA driver in this process, which must not fork ranks "
             "afterwards.");
  bind_cuda_work(module);
}

}  // namespace launcher::python
