"""The leader's connections: who calls is let in, all are read and written in one epoll set, none is waited for."""

from __future__ import annotations

import os
import resource
import select
import time

from launcher.cluster import wire
from launcher.cluster.guests import MISSING_ASKED
from launcher.cluster.options import PORTS
from launcher.errors import ClusterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from launcher.cluster.guests import Guests
    from launcher.cluster.options import ClusterPlan
    from launcher.cluster.wire import Channel

    class Owner(Protocol):
        """Whose connections they are."""

        def admit(self, host: str) -> str:
            """Why a host that has proven itself is refused right now; "" to let it in."""

        def take(self, channel: Channel, message: dict[str, Any]) -> None:
            """A message has come."""

        def ended(self, channel: Channel) -> None:
            """A connection is closed; ``channel.closed`` says why."""


# Connections that have proven nothing, beyond one for each host that is still expected; fewer where files are few.
_UNPROVEN, _FEWEST_UNPROVEN = 256, 16
_OPEN_FILES = 40
_ACCEPTED_AT_ONCE = 256
_EVENTS_AT_ONCE = 1024


class Connections:
    """One event loop owns it; nothing here waits but :meth:`drain`."""

    def __init__(self, plan: ClusterPlan, owner: Owner, guests: Guests) -> None:
        """Listens.

        Raises:
            ClusterError: no port to listen on.
        """
        self._plan, self._owner, self._guests = plan, owner, guests
        self._listener, self.port = wire.listen(plan.leader_port, PORTS)
        self._epoll = select.epoll()
        self._epoll.register(self._listener.fileno(), select.EPOLLIN)
        self._channels: dict[int, Channel] = {}
        self._writing: set[int] = set()
        self._deaf = False  # no descriptor was left: nobody is let in until the next beat

    def fileno(self) -> int:
        """Readable when :meth:`serve` has something to do."""
        return self._epoll.fileno()

    def serve(self, now_s: float) -> None:
        """Takes everything that has come."""
        for fd, events in self._epoll.poll(0, _EVENTS_AT_ONCE):
            if fd == self._listener.fileno():
                self._accept(now_s)
            elif fd in self._channels:
                self._serve(self._channels[fd], events, now_s)

    def send(self, channel: Channel, message: dict[str, Any] | bytes) -> None:
        """Sends as much as the socket takes now, the rest later."""
        fd = channel.fileno()
        channel.send(message)
        if fd >= 0:
            self._settle(fd, channel)

    def drop(self, channel: Channel, reason: str) -> None:
        """Ends a connection from this side."""
        fd = channel.fileno()
        channel.close(reason)
        self._settle(fd, channel)

    def on_beat(self, now_s: float) -> None:
        """Drops handshakes that take too long; listens again, should it have stopped."""
        for fd, channel in list(self._channels.items()):
            channel.on_time(now_s)
            self._settle(fd, channel)
        if self._deaf:
            self._deaf = False
            self._epoll.register(self._listener.fileno(), select.EPOLLIN)

    def close_door(self) -> None:
        """Nobody is let in any more."""
        self._listener.close()  # which takes it out of the epoll set

    def drain(self, deadline_s: float) -> None:
        """Waits for something to be read or written, until ``deadline_s``; what is said does not matter any more."""
        for fd, _ in self._epoll.poll(max(0.0, deadline_s - time.monotonic()), _EVENTS_AT_ONCE):
            channel = self._channels.get(fd)
            if channel is not None:
                channel.flush()
                channel.read(time.monotonic())
                self._settle(fd, channel)

    def close(self) -> None:
        """Ends all that are left."""
        for channel in list(self._channels.values()):
            channel.close("the job is over")
        self._epoll.close()

    def _accept(self, now_s: float) -> None:
        try:
            for _ in range(_ACCEPTED_AT_ONCE):
                found = wire.accept(self._listener)
                if found is None:
                    return
                sock, address = found
                key, job = self._plan.key, self._plan.job
                channel = wire.Channel.accepted(
                    sock, key=key, job=job, address=address, now_s=now_s, admit=self._owner.admit
                )
                oldest = self._guests.arrived(channel)
                self._channels[channel.fileno()] = channel
                self._epoll.register(channel.fileno(), select.EPOLLIN)
                if oldest is not None:
                    self.drop(oldest, "too many connections that prove nothing")
        except ClusterError as error:
            self._guests.count("no-descriptor", str(error))
            # The connection that waits would wake us again and again.
            self._epoll.unregister(self._listener.fileno())
            self._deaf = True

    def _serve(self, channel: Channel, events: int, now_s: float) -> None:
        fd = channel.fileno()
        if events & select.EPOLLOUT:
            channel.flush()
        if events & ~select.EPOLLOUT:
            for message in channel.read(now_s):
                if not channel.closed:  # by the message before
                    self._owner.take(channel, message)
        self._settle(fd, channel)

    def _settle(self, fd: int, channel: Channel) -> None:
        """After anything that may have closed a connection, or left something to be written."""
        if channel.closed:
            # The kernel has taken a closed descriptor out of the epoll set; another connection may have it already.
            if self._channels.get(fd) is channel:
                del self._channels[fd]
                self._writing.discard(fd)
                self._owner.ended(channel)
        elif channel.wants_write() != (fd in self._writing):
            (self._writing.add if channel.wants_write() else self._writing.discard)(fd)
            self._epoll.modify(fd, select.EPOLLIN | (select.EPOLLOUT if channel.wants_write() else 0))


def allow_connections(hosts: int) -> int:
    """A descriptor for each host and some for others; ranks are children of another process and keep their limit.

    Returns:
        How many connections that prove nothing there may be.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hosts + 1024
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return hosts + _UNPROVEN
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    if limit < hosts + 64:
        raise ClusterError(
            f"{hosts} hosts need as many open files, but {limit} are allowed on {os.uname().nodename}: raise ulimit -Hn"
        )
    # What this process has open beside connections, and a look at hosts that are missing.
    return max(_FEWEST_UNPROVEN, min(hosts + _UNPROVEN, limit - hosts - min(hosts, MISSING_ASKED) - _OPEN_FILES))
