"""Whether other hosts can be reached from this one: a TCP connect to each. "Refused" is an answer too."""

from __future__ import annotations

import errno
import select
import socket

from launcher.cluster.options import PORTS
from launcher.cluster.sockets import begin_connect
from launcher.errors import ClusterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

LIMIT_S = 1.5
_ANSWERS = (0, errno.ECONNREFUSED, errno.ECONNRESET)


def probed_port(leader_port: int) -> int:
    """A port beside those that a leader takes: nothing listens there, and on a shared address not the leader itself."""
    return leader_port + PORTS if leader_port + PORTS < 1 << 16 else leader_port - 1


class Probe:
    """Connects in the background, for ``LIMIT_S`` at most. One event loop owns it."""

    def __init__(self, addresses: Mapping[str, str], port: int, now_s: float) -> None:
        """``addresses``: host -> numeric address."""
        self.deadline_s = now_s + LIMIT_S
        self.silent: set[str] = set(addresses)  # hosts that have not answered
        self._open: dict[int, tuple[str, socket.socket]] = {}
        self._poll = select.epoll()
        for host, address in addresses.items():
            try:
                sock = begin_connect(address, port)
            except ClusterError:
                continue  # no address of a kind that this host has: it cannot be reached
            if getattr(sock, "failed", 0):
                self._take(host, sock.failed)  # type: ignore[attr-defined]
                sock.close()
                continue
            self._open[sock.fileno()] = (host, sock)
            self._poll.register(sock.fileno(), select.EPOLLOUT)

    def fileno(self) -> int:
        """Readable when there is an answer."""
        return self._poll.fileno()

    def done(self, now_s: float) -> bool:
        """Takes what has come; whether there is nothing more to wait for. Afterwards it is closed."""
        if self._poll.closed:
            return True
        for fd, _ in self._poll.poll(0):
            host, sock = self._open.pop(fd)
            self._take(host, sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
            self._poll.unregister(fd)
            sock.close()
        if self._open and now_s < self.deadline_s:
            return False
        self.close()
        return True

    def close(self) -> None:
        """Gives up what is still open."""
        for _, sock in self._open.values():
            sock.close()
        self._open = {}
        self._poll.close()

    def _take(self, host: str, code: int) -> None:
        if code in _ANSWERS:
            self.silent.discard(host)
