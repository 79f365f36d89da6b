#include "module.h"

NB_MODULE(_native, module) {
  module.doc() = "Native part of launcher: status page, process attributes, collectives, CUDA.";
  launcher::python::bind_status_page(module);
  launcher::python::bind_process(module);
  launcher::python::bind_cuda(module);
  launcher::python::bind_collectives(module);
  launcher::python::bind_kernels(module);
  launcher::python::bind_sockets(module);
}
