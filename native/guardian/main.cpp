// Usage: _guardian COMMAND_FD EVENT_FD SUPERVISOR_PID. Started by the supervisor only; see guardian.h.
#include <array>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <exception>

#include "guardian.h"

int main(int argc, char** argv) {
  std::array<int, 3> numbers{};
  bool usable = argc == 4;
  for (std::size_t i = 0; usable && i < numbers.size(); ++i) {
    const char* text = argv[i + 1];
    usable = std::from_chars(text, text + std::strlen(text), numbers[i]).ec == std::errc{};
  }
  if (!usable) {
    std::fprintf(stderr,
                 "usage: _guardian COMMAND_FD EVENT_FD SUPERVISOR_PID (internal: started by `python -m launcher`)\n");
    return 64;
  }
  try {
    // Never destroyed: run() ends the process.
    auto* guardian = new launcher::guardian::Guardian(numbers[0], numbers[1], numbers[2]);
    guardian->run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "[launcher] guardian: %s\n", error.what());
    return 70;
  }
}
