"""The ranks of one contender as processes that wait, stopped, until it is their turn."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORKER = Path(__file__).resolve().with_name("worker.py")
START_S = 120.0  # for all ranks to have imported what they need
ORDER_S = 180.0
KEPT = ("PATH", "LANG", "HOME")  # of the environment; nothing of the caller's settings gets to a contender


class RankFailed(Exception):
    """A contender's rank did not start, returned what is not in the data, raised, or did not answer in time."""


@dataclass(frozen=True)
class Contender:
    """One library in one setting.

    Args:
        label: what it is called in the tables.
        peer: the library; several settings of one may be measured.
        adapter: module in ``adapters``.
        python: of the environment that has the library.
        options: for the adapter.
    """

    label: str
    peer: str
    adapter: str
    python: str
    options: Mapping[str, Any] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)


class Ranks:
    """The running ranks of a contender, rank i pinned to core i. A context manager."""

    def __init__(self, contender: Contender, cores: Sequence[int], scratch: Path) -> None:
        self.contender = contender
        self.version = ""
        self.failed = False
        scratch.mkdir(parents=True, exist_ok=True)
        self._log = scratch / "log"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._links: list[socket.socket] = []
        environ = {name: os.environ[name] for name in KEPT if name in os.environ}
        environ |= {"OMP_NUM_THREADS": "1", "TMPDIR": str(scratch), "PYTHONDONTWRITEBYTECODE": "1"}
        environ |= contender.environ
        with self._log.open("ab") as log:
            for rank, core in enumerate(cores):
                ours, theirs = socket.socketpair()
                config = {"rank": rank, "core": core, "adapter": contender.adapter, "options": dict(contender.options)}
                config |= {"socket": theirs.fileno(), "scratch": str(scratch)}
                self._links.append(ours)
                self._processes.append(
                    subprocess.Popen(
                        [contender.python, str(WORKER), json.dumps(config)],
                        env=environ,
                        cwd=scratch,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        pass_fds=[theirs.fileno()],
                        start_new_session=True,
                    )
                )
                theirs.close()
        self._lines = [link.makefile("r", encoding="utf-8") for link in self._links]

    def ready(self) -> None:
        """Waits until all of them have imported their library, and stops them."""
        self.version = self._answers(range(len(self._links)), START_S)[0]["version"]
        self._signal(signal.SIGSTOP)

    def _tail(self) -> str:
        lines = self._log.read_bytes()[-3000:].decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def _answers(self, ranks: Sequence[int], limit_s: float) -> list[Any]:
        found = []
        for rank in ranks:
            self._links[rank].settimeout(limit_s)
            try:
                line = self._lines[rank].readline()
            except TimeoutError:
                raise RankFailed(f"rank {rank} did not answer within {limit_s:g} s") from None
            answer = json.loads(line) if line else {"error": f"it ended: {self._tail()}"}
            if "error" in answer:
                raise RankFailed(f"rank {rank}: {answer['error']}")
            found.append(answer)
        return found

    def _signal(self, number: int) -> None:
        for process in self._processes:  # with the workers that it started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def order(self, world: int, order: Mapping[str, Any], limit_s: float = ORDER_S) -> list[Any]:
        """Gives the first ``world`` ranks an order; their answers. They run for as long as that takes.

        Raises:
            RankFailed: with what a rank had to say. The contender is not to be used again.
        """
        self._signal(signal.SIGCONT)
        try:
            data = json.dumps({**order, "world": world}).encode() + b"\n"
            for link in self._links[:world]:
                link.sendall(data)
            return self._answers(range(world), limit_s)
        except OSError as error:
            raise RankFailed(f"{error}: {self._tail()}") from None
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """Ends all its processes."""
        self._signal(signal.SIGCONT)
        for link in self._links:
            link.close()  # a rank that reads the end of its orders ends
        for lines in self._lines:
            lines.close()
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline and any(process.poll() is None for process in self._processes):
            time.sleep(0.01)
        self._signal(signal.SIGKILL)
        for process in self._processes:
            process.wait()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
