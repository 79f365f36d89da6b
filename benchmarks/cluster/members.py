"""All hosts but the first, as connections that speak the real protocol, in one process with one event loop.

    python members.py HOSTS RANKS secret|no-secret PORT

Orders come on stdin, a line each, and each is answered by a line of JSON: ``connect`` (when all were told to start)
and ``fail`` (a rank of the last host ends with 3; when every host has the verdict).
"""

from __future__ import annotations

import json
import resource
import select
import sys
import time
from typing import Any

from simulated import cluster_plan, report

from launcher.cluster import messages, wire
from launcher.cluster.sockets import begin_connect, connect_error
from launcher.record import replace

CODE = 3
LIMIT_S = 120.0


class _Member:
    """One host: its connection, and what it will say, made ready before the clock runs."""

    __slots__ = ("channel", "hello", "name", "number", "over", "sock", "writing")

    def __init__(self, name: str, number: int, hello: bytes) -> None:
        self.name, self.number, self.hello = name, number, hello
        self.over = b""
        self.sock: Any = None
        self.channel: wire.Channel | None = None
        self.writing = False


class Members:
    """The members of one job."""

    def __init__(self, count: int, ranks: int, secret: bool, port: int) -> None:
        self.plan = cluster_plan(count, ranks, secret)
        self.ranks, self.port = ranks, port
        self.started: list[int] = []  # times, ns
        self.told: list[int] = []
        self.judged: list[int] = []
        self.codes: set[int] = set()
        self.members = [
            _Member(
                name,
                number,
                wire.encode(
                    {"kind": "hello", "facts": replace(self.plan.facts, host=name).as_message(), "slots": ranks}
                ),
            )
            for number, name in enumerate(self.plan.hosts)
        ][1:]
        for member in self.members:
            code = CODE if member is self.members[-1] else 0
            over = messages.report_message(report(member.name, member.number, self.ranks, code), ())
            member.over = wire.encode(over)
        self._epoll = select.epoll()
        self._by_fd: dict[int, _Member] = {}

    def connect(self) -> dict[str, float]:
        """Let all hosts come at once; returns how long it took until all were told to start."""
        began_ns = time.monotonic_ns()
        for member in self.members:
            member.sock = begin_connect("127.0.0.1", self.port)
            self._by_fd[member.sock.fileno()] = member
            self._epoll.register(member.sock.fileno(), select.EPOLLOUT)
        self._serve_until(self.started)
        return {"formed_ns": max(self.started) - began_ns, "first_ns": min(self.started) - began_ns}

    def fail(self) -> dict[str, float]:
        """Let a rank of the last host fail; returns when all were told to stop, and when all had the verdict."""
        failing = self.members[-1]
        assert failing.channel is not None
        record = report(failing.name, failing.number, self.ranks, CODE).records[0]
        began_ns = time.monotonic_ns()
        failing.channel.send(messages.record_message(record))
        failing.channel.send(failing.over)
        failing.over = b""
        self._settle(failing)
        self._serve_until(self.judged)
        return {"told_ns": max(self.told) - began_ns, "verdict_ns": max(self.judged) - began_ns}

    def serve_for(self, stdin: int) -> str:
        """Go on until there is an order; returns it, "" when there is nobody left to give one."""
        self._epoll.register(stdin, select.EPOLLIN)
        while stdin not in (ready := dict(self._epoll.poll())):
            self._take(ready.items())
        self._epoll.unregister(stdin)
        return sys.stdin.readline().strip()

    def _serve_until(self, times: list[int]) -> None:
        limit_s = time.monotonic() + LIMIT_S
        while len(times) < len(self.members):
            if time.monotonic() > limit_s:
                raise SystemExit(f"{len(times)} of {len(self.members)} members after {LIMIT_S:g} s")
            self._take(self._epoll.poll(1.0, 1024))

    def _take(self, ready: Any) -> None:
        for fd, events in ready:
            member = self._by_fd[fd]
            if member.channel is None:
                self._connected(fd, member)
                continue
            if events & select.EPOLLOUT:
                member.channel.flush()
            if events & ~select.EPOLLOUT:
                for message in member.channel.read(time.monotonic()):
                    self._hear(member, member.channel, message)
            self._settle(member)

    def _connected(self, fd: int, member: _Member) -> None:
        problem = connect_error(member.sock)
        if problem:
            raise SystemExit(f"{member.name}: {problem}")
        channel = member.channel = wire.Channel.connecting(
            member.sock, key=self.plan.key, job=self.plan.job, host=member.name, now_s=time.monotonic()
        )
        channel.send(member.hello)  # leaves when both ends have proven themselves
        member.hello = b""
        member.writing = channel.wants_write()
        self._epoll.modify(fd, select.EPOLLIN | (select.EPOLLOUT if member.writing else 0))

    def _hear(self, member: _Member, channel: wire.Channel, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "ping":
            channel.send({"kind": "pong", "sent": message["sent"], "member_ns": time.monotonic_ns()})
        elif kind == "start":
            self.started.append(time.monotonic_ns())
        elif kind == "stop":
            self.told.append(time.monotonic_ns())
            if member.over:
                channel.send(member.over)
                member.over = b""
        elif kind == "verdict":
            self.judged.append(time.monotonic_ns())
            self.codes.add(messages.read_verdict(message).exit_code)
            fd = channel.fileno()
            channel.close("the verdict is here")
            del self._by_fd[fd]
        elif kind != "say":
            raise SystemExit(f"{member.name} was told {message}")

    def _settle(self, member: _Member) -> None:
        channel = member.channel
        assert channel is not None
        if channel.closed:
            if channel.closed != "the verdict is here":
                raise SystemExit(f"{member.name}: {channel.closed}")
        elif channel.wants_write() != member.writing:
            member.writing = channel.wants_write()
            self._epoll.modify(channel.fileno(), select.EPOLLIN | (select.EPOLLOUT if member.writing else 0))


def main() -> None:
    """Serve the orders."""
    count, ranks, secret, port = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "secret", int(sys.argv[4])
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    members = Members(count, ranks, secret, port)
    print(json.dumps({"members": len(members.members)}), flush=True)
    while order := members.serve_for(0):
        answer = members.connect() if order == "connect" else members.fail()
        print(json.dumps(answer | {"codes": sorted(members.codes)}), flush=True)


if __name__ == "__main__":
    main()
