"""Looking at running ranks once a second at most: do they move, and what are their helpers?

A job hangs when, for the whole limit, no rank logs, reads, writes or reports a step, and (for jobs that report no
steps) none uses a CPU. A long checkpoint writes, a long evaluation computes: neither is a hang.
"""

from __future__ import annotations

import os
import time

from launcher.supervisor.pages import read_page
from launcher.verdict import LostChild

TYPE_CHECKING = False
if TYPE_CHECKING:
    from launcher.supervisor.attempt import Attempt
    from launcher.supervisor.guardian import Event, Guardian

# Timers of idle threads (progress bars, watchdogs) use a little: below this share of one CPU a rank is idle.
_IDLE_CPU_SHARE = 0.02
_PERIOD_S = 1.0
# Time for the ranks to write their stacks after the signal that asks for them.
_STACKS_S = 1.0
_STACK_SIGNAL = 45  # as launcher/rank/_launcher_shim.py
_RUNNING_PHASE = 2
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_KIB = os.sysconf("SC_PAGE_SIZE") // 1024
_COLLECTIVE_SEQ, _COLLECTIVE_ENTER = 136, 152


class Child:
    """A helper process of a rank (a loader worker, say), as last seen."""

    __slots__ = ("command", "pid", "rank", "rss_kib")

    def __init__(self, pid: int, rank: int, command: str) -> None:
        self.pid, self.rank, self.command, self.rss_kib = pid, rank, command, 0


class Watch:
    """The watch over one attempt's ranks. ``hang`` is "" until a hang was found."""

    def __init__(self, hang_timeout_s: float) -> None:
        self.hang_timeout_s = hang_timeout_s
        self.hang = ""
        self.hang_rank: int | None = None
        self._moved_s = self._sampled_s = time.monotonic()
        self._next_s = self._moved_s + _PERIOD_S
        self._stacks_at_s = 0.0
        self._logged: tuple[int, ...] = ()
        self._new_logged: tuple[int, ...] = ()
        self._io: dict[int, int] = {}
        self._cpu: dict[int, int] = {}
        self._steps: dict[int, tuple[int, int]] = {}
        self._children: dict[int, Child] = {}
        self._commands: dict[int, bytes] = {}

    def next_time(self) -> float:
        """When the next look is due."""
        return self._next_s

    def on_stats(self, event: Event) -> None:
        """Takes the guardian's counters of logged bytes."""
        self._new_logged = tuple(int(item.split()[1]) for item in event.items())

    def on_time(self, now_s: float, attempt: Attempt, guardian: Guardian) -> str:
        """Looks, if it is time to. Returns the text of a hang when one has just been found, else ""."""
        if now_s < self._next_s:
            return ""
        self._next_s = now_s + _PERIOD_S
        if self._stacks_at_s:
            return self._conclude(attempt)
        period_s, self._sampled_s = now_s - self._sampled_s, now_s
        moved = self._sample(attempt, period_s)
        if self.hang_timeout_s:
            guardian.send("stats")
        if moved:
            self._moved_s = now_s
        elif self.hang_timeout_s and now_s - self._moved_s >= self.hang_timeout_s:
            self._ask_for_stacks(now_s, attempt, guardian)
        return ""

    def lost_children(self) -> tuple[LostChild, ...]:
        """Helpers that were there at the last look and are gone, largest first. Helpers of ended ranks included."""
        gone = [child for child in self._children.values() if not os.path.exists(f"/proc/{child.pid}")]
        gone.sort(key=lambda child: -child.rss_kib)
        return tuple(LostChild(child.rank, child.pid, child.command, child.rss_kib) for child in gone)

    # ---- looking

    def _sample(self, attempt: Attempt, period_s: float) -> bool:
        moved = self._new_logged != self._logged
        self._logged = self._new_logged
        parents = _parents()
        reports = False
        for slot, pid in attempt.pids.items():
            launch = attempt.launches.get(slot)
            if launch is None or slot in attempt.records:
                continue
            tree = [pid, *_below(pid, parents)]
            cpu, io = self._usage(tree, launch.rank, pid)
            # Counters of an ended helper leave the sums: only growth is movement.
            if io > self._io.get(slot, 0):
                moved = True
            step = _progress(launch.status_page)
            if step != self._steps.get(slot):
                moved = moved or slot in self._steps
                self._steps[slot] = step
            reports = reports or step != (0, 0)
            busy = (cpu - self._cpu.get(slot, 0)) / _TICKS > _IDLE_CPU_SHARE * period_s
            moved = moved or (busy and not reports)
            self._io[slot], self._cpu[slot] = io, cpu
            self._note_exec(slot, pid, attempt)
        return moved

    def _usage(self, tree: list[int], rank: int, leader: int) -> tuple[int, int]:
        """CPU ticks and bytes read and written by a rank with its helpers."""
        ticks = written = 0
        for pid in tree:
            try:
                with open(f"/proc/{pid}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue  # ended since the listing
            ticks += int(fields[11]) + int(fields[12])
            if pid != leader:
                child = self._children.get(pid)
                if child is None:
                    child = self._children[pid] = Child(pid, rank, _command(pid))
                child.rss_kib = max(child.rss_kib, int(fields[21]) * _PAGE_KIB)
            written += _io_bytes(pid)
        return ticks, written

    def _note_exec(self, slot: int, pid: int, attempt: Attempt) -> None:
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                command = file.read()
        except OSError:
            return
        if command and self._commands.setdefault(slot, command) != command:
            attempt.replaced.add(slot)

    # ---- a hang

    def _ask_for_stacks(self, now_s: float, attempt: Attempt, guardian: Guardian) -> None:
        """Every rank that runs our shim writes the stacks of its threads to its stderr."""
        for slot in attempt.pids:
            launch = attempt.launches.get(slot)
            if launch is None or slot in attempt.records or slot in attempt.replaced or not launch.booted:
                continue
            page = read_page(launch.status_page)
            if page is not None and page[0] == _RUNNING_PHASE:
                guardian.send("signal", slot, _STACK_SIGNAL)
        self._stacks_at_s = now_s
        self._next_s = now_s + _STACKS_S

    def _conclude(self, attempt: Attempt) -> str:
        alive = [attempt.launches[slot] for slot in attempt.pids if slot in attempt.launches]
        alive = [launch for launch in alive if launch.local_rank not in attempt.records]
        where = {launch.rank: _collective(launch.status_page) for launch in alive}
        inside = {rank: seq for rank, (seq, entered) in where.items() if entered}
        outside = sorted(rank for rank, (_, entered) in where.items() if not entered)
        text = f"hang: no log, no step and no I/O in any rank for {self.hang_timeout_s:g} s"
        if inside and outside:
            self.hang_rank = outside[0]
            names = ", ".join(map(str, outside))
            text += f"; rank {names} never entered collective #{max(inside.values())}, where the others wait"
        elif len(set(self._steps.values())) > 1:
            slot = min(self._steps, key=lambda slot: self._steps[slot])
            self.hang_rank = attempt.launches[slot].rank
            text += f"; rank {self.hang_rank} is behind, at step {self._steps[slot][0]}"
        self.hang = text + "; the stacks of all ranks are in their stderr.log"
        return self.hang


def _progress(path: str) -> tuple[int, int]:
    page = read_page(path)
    return (page[1], _collective(path)[0]) if page else (0, 0)


def _collective(path: str) -> tuple[int, int]:
    """Collectives entered so far, and when the current one was entered (0: outside of any)."""
    try:
        with open(path, "rb") as file:
            page = file.read(256)
    except OSError:
        return 0, 0

    def number(offset: int) -> int:
        return int.from_bytes(page[offset : offset + 8], "little")

    return number(_COLLECTIVE_SEQ), number(_COLLECTIVE_ENTER)


def _parents() -> dict[int, list[int]]:
    """Parent -> children, of all processes."""
    result: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except OSError:
                continue  # ended since the listing
            result.setdefault(parent, []).append(int(name))
    return result


def _below(pid: int, children: dict[int, list[int]]) -> list[int]:
    result, queue = [], list(children.get(pid, ()))
    while queue:
        child = queue.pop()
        result.append(child)
        queue += children.get(child, ())
    return result


def _io_bytes(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/io", "rb") as file:
            lines = file.read().split()
    except OSError:
        return 0  # another user's process, or ended
    return int(lines[1]) + int(lines[3]) if len(lines) > 3 else 0


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read(200).replace(b"\0", b" ").decode("utf-8", "replace").strip() or "?"
    except OSError:
        return "?"
