// Reads the two output streams of one rank on a thread of its own, so that no rank can delay another's lines.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

#include "console.h"
#include "lines.h"
#include "logfile.h"

namespace launcher::guardian {

struct StreamOptions {
  int pipe_fd = -1;            // read end, owned by the pump from construction on
  std::string path;            // "" keeps no file
  Console* console = nullptr;  // null shows nothing
};

class RankPump {
 public:
  struct Tails {
    std::string out;
    std::string err;
  };
  using Note = std::function<void(std::string)>;  // called on the pump's thread with a warning

  // `raw` passes bytes through as they come (a job of one rank: a prompt or a bar must show at once).
  RankPump(int slot, std::string prefix, bool raw, std::uint64_t cap_bytes, StreamOptions out, StreamOptions err,
           Note note);
  RankPump(const RankPump&) = delete;
  RankPump& operator=(const RankPump&) = delete;
  ~RankPump();

  // Takes what the pipes hold now (not what a grandchild that keeps them open writes later) and returns the last bytes
  // of both streams. Waits at most `limit`, for a disk that does not answer.
  Tails drain(std::chrono::milliseconds limit);
  // Ends the thread at its next chance, without waiting for it.
  void request_stop();
  // Both streams have ended, or a stop was asked for, and all is written.
  [[nodiscard]] bool ended();
  [[nodiscard]] std::uint64_t bytes() const { return bytes_.load(std::memory_order_relaxed); }

 private:
  struct Stream {
    Stream(StreamOptions options, const std::string& prefix, std::uint64_t cap_bytes, std::size_t tail_bytes);
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    ~Stream() { close(); }
    void close();
    int fd;
    Console* console;
    CappedFile file;
    LineAssembler assembler;
    std::string tail;
    std::size_t tail_bytes;
  };

  void run();
  bool read_some(Stream& stream, std::size_t limit);
  void take(Stream& stream, std::string_view bytes);
  void show(Stream& stream, std::size_t lines);

  const int slot_;
  const bool raw_;
  const Note note_;
  Stream out_;
  Stream err_;
  std::string chunk_;
  std::string text_;
  int wake_fd_;
  std::atomic<std::uint64_t> bytes_{0};
  std::atomic<bool> urgent_{false};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;  // guards the tails and the drain hand-shake
  std::condition_variable drained_;
  std::uint64_t drain_wanted_ = 0;
  std::uint64_t drain_done_ = 0;
  bool ended_ = false;
  std::thread thread_;
};

}  // namespace launcher::guardian
