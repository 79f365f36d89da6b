// The parts of the extension module launcher._data; each binds one concept and holds no logic of its own.
#ifndef LAUNCHER_PYTHON_DATA_MODULE_H
#define LAUNCHER_PYTHON_DATA_MODULE_H

#include <nanobind/nanobind.h>

namespace launcher::python {

namespace nb = nanobind;

void bind_data_errors(nb::module_& module);
void bind_order(nb::module_& module);
void bind_files(nb::module_& module);
void bind_engine(nb::module_& module);
void bind_recordio(nb::module_& module);
void bind_text(nb::module_& module);
void bind_archives(nb::module_& module);
void bind_pipe(nb::module_& module);

}  // namespace launcher::python

#endif
