"""Network interfaces of this host and their addresses. Reads small files and asks the kernel; sends nothing."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

# <linux/sockios.h>, the same on every architecture.
_SIOCGIFCONF = 0x8912
# struct ifreq: a name of 16 bytes, then a union whose largest member is struct ifmap (24 bytes on 64-bit).
_IFREQ_BYTES = 40


def names(root: str = "/") -> list[str]:
    """Interfaces that exist, by name."""
    path = os.path.join(root, "sys/class/net")
    try:
        found = os.listdir(path)
    except OSError:
        return []  # /sys is not mounted: nothing can be checked against it
    # bonding_masters is a file among them.
    return sorted(name for name in found if os.path.isdir(os.path.join(path, name)))


def addresses(root: str = "/") -> list[tuple[str, str]]:
    """(interface, numeric address) of every address of this host, IPv4 first."""
    return [*_ipv4(), *_ipv6(root)]


def is_loopback(address: str) -> bool:
    """Whether a numeric address is one of this host's own inside: 127.0.0.0/8 or ::1."""
    return address == "::1" or (address.startswith("127.") and ":" not in address)


def interface_of(address: str, root: str = "/") -> str:
    """The interface that carries a numeric address, "" when none does. All of 127.0.0.0/8 is the loopback's."""
    wanted = canonical(address)
    found = next((name for name, own in addresses(root) if own == wanted), "")
    if not found and is_loopback(wanted):
        return next((name for name, own in addresses(root) if is_loopback(own)), "")
    return found


def canonical(address: str) -> str:
    """A numeric address in its shortest form, an IPv4 address mapped into IPv6 as IPv4, without a scope (``%eth0``).

    Text that is no numeric address is returned as it is.
    """
    import _socket  # the socket module imports selectors and enum; only its C part is needed here

    bare = address.partition("%")[0]
    for family in (_socket.AF_INET, _socket.AF_INET6):
        try:
            packed = _socket.inet_pton(family, bare)
        except OSError:
            continue
        if len(packed) == 16 and packed[:12] == bytes(10) + b"\xff\xff":
            return str(_socket.inet_ntop(_socket.AF_INET, packed[12:]))
        return str(_socket.inet_ntop(family, packed))
    return address


def is_numeric(text: str) -> bool:
    """Whether ``text`` is an IPv4 or IPv6 address."""
    import _socket

    for family in (_socket.AF_INET, _socket.AF_INET6):
        try:
            _socket.inet_pton(family, text.partition("%")[0])
        except OSError:
            continue
        return True
    return False


def resolve(name: str) -> list[str]:
    """The numeric addresses of ``name``; none when it does not resolve. Waits for the resolver."""
    import _socket

    try:
        # As bytes: for text, CPython loads the IDNA tables first.
        found = _socket.getaddrinfo(name.encode("ascii", "replace"), None, 0, _socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(canonical(str(entry[4][0])) for entry in found))


def full_name(hostname: str) -> str:
    """What the resolver calls this host, as ``hostname -f`` prints it; ``hostname`` itself when it cannot tell."""
    import _socket

    try:
        found = _socket.getaddrinfo(hostname.encode(), None, 0, _socket.SOCK_STREAM, 0, _socket.AI_CANONNAME)
    except OSError:
        return hostname
    return str(found[0][3]) or hostname


def default_interface(root: str = "/") -> str:
    """The interface of the default route, IPv4's before IPv6's; "" when there is none."""
    for line in _lines(os.path.join(root, "proc/net/route"))[1:]:
        fields = line.split()
        if len(fields) > 7 and fields[1] == "00000000" and fields[7] == "00000000":
            return fields[0]
    for line in _lines(os.path.join(root, "proc/net/ipv6_route")):
        fields = line.split()
        # Destination and its prefix length; an unreachable default route is listed on lo.
        if len(fields) == 10 and fields[0] == "0" * 32 and fields[1] == "00" and fields[9] != "lo":
            return fields[9]
    return ""


def _ipv4() -> Iterator[tuple[str, str]]:
    import _socket
    import array
    import fcntl
    import struct

    probe = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
    try:
        size = 64 * _IFREQ_BYTES
        while True:
            buffer = array.array("B", bytes(size))
            request = struct.pack("iP", size, buffer.buffer_info()[0])
            used, _ = struct.unpack("iP", fcntl.ioctl(probe, _SIOCGIFCONF, request))
            if used + _IFREQ_BYTES <= size:  # a full buffer may have been cut
                break
            size *= 4
    except OSError:
        return  # a sandbox that does not allow it
    finally:
        probe.close()
    content = buffer.tobytes()[:used]
    for start in range(0, used, _IFREQ_BYTES):
        entry = content[start : start + _IFREQ_BYTES]
        # An alias (eth0:1) is an address of its interface.
        name = entry[:16].partition(b"\0")[0].decode("ascii", "replace").partition(":")[0]
        yield name, str(_socket.inet_ntop(_socket.AF_INET, entry[20:24]))


def _ipv6(root: str) -> Iterator[tuple[str, str]]:
    for line in _lines(os.path.join(root, "proc/net/if_inet6")):
        fields = line.split()
        if len(fields) == 6 and len(fields[0]) == 32:
            groups = [fields[0][at : at + 4] for at in range(0, 32, 4)]
            yield fields[5], canonical(":".join(groups))


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read().splitlines()
    except OSError:
        return []  # no IPv6, or no /proc
