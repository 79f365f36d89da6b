// The parts of the extension module; each binds one concept and holds no logic of its own.
#ifndef LAUNCHER_PYTHON_MODULE_H
#define LAUNCHER_PYTHON_MODULE_H

#include <nanobind/nanobind.h>

namespace launcher::python {

namespace nb = nanobind;

void bind_status_page(nb::module_& module);
void bind_process(nb::module_& module);
void bind_cuda(nb::module_& module);
void bind_collectives(nb::module_& module);
void bind_kernels(nb::module_& module);
void bind_sockets(nb::module_& module);

}  // namespace launcher::python

#endif
