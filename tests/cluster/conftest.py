"""A leader's and a member's end of a real connection, and a raw socket in place of either."""

from __future__ import annotations

import json
import select
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.cluster import wire
from launcher.cluster.wire import Channel

from .fleet import Fleet

KEY = b"k" * 32
JOB = "job-1"


class Wires:
    """Makes connected ends over loopback; all are closed at the end of the test."""

    def __init__(self, wait_until: Callable[..., Any]) -> None:
        self.wait_until = wait_until
        self.listener, self.port = wire.listen(0, address="127.0.0.1")
        self.sockets: list[socket.socket] = [self.listener]
        self.channels: list[Channel] = []
        self.got: dict[int, list[dict[str, Any]]] = {}
        self.asked: list[str] = []
        self.admission = ""

    def pair(self) -> tuple[socket.socket, socket.socket, str]:
        """A connecting socket, the accepted one and the address that the latter sees."""
        near = wire.begin_connect("127.0.0.1", self.port)
        self.wait_until(lambda: select.select([], [near], [], 0)[1], "the connection")
        assert wire.connect_error(near) == ""
        accepted = self.wait_until(lambda: wire.accept(self.listener), "the connection at the listener")
        self.sockets += [near, accepted[0]]
        return near, *accepted

    def admit(self, host: str) -> str:
        self.asked.append(host)
        return self.admission

    def leader(self, sock: socket.socket, address: str, key: bytes = KEY, job: str = JOB) -> Channel:
        channel = Channel.accepted(sock, key=key, job=job, address=address, now_s=100.0, admit=self.admit)
        self.channels.append(channel)
        return channel

    def member(self, sock: socket.socket, key: bytes = KEY, job: str = JOB, host: str = "algo-2") -> Channel:
        channel = Channel.connecting(sock, key=key, job=job, host=host, now_s=100.0)
        self.channels.append(channel)
        return channel

    def both(self, member_key: bytes = KEY, member_job: str = JOB) -> tuple[Channel, Channel]:
        near, far, address = self.pair()
        return self.leader(far, address), self.member(near, member_key, member_job)

    def opened(self) -> tuple[Channel, Channel]:
        """A leader's and a member's end with the handshake behind them."""
        leader, member = self.both()
        self.until(lambda: leader.open and member.open, "the handshake")
        return leader, member

    def raw_member(self) -> tuple[Channel, Raw]:
        """A leader's end, and the bare socket of whoever connected."""
        near, far, address = self.pair()
        return self.leader(far, address), Raw(near, self)

    def raw_leader(self, **options: Any) -> tuple[Raw, Channel]:
        """The bare socket of whoever listens, and a member's end."""
        near, far, _ = self.pair()
        return Raw(far, self), self.member(near, **options)

    def turn(self) -> None:
        """What an event loop does in one turn."""
        for channel in self.channels:
            if channel.fileno() >= 0 and select.select([channel], [], [], 0)[0]:
                self.got.setdefault(id(channel), []).extend(channel.read(101.0))
            if channel.wants_write():
                channel.flush()

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        def looked() -> Any:
            self.turn()
            return condition()

        return self.wait_until(looked, what)

    def messages(self, channel: Channel, count: int) -> list[dict[str, Any]]:
        """All that ``channel`` has read, once it is ``count`` messages."""
        got = self.got.setdefault(id(channel), [])
        self.until(lambda: len(got) >= count or channel.closed, f"{count} messages")
        assert len(got) == count, channel.closed
        return got

    def ended(self, channel: Channel, cause: str) -> str:
        """The text of a channel that must close for ``cause``."""
        self.until(lambda: channel.closed, f"{cause} to be noticed")
        assert (channel.cause, channel.open, channel.fileno()) == (cause, False, -1), channel.closed
        return channel.closed


class Raw:
    """A peer that can say anything."""

    def __init__(self, sock: socket.socket, wires: Wires) -> None:
        self.sock, self.wires = sock, wires
        self.buffer = b""
        sock.setblocking(False)

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def say(self, **message: Any) -> None:
        payload = json.dumps(message).encode()
        self.send(struct.pack(">I", len(payload)) + payload)

    def frame(self) -> bytes:
        """The payload of the next frame."""

        def complete() -> bool:
            try:
                self.buffer += self.sock.recv(1 << 20)
            except BlockingIOError:
                pass
            return len(self.buffer) >= 4 and len(self.buffer) >= 4 + struct.unpack(">I", self.buffer[:4])[0]

        self.wires.until(complete, "a frame")
        end = 4 + struct.unpack(">I", self.buffer[:4])[0]
        payload, self.buffer = self.buffer[4:end], self.buffer[end:]
        return payload

    def heard(self) -> dict[str, Any]:
        """The next message of the handshake."""
        message = json.loads(self.frame())
        assert isinstance(message, dict)
        return message

    def hi(self, **changes: Any) -> None:
        self.say(
            **{"kind": "hi", "protocol": wire.PROTOCOL, "job": JOB, "host": "algo-2", "nonce": "00" * 32, **changes}
        )


@pytest.fixture
def wires(wait_until: Callable[..., Any]) -> Iterator[Wires]:
    made = Wires(wait_until)
    yield made
    for channel in made.channels:
        channel.close("the test is over")
    for sock in made.sockets:
        sock.close()


@pytest.fixture
def make_fleet(make_job: Any, wait_until: Any, tmp_path: Path) -> Iterator[Callable[[int], Fleet]]:
    """Real launchers on loopback addresses; gone when the test is over."""
    made: list[Fleet] = []

    def make(count: int) -> Fleet:
        made.append(Fleet(make_job, wait_until, tmp_path, count))
        return made[-1]

    yield make
    for fleet in made:
        fleet.close()
