"""Ranks that run out of something, or fork: each rank is a fork of this process, which has loaded little.

    short.py RUN_DIR < CASES > OUTCOMES

CASES and OUTCOMES are JSON, a list each. A case: what its ranks do (a function of this file), their number, and their
limits of open files. An outcome: what each rank has seen, in rank order: a value, or its error.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import resource
import select
import sys
import time
from collections.abc import Callable
from typing import Any

from launcher._native import LocalGroup
from launcher.collectives.elements import DType
from launcher.errors import CollectiveError

HOST = "algo-3"
MEBI = 1 << 20
COUNT = 20_000


def total(group: LocalGroup, source: int, target: int, count: int = 1) -> float:
    """The sum of what the ranks give: each its number plus 1."""
    for index in range(count):
        ctypes.c_double.from_address(source + 8 * index).value = group.rank + 1
    group.allreduce(source, target, count, DType.float64)
    return ctypes.c_double.from_address(target + 8 * (count - 1)).value


def join(group: LocalGroup) -> Any:
    memory = ctypes.create_string_buffer(16)
    return total(group, ctypes.addressof(memory), ctypes.addressof(memory) + 8)


def sleeps_of(pid: int) -> int:
    """How often the process has gone to sleep."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("voluntary_ctxt_switches"))


def use_up_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
    with contextlib.suppress(OSError):
        while True:
            os.dup(0)


def blind(group: LocalGroup) -> Any:
    """Rank 0 can not look whether the others are alive while it waits for a slow one."""
    own, everybody = ctypes.c_int64(os.getpid()), (ctypes.c_int64 * 2)()
    group.all_gather(ctypes.addressof(own), ctypes.addressof(everybody), [1, 1], DType.int64)
    if group.rank == 0:
        use_up_descriptors()
    group.barrier()
    if group.rank == 1:
        before, end = sleeps_of(everybody[0]), time.monotonic() + 20
        while sleeps_of(everybody[0]) < before + 8:  # it looks at the others after each of its naps
            assert time.monotonic() < end, "rank 0 does not sleep"
            select.select([], [], [], 0.005)  # between two looks
    return join(group)


def no_descriptors(group: LocalGroup) -> Any:
    """Rank 1 has none left when it needs to map what the others have registered."""
    memory = group.allocate(MEBI)
    group.barrier()
    if group.rank == 1:
        use_up_descriptors()
    return total(group, memory, memory, COUNT)


def no_address_space(group: LocalGroup) -> Any:
    """Rank 1 may not map what the others have registered."""
    memory = group.allocate(256 * MEBI)
    group.barrier()
    if group.rank == 1:
        allow(64 * MEBI)
    return total(group, memory, memory, COUNT)


def no_memory(group: LocalGroup) -> Any:
    """Rank 1 has none left for what it reads from the others' memory."""
    if not group.statistics()["can_pull"]:
        return "no rank may read another one's memory here"
    group.set_path("pulled")
    memory = ctypes.create_string_buffer(8 * COUNT)
    group.barrier()
    if group.rank == 1:
        libc = ctypes.CDLL(None)
        libc.malloc.restype = ctypes.c_void_p
        allow(0)
        while libc.malloc(128 << 10):
            pass
    try:
        return total(group, ctypes.addressof(memory), ctypes.addressof(memory), COUNT)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def allow(more: int) -> None:
    """Lets this process have so many bytes of address space beside those that it has."""
    with open("/proc/self/statm", encoding="ascii") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + more, resource.RLIM_INFINITY))


def fork(group: LocalGroup) -> Any:
    """A fork of rank 0 gives back all that its parent has registered, and goes; the parent goes on."""
    allocated = group.allocate(MEBI)
    file = os.memfd_create("registered")
    os.ftruncate(file, MEBI)
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    registered = libc.mmap(None, MEBI, 3, 1, file, 0)  # PROT_READ | PROT_WRITE, MAP_SHARED
    group.register(registered, MEBI, file)
    seen = [total(group, allocated, registered, COUNT)]
    child = os.fork() if group.rank == 0 else 0
    if group.rank == 0 and child == 0:
        os._exit(0 if child_refuses_and_releases(group, allocated, registered) else 1)
    if group.rank == 0:
        seen.append(os.waitpid(child, 0)[1])
    group.barrier()
    seen.append(total(group, allocated, registered, COUNT))
    seen.append(total(group, registered, allocated, COUNT))
    seen.append(group.statistics()["calls"]["shared"])
    group.release(allocated)
    group.unregister(registered)
    return [*seen, join(group)]


def child_refuses_and_releases(group: LocalGroup, allocated: int, registered: int) -> bool:
    for refused in (group.barrier, lambda: group.allocate(MEBI), lambda: group.register(registered, 4096, 0)):
        try:
            refused()
        except CollectiveError as error:
            if error.reason != "closed" or "fork" not in str(error):
                return False
        else:
            return False
    group.unregister(registered)
    group.release(allocated)
    for give_back in (group.release, group.unregister):
        try:
            give_back(allocated)
        except ValueError:
            continue
        return False
    group.abort("not this process's business")
    group.close()
    return True


def bad_counts(group: LocalGroup) -> Any:
    """What can not be counts is refused by rank 1 alone; then all make a call, which is the group's next one."""
    memory = ctypes.create_string_buffer(64)
    here = ctypes.addressof(memory)
    there = here + 32
    float64, int8 = DType.float64, DType.int8
    most, sixty = 2**63 - 1, 2**60
    calls: list[Callable[[], object]] = []
    for bad in (-1, -(2**80), sixty, 2**61, most, 2**63, 2**64, 2**80):
        calls += [
            lambda bad=bad: group.allreduce(here, there, bad, float64),
            lambda bad=bad: group.broadcast(here, bad, float64, 0),
            lambda bad=bad: group.reduce(here, there, bad, float64, 0),
            lambda bad=bad: group.allreduce_coalesced([here], [there], [bad], float64),
            lambda bad=bad: group.reduce_scatter(here, there, [1, bad, 1], float64),
            lambda bad=bad: group.all_gather(here, there, [1, 1, bad], float64),
            lambda bad=bad: group.all_to_all(here, there, [bad, 1, 1], [1, 1, 1], float64),
            lambda bad=bad: group.all_to_all(here, there, [1, 1, 1], [1, bad, 1], float64),
        ]
    wrap = [2**62] * 3 + [2**62 - 1] * 2  # each would do; their sum, modulo 2^64, is small
    calls += [
        lambda: group.allreduce_coalesced([here] * 5, [there] * 5, wrap, int8),
        lambda: group.reduce_scatter(here, there, [2**62, 2**62, 2**62], int8),
        lambda: group.all_gather(here, there, [2**62 - 1, 2**62, 2**62], int8),
        lambda: group.all_to_all(here, there, [2**62] * 3, [1, 1, 1], int8),
        lambda: group.allocate(-1),
        lambda: group.allocate(2**64),
        lambda: group.register(here, -1, 0),
        lambda: group.register(here, 2**63, 0),
        lambda: group.register(2**64 - 4096, 2**62, 0),
    ]
    refused = []
    for call in calls if group.rank == 1 else ():
        try:
            call()
        except ValueError as error:
            refused.append(str(error))
        else:
            refused.append("taken")
    before = group.sequence
    return [before, total(group, here, there), refused]


def be_rank(case: dict[str, Any], rank: int, directory: str) -> Any:
    limit = case.get("files", {}).get(str(rank)) or case.get("all_files")
    if limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    try:
        group = LocalGroup(directory, "short", rank, case["size"], host=HOST, timeout_s=60.0)
        return globals()[case["do"]](group)
    except CollectiveError as error:
        return {"reason": error.reason, "rank": error.rank, "host": error.host, "text": str(error)}
    except (OSError, MemoryError) as error:
        return {"own": type(error).__name__, "errno": getattr(error, "errno", errno.ENOMEM), "text": str(error)}


def run(case: dict[str, Any], directory: str) -> Any:
    os.mkdir(directory, 0o700)
    heard, tell = os.pipe()
    pids = []
    for rank in range(case["size"]):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.close(heard)
                os.write(tell, json.dumps([rank, be_rank(case, rank, directory)]).encode() + b"\n")
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    os.close(tell)
    with open(heard, encoding="utf-8") as file:
        seen = dict(json.loads(line) for line in file)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    left = os.listdir(directory)
    return {"seen": [seen.get(rank) for rank in range(case["size"])], "codes": codes, "left": left}


def main() -> None:
    cases = json.load(sys.stdin)
    json.dump([run(case, os.path.join(sys.argv[1], str(number))) for number, case in enumerate(cases)], sys.stdout)


if __name__ == "__main__":
    main()
