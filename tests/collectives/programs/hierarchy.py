"""Groups on several hosts that are one machine: every operation, against a float64 reference.

Reads cases (JSON, one a line) and answers each with a line: the outcome of every rank. A case has ``hosts``, the ranks
of each host; ``what``, a function of this file; ``options``, its arguments; ``directory``, an empty one. Each rank is a
fork of this process, which has imported what takes long. Ranks of different hosts have different LAUNCHER_RUN_DIR: they
do not share memory.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

import numpy as np
import torch.distributed  # before the forks
from reference import folded, to_bits, to_float, values_of
from strangers import Disturbed, Exhausted, Misled

from launcher.collectives.elements import DType, ReduceOp
from launcher.collectives.group import Group, join
from launcher.errors import CollectiveError, UsageError

DEADLINE_S = 60.0
RANK, SIZE = 0, 1  # of the fork
STORE: Any = None
# One rounding of the type, relative: twice of it for each of the hosts' folds, and for what bfloat16 is compared with.
EPSILON = {DType.float32: 2**-23, DType.float64: 2**-52, DType.float16: 2**-10, DType.bfloat16: 2**-7}
ALL = tuple(DType)
SUMS = ((ReduceOp.SUM, 1.0, 1.0), (ReduceOp.AVERAGE, 1.0, 1.0), (ReduceOp.SUM, 0.5, 3.0))
# float32 of these counts: nothing, one, less than ranks, over the leaders, just not, several chunks with a ragged end.
COUNTS = (0, 1, 3, 4_099, 16_384, 16_385, 300_003)


class Files:
    """A store in a folder."""

    def __init__(self, folder: str, limit_s: float = 20.0) -> None:
        self.folder, self.limit_s = folder, limit_s
        os.makedirs(folder, exist_ok=True)

    def _path(self, key: str) -> str:
        return os.path.join(self.folder, key.replace("/", "|"))

    def set(self, key: str, value: bytes) -> None:
        part = f"{self._path(key)}.part{os.getpid()}"
        with open(part, "wb") as file:
            file.write(value)
        os.rename(part, self._path(key))

    def get(self, key: str) -> bytes:
        end = time.monotonic() + self.limit_s
        while not os.path.exists(self._path(key)):
            if time.monotonic() > end:
                raise TimeoutError(f"no {key} after {self.limit_s} s")
            select.select([], [], [], 0.005)
        with open(self._path(key), "rb") as file:
            return file.read()


class Bench:
    """The checks of one group; ``wrong`` collects what was not as it should be."""

    def __init__(self, group: Group) -> None:
        self.group, self.size, self.rank = group, group.size, group.rank
        self.wrong: list[str] = []
        self.digest = hashlib.blake2b()
        self.cases = 0

    def expect(self, what: str, bits: Any, wanted: Any, dtype: DType, terms: int = 0, shared: bool = True) -> None:
        """``terms``: of the sum; 0 for what is exact. ``shared``: the same on every rank, so part of the digest."""
        self.cases += 1
        found = to_float(bits, dtype)
        bound = 2 * max(terms, 1) * EPSILON.get(dtype, 0.0) * (1.0 + np.abs(wanted) + 4.0 * (terms > 0))
        if terms == 0:
            bound = 0.0
        if not np.all(np.abs(found - wanted) <= bound):
            worst = int(np.argmax(np.abs(found - wanted)))
            self.wrong.append(f"{what}: element {worst} is {found[worst]}, expected {wanted[worst]}")
        if shared:
            self.digest.update(np.ascontiguousarray(bits).tobytes())

    def allreduce(self, count: int, dtype: DType, op: ReduceOp, pre: float = 1.0, post: float = 1.0) -> None:
        parts = [values_of(rank, count, dtype) for rank in range(self.size)]
        mine = to_bits(parts[self.rank], dtype)
        wanted = folded(parts, dtype, op, pre, post)
        exact = dtype >= DType.int8 or op in (ReduceOp.MIN, ReduceOp.MAX)
        for in_place in (False, True):
            source = mine.copy()
            target = source if in_place else np.zeros_like(mine)
            address = source.ctypes.data, target.ctypes.data
            self.group.allreduce(*address, count, dtype, op, pre, post)
            what = f"allreduce {count} {dtype.name} {op.name} {pre} {post} {'in place' if in_place else ''}"
            self.expect(what, target, wanted, dtype, 0 if exact else self.size)
            if not in_place and not np.array_equal(source, mine):
                self.wrong.append(f"{what}: the source was changed")

    def coalesced(self) -> None:
        counts = [3, 0, 70_000, 5, 9, 20_000, 1]
        parts = [
            [values_of(rank, n, DType.float32, seed) for seed, n in enumerate(counts)] for rank in range(self.size)
        ]
        mine = [to_bits(part, DType.float32) for part in parts[self.rank]]
        addresses = [one.ctypes.data for one in mine]
        self.group.allreduce_coalesced(addresses, addresses, counts, DType.float32)
        for index, one in enumerate(mine):
            wanted = folded([part[index] for part in parts], DType.float32, ReduceOp.SUM, 1.0, 1.0)
            self.expect(f"coalesced {index}", one, wanted, DType.float32, self.size)

    def reduce_scatter(
        self, counts: list[int], dtype: DType, op: ReduceOp, pre: float = 1.0, post: float = 1.0
    ) -> None:
        total, at = sum(counts), sum(counts[: self.rank])
        parts = [values_of(rank, total, dtype) for rank in range(self.size)]
        mine = to_bits(parts[self.rank], dtype)
        wanted = folded(parts, dtype, op, pre, post)[at : at + counts[self.rank]]
        exact = dtype >= DType.int8 or op in (ReduceOp.MIN, ReduceOp.MAX)
        for in_place in (False, True):
            source = mine.copy()
            target = source[at : at + counts[self.rank]] if in_place else np.zeros(counts[self.rank], mine.dtype)
            self.group.reduce_scatter(source.ctypes.data, target.ctypes.data, counts, dtype, op, pre, post)
            self.expect(
                f"reduce_scatter {counts} {dtype.name} {op.name}",
                target,
                wanted,
                dtype,
                0 if exact else self.size,
                False,
            )

    def all_gather(self, counts: list[int], dtype: DType) -> None:
        parts = [to_bits(values_of(rank, count, dtype), dtype) for rank, count in enumerate(counts)]
        wanted = np.concatenate(parts)
        at = sum(counts[: self.rank])
        for in_place in (False, True):
            target = np.zeros_like(wanted)
            source = parts[self.rank].copy()
            if in_place:
                target[at : at + counts[self.rank]] = source
                source = target[at : at + counts[self.rank]]
            self.group.all_gather(source.ctypes.data, target.ctypes.data, counts, dtype)
            self.expect(f"all_gather {counts} {dtype.name}", target, to_float(wanted, dtype), dtype)

    def broadcast(self, count: int, dtype: DType, root: int) -> None:
        wanted = to_bits(values_of(root, count, dtype, 7), dtype)
        data = wanted.copy() if self.rank == root else np.zeros_like(wanted)
        self.group.broadcast(data.ctypes.data, count, dtype, root)
        self.expect(f"broadcast {count} {dtype.name} from {root}", data, to_float(wanted, dtype), dtype)

    def reduce(self, count: int, dtype: DType, op: ReduceOp, root: int) -> None:
        parts = [values_of(rank, count, dtype) for rank in range(self.size)]
        source = to_bits(parts[self.rank], dtype)
        target = np.full_like(source, 1)
        self.group.reduce(source.ctypes.data, target.ctypes.data, count, dtype, root, op)
        wanted = folded(parts, dtype, op, 1.0, 1.0) if self.rank == root else np.ones(count)
        if self.rank != root and dtype == DType.bfloat16:
            wanted = to_float(np.full(count, 1, np.uint16), dtype)
        self.expect(f"reduce {count} {dtype.name} to {root}", target, wanted, dtype, self.size, False)

    def all_to_all(self, scale: int, dtype: DType) -> None:
        def count(one: int, other: int) -> int:
            return scale * ((one + 2 * other) % 4)

        def row(one: int, other: int) -> Any:
            return to_bits(values_of(one, count(one, other), dtype, other), dtype)

        sends = [count(self.rank, other) for other in range(self.size)]
        receives = [count(other, self.rank) for other in range(self.size)]
        source = np.concatenate([row(self.rank, other) for other in range(self.size)])
        wanted = np.concatenate([row(other, self.rank) for other in range(self.size)])
        target = np.zeros_like(wanted)
        self.group.all_to_all(source.ctypes.data, target.ctypes.data, sends, receives, dtype)
        self.expect(f"all_to_all {scale} {dtype.name}", target, to_float(wanted, dtype), dtype, shared=False)

    def everything(self) -> None:
        """All operations, with the counts that take different ways."""
        for count in COUNTS:
            for op, pre, post in SUMS:
                self.allreduce(count, DType.float32, op, pre, post)
        for dtype in ALL:
            for count in (37, 140_001):
                for op in ReduceOp:
                    floating = dtype < DType.int8
                    if (op >= ReduceOp.BIT_AND and floating) or (op == ReduceOp.AVERAGE and dtype == DType.bool):
                        continue
                    if count == 37 or op in (ReduceOp.SUM, ReduceOp.MAX, ReduceOp.AVERAGE):
                        self.allreduce(count, dtype, op)
        self.allreduce(1_000_003, DType.float32, ReduceOp.SUM)  # more than may be under way at a time
        self.coalesced()
        for scale in (1, 30_001):
            counts = [scale * ((rank + 1) % 3) for rank in range(self.size)]
            for dtype, op in (
                (DType.float32, ReduceOp.SUM),
                (DType.int64, ReduceOp.MAX),
                (DType.bfloat16, ReduceOp.AVERAGE),
            ):
                self.reduce_scatter(counts, dtype, op)
                self.all_gather(counts, dtype)
            self.reduce_scatter(counts, DType.float32, ReduceOp.SUM, 2.0, 0.25)
            self.reduce_scatter([scale * 5] * self.size, DType.float32, ReduceOp.AVERAGE)
            self.all_gather([scale * 5] * self.size, DType.uint8)
            self.all_to_all(scale, DType.float32)
            self.all_to_all(scale, DType.int8)
        for root in {0, self.size - 1, self.size // 2}:
            for count in (11, 200_003):
                self.broadcast(count, DType.float32, root)
                self.broadcast(count, DType.float16, root)
                self.reduce(count, DType.float32, ReduceOp.SUM, root)
                self.reduce(count, DType.int32, ReduceOp.AVERAGE, root)
        self.group.barrier()


def matrix(**options: Any) -> dict[str, Any]:
    """Everything in the world's group, then in sub-groups: over hosts, one with another order, one inside a host."""
    group = join("world", RANK, SIZE, store=STORE, timeout_s=20, **options)
    bench = Bench(group)
    bench.everything()
    shown: dict[str, Any] = {"kind": type(group).__name__, "digest": bench.digest.hexdigest(), "cases": bench.cases}
    shown["between"] = group.statistics().get("between")
    wrong = bench.wrong
    for name, members in {"ends": [0, SIZE - 1], "turned": list(range(SIZE))[::-1], "some": [1, SIZE - 1, 0]}.items():
        if len(set(members)) == len(members) and RANK in members:
            sub = join(name, members.index(RANK), len(members), ranks=members, store=STORE, timeout_s=20, **options)
            part = Bench(sub)
            for count in (5, 50_001):
                part.allreduce(count, DType.float32, ReduceOp.AVERAGE)
                part.reduce_scatter([count] * sub.size, DType.float32, ReduceOp.SUM)
                part.all_gather([count + rank for rank in range(sub.size)], DType.int16)
                part.broadcast(count, DType.float32, sub.size - 1)
                part.reduce(count, DType.float32, ReduceOp.SUM, sub.size - 1)
                part.all_to_all(count, DType.float32)
            sub.barrier()
            wrong += [f"{name}: {text}" for text in part.wrong]
            shown["cases"] += part.cases
            sub.close()
    group.barrier()
    group.close()
    return {**shown, "wrong": wrong}


def independent() -> dict[str, Any]:
    """Digests of float sums whose bits depend on their order, by rank alone."""
    group = join("world", RANK, SIZE, store=STORE, timeout_s=20, independent=True)
    digests = []
    for count in (1_001, 300_003):
        for dtype, op, factors in (
            (DType.float32, ReduceOp.SUM, (1.0, 1.0)),
            (DType.float32, ReduceOp.AVERAGE, (0.3, 1.0)),
        ):
            values = np.random.default_rng((RANK, count)).standard_normal(count).astype(np.float32)
            group.allreduce(values.ctypes.data, values.ctypes.data, count, dtype, op, *factors)
            digests.append(hashlib.blake2b(values.tobytes()).hexdigest())
            counts = [count // SIZE] * SIZE
            values = np.random.default_rng((RANK, count, 1)).standard_normal(count).astype(np.float32)
            part = np.zeros(counts[RANK], np.float32)
            group.reduce_scatter(values.ctypes.data, part.ctypes.data, counts, dtype, op, *factors)
            whole = np.zeros(sum(counts), np.float32)
            group.all_gather(part.ctypes.data, whole.ctypes.data, counts, dtype)
            digests.append(hashlib.blake2b(whole.tobytes()).hexdigest())
    group.barrier()
    group.close()
    return {"digests": digests}


def rounded(wire: str, steps: int = 40, count: int = 50_000) -> dict[str, Any]:
    """Sums in 16 bits: the worst relative error of one step, and of what all steps together brought."""
    group = join("world", RANK, SIZE, store=STORE, timeout_s=20, wire=wire)
    data = np.zeros(count, np.float32)
    total, wanted, first = np.zeros(count), np.zeros(count), 0.0
    digest = hashlib.blake2b()
    for step in range(steps):
        parts = [
            np.random.default_rng((rank, step)).uniform(0.5, 1.5, count).astype(np.float32) for rank in range(SIZE)
        ]
        data[:] = parts[RANK]
        group.allreduce(data.ctypes.data, data.ctypes.data, count, DType.float32, ReduceOp.AVERAGE)
        truth = np.mean(np.stack(parts).astype(np.float64), 0)
        first = first or float(np.max(np.abs(data - truth) / truth))
        total += data
        wanted += truth
        digest.update(data.tobytes())
    short = np.full(64, 1.0 + 2**-20, np.float32)  # not rounded: it goes over the leaders
    group.allreduce(short.ctypes.data, short.ctypes.data, 64, DType.float32, ReduceOp.AVERAGE)
    sent = group.statistics()["between"]["sent_bytes"]
    group.barrier()
    group.close()
    drift = float(np.max(np.abs(total - wanted)))
    return {"first": first, "drift": drift, "short": float(short[0]), "sent": sent, "digest": digest.hexdigest()}


def differs() -> list[str]:
    """What is said to options that differ, or make no sense."""
    seen = []
    for number, options in enumerate(
        (
            {"wire": "bf16" if RANK else "none"},
            {"wire": "int4"},
            {"leg": "pigeon"},
            {"leg": "mpi"},
            {"wire": "fp16", "independent": True},
        )
    ):
        try:
            join(f"g{number}", RANK, SIZE, store=STORE, timeout_s=20, **options)
            seen.append("joined")
        except (CollectiveError, UsageError) as error:
            seen.append(str(error))
    return seen


def meets() -> dict[str, Any]:
    """Without a store: the ranks meet at MASTER_ADDR, beside the process group that torch makes there."""
    group = join("world", RANK, SIZE, timeout_s=20)
    torch.distributed.init_process_group("gloo")
    data = np.ones(100_000, np.float32)
    group.allreduce(data.ctypes.data, data.ctypes.data, data.size, DType.float32)
    sub = join("other", RANK, SIZE, timeout_s=20)  # the process group's store is there by now
    sub.allreduce(data.ctypes.data, data.ctypes.data, data.size, DType.float32)
    torch.distributed.barrier()
    sub.close()
    group.close()
    torch.distributed.destroy_process_group()
    return {"ends": [float(data[0]), float(data[-1])]}


def told(error: CollectiveError) -> dict[str, Any]:
    return {
        "reason": error.reason,
        "rank": error.rank,
        "host": error.host,
        "operation": error.operation,
        "sequence": error.sequence,
        "text": str(error),
    }


def fails(how: str, count: int, victim: int, **options: Any) -> dict[str, Any]:
    """``victim`` ends in the middle of many calls; what each other rank is told, and how long after."""
    group = join("world", RANK, SIZE, store=STORE, timeout_s=3.0 if how == "stopped" else 20.0, **options)
    data = np.zeros(count, np.float32)
    group.barrier()
    began = time.monotonic()
    try:
        for step in range(1_000_000):
            began = time.monotonic()
            if victim == RANK and step == 25:
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif how == "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                elif how == "closed":
                    group.close()
                    return {"reason": "me"}
                elif how == "aborted":
                    group.abort("no more data")
                    return {"reason": "me"}
                elif how == "thread":
                    threading.Timer(0.1, group.abort, ["no more data"]).start()
                elif how == "other":
                    group.broadcast(data.ctypes.data, count, DType.float32, 0)
            if how == "thread" and step == 25 and victim != RANK:
                STORE.get("given up")  # until then the victim waits for this rank
            group.allreduce(data.ctypes.data, data.ctypes.data, count, DType.float32)
    except CollectiveError as error:
        shown = {**told(error), "after_s": time.monotonic() - began}
    if how == "thread" and victim == RANK:
        STORE.set("given up", b"")
    try:
        group.barrier()
    except CollectiveError as error:
        shown["again"] = told(error)
    group.close()
    return shown


def strangers() -> dict[str, Any]:
    """Connections of others come before those of the group's ranks, and after."""
    store = Disturbed(STORE, RANK, SIZE) if RANK == SIZE - 1 else STORE
    group = join("world", RANK, SIZE, store=store, timeout_s=20, leg="sockets")
    data = np.ones(100_000, np.float32)
    group.allreduce(data.ctypes.data, data.ctypes.data, data.size, DType.float32)
    told = json.loads(STORE.get("launcher/0/world/sockets/0"))
    with socket.create_connection((told["address"], told["port"]), 10) as late:
        late.sendall(os.urandom(256))
        group.allreduce(data.ctypes.data, data.ctypes.data, data.size, DType.float32)
    group.barrier()
    group.close()
    return {"ends": [float(data[0]), float(data[-1])], "seen": getattr(store, "seen", [])}


def unreachable() -> str:
    """The last rank is told a wrong port."""
    store = Misled(STORE) if RANK == SIZE - 1 else STORE
    try:
        join("world", RANK, SIZE, store=store, timeout_s=20, leg="sockets").barrier()
    except CollectiveError as error:
        return f"{error.reason}: {error}"
    return "joined"


def exhausted() -> dict[str, Any]:
    """Nobody can open what the connections need: the last rank makes one, which the first one can not accept."""
    store = Exhausted(STORE, RANK)
    try:
        join("world", RANK, SIZE, store=store, timeout_s=20, leg="sockets")
    except CollectiveError as error:
        store.restore()
        return told(error)
    return {}


def forks() -> dict[str, Any]:
    """A fork of the first rank uses and closes the group, which goes on in its parent; then it outlives its parent."""
    group = join("world", RANK, SIZE, store=STORE, timeout_s=20, leg="sockets")
    data = np.ones(8, np.float32)
    at = data.ctypes.data
    group.allreduce(at, at, 8, DType.float32)
    text, bells = "", []
    if RANK == 0:
        read, write = os.pipe()
        if os.fork() == 0:
            try:
                group.allreduce(at, at, 8, DType.float32)
            except CollectiveError as error:
                text = f"{error.reason}: {error}"
            group.timeout_s = 5.0
            group.close()
            del group
            os.write(write, text.encode())
            with contextlib.suppress(TimeoutError):
                STORE.get("the end was seen")
            os._exit(0)
        text = os.read(read, 4096).decode()
        for name in os.listdir("/proc/self/fdinfo"):
            with contextlib.suppress(FileNotFoundError), open(f"/proc/self/fdinfo/{name}") as file:
                bells += [int(line.split()[1], 16) for line in file if line.startswith("eventfd-count:")]
    group.allreduce(at, at, 8, DType.float32)
    if RANK == 0:  # without a farewell
        return {"text": text, "bells": bells, "sum": float(data[0])}
    try:
        group.allreduce(at, at, 8, DType.float32)
    except CollectiveError as error:
        text = f"{error.reason}: {error}"
    STORE.set("the end was seen", b"")
    group.close()
    return {"text": text, "sum": float(data[0])}


def refuses() -> dict[str, Any]:
    """Arguments that make no sense raise before anything is sent, and the group is still good."""
    group = join("world", RANK, SIZE, store=STORE, timeout_s=20)
    data = np.ones(8, np.float32)
    at, texts = data.ctypes.data, []
    for call in (
        lambda: group.allreduce(at, at, 8, DType.float32, ReduceOp.BIT_AND),
        lambda: group.allreduce(at, at, 8, DType.bool, ReduceOp.AVERAGE),
        lambda: group.allreduce(at, at, 8, DType.int32, ReduceOp.SUM, 2.0),
        lambda: group.allreduce(at, at, 8, 99),
        lambda: group.all_gather(at, at, [1], DType.float32),
        lambda: group.broadcast(at, 8, DType.float32, SIZE),
        lambda: group.allreduce_coalesced([at], [at], [1, 2], DType.float32),
    ):
        try:
            call()
            texts.append("nothing")
        except ValueError as error:
            texts.append(str(error))
    group.allreduce(at, at, 8, DType.float32)
    memory = group.allocate(4096)
    group.release(memory)
    group.timeout_s = 30.0
    group.barrier()
    group.close()
    group.close()
    return {"texts": texts, "sum": float(data[0]), "timeout_s": group.timeout_s}


def rank_main(rank: int, case: dict[str, Any]) -> NoReturn:
    """The life of a fork."""
    global RANK, SIZE, STORE
    directory, hosts = case["directory"], case["hosts"]
    RANK, SIZE = rank, sum(hosts)
    STORE = Files(f"{directory}/store")
    output = os.open(f"{directory}/output.{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.enable()
    host, first = 0, 0
    while rank >= first + hosts[host]:
        first += hosts[host]
        host += 1
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(SIZE),
        LOCAL_RANK=str(rank - first),
        LOCAL_WORLD_SIZE=str(hosts[host]),
        LAUNCHER_RUN_DIR=f"{directory}/host{host}",
        SM_CURRENT_HOST=f"algo-{host + 1}",
        GLOO_SOCKET_IFNAME="lo",
        **case.get("environ", {}),
    )
    code = 0
    try:
        shown = globals()[case["what"]](**case["options"])
        with open(f"{directory}/shown.{rank}", "w") as file:
            json.dump(shown, file)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs the ranks of a case to their end. A stopped one does not count: it is killed when the others ended."""
    directory = case["directory"]
    for host in range(len(case["hosts"])):
        os.mkdir(f"{directory}/host{host}", 0o700)
    pids = {}
    for rank in range(sum(case["hosts"])):
        pid = os.fork()
        if pid == 0:
            rank_main(rank, case)
        pids[pid] = rank
    codes: dict[int, int] = {}
    stopped: set[int] = set()
    end = time.monotonic() + DEADLINE_S
    while len(codes) + len(stopped) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
        if pid and os.WIFSTOPPED(status):
            stopped.add(pid)
        elif pid:
            codes[pids[pid]] = os.waitstatus_to_exitcode(status)
        else:
            select.select([], [], [], 0.005)  # between two looks
        if time.monotonic() > end:
            for pid in pids:
                if pids[pid] not in codes:
                    os.kill(pid, signal.SIGABRT)  # faulthandler shows where it is
                    stopped.discard(pid)
            end += 5
    for pid in stopped:
        os.kill(pid, signal.SIGKILL)
        codes[pids[pid]] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    outcomes = []
    for rank in range(len(pids)):
        shown = None
        with contextlib.suppress(FileNotFoundError), open(f"{directory}/shown.{rank}") as file:
            shown = json.load(file)
        with open(f"{directory}/output.{rank}", errors="replace") as file:
            outcomes.append({"rank": rank, "code": codes[rank], "shown": shown, "output": file.read()})
    return outcomes


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)


main()
