// A rank's end of a stream that a dealer reads: takes the records of its batches in, and decodes them.
#ifndef LAUNCHER_DATA_RECEIVER_H
#define LAUNCHER_DATA_RECEIVER_H

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine.h"
#include "launcher/descriptor.h"
#include "ring.h"
#include "stream_decoder.h"

namespace launcher::data {

struct ReceiverOptions {
  std::size_t batch = 1;
  std::string dealer;           // who reads, for messages: "rank 0 on algo-1"
  OnBad on_bad = OnBad::raise;  // substitute: the last good record of this rank stands in
  std::uint64_t bad_limit = 0;  // of an epoch, before it is an error after all; 0: none
};

struct ReceiverStatistics {
  std::uint64_t batches = 0, records = 0, substituted = 0;
  std::uint64_t waits_ns = 0;  // for records to come
  std::string first_bad;       // what was wrong with the first record that another one stands in for
};

// No more comes of this stream: its reader has ended (lost), or has closed it or gone on to another epoch (left).
class StreamLost : public std::runtime_error {
 public:
  StreamLost(bool lost, const std::string& text) : std::runtime_error(text), lost_(lost) {}
  bool lost() const noexcept { return lost_; }

 private:
  bool lost_;
};

class Receiver {
 public:
  // Throws std::system_error, std::invalid_argument: the memory is no ring.
  Receiver(ReceiverOptions options, int ring, Descriptor socket);

  // Waits for the epoch to begin and gives the first record of its stream (behind its heading), which all ranks are
  // shown alike. What is left of an epoch before it is thrown away. Nothing: interrupted() was true. Throws DataError,
  // StreamLost, ForkedError.
  std::optional<std::vector<std::byte>> begin(std::uint64_t epoch, const std::string& file,
                                              const std::function<bool()>& interrupted);
  // How records are decoded from now on.
  void set_decoder(std::shared_ptr<StreamDecoder> decoder);
  // The next batch; null when the epoch has no more, and when interrupted() was true. Throws as begin().
  Lease next(const std::function<bool()>& interrupted);
  bool ended() const noexcept { return ended_; }
  std::uint64_t steps() const noexcept { return steps_; }  // of this epoch, taken so far
  const ReceiverStatistics& statistics() const noexcept { return statistics_; }

 private:
  struct Pool;

  void check_process() const;
  std::optional<Message> wait(const std::function<bool()>& interrupted);
  void done(const Message& message);
  std::span<const std::byte> payload(const Message& message);
  [[noreturn]] void fail(const Message& message);
  [[noreturn]] void fail_gone(bool lost, const std::string& text) const;
  void gather(const Message& message);
  void take(const Message& message);
  void stand_in(const DataError& error);
  std::shared_ptr<Filled> free_slot();
  Lease lend(std::shared_ptr<Filled> filled) const;

  ReceiverOptions options_;
  Ring ring_;
  Descriptor socket_;
  int process_;
  std::shared_ptr<StreamDecoder> decoder_;
  std::unique_ptr<File> file_;       // its name, for messages
  std::vector<std::byte> gathered_;  // parts of a large record
  std::vector<std::byte> good_;      // the last good record
  std::shared_ptr<Pool> pool_;
  std::shared_ptr<Filled> filling_;
  std::size_t unannounced_ = 0;  // bytes released since the writer was last looked after
  bool ended_ = true;
  std::uint64_t run_ = 0;  // epochs that were begun
  std::uint64_t steps_ = 0, bad_ = 0;
  std::optional<DataError> failed_;
  ReceiverStatistics statistics_;
};

}  // namespace launcher::data

#endif
