#include "pipe.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <system_error>

namespace launcher::data {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kLargestPipe = 1 << 20;  // what fs.pipe-max-size allows everybody unless it was changed
constexpr int kSmallestPipe = 1 << 17;
constexpr auto kLook = std::chrono::milliseconds(10);  // between two looks for a FIFO that does not exist yet

std::string reason() { return std::generic_category().message(errno); }

int milliseconds_until(Clock::time_point deadline) {
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now()).count();
  return static_cast<int>(std::clamp<long long>(left, 0, 1'000'000));
}

// As large as it may become: each wait of reader or writer is then for more bytes.
void enlarge(int fifo) noexcept {
  for (int bytes = kLargestPipe; bytes >= kSmallestPipe && ::fcntl(fifo, F_SETPIPE_SZ, bytes) < 0; bytes /= 2) {
  }
}

}  // namespace

void Pipe::fail(Problem problem, const std::string& text) const {
  throw DataError(problem, options_.path, received_, kNowhere,
                  "channel " + options_.channel + ", epoch " + std::to_string(options_.epoch) + ": " + text);
}

std::string Pipe::limit() const {
  const auto seconds = std::chrono::duration<double>(options_.timeout).count();
  std::string text = std::to_string(seconds);
  text.erase(text.find_last_not_of('0') + 1);
  if (text.back() == '.') {
    text.pop_back();
  }
  return text + " s";
}

bool Pipe::open(int stop) {
  const Clock::time_point deadline = Clock::now() + options_.timeout;
  for (;;) {
    // Without O_NONBLOCK this would wait for a writer, and nothing could end it.
    fifo_ = Descriptor(::open(options_.path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC));
    if (fifo_) {
      break;
    }
    if (errno != ENOENT && errno != EINTR) {
      fail(Problem::unreadable, "can not be opened: " + reason());
    }
    if (Clock::now() >= deadline) {
      fail(Problem::unreadable,
           "the FIFO did not appear in " + limit() +
               "; see whether the channel's input mode is Pipe, and whether the epoch before it was read to its end "
               "or closed");
    }
    pollfd stopped{stop, POLLIN, 0};
    if (::poll(&stopped, 1, static_cast<int>(kLook.count())) == 1) {
      return false;
    }
  }
  struct stat info;
  if (::fstat(fifo_.get(), &info) != 0) {
    fail(Problem::unreadable, "can not be looked at: " + reason());
  }
  if (!S_ISFIFO(info.st_mode) && !S_ISREG(info.st_mode)) {
    fail(Problem::unreadable, "is neither a FIFO nor a file; see whether the channel's input mode is Pipe");
  }
  if (S_ISFIFO(info.st_mode)) {
    enlarge(fifo_.get());
  }
  return true;
}

std::optional<std::size_t> Pipe::read(std::byte* to, std::size_t bytes, int stop) {
  if (!fifo_ && !open(stop)) {
    return std::nullopt;
  }
  const Clock::time_point deadline = Clock::now() + options_.timeout;
  bool first = received_ == 0;  // a FIFO that no writer has opened yet reads as one that has ended: ask poll() first
  for (;;) {
    if (!first) {
      const ssize_t count = ::read(fifo_.get(), to, bytes);
      if (count >= 0) {
        received_ += static_cast<std::uint64_t>(count);
        return static_cast<std::size_t>(count);
      }
      if (errno != EAGAIN && errno != EINTR) {
        fail(Problem::unreadable, "can not be read: " + reason());
      }
    }
    std::array<pollfd, 2> awaited{pollfd{fifo_.get(), POLLIN, 0}, pollfd{stop, POLLIN, 0}};
    if (::poll(awaited.data(), awaited.size(), milliseconds_until(deadline)) < 0 && errno != EINTR) {
      fail(Problem::unreadable, "can not be waited for: " + reason());
    }
    if (awaited[1].revents != 0) {
      return std::nullopt;
    }
    if (awaited[0].revents != 0) {
      first = false;
    } else if (Clock::now() >= deadline) {
      fail(Problem::unreadable,
           received_ == 0 ? "no writer sent anything in " + limit() + "; see whether what fills the FIFO is alive"
                          : "the writer sent nothing for " + limit() + ", after " + std::to_string(received_) +
                                " bytes; see whether what fills the FIFO is alive");
    }
  }
}

}  // namespace launcher::data
