#include "pump.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <system_error>

namespace launcher::guardian {

namespace {

constexpr std::size_t kReadBytes = 256U * 1024U;
// A drain takes what a pipe can hold (1 MiB at most, /proc/sys/fs/pipe-max-size) and leaves a flood to the thread.
constexpr std::size_t kDrainBytes = 1024U * 1024U;
constexpr std::size_t kOutTailBytes = 8U * 1024U;
constexpr std::size_t kErrTailBytes = 32U * 1024U;

}  // namespace

RankPump::Stream::Stream(StreamOptions options, const std::string& prefix, std::uint64_t cap_bytes,
                         std::size_t tail_limit)
    : fd(options.pipe_fd),
      console(options.console),
      file(std::move(options.path), cap_bytes),
      assembler(prefix),
      tail_bytes(tail_limit) {
  // A larger pipe lets a rank write on while this thread waits for a disk.
  static_cast<void>(::fcntl(fd, F_SETPIPE_SZ, static_cast<int>(kDrainBytes)));
  static_cast<void>(::fcntl(fd, F_SETFL, O_NONBLOCK));
}

RankPump::RankPump(int slot, std::string prefix, bool raw, std::uint64_t cap_bytes, StreamOptions out,
                   StreamOptions err, Note note)
    : slot_(slot),
      raw_(raw),
      note_(std::move(note)),
      out_(std::move(out), prefix, cap_bytes, kOutTailBytes),
      err_(std::move(err), prefix, cap_bytes, kErrTailBytes),
      chunk_(kReadBytes, '\0'),
      wake_fd_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (wake_fd_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
  try {
    thread_ = std::thread([this] { run(); });
  } catch (const std::system_error&) {
    ::close(wake_fd_);
    throw;
  }
}

RankPump::~RankPump() {
  request_stop();
  thread_.join();
  ::close(wake_fd_);
}

void RankPump::request_stop() {
  stop_ = true;
  urgent_ = true;
  const std::uint64_t one = 1;
  static_cast<void>(!::write(wake_fd_, &one, sizeof one));
}

RankPump::Tails RankPump::drain(std::chrono::milliseconds limit) {
  std::unique_lock lock(mutex_);
  const std::uint64_t ticket = ++drain_wanted_;
  urgent_ = true;
  const std::uint64_t one = 1;
  static_cast<void>(!::write(wake_fd_, &one, sizeof one));
  drained_.wait_for(lock, limit, [&] { return ended_ || drain_done_ >= ticket; });
  urgent_ = stop_.load();
  return {out_.tail, err_.tail};
}

void RankPump::run() {
  while (!stop_ && (out_.fd >= 0 || err_.fd >= 0)) {
    std::array<pollfd, 3> waits{{{wake_fd_, POLLIN, 0}, {out_.fd, POLLIN, 0}, {err_.fd, POLLIN, 0}}};
    const bool unfinished = out_.assembler.has_partial() || err_.assembler.has_partial();
    const int timeout = unfinished ? static_cast<int>(LineAssembler::kIdleFlush.count() / 4) : -1;
    if (::poll(waits.data(), waits.size(), timeout) < 0 && errno != EINTR) break;

    std::uint64_t wanted = 0;
    if ((waits[0].revents & POLLIN) != 0) {
      std::uint64_t count = 0;
      static_cast<void>(!::read(wake_fd_, &count, sizeof count));
      const std::lock_guard lock(mutex_);
      wanted = drain_wanted_;
    }
    if (wanted != 0) {
      for (Stream* stream : {&out_, &err_}) {
        for (std::size_t taken = 0; taken < kDrainBytes && read_some(*stream, kReadBytes); taken += kReadBytes) {
        }
        const std::size_t lines = stream->assembler.finish(text_);
        show(*stream, lines);
      }
      const std::lock_guard lock(mutex_);
      drain_done_ = wanted;
      drained_.notify_all();
    }
    if ((waits[1].revents & (POLLIN | POLLHUP | POLLERR)) != 0) read_some(out_, kReadBytes);
    if ((waits[2].revents & (POLLIN | POLLHUP | POLLERR)) != 0) read_some(err_, kReadBytes);
    const auto now = LineAssembler::Clock::now();
    for (Stream* stream : {&out_, &err_}) show(*stream, stream->assembler.flush_idle(now, text_));
  }
  for (Stream* stream : {&out_, &err_}) show(*stream, stream->assembler.finish(text_));
  const std::lock_guard lock(mutex_);
  ended_ = true;
  drained_.notify_all();
}

// One read of at most `limit` bytes. False when there is nothing (more) to read now.
bool RankPump::read_some(Stream& stream, std::size_t limit) {
  if (stream.fd < 0) return false;
  const ssize_t got = ::read(stream.fd, chunk_.data(), std::min(limit, chunk_.size()));
  if (got > 0) {
    take(stream, std::string_view(chunk_.data(), static_cast<std::size_t>(got)));
    return true;
  }
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) return false;
  show(stream, stream.assembler.finish(text_));
  stream.close();
  return false;
}

void RankPump::take(Stream& stream, std::string_view bytes) {
  bytes_.fetch_add(bytes.size(), std::memory_order_relaxed);
  {
    const std::lock_guard lock(mutex_);
    if (bytes.size() >= stream.tail_bytes) {
      stream.tail.assign(bytes.substr(bytes.size() - stream.tail_bytes));
    } else {
      stream.tail.append(bytes);
      if (stream.tail.size() > 2 * stream.tail_bytes) stream.tail.erase(0, stream.tail.size() - stream.tail_bytes);
    }
  }
  // The console first: a slow disk must not make a live line late.
  if (stream.console != nullptr) {
    if (raw_) {
      stream.console->push(slot_, bytes, static_cast<std::size_t>(std::count(bytes.begin(), bytes.end(), '\n')),
                           urgent_);
    } else {
      show(stream, stream.assembler.feed(bytes, LineAssembler::Clock::now(), text_));
    }
  }
  stream.file.write(bytes);
  std::string error = stream.file.take_error();
  if (!error.empty()) note_(std::move(error));
}

void RankPump::show(Stream& stream, std::size_t lines) {
  if (stream.console != nullptr && !text_.empty()) stream.console->push(slot_, text_, lines, urgent_);
  text_.clear();
}

void RankPump::Stream::close() {
  if (fd >= 0) ::close(fd);
  fd = -1;
}

bool RankPump::ended() {
  const std::lock_guard lock(mutex_);
  return ended_;
}

}  // namespace launcher::guardian
