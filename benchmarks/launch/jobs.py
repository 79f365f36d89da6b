"""One run of one launcher: start it, meet its ranks, read what its processes cost, and leave nothing behind.

All times are CLOCK_MONOTONIC, which parent and children share, in nanoseconds. Ends of processes are seen through
pidfds, at once and also for processes that are not our children.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

RANKS = Path(__file__).resolve().parent / "ranks"
MARK = "LAUNCH_BENCH_MARK"


class RunFailed(Exception):
    """A run did not do what its case needs; the text says what, with the end of its output."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one process: ``private`` is what its end would free (USS), ``share`` its fair part of all (PSS)."""

    private: int = 0
    share: int = 0

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.private + other.private, self.share + other.share)


def memory_of(pid: int) -> Memory:
    """Read ``smaps_rollup``; a process that is gone costs nothing."""
    fields: dict[str, int] = {}
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, _, value = line.partition(":")
            fields[name] = int(value.split()[0]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        return Memory()
    private = fields.get("Private_Clean", 0) + fields.get("Private_Dirty", 0) + fields.get("Private_Hugetlb", 0)
    return Memory(private, fields.get("Pss", 0))


def peak_rss_of(pid: int) -> int:
    """Read the largest resident size that the process ever had, in bytes; 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def pids_with(token: str) -> list[int]:
    """Find all live processes whose environment carries ``token``, wherever in the process tree they hang."""
    needle = f"{MARK}={token}".encode()
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if needle in Path(f"/proc/{name}/environ").read_bytes():
                    found.append(int(name))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
    return found


def clean_environment(scratch: Path) -> dict[str, str]:
    """The environment all launchers get: what any process needs, and nothing that changes one of them."""
    search = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    return {
        "PATH": search,
        "HOME": str(scratch),
        "TMPDIR": str(scratch),
        "LANG": "C.UTF-8",
        **{name: os.environ[name] for name in ("LD_LIBRARY_PATH", "OPAL_PREFIX") if name in os.environ},
    }


class Job:
    """A started launcher. Use as a context manager: whatever it left running is killed at the end.

    Attributes:
        started_ns: when the launcher was about to be executed.
        ranks: process ids of the ranks, known once they were met.
    """

    def __init__(self, argv: list[str], nproc: int, scratch: Path, *, pipe: bool = False) -> None:
        self.argv, self.nproc = argv, nproc
        self.token = uuid.uuid4().hex
        self.dir = scratch / self.token[:8]
        self.dir.mkdir()
        self.output = self.dir / "output"
        self.ranks: list[int] = []
        self._pidfds: dict[int, int] = {}
        env = clean_environment(self.dir) | {MARK: self.token, "LAUNCH_BENCH_DIR": str(self.dir)}
        with open(self.output, "wb") as log, open(os.devnull, "rb") as empty:
            self.started_ns = time.monotonic_ns()
            self.process = subprocess.Popen(
                argv, cwd=self.dir, env=env, stdin=empty, stdout=subprocess.PIPE if pipe else log, stderr=log
            )

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        deadline = time.monotonic() + 10
        for fd in self._pidfds.values():
            os.close(fd)
        alive = pids_with(self.token)
        while alive and time.monotonic() < deadline:
            for pid in alive:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.01)
            alive = pids_with(self.token)
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.process.wait()
        shutil.rmtree(self.dir, ignore_errors=True)

    def fail(self, what: str) -> RunFailed:
        """Make the error for this run, with the end of the launcher's output."""
        tail = self.output.read_bytes()[-1500:].decode(errors="replace")
        return RunFailed(f"{what}\ncommand: {' '.join(self.argv)}\n{tail}")

    def read_ranks(self, name: str, limit_s: float = 60.0) -> list[str]:
        """Wait until every rank has written ``name.<rank>``, and return the texts in rank order."""
        paths = [self.dir / f"{name}.{rank}" for rank in range(self.nproc)]
        deadline = time.monotonic() + limit_s
        while not all(path.exists() for path in paths):
            if time.monotonic() > deadline:
                raise self.fail(f"no {name!r} from all ranks within {limit_s:g} s")
            if self.process.poll() is not None and not all(path.exists() for path in paths):
                raise self.fail(f"the launcher ended with {self.process.returncode} before all ranks wrote {name!r}")
            time.sleep(0.002)
        return [path.read_text() for path in paths]

    def meet_ranks(self) -> None:
        """Wait until all ranks run, and learn their process ids."""
        self.ranks = [int(text) for text in self.read_ranks("ready")]

    def go(self) -> None:
        """Let the ranks that wait for it go on."""
        (self.dir / "go").touch()

    def wait(self, limit_s: float = 60.0) -> int:
        """Return when the launcher has ended, as CLOCK_MONOTONIC in ns."""
        (ended_ns,) = self._wait_for([self.process.pid], limit_s)
        self.process.wait()
        return ended_ns

    def wait_with_ranks(self, limit_s: float = 60.0) -> tuple[int, int]:
        """Return when the launcher had ended, and when the launcher and all ranks had; both in ns."""
        ends = self._wait_for([self.process.pid, *self.ranks], limit_s)
        self.process.wait()
        return ends[0], max(ends)

    def watch_ranks(self) -> None:
        """Open pidfds for launcher and ranks now, so that none of them can end unseen."""
        self._pidfds = {pid: os.pidfd_open(pid) for pid in (self.process.pid, *self.ranks)}

    def _wait_for(self, pids: list[int], limit_s: float) -> list[int]:
        fds = {self._pidfds.pop(pid) if pid in self._pidfds else os.pidfd_open(pid): pid for pid in pids}
        ends: dict[int, int] = {}
        poll = select.poll()
        for fd in fds:
            poll.register(fd, select.POLLIN)
        deadline = time.monotonic() + limit_s
        try:
            while len(ends) < len(pids):
                ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
                now = time.monotonic_ns()
                if not ready:
                    raise self.fail(f"{len(pids) - len(ends)} of {len(pids)} processes still ran after {limit_s:g} s")
                for fd, _ in ready:
                    poll.unregister(fd)
                    ends[fds[fd]] = now
        finally:
            for fd in fds:
                os.close(fd)
        return [ends[pid] for pid in pids]

    def helpers(self) -> list[int]:
        """List the live processes of the job that are neither the launcher's own process nor a rank."""
        own = {self.process.pid, *self.ranks}
        return [pid for pid in pids_with(self.token) if pid not in own]

    def launcher_memory(self) -> Memory:
        """Add up what the launcher and all its helper processes hold."""
        return sum((memory_of(pid) for pid in (self.process.pid, *self.helpers())), Memory())
