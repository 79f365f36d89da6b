// Collectives with a thread for each rank: what ThreadSanitizer can see. Calls in any order, one after the other.
#include <atomic>
#include <cstdint>
#include <vector>

#include "check.h"
#include "collectives_steps.h"
#include "rank_threads.h"

using namespace launcher::collectives;

namespace {

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kShare = 4;  // of the steps: a sanitizer takes ten times as long for each
#else
constexpr std::size_t kShare = 1;
#endif

void program(const steps::Plan& plan, std::size_t slot_bytes) {
  Options options;
  options.timeout = std::chrono::seconds(60);
  options.slot_bytes = slot_bytes;
  const std::vector<steps::Step> calls = steps::make_steps(plan);
  std::atomic<std::uint64_t> entered{0};
  in_threads(plan.size, options, [&](Group& group) {
    steps::Runner runner(group, entered, steps::capacity_of(calls));
    runner.run(calls);
    group.barrier();  // what others read of this rank's memory is not given back before they have
  });
}

void small_slots() {
  for (const int size : {1, 2, 3, 4, 5, 8}) {
    steps::Plan plan;
    plan.seed = 100 + static_cast<std::uint64_t>(size);
    plan.size = size;
    plan.steps = (size <= 4 ? 400 : 150) / kShare;
    plan.unit = 4096;
    program(plan, 4096);
  }
}

// Slots as large as they are made by default, and messages around them.
void default_slots() {
  for (const int size : {2, 3}) {
    steps::Plan plan;
    plan.seed = 200 + static_cast<std::uint64_t>(size);
    plan.size = size;
    plan.steps = 60 / kShare;
    plan.unit = 65536;
    program(plan, 0);
  }
}

// One path all along: a slot is used again as soon as it may be.
void one_path() {
  for (const Path path : {Path::automatic, Path::small, Path::pipelined, Path::shared, Path::pulled}) {
    steps::Plan plan;
    plan.seed = 300 + static_cast<std::uint64_t>(path);
    plan.size = 3;
    plan.steps = 200 / kShare;
    plan.unit = 4096;
    plan.paths = {path};
    program(plan, 4096);
  }
}

}  // namespace

int main() {
  check::run("small_slots", small_slots);
  check::run("default_slots", default_slots);
  check::run("one_path", one_path);
  return check::failures == 0 ? 0 : 1;
}
