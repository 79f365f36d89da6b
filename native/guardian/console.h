// The guardian's share of the terminal: whole lines of all ranks, written by one thread per stream.
//
// A reader that stops reading must not stop the training. Each slot may have kQuotaBytes waiting; a rank whose share
// is full waits at most kStallLimit for the writer to move, then its lines are dropped (they are still in its file)
// and counted, and the count is shown as soon as there is room. The share that has waited longest is written next, so
// lines keep their order in time, and a rank that floods delays the lines of the others by no more than one share.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>

namespace launcher::guardian {

class Console {
 public:
  static constexpr std::size_t kQuotaBytes = 256U * 1024U;
  static constexpr std::chrono::milliseconds kStallLimit{250};

  using Note = std::function<void(std::string)>;

  // `fd` is written with blocking semantics; `note` is told, on the console's thread, when it cannot be written any
  // more.
  Console(int fd, Note note);
  Console(const Console&) = delete;
  Console& operator=(const Console&) = delete;
  ~Console();

  // Queues `text`, `lines` whole lines of `slot`. Waits for room as described above, not at all when `urgent` is set.
  void push(int slot, std::string_view text, std::size_t lines, const std::atomic<bool>& urgent);
  // Waits until all is written, at most `limit`. False when the reader did not take it in time.
  bool flush(std::chrono::milliseconds limit);
  [[nodiscard]] std::uint64_t dropped_lines() const { return total_dropped_.load(); }

 private:
  struct Share {
    std::string pending;
    std::uint64_t waiting_since = 0;  // order in which the shares got their oldest pending text
    std::uint64_t dropped_lines = 0;
    std::uint64_t dropped_bytes = 0;
  };

  void run();
  bool write_all(std::string_view text);
  void note_dropped(int slot, Share& share);

  const int fd_;
  const Note note_;
  std::mutex mutex_;
  std::condition_variable work_;   // the writer waits for text
  std::condition_variable space_;  // ranks wait for room, flush() for the end
  std::map<int, Share> shares_;
  std::uint64_t order_ = 0;
  bool writing_ = false;
  bool blocked_ = false;  // the writer did not move within kStallLimit
  bool closed_ = false;   // nobody will ever read this stream
  bool stop_ = false;
  std::atomic<std::uint64_t> total_dropped_{0};
  std::thread thread_;
};

}  // namespace launcher::guardian
