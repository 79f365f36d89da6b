#include "kernels.h"

#include <nanobind/stl/vector.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "module.h"

namespace launcher::python {
namespace {

namespace collectives = launcher::collectives;
using collectives::DType;
using collectives::ReduceOp;
using Address = std::uintptr_t;

void* to_pointer(Address address) noexcept { return reinterpret_cast<void*>(address); }

DType to_wire(int number) {
  const auto wire = static_cast<DType>(number);
  if (wire != DType::float16 && wire != DType::bfloat16) {
    throw std::invalid_argument("wire is " + std::to_string(number) + "; expected the DType float16 or bfloat16");
  }
  return wire;
}

void reduce_into(Address target, const std::vector<Address>& sources, std::size_t count, int dtype, int op,
                 const std::vector<double>& prescale, double scale, std::uint64_t divisor) {
  if (dtype < 0 || dtype >= collectives::kDTypes || op < 0 || op >= collectives::kReduceOps) {
    throw std::invalid_argument("dtype is " + std::to_string(dtype) + " and op " + std::to_string(op) +
                                "; expected a DType and a ReduceOp");
  }
  if (sources.empty() || (!prescale.empty() && prescale.size() != sources.size()) || divisor == 0) {
    throw std::invalid_argument("reduce_into takes at least one source, no or one factor for each, and no divisor 0");
  }
  const auto reduce =
      collectives::reduce_function(static_cast<DType>(dtype), static_cast<ReduceOp>(op), collectives::isa());
  if (reduce == nullptr) {
    throw std::invalid_argument("ReduceOp " + std::to_string(op) + " is not defined for DType " +
                                std::to_string(dtype));
  }
  void* const to = to_pointer(target);
  const auto* from = reinterpret_cast<const void* const*>(sources.data());
  nb::gil_scoped_release free;
  reduce(&to, 1, from, sources.size(), count, prescale.empty() ? nullptr : prescale.data(), {scale, divisor});
}

void copy_bytes(Address target, Address source, std::size_t bytes) {
  if (bytes == 0 || target == source) {
    return;
  }
  nb::gil_scoped_release free;
  std::memcpy(to_pointer(target), to_pointer(source), bytes);
}

void compress(Address target, Address source, Address error, std::size_t count, int wire) {
  const DType type = to_wire(wire);
  nb::gil_scoped_release free;
  collectives::compress(static_cast<std::uint16_t*>(to_pointer(target)), static_cast<const float*>(to_pointer(source)),
                        static_cast<float*>(to_pointer(error)), count, type, collectives::isa());
}

void decompress(Address target, Address source, std::size_t count, int wire) {
  const DType type = to_wire(wire);
  nb::gil_scoped_release free;
  collectives::decompress(static_cast<float*>(to_pointer(target)),
                          static_cast<const std::uint16_t*>(to_pointer(source)), count, type, collectives::isa());
}

}  // namespace

void bind_kernels(nb::module_& module) {
  using nb::arg;
  module.def("reduce_into", &reduce_into, arg("target"), arg("sources"), arg("count"), arg("dtype"), arg("op"),
             arg("prescale") = std::vector<double>(), arg("scale") = 1.0, arg("divisor") = 1,
             "target[i] = fold of sources[0][i], sources[1][i], ... in this order; see native/collectives/kernels.h. "
             "Addresses, counts in elements; target may be one of the sources.");
  module.def("copy_bytes", &copy_bytes, arg("target"), arg("source"), arg("nbytes"),
             "Copies memory that does not overlap, or is the same.");
  module.def("compress", &compress, arg("target"), arg("source"), arg("error"), arg("count"), arg("wire"),
             "float32 to 16 bits; error: address of count float32 that keep what was rounded off, 0 for none.");
  module.def("decompress", &decompress, arg("target"), arg("source"), arg("count"), arg("wire"),
             "16 bits to float32, exactly.");
}

}  // namespace launcher::python
