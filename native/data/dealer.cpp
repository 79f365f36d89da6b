#include "dealer.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <new>
#include <optional>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace launcher::data {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kReadBytes = std::size_t{256} << 10;  // at a time: what is read stays in the second-level cache
constexpr std::size_t kLongest = std::size_t{4} << 30;      // of a record: what is longer has no ends
// Before a rank sees them, unless nothing more is there to be read: each look at them moves a cache line, and on a core
// that both share each costs two changes of threads.
constexpr std::size_t kQuietBytes = kReadBytes;
constexpr int kTickMs = 1000;  // a knock that was lost costs no more than this

std::uint64_t nanoseconds_since(Clock::time_point begin) {
  return static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - begin).count());
}

}  // namespace

struct Dealer::Epoch {
  std::string file;
  std::uint64_t number = 0, skip = 0;
  std::uint64_t framed = 0;  // records of the stream so far
  std::uint64_t offset = 0;  // bytes
  std::uint64_t dealt = 0;   // records, in the order of the window, those that are skipped among them
  std::uint64_t steps = 0;
  bool over = false;           // no step follows
  std::vector<std::byte> any;  // a record to pad with
};

Dealer::Dealer(DealerOptions options, std::vector<Outlet> outlets)
    : options_(std::move(options)), stop_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)), process_(::getpid()) {
  if (!stop_) {
    throw std::system_error(errno, std::generic_category(), "eventfd");
  }
  if (options_.batch == 0 || outlets.empty() || options_.first + outlets.size() > options_.world ||
      options_.window == 0 || !options_.make_framer) {
    throw std::invalid_argument("a dealer wants a batch and a window of 1 at least, and its ranks inside the world");
  }
  for (Outlet& outlet : outlets) {
    lines_.push_back(std::make_unique<Line>(outlet.ring.get(), std::move(outlet.socket)));
  }
}

Dealer::~Dealer() { close(); }

void Dealer::check_process() const {
  if (::getpid() != process_) {
    throw std::logic_error("this stream belongs to the process that opened it; open it again after a fork");
  }
}

void Dealer::start(std::unique_ptr<ByteStream> stream, std::string file, std::uint64_t epoch, std::uint64_t skip) {
  check_process();
  stop();
  ++run_;
  thread_ = std::thread([this, stream = std::move(stream), file = std::move(file), epoch, skip]() mutable {
    run(std::move(stream), file, epoch, skip);
  });
}

void Dealer::refuse(const DataError& error) {
  check_process();
  stop();
  ++run_;
  write_error(error);
  wake_readers();
}

void Dealer::stop() noexcept {
  if (::getpid() != process_) {
    if (thread_.joinable()) {
      thread_.detach();  // it did not come along
    }
    return;
  }
  if (thread_.joinable()) {
    std::uint64_t count = 1;
    static_cast<void>(::write(stop_.get(), &count, sizeof count));
    thread_.join();
    static_cast<void>(::read(stop_.get(), &count, sizeof count));
  }
}

void Dealer::close() noexcept {
  stop();
  lines_.clear();  // with their sockets: who waits is told
}

DealerStatistics Dealer::statistics() const noexcept {
  DealerStatistics out;
  out.records = records_.load(std::memory_order_relaxed);
  out.bytes = bytes_.load(std::memory_order_relaxed);
  out.input_ns = input_ns_.load(std::memory_order_relaxed);
  out.room_ns = room_ns_.load(std::memory_order_relaxed);
  return out;
}

void Dealer::run(std::unique_ptr<ByteStream> stream, const std::string& file, std::uint64_t number,
                 std::uint64_t skip) {
  Epoch epoch;
  epoch.file = file;
  epoch.number = number;
  epoch.skip = skip;
  try {
    read_all(*stream, epoch);
    if (epoch.over) {
      write_all({MessageKind::end, 0, epoch.steps});
    }
  } catch (const DataError& error) {
    write_error(error);
  } catch (const std::exception& error) {
    write_error({Problem::unreadable, file, epoch.offset, epoch.framed, error.what()});
  }
  wake_readers();
}

// To the end, unless it is stopped, or the other hosts have no more steps.
void Dealer::read_all(ByteStream& stream, Epoch& epoch) {
  const std::unique_ptr<Framer> framer = options_.make_framer();
  ShuffleWindow window(options_.window, options_.window_bytes, options_.seed, epoch.number);
  const auto deal_it = [&](const StreamRecord& record) { return deal(record, epoch); };
  Buffer memory(2 * kReadBytes);
  std::size_t begin = 0, end = 0;
  for (bool last = false; !last;) {
    if (memory.capacity() - end < kReadBytes) {
      if (begin > kReadBytes / 2) {
        std::memmove(memory.data(), memory.data() + begin, end - begin);
        end -= begin;
        begin = 0;
      }
      memory.reserve(end + kReadBytes, end);
    }
    wake_readers();
    const Clock::time_point before = Clock::now();
    const std::optional<std::size_t> count = stream.read(memory.data() + end, kReadBytes, stop_.get());
    input_ns_.fetch_add(nanoseconds_since(before), std::memory_order_relaxed);
    if (!count) {
      return;
    }
    last = *count == 0;
    end += *count;
    bytes_.fetch_add(*count, std::memory_order_relaxed);
    const std::uint64_t framed = epoch.framed;
    for (;;) {
      const std::span<const std::byte> rest(memory.data() + begin, end - begin);
      const Framed found = framer->next(rest, last, {epoch.file, epoch.offset, epoch.framed});
      if (found.end == 0) {
        break;
      }
      const StreamRecord record{rest.subspan(found.begin, found.end - found.begin), epoch.offset + found.begin,
                                epoch.framed};
      if (record.number == 0) {
        epoch.any.assign(record.bytes.begin(), record.bytes.end());
        const std::string heading = framer->heading();
        std::vector<std::byte> sample(heading.size() + record.bytes.size());
        std::memcpy(sample.data(), heading.data(), heading.size());
        std::memcpy(sample.data() + heading.size(), record.bytes.data(), record.bytes.size());
        if (!write_all({MessageKind::begin, 0, epoch.number}, sample)) {
          return;
        }
      }
      if (!(options_.window == 1 ? deal_it(record) : window.push(record, deal_it))) {
        return;
      }
      begin += found.end;
      epoch.offset += found.end;
      ++epoch.framed;
    }
    records_.fetch_add(epoch.framed - framed, std::memory_order_relaxed);
    if (begin == end) {
      begin = end = 0;
    } else if (end - begin > kLongest) {
      throw DataError(Problem::malformed, epoch.file, epoch.offset, epoch.framed,
                      "a record of more than " + std::to_string(kLongest) + " bytes; see whether the format is right");
    }
  }
  if (epoch.framed == 0) {
    throw DataError(Problem::truncated, epoch.file, 0, kNowhere,
                    "the stream has no records; see what the channel's S3 prefix or manifest holds");
  }
  if (window.drain(deal_it)) {
    finish(epoch);
  }
}

bool Dealer::deal(const StreamRecord& record, Epoch& epoch) {
  const std::uint64_t position = epoch.dealt++;
  if (position < epoch.skip) {
    return true;
  }
  const std::uint64_t all = options_.world * options_.batch;
  const std::uint64_t place = (position - epoch.skip) % all;
  const std::uint64_t rank = place / options_.batch - options_.first;  // wraps around where it is below
  if (rank < lines_.size() &&
      !write_parts(*lines_[rank], {MessageKind::record, 0, record.offset, record.number}, record.bytes)) {
    return false;
  }
  return place + 1 < all || settle(epoch, true, all);
}

// What is left when the stream has ended.
void Dealer::finish(Epoch& epoch) {
  const std::uint64_t left =
      epoch.dealt > epoch.skip ? (epoch.dealt - epoch.skip) % (options_.world * options_.batch) : 0;
  if (options_.tail != Tail::drop && left != 0 && !settle(epoch, true, left)) {
    return;
  }
  while (settle(epoch, false, 0)) {  // the other hosts may have more
  }
}

// A step for which `count` records were dealt to all ranks. False: it does not take place, and none after it; or
// stopped.
bool Dealer::settle(Epoch& epoch, bool ready, std::uint64_t count) {
  wake_readers();
  if (!(options_.agree ? options_.agree(epoch.steps, ready) : ready)) {
    epoch.over = true;
    return false;
  }
  for (std::size_t i = 0; i < lines_.size(); ++i) {
    const std::uint64_t before = (options_.first + i) * options_.batch;
    std::uint64_t rows = std::min(count > before ? count - before : 0, options_.batch);
    while (options_.tail == Tail::pad && rows < options_.batch) {
      if (!write_parts(*lines_[i], {MessageKind::record, kPadding}, epoch.any)) {
        return false;
      }
      ++rows;
    }
    if (!write(*lines_[i], {MessageKind::commit, 0, epoch.steps, rows}, {})) {
      return false;
    }
  }
  ++epoch.steps;
  wake_readers();
  return true;
}

// A large payload goes in several messages, so that it need not fit into the ring.
bool Dealer::write_parts(Line& line, const Heading& heading, std::span<const std::byte> payload) {
  const std::size_t most = line.ring.capacity() / 4 - sizeof(Message);
  while (payload.size() > most) {
    if (!write(line, {MessageKind::part}, payload.first(most))) {
      return false;
    }
    payload = payload.subspan(most);
  }
  return write(line, heading, payload);
}

bool Dealer::write(Line& line, const Heading& heading, std::span<const std::byte> payload) {
  const std::size_t bytes = message_bytes(payload.size());
  if (!wait_for_room(line, bytes)) {
    return false;
  }
  if (line.gone) {
    return true;  // nobody misses it
  }
  std::byte* to = line.ring.written();
  new (to) Message{heading.kind, heading.flags, run_, payload.size(), heading.a, heading.b};
  if (!payload.empty()) {
    std::memcpy(to + sizeof(Message), payload.data(), payload.size());
  }
  line.ring.append(bytes);
  line.quiet += bytes;
  if (line.quiet >= kQuietBytes) {
    wake(line);
  }
  return true;
}

bool Dealer::write_all(const Heading& heading, std::span<const std::byte> payload) {
  return std::all_of(lines_.begin(), lines_.end(),
                     [&](const std::unique_ptr<Line>& line) { return write_parts(*line, heading, payload); });
}

void Dealer::write_error(const DataError& error) {
  const std::string prefix = DataError(error.problem(), error.file(), error.offset(), error.record(), "").what();
  const std::string words = error.file() + '\0' + std::string(error.what()).substr(prefix.size());
  write_all({MessageKind::error, static_cast<std::uint32_t>(error.problem()), error.offset(), error.record()},
            std::as_bytes(std::span(words)));
}

// False: stopped. Also returns when the rank is gone.
bool Dealer::wait_for_room(Line& line, std::size_t bytes) {
  if (line.gone || line.ring.has_room(bytes)) {
    return true;
  }
  wake_readers();
  const Clock::time_point before = Clock::now();
  bool stopped = false;
  for (;;) {
    line.ring.announce_writer_sleep(true);
    if (line.gone || stopped || line.ring.has_room(bytes)) {
      break;
    }
    std::array<pollfd, 2> awaited{pollfd{line.socket.get(), POLLIN, 0}, pollfd{stop_.get(), POLLIN, 0}};
    static_cast<void>(::poll(awaited.data(), awaited.size(), kTickMs));
    stopped = awaited[1].revents != 0;
    line.gone = awaited[0].revents != 0 && !answer(line.socket.get());
  }
  line.ring.announce_writer_sleep(false);
  room_ns_.fetch_add(nanoseconds_since(before), std::memory_order_relaxed);
  return !stopped;
}

void Dealer::wake(Line& line) noexcept {
  line.quiet = 0;
  if (line.ring.publish()) {
    knock(line.socket.get());
  }
}

void Dealer::wake_readers() noexcept {
  for (const std::unique_ptr<Line>& line : lines_) {
    if (line->quiet != 0 && !line->gone) {
      wake(*line);
    }
  }
}

}  // namespace launcher::data
