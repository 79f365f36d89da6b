#include "waiting.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace launcher::python {
namespace {

namespace nb = nanobind;

std::atomic<bool> ending{false};

bool on_main_thread() noexcept { return ::syscall(SYS_gettid) == ::getpid(); }

}  // namespace

WithoutGil::~WithoutGil() {
  if (ending.load(std::memory_order_relaxed) && !on_main_thread()) {
    for (;;) {
      ::pause();
    }
  }
  PyEval_RestoreThread(state_);
}

bool Signals::operator()() {
  if (!on_main_thread()) {
    return false;
  }
  nb::gil_scoped_acquire locked;
  if (PyErr_CheckSignals() == 0) {
    return false;
  }
  raised_.emplace();
  return true;
}

void Signals::rethrow() {
  if (raised_) {
    nb::python_error error = *std::move(raised_);
    raised_.reset();
    throw nb::python_error(std::move(error));
  }
}

std::chrono::nanoseconds timeout_of(double seconds) {
  if (!(seconds > 0)) {
    throw std::invalid_argument("timeout_s is " + std::to_string(seconds) + "; expected more than 0 seconds");
  }
  constexpr double longest = 1e9;
  return std::chrono::nanoseconds(static_cast<std::int64_t>(std::min(seconds, longest) * 1e9));
}

void watch_interpreter() {
  nb::module_::import_("atexit").attr("register")(
      nb::cpp_function([] { ending.store(true, std::memory_order_relaxed); }));
}

}  // namespace launcher::python
