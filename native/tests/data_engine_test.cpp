// The engine over a source that knows what every record should be: what is lent, when, and what it holds.
#include "engine.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "transform.h"

namespace {

using namespace launcher::data;

// Record r: "id" is r, "square" three times r * r, "tail" r % 7 bytes of value r.
class Numbers final : public Source {
 public:
  explicit Numbers(std::uint64_t records, std::set<std::uint64_t> bad = {}, Problem problem = Problem::malformed)
      : records_(records), bad_(std::move(bad)), problem_(problem) {}

  std::uint64_t records() const noexcept override { return records_; }
  std::uint64_t bytes() const noexcept override { return records_ * 32; }
  const std::vector<Field>& fields() const noexcept override { return fields_; }
  std::unique_ptr<Scratch> make_scratch() const override { return std::make_unique<Scratch>(); }
  DataError describe(Problem problem, std::uint64_t record, const std::string& text) const override {
    return {problem, "numbers", record * 32, record, text};
  }
  void fetch(std::span<const std::uint64_t> records, Batch& batch, Scratch&) const override {
    for (const std::uint64_t record : records) {
      const std::size_t row = batch.rows;
      *batch.columns[0].fixed_row<std::int64_t>(row, 1) = static_cast<std::int64_t>(record);
      for (std::size_t i = 0; i < 3; ++i) {
        batch.columns[1].fixed_row<double>(row, 3)[i] = static_cast<double>(record * record);
      }
      std::byte* bytes = append(batch.columns[2], row, record % 7, 1);
      if (record % 7 != 0) {
        std::memset(bytes, static_cast<int>(record % 256), record % 7);
      }
      if (bad_.contains(record)) {
        throw describe(problem_, record, "bad");
      }
      batch.columns[2].offsets[row + 1] = batch.columns[2].offsets[row] + static_cast<std::int64_t>(record % 7);
      ++batch.rows;
    }
  }

 private:
  std::uint64_t records_;
  std::set<std::uint64_t> bad_;
  Problem problem_;
  std::vector<Field> fields_{{"id", Kind::fixed, DType::int64, {}},
                             {"square", Kind::fixed, DType::float64, {3}},
                             {"tail", Kind::ragged, DType::uint8, {}}};
};

std::uint64_t id_of(const Filled& filled, std::size_t row) {
  std::int64_t id = 0;
  std::memcpy(&id, filled.batch.columns[0].values.data() + row * sizeof(id), sizeof(id));
  return static_cast<std::uint64_t>(id);
}

// Every row is what its id says. Checks are counted by lot: CHECK itself would be most of the time.
bool holds_together(const Filled& filled) {
  const auto& columns = filled.batch.columns;
  for (std::size_t row = 0; row < filled.batch.rows; ++row) {
    const std::uint64_t id = id_of(filled, row);
    double squares[3];
    std::memcpy(squares, columns[1].values.data() + row * sizeof(squares), sizeof(squares));
    const std::int64_t begin = columns[2].offsets[row], end = columns[2].offsets[row + 1];
    if (squares[2] != static_cast<double>(id * id) || static_cast<std::uint64_t>(end - begin) != id % 7) {
      return false;
    }
    for (std::int64_t at = begin; at < end; ++at) {
      if (columns[2].values.data()[at] != static_cast<std::byte>(id % 256)) {
        return false;
      }
    }
  }
  return true;
}

struct Run {
  OrderParameters order;
  ShareParameters share;
  EngineOptions options;

  explicit Run(std::uint64_t records, std::uint64_t batch = 8, std::size_t threads = 0) {
    order.records = share.records = records;
    share.batch = batch;
    options.threads = threads;
  }
};

void never(std::size_t) { CHECK(!"blocked"); }
bool go_on() { return false; }

Lease take(Engine& engine) { return engine.next(never, go_on); }

void test_each_record_once() {
  for (const std::size_t threads : {0U, 1U, 3U}) {
    for (const Tail tail : {Tail::drop, Tail::pad, Tail::short_one}) {
      Run run(1003, 8, threads);
      run.share.tail = tail;
      Engine engine(std::make_shared<Numbers>(1003), run.order, run.share, run.options);
      for (std::uint64_t epoch = 0; epoch < 3; ++epoch) {
        std::vector<int> seen(1003);
        std::uint64_t steps = 0, valid = 0;
        while (const Lease lease = take(engine)) {
          CHECK(lease->step == steps++);
          CHECK(holds_together(*lease));
          for (std::size_t row = 0; row < lease->batch.rows; ++row) {
            CHECK(lease->records[row] == id_of(*lease, row));
            if (lease->mask[row] != 0) {
              ++seen[id_of(*lease, row)];
              ++valid;
            }
          }
        }
        CHECK(steps == engine.steps() && steps == (tail == Tail::drop ? 125 : 126));
        CHECK(valid == (tail == Tail::drop ? 1000 : 1003));
        CHECK(*std::max_element(seen.begin(), seen.end()) == 1);
        CHECK(take(engine) == nullptr);
        run.order.epoch = epoch + 1;
        engine.restart(run.order, run.share);
      }
      CHECK(engine.statistics().lent == 0);
    }
  }
}

// F19
void test_batches_that_are_kept_stay() {
  for (const std::size_t threads : {0U, 2U}) {
    const Run run(4000, 8, threads);
    std::deque<std::pair<Lease, std::vector<std::uint64_t>>> kept;
    {
      Engine engine(std::make_shared<Numbers>(4000), run.order, run.share, run.options);
      while (Lease lease = take(engine)) {
        std::vector<std::uint64_t> ids;
        for (std::size_t row = 0; row < lease->batch.rows; ++row) {
          ids.push_back(id_of(*lease, row));
        }
        kept.emplace_back(std::move(lease), std::move(ids));
        if (kept.size() > 60) {
          kept.pop_front();
        }
      }
      CHECK(engine.statistics().slots <= 64);
      while (kept.size() > 5) {
        kept.pop_front();
      }
      CHECK(engine.statistics().slots <= 8);  // what was grown is given back
    }
    for (const auto& [lease, ids] : kept) {  // and outlive the engine
      CHECK(holds_together(*lease));
      for (std::size_t row = 0; row < ids.size(); ++row) {
        CHECK(id_of(*lease, row) == ids[row]);
      }
    }
  }
}

// F19: over the limit it waits, says so once, and goes on when another thread gives a batch back.
void test_limit() {
  for (const std::size_t threads : {0U, 2U}) {
    Run run(400, 8, threads);
    run.options.ring = 2;
    run.options.ring_limit = 3;
    Engine engine(std::make_shared<Numbers>(400), run.order, run.share, run.options);
    std::mutex mutex;
    std::condition_variable told;
    std::vector<Lease> kept;
    for (int i = 0; i < 3; ++i) {
      kept.push_back(take(engine));
    }
    int warnings = 0;
    CHECK(engine.next([&warnings](std::size_t held) { warnings += held == 3 ? 1 : 100; }, [] { return true; }) ==
          nullptr);
    CHECK(warnings == 1);
    bool blocked = false;
    std::thread other([&] {
      std::unique_lock lock(mutex);
      told.wait(lock, [&blocked] { return blocked; });
      kept.erase(kept.begin());
    });
    const Lease fourth = engine.next([](std::size_t) { CHECK(!"said again"); },
                                     [&] {
                                       const std::lock_guard lock(mutex);
                                       blocked = true;
                                       told.notify_one();
                                       return false;
                                     });
    other.join();
    CHECK(fourth != nullptr && fourth->step == 3 && holds_together(*fourth));
  }
}

void test_batches_come_back_from_any_thread() {
  Run run(6000, 4, 2);
  Engine engine(std::make_shared<Numbers>(6000), run.order, run.share, run.options);
  std::mutex mutex;
  std::condition_variable more;
  std::deque<Lease> queue;
  bool over = false;
  std::atomic<std::uint64_t> good{0};
  std::vector<std::thread> users;
  for (int number = 0; number < 2; ++number) {
    users.emplace_back([&] {
      for (;;) {
        std::unique_lock lock(mutex);
        more.wait(lock, [&] { return over || !queue.empty(); });
        if (queue.empty()) {
          return;
        }
        const Lease lease = std::move(queue.front());
        queue.pop_front();
        lock.unlock();
        good += holds_together(*lease) ? 1 : 0;
      }
    });
  }
  std::uint64_t steps = 0;
  while (Lease lease = engine.next([](std::size_t) {}, go_on)) {
    ++steps;
    const std::lock_guard lock(mutex);
    queue.push_back(std::move(lease));
    more.notify_one();
  }
  {
    const std::lock_guard lock(mutex);
    over = true;
  }
  more.notify_all();
  for (std::thread& user : users) {
    user.join();
  }
  CHECK(steps == 1500 && good == steps);
}

void test_error_comes_at_its_batch() {
  for (const std::size_t threads : {0U, 3U}) {
    Run run(800, 8, threads);
    run.order.shuffle = Shuffle::none;
    Engine engine(std::make_shared<Numbers>(800, std::set<std::uint64_t>{404}), run.order, run.share, run.options);
    for (std::uint64_t step = 0; step < 50; ++step) {
      const Lease lease = take(engine);
      CHECK(lease != nullptr && lease->step == step);
    }
    for (int again = 0; again < 2; ++again) {
      CHECK_THROWS(DataError, take(engine), CHECK(error.record() == 404 && error.offset() == 404 * 32));
    }
    engine.restart(run.order, run.share);
    CHECK(take(engine) != nullptr);
  }
}

// F9
void test_substitutes() {
  const std::set<std::uint64_t> bad{17, 18, 399};
  for (const std::size_t threads : {0U, 2U}) {
    Run run(400, 8, threads);
    run.options.on_bad = OnBad::substitute;
    Engine engine(std::make_shared<Numbers>(400, bad, Problem::mismatch), run.order, run.share, run.options);
    std::uint64_t steps = 0, masked = 0;
    while (const Lease lease = take(engine)) {
      ++steps;
      CHECK(holds_together(*lease));
      for (std::size_t row = 0; row < lease->batch.rows; ++row) {
        const std::uint64_t wanted = lease->records[row], got = id_of(*lease, row);
        CHECK((lease->mask[row] == 0) == bad.contains(wanted));
        CHECK(got == (wanted == 17 || wanted == 18 ? 19 : wanted == 399 ? 0 : wanted));
        masked += lease->mask[row] == 0 ? 1 : 0;
      }
    }
    CHECK(steps == 50 && masked == 3);
    CHECK(engine.statistics().substituted == 3 && !engine.statistics().first_bad.empty());
  }
  Run run(400);
  run.order.shuffle = Shuffle::none;
  run.options.on_bad = OnBad::substitute;
  run.options.bad_limit = 2;
  Engine limited(std::make_shared<Numbers>(400, bad), run.order, run.share, run.options);
  CHECK_THROWS(
      DataError,
      [&] {
        while (take(limited) != nullptr) {
        }
      }(),
      CHECK(error.record() == 399));
  // A file that is not what it was is no matter of one record.
  Engine cut(std::make_shared<Numbers>(400, bad, Problem::changed), run.order, run.share, run.options);
  CHECK_THROWS(
      DataError,
      [&] {
        while (take(cut) != nullptr) {
        }
      }(),
      CHECK(error.problem() == Problem::changed));
  // All are bad.
  Engine none(std::make_shared<Numbers>(3, std::set<std::uint64_t>{0, 1, 2}), Run(3, 1).order, Run(3, 1).share,
              run.options);
  CHECK_THROWS(DataError, take(none));
}

void test_restart_in_the_middle() {
  for (const std::size_t threads : {0U, 2U}) {
    Run run(2000, 8, threads);
    Engine engine(std::make_shared<Numbers>(2000), run.order, run.share, run.options);
    Lease kept;
    for (std::uint64_t round = 0; round < 20; ++round) {
      run.order.epoch = round;
      run.share.base = round * 8;
      engine.restart(run.order, run.share);
      const Order order(run.order);
      for (std::uint64_t step = 0; step < round % 5; ++step) {
        kept = take(engine);
        CHECK(kept->step == step && kept->records[0] == order.at(run.share.base + step * 8));
        CHECK(holds_together(*kept));
      }
    }
    Run wider(2000, 16);
    CHECK_THROWS(std::invalid_argument, engine.restart(wider.order, wider.share));
    CHECK(holds_together(*kept));
  }
}

// F18
void test_fork() {
  for (const std::size_t threads : {0U, 2U}) {
    const Run run(400, 8, threads);
    auto engine = std::make_unique<Engine>(std::make_shared<Numbers>(400), run.order, run.share, run.options);
    Lease lease = take(*engine);
    const pid_t child = ::fork();
    if (child == 0) {
      int verdict = 1;
      try {
        take(*engine);
      } catch (const ForkedError&) {
        verdict = 0;
      }
      try {
        static_cast<void>(engine->step());
        verdict = 2;
      } catch (const ForkedError&) {
      }
      lease.reset();
      engine.reset();
      ::_exit(verdict);
    }
    int status = -1;
    CHECK(::waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    std::uint64_t steps = 1;
    while (take(*engine) != nullptr) {
      ++steps;
    }
    CHECK(steps == 50);
  }
}

void test_memory_is_registered_and_unregistered() {
  std::mutex mutex;
  std::set<void*> registered;
  int calls = 0;
  Run run(400, 8, 2);
  run.options.register_memory = [&](void* data, std::size_t bytes) {
    const std::lock_guard lock(mutex);
    CHECK(registered.insert(data).second && bytes != 0);
    ++calls;
  };
  run.options.unregister_memory = [&](void* data, std::size_t) {
    const std::lock_guard lock(mutex);
    CHECK(registered.erase(data) == 1);
  };
  Lease kept;
  {
    Engine engine(std::make_shared<Numbers>(400), run.order, run.share, run.options);
    while (Lease lease = take(engine)) {
      kept = std::move(lease);
    }
  }
  CHECK(registered.size() == 2);  // the fixed columns of the one that is kept
  kept.reset();
  CHECK(registered.empty() && calls >= 4);
  run.options.register_memory = [](void*, std::size_t) { throw std::runtime_error("no memory can be pinned"); };
  Engine engine(std::make_shared<Numbers>(400), run.order, run.share, run.options);
  CHECK_THROWS(std::runtime_error, take(engine));
}

void test_changes() {
  auto source = changed_source(std::make_shared<Numbers>(100),
                               {{Change::Kind::one_hot, "id", DType::uint8, {}, {}, 90},
                                {Change::Kind::affine, "square", DType::float32, {0.5}, {1.0, 2.0, 3.0}, 0}});
  CHECK(source->fields()[0].shape == std::vector<std::uint64_t>{90});
  Batch batch(source->fields(), 100);
  const auto scratch = source->make_scratch();
  const std::uint64_t some[] = {3, 89, 90, 5};
  CHECK_THROWS(DataError, source->fetch(some, batch, *scratch), CHECK(error.record() == 90));
  CHECK(batch.rows == 2);
  source->fetch(std::span(some).subspan(3), batch, *scratch);
  const std::uint64_t expected[] = {3, 89, 5};
  CHECK(batch.rows == 3);
  for (std::size_t row = 0; row < 3; ++row) {
    for (std::size_t i = 0; i < 90; ++i) {
      CHECK(batch.columns[0].fixed_row<std::uint8_t>(row, 90)[i] == (i == expected[row] ? 1 : 0));
    }
    for (std::size_t i = 0; i < 3; ++i) {
      const float wanted = static_cast<float>(expected[row] * expected[row]) * 0.5F + static_cast<float>(i + 1);
      CHECK(batch.columns[1].fixed_row<float>(row, 3)[i] == wanted);
    }
    const auto& tail = batch.columns[2];
    CHECK(static_cast<std::uint64_t>(tail.offsets[row + 1] - tail.offsets[row]) == expected[row] % 7);
  }
  auto narrow =
      changed_source(std::make_shared<Numbers>(100), {{Change::Kind::cast, "square", DType::uint8, {}, {}, 0}});
  Batch small(narrow->fields(), 100);
  const auto own = narrow->make_scratch();
  const std::uint64_t growing[] = {2, 15, 16};
  CHECK_THROWS(DataError, narrow->fetch(growing, small, *own), CHECK(error.record() == 16));
  CHECK(small.rows == 2 && small.columns[0].fixed_row<std::int64_t>(1, 1)[0] == 15);
  CHECK(small.columns[1].fixed_row<std::uint8_t>(1, 3)[0] == 225);
  CHECK_THROWS(std::invalid_argument, changed_source(source, {{Change::Kind::cast, "none", DType::uint8, {}, {}, 0}}));
  CHECK_THROWS(std::invalid_argument, changed_source(source, {{Change::Kind::cast, "tail", DType::uint16, {}, {}, 0}}));
  CHECK_THROWS(std::invalid_argument,
               changed_source(source, {{Change::Kind::affine, "square", DType::float32, {1.0, 2.0}, {0.0}, 0}}));
}

void test_ends_at_any_time() {
  for (std::uint64_t round = 0; round < 40; ++round) {
    const Run run(2000, 8, 1 + round % 3);
    Engine engine(std::make_shared<Numbers>(2000), run.order, run.share, run.options);
    for (std::uint64_t step = 0; step < round % 4; ++step) {
      CHECK(take(engine) != nullptr);
    }
  }
}

}  // namespace

int main() {
  check::run("each record once", test_each_record_once);
  check::run("batches that are kept stay (F19)", test_batches_that_are_kept_stay);
  check::run("limit (F19)", test_limit);
  check::run("batches come back from any thread", test_batches_come_back_from_any_thread);
  check::run("an error comes at its batch", test_error_comes_at_its_batch);
  check::run("substitutes (F9)", test_substitutes);
  check::run("restart in the middle", test_restart_in_the_middle);
  check::run("fork (F18)", test_fork);
  check::run("memory is registered and unregistered", test_memory_is_registered_and_unregistered);
  check::run("changes", test_changes);
  check::run("ends at any time", test_ends_at_any_time);
  return check::failures == 0 ? 0 : 1;
}
