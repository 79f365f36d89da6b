// Native calls that wait: without the GIL, and with what a signal handler in Python raises meanwhile.
#ifndef LAUNCHER_PYTHON_WAITING_H
#define LAUNCHER_PYTHON_WAITING_H

#include <nanobind/nanobind.h>

#include <chrono>
#include <optional>

namespace launcher::python {

// Holds no GIL while it lives. When the interpreter is about to be taken down, a thread other than the main one sleeps
// for ever in place of fetching the GIL: it would be ended by an unwinding that C++ frames turn into std::terminate.
class WithoutGil {
 public:
  WithoutGil() noexcept : state_(PyEval_SaveThread()) {}
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;
  ~WithoutGil();

 private:
  PyThreadState* state_;
};

// What a signal handler in Python raised while a call was waiting.
class Signals {
 public:
  // Called without the GIL, on the thread that waits; true: something was raised. Python runs signal handlers on the
  // main thread only, so no other thread need fetch the GIL for it.
  bool operator()();
  void rethrow();  // what was raised, if anything was

 private:
  std::optional<nanobind::python_error> raised_;
};

// Throws std::invalid_argument unless `seconds` is above 0. What is more than some thirty years is cut.
std::chrono::nanoseconds timeout_of(double seconds);

void watch_interpreter();  // once, when the module is made

}  // namespace launcher::python

#endif
