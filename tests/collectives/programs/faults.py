"""Ranks that are hit in the middle of collectives, some tens of groups a second: each rank is a fork of this process.

    faults.py RUN_DIR < CASES > OUTCOMES

CASES and OUTCOMES are JSON, a list each. A case: what the group is to do and how one rank of it ends. An outcome: where
that rank was, according to its status page, what each other rank said, and what was left.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import random
import select
import signal
import sys
import time
from typing import Any, NoReturn

from launcher._native import LocalGroup, StatusPage
from launcher.collectives.elements import DType
from launcher.errors import CollectiveError

HOST = "algo-2"
FIRST = 10  # the job's number of a group's rank 0
OPERATIONS = ("allreduce", "reduce_scatter", "all_gather", "broadcast", "reduce", "all_to_all", "barrier")
LATE_S = 5.0  # a rank that has not raised by then hangs
MOST = 1 << 20


class Hit(Exception):
    """What a rank's own code raises in the middle of a collective."""


class Memory:
    """What a rank sends and receives: its own memory, or the group's."""

    def __init__(self, group: LocalGroup, shared: bool) -> None:
        if shared:
            self.source, self.target = group.allocate(MOST), group.allocate(MOST)
        else:
            self._keep = ctypes.create_string_buffer(MOST), ctypes.create_string_buffer(MOST)
            self.source, self.target = map(ctypes.addressof, self._keep)


def call(group: LocalGroup, memory: Memory, operation: str, count: int) -> None:
    """One collective over ``count`` float32 in all."""
    size, each = group.size, count // group.size
    parts = [each] * size
    if operation == "allreduce":
        group.allreduce(memory.source, memory.target, count, DType.float32)
    elif operation == "reduce_scatter":
        group.reduce_scatter(memory.source, memory.target, parts, DType.float32)
    elif operation == "all_gather":
        group.all_gather(memory.source, memory.target, parts, DType.float32)
    elif operation == "broadcast":
        group.broadcast(memory.target, count, DType.float32, count % size)
    elif operation == "reduce":
        group.reduce(memory.source, memory.target, count, DType.float32, count % size)
    elif operation == "all_to_all":
        group.all_to_all(memory.source, memory.target, parts, parts, DType.float32)
    else:
        group.barrier()


def calls(case: dict[str, Any]) -> Any:
    """The same endless list of (operation, count) on every rank."""
    dice = random.Random(case["seed"])
    while True:
        operation = dice.choice(case["operations"])
        yield operation, dice.choice((1, 64, 1000, 16 << 10, 100_001, MOST // 4))


def open_things() -> list[str]:
    """Descriptors, and mappings of memory that others may have: what must not be left of a group that is closed."""
    things = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if not target.startswith("/proc/"):
                things.append(target)
    with open("/proc/self/maps", encoding="utf-8") as file:
        things += [line.split(maxsplit=5)[5].strip() for line in file if "memfd:" in line or "/dev/shm" in line]
    return sorted(things)


def end_on_alarm(how: str) -> None:
    def strike(number: int, frame: object) -> None:
        if how == "exit":
            os._exit(3)
        raise SystemExit(3) if how == "sys.exit" else Hit("in the middle")

    signal.signal(signal.SIGALRM, strike)


def be_rank(case: dict[str, Any], rank: int, directory: str, tell: int, go: int) -> None:
    """A rank, until its group is over; what it saw goes to ``tell`` as one line."""
    page = StatusPage.open(os.path.join(directory, f"page.{rank}"), writable=True)
    page.attach()
    victim = case["victim"] == rank
    strikes = case["how"] in ("exit", "sys.exit", "exception")
    if victim and strikes:
        end_on_alarm(case["how"])
    before = open_things()
    seen: dict[str, Any] = {"rank": rank}
    group = None
    try:
        group = LocalGroup(
            directory,
            "faults",
            rank,
            case["size"],
            ranks=[FIRST + member for member in range(case["size"])],
            host=HOST,
            timeout_s=case["timeout_s"],
            status_page=page,
        )
        memory = Memory(group, case["path"] == "shared")
        group.set_path(case["path"])
        group.barrier()
        os.write(tell, b"+\n")
        for turn, (operation, count) in enumerate(calls(case)):
            if strikes and turn == case["warm_calls"] and rank == case["late"]:
                select.select([go], [], [])  # until the victim has ended, inside of this call or the next
            if strikes and turn == case["warm_calls"] and victim:
                signal.setitimer(signal.ITIMER_REAL, 0.002)
            call(group, memory, operation, count)
    except CollectiveError as error:
        seen["at_ns"] = time.monotonic_ns()
        seen["error"] = [error.reason, error.rank, error.host, error.operation, error.sequence, str(error)]
    group = None  # closes it
    after = open_things()
    seen["left"] = [thing for thing in after if thing not in before] or len(after) - len(before)
    os.write(tell, json.dumps(seen).encode() + b"\n")


def rank_process(*arguments: Any) -> NoReturn:
    code = 1
    try:
        be_rank(*arguments)
        code = 0
    except Hit:
        code = 1
    except SystemExit as ending:
        code = int(ending.code or 0)
    finally:
        # What it holds is let go by hand: the interpreter of the process it was forked from is not this one's to end.
        os._exit(code)


def run(case: dict[str, Any], directory: str) -> dict[str, Any]:
    os.mkdir(directory, 0o700)
    for rank in range(case["size"]):
        StatusPage.create(os.path.join(directory, f"page.{rank}"), FIRST + rank).close()
    heard, tell = os.pipe()
    go, start = os.pipe()
    pids = {}
    for rank in range(case["size"]):
        pid = os.fork()
        if pid == 0:
            os.close(heard)
            os.close(start)
            rank_process(case, rank, directory, tell, go)
        pids[rank] = pid
    os.close(tell)
    os.close(go)
    victim = pids[case["victim"]]
    lines = Lines(heard, case["size"])
    if not case["in_join"]:
        lines.wait(lambda: lines.joined == case["size"], LATE_S)
    hit_ns = time.monotonic_ns()
    if case["how"] in ("signal", "stop"):
        while time.monotonic_ns() < hit_ns + case["after_us"] * 1000:
            pass
        hit_ns = time.monotonic_ns()
        os.kill(victim, signal.SIGKILL if case["how"] == "signal" else signal.SIGSTOP)
    statuses: dict[int, int] = {}
    hang = False
    if case["how"] != "stop":
        hang = not ends_in(victim, LATE_S)
        if hang:
            os.kill(victim, signal.SIGKILL)
        statuses[case["victim"]] = end_of(victim)
        hit_ns = max(hit_ns, time.monotonic_ns()) if case["how"] != "signal" else hit_ns
    os.close(start)
    page = StatusPage.open(os.path.join(directory, f"page.{case['victim']}")).snapshot()
    others = case["size"] - 1
    hang |= not lines.wait(lambda: len(lines.told) >= others, LATE_S + case["timeout_s"] * (case["how"] == "stop"))
    for rank, pid in pids.items():
        if rank not in statuses:
            if hang or rank == case["victim"]:
                os.kill(pid, signal.SIGKILL)
            statuses[rank] = end_of(pid)
    os.close(heard)
    files = sorted(name for name in os.listdir(directory) if not name.startswith("page."))
    for name in os.listdir(directory):
        os.unlink(os.path.join(directory, name))
    os.rmdir(directory)
    return {
        **case,
        "operation": page["operation"],
        "inside": page["collective_enter_ns"] != 0,
        "phase": page["collective_phase"],
        "others": [
            {**seen, "after_s": (seen.get("at_ns", hit_ns) - hit_ns) / 1e9}
            for seen in lines.told
            if seen["rank"] != case["victim"]
        ],
        "codes": [os.waitstatus_to_exitcode(statuses[rank]) for rank in sorted(statuses)],
        "hang": hang,
        "files": files,
    }


def ends_in(pid: int, limit_s: float) -> bool:
    handle = os.pidfd_open(pid)
    try:
        return bool(select.select([handle], [], [], limit_s)[0])
    finally:
        os.close(handle)


def end_of(pid: int) -> int:
    return os.waitpid(pid, 0)[1]


class Lines:
    """What the ranks of a group say, on one pipe."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd, self._rest = fd, b""
        self.joined = 0
        self.told: list[dict[str, Any]] = []

    def wait(self, condition: Any, limit_s: float) -> bool:
        end = time.monotonic() + limit_s
        while not condition():
            left_s = end - time.monotonic()
            if left_s <= 0 or not select.select([self._fd], [], [], left_s)[0]:
                return False
            chunk = os.read(self._fd, 65536)
            if not chunk:
                return bool(condition())
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            for line in lines:
                if line == b"+":
                    self.joined += 1
                else:
                    self.told.append(json.loads(line))
        return True


def main() -> None:
    cases = json.load(sys.stdin)
    numbers = itertools.count()
    json.dump([run(case, os.path.join(sys.argv[1], f"{next(numbers)}")) for case in cases], sys.stdout)


if __name__ == "__main__":
    main()
