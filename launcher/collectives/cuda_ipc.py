"""Allreduce between the GPUs of one host for small messages, by kernels that read the peers' memory (CUDA IPC).

Above what :meth:`IpcAllreduce.tune` measured, and between hosts, NCCL is the better engine; it is not used from here.

Ranks meet in one of two orders. ``flags``: one kernel a call, which waits for the peers' flags; for ranks with a GPU
each, and for ranks of one process (threads, a stream each) on one. ``host``: two or three kernels a call, between which
the ranks meet on the host; for processes that share a GPU, whose kernels would wait for each other's time slices.

Threads that share a GPU in the order ``flags`` must not load other kernels while a rank waits (the driver may wait for
running kernels to load one: use each once before, or set CUDA_MODULE_LOADING=EAGER), and need queues of their own
(CUDA_DEVICE_MAX_CONNECTIONS above the number of streams). The deadline ends what they get wrong.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import struct
import sys
import threading
import time

from launcher.collectives.cuda import GpuArray, GpuMemory, enqueue, memory_of, require_device, stream_of
from launcher.collectives.elements import FLOATING, SIZES, DType, ReduceOp
from launcher.errors import CollectiveError, UsageError
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from launcher.collectives.group import Group

TYPES = (DType.float32, DType.float64, DType.float16, DType.bfloat16, DType.int32, DType.int64)
"""Types that are folded; 16-bit floating point in float32."""

OPERATIONS = (ReduceOp.SUM, ReduceOp.AVERAGE, ReduceOp.MIN, ReduceOp.MAX)
"""Operations; AVERAGE not for integers."""

ALGORITHMS = ("one_shot", "two_shot", "in_place")
ORDERS = ("auto", "flags", "host")

_WHOLE = -1  # in one launch
_ROUNDING = 256  # of what lies in the shared area
_MOST_BYTES = 1 << 36
# Looks at an event before the thread sleeps between two: a small message is there by then.
_LOOKS = 2000
_PAUSE_S = 0.0005
_LONGEST_S = 1e9
_TIMED_OUT, _PEER_GAVE_UP, _ABORTED = 1, 2, 3  # LauncherCudaState in native/cuda/table.h
# What a rank says before its native description: error, host, order, staging, shared, pid, inode of its pid namespace.
_SAID = struct.Struct("<512s64sB7xQQQQ")


class Timing(Record):
    """Microseconds of one allreduce of ``nbytes``, the slowest rank's median; ``other`` is 0.0 when not measured."""

    nbytes: int
    one_shot: float
    two_shot: float
    other: float


class Crossover(Record):
    """Up to ``one_shot_bytes`` one_shot is the fastest, from there to ``two_shot_bytes`` two_shot, then the other."""

    one_shot_bytes: int
    two_shot_bytes: int
    timings: tuple[Timing, ...]


def find_crossover(timings: Sequence[Timing]) -> Crossover:
    """The sizes up to which each way wins, without a gap from the smallest on. ``timings`` ascend by size."""
    kept = len(timings)
    for number, timing in enumerate(timings):
        if timing.other and timing.other < min(timing.one_shot, timing.two_shot):
            kept = number
            break
    one = 0
    while one < kept and timings[one].one_shot <= timings[one].two_shot:
        one += 1
    return Crossover(
        timings[one - 1].nbytes if one else 0,
        timings[kept - 1].nbytes if kept else 0,
        tuple(timings),
    )


def exchange(group: Group, own: bytes) -> list[bytes]:
    """What each rank of a group says; all say as many bytes. All ranks call it."""
    size = len(own)
    source = ctypes.create_string_buffer(own, size)
    target = ctypes.create_string_buffer(size * group.size)
    group.all_gather(ctypes.addressof(source), ctypes.addressof(target), [size] * group.size, DType.uint8)
    return [target.raw[rank * size : (rank + 1) * size] for rank in range(group.size)]


class IpcAllreduce:
    """One rank's end of allreduce between the GPUs of one host. Every rank of ``group`` makes one, at the same time.

    Calls are enqueued on a stream, in the same order on all ranks. Results are the same bits on every rank and for
    every algorithm: each element is folded in rank order. A rank that does not come within ``timeout_s`` ends the
    kernels of all others; the next call, :meth:`check` and :meth:`synchronize` then raise, and what the call was to
    give is not there. So does a peer whose process has ended, at once. In the order ``flags`` a call may be captured
    into a CUDA graph, once :meth:`tune` was called; replays are ordered with other calls by the caller.

    Args:
        group: of this host's ranks: it carries the memory handles, and the meetings of the order ``host``.
        device: this rank's GPU, as this process counts them.
        staging_bytes: the most that goes in one piece; the GPU's memory holds it three times.
        shared_bytes: for :meth:`allocate`.
        timeout_s: how long a kernel waits for a peer; None: as the group.
        order: flags, host, or auto: host where two processes share a GPU. Who runs the CUDA MPS daemon may say flags.
        ranks: the members as errors are to number them; None: as the group does.

    Raises:
        UsageError: no such GPU, more ranks than the kernels take, ranks on several hosts, or different arguments.
        CollectiveError: a GPU's memory could not be shared; the message names the rank.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        group: Group,
        device: int,
        *,
        staging_bytes: int = 8 << 20,
        shared_bytes: int = 0,
        timeout_s: float | None = None,
        order: str = "auto",
        ranks: Sequence[int] | None = None,
    ) -> None:
        from launcher._native import CUDA_MAX_RANKS, CudaCommunicator

        if order not in ORDERS:
            raise ValueError(f"order: {order!r}; expected one of {', '.join(ORDERS)}")
        if not 0 < staging_bytes <= _MOST_BYTES or not 0 <= shared_bytes <= _MOST_BYTES:
            raise ValueError(
                f"staging_bytes, shared_bytes: {staging_bytes}, {shared_bytes}; expected 1 (shared_bytes: 0) to 2**36"
            )
        if group.size > CUDA_MAX_RANKS:
            raise UsageError(
                f"allreduce between GPUs by CUDA IPC: {group.size} ranks; it takes up to {CUDA_MAX_RANKS}: use NCCL"
            )
        self.rank, self.size, self.device = group.rank, group.size, device
        self.timeout_s = group.timeout_s if timeout_s is None else timeout_s
        self._group = group
        self._ranks = ranks
        self._communicator: CudaCommunicator | None = None
        self._staging = _rounded(staging_bytes)
        self._shared_bytes, self._shared_used = _rounded(shared_bytes), 0
        self._crossovers: dict[DType, Crossover] = {}
        self._lost: list[int] = []  # ranks whose process has ended
        self._watch: _Watch | None = None
        error: UsageError | CollectiveError | None = None
        said = b""
        try:
            require_device(device)
            # Behind what allocate() gives out, a place for tune().
            made = CudaCommunicator(device, self.rank, self.size, self._staging, self._shared_bytes + self._staging)
            self._communicator = made
            said = made.describe()
        except UsageError as raised:
            error = raised
        except RuntimeError as raised:
            error = CollectiveError(f"GPU {device}: {raised}", "system", self._number(self.rank), operation="join")
        with contextlib.ExitStack() as undo:
            undo.callback(self._give_up)
            self._connect(said, error, order)
            undo.pop_all()

    def _connect(self, said: bytes, error: UsageError | CollectiveError | None, order: str) -> None:
        from launcher._native import CUDA_PEER_BYTES

        # A rank with an error must not leave the others waiting: it says so, and raises its own error afterwards.
        text = str(error).encode()[:511] if error is not None else b""
        memory = (self._staging, self._shared_bytes)
        own = _SAID.pack(text, _host(), ORDERS.index(order), *memory, os.getpid(), _pid_namespace())
        everything = exchange(self._group, own + said.ljust(CUDA_PEER_BYTES, b"\0"))
        if error is not None:
            raise error
        heads = [_SAID.unpack(entry[: _SAID.size]) for entry in everything]
        for rank, (failed, host, wanted, *sizes, _, _) in enumerate(heads):
            if failed.rstrip(b"\0"):
                reason = failed.rstrip(b"\0").decode(errors="replace")
                raise CollectiveError(f"{self._name(rank)} can not take part: {reason}", "system", self._number(rank))
            if host != heads[self.rank][1]:
                raise UsageError(f"{self._name(rank)} is on another host; between hosts use NCCL")
            if wanted != heads[self.rank][2]:
                raise UsageError(f"order: {order!r} here, {ORDERS[wanted]!r} on {self._name(rank)}; say the same")
            if tuple(sizes) != memory:
                raise UsageError(
                    f"staging_bytes, shared_bytes: {memory} here, {tuple(sizes)} on {self._name(rank)}; say the same"
                )
        processes = {
            pid: rank
            for rank, (*_, pid, namespace) in enumerate(heads)
            if pid != os.getpid() and namespace == _pid_namespace()
        }
        if processes:
            self._watch = _Watch(processes, self._lost, self._native.abort)
        failed_text, culprit, self.ranks_per_device, processes_share, self.blocks = self._native.connect(
            b"".join(entry[_SAID.size :] for entry in everything)
        )
        reports = exchange(self._group, failed_text.encode()[:511].ljust(512, b"\0") + struct.pack("<i", culprit))
        for rank, report in enumerate(reports):
            if report[:512].rstrip(b"\0"):
                (other,) = struct.unpack("<i", report[512:])
                raise CollectiveError(
                    f"{self._name(rank)} can not reach the memory of {self._name(other)}: "
                    f"{report[:512].rstrip(bytes(1)).decode(errors='replace')}; the ranks must see each other's GPUs "
                    "(CUDA_VISIBLE_DEVICES), which must reach each other (nvidia-smi topo -p2p r)",
                    "system",
                    self._number(other),
                    operation="join",
                )
        self.order = order if order != "auto" else "host" if processes_share else "flags"
        if order == "auto" and processes_share and self.rank == 0:
            print(
                "[launcher] allreduce by CUDA IPC: processes share a GPU, so ranks meet on the host between kernels",
                file=sys.stderr,
                flush=True,
            )

    @property
    def _native(self) -> Any:
        if self._communicator is None:
            raise CollectiveError("allreduce between GPUs: this end of it is closed", "closed")
        return self._communicator

    def _name(self, rank: int) -> str:
        return f"rank {rank} of the group" if self._ranks is None else f"rank {self._ranks[rank]}"

    def _number(self, rank: int) -> int:
        return rank if self._ranks is None else self._ranks[rank]

    # ---- calls

    def allreduce(
        self,
        source: Any,
        target: Any = None,
        op: ReduceOp = ReduceOp.SUM,
        *,
        scale: float = 1.0,
        algorithm: str | None = None,
        stream: Any = None,
    ) -> None:
        """target = fold over all ranks' source, times ``scale`` (floating point only).

        Args:
            source: contiguous memory on this rank's GPU; see :data:`TYPES`.
            target: as many elements of the same type, ``source`` itself (None), or apart from it.
            op: see :data:`OPERATIONS`.
            algorithm: one_shot, two_shot, or None: what :meth:`choose` says. What lies in memory of :meth:`allocate`
                (and has no other target) goes by in_place.
            stream: torch's, CuPy's or a number; None: see launcher.collectives.cuda.stream_of.

        Raises:
            CollectiveError: this or an earlier call was given up, or CUDA refused something.
            TypeError, ValueError: arguments that do not fit.
        """
        memory = memory_of(source, "source")
        result = memory if target is None else memory_of(target, "target")
        if (result.count, result.dtype) != (memory.count, memory.dtype):
            raise ValueError(
                f"target: {result.count} of {result.dtype.name}; expected {memory.count} of {memory.dtype.name}"
            )
        if memory.device != self.device or result.device != self.device:
            raise ValueError(f"source and target: on GPU {memory.device} and {result.device}; expected {self.device}")
        number = stream_of(stream, self.device)
        self.allreduce_memory(memory.pointer, result.pointer, memory.count, memory.dtype, op, scale, algorithm, number)

    def allreduce_memory(
        self,
        source: int,
        target: int,
        count: int,
        dtype: DType,
        op: ReduceOp = ReduceOp.SUM,
        scale: float = 1.0,
        algorithm: str | None = None,
        stream: int = 0,
    ) -> None:
        """:meth:`allreduce` of addresses; see there."""
        self.check()
        if dtype not in TYPES:
            raise TypeError(f"{DType(dtype).name}: expected one of {', '.join(kind.name for kind in TYPES)}")
        if op not in OPERATIONS:
            raise ValueError(f"op: {ReduceOp(op).name}; expected one of {', '.join(kind.name for kind in OPERATIONS)}")
        if dtype not in FLOATING and (scale != 1.0 or op == ReduceOp.AVERAGE):
            raise ValueError(f"{DType(dtype).name}: integers are not scaled, and have no average here")
        if source % SIZES[dtype] or target % SIZES[dtype]:
            raise ValueError(f"source, target: {source:#x}, {target:#x}; expected multiples of {SIZES[dtype]}")
        if count == 0:
            return
        if op == ReduceOp.AVERAGE:
            op, scale = ReduceOp.SUM, scale / self.size
        offset = source - self._native.shared
        inside = offset >= 0 and offset + count * SIZES[dtype] <= self._shared_bytes
        if source == target and inside and offset % 16 == 0:
            if algorithm not in (None, "in_place"):
                raise ValueError(f"algorithm: {algorithm!r}; memory of allocate() goes by in_place")
            self._launch(0, 0, offset, count, dtype, op, "in_place", scale, stream)
            return
        if algorithm is None:
            algorithm = self.choose(count * SIZES[dtype], dtype) or "two_shot"
        if algorithm not in ("one_shot", "two_shot"):
            raise ValueError(f"algorithm: {algorithm!r}; expected one_shot or two_shot, or memory of allocate()")
        step = self._staging // SIZES[dtype]
        for first in range(0, count, step):
            shift = first * SIZES[dtype]
            piece = min(step, count - first)
            self._launch(source + shift, target + shift, 0, piece, dtype, op, algorithm, scale, stream)

    def _launch(
        self,
        source: int,
        target: int,
        offset: int,
        count: int,
        dtype: DType,
        op: ReduceOp,
        algorithm: str,
        scale: float,
        stream: int,
    ) -> None:
        native = self._native
        job = (source, target, offset, count, int(dtype), int(op), ALGORITHMS.index(algorithm), scale)
        timeout_ns = int(min(self.timeout_s, _LONGEST_S) * 1e9)
        if self.order == "flags":
            enqueue(native.allreduce, *job, timeout_ns, stream, _WHOLE)
            return
        parts = 2 if algorithm == "one_shot" else 3
        for part in range(parts):
            if part:
                self._group.barrier()
            try:
                enqueue(native.allreduce, *job, timeout_ns, stream, part)
            except CollectiveError as error:
                self._group.abort(str(error))  # the others must not wait for this rank
                raise

    def allocate(self, nbytes: int) -> GpuArray:
        """Memory that all ranks map: allreduce works in it without a copy. All ranks call it alike; it stays taken.

        Returns:
            ``nbytes`` bytes as uint8, zeroed, at a multiple of 256.

        Raises:
            UsageError: another rank asked for another size.
            ValueError: more than is left of shared_bytes.
        """
        own = struct.pack("<QQ", nbytes, self._shared_used)
        asked = [struct.unpack("<QQ", said) for said in exchange(self._group, own)]
        for rank, other in enumerate(asked):
            if other != asked[self.rank]:
                raise UsageError(f"allocate({nbytes}): {self._name(rank)} called allocate({other[0]})")
        if not 0 < nbytes <= self._shared_bytes - self._shared_used:
            left = self._shared_bytes - self._shared_used
            raise ValueError(f"allocate({nbytes}): {left} of shared_bytes ({self._shared_bytes}) are left")
        pointer = self._native.shared + self._shared_used
        self._shared_used += _rounded(nbytes)
        return GpuArray(GpuMemory(pointer, nbytes, DType.uint8, self.device), self)

    # ---- what is faster

    def choose(self, nbytes: int, dtype: DType) -> str | None:
        """The fastest way for a message: one_shot, two_shot, or None: another engine (NCCL).

        As :meth:`tune` measured; the first question about a type measures, so all ranks must ask it.
        """
        crossover = self._crossovers.get(dtype)
        if crossover is None:
            crossover = self.tune(dtype)
        if nbytes <= crossover.one_shot_bytes:
            return "one_shot"
        return "two_shot" if nbytes <= crossover.two_shot_bytes else None

    def tune(
        self,
        dtype: DType = DType.float32,
        other: Callable[[GpuArray], Callable[[], object]] | None = None,
        *,
        sizes: Sequence[int] | None = None,
        repeats: int = 5,
        calls: int = 20,
        stream: Any = None,
    ) -> Crossover:
        """Measures where one_shot, two_shot and another engine cross, with CUDA events. All ranks call it alike.

        Kept for this communicator (so: for its ranks) and ``dtype``; a second call measures again.

        Args:
            other: is given memory (uint8) and returns a function that enqueues the other engine's allreduce of it on
                the stream, NCCL's for one. None: it is not measured, and ours are taken up to staging_bytes.
            sizes: in bytes, ascending; None: powers of two from 1 KiB to staging_bytes.
            repeats, calls: the median of ``repeats`` runs of ``calls`` calls each is taken, of the slowest rank.

        Raises:
            CollectiveError, ValueError: as :meth:`allreduce`.
        """
        most = self._staging
        if sizes is None:
            sizes = [1 << power for power in range(10, most.bit_length()) if 1 << power <= most]
        if not sizes or min(sizes) < SIZES[dtype] or max(sizes) > most or repeats < 1 or calls < 1:
            raise ValueError(
                f"sizes: {list(sizes)}; expected some, of {SIZES[dtype]} to {most} bytes; repeats, calls: 1.."
            )
        number = stream_of(stream, self.device)
        pointer = self._native.shared + self._shared_bytes
        rows = []
        for nbytes in sizes:
            count = nbytes // SIZES[dtype]
            memory = GpuArray(GpuMemory(pointer, count * SIZES[dtype], DType.uint8, self.device), self)
            ways: list[Callable[[], object]] = [
                self._call(pointer, count, dtype, "one_shot", number),
                self._call(pointer, count, dtype, "two_shot", number),
            ]
            if other is not None:
                ways.append(other(memory))
            measured = [self._time(way, number, repeats, calls) for way in ways]
            slowest = [max(times) for times in zip(*self._gathered(measured), strict=True)]
            rows.append(Timing(nbytes, slowest[0], slowest[1], slowest[2] if other is not None else 0.0))
        self._crossovers[dtype] = find_crossover(rows)
        return self._crossovers[dtype]

    def _call(self, pointer: int, count: int, dtype: DType, algorithm: str, stream: int) -> Callable[[], object]:
        return lambda: self._launch(pointer, pointer, 0, count, dtype, ReduceOp.SUM, algorithm, 1.0, stream)

    def _time(self, way: Callable[[], object], stream: int, repeats: int, calls: int) -> float:
        """Microseconds of a call: the median of ``repeats`` runs."""
        import statistics

        from launcher._native import CudaEvent

        begin, end = CudaEvent(self.device), CudaEvent(self.device)
        for _ in range(3):
            way()
        times = []
        for _ in range(repeats):
            enqueue(begin.record, stream)
            for _ in range(calls):
                way()
            enqueue(end.record, stream)
            self.synchronize(stream)
            times.append(1e3 * begin.milliseconds_to(end) / calls)
        return statistics.median(times)

    def _gathered(self, values: Sequence[float]) -> list[tuple[float, ...]]:
        layout = struct.Struct(f"<{len(values)}d")
        return [layout.unpack(said) for said in exchange(self._group, layout.pack(*values))]

    # ---- failures and the end

    def check(self) -> None:
        """Raises what has become known of earlier calls; does not wait.

        Raises:
            CollectiveError: a call was given up: ``timeout``, ``lost``, ``left`` (a peer gave up), ``interrupted``.
        """
        state, culprit, call = self._native.status()
        if self._lost:
            raise CollectiveError(
                f"allreduce between GPUs: the process of {self._name(self._lost[0])} has ended; start the job again "
                "from a checkpoint",
                "lost",
                self._number(self._lost[0]),
                operation="allreduce",
            )
        if state == 0:
            return
        who = self._name(culprit)
        reasons = {
            _TIMED_OUT: ("timeout", f"{who} did not come within {self.timeout_s:g} s"),
            _PEER_GAVE_UP: ("left", f"{who} gave it up; its own error says why"),
            _ABORTED: ("interrupted", "this rank gave it up"),
        }
        reason, what = reasons[state]
        raise CollectiveError(
            f"allreduce between GPUs, call {call}: {what}; its result is not there, and this communicator is done with",
            reason,
            self._number(culprit),
            operation="allreduce",
            sequence=call,
        )

    def synchronize(self, stream: Any = None) -> None:
        """Waits for what is on the stream.

        Raises:
            CollectiveError: as :meth:`check`.
        """
        from launcher._native import CudaEvent

        try:
            event = CudaEvent(self.device)
            event.record(stream_of(stream, self.device))
            looks = 0
            while not event.done():
                looks += 1
                if looks > _LOOKS:
                    time.sleep(_PAUSE_S)
        except RuntimeError as error:
            raise CollectiveError(f"GPU: {error}", "system") from error
        self.check()

    def abort(self) -> None:
        """Ends this rank's kernels that wait, and with them the peers'. From any thread; nothing works afterwards."""
        self._native.abort()

    def close(self) -> None:
        """Ends it on all ranks together; a second call does nothing. Waits for this rank's calls.

        After a failure, the GPU's memory is left to the end of the process: a peer may still read it.

        Raises:
            CollectiveError: another rank did not come.
        """
        if self._communicator is None:
            return
        communicator, self._communicator = self._communicator, None
        failed = communicator.status()[0] != 0 or bool(self._lost)
        self._forget()
        enqueue(communicator.disconnect)
        if not failed:
            self._group.barrier()
            enqueue(communicator.destroy)

    def _give_up(self) -> None:
        """The memory of an end that was never connected stays: some peers may have mapped it."""
        self._communicator = None
        self._forget()

    def _forget(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.stop()


class _Watch:
    """A thread that sleeps until a peer's process has ended, and then ends this rank's kernels: nobody else would.

    Args:
        processes: pid -> rank.
        lost: gets the rank.
        abort: is called then.
    """

    def __init__(self, processes: dict[int, int], lost: list[int], abort: Callable[[], object]) -> None:
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._descriptors: dict[int, int] = {}
        for pid, rank in processes.items():
            try:
                self._descriptors[os.pidfd_open(pid)] = rank
            except OSError:
                pass  # gone, which the next meeting tells; or not allowed here: the deadline is left
        self._thread = threading.Thread(target=self._run, args=(lost, abort), name="launcher-gpu-peers", daemon=True)
        self._thread.start()

    def _run(self, lost: list[int], abort: Callable[[], object]) -> None:
        watch = select.poll()
        for descriptor in (self._stop, *self._descriptors):
            watch.register(descriptor, select.POLLIN)
        ended = [descriptor for descriptor, _ in watch.poll()]
        if self._stop not in ended:
            lost.append(self._descriptors[ended[0]])
            abort()

    def stop(self) -> None:
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        for descriptor in (self._stop, *self._descriptors):
            os.close(descriptor)
        self._descriptors.clear()


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _ROUNDING) * _ROUNDING


def _host() -> bytes:
    """What tells hosts apart: the number that the kernel drew when it started; where that is not shown, the name."""
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            said = file.read().strip()
    except OSError:
        said = os.uname().nodename.encode()
    return said[:64].ljust(64, b"\0")


def _pid_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino
