// Collectives with a process for each rank, and what the others are told when one of them fails.
#include <dirent.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "collectives_matrix.h"
#include "collectives_steps.h"
#include "long_memory.h"

using namespace launcher::collectives;

namespace {

std::string directory;
constexpr int kKilled = 1000;  // plus the signal: how a rank ended

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr std::size_t kShare = 4;  // of the steps: a sanitizer takes ten times as long for each
#else
constexpr std::size_t kShare = 1;
#endif

// Memory of all ranks, beside the group's own.
struct Board {
  std::atomic<std::uint64_t> entered{0};
  std::atomic<std::uint64_t> told{0};  // ranks that have got their error
};

// A hang ends the rank by SIGALRM, and with it the test.
constexpr unsigned kDeadlineS = 60;

// The job has other numbers for the ranks than the group: messages use the job's.
Options options_for(int rank, int size, const std::string& group = "group") {
  Options options;
  options.directory = directory;
  options.name = group;
  options.rank = rank;
  options.size = size;
  for (int member = 0; member < size; ++member) {
    options.ranks.push_back(10 + member);
  }
  options.host = "node-a";
  options.timeout = std::chrono::seconds(30);
  options.slot_bytes = 4096;
  return options;
}

using Body = std::function<void(int rank, Board& board)>;

// `body` in a process for each rank; how each ended.
std::vector<int> in_processes(int size, const Body& body) {
  void* shared = mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  CHECK(shared != MAP_FAILED);
  Board* board = new (shared) Board;
  std::fflush(nullptr);
  std::vector<pid_t> children;
  for (int rank = 0; rank < size; ++rank) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(kDeadlineS);
      check::failures = 0;
      try {
        body(rank, *board);
      } catch (const std::exception& error) {
        std::fprintf(stderr, "rank %d of %d: unexpected exception: %s\n", rank, size, error.what());
        ++check::failures;
      }
      std::fflush(nullptr);
      std::exit(check::failures == 0 ? 0 : 1);
    }
    children.push_back(child);
  }
  std::vector<int> ends(children.size());
  for (std::size_t left = children.size(); left > 0;) {
    int status = 0;
    const pid_t child = waitpid(-1, &status, WUNTRACED);
    if (WIFSTOPPED(status)) {
      kill(child, SIGCONT);
      continue;
    }
    --left;
    const auto rank = std::find(children.begin(), children.end(), child) - children.begin();
    ends[static_cast<std::size_t>(rank)] = WIFEXITED(status) ? WEXITSTATUS(status) : kKilled + WTERMSIG(status);
  }
  munmap(shared, sizeof(Board));
  return ends;
}

void expect_all_good(int size, const Body& body) {
  for (const int end : in_processes(size, body)) {
    CHECK(end == 0);
  }
}

void wait_until_told(const Board& board, std::uint64_t ranks) {
  while (board.told.load() < ranks) {
    std::this_thread::yield();
  }
}

std::vector<float> ones(std::size_t count) { return std::vector<float>(count, 1.0F); }

void sum(Group& group, std::vector<float>& values) {
  const Piece piece{values.data(), values.data(), values.size()};
  group.allreduce({&piece, 1}, DType::float32, ReduceOp::sum);
}

// Calls until the group fails, and checks what is told.
template <typename Call>
void expect_failure(Failure failure, int culprit, Call call) {
  try {
    call();
    CHECK(!"the call should have failed");
  } catch (const GroupError& error) {
    const bool good = error.failure() == failure && (culprit < 0 || error.rank() == culprit) &&
                      std::string(error.what()).size() > 10 && !error.operation().empty() && error.sequence() != 0;
    if (!good) {
      std::fprintf(stderr, "failure %d rank %d operation %s number %llu: %s\n", static_cast<int>(error.failure()),
                   error.rank(), error.operation().c_str(), static_cast<unsigned long long>(error.sequence()),
                   error.what());
    }
    CHECK(good);
    CHECK(error.rank() != culprit || error.host() == "node-a");
  }
}

void expect_unusable(Group& group) {
  std::vector<float> values = ones(3);
  CHECK_THROWS(GroupError, sum(group, values));
  CHECK_THROWS(GroupError, group.barrier());
}

// ---- what is right

void programs() {
  for (const int size : {1, 2, 3, 6}) {
    steps::Plan plan;
    plan.seed = 500 + static_cast<std::uint64_t>(size);
    plan.size = size;
    plan.steps = (size <= 3 ? 400 : 100) / kShare;
    const std::vector<steps::Step> calls = steps::make_steps(plan);
    expect_all_good(size, [&](int rank, Board& board) {
      const std::unique_ptr<Group> group = Group::join(options_for(rank, size));
      steps::Runner runner(*group, board.entered, steps::capacity_of(calls));
      runner.run(calls);
      group->barrier();
    });
  }
}

// Reading a peer's memory is a path that only processes have.
void every_combination_pulled() {
  std::size_t calls = 0;
  for (int size = 1; size <= matrix::kMostRanks; ++size) {
    const std::vector<steps::Step> program = matrix::program(size, true);
    calls += program.size();
    const matrix::Table table(size, program);
    expect_all_good(size, [&](int rank, Board& board) {
      Options options = options_for(rank, size);
      options.slot_bytes = matrix::kSlotBytes;
      const std::unique_ptr<Group> group = Group::join(options);
      if (size > 1 && !group->statistics().can_pull) {
        std::printf("skip every_combination_pulled, rank %d of %d: the kernel refuses process_vm_readv\n", rank, size);
        return;
      }
      steps::Runner runner(*group, board.entered, steps::capacity_of(program), table);
      runner.run(program);
      group->barrier();
    });
  }
  std::printf("%zu calls\n", calls);
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
void more_than_two_gigabytes_pulled() {
  expect_all_good(2, [](int rank, Board&) {
    Options options = options_for(rank, 2);
    options.slot_bytes = 0;
    const std::unique_ptr<Group> group = Group::join(options);
    if (!group->statistics().can_pull) {
      std::printf("skip more_than_two_gigabytes_pulled, rank %d: the kernel refuses process_vm_readv\n", rank);
      return;
    }
    const LongMemory source;
    const LongMemory target;
    group->set_path(Path::pulled);
    expect_long_sum<float>(*group, DType::float32, source, target);
    CHECK(group->statistics().calls[static_cast<std::size_t>(Path::pulled)] == 1);
    group->barrier();
  });
}
#endif

// Two groups of the same ranks in the other order, and one of some of them; used in turns.
void several_groups() {
  expect_all_good(3, [](int rank, Board&) {
    const std::unique_ptr<Group> all = Group::join(options_for(rank, 3, "all"));
    const std::unique_ptr<Group> turned = Group::join(options_for(2 - rank, 3, "turned"));
    std::unique_ptr<Group> some;
    if (rank != 1) {
      some = Group::join(options_for(rank / 2, 2, "some"));
    }
    for (int round = 0; round < 20; ++round) {
      std::vector<float> values = ones(1000);
      sum(*all, values);
      sum(*turned, values);
      CHECK(values[0] == 9.0F && values[999] == 9.0F);
      if (some) {
        sum(*some, values);
        CHECK(values[500] == 18.0F);
      }
    }
    int from = rank == 0 ? 5 : 0;
    turned->broadcast(&from, 1, DType::int32, 2);
    CHECK(from == 5);
  });
}

std::size_t entries(const char* path) {
  DIR* folder = opendir(path);
  CHECK(folder != nullptr);
  std::size_t count = 0;
  while (readdir(folder) != nullptr) {
    ++count;
  }
  closedir(folder);
  return count;
}

void nothing_is_left_behind() {
  const std::size_t files = entries(directory.c_str());
  expect_all_good(2, [](int rank, Board&) {
    std::size_t descriptors = 0;
    for (int round = 0; round < 10; ++round) {
      const std::unique_ptr<Group> group = Group::join(options_for(rank, 2));
      void* memory = group->allocate(100000);
      const int value = rank;
      int values[2] = {};
      const std::size_t counts[] = {1, 1};
      group->all_gather(&value, values, counts, DType::int32);
      CHECK(values[0] == 0 && values[1] == 1);
      group->barrier();
      group->release(memory);
      group->close();
      group->close();
      if (round == 0) {
        descriptors = entries("/proc/self/fd");
      }
    }
    CHECK(entries("/proc/self/fd") <= descriptors);
  });
  CHECK(entries(directory.c_str()) == files);
}

// A rank that is stopped for a while is waited for.
void stopped_and_continued() {
  expect_all_good(2, [](int rank, Board&) {
    const std::unique_ptr<Group> group = Group::join(options_for(rank, 2));
    for (int round = 0; round < 4; ++round) {
      if (rank == 1) {
        raise(SIGSTOP);
      }
      std::vector<float> values = ones(20000);
      sum(*group, values);
      CHECK(values.front() == 2.0F && values.back() == 2.0F);
    }
  });
}

void wrong_arguments() {
  expect_all_good(2, [](int rank, Board&) {
    const std::unique_ptr<Group> group = Group::join(options_for(rank, 2));
    std::vector<float> values = ones(8);
    const Piece piece{values.data(), values.data(), values.size()};
    const std::size_t three[] = {1, 1, 1};
    using Wrong = std::invalid_argument;
    CHECK_THROWS(Wrong, group->allreduce({&piece, 1}, DType::float32, ReduceOp::bit_and));
    CHECK_THROWS(Wrong, group->allreduce({&piece, 1}, DType::boolean, ReduceOp::average));
    CHECK_THROWS(Wrong, group->allreduce({&piece, 1}, DType::int32, ReduceOp::sum, {2.0, 1.0}));
    CHECK_THROWS(Wrong, group->allreduce({&piece, 1}, DType::int32, ReduceOp::sum, {1.0, 0.5}));
    CHECK_THROWS(Wrong, group->broadcast(values.data(), 8, DType::float32, 2));
    CHECK_THROWS(Wrong, group->broadcast(values.data(), 8, DType::float32, -1));
    CHECK_THROWS(Wrong, group->reduce(values.data(), values.data(), 8, DType::float32, ReduceOp::sum, 7));
    CHECK_THROWS(Wrong, group->all_gather(values.data(), values.data(), three, DType::float32));
    CHECK_THROWS(Wrong, group->reduce_scatter(values.data(), values.data(), three, DType::float32, ReduceOp::sum));
    CHECK_THROWS(Wrong, group->all_to_all(values.data(), values.data() + 4, three, three, DType::float32));
    sum(*group, values);  // none of it has touched the group
    CHECK(values[7] == 2.0F);
  });
}

// ---- what goes wrong

// Rank 1 makes another call than ranks 0 and 2.
void mismatches() {
  const std::function<void(Group&, bool)> calls[] = {
      [](Group& group, bool other) {
        std::vector<float> values = ones(100);
        other ? group.barrier() : sum(group, values);
      },
      [](Group& group, bool other) {
        std::vector<float> values = ones(other ? 101 : 100);
        sum(group, values);
      },
      [](Group& group, bool other) {
        std::vector<float> values = ones(100000);
        const Piece piece{values.data(), values.data(), values.size()};
        group.allreduce({&piece, 1}, other ? DType::int32 : DType::float32, ReduceOp::sum);
      },
      [](Group& group, bool other) {
        std::vector<float> values = ones(100);
        const Piece piece{values.data(), values.data(), values.size()};
        group.allreduce({&piece, 1}, DType::float32, other ? ReduceOp::maximum : ReduceOp::sum);
      },
      [](Group& group, bool other) {
        std::vector<float> values = ones(100);
        group.broadcast(values.data(), values.size(), DType::float32, other ? 2 : 0);
      },
      [](Group& group, bool other) {
        std::vector<float> values = ones(100);
        std::vector<float> all(300);
        const std::size_t counts[] = {other ? 99U : 100U, 100U, 100U};
        group.all_gather(values.data(), all.data(), counts, DType::float32);
      },
      [](Group& group, bool other) {
        // What rank 1 sends to 2 is not what 2 takes.
        const std::size_t counts[] = {10, 10, 10};
        const std::size_t sent[] = {10, 10, 11};
        std::vector<float> values = ones(31);
        std::vector<float> received(31);
        group.all_to_all(values.data(), received.data(), other ? sent : counts, counts, DType::float32);
      },
  };
  for (const auto& call : calls) {
    expect_all_good(3, [&](int rank, Board& board) {
      const std::unique_ptr<Group> group = Group::join(options_for(rank, 3));
      std::vector<float> values = ones(100);
      sum(*group, values);
      // In all_to_all, not everyone is concerned; in others a rank may be through before it could know.
      expect_failure(Failure::mismatch, -1, [&] {
        call(*group, rank == 1);
        group->barrier();
      });
      expect_unusable(*group);
      ++board.told;
      wait_until_told(board, 3);  // a rank that leaves is another failure
    });
  }
}

void leaves() {
  expect_all_good(3, [](int rank, Board& board) {
    const std::unique_ptr<Group> group = Group::join(options_for(rank, 3));
    std::vector<float> values = ones(5000);
    sum(*group, values);
    if (rank == 1) {
      group->close();
      CHECK_THROWS(GroupError, group->barrier());
      wait_until_told(board, 2);
      return;
    }
    expect_failure(Failure::left, 11, [&] { sum(*group, values); });
    expect_unusable(*group);
    ++board.told;
  });
}

// Rank 1 dies somewhere in a stream of calls: between two of them (round 0), or at a random point of one.
void killed() {
  Random random(9);
  const std::size_t sizes[] = {1, 900, 5000, 200000};
  const Path paths[] = {Path::automatic, Path::pipelined, Path::shared, Path::pulled};
  for (std::size_t round = 0; round < 16 / kShare + 4; ++round) {
    const std::size_t count = random.of(sizes);
    const Path path = random.of(paths);
    const std::size_t spins = random.below(300000);
    const std::vector<int> ends = in_processes(3, [&](int rank, Board&) {
      const std::unique_ptr<Group> group = Group::join(options_for(rank, 3));
      group->set_path(path);
      auto* values = static_cast<float*>(group->allocate(count * sizeof(float)));
      const Piece piece{values, values, count};
      std::atomic<bool> go{false};
      std::thread killer;
      if (rank == 1 && round != 0) {
        killer = std::thread([&] {
          go.wait(false);
          for (std::size_t spin = 0; spin < spins; ++spin) {
            static_cast<void>(go.load());
          }
          raise(SIGKILL);
        });
      }
      expect_failure(Failure::lost, 11, [&] {
        for (std::size_t call = 0;; ++call) {
          group->allreduce({&piece, 1}, DType::float32, ReduceOp::maximum);
          if (rank == 1 && call == 20) {
            go = true;
            go.notify_one();
            if (round == 0) {
              raise(SIGKILL);
            }
          }
        }
      });
      expect_unusable(*group);
      if (killer.joinable()) {
        killer.join();
      }
    });
    CHECK(ends[0] == 0 && ends[1] == kKilled + SIGKILL && ends[2] == 0);
  }
}

void aborted() {
  expect_all_good(3, [](int rank, Board& board) {
    const std::unique_ptr<Group> group = Group::join(options_for(rank, 3));
    std::vector<float> values = ones(5000);
    sum(*group, values);
    if (rank == 1) {
      group->abort("its disk is full");
      expect_unusable(*group);
      wait_until_told(board, 2);
      return;
    }
    try {
      sum(*group, values);
      CHECK(!"the call should have failed");
    } catch (const GroupError& error) {
      CHECK(error.rank() == 11 && error.host() == "node-a" && error.operation() == "allreduce");
      CHECK(error.sequence() == 2);
      CHECK(std::string(error.what()).find("its disk is full") != std::string::npos);
    }
    expect_unusable(*group);
    ++board.told;
  });
}

void interrupted() {
  expect_all_good(2, [](int rank, Board& board) {
    Options options = options_for(rank, 2);
    int asked = 0;
    if (rank == 0) {
      options.interrupted = [&asked, &board] { return board.entered != 0 && ++asked == 3; };
    }
    const std::unique_ptr<Group> group = Group::join(options);
    if (rank == 1) {
      wait_until_told(board, 1);
      CHECK_THROWS(GroupError, group->barrier());
      return;
    }
    board.entered = 1;
    expect_failure(Failure::interrupted, -1, [&] { group->barrier(); });
    CHECK(asked == 3);
    expect_unusable(*group);
    ++board.told;
  });
}

void late() {
  for (const std::size_t count : {100U, 50000U}) {
    expect_all_good(3, [&](int rank, Board& board) {
      const std::unique_ptr<Group> group = Group::join(options_for(rank, 3));
      std::vector<float> values = ones(count);
      sum(*group, values);
      group->set_timeout(std::chrono::milliseconds(200));
      if (rank == 1) {
        wait_until_told(board, 2);
        CHECK_THROWS(GroupError, sum(*group, values));
        return;
      }
      expect_failure(Failure::timeout, 11, [&] { sum(*group, values); });
      expect_unusable(*group);
      ++board.told;
    });
  }
}

void never_joins() {
  const std::vector<int> ends = in_processes(3, [](int rank, Board&) {
    if (rank == 1) {
      return;
    }
    Options options = options_for(rank, 3, "never");
    options.timeout = std::chrono::milliseconds(300);
    try {
      Group::join(options);
      CHECK(!"the join should have failed");
    } catch (const GroupError& error) {
      CHECK(error.failure() == Failure::timeout);
      // Who makes the group knows who is missing; another rank may know only of the one that it waits for.
      CHECK(rank != 0 || error.rank() == 11);
    }
  });
  CHECK(ends == std::vector<int>(3, 0));
}

}  // namespace

int main(int argc, char** argv) {
  std::string folder = std::string(argc > 1 ? argv[1] : "/tmp") + "/collectives.XXXXXX";
  if (mkdtemp(folder.data()) == nullptr) {
    std::perror("mkdtemp");
    return 1;
  }
  directory = folder;
  check::run("programs", programs);
  check::run("every_combination_pulled", every_combination_pulled);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  check::run("more_than_two_gigabytes_pulled", more_than_two_gigabytes_pulled);
#endif
  check::run("several_groups", several_groups);
  check::run("nothing_is_left_behind", nothing_is_left_behind);
  check::run("stopped_and_continued", stopped_and_continued);
  check::run("wrong_arguments", wrong_arguments);
  check::run("mismatches", mismatches);
  check::run("leaves", leaves);
  check::run("killed", killed);
  check::run("aborted", aborted);
  check::run("interrupted", interrupted);
  check::run("late", late);
  check::run("never_joins", never_joins);
  rmdir(folder.c_str());
  return check::failures == 0 ? 0 : 1;
}
