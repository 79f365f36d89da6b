"""MASTER_PORT: a port that rank 0 will be able to listen on, kept from other launchers of this machine."""

from __future__ import annotations

import os

from launcher.errors import OutputError
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Reserved(Record):
    """A port; what holds it, to be closed when the job is over; and lines for people."""

    port: int
    claims: tuple[Any, ...]
    lines: tuple[str, ...]

    def release(self) -> None:
        """Lets other launchers have it."""
        for claim in self.claims:
            claim.close()


def reserve(wanted: int) -> Reserved:
    """The port ``wanted``, or another one when that is taken or 0.

    Nothing may be bound to the port when rank 0 binds it (it may not set SO_REUSEADDR), so the port is taken from
    outside of the range that the kernel hands out by itself, and a name in the abstract namespace (of this network
    namespace, like the port) claims it among launchers; the name goes away with its descriptor.

    Raises:
        OutputError: none is free.
    """
    import _socket  # the socket module imports selectors and enum; only its C part is needed here

    lines: tuple[str, ...] = ()
    for port in (wanted, *_candidate_ports()):
        if not port:
            continue
        claim = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        probe_socket = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        probe_socket.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
        try:
            claim.bind(f"\0launcher-master-port-{port}")
            probe_socket.bind(("0.0.0.0", port))
        except OSError as error:
            claim.close()
            if port == wanted:
                lines = (f"MASTER_PORT {port} cannot be had ({error.strerror})",)
            continue
        finally:
            probe_socket.close()
        # The ranks learn the port from us, so another one serves as well.
        return Reserved(port, (claim,), tuple(f"{line}; using {port}" for line in lines))
    raise OutputError("no free port for rank 0 in 64 tries; give --master-port")


def _candidate_ports() -> list[int]:
    """Ports that the kernel does not give to connections (net.ipv4.ip_local_port_range), in random order."""
    try:
        with open("/proc/sys/net/ipv4/ip_local_port_range", encoding="ascii") as file:
            low, high = (int(word) for word in file.read().split())
    except (OSError, ValueError):
        low, high = 32768, 60999
    # Below the range from 10000 on; where it begins lower, above it; where it is everything, anywhere.
    first, last = (10000, low) if low > 12000 else (high + 1, 65536) if high < 63000 else (10000, 65536)
    random = os.urandom(128)
    return [first + int.from_bytes(random[at : at + 2], "little") % (last - first) for at in range(0, 128, 2)]
