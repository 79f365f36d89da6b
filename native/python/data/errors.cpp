#include <exception>
#include <string>

#include "error.h"
#include "module.h"

namespace launcher::python {
namespace {

// launcher.errors.DataError(text, problem, file, offset, record); -1 where a number is not known.
void raise_data_error(const data::DataError& error) {
  const auto number = [](std::uint64_t value) {
    return value == data::kNowhere ? -1LL : static_cast<long long>(value);
  };
  PyObject* errors = PyImport_ImportModule("launcher.errors");
  if (errors == nullptr) {
    return;
  }
  PyObject* type = PyObject_GetAttrString(errors, "DataError");
  Py_DECREF(errors);
  if (type == nullptr) {
    return;
  }
  // The path may be no UTF-8: as os.fsdecode() has it.
  PyObject* file = PyUnicode_DecodeFSDefaultAndSize(error.file().data(), static_cast<Py_ssize_t>(error.file().size()));
  const std::string text = error.what();
  PyObject* what = PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "backslashreplace");
  if (file != nullptr && what != nullptr) {
    PyObject* arguments = Py_BuildValue("(OiOLL)", what, static_cast<int>(error.problem()), file,
                                        number(error.offset()), number(error.record()));
    if (arguments != nullptr) {
      PyErr_SetObject(type, arguments);
      Py_DECREF(arguments);
    }
  }
  Py_XDECREF(what);
  Py_XDECREF(file);
  Py_DECREF(type);
}

void translate(const std::exception_ptr& exception, void*) {
  try {
    std::rethrow_exception(exception);
  } catch (const data::DataError& error) {
    raise_data_error(error);
  }
}

}  // namespace

void bind_data_errors(nb::module_&) { nb::register_exception_translator(translate, nullptr); }

}  // namespace launcher::python
