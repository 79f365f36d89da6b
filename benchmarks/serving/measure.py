"""The measurements. Each starts a contender's server anew and leaves none of its processes behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from client import ROWS, Question, Wrk, ask_many, free_ports, look_at, make_matrix, until, write_npy
from contenders import MMS_CONFIG, Contender, Place
from processes import Failed, Server, kill_all

CONCURRENCY = (1, 8, 32)
READY_S = 60.0  # for a server to start
BACK_S = 15.0  # for a killed worker to be replaced
IDLE_REQUESTS = 100
MB = 1e6
# Tables.
START, START_ANSWER = "start, /ping", "start, good answer"
RATE, P50, P99, CPU = "requests/s", "p50", "p99", "CPU"
PSS_IDLE, PSS_AFTER, RSS_IDLE, RSS_AFTER = "PSS, idle", "PSS, after load", "RSS, idle", "RSS, after load"
PROCESSES = "processes"
SLOW_PING, SLOW_ANSWER, SLOW_EARLY = "slow model: /ping", "slow model: good answer", "slow model: /ping 200 too early"
BACK = "worker killed"
SOCKET = "socket errors"


def at(table: str, connections: int) -> str:
    """The name of a table at a concurrency."""
    return f"{table}, c={connections}"


@dataclass(frozen=True)
class Sample:
    """One number: of a contender's setting, in a table, in a round."""

    table: str
    round: int
    label: str
    peer: str
    workers: int
    value: float


def _length(body: bytes) -> bool:
    """What all models but the matrix answer: the one number."""
    with contextlib.suppress(ValueError):
        return bool(json.loads(body) == [ROWS])
    return False


class Bench:
    """What all measurements share. Numbers go to ``samples``, what was said while waiting to ``said``."""

    def __init__(self, scratch: Path, wrk: str, seconds: float, warm_up: float) -> None:
        self._scratch, self._seconds, self._warm_up = scratch, seconds, warm_up
        self._matrix = make_matrix()
        self.questions = [Question(self._matrix, seed) for seed in range(40)]
        self._wrk = Wrk(wrk, scratch, self.questions[0])
        self.samples: list[dict[str, Any]] = []
        self.said: dict[str, dict[str, str]] = {}
        self.round = 0

    def _add(self, table: str, contender: Contender, value: float) -> None:
        rounded = float(f"{value:.6g}")
        sample = Sample(table, self.round, contender.label, contender.peer, contender.workers, rounded)
        self.samples.append(asdict(sample))

    def _note(self, table: str, contender: Contender, seen: Counter[str]) -> None:
        text = ", ".join(name for name, _ in seen.most_common()) or "nothing else"
        self.said.setdefault(table, {})[contender.label] = text

    @contextlib.contextmanager
    def _running(self, contender: Contender, task: str) -> Iterator[tuple[Server, Place]]:
        """A server on a tree of its own."""
        with tempfile.TemporaryDirectory(prefix="s-", dir=self._scratch, ignore_cleanup_errors=True) as folder:
            place = Place(Path(folder) / "ml", task, free_ports(5), Path(folder))
            place.model.mkdir(parents=True)
            write_npy(place.model / "W.npy", self._matrix)
            argv, environ = contender.start(place)
            with Server(argv, environ, place.scratch) as server:
                yield server, place

    def start(self, contender: Contender, counted: bool = True) -> None:
        """From exec to the first 200 of /ping, and to the first good answer, of a model that is nothing."""
        body = self.questions[0].body
        with self._running(contender, "trivial") as (server, place):
            pinged, _ = until(server, place.port, None, lambda _: True, READY_S)
            answered, _ = until(server, place.port, body, _length, READY_S)
        if counted:
            self._add(START, contender, (pinged - server.started_ns) / 1e6)
            self._add(START_ANSWER, contender, (answered - server.started_ns) / 1e6)

    def slow(self, contender: Contender) -> None:
        """Of a model that takes 2 s to load: what /ping says meanwhile, and whether it is true."""
        with self._running(contender, "slow") as (server, place):
            pinged, before = until(server, place.port, None, lambda _: True, READY_S)
            answered, _ = until(server, place.port, self.questions[0].body, _length, READY_S)
            loaded = int(place.loaded.read_text().split()[0]) if place.loaded.exists() else None
        self._note(SLOW_PING, contender, before)
        self._add(SLOW_PING, contender, (pinged - server.started_ns) / 1e6)
        self._add(SLOW_ANSWER, contender, (answered - server.started_ns) / 1e6)
        if loaded is None:
            raise Failed("the model did not note that it was loaded")
        self._add(SLOW_EARLY, contender, max(0.0, (loaded - pinged) / 1e6))

    def kill(self, contender: Contender) -> None:
        """From SIGKILL of the process that the model is in, to the next good answer, by another process."""
        found: list[int] = []

        def pid(body: bytes) -> bool:
            with contextlib.suppress(ValueError, TypeError, IndexError, KeyError):
                found.append(int(json.loads(body)[0]))
                return found[-1] != found[0] or len(found) == 1
            return False

        with self._running(contender, "pid") as (server, place):
            body = self.questions[0].body
            until(server, place.port, body, pid, READY_S)
            killed = time.monotonic_ns()
            os.kill(found[0], signal.SIGKILL)
            try:
                back, before = until(server, place.port, body, pid, BACK_S, each_s=2.0)
            except Failed:  # which is a result, not a failure to measure
                ended = "the server ended" if server.ended else f"not within {BACK_S:g} s"
                self.said.setdefault(BACK, {})[contender.label] = f"**none: {ended}**"
                return
        self._note(BACK, contender, before)
        self._add(BACK, contender, (back - killed) / 1e6)

    def load(self, contender: Contender, order: Sequence[int]) -> None:
        """Requests a second, how long they take, what they cost, and what the server holds before and after."""
        with self._running(contender, "matrix") as (server, place):
            question = self.questions[0]
            until(server, place.port, question.body, question.answered_by, READY_S)
            ask_many(place.port, self.questions, IDLE_REQUESTS)
            idle = server.memory()
            look_at(place.port, self.questions, 8)
            for connections in order:
                self._point(contender, server, place.port, connections)
            after = server.memory()
        for table, value in (
            (PSS_IDLE, idle.share / MB),
            (RSS_IDLE, idle.resident / MB),
            (PSS_AFTER, after.share / MB),
            (RSS_AFTER, after.resident / MB),
            (PROCESSES, idle.processes),
        ):
            self._add(table, contender, value)

    def _point(self, contender: Contender, server: Server, port: int, connections: int) -> None:
        warm = self._wrk.run(port, connections, self._warm_up, check=True)
        if not warm["requests"]:
            raise server.failed(f"c={connections}: no answer at all")
        if warm["wrong"]:
            raise server.failed(f"c={connections}: {warm['wrong']} of {warm['requests']} answers are wrong or not 200")
        before_s = server.cpu_s()
        done = self._wrk.run(port, connections, self._seconds, check=False)
        used_s = server.cpu_s() - before_s
        count = done["requests"]
        if not count or done["not_200"]:
            raise server.failed(
                f"c={connections}: {done['not_200']} of {count} answers are not 200: the figure is void"
            )
        # Nobody looks at these answers, but all are the answer to one question, so all have the length that was right.
        length, right = done["bytes"] / count, warm["bytes"] / warm["requests"]
        if abs(length / right - 1) > 0.02:
            raise server.failed(f"c={connections}: answers of {length:.1f} bytes, right are {right:.1f}: void")
        if done["socket"] > count / 1000:
            raise server.failed(f"c={connections}: {done['socket']} socket errors and {count} answers: void")
        self._add(at(RATE, connections), contender, count / done["us"] * 1e6)
        self._add(at(P50, connections), contender, done["p50"] / 1e3)
        self._add(at(P99, connections), contender, done["p99"] / 1e3)
        self._add(at(CPU, connections), contender, used_s / count * 1e6)
        if done["socket"]:
            self._add(at(SOCKET, connections), contender, done["socket"])


@contextlib.contextmanager
def kept_config() -> Iterator[None]:
    """What the reference toolkit overwrites is put back, and nothing is left running, whatever happens."""
    before = MMS_CONFIG.read_bytes() if MMS_CONFIG.exists() else None
    try:
        yield
    finally:
        kill_all()
        if before is not None:
            MMS_CONFIG.write_bytes(before)
        elif MMS_CONFIG.exists():
            MMS_CONFIG.unlink()


def find_wrk() -> str | None:
    """The load generator."""
    return shutil.which("wrk")
