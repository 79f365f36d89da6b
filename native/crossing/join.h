// How the ranks of a group are connected: each listens at an address that it has told the others through their store,
// and whoever connects has to say first which rank of which group it is, with a secret that only the store's members
// know. Connections of anybody else are dropped.
#ifndef LAUNCHER_CROSSING_JOIN_H
#define LAUNCHER_CROSSING_JOIN_H

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "link.h"
#include "network.h"

namespace launcher::crossing {

using Secret = std::array<std::byte, 16>;
Secret random_secret();  // throws std::system_error

struct Endpoint {
  int rank = 0;
  std::string who;  // for messages
  std::string host;
  std::uint16_t port = 0;
  Secret asks{};     // what a connector has to know
  Secret answers{};  // what it is answered with
};

using Links = std::map<int, std::unique_ptr<Link>>;

class Gate {
 public:
  // `group`: the same on all members, other groups have another one; 64 bytes at most count.
  Gate(const std::string& group, int rank, int size, const std::string& host);
  const Endpoint& own() const noexcept { return own_; }
  // Connects to those of the peers that `links` lacks, over `streams` streams each; all of them call it. `look` is
  // called about every 50 ms, and may throw. Throws LegFailure naming the peer that was not reached, or this rank when
  // it has no descriptors left.
  void connect(std::span<const Endpoint> peers, std::size_t streams, Links& links, std::chrono::nanoseconds limit,
               const std::function<void()>& look);
  void close() noexcept { listener_ = Socket(); }

 private:
  static constexpr std::size_t kHello = 256;
  static constexpr std::size_t kReply = 32;
  using Clock = std::chrono::steady_clock;
  struct Incoming {
    Socket socket;
    Clock::time_point deadline;
    std::size_t have = 0;
    std::array<std::byte, kHello> hello{};
  };
  struct Outgoing {
    const Endpoint* peer;
    Address address;
    std::size_t stream;
    Socket socket;
    bool greeted = false;
    std::size_t have = 0;
    std::array<std::byte, kReply> reply{};
    int refused = 0;
    Clock::time_point again{};
    std::string trouble = {};
  };
  // Of a peer that has to connect to this rank: where it listens, a connection that says nothing ends with it.
  struct Probe {
    const Endpoint* peer;
    Address address;
    Clock::time_point again;
    Socket socket = {};
    bool reached = false;
    int refused = 0;
  };
  std::array<std::byte, kHello> hello_to(const Endpoint& peer, std::size_t stream, std::size_t streams) const;
  std::array<std::byte, kReply> reply() const;
  void accept_some();
  bool read_hello(Incoming& one, Links& links);  // false: it is to be dropped, or has become part of a link
  void advance(Outgoing& one, std::size_t streams);
  bool read_reply(Outgoing& one, Links& links, std::size_t streams);
  void probe(Probe& one);  // throws when the peer is gone
  // To a peer; throws LegFailure for what this rank lacks itself, std::system_error for the rest.
  Socket dial(const Address& to) const;

  std::string group_;
  int size_;
  Endpoint own_;
  Socket listener_;
  std::vector<Incoming> incoming_;
};

}  // namespace launcher::crossing

#endif
