// This host's address in the cluster, and sockets.
#ifndef LAUNCHER_CROSSING_NETWORK_H
#define LAUNCHER_CROSSING_NETWORK_H

#include <sys/socket.h>

#include <cstdint>
#include <string>

#include "socket.h"

namespace launcher::crossing {

// A numeric address (IPv4, IPv6, the latter also with a scope) with a port. Throws std::invalid_argument.
struct Address {
  sockaddr_storage storage{};
  socklen_t length = 0;
  Address() = default;
  Address(const std::string& host, std::uint16_t port);
  const sockaddr* get() const noexcept { return reinterpret_cast<const sockaddr*>(&storage); }
  std::string host() const;  // numeric
  std::uint16_t port() const noexcept;
};

// The address that other hosts reach this one by, numeric: of `interface` where that is given; else the one that leads
// to `toward` (a name or an address, "": not known); else that of the first interface that is up and no loopback.
// Throws std::invalid_argument when `interface` has none.
std::string local_address(const std::string& interface, const std::string& toward);

// Listens at `host`, at a port that the system chooses; `bound` gets both. Throws std::system_error.
Socket listen_at(const std::string& host, Address& bound);

// Begins to connect without waiting. Throws std::system_error.
Socket begin_connect(const Address& to);

// What every connection of a leg is set to: no delay for short messages, and the end of an idle peer is noticed.
void prepare(const Socket& socket, bool control) noexcept;

}  // namespace launcher::crossing

#endif
