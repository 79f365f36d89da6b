#include "receiver.h"

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <utility>

namespace launcher::data {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kTickMs = 100;  // between two looks whether the user has interrupted

bool is_nul(std::byte byte) noexcept { return byte == std::byte{0}; }

std::string text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

}  // namespace

// Batches that are not lent. Leases hold it, so it outlives the receiver if they do.
struct Receiver::Pool {
  std::mutex mutex;
  std::vector<std::shared_ptr<Filled>> free;
};

Receiver::Receiver(ReceiverOptions options, int ring, Descriptor socket)
    : options_(std::move(options)),
      ring_(ring),
      socket_(std::move(socket)),
      process_(::getpid()),
      pool_(std::make_shared<Pool>()) {
  if (options_.batch == 0) {
    throw std::invalid_argument("a batch has one row at least");
  }
}

void Receiver::set_decoder(std::shared_ptr<StreamDecoder> decoder) {
  decoder_ = std::move(decoder);
  filling_.reset();
  pool_ = std::make_shared<Pool>();
}

void Receiver::check_process() const {
  if (::getpid() != process_) {
    throw ForkedError();
  }
}

// The next message, which stays where it is; nothing: interrupted.
std::optional<Message> Receiver::wait(const std::function<bool()>& interrupted) {
  const std::byte* at = ring_.next();
  if (at == nullptr) {
    const Clock::time_point before = Clock::now();
    bool closed = false;
    for (;;) {
      ring_.announce_reader_sleep(true);
      at = ring_.next();
      if (at != nullptr) {
        break;
      }
      if (closed) {
        fail_gone(true, "has closed it or has ended");
      }
      if (ring_.writer_sleeps()) {
        knock(socket_.get());
      }
      pollfd awaited{socket_.get(), POLLIN, 0};
      static_cast<void>(::poll(&awaited, 1, kTickMs));
      if (awaited.revents != 0) {
        closed = !answer(socket_.get());  // what it has sent before is still to be read
      } else if (interrupted && interrupted()) {
        ring_.announce_reader_sleep(false);
        return std::nullopt;
      }
    }
    ring_.announce_reader_sleep(false);
    const auto waited = std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - before);
    statistics_.waits_ns += static_cast<std::uint64_t>(waited.count());
  }
  Message message;
  std::memcpy(&message, at, sizeof message);
  if (message.bytes > ring_.capacity() || message_bytes(message.bytes) > ring_.available()) {
    throw std::logic_error("the ring of records holds a message of " + std::to_string(message.bytes) +
                           " bytes, which is more than it can");
  }
  return message;
}

// Its place may be written to again.
void Receiver::done(const Message& message) {
  const std::size_t bytes = message_bytes(message.bytes);
  ring_.release(bytes);
  unannounced_ += bytes;
  if (unannounced_ >= ring_.capacity() / 4) {  // a writer that waits for room gets enough of it to be worth waking
    unannounced_ = 0;
    if (ring_.writer_sleeps()) {
      knock(socket_.get());
    }
  }
}

// Of the next message, with the parts that came before it.
std::span<const std::byte> Receiver::payload(const Message& message) {
  const std::span<const std::byte> here(ring_.next() + sizeof(Message), message.bytes);
  if (gathered_.empty()) {
    return here;
  }
  gathered_.insert(gathered_.end(), here.begin(), here.end());
  return gathered_;
}

void Receiver::fail(const Message& message) {
  const std::span<const std::byte> words = payload(message);
  const auto nul = std::find_if(words.begin(), words.end(), is_nul);
  const auto file = static_cast<std::size_t>(nul - words.begin());
  failed_.emplace(static_cast<Problem>(message.flags), text_of(words.first(file)), message.a, message.b,
                  text_of(words.subspan(std::min(file + 1, words.size()))));
  gathered_.clear();
  done(message);
  throw *failed_;
}

void Receiver::gather(const Message& message) {
  const std::span<const std::byte> here(ring_.next() + sizeof(Message), message.bytes);
  gathered_.insert(gathered_.end(), here.begin(), here.end());
}

void Receiver::fail_gone(bool lost, const std::string& text) const {
  throw StreamLost(lost, options_.dealer + ", which reads the stream for this host, " + text);
}

std::optional<std::vector<std::byte>> Receiver::begin(std::uint64_t epoch, const std::string& file,
                                                      const std::function<bool()>& interrupted) {
  check_process();
  ended_ = true;
  failed_.reset();
  gathered_.clear();
  good_.clear();
  steps_ = bad_ = 0;
  if (filling_) {
    filling_->batch.rows = 0;
  }
  file_ = std::make_unique<File>(File::OfStream{}, file);
  ++run_;
  for (;;) {
    const std::optional<Message> message = wait(interrupted);
    if (!message) {
      --run_;  // to be asked for again
      return std::nullopt;
    }
    if (message->run < run_) {
      done(*message);  // of an epoch that this rank has left before its end
    } else if (message->kind == MessageKind::error) {
      fail(*message);
    } else if (message->kind == MessageKind::part) {
      gather(*message);
      done(*message);
    } else if (message->kind != MessageKind::begin || message->a != epoch || message->run != run_) {
      fail_gone(false, "is at another epoch; all ranks must begin the same epochs in the same order");
    } else {
      const std::span<const std::byte> record = payload(*message);
      std::vector<std::byte> out(record.begin(), record.end());
      gathered_.clear();
      done(*message);
      ended_ = false;
      return out;
    }
  }
}

Lease Receiver::next(const std::function<bool()>& interrupted) {
  check_process();
  if (failed_) {
    throw *failed_;
  }
  if (ended_) {
    return nullptr;
  }
  if (!decoder_) {
    throw std::logic_error("no decoder was set for the records of this stream");
  }
  if (!filling_) {
    filling_ = free_slot();
  }
  for (;;) {
    const std::optional<Message> message = wait(interrupted);
    if (!message) {
      return nullptr;
    }
    if (message->run != run_) {
      fail_gone(false,
                "has left this epoch after " + std::to_string(steps_) + " steps; all ranks must leave it at the same");
    }
    switch (message->kind) {
      case MessageKind::part:
        gather(*message);
        break;
      case MessageKind::record:
        take(*message);
        break;
      case MessageKind::commit: {
        const std::shared_ptr<Filled> filled = std::exchange(filling_, nullptr);
        if (message->a != steps_ || message->b != filled->batch.rows) {
          throw std::logic_error("the batch of step " + std::to_string(message->a) + " is not what was dealt");
        }
        done(*message);
        filled->step = steps_++;
        ++statistics_.batches;
        statistics_.records += filled->batch.rows;
        return lend(filled);
      }
      case MessageKind::end:
        ended_ = true;
        filling_->batch.rows = 0;
        done(*message);
        return nullptr;
      case MessageKind::error:
        fail(*message);
      default:
        throw std::logic_error("the ring of records holds a message of an unknown kind");
    }
    done(*message);
  }
}

void Receiver::take(const Message& message) {
  const std::span<const std::byte> record = payload(message);
  const std::size_t row = filling_->batch.rows;
  if (row >= filling_->batch.capacity) {
    throw std::logic_error("more records were dealt than a batch has rows");
  }
  const bool padding = (message.flags & kPadding) != 0;
  bool good = !padding;
  try {
    decoder_->decode(record, {0, message.a, record.size(), message.b}, *file_, row, filling_->batch);
    if (good && options_.on_bad == OnBad::substitute) {
      good_.assign(record.begin(), record.end());
    }
  } catch (const DataError& error) {
    good = false;
    stand_in(error);
  }
  filling_->mask[row] = good ? 1 : 0;
  filling_->records[row] = padding ? kNowhere : message.b;
  ++filling_->batch.rows;
  gathered_.clear();
}

// Puts the last good record where the one that gave `error` should be, or throws it.
void Receiver::stand_in(const DataError& error) {
  ++bad_;
  if (options_.on_bad == OnBad::raise || good_.empty() || (options_.bad_limit != 0 && bad_ > options_.bad_limit)) {
    failed_ = error;
    throw *failed_;
  }
  decoder_->decode(good_, {0, 0, good_.size(), 0}, *file_, filling_->batch.rows, filling_->batch);
  ++statistics_.substituted;
  if (statistics_.first_bad.empty()) {
    statistics_.first_bad = error.what();
  }
}

std::shared_ptr<Filled> Receiver::free_slot() {
  {
    const std::lock_guard lock(pool_->mutex);
    if (!pool_->free.empty()) {
      std::shared_ptr<Filled> slot = std::move(pool_->free.back());
      pool_->free.pop_back();
      slot->batch.rows = 0;
      return slot;
    }
  }
  auto slot = std::make_shared<Filled>(decoder_->fields(), options_.batch, EngineOptions{});
  slot->mask.resize(options_.batch);
  slot->records.resize(options_.batch);
  return slot;
}

Lease Receiver::lend(std::shared_ptr<Filled> filled) const {
  const Filled* batch = filled.get();
  return {batch, [filled = std::move(filled), pool = pool_](const Filled*) mutable {
            const std::lock_guard lock(pool->mutex);
            pool->free.push_back(std::move(filled));
          }};
}

}  // namespace launcher::data
