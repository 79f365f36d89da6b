#include "module.h"

NB_MODULE(_data, module) {
  module.doc() = "Native part of launcher.data: order, files, formats, the engine that fills batches.";
  launcher::python::bind_data_errors(module);
  launcher::python::bind_order(module);
  launcher::python::bind_files(module);
  launcher::python::bind_recordio(module);
  launcher::python::bind_text(module);
  launcher::python::bind_archives(module);
  launcher::python::bind_engine(module);
  launcher::python::bind_pipe(module);
}
