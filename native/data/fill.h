// Fills one batch: the records of a step, with what stands in for those that can not be read.
#ifndef LAUNCHER_DATA_FILL_H
#define LAUNCHER_DATA_FILL_H

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "engine.h"
#include "order.h"
#include "share.h"
#include "source.h"

namespace launcher::data {

// Any number of threads may fill at the same time, each with a scratch and a batch of its own.
class Filler {
 public:
  Filler(std::shared_ptr<const Source> source, OnBad on_bad, std::uint64_t bad_limit);

  // Not beside fill(). Throws std::invalid_argument; DataError: a file is not as it was when it was opened.
  void begin(const OrderParameters& order, const ShareParameters& share);
  std::uint64_t steps() const noexcept { return steps_; }
  const Source& source() const noexcept { return *source_; }
  const ShareParameters& share() const noexcept { return share_; }

  // Throws DataError.
  void fill(std::uint64_t step, Filled& filled, Scratch& scratch);

  std::uint64_t substituted() const noexcept { return substituted_.load(std::memory_order_relaxed); }
  std::string first_bad() const;

 private:
  using Clock = std::chrono::steady_clock;

  void fetch(Filled& filled, Scratch& scratch);
  void substitute(Filled& filled, Scratch& scratch, const DataError& error);
  bool asks_ahead(std::uint64_t step) const noexcept { return step < ask_until_.load(std::memory_order_relaxed); }
  void ask_ahead(std::uint64_t step) const;
  void look_at_files();
  void look_now_and_then();

  std::shared_ptr<const Source> source_;
  const OnBad on_bad_;
  const std::uint64_t bad_limit_;
  std::optional<Order> order_;
  ShareParameters share_;
  std::uint64_t steps_ = 0;
  std::optional<bool> advised_;              // the files: for any order, or onward
  bool scattered_ = false;                   // the set is larger than memory, and its records come from anywhere
  std::atomic<std::uint64_t> ask_until_{0};  // the step before which records are asked for ahead

  std::atomic<Clock::rep> look_again_{0};
  std::atomic<std::uint64_t> bad_{0};  // of this epoch
  std::atomic<std::uint64_t> substituted_{0};
  mutable std::mutex mutex_;
  std::string first_bad_;
};

}  // namespace launcher::data

#endif
