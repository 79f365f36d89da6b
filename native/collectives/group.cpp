#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <thread>

#include "local_group.h"
#include "meeting.h"

namespace launcher::collectives {
namespace {

constexpr std::size_t kSlotBytes = 256 << 10;

void check_options(const Options& options) {
  if (options.size < 1 || options.size > kMaxRanks) {
    throw std::invalid_argument("group size is " + std::to_string(options.size) + "; expected 1 to " +
                                std::to_string(kMaxRanks) + " ranks on a host");
  }
  check_root(options.rank, options.size);
  if (!options.ranks.empty() && options.ranks.size() != static_cast<std::size_t>(options.size)) {
    throw std::invalid_argument("ranks: " + std::to_string(options.ranks.size()) + " numbers for " +
                                std::to_string(options.size) + " ranks");
  }
}

std::size_t slot_bytes_of(const Options& options) {
  const auto size = static_cast<std::size_t>(options.size);
  const std::size_t least = size * kUnit;  // reduce_scatter and all_to_all: a line for each rank
  const std::size_t wanted = std::max(options.slot_bytes == 0 ? kSlotBytes : options.slot_bytes, least);
  return (wanted + kUnit - 1) / kUnit * kUnit;
}

}  // namespace

// Results that are returned lie in lines that their reader owns: with two ranks, each line then moves twice in place of
// four times. With more ranks a result is written once for each, and what is best depends on the machine.
std::vector<Choice> choices(int size, std::size_t slot_bytes, bool can_pull) {
  std::vector<Choice> out;
  const auto add = [&](Way way, std::size_t block) {
    block = std::min(block, slot_bytes);
    const bool known = std::any_of(out.begin(), out.end(),
                                   [&](const Choice& other) { return other.way == way && other.block == block; });
    if (!known) {
      out.push_back({way, block});
    }
  };
  add(Way::returned, 128 << 10);
  add(Way::returned, size <= 3 ? 64 << 10 : 256 << 10);
  if (size > 2) {
    add(Way::published, 128 << 10);
  }
  if (size <= 3) {
    add(Way::one_shot, 64 << 10);
  } else {
    add(Way::published, 256 << 10);
  }
  if (can_pull) {
    add(Way::pulled, kPullBytes);
  }
  return out;
}

void check_root(int root, int size) {
  if (root < 0 || root >= size) {
    throw std::invalid_argument("root is " + std::to_string(root) + "; expected a rank of the group, 0 to " +
                                std::to_string(size - 1));
  }
}

Fold fold_of(DType dtype, ReduceOp op, Scale scale, int size) {
  Fold out;
  out.function = reduce_function(dtype, op, isa());
  if (out.function == nullptr) {
    throw std::invalid_argument(
        "this operation is not defined for this type of element (bit operations take integers, "
        "average takes numbers)");
  }
  if (!is_floating(dtype) && (scale.pre != 1.0 || scale.post != 1.0)) {
    throw std::invalid_argument("integers and bool take no scale; scale after converting to floating point");
  }
  out.finish.scale = scale.post;
  if (op == ReduceOp::average) {
    if (is_floating(dtype)) {
      out.finish.scale = scale.post / size;
    } else {
      out.finish.divisor = static_cast<std::uint64_t>(size);
    }
  }
  return out;
}
// The kernel may refuse (seccomp, Yama) or not have process_vm_readv: all ranks must be able to.
bool LocalGroup::find_out_about_pulling(bool in_process) {
  static const std::uint64_t probe = kSegmentMagic;
  Segment& segment = member_.segment();
  segment.place(rank()).probe_address.store(reinterpret_cast<std::uintptr_t>(&probe), std::memory_order_relaxed);
  member_.meet_again();
  bool works = !in_process && size() > 1;
  for (int other = 0; works && other < size(); ++other) {
    if (other == rank()) {
      continue;
    }
    std::uint64_t seen = 0;
    const iovec local{&seen, sizeof seen};
    const iovec remote{reinterpret_cast<void*>(segment.place(other).probe_address.load()), sizeof seen};
    works = ::process_vm_readv(member_.process(other).pid(), &local, 1, &remote, 1, 0) == sizeof seen && seen == probe;
  }
  segment.place(rank()).can_pull.store(works ? 1 : 0, std::memory_order_relaxed);
  member_.meet_again();
  for (int other = 0; other < size(); ++other) {
    works = works && segment.place(other).can_pull.load(std::memory_order_relaxed) != 0;
  }
  return works;
}

void LocalGroup::measure_ping() {
  constexpr int kRounds = 16;
  for (int round = 0; round < kRounds; ++round) {
    const std::uint64_t from = monotonic_ns();
    member_.meet_again();
    const auto ns = static_cast<double>(monotonic_ns() - from);
    ping_ns_ = round == 0 ? ns : std::min(ping_ns_, ns);
  }
}

Call LocalGroup::describe(Operation operation, DType dtype, std::size_t count) const noexcept {
  Call call;
  call.operation = static_cast<std::uint8_t>(operation);
  call.dtype = static_cast<std::uint8_t>(dtype);
  call.count = count;
  return call;
}

void LocalGroup::enter(Call call) {
  call.measured_ns = measured_.measured_ns;
  call.measured_class = measured_.measured_class;
  call.measured_choice = measured_.measured_choice;
  measured_.measured_ns = 0;
  member_.enter(call);
  // That of the rank which came last, and waited for nobody; all see the same numbers.
  const Call& first = member_.call_of(0);
  if (first.measured_ns != 0) {
    std::uint32_t shortest = first.measured_ns;
    for (int rank = 1; rank < size(); ++rank) {
      const std::uint32_t theirs = member_.call_of(rank).measured_ns;
      shortest = theirs != 0 ? std::min(shortest, theirs) : shortest;
    }
    tuner_.learn(first.measured_class, first.measured_choice, shortest);
  }
}
std::unique_ptr<Group> Group::join(Options options) {
  check_options(options);
  Meeting meeting = meet(options, slot_bytes_of(options));
  return std::make_unique<LocalGroup>(std::move(options), std::shared_ptr<Segment>(std::move(meeting.segment)),
                                      std::move(meeting.processes), std::move(meeting.inbox),
                                      std::move(meeting.outboxes), false);
}

std::vector<std::unique_ptr<Group>> Group::join_threads(int size, const Options& common) {
  Options options = common;
  options.size = size;
  check_options(options);
  const std::size_t slot_bytes = slot_bytes_of(options);
  const auto segment =
      std::make_shared<Segment>(Segment::create(size, slot_bytes), Segment::bytes_for(size, slot_bytes));
  const auto ranks = static_cast<std::size_t>(size);
  std::vector<std::vector<Descriptor>> outboxes(ranks);
  std::vector<Descriptor> inboxes;
  for (std::size_t rank = 0; rank < ranks; ++rank) {
    std::array<int, 2> pair{};
    if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair.data()) != 0) {
      throw_system("socketpair");
    }
    inboxes.emplace_back(pair[0]);
    for (std::size_t sender = 0; sender < ranks; ++sender) {
      outboxes[sender].emplace_back(sender + 1 == ranks ? pair[1] : ::dup(pair[1]));
    }
  }
  // Making a group is a meeting of all its ranks: each in a thread of its own.
  std::vector<std::unique_ptr<Group>> groups(ranks);
  std::vector<std::thread> threads;
  for (std::size_t rank = 0; rank < ranks; ++rank) {
    threads.emplace_back([&, rank] {
      Options own = options;
      own.rank = static_cast<int>(rank);
      groups[rank] = std::make_unique<LocalGroup>(std::move(own), segment, std::vector<Process>(ranks),
                                                  std::move(inboxes[rank]), std::move(outboxes[rank]), true);
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  return groups;
}

}  // namespace launcher::collectives
