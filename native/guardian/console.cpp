#include "console.h"

#include <poll.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace launcher::guardian {

Console::Console(int fd, Note note) : fd_(fd), note_(std::move(note)), thread_([this] { run(); }) {}

Console::~Console() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  work_.notify_all();
  thread_.join();
}

void Console::push(int slot, std::string_view text, std::size_t lines, const std::atomic<bool>& urgent) {
  std::unique_lock lock(mutex_);
  if (closed_) return;
  Share& share = shares_[slot];
  const auto fits = [&] {
    return closed_ || share.pending.empty() || share.pending.size() + text.size() <= kQuotaBytes;
  };
  if (!fits() && !blocked_ && !urgent.load(std::memory_order_relaxed)) {
    const bool moved =
        space_.wait_for(lock, kStallLimit, [&] { return fits() || urgent.load(std::memory_order_relaxed); });
    if (!moved) blocked_ = true;
  }
  if (closed_) return;
  if (!fits()) {
    share.dropped_lines += lines;
    share.dropped_bytes += text.size();
    total_dropped_ += lines;
    return;
  }
  note_dropped(slot, share);
  if (share.pending.empty()) share.waiting_since = order_++;
  share.pending.append(text);
  work_.notify_one();
}

void Console::note_dropped(int slot, Share& share) {
  if (share.dropped_lines == 0) return;
  if (share.pending.empty()) share.waiting_since = order_++;
  const std::string whose = slot < 0 ? "the launcher" : "local rank " + std::to_string(slot);
  share.pending += "[launcher] " + whose + ": " + std::to_string(share.dropped_lines) + " lines (" +
                   std::to_string(share.dropped_bytes) +
                   " bytes) were not shown, the reader of this output is too slow; see the log file\n";
  share.dropped_lines = share.dropped_bytes = 0;
}

bool Console::flush(std::chrono::milliseconds limit) {
  std::unique_lock lock(mutex_);
  for (auto& [slot, share] : shares_) note_dropped(slot, share);
  work_.notify_one();
  return space_.wait_for(lock, limit, [&] {
    if (closed_) return true;
    if (writing_) return false;
    for (const auto& [slot, share] : shares_) {
      if (!share.pending.empty()) return false;
    }
    return true;
  });
}

void Console::run() {
  std::string text;
  std::unique_lock lock(mutex_);
  for (;;) {
    auto next = shares_.end();
    const auto ready = [&] {
      next = shares_.end();
      for (auto share = shares_.begin(); share != shares_.end(); ++share) {
        if (share->second.pending.empty()) continue;
        if (next == shares_.end() || share->second.waiting_since < next->second.waiting_since) next = share;
      }
      return next != shares_.end();
    };
    work_.wait(lock, [&] { return ready() || stop_; });
    if (stop_) return;
    text.clear();
    text.swap(next->second.pending);
    writing_ = true;
    space_.notify_all();
    lock.unlock();
    const bool written = write_all(text);
    lock.lock();
    writing_ = false;
    blocked_ = false;
    if (!written) {
      note_(std::string(fd_ == STDOUT_FILENO ? "stdout" : "stderr") + " cannot be written (" + std::strerror(errno) +
            "): nothing more is shown there; see the log files");
      closed_ = true;
      shares_.clear();
    }
    space_.notify_all();
  }
}

bool Console::write_all(std::string_view text) {
  while (!text.empty()) {
    const ssize_t written = ::write(fd_, text.data(), text.size());
    if (written >= 0) {
      text.remove_prefix(static_cast<std::size_t>(written));
    } else if (errno == EAGAIN) {
      // The descriptor is shared with whoever started us and may be non-blocking through them.
      pollfd wait{fd_, POLLOUT, 0};
      ::poll(&wait, 1, -1);
    } else if (errno != EINTR) {
      return false;
    }
  }
  return true;
}

}  // namespace launcher::guardian
