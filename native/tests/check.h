// The whole test framework: CHECK goes on after a failure, so that one run shows all of them; a throw ends the test.
#ifndef LAUNCHER_TESTS_CHECK_H
#define LAUNCHER_TESTS_CHECK_H

#include <atomic>
#include <cstdio>
#include <exception>

namespace check {

inline std::atomic<int> failures{0};

inline void that(bool good, const char* expression, const char* file, int line) {
  if (!good) {
    std::fprintf(stderr, "%s:%d: CHECK(%s) failed\n", file, line, expression);
    ++failures;
  }
}

template <typename Test>
void run(const char* name, Test test) {
  const int before = failures;
  try {
    test();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: unexpected exception: %s\n", name, error.what());
    ++failures;
  }
  std::printf("%s %s\n", failures == before ? "pass" : "FAIL", name);
}

}  // namespace check

#define CHECK(expression) ::check::that(static_cast<bool>(expression), #expression, __FILE__, __LINE__)
#define CHECK_THROWS(type, expression, ...)                                  \
  do {                                                                       \
    bool thrown = false;                                                     \
    try {                                                                    \
      static_cast<void>(expression);                                         \
    } catch (const type& error) {                                            \
      thrown = true;                                                         \
      __VA_ARGS__;                                                           \
    }                                                                        \
    ::check::that(thrown, #expression " throws " #type, __FILE__, __LINE__); \
  } while (false)

#endif
