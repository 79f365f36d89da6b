#include <sys/prctl.h>

#include <cerrno>

#include "module.h"

namespace launcher::python {
namespace {

void set_attribute(int option, unsigned long value) {
  if (::prctl(option, value, 0UL, 0UL, 0UL) != 0) {
    PyErr_SetFromErrno(PyExc_OSError);
    throw nb::python_error();
  }
}

}  // namespace

void bind_process(nb::module_& module) {
  module.def(
      "set_child_subreaper", [](bool enable) { set_attribute(PR_SET_CHILD_SUBREAPER, enable ? 1UL : 0UL); },
      nb::arg("enable"),
      "Orphaned descendants become children of this process, which must then reap them. Not inherited.");
  module.def(
      "set_parent_death_signal",
      [](int signal) {
        // A negative number would become a huge unsigned one; the kernel refuses that with EINVAL as well.
        set_attribute(PR_SET_PDEATHSIG, static_cast<unsigned long>(signal));
      },
      nb::arg("signal"),
      "Signal this process gets when the thread that started it ends; 0: none. Cleared in children and by a set-id "
      "exec. The parent may already be gone: compare os.getppid() afterwards.");
}

}  // namespace launcher::python
