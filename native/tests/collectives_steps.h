// A program of collective calls that all ranks of a group run, made of a seed: every operation, type, size, placement
// of buffers and path in one stream. Each rank knows what all others put in, and compares its result bit for bit.
#ifndef LAUNCHER_TESTS_COLLECTIVES_STEPS_H
#define LAUNCHER_TESTS_COLLECTIVES_STEPS_H

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "kernels.h"
#include "launcher/collectives.h"
#include "seeded_random.h"

namespace steps {

using namespace launcher::collectives;

// Where a rank's buffers lie. `mixed`: one way or the other, by rank, piece and side.
enum class Placement : std::uint8_t { heap, allocated, file, mixed };
enum class Memory : std::uint8_t { heap, allocated, file };

struct Step {
  Operation operation = Operation::barrier;
  DType dtype = DType::float32;
  ReduceOp op = ReduceOp::sum;
  Path path = Path::automatic;
  Placement placement = Placement::heap;
  bool in_place = false;
  int root = 0;
  bool scaled = false;
  // Bytes from a buffer's line to its begin; -1: each buffer has its own, made of the seed.
  int shift = -1;
  Path taken = Path::automatic;  // the path that the call must have gone; automatic: any
  std::uint64_t seed = 0;
  // Of pieces, of ranks, or of pairs of ranks (sender first), as the operation has it.
  std::vector<std::size_t> counts;

  std::string text() const {
    std::string line = std::string(name(operation)) + " dtype " + std::to_string(static_cast<int>(dtype)) + " op " +
                       std::to_string(static_cast<int>(op)) + " path " + std::to_string(static_cast<int>(path)) +
                       " placement " + std::to_string(static_cast<int>(placement)) + " shift " + std::to_string(shift) +
                       " root " + std::to_string(root) + (in_place ? " in place" : "") + (scaled ? " scaled" : "") +
                       " counts";
    for (const std::size_t count : counts) {
      line += ' ';
      line += std::to_string(count);
    }
    return line;
  }
};

struct Plan {
  std::uint64_t seed = 1;
  int size = 2;
  std::size_t steps = 100;
  std::size_t unit = 4096;  // bytes: sizes gather around its multiples
  std::vector<Path> paths = {Path::automatic, Path::small, Path::pipelined, Path::shared, Path::pulled};
};

inline Step make_step(Random& random, const Plan& plan) {
  static constexpr Operation kOperations[] = {Operation::allreduce,  Operation::allreduce, Operation::allreduce,
                                              Operation::allreduce,  Operation::barrier,   Operation::reduce_scatter,
                                              Operation::all_gather, Operation::broadcast, Operation::reduce,
                                              Operation::all_to_all};
  const auto size = static_cast<std::size_t>(plan.size);
  Step step;
  step.operation = random.of(kOperations);
  step.dtype = static_cast<DType>(random.one_in(2) ? random.below(4) : random.below(kDTypes));
  do {
    step.op = static_cast<ReduceOp>(random.one_in(2) ? 0 : random.below(kReduceOps));
  } while (reduce_function(step.dtype, step.op, Isa::plain) == nullptr);
  step.path = plan.paths[random.below(plan.paths.size())];
  step.placement = static_cast<Placement>(random.below(4));
  step.in_place = random.one_in(2);
  step.root = static_cast<int>(random.below(size));
  step.scaled = is_floating(step.dtype) && random.one_in(4);
  step.seed = random.bits();
  const std::size_t unit = plan.unit / size_of(step.dtype);
  const std::size_t wholes[] = {
      0, 1, 2, 3, 17, 300, unit - 1, unit, unit + 1, 2 * unit + 5, 4 * unit - 1, 6 * unit + 3, 9 * unit + 1};
  const std::size_t parts[] = {0, 0, 1, 5, 300, unit / size, unit / size + 1, unit - 1, unit + 1, 3 * unit + 7};
  switch (step.operation) {
    case Operation::barrier:
      break;
    case Operation::allreduce:
      step.counts.resize(random.one_in(3) ? random.below(6) : 1);
      for (std::size_t& count : step.counts) {
        count = step.counts.size() == 1 ? random.of(wholes) : random.of(parts);
      }
      break;
    case Operation::reduce_scatter:
    case Operation::all_gather:
      step.counts.resize(size);
      for (std::size_t& count : step.counts) {
        count = random.of(parts);
      }
      if (random.one_in(2)) {
        std::fill(step.counts.begin(), step.counts.end(), step.counts[0]);
      }
      break;
    case Operation::broadcast:
    case Operation::reduce:
      step.counts = {random.of(wholes)};
      break;
    case Operation::all_to_all:
      step.counts.resize(size * size);
      for (std::size_t& count : step.counts) {
        count = random.of(parts) / 2;
      }
      if (random.one_in(2)) {
        std::fill(step.counts.begin(), step.counts.end(), step.counts[0]);
      }
      break;
  }
  return step;
}

inline std::vector<Step> make_steps(const Plan& plan) {
  Random random(plan.seed);
  std::vector<Step> program(plan.steps);
  for (Step& step : program) {
    step = make_step(random, plan);
  }
  return program;
}

// Each rank's own; powers of two, so that no order of the multiplications shows.
inline double pre_of(const Step& step, int rank) { return step.scaled ? (rank % 2 == 0 ? 0.5 : 2.0) : 1.0; }
inline double post_of(const Step& step) { return step.scaled ? 0.25 : 1.0; }

// What goes into the calls, and must come out.
class Contents {
 public:
  Contents() = default;
  Contents(const Contents&) = delete;
  Contents& operator=(const Contents&) = delete;
  virtual ~Contents() = default;

  // What `rank` puts in. Floating point has exponents near zero, so that sums round but do not overflow.
  virtual std::vector<char> input(const Step& step, int rank, std::size_t part, std::size_t count) const {
    static constexpr std::uint64_t kKeep[] = {0x83ffffff83ffffffU, 0x801fffffffffffffU, 0x87ff87ff87ff87ffU,
                                              0x83ff83ff83ff83ffU};
    static constexpr std::uint64_t kSet[] = {0x3c0000003c000000U, 0x3fc0000000000000U, 0x3000300030003000U,
                                             0x3c003c003c003c00U};
    const auto type = static_cast<std::size_t>(step.dtype);
    std::uint64_t keep = type < 4 ? kKeep[type] : ~std::uint64_t{0};
    const std::uint64_t set = type < 4 ? kSet[type] : 0;
    if (step.dtype == DType::boolean) {
      keep = 0x0101010101010101U;
    }
    std::vector<char> bytes(count * size_of(step.dtype));
    Random random(step.seed + 1000003 * static_cast<std::uint64_t>(rank) + 7919 * part);
    for (std::size_t offset = 0; offset < bytes.size(); offset += 8) {
      const std::uint64_t word = (random.bits() & keep) | set;
      std::memcpy(&bytes[offset], &word, std::min<std::size_t>(8, bytes.size() - offset));
    }
    return bytes;
  }

  // The fold of what all ranks put in, by the plain loops, which have a test of their own.
  virtual std::vector<char> folded(const Step& step, int size, std::size_t part, std::size_t count) const {
    std::vector<std::vector<char>> inputs;
    std::vector<const void*> sources;
    std::vector<double> prescale;
    for (int rank = 0; rank < size; ++rank) {
      inputs.push_back(input(step, rank, part, count));
      sources.push_back(inputs.back().data());
      prescale.push_back(pre_of(step, rank));
    }
    std::vector<char> result(count * size_of(step.dtype));
    void* target = result.data();
    Finish finish;
    finish.scale = post_of(step);
    if (step.op == ReduceOp::average) {
      if (is_floating(step.dtype)) {
        finish.scale /= size;
      } else {
        finish.divisor = static_cast<std::uint64_t>(size);
      }
    }
    reduce_function(step.dtype, step.op, Isa::plain)(&target, 1, sources.data(), sources.size(), count,
                                                     step.scaled ? prescale.data() : nullptr, finish);
    return result;
  }
};

inline const Contents kSeeded;

inline constexpr std::size_t kGuard = 64;  // bytes on each side of a buffer that no call may touch
inline constexpr char kUntouched = 0x5a;

// A buffer of one call, between guards, in one of the rank's memories.
struct Buffer {
  char* data = nullptr;
  std::size_t bytes = 0;

  void fill(const std::vector<char>& content) const { std::copy(content.begin(), content.end(), data); }
  void mark() const { std::fill(data - kGuard, data + bytes + kGuard, kUntouched); }
  bool holds(const char* content) const { return bytes == 0 || std::memcmp(data, content, bytes) == 0; }
  bool guarded() const {
    const auto untouched = [](char byte) { return byte == kUntouched; };
    return std::all_of(data - kGuard, data, untouched) && std::all_of(data + bytes, data + bytes + kGuard, untouched);
  }
};

// One rank's run of a program.
class Runner {
 public:
  // `entered`: in memory that all ranks share, counts entries to barriers. `capacity`: bytes of the largest call, all
  // its buffers together.
  Runner(Group& group, std::atomic<std::uint64_t>& entered, std::size_t capacity, const Contents& contents = kSeeded)
      : group_(group), entered_(entered), contents_(contents), bytes_(capacity), heap_(capacity) {
    base_[0] = heap_.data();
    base_[1] = static_cast<char*>(group.allocate(capacity));
    const int file = memfd_create("collectives_test", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, static_cast<off_t>(capacity)) != 0) {
      throw std::runtime_error("no memory file");
    }
    void* mapped = mmap(nullptr, capacity, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (mapped == MAP_FAILED) {
      throw std::runtime_error("no mapping");
    }
    base_[2] = static_cast<char*>(mapped);
    group.register_memory(mapped, capacity, file);
    close(file);
  }
  Runner(const Runner&) = delete;
  Runner& operator=(const Runner&) = delete;
  ~Runner() {
    group_.unregister_memory(base_[2]);
    munmap(base_[2], bytes_);
    group_.release(base_[1]);
  }

  void run(const std::vector<Step>& program) {
    for (std::size_t number = 0; number < program.size(); ++number) {
      const Step& step = program[number];
      used_ = {};
      buffers_.clear();
      random_ = Random(step.seed + static_cast<std::uint64_t>(group_.rank()));
      const std::uint64_t before = group_.sequence();
      const auto taken = static_cast<std::size_t>(step.taken);
      const std::uint64_t calls = group_.statistics().calls[taken];
      group_.set_path(step.path);
      bool good = one(step);
      good = good && (step.taken == Path::automatic || group_.statistics().calls[taken] == calls + 1);
      good =
          good && std::all_of(buffers_.begin(), buffers_.end(), [](const Buffer& buffer) { return buffer.guarded(); });
      good = good && group_.sequence() == before + 1;
      if (!good) {
        std::fprintf(stderr, "rank %d of %d, step %zu: %s\n", group_.rank(), group_.size(), number,
                     step.text().c_str());
      }
      CHECK(good);
    }
  }

 private:
  // The same place in every rank's memory or another, aligned or not.
  Buffer take(const Step& step, std::size_t count) {
    auto memory = static_cast<std::size_t>(step.placement);
    if (step.placement == Placement::mixed) {
      memory = random_.below(3);
    }
    std::size_t shift = random_.one_in(2) ? 0 : random_.below(64);
    if (step.shift >= 0) {
      shift = static_cast<std::size_t>(step.shift);
    }
    Buffer buffer{base_[memory] + used_[memory] + kGuard + shift, count * size_of(step.dtype)};
    used_[memory] += (buffer.bytes + shift + 2 * kGuard + 63) / 64 * 64;
    if (used_[memory] > bytes_) {
      throw std::logic_error("a step larger than the memories for it");
    }
    buffer.mark();
    buffers_.push_back(buffer);
    return buffer;
  }

  bool one(const Step& step) {
    switch (step.operation) {
      case Operation::barrier:
        return barrier();
      case Operation::allreduce:
        return allreduce(step);
      case Operation::reduce_scatter:
        return reduce_scatter(step);
      case Operation::all_gather:
        return all_gather(step);
      case Operation::broadcast:
        return broadcast(step);
      case Operation::reduce:
        return reduce(step);
      case Operation::all_to_all:
        return all_to_all(step);
    }
    return false;
  }

  bool barrier() {
    const auto size = static_cast<std::uint64_t>(group_.size());
    ++barriers_;
    entered_.fetch_add(1, std::memory_order_relaxed);
    group_.barrier();
    return entered_.load(std::memory_order_relaxed) >= barriers_ * size;
  }

  bool allreduce(const Step& step) {
    std::vector<Piece> pieces;
    std::vector<Buffer> sources;
    std::vector<Buffer> targets;
    std::vector<std::vector<char>> own;
    for (std::size_t part = 0; part < step.counts.size(); ++part) {
      own.push_back(contents_.input(step, group_.rank(), part, step.counts[part]));
      sources.push_back(take(step, step.counts[part]));
      targets.push_back(step.in_place ? sources.back() : take(step, step.counts[part]));
      sources.back().fill(own.back());
      pieces.push_back({sources.back().data, targets.back().data, step.counts[part]});
    }
    group_.allreduce(pieces, step.dtype, step.op, scale(step));
    bool good = true;
    for (std::size_t part = 0; part < pieces.size(); ++part) {
      good = good && targets[part].holds(contents_.folded(step, group_.size(), part, step.counts[part]).data());
      good = good && (step.in_place || sources[part].holds(own[part].data()));
    }
    return good;
  }

  bool reduce_scatter(const Step& step) {
    const std::size_t total = std::accumulate(step.counts.begin(), step.counts.end(), std::size_t{0});
    const std::size_t mine = step.counts[static_cast<std::size_t>(group_.rank())];
    const std::size_t start = first_of(step.counts, group_.rank()) * size_of(step.dtype);
    const std::vector<char> own = contents_.input(step, group_.rank(), 0, total);
    const Buffer source = take(step, total);
    source.fill(own);
    const Buffer target = step.in_place ? Buffer{source.data + start, mine * size_of(step.dtype)} : take(step, mine);
    group_.reduce_scatter(source.data, target.data, step.counts, step.dtype, step.op, scale(step));
    return target.holds(contents_.folded(step, group_.size(), 0, total).data() + start) &&
           (step.in_place || source.holds(own.data()));
  }

  bool all_gather(const Step& step) {
    const std::size_t total = std::accumulate(step.counts.begin(), step.counts.end(), std::size_t{0});
    const std::size_t mine = step.counts[static_cast<std::size_t>(group_.rank())];
    const Buffer target = take(step, total);
    const std::size_t start = first_of(step.counts, group_.rank()) * size_of(step.dtype);
    const Buffer source = step.in_place ? Buffer{target.data + start, mine * size_of(step.dtype)} : take(step, mine);
    source.fill(contents_.input(step, group_.rank(), 0, mine));
    group_.all_gather(source.data, target.data, step.counts, step.dtype);
    std::vector<char> expected;
    for (int rank = 0; rank < group_.size(); ++rank) {
      const std::vector<char> part = contents_.input(step, rank, 0, step.counts[static_cast<std::size_t>(rank)]);
      expected.insert(expected.end(), part.begin(), part.end());
    }
    return target.holds(expected.data());
  }

  bool broadcast(const Step& step) {
    const Buffer buffer = take(step, step.counts[0]);
    const std::vector<char> sent = contents_.input(step, step.root, 0, step.counts[0]);
    if (group_.rank() == step.root) {
      buffer.fill(sent);
    }
    group_.broadcast(buffer.data, step.counts[0], step.dtype, step.root);
    return buffer.holds(sent.data());
  }

  bool reduce(const Step& step) {
    const std::vector<char> own = contents_.input(step, group_.rank(), 0, step.counts[0]);
    const Buffer source = take(step, step.counts[0]);
    const Buffer target = step.in_place ? source : take(step, step.counts[0]);
    source.fill(own);
    group_.reduce(source.data, target.data, step.counts[0], step.dtype, step.op, step.root, scale(step));
    if (group_.rank() == step.root) {
      return target.holds(contents_.folded(step, group_.size(), 0, step.counts[0]).data());
    }
    const std::vector<char> untouched(target.bytes, kUntouched);
    return source.holds(own.data()) && (step.in_place || target.holds(untouched.data()));
  }

  bool all_to_all(const Step& step) {
    const auto size = static_cast<std::size_t>(group_.size());
    const auto mine = static_cast<std::size_t>(group_.rank());
    const std::vector<std::size_t> sent(step.counts.begin() + static_cast<std::ptrdiff_t>(mine * size),
                                        step.counts.begin() + static_cast<std::ptrdiff_t>((mine + 1) * size));
    std::vector<std::size_t> received;
    std::vector<char> own;
    std::vector<char> expected;
    for (std::size_t other = 0; other < size; ++other) {
      received.push_back(step.counts[other * size + mine]);
      const std::vector<char> out = contents_.input(step, group_.rank(), other, sent[other]);
      const std::vector<char> in = contents_.input(step, static_cast<int>(other), mine, received[other]);
      own.insert(own.end(), out.begin(), out.end());
      expected.insert(expected.end(), in.begin(), in.end());
    }
    const Buffer source = take(step, own.size() / size_of(step.dtype));
    const Buffer target = take(step, expected.size() / size_of(step.dtype));
    source.fill(own);
    group_.all_to_all(source.data, target.data, sent, received, step.dtype);
    return target.holds(expected.data()) && source.holds(own.data());
  }

  Scale scale(const Step& step) const { return {pre_of(step, group_.rank()), post_of(step)}; }
  static std::size_t first_of(const std::vector<std::size_t>& counts, int rank) {
    return std::accumulate(counts.begin(), counts.begin() + rank, std::size_t{0});
  }

  Group& group_;
  std::atomic<std::uint64_t>& entered_;
  const Contents& contents_;
  std::size_t bytes_;
  std::vector<char> heap_;
  std::array<char*, 3> base_{};
  std::array<std::size_t, 3> used_{};
  std::vector<Buffer> buffers_;
  Random random_{0};
  std::uint64_t barriers_ = 0;
};

// Bytes that the largest call of `program` takes in one memory.
inline std::size_t capacity_of(const std::vector<Step>& program) {
  std::size_t most = 0;
  for (const Step& step : program) {
    const std::size_t total = std::accumulate(step.counts.begin(), step.counts.end(), std::size_t{0});
    most = std::max(most, 2 * total * size_of(step.dtype) + 2 * (step.counts.size() + 1) * 4 * kGuard);
  }
  return (most + 4095) / 4096 * 4096 + 4096;
}

}  // namespace steps

#endif
