// Fills batches ahead of whom they are for, and lends them.
#ifndef LAUNCHER_DATA_ENGINE_H
#define LAUNCHER_DATA_ENGINE_H

#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "share.h"
#include "source.h"

namespace launcher::data {

enum class OnBad : std::uint8_t {
  raise = 0,
  substitute = 1,  // the next record that can be read stands in, with mask 0
};

struct EngineOptions {
  std::size_t ring = 4;         // batches that may be filled or lent at the same time, to begin with
  std::size_t ring_limit = 64;  // to which the ring grows while its user keeps batches
  // How long next() waits for one of ring_limit batches to come back, in seconds. Then the ring grows beyond, for good.
  double ring_wait_s = std::numeric_limits<double>::infinity();
  std::function<void(std::size_t holders)> grown;  // called when it does, by next(); may be empty
  std::size_t threads = 0;                         // 0: each batch is filled by the thread that asks for it
  OnBad on_bad = OnBad::raise;
  std::uint64_t bad_limit = 0;  // substituted records of an epoch before it is an error after all; 0: none
  // Called with the memory of each fixed column that a batch has got, and before it is given back; for pinned memory
  // (what grows with its contents is not pinned). From any thread. May be empty.
  std::function<void(void* data, std::size_t bytes)> register_memory, unregister_memory;
};

// A batch that is filled. Its memory lives as long as the engine keeps it for the next batch, or anybody holds it by
// shared_from_this(): an array that a user keeps when the engine is gone.
struct Filled : std::enable_shared_from_this<Filled> {
  Filled(const std::vector<Field>& fields, std::size_t rows, const EngineOptions& options);
  Filled(const Filled&) = delete;
  Filled& operator=(const Filled&) = delete;
  ~Filled();

  Batch batch;
  std::vector<std::uint8_t> mask;      // one for each row: 0 where it is padding or stands in for a bad record
  std::vector<std::uint64_t> records;  // that the rows are of
  std::uint64_t step = 0;

 private:
  void unregister() noexcept;

  std::function<void(void*, std::size_t)> unregister_;
  std::size_t registered_ = 0;  // columns, from the first one on
};

// A batch on loan: its slot is free again when the last copy of the pointer is gone, from whatever thread.
using Lease = std::shared_ptr<const Filled>;

struct EngineStatistics {
  std::uint64_t batches = 0, records = 0, substituted = 0;  // handed over since the engine was made
  std::uint64_t waits_ns = 0;                               // the user waited for a batch
  std::uint64_t full_ns = 0;                                // the fillers waited for a slot
  std::size_t slots = 0, lent = 0;                          // now
  std::string first_bad;  // what was wrong with the first record that another one stands in for
};

// next() was called in a child of the process that made the engine: threads and locks did not come along.
class ForkedError : public std::logic_error {
 public:
  ForkedError();
};

class Engine {
 public:
  // Throws std::invalid_argument (a batch or a ring of 0), DataError (a file is not as it was when it was opened).
  Engine(std::shared_ptr<const Source> source, const OrderParameters& order, const ShareParameters& share,
         EngineOptions options);
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;
  ~Engine();  // stops and joins the threads; batches that are lent live on

  // Another epoch, or the same one from another position, with the batches and threads of this engine. What was filled
  // ahead is thrown away. The batch stays as large as it is. Not beside next(). Throws as the constructor, ForkedError.
  void restart(const OrderParameters& order, const ShareParameters& share);

  // The batch of the next step; null after the last one. Blocks while all slots are lent and the ring may not grow:
  // `blocked(holders)` is called with how many batches are held (once for waits that follow each other closely), then
  // `interrupted()` now and then (true: give up, null is returned). Throws what a filler threw: DataError, each time it
  // is called. ForkedError.
  Lease next(const std::function<void(std::size_t)>& blocked, const std::function<bool()>& interrupted);
  std::uint64_t steps() const noexcept;  // from the position it began at to the end of the epoch
  std::uint64_t step() const;            // that comes next; throws ForkedError
  EngineStatistics statistics() const;   // throws ForkedError

 private:
  struct Core;
  std::shared_ptr<Core> core_;
};

}  // namespace launcher::data

#endif
