// Paths between Python and C++: any bytes, as os.fsencode() and os.fsdecode() have them.
#ifndef LAUNCHER_PYTHON_DATA_PATHS_H
#define LAUNCHER_PYTHON_DATA_PATHS_H

#include <nanobind/nanobind.h>

#include <string>

namespace launcher::python {

namespace nb = nanobind;

// Of a str, bytes or os.PathLike. Raises TypeError, ValueError (a null byte).
inline std::string to_path(nb::handle path) {
  PyObject* encoded = nullptr;
  if (PyUnicode_FSConverter(path.ptr(), &encoded) == 0) {
    throw nb::python_error();
  }
  const nb::object owner = nb::steal(encoded);
  char* text = nullptr;
  Py_ssize_t size = 0;
  if (PyBytes_AsStringAndSize(encoded, &text, &size) != 0) {
    throw nb::python_error();
  }
  return {text, static_cast<std::size_t>(size)};
}

inline nb::object from_path(const std::string& path) {
  PyObject* text = PyUnicode_DecodeFSDefaultAndSize(path.data(), static_cast<Py_ssize_t>(path.size()));
  if (text == nullptr) {
    throw nb::python_error();
  }
  return nb::steal(text);
}

}  // namespace launcher::python

#endif
