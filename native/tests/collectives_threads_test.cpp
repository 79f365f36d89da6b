// Collectives with a thread for each rank: what ThreadSanitizer can see. Programs of calls, and messages of more than
// 2 GiB.
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "collectives_steps.h"

using namespace launcher::collectives;

namespace {

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kShare = 4;  // of the steps: a sanitizer takes ten times as long for each
#else
constexpr std::size_t kShare = 1;
#endif

// `work` of each rank in a thread of its own; what one throws is a failure of the test.
template <typename Work>
void in_threads(int size, const Options& options, Work work) {
  std::vector<std::unique_ptr<Group>> groups = Group::join_threads(size, options);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      Group& group = *groups[static_cast<std::size_t>(rank)];
      CHECK(group.rank() == rank && group.size() == size);
      try {
        work(group);
      } catch (const std::exception& error) {
        std::fprintf(stderr, "rank %d of %d: %s\n", rank, size, error.what());
        CHECK(!"a rank threw");
        group.abort(error.what());
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
}

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

#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
// `bytes` of address space: the same `period` again and again, then `tail` of its own. A message longer than memory, of
// which the end shows that it was reached.
class Long {
 public:
  Long(std::size_t bytes, std::size_t period, std::size_t tail) : bytes_(bytes + tail) {
    const int file = memfd_create("collectives_test", MFD_CLOEXEC);
    CHECK(file >= 0 && ftruncate(file, static_cast<off_t>(period + tail)) == 0);
    data_ = static_cast<char*>(mmap(nullptr, bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (std::size_t offset = 0; offset < bytes; offset += period) {
      map(file, offset, std::min(period, bytes - offset), 0);
    }
    map(file, bytes, tail, period);
    close(file);
  }
  Long(const Long&) = delete;
  Long& operator=(const Long&) = delete;
  ~Long() { munmap(data_, bytes_); }
  char* data() const { return data_; }

 private:
  void map(int file, std::size_t offset, std::size_t bytes, std::size_t from) {
    CHECK(mmap(data_ + offset, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, static_cast<off_t>(from)) ==
          data_ + offset);
  }
  std::size_t bytes_;
  char* data_;
};

void more_than_two_gigabytes() {
  constexpr std::size_t kPeriod = std::size_t{32} << 20;
  constexpr std::size_t kBytes = (std::size_t{2} << 30) + kPeriod;
  constexpr std::size_t kTail = std::size_t{1} << 20;
  Options options;
  options.timeout = std::chrono::seconds(60);
  in_threads(2, options, [&](Group& group) {
    const Long source(kBytes, kPeriod, kTail);
    const Long target(kBytes, kPeriod, kTail);
    const char own = static_cast<char>(3 + group.rank());
    const auto holds = [&](std::size_t start, std::size_t bytes, char value) {
      return std::all_of(target.data() + start, target.data() + start + bytes,
                         [value](char byte) { return byte == value; });
    };
    std::memset(source.data(), own, kPeriod);
    std::memset(source.data() + kBytes, own, kTail);
    for (const Path path : {Path::pipelined, Path::pulled}) {
      group.set_path(path);
      std::memset(target.data(), 0, kPeriod);
      std::memset(target.data() + kBytes, 0, kTail);
      const Piece piece{source.data(), target.data(), kBytes + kTail};
      group.allreduce({&piece, 1}, DType::int8, ReduceOp::sum);
      CHECK(holds(0, kPeriod, 7) && holds(kBytes, kTail, 7));
    }
    group.set_path(Path::automatic);
    // Rank 1 gives only what lies behind 2 GiB.
    const std::size_t counts[] = {kBytes, kTail};
    group.all_gather(source.data(), target.data(), counts, DType::int8);
    CHECK(holds(0, kPeriod, 3) && holds(kBytes, kTail, 4));
    if (group.rank() == 0) {
      std::memset(target.data(), 0, kPeriod);
      std::memset(target.data() + kBytes, 0, kTail);
    }
    group.broadcast(target.data(), kBytes + kTail, DType::int8, 1);
    CHECK(holds(0, kPeriod, 3) && holds(kBytes, kTail, 4));
    group.barrier();
  });
}
#endif

}  // namespace

int main() {
  check::run("small_slots", small_slots);
  check::run("default_slots", default_slots);
  check::run("one_path", one_path);
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
  check::run("more_than_two_gigabytes", more_than_two_gigabytes);
#endif
  return check::failures == 0 ? 0 : 1;
}
