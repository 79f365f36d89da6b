#include "launcher/status_page.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>

#include <exception>
#include <string>
#include <string_view>

#include "module.h"

namespace launcher::python {
namespace {

// OSError(errno, text, path) makes Python choose FileNotFoundError and its like, and fill in `filename`.
void raise_os_error(const StatusPageIoError& error) {
  const std::string text = std::string(error.call()) + ": " + error.code().message();
  PyObject* arguments = Py_BuildValue("(iss)", error.code().value(), text.c_str(), error.path().c_str());
  if (arguments != nullptr) {
    PyErr_SetObject(PyExc_OSError, arguments);
    Py_DECREF(arguments);
  }
}

void translate(const std::exception_ptr& exception, void*) {
  try {
    std::rethrow_exception(exception);
  } catch (const StatusPageIoError& error) {
    raise_os_error(error);
  } catch (const StatusPageError& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  }
}

// The name may have been cut in the middle of a character.
nb::object decode(const std::string& text) {
  return nb::steal(PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "replace"));
}

nb::dict to_dict(const StatusSnapshot& copy) {
  nb::dict out;
  out["rank"] = copy.rank;
  out["pid"] = copy.pid;
  out["phase"] = copy.phase;
  out["started_ns"] = copy.started_ns;
  out["step"] = copy.step;
  out["samples"] = copy.samples;
  out["step_ns"] = copy.step_ns;
  out["heartbeat_ns"] = copy.heartbeat_ns;
  out["collective_seq"] = copy.collective_seq;
  out["operation"] = decode(copy.operation);
  out["bytes"] = copy.bytes;
  out["collective_enter_ns"] = copy.collective_enter_ns;
  out["stop_requested_ns"] = copy.stop_requested_ns;
  out["stop_deadline_ns"] = copy.stop_deadline_ns;
  out["collective_phase"] = copy.collective_phase;
  out["waiting_for"] = static_cast<std::int64_t>(copy.waiting_for) - 1;
  out["collective_waits_ns"] = copy.collective_waits_ns;
  out["group_sequence"] = copy.group_sequence;
  out["consistent"] = copy.consistent;
  return out;
}

void set_phase(StatusPage& page, std::uint32_t phase) {
  if (phase > static_cast<std::uint32_t>(Phase::failed)) {
    throw StatusPageError(page.path(), "phase " + std::to_string(phase) + " is not in 0..4");
  }
  page.set_phase(static_cast<Phase>(phase));
}

void set_collective_phase(StatusPage& page, std::uint32_t phase) {
  if (phase > static_cast<std::uint32_t>(CollectivePhase::between_hosts)) {
    throw StatusPageError(page.path(), "collective phase " + std::to_string(phase) + " is not in 0..6");
  }
  page.set_collective_phase(static_cast<CollectivePhase>(phase));
}

std::uint64_t enter_collective(StatusPage& page, std::string_view operation, std::uint64_t bytes,
                               std::uint64_t group_sequence) {
  return page.enter_collective(operation_name(operation), bytes, monotonic_ns(), group_sequence);
}

void set_waiting_for(StatusPage& page, int rank) {
  if (rank < -1) {
    throw StatusPageError(page.path(), "cannot wait for rank " + std::to_string(rank) + " (-1: for none)");
  }
  page.set_waiting_for(rank);
}

}  // namespace

// The GIL is kept throughout: each call takes some ten nanoseconds, and releasing it alone costs more. Kept, it also
// makes the Python threads of a rank the one writer that the page asks for.
void bind_status_page(nb::module_& module) {
  nb::register_exception_translator(translate);

  nb::class_<StatusPage>(module, "StatusPage", "One rank's status page, mapped; see launcher.rank.status.")
      .def_static("create", &StatusPage::create, nb::arg("path"), nb::arg("rank"))
      .def_static(
          "open",
          [](const std::string& path, bool writable) {
            return StatusPage::open(path, writable ? StatusPage::Access::write : StatusPage::Access::read);
          },
          nb::arg("path"), nb::kw_only(), nb::arg("writable") = false)
      .def_prop_ro("path", &StatusPage::path)
      .def_prop_ro("writable", &StatusPage::writable)
      .def_prop_ro("closed", &StatusPage::closed)
      .def_prop_ro("rank", [](const StatusPage& page) { return page.snapshot().rank; })
      .def_prop_ro("pid", [](const StatusPage& page) { return page.snapshot().pid; })
      .def_prop_rw(
          "phase", [](const StatusPage& page) { return page.snapshot().phase; }, &set_phase)
      .def_prop_ro("stop_requested", &StatusPage::stop_requested)
      .def_prop_ro("stop_deadline_ns", [](const StatusPage& page) { return page.snapshot().stop_deadline_ns; })
      .def("attach", &StatusPage::attach)
      .def("step", &StatusPage::step, nb::arg("number"), nb::arg("samples"))
      .def("heartbeat", &StatusPage::heartbeat)
      .def("enter_collective", &enter_collective, nb::arg("operation"), nb::arg("bytes"), nb::arg("group_sequence") = 0)
      .def("leave_collective", nb::overload_cast<>(&StatusPage::leave_collective))
      .def("set_collective_phase", &set_collective_phase, nb::arg("phase"))
      .def("set_waiting_for", &set_waiting_for, nb::arg("rank"))
      .def("add_collective_wait", &StatusPage::add_collective_wait, nb::arg("ns"))
      .def("request_stop", &StatusPage::request_stop, nb::arg("deadline_ns"))
      .def("snapshot", [](const StatusPage& page) { return to_dict(page.snapshot()); })
      .def("close", &StatusPage::close);
}

}  // namespace launcher::python
