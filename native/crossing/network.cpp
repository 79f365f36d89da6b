#include "network.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "system.h"

namespace launcher::crossing {
namespace {

using collectives::throw_system;

constexpr int kBacklog = 1024;
constexpr int kControlBuffer = 512 * 1024;  // a call and a notice fit at once
constexpr int kUnsent = 512 * 1024;
constexpr int kIdleS = 15, kIntervalS = 5, kProbes = 4;

socklen_t length_of(sa_family_t family) noexcept {
  return family == AF_INET ? sizeof(sockaddr_in) : family == AF_INET6 ? sizeof(sockaddr_in6) : 0;
}

Address copy_of(const sockaddr* from) noexcept {
  Address out;
  out.length = length_of(from->sa_family);
  std::memcpy(&out.storage, from, out.length);
  return out;
}

bool link_local(const sockaddr* address) noexcept {
  return address->sa_family == AF_INET6 &&
         IN6_IS_ADDR_LINKLOCAL(&reinterpret_cast<const sockaddr_in6*>(address)->sin6_addr);
}

// Of one interface, or of all that are up and no loopback; IPv4 first, link-local last. "": none.
std::string address_on(const std::string& interface) {
  ifaddrs* found = nullptr;
  if (::getifaddrs(&found) != 0) {
    throw_system("getifaddrs");
  }
  const std::unique_ptr<ifaddrs, decltype(&::freeifaddrs)> list(found, &::freeifaddrs);
  std::array<std::string, 3> best;
  for (const ifaddrs* one = found; one != nullptr; one = one->ifa_next) {
    if (one->ifa_addr == nullptr || length_of(one->ifa_addr->sa_family) == 0) {
      continue;
    }
    const bool wanted = interface.empty() ? (one->ifa_flags & IFF_UP) != 0 && (one->ifa_flags & IFF_LOOPBACK) == 0
                                          : interface == one->ifa_name;
    const std::size_t rank = one->ifa_addr->sa_family == AF_INET ? 0 : link_local(one->ifa_addr) ? 2 : 1;
    if (wanted && best[rank].empty()) {
      best[rank] = copy_of(one->ifa_addr).host();
    }
  }
  for (const std::string& one : best) {
    if (!one.empty()) {
      return one;
    }
  }
  return "";
}

// The address that packets to `toward` would leave with; "": not known, or this host itself.
std::string address_toward(const std::string& toward) {
  addrinfo wish{};
  wish.ai_socktype = SOCK_DGRAM;
  addrinfo* found = nullptr;
  if (toward.empty() || ::getaddrinfo(toward.c_str(), "9", &wish, &found) != 0) {
    return "";
  }
  const std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)> list(found, &::freeaddrinfo);
  for (const addrinfo* one = found; one != nullptr; one = one->ai_next) {
    const Socket socket(::socket(one->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0));
    Address own;
    own.length = sizeof own.storage;
    // A datagram socket sends nothing when it is connected: it only looks for the route.
    if (socket && ::connect(socket.get(), one->ai_addr, one->ai_addrlen) == 0 &&
        ::getsockname(socket.get(), reinterpret_cast<sockaddr*>(&own.storage), &own.length) == 0) {
      const std::string host = own.host();
      return host.starts_with("127.") || host == "::1" ? "" : host;
    }
  }
  return "";
}

void set(const Socket& socket, int level, int option, int value) noexcept {
  static_cast<void>(::setsockopt(socket.get(), level, option, &value, sizeof value));
}

}  // namespace

Address::Address(const std::string& host, std::uint16_t port) {
  addrinfo wish{};
  wish.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV;
  wish.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const int failed = ::getaddrinfo(host.c_str(), std::to_string(port).c_str(), &wish, &found);
  if (failed != 0) {
    throw std::invalid_argument("'" + host + "' is no numeric address: " + ::gai_strerror(failed));
  }
  std::memcpy(&storage, found->ai_addr, found->ai_addrlen);
  length = found->ai_addrlen;
  ::freeaddrinfo(found);
}

std::string Address::host() const {
  std::array<char, NI_MAXHOST> text;
  if (::getnameinfo(get(), length, text.data(), text.size(), nullptr, 0, NI_NUMERICHOST) != 0) {
    return "an unknown address";
  }
  return text.data();
}

std::uint16_t Address::port() const noexcept {
  const auto port = storage.ss_family == AF_INET6 ? reinterpret_cast<const sockaddr_in6*>(&storage)->sin6_port
                                                  : reinterpret_cast<const sockaddr_in*>(&storage)->sin_port;
  return ntohs(port);
}

std::string local_address(const std::string& interface, const std::string& toward) {
  if (!interface.empty()) {
    std::string found = address_on(interface);
    if (found.empty()) {
      throw std::invalid_argument("interface " + interface +
                                  " is not there or has no address; GLOO_SOCKET_IFNAME names the one to use");
    }
    return found;
  }
  std::string found = address_toward(toward);
  if (found.empty()) {
    found = address_on("");
  }
  return found.empty() ? "127.0.0.1" : found;
}

Socket listen_at(const std::string& host, Address& bound) {
  const Address wish(host, 0);
  Socket socket(::socket(wish.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!socket || ::bind(socket.get(), wish.get(), wish.length) != 0 || ::listen(socket.get(), kBacklog) != 0) {
    throw_system("listening at " + host);
  }
  bound.length = sizeof bound.storage;
  if (::getsockname(socket.get(), reinterpret_cast<sockaddr*>(&bound.storage), &bound.length) != 0) {
    throw_system("getsockname");
  }
  return socket;
}

Socket begin_connect(const Address& to) {
  Socket socket(::socket(to.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!socket) {
    throw_system("socket");
  }
  if (::connect(socket.get(), to.get(), to.length) != 0 && errno != EINPROGRESS) {
    throw_system("connecting to " + to.host());
  }
  return socket;
}

void prepare(const Socket& socket, bool control) noexcept {
  set(socket, IPPROTO_TCP, TCP_NODELAY, 1);
  set(socket, SOL_SOCKET, SO_KEEPALIVE, 1);
  set(socket, IPPROTO_TCP, TCP_KEEPIDLE, kIdleS);
  set(socket, IPPROTO_TCP, TCP_KEEPINTVL, kIntervalS);
  set(socket, IPPROTO_TCP, TCP_KEEPCNT, kProbes);
  if (!control) {
    // The buffers are left to the kernel, which fits them to the path; but what it has not sent yet is not to pile up
    // in the slower one of two streams, while the other one runs out of work.
    set(socket, IPPROTO_TCP, TCP_NOTSENT_LOWAT, kUnsent);
  } else {
    set(socket, SOL_SOCKET, SO_SNDBUF, kControlBuffer);
    set(socket, SOL_SOCKET, SO_RCVBUF, kControlBuffer);
  }
}

}  // namespace launcher::crossing
