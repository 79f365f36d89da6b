"""The ranks of one contender as processes that wait, stopped, until it is their turn."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RANK = Path(__file__).resolve().with_name("rank.py")
START_S = 60.0  # for all ranks to have made their group
KEPT = ("PATH", "LANG", "HOME")  # of the environment; nothing of the caller's settings gets to a contender


class RankFailed(Exception):
    """A contender's rank did not start, gave a wrong sum, raised, or did not answer in time."""


@dataclass(frozen=True)
class Contender:
    """One library in one setting.

    ``peer`` is the library; several settings of one may be measured. ``start`` is the command up to the Python (of
    which there is one for all ranks, with ``{n}`` for their number), empty: the benchmark starts each rank itself.
    """

    label: str
    peer: str
    adapter: str
    python: str
    start: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ("float32",)


class Ranks:
    """The running ranks of a contender. A context manager.

    Args:
        cores: the cores they are pinned to in turn.
        enter: for each rank, or for the one command that starts them all, what to put before it (a host's namespaces).
    """

    def __init__(
        self,
        contender: Contender,
        size: int,
        cores: Sequence[int],
        scratch: Path,
        support: Path,
        enter: Sequence[Sequence[str]] = (),
        log: Path | None = None,
    ) -> None:
        self.contender, self.size = contender, size
        self.version = ""
        self._scratch = scratch
        self._pids: dict[int, int] = {}
        self._links: dict[int, socket.socket] = {}
        self._lines: dict[int, Any] = {}
        self._stopped = False
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        self.log = log or scratch / "log"
        config = {
            "socket": str(scratch / "socket"),
            "scratch": str(scratch),
            "support": str(support),
            "adapter": contender.adapter,
            "size": size,
            "cores": list(cores),
            "label": contender.label,
            "options": {"scratch": str(scratch), "meeting": f"b{os.getpid()}-{scratch.name}", **contender.options},
        }
        environ = {name: os.environ[name] for name in KEPT if name in os.environ}
        environ |= {"OMP_NUM_THREADS": "1", "TMPDIR": str(scratch), "PYTHONDONTWRITEBYTECODE": "1"}
        environ |= {"PYTHONPATH": str(RANK.parent), **contender.environ}
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(config["socket"])
        listener.listen(size)
        commands = []
        for rank in range(1 if contender.start else size):
            start = [word.replace("{n}", str(size)) for word in contender.start]
            given = json.dumps({**config, "rank": None if contender.start else rank})
            before = enter[rank] if enter else ()
            commands.append([*before, *start, contender.python, str(RANK), given])
        self._processes = []
        with self.log.open("ab") as log_file:
            for command in commands:
                self._processes.append(
                    subprocess.Popen(
                        command,
                        env=environ,
                        cwd=scratch,
                        stdin=subprocess.DEVNULL,
                        stdout=log_file,
                        stderr=log_file,
                        start_new_session=True,
                    )
                )
        try:
            self._meet(listener)
        except BaseException:
            self.close()
            raise
        finally:
            listener.close()

    def _meet(self, listener: socket.socket) -> None:
        deadline = time.monotonic() + START_S
        listener.settimeout(0.2)
        while len(self._links) < self.size:
            try:
                link, _ = listener.accept()
            except TimeoutError:
                dead = [process for process in self._processes if process.poll() is not None]
                if dead or time.monotonic() > deadline:
                    end = f"it ended with {dead[0].returncode}" if dead else f"no ranks within {START_S:g} s"
                    raise RankFailed(f"{end}: {self._tail()}") from None
                continue
            link.settimeout(START_S)
            lines = link.makefile("r", encoding="utf-8")
            hello = json.loads(lines.readline())
            self._links[hello["rank"]], self._lines[hello["rank"]] = link, lines
            self._pids[hello["rank"]] = hello["pid"]
        self.version = self._answers()[0]["version"]
        self.stop()

    def _tail(self) -> str:
        text = self.log.read_bytes()[-3000:].decode(errors="replace").strip()
        return text.splitlines()[-1] if text else "it said nothing"

    def _answers(self) -> list[Any]:
        found = []
        for rank in sorted(self._links):
            try:
                line = self._lines[rank].readline()
            except TimeoutError:
                raise RankFailed(f"rank {rank} did not answer in time") from None
            answer = json.loads(line) if line else {"error": f"it ended: {self._tail()}"}
            if isinstance(answer, dict) and "error" in answer:
                raise RankFailed(f"rank {rank}: {answer['error']}")
            found.append(answer)
        return found

    def _signal(self, number: int) -> None:
        for pid in self._pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop(self) -> None:
        """Nothing of it runs any more, its threads included."""
        self._signal(signal.SIGSTOP)
        self._stopped = True

    def resume(self) -> None:
        """Its turn."""
        self._signal(signal.SIGCONT)
        self._stopped = False

    def order(self, order: Mapping[str, Any], limit_s: float = 60.0) -> list[Any]:
        """Gives all ranks an order; their answers, by rank. They run for as long as that takes.

        Raises:
            RankFailed: with what a rank had to say. The contender is not to be used again.
        """
        self.resume()
        data = json.dumps(order).encode() + b"\n"
        for link in self._links.values():
            link.settimeout(limit_s)
            link.sendall(data)
        found = self._answers()
        self.stop()
        return found

    def close(self) -> None:
        """Ends all its processes, and removes its files."""
        segments = self._segments()
        self.resume()
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.sendall(b'{"do": "end"}\n')
                link.close()
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and any(process.poll() is None for process in self._processes):
            time.sleep(0.01)
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._signal(signal.SIGKILL)  # ranks that a daemon had put into a session of their own
        self._pids.clear()
        for path in segments:
            path.unlink(missing_ok=True)
        if self.log.is_relative_to(self._scratch):
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _segments(self) -> set[Path]:
        """Shared memory with a name that its ranks have mapped: some libraries leave it there."""
        found = set()
        for pid in self._pids.values():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                    path = Path(line.split(maxsplit=5)[-1])
                    if path.parent == Path("/dev/shm"):
                        found.add(path)
        return found

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def compile_support(directory: Path) -> Path:
    """Builds support.c for this machine.

    Raises:
        SystemExit: there is no C compiler, or it failed.
    """
    out = directory / "support.so"
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        sys.exit("no C compiler (cc): the benchmark builds its barrier and its memory loops on the machine")
    source = RANK.with_name("support.c")
    subprocess.run([compiler, "-O3", "-march=native", "-shared", "-fPIC", "-o", str(out), str(source)], check=True)
    return out
