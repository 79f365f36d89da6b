#include "member.h"

#include <array>
#include <cstdio>
#include <cstring>
#include <new>

namespace launcher::collectives {
namespace {

constexpr std::uint64_t kMs = 1'000'000;
constexpr auto kNap = std::chrono::milliseconds(10);  // how soon the death of a rank is seen
constexpr std::uint64_t kInterruptNs = 50 * kMs;
// A core that has nothing else to do polls this long before it sleeps: a wake-up costs some 5-50 us.
constexpr std::uint64_t kSpinNs = 60'000;
// With more ranks than cores the one that is waited for may need this very core.
constexpr int kSpinCrowded = 50;
constexpr int kYieldsCrowded = 10;

const std::array<OperationName, 7>& page_names() noexcept {
  static const std::array<OperationName, 7> names = [] {
    std::array<OperationName, 7> out;
    for (std::size_t index = 0; index < out.size(); ++index) {
      out[index] = operation_name(name(static_cast<Operation>(index)));
    }
    return out;
  }();
  return names;
}

// A process has one page; of two groups that are in a call at the same time the first one is shown.
std::atomic<const Member*> shown{nullptr};

std::string with_commas(std::uint64_t number) {
  std::string text = std::to_string(number);
  for (std::size_t at = text.size(); at > 3;) {
    at -= 3;
    text.insert(at, 1, ',');
  }
  return text;
}

std::string seconds(std::chrono::nanoseconds span) {
  std::array<char, 32> text;
  static_cast<void>(std::snprintf(text.data(), text.size(), "%.3g s", std::chrono::duration<double>(span).count()));
  return text.data();
}

}  // namespace

const char* name(Operation operation) noexcept {
  constexpr const char* names[] = {"barrier",   "allreduce", "reduce_scatter", "all_gather",
                                   "broadcast", "reduce",    "all_to_all"};
  const auto index = static_cast<std::size_t>(operation);
  return index < std::size(names) ? names[index] : "unknown";
}

Member::Member(Options options, std::shared_ptr<Segment> segment, std::vector<Process> processes)
    : options_(std::move(options)), segment_(std::move(segment)), processes_(std::move(processes)) {
  Place& place = own();
  if (::sched_getaffinity(0, sizeof place.cores, &place.cores) != 0) {
    CPU_ZERO(&place.cores);
  }
  spin_ = options_.spin >= 0 ? options_.spin : kSpinCrowded;
  place.can_fence.store(allow_remote_fences() ? 1 : 0, std::memory_order_relaxed);
  place.presence.store(static_cast<std::uint32_t>(Presence::present), std::memory_order_release);
  meet_again();
  choose_waiting();
}

void Member::choose_waiting() {
  cpu_set_t all;
  CPU_ZERO(&all);
  for (int rank = 0; rank < size(); ++rank) {
    CPU_OR(&all, &all, &segment_->place(rank).cores);
  }
  crowded_ = CPU_COUNT(&all) < size();
  // Where every rank has a core it seldom sleeps; each sleep then interrupts the others.
  fences_ = !crowded_;
  for (int rank = 0; rank < size(); ++rank) {
    fences_ = fences_ && segment_->place(rank).can_fence.load(std::memory_order_relaxed) != 0;
  }
  if (options_.spin >= 0) {
    return;
  }
  if (crowded_) {
    yields_ = kYieldsCrowded;
    return;
  }
  constexpr int kProbe = 200;
  const std::uint64_t from = monotonic_ns();
  for (int i = 0; i < kProbe; ++i) {
    relax();
  }
  const std::uint64_t cost = (monotonic_ns() - from) / kProbe + 1;
  spin_ = static_cast<int>(kSpinNs / (cost + 2)) + 1;
}

void Member::begin(Operation operation, std::uint64_t bytes) {
  operation_ = operation;
  bytes_ = bytes;
  check_usable();
  deadline_ns_ = 0;
  ++sequence_;
  own().entered.store(sequence_ << 8U | static_cast<std::uint64_t>(operation), std::memory_order_relaxed);
  if (options_.page != nullptr) {
    const Member* nobody = nullptr;
    shows_ = shown.compare_exchange_strong(nobody, this, std::memory_order_acquire);
    if (shows_) {
      options_.page->enter_collective(page_names()[static_cast<std::size_t>(operation)], bytes, monotonic_ns(),
                                      sequence_);
    }
  }
}

void Member::end(bool threw) noexcept {
  if (threw) {
    // Memory or descriptors may have run out in the middle of the call: the others would wait for its other half.
    end_group_as(Failure::system, " could not finish the call; its own error says why", "");
  } else {
    own().finished.store(sequence_, std::memory_order_relaxed);
    const Entry& next = own().entries[(sequence_ + 1) & 1U];
    prefetch_for_writing(&next);
    prefetch_for_writing(reinterpret_cast<const std::byte*>(&next) + sizeof next / 2);
  }
  if (shows_) {
    options_.page->leave_collective(monotonic_ns());
    shows_ = false;
    shown.store(nullptr, std::memory_order_release);
  }
}

// Either the sleeper sees the value, or it is seen here. That takes a fence between the two accesses on both sides.
// Here it would wait until all that was stored before has reached the cache, so the sleeper runs it for both where it
// can.
void Member::publish(Flag& flag, std::uint32_t value) noexcept {
  if (fences_) {
    flag.value.store(value, std::memory_order_release);
    std::atomic_signal_fence(std::memory_order_seq_cst);
  } else {
    flag.value.store(value, std::memory_order_seq_cst);
  }
  if (flag.sleepers.load(std::memory_order_seq_cst) != 0) {
    futex_wake_all(flag.value);
  }
}

void Member::enter(const Call& call) {
  Entry& mine = entry(options_.rank);
  mine.call = call;
  const auto number = static_cast<std::uint32_t>(sequence_);
  publish(mine.flag, number);
  phase(CollectivePhase::waiting);
  for (int rank = 0; rank < size(); ++rank) {
    if (rank != options_.rank) {
      wait_for(entry(rank).flag, number, rank);
      compare(rank);
    }
  }
}

void Member::compare(int rank) {
  const Call& mine = entry(options_.rank).call;
  const Call& other = entry(rank).call;
  const bool counts = static_cast<Operation>(mine.operation) != Operation::all_to_all;
  if (mine.operation == other.operation && mine.dtype == other.dtype && mine.reduce_op == other.reduce_op &&
      mine.root == other.root && (!counts || (mine.count == other.count && mine.detail == other.detail)) &&
      std::memcmp(&mine.post, &other.post, sizeof mine.post) == 0) {
    return;
  }
  // Seen from the first rank, so that all tell the same.
  const int first = rank < options_.rank ? rank : options_.rank;
  const int second = rank < options_.rank ? options_.rank : rank;
  const auto said = [&](int who) {
    const Call& call = entry(who).call;
    static constexpr const char* types[kDTypes] = {"float32", "float64", "float16", "bfloat16", "int8",
                                                   "uint8",   "int16",   "int32",   "int64",    "bool",
                                                   "uint16",  "uint32",  "uint64"};
    static constexpr const char* ops[kReduceOps] = {"sum", "average", "min", "max", "product", "and", "or", "xor"};
    const auto operation = static_cast<Operation>(call.operation);
    std::string text = name(operation);
    if (operation == Operation::barrier) {
      return text;
    }
    text += " of " + with_commas(call.count) + " " + types[call.dtype % kDTypes];
    if (operation == Operation::allreduce || operation == Operation::reduce_scatter || operation == Operation::reduce) {
      text += std::string(" (") + ops[call.reduce_op % kReduceOps] + ")";
    }
    if (operation == Operation::broadcast || operation == Operation::reduce) {
      text += " with root " + std::to_string(job_rank(options_, call.root));
    }
    return text;
  };
  fail(Failure::mismatch, second,
       place_of(options_, second) + " called " + said(second) + " where " + place_of(options_, first) + " called " +
           said(first) + (said(first) == said(second) ? ", with other counts or scale" : ""));
}

void Member::wait_long(Flag& flag, std::uint32_t value, int rank) {
  for (int i = 0; i < spin_; ++i) {
    relax();
    if (reached(flag, value)) {
      return;
    }
  }
  for (int i = 0; i < yields_; ++i) {
    ::sched_yield();
    if (reached(flag, value)) {
      return;
    }
  }
  sleep(flag, value, rank);
}

void Member::sleep(Flag& flag, std::uint32_t value, int rank) {
  const std::uint64_t began = monotonic_ns();
  std::uint64_t told = began;
  std::uint64_t asked = began;
  std::uint64_t looked = began;
  const auto limit = static_cast<std::uint64_t>(options_.timeout.count());
  if (deadline_ns_ == 0) {
    deadline_ns_ = limit > UINT64_MAX - began ? UINT64_MAX : began + limit;
  }
  if (shows_) {
    options_.page->set_waiting_for(job_rank(options_, rank));
  }
  const auto tell = [&](std::uint64_t now) {
    waited_ns_ += now - told;
    if (shows_) {
      options_.page->add_collective_wait(now - told);
    }
    told = now;
  };
  while (!reached(flag, value)) {
    flag.sleepers.fetch_add(1, std::memory_order_seq_cst);
    if (fences_) {
      remote_fence();
    }
    const std::uint32_t seen = flag.value.load(std::memory_order_seq_cst);
    const bool nap = static_cast<std::int32_t>(seen - value) < 0;
    if (nap && segment_->header().ended.load(std::memory_order_acquire) != 2) {
      futex_wait(flag.value, seen, kNap);
    }
    flag.sleepers.fetch_sub(1, std::memory_order_relaxed);
    if (reached(flag, value)) {
      break;
    }
    const std::uint64_t now = monotonic_ns();
    const bool thorough = now - looked >= static_cast<std::uint64_t>(std::chrono::nanoseconds(kNap).count());
    if (thorough) {
      looked = now;
      tell(now);
    }
    check(rank, thorough);
    if (now - asked >= kInterruptNs) {
      asked = now;
      if (options_.interrupted && options_.interrupted()) {
        fail(Failure::interrupted, options_.rank, place_of(options_, options_.rank) + " was interrupted by a signal");
      }
    }
  }
  tell(monotonic_ns());
  if (shows_) {
    options_.page->set_waiting_for(-1);
  }
}

void Member::check(int rank, bool thorough) {
  if (segment_->header().ended.load(std::memory_order_acquire) == 2) {
    throw_ended();
  }
  const auto left = [&](int other) {
    return segment_->place(other).presence.load(std::memory_order_acquire) ==
           static_cast<std::uint32_t>(Presence::left);
  };
  if (left(rank)) {
    // It may have told what is waited for just before it left.
    const std::uint64_t finished = segment_->place(rank).finished.load(std::memory_order_acquire);
    if (finished < sequence_) {
      fail(Failure::left, rank, place_of(options_, rank) + " left the group; " + whereabouts(rank));
    }
  }
  if (!thorough) {
    return;
  }
  for (int other = 0; other < size(); ++other) {
    // One that has finished this call owes nothing to it, and may end.
    if (other != options_.rank && !left(other) && !process(other).alive() &&
        (sequence_ == 0 || segment_->place(other).finished.load(std::memory_order_acquire) < sequence_)) {
      lost(other);
    }
  }
  if (monotonic_ns() >= deadline_ns_) {
    fail(Failure::timeout, rank,
         place_of(options_, rank) + " (pid " + std::to_string(process(rank).pid()) + ") did not come within " +
             seconds(options_.timeout) + ": " + whereabouts(rank) +
             (process(rank).stopped() ? "; its process is stopped (SIGSTOP)" : ""));
  }
}

void Member::lost(int rank) {
  fail(Failure::lost, rank,
       place_of(options_, rank) + " (pid " + std::to_string(process(rank).pid()) + ") has died; " + whereabouts(rank));
}

std::string Member::whereabouts(int rank) const {
  const Place& place = segment_->place(rank);
  const std::uint64_t entered = place.entered.load(std::memory_order_relaxed);
  const std::uint64_t number = entered >> 8U;
  if (number == 0) {
    return "it has made no call in this group";
  }
  const bool inside = place.finished.load(std::memory_order_relaxed) < number;
  return std::string(inside ? "it is seen last in " : "its last call was ") +
         name(static_cast<Operation>(entered & 0xffU)) + " #" + std::to_string(number);
}

std::string Member::title() const {
  const bool sized = operation_ != Operation::barrier;
  return std::string(sequence_ == 0 ? "join" : name(operation_)) + " #" + std::to_string(sequence_) +
         (sized && sequence_ != 0 ? " of " + with_commas(bytes_) + " B" : "");
}

void Member::end_group(Failure failure, int culprit, const std::string& what) noexcept {
  if (segment_->end(failure, culprit, what)) {
    wake_everyone();
  }
}

void Member::end_group_as(Failure failure, const char* what, const std::string& reason) noexcept {
  try {
    end_group(failure, rank(), place_of(options_, rank()) + what + reason);
  } catch (const std::bad_alloc&) {
    end_group(failure, rank(), "out of memory");  // short enough for a string's own bytes
  }
}

void Member::fail(Failure failure, int culprit, const std::string& what) {
  end_group(failure, culprit, what);
  // A rank that died between taking the right to tell and telling leaves it at 1.
  for (int i = 0; i < 100 && segment_->header().ended.load(std::memory_order_acquire) != 2; ++i) {
    ::sched_yield();
  }
  if (segment_->header().ended.load(std::memory_order_acquire) == 2) {
    throw_ended();
  }
  leave();  // the word that would refuse later calls is missing
  throw GroupError(failure, culprit < 0 ? -1 : job_rank(options_, culprit), options_.host,
                   sequence_ == 0 ? "join" : name(operation_), sequence_, title() + ": " + what);
}

void Member::throw_ended() {
  const Header& header = segment_->header();
  const auto failure = static_cast<Failure>(header.failure);
  const std::string what(header.reason, ::strnlen(header.reason, sizeof header.reason));
  throw GroupError(failure, header.culprit < 0 ? -1 : job_rank(options_, header.culprit), options_.host,
                   sequence_ == 0 ? "join" : name(operation_), sequence_, title() + ": " + what);
}

void Member::check_usable() {
  if (forked()) {
    throw GroupError(Failure::closed, job_rank(options_, rank()), options_.host, "fork", sequence_ + 1,
                     "the group belongs to the process that made it; this one is a fork of it: make a group here");
  }
  if (segment_->header().ended.load(std::memory_order_acquire) == 2) {
    ++sequence_;
    throw_ended();
  }
  if (own().presence.load(std::memory_order_relaxed) == static_cast<std::uint32_t>(Presence::left)) {
    throw GroupError(Failure::closed, job_rank(options_, rank()), options_.host, "call", sequence_ + 1,
                     "the group is closed on " + place_of(options_, rank()));
  }
}

void Member::wake_everyone() noexcept {
  for (int rank = 0; rank < size(); ++rank) {
    Place& place = segment_->place(rank);
    futex_wake_all(place.stage.value);
    futex_wake_all(place.entries[0].flag.value);
    futex_wake_all(place.entries[1].flag.value);
  }
}

void Member::leave() noexcept {
  if (forked()) {
    return;
  }
  own().presence.store(static_cast<std::uint32_t>(Presence::left), std::memory_order_release);
  wake_everyone();
}

}  // namespace launcher::collectives
