// Messages of more than 2 GiB between two ranks, which are threads.
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <limits>
#include <string>

#include "check.h"
#include "long_memory.h"
#include "rank_threads.h"

using namespace launcher::collectives;

namespace {

Options large_options() {
  Options options;
  options.timeout = std::chrono::seconds(60);
  return options;
}

void private_memory() {
  in_threads(2, large_options(), [&](Group& group) {
    const LongMemory source;
    const LongMemory target;
    group.set_path(Path::pipelined);
    expect_long_sum<std::uint8_t>(group, DType::uint8, source, target);
    CHECK(group.statistics().calls[static_cast<std::size_t>(Path::pipelined)] == 1);
    group.set_path(Path::automatic);
    // Rank 1 gives only what lies behind 2 GiB.
    const auto own = static_cast<std::uint8_t>(3 + group.rank());
    source.fill<std::uint8_t>(own, own);
    const std::size_t counts[] = {kLongBytes, kLongTail};
    group.all_gather(source.data(), target.data(), counts, DType::uint8);
    CHECK((target.holds<std::uint8_t>(3, 4)));
    if (group.rank() == 0) {
      target.fill<std::uint8_t>(0, 0);
    }
    group.broadcast(target.data(), kLongMessage, DType::uint8, 1);
    CHECK((target.holds<std::uint8_t>(3, 4)));
    group.barrier();
  });
}

// What this machine, or the container that this runs in, can still give.
std::size_t free_memory() {
  std::size_t bytes = 0;
  std::ifstream machine("/proc/meminfo");
  for (std::string line; std::getline(machine, line);) {
    if (line.starts_with("MemAvailable:")) {
      bytes = std::stoull(line.substr(13)) << 10;
    }
  }
  const auto number_in = [](const char* path) {
    std::size_t number = 0;
    return std::ifstream(path) >> number ? number : std::numeric_limits<std::size_t>::max();
  };
  const std::size_t limit = number_in("/sys/fs/cgroup/memory.max");
  if (limit != std::numeric_limits<std::size_t>::max()) {
    bytes = std::min(bytes, limit - std::min(limit, number_in("/sys/fs/cgroup/memory.current")));
  }
  return bytes;
}

// Registered memory is a file as long as the message: here it takes as much memory as it has bytes.
void registered() {
  constexpr std::size_t kNeeded = 2 * kLongMessage + (std::size_t{1} << 30);
  if (const std::size_t there = free_memory(); there < kNeeded) {
    std::printf("skip registered: %zu MiB of memory are free, it takes %zu\n", there >> 20, kNeeded >> 20);
    return;
  }
  in_threads(2, large_options(), [&](Group& group) {
    auto* const data = static_cast<std::uint8_t*>(group.allocate(kLongMessage));
    group.barrier();
    group.set_path(Path::shared);
    // Ends of the message, of each rank's share of it, and of what 31 bits count; all else is zero.
    const std::size_t places[] = {0,
                                  kLongMessage / 2 - 100,
                                  kLongMessage / 2 + 100,
                                  (std::size_t{1} << 31) - 1,
                                  std::size_t{1} << 31,
                                  kLongMessage - 1};
    std::uint8_t value = 1;
    for (const std::size_t place : places) {
      data[place] = static_cast<std::uint8_t>(value++ + 50 * group.rank());
    }
    const Piece piece{data, data, kLongMessage};
    group.allreduce({&piece, 1}, DType::uint8, ReduceOp::sum);
    CHECK(group.statistics().calls[static_cast<std::size_t>(Path::shared)] == 1);
    value = 1;
    for (const std::size_t place : places) {
      CHECK(data[place] == 2 * value + 50);
      CHECK(place == 0 || place == std::size_t{1} << 31 || data[place - 1] == 0);
      ++value;
    }
    group.barrier();
    group.release(data);
  });
}

}  // namespace

int main() {
  check::run("private_memory", private_memory);
  check::run("registered", registered);
  return check::failures == 0 ? 0 : 1;
}
