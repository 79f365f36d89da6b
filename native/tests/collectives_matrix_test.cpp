// The matrix of collectives_matrix.h with threads as ranks.
#include "collectives_matrix.h"

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "check.h"
#include "collectives_steps.h"
#include "rank_threads.h"

using namespace launcher::collectives;

namespace {

void every_combination() {
  Options options;
  options.timeout = std::chrono::seconds(60);
  options.slot_bytes = matrix::kSlotBytes;
  std::size_t calls = 0;
  for (int ranks = 1; ranks <= matrix::kMostRanks; ++ranks) {
    const std::vector<steps::Step> program = matrix::program(ranks, false);
    const matrix::Table table(ranks, program);
    calls += program.size();
    const std::size_t capacity = steps::capacity_of(program);
    std::atomic<std::uint64_t> entered{0};
    in_threads(ranks, options, [&](Group& group) {
      steps::Runner runner(group, entered, capacity, table);
      group.barrier();  // all have said which memory is theirs
      runner.run(program);
      group.barrier();  // what others read of this rank's memory is not given back before they have
    });
  }
  std::printf("%zu calls\n", calls);
}

}  // namespace

int main() {
  check::run("every_combination", every_combination);
  return check::failures == 0 ? 0 : 1;
}
