#include "join.h"

#include <poll.h>
#include <sys/random.h>
#include <sys/resource.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <system_error>

#include "system.h"

namespace launcher::crossing {
namespace {

using collectives::throw_system;
using namespace std::chrono_literals;

constexpr std::array<char, 8> kMagic = {'L', 'N', 'C', 'H', 'L', 'E', 'G', '1'};
constexpr auto kHelloTime = 5s;
constexpr std::size_t kMostIncoming = 512;  // that have not said who they are
constexpr std::size_t kMostStreams = 16;
constexpr std::size_t kGroupBytes = 64;
constexpr int kRefusals = 20;
constexpr auto kAgain = 100ms;
constexpr auto kProbe = 1s;

struct Hello {
  std::array<char, 8> magic = kMagic;
  std::uint32_t rank = 0;
  std::uint32_t stream = 0;  // 0: control
  std::uint32_t streams = 0;
  std::uint32_t unused = 0;
  Secret secret{};
  std::array<char, kGroupBytes> group{};
};
static_assert(sizeof(Hello) <= 256);

// Takes the same time wherever they differ.
bool same(const Secret& one, const Secret& other) noexcept {
  unsigned difference = 0;
  for (std::size_t index = 0; index < one.size(); ++index) {
    difference |= static_cast<unsigned>(one[index] ^ other[index]);
  }
  return difference == 0;
}

std::array<char, kGroupBytes> padded(const std::string& group) noexcept {
  std::array<char, kGroupBytes> out{};
  std::memcpy(out.data(), group.data(), std::min(group.size(), out.size()));
  return out;
}

std::string seconds(std::chrono::nanoseconds span) {
  std::array<char, 32> text;
  static_cast<void>(std::snprintf(text.data(), text.size(), "%.3g s", std::chrono::duration<double>(span).count()));
  return text.data();
}

bool exhausted(int error) noexcept { return error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM; }

// No peer is to blame for it.
[[noreturn]] void throw_exhausted(int rank, int error) {
  std::string text = "it could not make a connection: " + std::generic_category().message(error);
  rlimit limit{};
  if (error == EMFILE && ::getrlimit(RLIMIT_NOFILE, &limit) == 0) {
    text += " (RLIMIT_NOFILE is " + std::to_string(limit.rlim_cur) +
            "); raise it with ulimit -n, or close files, before the group is made";
  } else if (error == ENFILE) {
    text += "; raise fs.file-max on that host";
  } else {
    text += "; free memory on that host";
  }
  throw LegFailure(rank, Kind::system, text);
}

// Throws LegFailure when this host has no such address, which may be the scope of an interface.
Address address_of(const Endpoint& peer) {
  try {
    return {peer.host, peer.port};
  } catch (const std::invalid_argument& error) {
    throw LegFailure(peer.rank, Kind::system,
                     peer.who + " listens at an address that this host cannot use: " + error.what() +
                         "; GLOO_SOCKET_IFNAME names the interface to use");
  }
}

std::string place(const Endpoint& peer) { return "at " + peer.host + " port " + std::to_string(peer.port); }

}  // namespace

Secret random_secret() {
  Secret out;
  if (::getrandom(out.data(), out.size(), 0) != static_cast<ssize_t>(out.size())) {
    throw_system("getrandom");
  }
  return out;
}

Gate::Gate(const std::string& group, int rank, int size, const std::string& host) : group_(group), size_(size) {
  Address bound;
  listener_ = listen_at(host, bound);
  own_.rank = rank;
  own_.host = host;
  own_.port = bound.port();
  own_.asks = random_secret();
  own_.answers = random_secret();
}

std::array<std::byte, Gate::kHello> Gate::hello_to(const Endpoint& peer, std::size_t stream,
                                                   std::size_t streams) const {
  Hello hello;
  hello.rank = static_cast<std::uint32_t>(own_.rank);
  hello.stream = static_cast<std::uint32_t>(stream);
  hello.streams = static_cast<std::uint32_t>(streams);
  hello.secret = peer.asks;
  hello.group = padded(group_);
  std::array<std::byte, kHello> out{};
  std::memcpy(out.data(), &hello, sizeof hello);
  return out;
}

std::array<std::byte, Gate::kReply> Gate::reply() const {
  std::array<std::byte, kReply> out{};
  std::memcpy(out.data(), kMagic.data(), kMagic.size());
  std::memcpy(out.data() + kMagic.size(), own_.answers.data(), own_.answers.size());
  return out;
}

void Gate::accept_some() {
  // Without descriptors left, accept4() fails whether or not there is anything to accept.
  for (pollfd polled{listener_.get(), POLLIN, 0}; ::poll(&polled, 1, 0) > 0;) {
    Socket socket(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!socket && exhausted(errno)) {
      throw_exhausted(own_.rank, errno);
    }
    if (!socket) {
      return;  // none is left, or this one has gone again
    }
    if (incoming_.size() == kMostIncoming) {
      incoming_.erase(incoming_.begin());  // the oldest one: members say who they are at once
    }
    incoming_.push_back({std::move(socket), Clock::now() + kHelloTime});
  }
}

bool Gate::read_hello(Incoming& one, Links& links) {
  const ssize_t found = ::recv(one.socket.get(), one.hello.data() + one.have, kHello - one.have, MSG_DONTWAIT);
  if (found < 0 && (errno == EAGAIN || errno == EINTR)) {
    return Clock::now() < one.deadline;
  }
  if (found <= 0) {
    return false;
  }
  one.have += static_cast<std::size_t>(found);
  if (one.have < kHello) {
    return true;
  }
  Hello hello;
  std::memcpy(&hello, one.hello.data(), sizeof hello);
  const bool known = same(hello.secret, own_.asks);
  const auto rank = static_cast<int>(hello.rank);
  if (!known || hello.magic != kMagic || hello.group != padded(group_) || hello.rank >= static_cast<unsigned>(size_) ||
      rank <= own_.rank || hello.streams < 1 || hello.streams > kMostStreams || hello.stream > hello.streams) {
    return false;
  }
  std::unique_ptr<Link>& link = links[rank];
  if (link == nullptr) {
    link = std::make_unique<Link>(rank, hello.streams);
  }
  if (link->connections() != hello.streams + 1 || link->has(hello.stream)) {
    return false;
  }
  const auto answer = reply();
  // Into an empty buffer: it is taken whole.
  if (::send(one.socket.get(), answer.data(), answer.size(), MSG_DONTWAIT | MSG_NOSIGNAL) !=
      static_cast<ssize_t>(answer.size())) {
    return false;
  }
  prepare(one.socket, hello.stream == 0);
  link->set(hello.stream, std::move(one.socket));
  return false;
}

Socket Gate::dial(const Address& to) const {
  try {
    return begin_connect(to);
  } catch (const std::system_error& error) {
    if (exhausted(error.code().value())) {
      throw_exhausted(own_.rank, error.code().value());
    }
    throw;
  }
}

void Gate::advance(Outgoing& one, std::size_t streams) {
  try {
    if (!one.socket) {
      if (Clock::now() >= one.again) {
        one.greeted = false;
        one.have = 0;
        one.socket = dial(one.address);
      }
      return;
    }
    int error = 0;
    socklen_t length = sizeof error;
    if (::getsockopt(one.socket.get(), SOL_SOCKET, SO_ERROR, &error, &length) == 0 && error != 0) {
      throw std::system_error(error, std::generic_category(), "connecting");
    }
    const auto hello = hello_to(*one.peer, one.stream, streams);
    const ssize_t found = ::send(one.socket.get(), hello.data(), hello.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
    if (found < 0 && (errno == EAGAIN || errno == EINTR)) {
      return;
    }
    if (found != static_cast<ssize_t>(hello.size())) {
      throw_system("connecting");
    }
    one.greeted = true;
  } catch (const std::system_error& error) {
    one.trouble = error.code().message();
    one.socket = Socket();
    one.again = Clock::now() + kAgain;
    ++one.refused;
  }
}

// True once the connection is part of a link.
bool Gate::read_reply(Outgoing& one, Links& links, std::size_t streams) {
  const ssize_t found = ::recv(one.socket.get(), one.reply.data() + one.have, kReply - one.have, MSG_DONTWAIT);
  if (found < 0 && (errno == EAGAIN || errno == EINTR)) {
    return false;
  }
  one.have += found > 0 ? static_cast<std::size_t>(found) : 0;
  Secret answer;
  std::memcpy(answer.data(), one.reply.data() + kMagic.size(), answer.size());
  if (found <= 0 || (one.have == kReply && !same(answer, one.peer->answers))) {
    one.trouble = found < 0 ? std::generic_category().message(errno) : "it is not the one that was to be there";
    one.socket = Socket();
    one.again = Clock::now() + kAgain;
    ++one.refused;
    return false;
  }
  if (one.have < kReply) {
    return false;
  }
  std::unique_ptr<Link>& link = links[one.peer->rank];
  if (link == nullptr) {
    link = std::make_unique<Link>(one.peer->rank, streams);
  }
  prepare(one.socket, one.stream == 0);
  link->set(one.stream, std::move(one.socket));
  return true;
}

void Gate::probe(Probe& one) {
  if (!one.socket && Clock::now() < one.again) {
    return;
  }
  int error = 0;
  if (!one.socket) {
    try {
      one.socket = dial(one.address);
    } catch (const std::system_error& refused) {
      error = refused.code().value();
    }
  }
  std::byte nothing;
  const ssize_t found = error != 0 ? -1 : ::recv(one.socket.get(), &nothing, sizeof nothing, MSG_DONTWAIT);
  if (error == 0 && found < 0) {
    error = errno;
  }
  if (error == EAGAIN || error == EINTR) {
    return;  // it is being connected, or is and stays so
  }
  one.socket = Socket();
  if (error == ECONNREFUSED) {
    if (++one.refused > 1 || one.reached) {
      throw LegFailure(one.peer->rank, Kind::lost,
                       one.peer->who + " has not connected and no longer listens " + place(*one.peer) +
                           "; see whether it is still alive, and whether the hosts may connect");
    }
    one.again = Clock::now() + kProbe;
  } else {
    // Closed by its end, or since nothing was said.
    one.reached = one.reached || error == 0 || error == ECONNRESET;
    one.again = Clock::now() + (one.reached ? 0s : kProbe);
  }
}

void Gate::connect(std::span<const Endpoint> peers, std::size_t streams, Links& links, std::chrono::nanoseconds limit,
                   const std::function<void()>& look) {
  std::vector<Outgoing> outgoing;
  const auto ready = [&](const Endpoint& peer) {
    const auto found = links.find(peer.rank);
    return found != links.end() && found->second->complete();
  };
  std::vector<Probe> probes;
  for (const Endpoint& peer : peers) {
    if (ready(peer)) {
      continue;
    }
    const Address address = address_of(peer);
    if (peer.rank > own_.rank) {
      probes.push_back({&peer, address, Clock::now() + kProbe});
      continue;
    }
    for (std::size_t stream = 0; stream <= streams; ++stream) {
      outgoing.push_back({&peer, address, stream, Socket()});
    }
  }
  const auto deadline = Clock::now() + limit;
  auto next_look = Clock::now() + 50ms;
  for (;;) {
    const auto missing = std::find_if_not(peers.begin(), peers.end(), ready);
    if (missing == peers.end()) {
      incoming_.clear();
      return;
    }
    const auto tried = std::find_if(outgoing.begin(), outgoing.end(), [&](const Outgoing& one) {
      return one.peer->rank == missing->rank && !one.trouble.empty();
    });
    const std::string trouble = tried != outgoing.end() ? ": " + tried->trouble : "";
    const auto given_up =
        std::find_if(outgoing.begin(), outgoing.end(), [](const Outgoing& one) { return one.refused > kRefusals; });
    if (given_up != outgoing.end()) {
      throw LegFailure(given_up->peer->rank, Kind::lost,
                       given_up->peer->who + " could not be reached " + place(*given_up->peer) + ": " +
                           given_up->trouble + "; see whether it is still alive, and whether the hosts may connect");
    }
    if (Clock::now() >= deadline) {
      const std::string what =
          missing->rank > own_.rank ? " did not connect" : " could not be reached " + place(*missing);
      throw LegFailure(missing->rank, Kind::timeout,
                       missing->who + what + " within " + seconds(limit) + trouble +
                           "; see whether it is still alive, and whether the hosts may connect to each other at all "
                           "ports");
    }
    std::vector<pollfd> polled{{listener_.get(), POLLIN, 0}};
    for (const Incoming& one : incoming_) {
      polled.push_back({one.socket.get(), POLLIN, 0});
    }
    for (const Outgoing& one : outgoing) {
      polled.push_back({one.socket.get(), static_cast<short>(one.greeted ? POLLIN : POLLOUT), 0});  // -1 is skipped
    }
    const bool unbegun = std::any_of(outgoing.begin(), outgoing.end(), [](const Outgoing& one) { return !one.socket; });
    static_cast<void>(::poll(polled.data(), polled.size(), unbegun ? 1 : 50));
    accept_some();
    std::erase_if(incoming_, [&](Incoming& one) { return !read_hello(one, links); });
    std::erase_if(outgoing, [&](Outgoing& one) {
      if (!one.greeted || !one.socket) {
        advance(one, streams);
        return false;
      }
      return read_reply(one, links, streams);
    });
    if (Clock::now() >= next_look) {
      look();
      for (Probe& one : probes) {
        if (!ready(*one.peer)) {
          probe(one);
        } else {
          one.socket = Socket();
        }
      }
      next_look = Clock::now() + 50ms;
    }
  }
}

}  // namespace launcher::crossing
