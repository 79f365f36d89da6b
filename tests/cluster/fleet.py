"""Real launchers on loopback addresses, and those who attack them: strangers, a relay, fake leaders, a false member."""

from __future__ import annotations

import json
import os
import random
import re
import select
import socket
import struct
import textwrap
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launcher.cluster import wire
from launcher.cluster.secret import job_digest, job_key, key_without_secret
from launcher.cluster.wire import Channel

SECRET = "the secret of this job"  # noqa: S105
RUN_ID = "under-attack"
RELAY = "127.0.9.9"
DEADLINE_S = 40.0

RANKS = """
    import os, select, sys
    rank = os.environ["RANK"]
    os.write(1, f"UP {rank} of {os.environ['WORLD_SIZE']}\\n".encode())
    while not os.path.exists(sys.argv[1]):
        select.select([], [], [], 0.01)
    os.write(1, f"DONE {rank}\\n".encode())
"""


def framed(payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + payload


def said(**message: Any) -> bytes:
    """A message of the handshake."""
    return framed(json.dumps(message).encode())


class Fleet:
    """The hosts of one job: ``algo-N`` at 127.0.8.N, each a launcher with a job tree of its own."""

    def __init__(self, make_job: Callable[[str], Any], wait_until: Callable[..., Any], directory: Path, count: int):
        self.wait_until = wait_until
        self.names = [f"algo-{number}" for number in range(1, count + 1)]
        self.addresses = {name: f"127.0.8.{number}" for number, name in enumerate(self.names, 1)}
        self.port = _free_ports()
        self.leader_port = self.port  # where the leader is expected to listen
        self.go = directory / "go"
        self.script_path = directory / "train.py"
        self.script(RANKS)
        self._make_job = make_job
        self.peers: list[Peer] = []
        self.jobs = {name: self.job(name, name) for name in self.names}

    def script(self, text: str) -> None:
        self.script_path.write_text(textwrap.dedent(text))

    def job(self, name: str, host: str) -> Any:
        """One more launcher's place, for who claims to be ``host``."""
        job = self._make_job(name)
        job.tree(resources={"current_host": host, "hosts": self.names, "network_interface_name": "lo"})
        return job

    def start(
        self,
        host: str,
        *options: str,
        job: Any = None,
        secret: str = SECRET,
        leader: str = "",
        script_args: Sequence[str] = (),
        wrapper: tuple[str, ...] = (),
    ) -> Any:
        """Starts a host's launcher. ``leader``: the address at which it believes the first host to be."""
        addresses = {**self.addresses, **({self.names[0]: leader} if leader else {})}
        words = [f"--host-addresses={name}={address}" for name, address in addresses.items()]
        words += [f"--leader-port={self.port}", f"--rdzv-id={RUN_ID}", "--nproc-per-node=1", "--grace=2", *options]
        return (job or self.jobs[host]).start(
            "run",
            *words,
            self.script_path,
            self.go,
            *script_args,
            wrapper=wrapper,
            env={"LAUNCHER_SECRET": secret} if secret else None,
        )

    def up(self, *hosts: str) -> None:
        """Waits until the ranks of ``hosts`` run."""
        for host in hosts or self.names:
            self.jobs[host].wait_for_line("UP")

    def listening(self) -> None:
        """Waits until the leader can be reached."""

        def found() -> bool:
            lines = [line for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
            return any(
                words[1].endswith(f":{self.leader_port:04X}") and words[3] == "0A" for words in map(str.split, lines)
            )

        self.wait_until(found, f"the leader to listen\n{self.output()}")

    def codes(self, *hosts: str) -> list[int]:
        """Exit codes once all launchers have ended."""
        jobs = [self.jobs[host] for host in hosts or self.names]
        self.wait_until(lambda: all(job.process.poll() is not None for job in jobs), self.output(), DEADLINE_S)
        return [job.process.returncode for job in jobs]

    def finish(self) -> None:
        """Lets the ranks end: everything must have gone as if nothing had happened."""
        self.go.touch()
        assert self.codes() == [0] * len(self.names), self.output()
        for rank, name in enumerate(self.names):
            lines = [line.rpartition("] ")[2] for line in self.jobs[name].stdout.splitlines()]
            assert lines == [f"UP {rank} of {len(self.names)}", f"DONE {rank}"], self.output()
        self.assert_clean()

    def close(self) -> None:
        """Ends the connections of the test's own members."""
        for peer in self.peers:
            peer.channel.close("the test is over")

    def assert_clean(self) -> None:
        """No launcher has met a fault of its own."""
        for job in self.jobs.values():
            assert not re.search(r"^(\[launcher\] )?Traceback", job.stderr, re.MULTILINE), self.output()
            assert "fault of the launcher" not in job.stderr, self.output()

    def output(self) -> str:
        return "\n".join(f"====== {name}\n{job.output()}" for name, job in self.jobs.items() if job.process)

    def refused(self) -> dict[str, int]:
        """What the leader counted: kind -> number."""
        line = next(line for line in self.jobs["algo-1"].stderr.splitlines() if "refused connections: " in line)
        total, _, kinds = line.partition("refused connections: ")[2].partition(" (")
        counts = {}
        for item in kinds.rstrip(")").split(", "):
            number, _, kind = item.partition(" ")
            counts[kind] = int(number)
        assert sum(counts.values()) == int(total), line
        return counts


def _free_ports() -> int:
    """The first of four ports that nobody has, outside of the range from which the kernel gives some."""
    while True:
        port = random.randrange(10_000, 30_000)
        try:
            for number in range(port, port + 4):
                socket.create_server(("", number)).close()
        except OSError:
            continue
        return port


class Stranger:
    """A bare connection to the leader."""

    def __init__(self, fleet: Fleet, data: bytes = b"") -> None:
        self.wait_until = fleet.wait_until
        self.sock = socket.create_connection(("127.0.0.1", fleet.leader_port), 10)
        self.sock.setblocking(False)
        self.send(data)

    def send(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except (ConnectionError, BlockingIOError):
            pass  # the leader has closed already

    def gone(self) -> bool:
        """Whether the leader has closed the connection."""
        try:
            while self.sock.recv(65536):
                pass
        except BlockingIOError:
            return False
        except ConnectionError:
            pass
        return True

    def refused(self) -> None:
        """Waits until the leader has closed the connection."""
        self.wait_until(self.gone, "the leader to close the connection")
        self.sock.close()


class Peer:
    """A member by the test's own hand, which may know the secret, and may say what it likes."""

    def __init__(
        self, fleet: Fleet, host: str, secret: str = SECRET, job: str = RUN_ID, source: str = "127.0.0.1"
    ) -> None:
        self.wait_until, self.host = fleet.wait_until, host
        sock = wire.begin_connect("127.0.0.1", fleet.leader_port, source)
        self.wait_until(lambda: select.select([], [sock], [], 0)[1], "the connection")
        assert wire.connect_error(sock) == ""
        digest = job_digest(job)
        key = job_key(secret.encode()) if secret else key_without_secret(digest)
        self.channel = Channel.connecting(sock, key=key, job=digest, host=host, now_s=0.0)
        self.heard: list[dict[str, Any]] = []
        fleet.peers.append(self)

    def turn(self) -> None:
        channel = self.channel
        if channel.fileno() >= 0:
            if select.select([channel], [], [], 0)[0]:
                self.heard += channel.read(0.0)
            channel.flush()

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        def looked() -> Any:
            self.turn()
            return condition()

        return self.wait_until(looked, what, DEADLINE_S)

    def hello(self, **changes: Any) -> Peer:
        """Joins; the job must run with ``--peer-check off``."""
        self.until(lambda: self.channel.open, f"the handshake, but: {self.channel.closed}")
        self.channel.send({"kind": "hello", "facts": {}, "slots": 1, **changes})
        return self

    def told(self, kind: str) -> dict[str, Any]:
        """The first message of a kind."""
        return self.until(
            lambda: next((message for message in self.heard if message["kind"] == kind), None),
            f"a message {kind}, but heard {self.heard} {self.channel.closed}",
        )

    def closed(self) -> str:
        """Waits for the end of the connection."""
        return self.until(lambda: self.channel.closed, "the end of the connection")


class Served:
    """A thread that serves sockets until the test is over."""

    def __init__(self, address: str, port: int) -> None:
        self.server = socket.create_server((address, port))
        self._end_read, self._end_write = os.pipe()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        os.write(self._end_write, b"x")
        self._thread.join(20)
        self.server.close()
        os.close(self._end_read)
        os.close(self._end_write)

    def _serve(self) -> None:
        raise NotImplementedError


class FakeLeader(Served):
    """Says ``answer`` to whoever connects, and keeps the connection."""

    def __init__(self, port: int, answer: bytes) -> None:
        self.answer, self.calls = answer, 0
        super().__init__("", port)

    def _serve(self) -> None:
        kept = []
        while True:
            if self._end_read in select.select([self.server, self._end_read], [], [])[0]:
                break
            kept.append(self.server.accept()[0])
            self.calls += 1
            kept[-1].sendall(self.answer)
        for sock in kept:
            sock.close()


class Relay(Served):
    """Between a member and the leader: passes frames on, keeps what the member says, and changes one frame if asked.

    ``said`` has the member's frames of each connection. Frames 0 and 1 are the member's handshake, 2 is its hello.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._target = "127.0.0.1", fleet.port + 1  # the relay has the first port, so the leader takes the next
        fleet.leader_port = fleet.port + 1
        self.said: list[list[bytes]] = []
        self._change: tuple[bool, Callable[[bytes], Sequence[bytes]]] | None = None
        super().__init__(RELAY, fleet.port)

    def change(self, from_member: bool, change: Callable[[bytes], Sequence[bytes]]) -> None:
        """The next frame of one direction that is no longer of the handshake goes through ``change``."""
        self._change = from_member, change

    @property
    def changed(self) -> bool:
        """Whether that has happened."""
        return self._change is None

    def _serve(self) -> None:
        ways: dict[socket.socket, _Way] = {}
        while True:
            ready = select.select([self.server, self._end_read, *ways], [], [])[0]
            if self._end_read in ready:
                break
            if self.server in ready:
                near = self.server.accept()[0]
                try:
                    far = socket.create_connection(self._target, 5)
                except OSError:
                    near.close()
                else:
                    self.said.append([])
                    ways[near], ways[far] = _Way(far, self.said[-1]), _Way(near, None)
            for sock in ready:
                if sock in ways and not self._pass_on(sock, ways[sock]):
                    ways.pop(ways.pop(sock).sink, None)
        for sock in ways:
            sock.close()

    def _pass_on(self, sock: socket.socket, way: _Way) -> bool:
        try:
            frames = way.take(sock.recv(65536))
            for frame in frames:
                changed: Sequence[bytes] = [frame]
                late = way.count > (2 if way.kept is not None else 1)
                if late and self._change is not None and self._change[0] == (way.kept is not None):
                    changed = self._change[1](frame)
                    self._change = None
                if way.kept is not None:
                    way.kept.append(frame)
                way.count += 1
                for one in changed:
                    way.sink.sendall(one)
            if not way.ended:
                return True
        except ConnectionError:
            pass
        sock.close()
        way.sink.close()
        return False


class _Way:
    def __init__(self, sink: socket.socket, kept: list[bytes] | None) -> None:
        self.sink, self.kept = sink, kept
        self.buffer, self.count, self.ended = b"", 0, False

    def take(self, data: bytes) -> list[bytes]:
        """The whole frames that have come, each with its length in front."""
        self.ended = not data
        self.buffer += data
        frames = []
        while len(self.buffer) >= 4 and len(self.buffer) >= 4 + int.from_bytes(self.buffer[:4], "big"):
            end = 4 + int.from_bytes(self.buffer[:4], "big")
            frames.append(self.buffer[:end])
            self.buffer = self.buffer[end:]
        return frames
