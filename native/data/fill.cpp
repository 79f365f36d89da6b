#include "fill.h"

#include <sys/resource.h>

#include <algorithm>
#include <span>
#include <stdexcept>
#include <utility>

namespace launcher::data {
namespace {

// Of the time at most: looking whether the files are still as they were.
constexpr int kLookShare = 200;
// Neighbours that are tried in place of a record. Where so many in a row are bad, the file is.
constexpr std::uint64_t kNeighbours = 1000;

// Steps ahead of which records are asked of the disk; and for how many steps that goes on when an epoch begins, and
// after each page fault that had to wait for it.
constexpr std::uint64_t kAskedAhead = 4;
constexpr std::uint64_t kAskingSteps = 1000;

// This thread's page faults so far that waited for the disk.
long faults_from_disk() noexcept {
  rusage usage{};
  return getrusage(RUSAGE_THREAD, &usage) == 0 ? usage.ru_majflt : 0;
}

// What another record can stand in for. A file that is cut or can not be read is no matter of one record.
bool replaceable(Problem problem) noexcept {
  return problem == Problem::truncated || problem == Problem::malformed || problem == Problem::mismatch;
}

}  // namespace

Filler::Filler(std::shared_ptr<const Source> source, OnBad on_bad, std::uint64_t bad_limit)
    : source_(std::move(source)), on_bad_(on_bad), bad_limit_(bad_limit) {}

void Filler::begin(const OrderParameters& order, const ShareParameters& share) {
  if (share.batch == 0 || share.world == 0 || share.rank >= share.world) {
    throw std::invalid_argument("a batch of " + std::to_string(share.batch) + " rows, rank " +
                                std::to_string(share.rank) + " of " + std::to_string(share.world) +
                                "; expected a row at least, and a rank of the world");
  }
  if (order.records > source_->records() || order.records != share.records) {
    throw std::invalid_argument("an order of " + std::to_string(order.records) + " records, shares of " +
                                std::to_string(share.records) + ", a source of " + std::to_string(source_->records()));
  }
  look_at_files();
  order_.emplace(order);
  share_ = share;
  steps_ = data::steps(share);
  bad_.store(0, std::memory_order_relaxed);
  if (const bool any_order = order.shuffle == Shuffle::full; !advised_ || *advised_ != any_order) {
    scattered_ = advise(source_->files(), any_order) == Pattern::scattered;
    advised_ = any_order;
  }
  ask_until_.store(scattered_ ? kAskingSteps : 0, std::memory_order_relaxed);
}

// A file that has become shorter ends in the middle of a page, and the rest of that page reads as zeros without any
// fault: only its size tells.
void Filler::look_at_files() {
  const Clock::time_point before = Clock::now();
  for (const auto& file : source_->files()) {
    if (file->mapped()) {  // what is read says so itself
      file->check_unchanged();
    }
  }
  const Clock::time_point after = Clock::now();
  look_again_.store((after + kLookShare * (after - before)).time_since_epoch().count(), std::memory_order_relaxed);
}

void Filler::look_now_and_then() {
  if (Clock::now().time_since_epoch().count() >= look_again_.load(std::memory_order_relaxed)) {
    look_at_files();
  }
}

void Filler::fill(std::uint64_t step, Filled& filled, Scratch& scratch) {
  filled.step = step;
  filled.batch.rows = 0;
  filled.records.resize(filled.batch.capacity);
  const Rows rows = rows_of(share_, *order_, step, filled.records.data());
  filled.records.resize(rows.rows);
  std::fill_n(filled.mask.begin(), rows.valid, std::uint8_t{1});
  std::fill(filled.mask.begin() + static_cast<std::ptrdiff_t>(rows.valid), filled.mask.end(), std::uint8_t{0});
  if (asks_ahead(step)) {
    ask_ahead(step + kAskedAhead);
  }
  const long before = scattered_ ? faults_from_disk() : 0;
  try {
    fetch(filled, scratch);
  } catch (const DataError&) {
    look_at_files();  // zeros after the end of a file that was cut may be what the record is blamed for
    throw;
  }
  if (scattered_ && faults_from_disk() != before) {
    ask_until_.store(step + kAskingSteps, std::memory_order_relaxed);
  }
  look_now_and_then();
}

// A page fault waits for its page alone; a disk that is asked for many has them sooner.
void Filler::ask_ahead(std::uint64_t step) const {
  if (step < steps_) {
    std::vector<std::uint64_t> records(static_cast<std::size_t>(share_.batch));
    records.resize(rows_of(share_, *order_, step, records.data()).rows);
    source_->expect(records);
  }
}

void Filler::fetch(Filled& filled, Scratch& scratch) {
  const std::span<const std::uint64_t> records(filled.records);
  while (filled.batch.rows < records.size()) {
    try {
      source_->fetch(records.subspan(filled.batch.rows), filled.batch, scratch);
    } catch (const DataError& error) {
      if (on_bad_ == OnBad::raise || !replaceable(error.problem())) {
        throw;
      }
      substitute(filled, scratch, error);
    }
  }
}

// The neighbour is a function of the record alone, so that each run puts the same one.
void Filler::substitute(Filled& filled, Scratch& scratch, const DataError& error) {
  const std::size_t row = filled.batch.rows;
  const std::uint64_t bad = bad_.fetch_add(1, std::memory_order_relaxed) + 1;
  {
    const std::lock_guard lock(mutex_);
    if (first_bad_.empty()) {
      first_bad_ = error.what();
    }
  }
  if (bad_limit_ != 0 && bad > bad_limit_) {
    throw source_->describe(error.problem(), filled.records[row],
                            "more than " + std::to_string(bad_limit_) +
                                " records of this epoch can not be read (bad_limit); this one: " + error.what());
  }
  const std::uint64_t count = source_->records();
  for (std::uint64_t next = 1; next < std::min(count, kNeighbours); ++next) {
    const std::uint64_t neighbour = (filled.records[row] + next) % count;
    try {
      source_->fetch(std::span(&neighbour, 1), filled.batch, scratch);
    } catch (const DataError& other) {
      if (!replaceable(other.problem())) {
        throw;
      }
      continue;
    }
    filled.mask[row] = 0;
    substituted_.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  throw DataError(error);
}

std::string Filler::first_bad() const {
  const std::lock_guard lock(mutex_);
  return first_bad_;
}

}  // namespace launcher::data
