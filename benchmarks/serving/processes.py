"""A server and everything that it starts: begun, looked at, and ended for certain.

The benchmark makes itself the reaper of its descendants, so a process whose parent ended becomes its child instead of
being lost: whatever descends from the benchmark while a server runs is that server's.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
STOP_S = 1.0  # after SIGTERM; then SIGKILL
GONE_S = 10.0
TICKS = os.sysconf("SC_CLK_TCK")
# Of the environment; nothing of the caller's settings gets to a contender.
KEPT = ("PATH", "JAVA_HOME")
SAME_FOR_ALL = {
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


class Failed(Exception):
    """A server did not do what is measured; the text says what, with the end of its output."""


def adopt() -> None:
    """Makes this process the parent of descendants whose own parent ended."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


@dataclass(frozen=True)
class Process:
    """One line of /proc/PID/stat."""

    pid: int
    parent: int
    state: str
    cpu_s: float


def processes() -> Iterator[Process]:
    """All that there are."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
                cpu_s = (int(words[11]) + int(words[12])) / TICKS
                yield Process(int(name), int(words[1]), words[0], cpu_s)


def descendants(root: int) -> list[Process]:
    """Of a process, zombies not."""
    children: dict[int, list[Process]] = {}
    for process in processes():
        children.setdefault(process.parent, []).append(process)
    found, queue = [], [root]
    while queue:
        for child in children.get(queue.pop(), ()):
            queue.append(child.pid)
            if child.state not in "ZX":
                found.append(child)
    return found


def reap(kept: int | None = None) -> None:
    """Buries what ended and has nobody else to do it; ``kept`` is left to the one who waits for it."""
    own = os.getpid()
    for process in processes():
        if process.state == "Z" and process.parent == own and process.pid != kept:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)


def kill_all(root: subprocess.Popen[bytes] | None = None) -> None:
    """Ends everything that descends from the benchmark; raises Failed when something does not end."""
    deadline = time.monotonic() + GONE_S
    while left := descendants(os.getpid()):
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        if root is not None:
            root.poll()
        reap(root.pid if root is not None else None)
        if time.monotonic() > deadline:
            raise Failed(f"processes that cannot be ended: {', '.join(str(process.pid) for process in left)}")
        time.sleep(0.005)
    if root is not None:
        root.wait()
    reap()


@dataclass(frozen=True)
class Memory:
    """Of all processes of a server, in bytes; ``share`` counts a page that n processes map as an n-th of it (PSS)."""

    resident: int
    share: int
    processes: int


class Server:
    """A running server. A context manager: at its end, none of its processes is left."""

    def __init__(self, argv: Sequence[str], environ: Mapping[str, str], scratch: Path) -> None:
        self.log = scratch / "log"
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        places = {"HOME": str(scratch), "TMPDIR": str(scratch), "TEMP": str(scratch)}
        with self.log.open("wb") as log:
            self.started_ns = time.monotonic_ns()
            self.process = subprocess.Popen(
                list(argv),
                env={**kept, **places, **SAME_FOR_ALL, **environ},
                cwd=scratch,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.poll()
        if self.process.returncode is None:
            self.process.terminate()
        deadline = time.monotonic() + STOP_S
        while descendants(os.getpid()) and time.monotonic() < deadline:
            self.process.poll()
            reap(self.process.pid)
            time.sleep(0.01)
        kill_all(self.process)

    @property
    def ended(self) -> bool:
        """Its first process, that is."""
        return self.process.poll() is not None

    def failed(self, what: str) -> Failed:
        """An error with the end of what the server wrote."""
        ended = f" (it ended with {self.process.returncode})" if self.ended else ""
        lines = self.log.read_bytes()[-4000:].decode(errors="replace").strip().splitlines()
        said = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
        return Failed(f"{what}{ended}; it wrote: {said[:300]}")

    def memory(self) -> Memory:
        """Now."""
        resident = share = count = 0
        for process in descendants(os.getpid()):
            with contextlib.suppress(OSError):
                fields = dict(
                    line.split(":", 1)
                    for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().split("\n")[1:-1]
                )
                resident += int(fields["Rss"].split()[0]) * 1024
                share += int(fields["Pss"].split()[0]) * 1024
                count += 1
        return Memory(resident, share, count)

    def cpu_s(self) -> float:
        """That its processes have used up so far; of those that ended, nothing."""
        return sum(process.cpu_s for process in descendants(os.getpid()))
