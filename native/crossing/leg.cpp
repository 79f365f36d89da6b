#include "leg.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <new>
#include <thread>
#include <utility>

#include "leg_wait.h"

namespace launcher::crossing {
namespace {

using namespace std::chrono_literals;

constexpr auto kLook = 50ms;
constexpr auto kQuestion = 1s;         // between two looks at what the peers' machines acknowledge
constexpr auto kObjection = 1s;        // how long another explanation is waited for
constexpr auto kFarewell = 500ms;      // to tell the others
constexpr auto kOtherThread = 1s;      // until it has seen that the leg was given up
constexpr unsigned kPollsBetween = 8;  // looks at the clock

std::string seconds(std::chrono::nanoseconds span) {
  std::array<char, 32> text;
  static_cast<void>(std::snprintf(text.data(), text.size(), "%.1f s", std::chrono::duration<double>(span).count()));
  return text.data();
}

}  // namespace

Leg::Leg(Options options)
    : options_(std::move(options)),
      gate_(options_.group, options_.rank, options_.size, options_.host),
      bell_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (!bell_) {
    collectives::throw_system("eventfd");
  }
}

void Leg::list_active() {
  active_.clear();
  for (const auto& [peer, one] : links_) {
    if (one->complete()) {
      active_.push_back(one.get());
    }
  }
}

void Leg::connect(std::span<const Endpoint> peers, std::size_t streams) {
  const Turn turn(*this);
  gate_.connect(peers, streams, links_, options_.timeout, [&] {
    check_stopped();
    if (options_.interrupted && options_.interrupted()) {
      throw LegFailure(-1, Kind::interrupted, "interrupted");
    }
    list_active();
    move_controls();
    for (const auto& [peer, one] : links_) {
      if (one->has(0) && !one->complete()) {
        one->receive_control();
      }
      if (one->troubled()) {
        ended(*one);
      }
    }
  });
  list_active();
}

bool Leg::connected(int peer) const noexcept {
  const auto found = forked() ? links_.end() : links_.find(peer);
  return found != links_.end() && found->second->complete();
}

Link& Leg::link(int peer) {
  const auto found = links_.find(peer);
  if (found == links_.end() || !found->second->complete()) {
    throw std::invalid_argument("rank " + std::to_string(peer) + " is not connected");
  }
  return *found->second;
}

void Leg::set_column(std::vector<int> ranks, std::size_t host, std::size_t short_bytes) {
  const Turn turn(*this);
  if (host >= ranks.size()) {
    throw std::invalid_argument("host is " + std::to_string(host) + " of " + std::to_string(ranks.size()));
  }
  by_host_.clear();
  for (std::size_t index = 0; index < ranks.size(); ++index) {
    by_host_.push_back(index == host ? nullptr : &link(ranks[index]));
  }
  column_ = std::move(ranks);
  host_ = host;
  short_bytes_ = std::min(short_bytes, kCallBytes);
  sources_.resize(column_.size());
}

void Leg::set_timeout(std::chrono::nanoseconds timeout) {
  const Turn turn(*this);
  options_.timeout = timeout;
}

// ---- messages

Pending Leg::send(int peer, const void* address, std::size_t bytes, std::uint32_t lane) {
  const Turn turn(*this);
  if (lane < static_cast<std::uint32_t>(Lane::data) || lane >= kLanes) {
    throw std::invalid_argument("lane is " + std::to_string(lane));
  }
  Link& to = link(peer);
  Pending request = to.send(address, bytes, lane);
  to.move_streams();
  return request;
}

Pending Leg::receive(int peer, void* address, std::size_t bytes, std::uint32_t lane) {
  const Turn turn(*this);
  if (lane < static_cast<std::uint32_t>(Lane::data) || lane >= kLanes) {
    throw std::invalid_argument("lane is " + std::to_string(lane));
  }
  return link(peer).receive(address, bytes, lane);
}

void Leg::wait(std::span<const Pending> requests) {
  const Turn turn(*this);
  for (const Pending& one : requests) {
    await(true, [&] { return one->done; }, [&] { return one->peer; });
  }
}

void Leg::progress() {
  const Turn turn(*this);
  move_streams();
}

// ---- calls

void Leg::send_call(const Header& header, const void* address, std::size_t bytes, int peer) {
  Link& to = link(peer);
  to.call(header, address, bytes);
  sent_bytes_ += sizeof header + bytes;
  ++messages_;
}

const std::byte* Leg::take_call(const Header& header, int peer, std::size_t bytes) {
  Link& from = link(peer);
  if (from.first_call() == nullptr) {
    Patience patience;
    while (from.first_call() == nullptr) {
      const bool sent = from.sending() && from.send_control();
      if (!from.receive_control() && !sent) {
        pause(patience, false, peer);
      }
    }
  }
  const std::byte* const call = from.first_call();
  if (std::memcmp(call, &header, sizeof header) != 0) {
    Header theirs;
    std::memcpy(&theirs, call, sizeof theirs);
    throw CallMismatch(peer, theirs);
  }
  if (from.first_bytes() < sizeof header + bytes) {
    throw LegFailure(peer, Kind::mismatch,
                     "it sent " + std::to_string(from.first_bytes() - sizeof header) + " bytes where " +
                         std::to_string(bytes) + " were expected");
  }
  return call + sizeof header;
}

void Leg::flush_calls() {
  for (Link* one : active_) {
    if (one->sending()) {
      await(false, [&] { return !one->sending() || one->calls_over(); }, [&] { return one->peer(); });
    }
  }
}

void Leg::call(const Header& header, const void* address, std::size_t bytes, std::span<const int> peers) {
  const Turn turn(*this);
  if (bytes > kCallBytes) {
    throw std::invalid_argument("a call of " + std::to_string(bytes) + " bytes");
  }
  for (const int peer : peers) {
    send_call(header, address, bytes, peer);
  }
}

const std::byte* Leg::take(const Header& header, int peer, std::size_t bytes) {
  const Turn turn(*this);
  return take_call(header, peer, bytes);
}

void Leg::free(int peer) {
  const Turn turn(*this);
  link(peer).free_call();
}

void Leg::flush() {
  const Turn turn(*this);
  flush_calls();
}

// ---- waiting

bool Leg::move_streams() {
  bool moved = false;
  for (Link* one : active_) {
    moved = one->move_streams() || moved;
  }
  return moved;
}

bool Leg::move_controls() {
  bool moved = false;
  for (Link* one : active_) {
    if (one->sending()) {
      moved = one->send_control() || moved;
    }
    moved = one->receive_control() || moved;
  }
  return moved;
}

void Leg::check_stopped() const {
  if (stopped_.load(std::memory_order_relaxed)) {
    throw LegFailure(options_.rank, Kind::left, "another thread of this rank gave the group up");
  }
}

void Leg::ended(const Link& one) const {
  throw LegFailure(one.peer(), one.noticed() ? Kind::notice : Kind::lost,
                   one.noticed() ? "it has given the group up" : one.why());
}

void Leg::look(Patience& patience, Clock::time_point now, bool streams, int peer) {
  for (const Link* one : active_) {
    if (one->troubled()) {
      ended(*one);
    }
  }
  const auto found = links_.find(peer);
  if (found != links_.end() && (streams ? found->second->streams_over() : found->second->calls_over())) {
    ended(*found->second);
  }
  if (now >= next_look_) {
    look_round(patience, now, peer);
  }
}

void Leg::look_round(Patience& patience, Clock::time_point now, int peer) {
  next_look_ = now + kLook;
  const auto found = links_.find(peer);
  if (found != links_.end() && found->second->moves() != patience.moves) {
    patience.moves = found->second->moves();
    patience.began = now;
  }
  const auto waited = now - patience.began;
  if (found != links_.end() && waited > kObjection && !found->second->objection().empty()) {
    throw LegFailure(peer, Kind::mismatch, found->second->objection());
  }
  if (options_.interrupted && options_.interrupted()) {
    throw LegFailure(peer, Kind::interrupted, "interrupted");
  }
  if (waited > options_.timeout) {
    throw LegFailure(peer, Kind::timeout, "nothing came for " + seconds(waited));
  }
  if (now > patience.next_question) {
    patience.next_question = now + kQuestion;
    for (const Link* one : active_) {
      if (one->unanswered()) {
        throw LegFailure(one->peer(), Kind::lost, "its host no longer answers");
      }
    }
  }
}

void Leg::glance(Patience& patience, int peer) {
  const auto now = Clock::now();
  if (now < next_look_) {
    return;
  }
  check_stopped();
  move_controls();
  for (const Link* one : active_) {
    if (one->noticed() && one->troubled()) {  // without a notice, what is still on its way may be all
      ended(*one);
    }
  }
  look_round(patience, now, peer);
}

void Leg::pause(Patience& patience, bool streams, int peer) {
  check_stopped();
  if (!patience.idle) {
    patience.polling = Clock::now();
    patience.polls = 0;
    patience.idle = true;
  }
  collectives::relax();
  if (++patience.polls % kPollsBetween != 0) {
    return;
  }
  auto now = Clock::now();
  if (now - patience.polling < options_.poll) {
    return;
  }
  if (move_controls()) {
    return;
  }
  look(patience, now, streams, peer);
  sleep(streams);
  patience.polls = kPollsBetween - 1;
}

void Leg::sleep(bool streams) {
  std::vector<pollfd> polled{{bell_.get(), POLLIN, 0}};
  for (Link* one : active_) {
    const int events = (one->listening() ? POLLIN : 0) | (one->sending() ? POLLOUT : 0);
    if (events != 0) {
      polled.push_back({one->control(), static_cast<short>(events), 0});
    }
    const bool reading = streams && one->waiting();
    for (const Stream& stream : one->streams()) {
      const bool read = reading && !stream.stalled() && !stream.ended();
      const int wanted = (read ? POLLIN : 0) | (streams && stream.sending() ? POLLOUT : 0);
      if (wanted != 0) {
        polled.push_back({stream.descriptor(), static_cast<short>(wanted), 0});
      }
    }
  }
  static_cast<void>(::poll(polled.data(), polled.size(), static_cast<int>(std::chrono::milliseconds(kLook).count())));
}

// ---- the end

std::vector<std::byte> Leg::notice_of(int peer, std::chrono::nanoseconds limit) {
  if (forked()) {
    return {};
  }
  const std::lock_guard lock(turn_);
  const auto found = links_.find(peer);
  if (found == links_.end() || closed_ || !found->second->has(0)) {
    return {};
  }
  Link& from = *found->second;
  const auto end = Clock::now() + limit;
  while (!from.noticed() && from.listening() && Clock::now() < end) {
    if (!from.receive_control() && from.listening()) {
      pollfd polled{from.control(), POLLIN, 0};
      static_cast<void>(::poll(&polled, 1, 10));
    }
  }
  return from.notice_text();
}

void Leg::say_farewell(std::span<const std::byte> notice, bool orderly) {
  for (const auto& [peer, link] : links_) {
    if (link->has(0)) {
      link->notice(notice.first(std::min(notice.size(), kNoticeBytes)), orderly);
    }
  }
  const auto end = Clock::now() + kFarewell;
  for (const auto& [peer, link] : links_) {
    while (link->sending() && !link->calls_over() && Clock::now() < end) {
      if (!link->send_control()) {
        pollfd polled{link->control(), POLLOUT, 0};
        static_cast<void>(::poll(&polled, 1, 10));
      }
    }
  }
}

void Leg::give_up(std::span<const std::byte> notice, bool orderly) noexcept {
  if (forked()) {
    return;  // neither the bell nor the peers are this process's
  }
  stopped_.store(true, std::memory_order_relaxed);
  const std::uint64_t one = 1;
  static_cast<void>(!::write(bell_.get(), &one, sizeof one));
  std::unique_lock lock(turn_, std::try_to_lock);
  for (const auto end = Clock::now() + kOtherThread; !lock && Clock::now() < end;) {
    std::this_thread::sleep_for(1ms);
    static_cast<void>(lock.try_lock());
  }
  if (!lock || closed_) {
    return;  // not locked: it ends its call by itself, and this rank's end closes the connections
  }
  closed_ = true;
  try {
    say_farewell(notice, orderly);
  } catch (const std::bad_alloc&) {
    // The peers see the connections end, and not why.
  }
  for (const auto& [peer, link] : links_) {
    link->shut();
  }
  gate_.close();
}

}  // namespace launcher::crossing
