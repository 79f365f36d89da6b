"""Looking at running ranks once a second at most: do they move, and what are their helpers?

A job hangs when, for the whole limit, no rank logs, reads, writes, reports a step or enters a collective, and (for jobs
that report no steps) none uses a CPU outside of collectives. A long checkpoint writes, a long evaluation computes:
neither is a hang.
"""

from __future__ import annotations

import os
import time

from launcher.evidence import LostChild, RankProgress
from launcher.supervisor.pages import read_page
from launcher.supervisor.stragglers import Waits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from launcher.supervisor.attempt import Attempt
    from launcher.supervisor.guardian import Event, Guardian
    from launcher.supervisor.pages import Page
    from launcher.supervisor.stacks import StackDumps

# Timers of idle threads (progress bars, watchdogs) use a little: below this share of one CPU a rank is idle.
_IDLE_CPU_SHARE = 0.02
_PERIOD_S = 1.0
# Time for the ranks to write their stacks after the signal that asks for them.
_STACKS_S = 1.0
# A debugger reads symbols first; it is ended after this.
_DEBUGGER_S = 15.0
_KEPT_SAMPLES = 64
_STACK_SIGNAL = 45  # as launcher/rank/_launcher_shim.py
_RUNNING_PHASE = 2
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_KIB = os.sysconf("SC_PAGE_SIZE") // 1024
# Helpers that ended longer ago than this are of no use as evidence.
_KEPT_S = 5.0


class Child:
    """A helper process of a rank (a loader worker, say), as last seen."""

    __slots__ = ("command", "pid", "rank", "rss_kib", "seen_s", "start_ticks")

    def __init__(self, pid: int, start_ticks: int, rank: int, command: str) -> None:
        self.pid, self.start_ticks, self.rank, self.command = pid, start_ticks, rank, command
        self.rss_kib, self.seen_s = 0, 0.0


class Watch:
    """The watch over one attempt's ranks.

    Attributes:
        still: nothing has moved for the time that makes a hang.
        waits: how long the ranks wait for each other.
    """

    def __init__(self, hang_timeout_s: float, straggler_window_s: float) -> None:
        self.hang_timeout_s = hang_timeout_s
        self.still = False
        self._moved_s = self._sampled_s = time.monotonic()
        self._next_s = self._moved_s + _PERIOD_S
        self.waits = Waits(straggler_window_s, self._moved_s)
        self._stacks_at_s = 0.0
        self._logged: tuple[int, ...] = ()
        self._new_logged: tuple[int, ...] = ()
        self._io: dict[int, int] = {}
        self._cpu: dict[int, int] = {}
        self._steps: dict[int, tuple[int, int]] = {}
        self._children: dict[int, Child] = {}
        self._memory: dict[int, list[tuple[float, int]]] = {}  # rank -> (time, KiB of the rank and its helpers)
        self._dumps: StackDumps | None = None
        self._programs: dict[int, str] = {}

    def next_time(self) -> float:
        """When the next look is due."""
        return self._next_s

    def on_stats(self, event: Event) -> None:
        """Takes the guardian's counters of logged bytes."""
        self._new_logged = tuple(int(item.split()[1]) for item in event.items())

    def on_time(self, now_s: float, attempt: Attempt, guardian: Guardian) -> tuple[RankProgress, ...] | None:
        """Looks, if it is time to. Returns where the ranks stand once the stacks that were asked for are written."""
        if now_s < self._next_s:
            return None
        self._next_s = now_s + _PERIOD_S
        if self._stacks_at_s:
            if self._dumps is not None and not self._dumps.done() and now_s < self._stacks_at_s + _DEBUGGER_S:
                return None
            if self._dumps is not None:
                self._dumps.stop()
            self._stacks_at_s = 0.0
            return self._progress(attempt)
        period_s, self._sampled_s = now_s - self._sampled_s, now_s
        moved = self._sample(attempt, period_s)
        if self.hang_timeout_s:
            guardian.send("stats")
        if moved:
            self._moved_s = now_s
        self.still = bool(self.hang_timeout_s) and now_s - self._moved_s >= self.hang_timeout_s
        return None

    def lost_children(self) -> tuple[LostChild, ...]:
        """Helpers that were there at the last look and are gone, largest first. Helpers of ended ranks included."""
        gone = [child for child in self._children.values() if not os.path.exists(f"/proc/{child.pid}")]
        gone.sort(key=lambda child: -child.rss_kib)
        return tuple(LostChild(child.rank, child.pid, child.command, child.rss_kib) for child in gone)

    def memory_trend(self, rank: int) -> str:
        """How the memory of a rank and its helpers grew, in words; "" when it was not seen long enough."""
        samples = self._memory.get(rank, [])
        if len(samples) < 3:
            return ""
        last_s = samples[-1][0]
        chosen = (samples[0], samples[len(samples) // 2], samples[-1])
        parts = [f"{kib / 2**10:.0f} MiB {last_s - moment:.0f} s earlier" for moment, kib in chosen[:2]]
        return f"memory of the rank and its helpers: {', '.join(parts)}, {chosen[2][1] / 2**10:.0f} MiB when last seen"

    # ---- looking

    def _sample(self, attempt: Attempt, period_s: float) -> bool:
        moved = self._new_logged != self._logged
        self._logged = self._new_logged
        parents = _parents()
        busy = reports = False
        for slot, pid in attempt.pids.items():
            launch = attempt.launches.get(slot)
            if launch is None or slot in attempt.records:
                continue
            cpu, io, rss_kib = self._usage([pid, *_below(pid, parents)], launch.rank, pid)
            _keep(self._memory.setdefault(launch.rank, []), (self._sampled_s, rss_kib))
            # Counters of an ended helper leave the sums: only growth is movement.
            moved = moved or io > self._io.get(slot, 0)
            page = read_page(launch.status_page)
            step = (page.step, page.collective_seq) if page else (0, 0)
            if page and page.collective_seq:
                self.waits.note(launch.rank, page.collective_waits_ns)
            if step != self._steps.get(slot):
                moved = moved or slot in self._steps
                self._steps[slot] = step
            reports = reports or step[0] != 0
            # A rank that waits in a collective may spin.
            inside = page is not None and page.collective_entered_ns != 0
            used_s = (cpu - self._cpu.get(slot, 0)) / _TICKS
            busy = busy or (used_s > _IDLE_CPU_SHARE * period_s and not inside)
            self._io[slot], self._cpu[slot] = io, cpu
            self._note_exec(slot, pid, attempt)
        oldest_s = self._sampled_s - _KEPT_S
        self._children = {pid: child for pid, child in self._children.items() if child.seen_s >= oldest_s}
        # Other libraries' collectives spin and do not say so: where steps are reported, only they tell progress.
        return moved or (busy and not reports)

    def _usage(self, tree: list[int], rank: int, leader: int) -> tuple[int, int, int]:
        """CPU ticks, bytes read and written, and resident KiB of a rank with its helpers."""
        ticks = written = rss_kib = 0
        for pid in tree:
            try:
                with open(f"/proc/{pid}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue  # ended since the listing
            ticks += int(fields[11]) + int(fields[12])
            rss_kib += int(fields[21]) * _PAGE_KIB
            if pid != leader:
                child, start_ticks = self._children.get(pid), int(fields[19])
                if child is None or child.start_ticks != start_ticks:
                    child = self._children[pid] = Child(pid, start_ticks, rank, _command(pid))
                child.seen_s = self._sampled_s
                child.rss_kib = max(child.rss_kib, int(fields[21]) * _PAGE_KIB)
            written += _io_bytes(pid)
        return ticks, written, rss_kib

    def _note_exec(self, slot: int, pid: int, attempt: Attempt) -> None:
        """A rank that native code has turned into another program (os.exec* is told by the shim itself)."""
        try:
            program = os.readlink(f"/proc/{pid}/exe")
        except OSError:
            return
        if self._programs.setdefault(slot, program) != program:
            attempt.replaced.add(slot)

    # ---- a hang

    def ask_for_stacks(self, now_s: float, attempt: Attempt, guardian: Guardian) -> None:
        """Every rank that runs our shim writes its stacks to its stderr; a debugger sees the others too."""
        from launcher.supervisor.stacks import StackDumps

        targets = {}
        for slot, pid in attempt.pids.items():
            launch = attempt.launches.get(slot)
            if launch is None or slot in attempt.records:
                continue
            targets[pid] = os.path.join(os.path.dirname(launch.status_page), "stacks.txt")
            if slot in attempt.replaced or not launch.booted:
                continue
            page = read_page(launch.status_page)
            if page is not None and page.phase == _RUNNING_PHASE:
                guardian.send("signal", slot, _STACK_SIGNAL)
        self._dumps = StackDumps(targets)
        self._stacks_at_s = now_s
        self._next_s = now_s + _STACKS_S

    def _progress(self, attempt: Attempt) -> tuple[RankProgress, ...]:
        alive = [attempt.launches[slot] for slot in attempt.pids if slot in attempt.launches]
        now_ns = time.monotonic_ns()
        return tuple(
            _progress_of(launch.rank, read_page(launch.status_page), now_ns)
            for launch in alive
            if launch.local_rank not in attempt.records
        )


def _progress_of(rank: int, page: Page | None, now_ns: int) -> RankProgress:
    if page is None:
        return RankProgress(rank, None, 0)
    entered_ns = page.collective_entered_ns
    return RankProgress(
        rank,
        page.number if entered_ns else None,
        page.step,
        operation=page.operation,
        last=page.number,
        bytes=page.bytes,
        doing=page.doing,
        inside_s=max(0, now_ns - entered_ns) / 1e9 if entered_ns else 0.0,
        waiting_for=page.waiting_for,
    )


def _keep(samples: list[tuple[float, int]], sample: tuple[float, int]) -> None:
    """Appends, and thins out evenly when there are many: the whole run stays in view."""
    samples.append(sample)
    if len(samples) > _KEPT_SAMPLES:
        del samples[1:-1:2]


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
    """Program and script of a process. Not its whole command line, which may hold secrets."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read(4096).decode("utf-8", "replace").split("\0")
    except OSError:
        return "?"
    script = next((word for word in words[1:4] if word.endswith((".py", ".sh"))), "")
    return " ".join(os.path.basename(word) for word in (words[0], script) if word) or "?"
