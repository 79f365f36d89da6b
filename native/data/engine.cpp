#include "engine.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <limits>
#include <mutex>
#include <new>
#include <optional>
#include <thread>
#include <utility>

#include "fill.h"

namespace launcher::data {
namespace {

using Clock = std::chrono::steady_clock;

// How long a wait lasts before it looks whether it is to end.
constexpr std::chrono::milliseconds kSlice{20};
// Waits for the user to drop a batch that are no further apart are one to whom they are told: a user who drops each
// batch late, and so waits for each, reads of it once.
constexpr std::chrono::seconds kEpisode{5};
// Before a wait: to be woken takes longer than this.
constexpr std::chrono::microseconds kSpin{10};

std::atomic<std::uint64_t> forks{0};  // that made this process and its forefathers, since the first engine

void count_forks() {
  static const int failed = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1, std::memory_order_relaxed); });
  if (failed != 0) {
    throw std::bad_alloc();  // the only error that there is
  }
}

std::uint64_t nanoseconds_since(Clock::time_point begin) noexcept {
  return static_cast<std::uint64_t>(std::chrono::nanoseconds(Clock::now() - begin).count());
}

}  // namespace

ForkedError::ForkedError()
    : std::logic_error(
          "this loader was made before fork(), and its threads and locks are its parent's; make a loader "
          "in the child, or none before the fork") {}

// ---- Filled

Filled::Filled(const std::vector<Field>& fields, std::size_t rows, const EngineOptions& options)
    : batch(fields, rows), mask(rows), unregister_(options.unregister_memory) {
  records.reserve(rows);
  if (!options.register_memory) {
    return;
  }
  try {
    for (std::size_t column = 0; column < fields.size(); ++column) {
      if (fields[column].kind == Kind::fixed && batch.columns[column].values.capacity() != 0) {
        options.register_memory(batch.columns[column].values.data(), batch.columns[column].values.capacity());
      }
      registered_ = column + 1;
    }
  } catch (...) {
    unregister();
    throw;
  }
}

Filled::~Filled() { unregister(); }

void Filled::unregister() noexcept {
  for (std::size_t column = 0; column < registered_ && unregister_; ++column) {
    Column& one = batch.columns[column];
    if (one.offsets.empty() && one.values.capacity() != 0) {
      unregister_(one.values.data(), one.values.capacity());
    }
  }
}

// ---- Core: what the leases hold on to

struct Engine::Core : std::enable_shared_from_this<Core> {
  // What came of a step that was filled ahead.
  struct Outcome {
    std::shared_ptr<Filled> filled;
    std::exception_ptr error;
    bool there() const noexcept { return filled != nullptr || error != nullptr; }
  };

  Core(std::shared_ptr<const Source> source, EngineOptions given)
      : options(std::move(given)),
        filler(std::move(source), options.on_bad, options.bad_limit),
        ahead(std::max<std::size_t>(options.ring_limit, 2)),
        limit(options.ring_limit),
        forks_before(forks.load(std::memory_order_relaxed)) {}

  using FullSince = std::optional<Clock::time_point>;

  bool forked() const noexcept { return forks.load(std::memory_order_relaxed) != forks_before; }

  // Slots that there may be while `lent` of them are lent: two more, to fill one while another waits.
  std::size_t wanted_slots() const noexcept {
    return std::clamp<std::size_t>(lent + 2, std::min(options.ring, limit), limit);
  }
  bool has_slot() const noexcept { return !unused.empty() || slots < wanted_slots(); }

  // With the lock held, which is given up while memory is fetched.
  std::shared_ptr<Filled> take_slot(std::unique_lock<std::mutex>& lock) {
    if (!unused.empty()) {
      auto slot = std::move(unused.back());
      unused.pop_back();
      return slot;
    }
    ++slots;
    lock.unlock();
    try {
      auto slot = std::make_shared<Filled>(filler.source().fields(), rows, options);
      lock.lock();
      return slot;
    } catch (...) {
      lock.lock();
      --slots;
      throw;
    }
  }

  // With the lock held. What is more than is wanted goes back to the system, by whoever drops the result.
  std::shared_ptr<Filled> put_slot(std::shared_ptr<Filled> slot) {
    if (closed || slots > wanted_slots()) {
      --slots;
      return slot;
    }
    unused.push_back(std::move(slot));
    return nullptr;
  }

  void give_back(std::shared_ptr<Filled> slot) {
    std::shared_ptr<Filled> surplus;
    bool wake = false;
    {
      const std::lock_guard lock(mutex);
      --lent;
      surplus = put_slot(std::move(slot));
      // A filler that waits for a slot is woken when there is work for a while, or none is done ahead: not for each.
      wake = sleeping_fillers != 0 && (unused.size() * 2 >= slots - lent || claimed == delivered);
    }
    if (wake) {
      slot_free.notify_all();
    }
    if (user_blocked.load(std::memory_order_relaxed)) {
      outcome.notify_all();
    }
  }

  Lease lend(std::shared_ptr<Filled> slot) {
    // With the lock held.
    Filled* raw = slot.get();
    Lease lease(raw, [core = shared_from_this(), slot = std::move(slot)](const Filled*) mutable {
      if (core->forked()) {
        // Another thread may have held the lock at the fork: nobody will ever give it up.
        new std::shared_ptr<Filled>(std::move(slot));
        new std::shared_ptr<Core>(std::move(core));
        return;
      }
      core->give_back(std::move(slot));
    });
    ++lent;
    ++delivered;
    ++batches;
    records += raw->batch.rows;
    return lease;
  }

  void close() noexcept {
    std::vector<std::shared_ptr<Filled>> dropped;
    {
      const std::lock_guard lock(mutex);
      closed = true;
    }
    slot_free.notify_all();
    for (std::thread& thread : threads) {
      thread.join();
    }
    const std::lock_guard lock(mutex);
    slots -= unused.size();
    dropped.swap(unused);
  }

  void spin_for_outcome(std::uint64_t seen) const noexcept {
    const Clock::time_point end = Clock::now() + kSpin;
    while (outcomes.load(std::memory_order_acquire) == seen && Clock::now() < end) {
    }
  }

  void run_filler(Scratch& own);
  Lease next_filled(const std::function<void(std::size_t)>& blocked, const std::function<bool()>& interrupted);
  Lease fill_now(const std::function<void(std::size_t)>& blocked, const std::function<bool()>& interrupted);
  bool wait(std::unique_lock<std::mutex>& lock, bool all_lent, FullSince& full_since,
            const std::function<void(std::size_t)>& blocked, const std::function<bool()>& interrupted);

  const EngineOptions options;
  Filler filler;
  std::size_t rows = 0;

  mutable std::mutex mutex;
  std::condition_variable slot_free;  // for the fillers
  std::condition_variable outcome;    // for the user
  std::vector<std::shared_ptr<Filled>> unused;
  std::vector<Outcome> ahead;  // of step s at s % size: no more steps are under way than there are slots not lent
  std::size_t limit;           // of slots: options.ring_limit until the user has kept as many for too long
  std::size_t slots = 0, lent = 0;
  std::uint64_t claimed = 0;    // the next step to fill
  std::uint64_t delivered = 0;  // the next step to hand over
  std::size_t filling = 0;      // threads that do it now
  std::size_t sleeping_fillers = 0;
  bool paused = false, closed = false;
  FullSince last_full;  // when the user waited last because all slots were lent
  std::atomic<bool> user_blocked{false};
  std::atomic<std::uint64_t> outcomes{0};  // that there were so far
  std::exception_ptr failed;               // no step comes after it
  std::uint64_t batches = 0, records = 0, waits_ns = 0, full_ns = 0;

  std::vector<std::unique_ptr<Scratch>> scratches;  // of each thread; without any: of the user's
  std::vector<std::thread> threads;
  const std::uint64_t forks_before;
};

void Engine::Core::run_filler(Scratch& own) {
  std::unique_lock lock(mutex);
  for (;;) {
    const auto may_fill = [this] { return !paused && !failed && claimed < filler.steps() && has_slot(); };
    if (!closed && !may_fill()) {
      const bool full = claimed < filler.steps() && !paused && !failed;
      const Clock::time_point begin = Clock::now();
      ++sleeping_fillers;
      slot_free.wait(lock, [&] { return closed || may_fill(); });
      --sleeping_fillers;
      full_ns += full ? nanoseconds_since(begin) : 0;
    }
    if (closed) {
      return;
    }
    const std::uint64_t step = claimed++;
    ++filling;
    Outcome result;
    try {
      result.filled = take_slot(lock);
      lock.unlock();
      filler.fill(step, *result.filled, own);
    } catch (...) {
      result.error = std::current_exception();
    }
    if (!lock.owns_lock()) {
      lock.lock();
    }
    --filling;
    if (result.error != nullptr) {
      failed = result.error;
      if (result.filled != nullptr) {
        unused.push_back(std::move(result.filled));
      }
      result.filled = nullptr;
    }
    ahead[step % ahead.size()] = std::move(result);
    outcomes.store(outcomes.load(std::memory_order_relaxed) + 1, std::memory_order_release);
    if (user_blocked.load(std::memory_order_relaxed) && (step == delivered || paused)) {
      lock.unlock();  // who is woken with the lock held goes to sleep again at once
      outcome.notify_all();
      lock.lock();
    }
  }
}

// False: the user gives up. `all_lent`: and nothing will happen unless a batch comes back, for which the user waits
// since `full_since`.
bool Engine::Core::wait(std::unique_lock<std::mutex>& lock, bool all_lent, FullSince& full_since,
                        const std::function<void(std::size_t)>& blocked, const std::function<bool()>& interrupted) {
  const Clock::time_point begin = Clock::now();
  if (all_lent) {
    full_since = full_since.value_or(begin);
    const bool news = !last_full || begin - *last_full > kEpisode;
    const bool enough = std::chrono::duration<double>(begin - *full_since).count() >= options.ring_wait_s;
    const std::size_t holders = lent;
    last_full = begin;
    if (enough) {
      limit = std::numeric_limits<std::size_t>::max();
    }
    if (news || enough) {
      lock.unlock();
      if (news) {
        blocked(holders);
      }
      if (enough && options.grown) {
        options.grown(holders);
      }
      lock.lock();
      return true;  // it took a while: look again
    }
  }
  user_blocked.store(true, std::memory_order_relaxed);
  const std::cv_status status = outcome.wait_for(lock, kSlice);
  user_blocked.store(false, std::memory_order_relaxed);
  waits_ns += nanoseconds_since(begin);
  if (status == std::cv_status::no_timeout) {
    return true;
  }
  lock.unlock();
  const bool give_up = interrupted();
  lock.lock();
  return !give_up;
}

Lease Engine::Core::fill_now(const std::function<void(std::size_t)>& blocked,
                             const std::function<bool()>& interrupted) {
  std::unique_lock lock(mutex);
  if (failed) {
    std::rethrow_exception(failed);
  }
  if (delivered == filler.steps()) {
    return nullptr;
  }
  FullSince full_since;
  while (!has_slot()) {
    if (!wait(lock, true, full_since, blocked, interrupted)) {
      return nullptr;
    }
  }
  std::shared_ptr<Filled> slot = take_slot(lock);
  const std::uint64_t step = delivered;
  lock.unlock();
  try {
    filler.fill(step, *slot, *scratches.front());
  } catch (...) {
    lock.lock();
    failed = std::current_exception();
    unused.push_back(std::move(slot));
    throw;
  }
  lock.lock();
  return lend(std::move(slot));
}

Lease Engine::Core::next_filled(const std::function<void(std::size_t)>& blocked,
                                const std::function<bool()>& interrupted) {
  std::unique_lock lock(mutex);
  if (delivered == filler.steps()) {
    return nullptr;
  }
  Outcome& next = ahead[delivered % ahead.size()];
  if (!next.there() && filling != 0) {
    const std::uint64_t seen = outcomes.load(std::memory_order_relaxed);
    lock.unlock();
    spin_for_outcome(seen);
    lock.lock();
  }
  FullSince full_since;
  while (!next.there()) {
    if (sleeping_fillers != 0 && has_slot()) {
      slot_free.notify_all();
    }
    if (!wait(lock, claimed == delivered && !has_slot(), full_since, blocked, interrupted)) {
      return nullptr;
    }
  }
  if (next.error != nullptr) {
    std::rethrow_exception(next.error);  // and stays, for the next call
  }
  Lease lease = lend(std::exchange(next.filled, nullptr));
  const bool wake = sleeping_fillers != 0 && unused.empty() && has_slot() && claimed < filler.steps();  // it may grow
  lock.unlock();
  if (wake) {
    slot_free.notify_all();
  }
  return lease;
}

// ---- Engine

Engine::Engine(std::shared_ptr<const Source> source, const OrderParameters& order, const ShareParameters& share,
               EngineOptions options) {
  count_forks();
  if (options.ring == 0 || options.ring_limit < options.ring) {
    throw std::invalid_argument("a ring of " + std::to_string(options.ring) + " batches, " +
                                std::to_string(options.ring_limit) + " at most; expected one at least");
  }
  core_ = std::make_shared<Core>(std::move(source), std::move(options));
  core_->filler.begin(order, share);
  core_->rows = static_cast<std::size_t>(share.batch);
  for (std::size_t number = 0; number < std::max<std::size_t>(core_->options.threads, 1); ++number) {
    core_->scratches.push_back(core_->filler.source().make_scratch());
  }
  try {
    for (std::size_t number = 0; number < core_->options.threads; ++number) {
      core_->threads.emplace_back([core = core_.get(), number] { core->run_filler(*core->scratches[number]); });
    }
  } catch (...) {
    core_->close();
    throw;
  }
}

Engine::~Engine() {
  if (core_->forked()) {
    new std::shared_ptr<Core>(std::move(core_));  // its threads can not be joined here
    return;
  }
  core_->close();
}

void Engine::restart(const OrderParameters& order, const ShareParameters& share) {
  Core& core = *core_;
  if (core.forked()) {
    throw ForkedError();
  }
  if (share.batch != core.rows) {
    throw std::invalid_argument("a batch of " + std::to_string(share.batch) +
                                " rows for an engine whose batches have " + std::to_string(core.rows));
  }
  std::unique_lock lock(core.mutex);
  core.paused = true;
  core.user_blocked.store(true, std::memory_order_relaxed);
  core.outcome.wait(lock, [&core] { return core.filling == 0; });
  core.user_blocked.store(false, std::memory_order_relaxed);
  for (auto& one : core.ahead) {
    if (one.filled != nullptr) {
      core.unused.push_back(std::move(one.filled));
    }
    one = {};
  }
  core.failed = nullptr;
  core.claimed = core.delivered = 0;
  core.last_full.reset();
  try {
    core.filler.begin(order, share);
  } catch (...) {
    core.failed = core.ahead.front().error = std::current_exception();
    throw;
  }
  core.paused = false;
  core.slot_free.notify_all();
}

Lease Engine::next(const std::function<void(std::size_t)>& blocked, const std::function<bool()>& interrupted) {
  if (core_->forked()) {
    throw ForkedError();
  }
  return core_->threads.empty() ? core_->fill_now(blocked, interrupted) : core_->next_filled(blocked, interrupted);
}

std::uint64_t Engine::steps() const noexcept { return core_->filler.steps(); }

std::uint64_t Engine::step() const {
  if (core_->forked()) {
    throw ForkedError();  // the lock may be a thread's that is not here
  }
  const std::lock_guard lock(core_->mutex);
  return core_->delivered;
}

EngineStatistics Engine::statistics() const {
  if (core_->forked()) {
    throw ForkedError();
  }
  EngineStatistics out;
  out.substituted = core_->filler.substituted();
  out.first_bad = core_->filler.first_bad();
  const std::lock_guard lock(core_->mutex);
  out.batches = core_->batches;
  out.records = core_->records;
  out.waits_ns = core_->waits_ns;
  out.full_ns = core_->full_ns;
  out.slots = core_->slots;
  out.lent = core_->lent;
  return out;
}

}  // namespace launcher::data
