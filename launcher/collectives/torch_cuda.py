"""Allreduce of tensors in GPU memory: by kernels over CUDA IPC where that was measured to be faster, else by NCCL.

All ranks must take the same way. So a decision stands on what is the same on all of them (type, operation and size of
the message, and what they have told each other), never on one rank's strides or addresses. What they tell each other:

- at a group's first collective on GPU memory: which GPU each has (a rank that shares one can not use NCCL);
- at the first allreduce that may be small enough: handles of memory (launcher.collectives.cuda_ipc);
- at the first such allreduce of a type: how long both engines take, on a stream of this group's own.

Streams: a call that is waited for runs on the current stream. Another runs on this group's stream, behind what was on
the current one; its work's ``wait()`` lets the then current stream wait for it. The host does not wait, but where
processes share a GPU: there ranks meet on the host, in the order of the group's other work.
"""

from __future__ import annotations

import os
import threading
import time
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from launcher.collectives.cuda import find_devices
from launcher.collectives.cuda_ipc import IpcAllreduce, exchange
from launcher.collectives.elements import DType, ReduceOp
from launcher.collectives.torch_arguments import DTYPES, OPS, PREMUL_SUM, waited
from launcher.collectives.torch_choice import (
    CONNECT,
    ENGINE,
    IPC,
    MEASURE,
    MOST_BYTES,
    Layout,
    Link,
    Place,
    decide,
    find_layout,
    switched_on,
)
from launcher.collectives.torch_engine import say_once
from launcher.collectives.torch_work import COMPLETED, CollectiveBackendError, CollectiveWork, translate
from launcher.errors import CollectiveError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import timedelta
    from typing import Any

    from launcher.collectives.cuda import GpuArray
    from launcher.collectives.cuda_ipc import Crossover
    from launcher.collectives.executor import Executor, Pending
    from launcher.collectives.group import Group
    from launcher.collectives.torch_engine import Engines

# Where the host orders the steps, a call takes long, and no other engine is there to be compared with.
_SIZES = {
    "flags": tuple(1 << power for power in (10, 13, 15, 16, 17, 18, 19, 20, 21, 22)),
    "host": (64 << 10, 512 << 10, 4 << 20),
}
_REPEATS_CALLS = {"flags": (3, 6), "host": (1, 3)}
# From this one on NCCL has NCCL_MULTI_RANK_GPU_ENABLE.
_NCCL_SHARES = (2, 30)
# What the end of a group waits for its other ranks' ends; GPU memory that they may still read is left where it is then.
_END_S = 5.0
_PAUSE_S = 0.0005


class _Launched:
    """A piece of work whose kernels are on their stream already; what CudaWork needs of a Pending."""

    def wait(self, timeout: float | None = None) -> None:
        """Nothing to wait for on the host."""

    def done(self) -> bool:
        return True

    def exception(self) -> None:
        """None: it would have raised."""

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        callback(self)


class CudaWork(CollectiveWork):
    """A collective on a stream of the group's own, which ends with ``event``. Waiting for it does not hold the host.

    Args:
        pending: puts it on the stream.
        check: raises what has become known of failures.
    """

    _pending: Any  # Pending or _Launched

    def __init__(self, pending: Any, tensors: list[Any], event: Any, stream: Any, check: Callable[[], None]) -> None:
        super().__init__(pending, tensors)
        self._event = event
        self._stream = stream
        self._check = check

    def wait(self, timeout: timedelta | None = None) -> bool:
        """What is put on the current stream from here on comes after the collective; with a ``timeout`` the host waits.

        Raises:
            CollectiveBackendError: as CollectiveWork.wait.
        """
        seconds = timeout.total_seconds() if timeout else 0.0
        deadline = time.monotonic() + seconds
        super().wait(timeout)
        if seconds > 0:
            while not self._event.query():
                if time.monotonic() > deadline:
                    raise CollectiveBackendError(
                        f"wait(timeout={seconds:g} s): the collective was not over in time; it goes on, and so can its "
                        "wait",
                        "timeout",
                    )
                time.sleep(_PAUSE_S)
        torch.cuda.current_stream(self._stream.device).wait_event(self._event)
        self._check()
        return True

    def is_completed(self) -> bool:
        """Whether it is over on the GPU too, well or not."""
        return self._pending.done() and (self._pending.exception() is not None or bool(self._event.query()))

    def is_success(self) -> bool:
        """Whether it is over and did not fail."""
        return self.is_completed() and self.exception() is None

    def exception(self) -> BaseException | None:
        """What it, or an earlier one of the group, failed with; None while it runs and when it did not fail."""
        error = super().exception()
        if error is None and self.is_completed():
            try:
                self._check()
            except CollectiveBackendError as found:
                return found
        return error

    def get_future(self) -> Any:
        """A ``torch.futures.Future`` of :meth:`result`: who waits for it has his current stream wait for the GPU."""
        if self._future is None:
            pending, tensors, stream = self._pending, self._tensors, self._stream
            inner: Any = torch.futures.Future(devices=[stream.device])

            def launched(_: object) -> None:
                with torch.cuda.stream(stream):  # the future takes note of the current stream
                    inner.set_result(tensors)

            def value(_: object) -> list[Any]:
                error = pending.exception()
                if error is not None:
                    raise translate(error) if isinstance(error, CollectiveError) else error
                return tensors

            # What a callback raises reaches waiters in C++, DDP's reducer for one; an error as a value does not.
            self._future = inner if isinstance(pending, _Launched) else inner.then(value)
            pending.add_done_callback(launched)
        return self._future


class _Lane:
    """Kernels and the stream that they run on: one for calls, one for calls in CUDA graphs.

    A graph is replayed when its owner likes, also while a call of another stream runs, and two calls of one
    IpcAllreduce must not meet; so those of graphs have their own.
    """

    def __init__(self, ipc: IpcAllreduce) -> None:
        self.ipc = ipc
        # In front of the computation that runs beside it: a message is small, and peers wait for it.
        self.stream = torch.cuda.Stream(device=ipc.device, priority=-1)
        self.used = False


class GpuAllreduce:
    """Allreduce in GPU memory for one process group. Makes, and asks the GPU, nothing before its first tensor comes.

    Args:
        group: carries what ranks tell each other; it is used in the executor's order only.
        ranks: the members as the job numbers them.
        one_host: all members are on this host.
        executor: the process group's.
        engines: carry what is not carried here.
    """

    def __init__(
        self, group: Group, ranks: Sequence[int], one_host: bool, executor: Executor, engines: Engines
    ) -> None:
        self._group = group
        self._ranks = list(ranks)
        self._on = switched_on()
        self._executor = executor
        self._engines = engines
        # Of one rank, and between hosts, there is nothing to be agreed on.
        alone = "the group has one rank" if group.size == 1 else "" if one_host else "the ranks are on several hosts"
        self._layout: Layout | None = Layout(alone) if alone else None
        self._link: Link | None = None
        self._crossovers: dict[int, Crossover] = {}
        self._eager: _Lane | None = None
        self._captured: _Lane | None = None
        self._device = -1
        self._lock = threading.Lock()  # of the kernels, where they are launched outside of the executor
        self.together = False
        """NCCL collects calls."""
        self._counts = {IPC: 0, ENGINE: 0}

    def look(self, device: int) -> None:
        """Learns where the ranks' GPUs are, once; this rank's is ``device``. All ranks come here in the same call.

        Raises:
            CollectiveBackendError: a rank was lost, or did not come.
        """
        if self._layout is None:
            try:
                self._executor.run(partial(self._find, device))
            except CollectiveError as error:
                raise translate(error) from None

    def allreduce(self, tensors: Sequence[Any], opts: Any) -> Any:
        """The work of an allreduce that our kernels carry; None: the engine is to carry it.

        Args:
            tensors: several are one message.
            opts: torch's, of allreduce or allreduce_coalesced.

        Raises:
            CollectiveBackendError: it, or an earlier call, failed; where a rank is to blame it is named.
        """
        first = tensors[0]
        kind = first.dtype
        for tensor in tensors:
            if not tensor.is_cuda or tensor.layout is not torch.strided or tensor.dtype is not kind:
                return None
        code = DTYPES.get(kind)
        number = hash(opts.reduceOp)
        op = None if number == PREMUL_SUM else OPS.get(number)  # factors may differ from rank to rank
        nbytes = sum(tensor.numel() for tensor in tensors) * kind.itemsize
        try:
            self.look(first.get_device())
            way, capturing = self._decide(code, op, nbytes)
            while way in (CONNECT, MEASURE):
                assert code is not None
                stream = torch.cuda.current_stream(self._device)
                self._executor.run(partial(self._prepare, way, code, stream))
                way, capturing = self._decide(code, op, nbytes)
            self._counts[IPC if way is IPC else ENGINE] += 1
            if self._eager is not None:
                self._eager.ipc.check()
            if way is not IPC:
                return None
            assert code is not None and op is not None
            return self._start(list(tensors), DType(code), ReduceOp(op), nbytes, waited(opts), capturing)
        except CollectiveError as error:
            raise translate(error) from None

    def set_timeout(self, seconds: float) -> None:
        """For calls that begin later."""
        for lane in (self._eager, self._captured):
            if lane is not None:
                lane.ipc.timeout_s = seconds

    def statistics(self) -> dict[str, Any]:
        """``calls`` of allreduce by who carried them, and for each type that was measured up to what size we do."""
        measured = {
            DType(code).name: {"one_shot": found.one_shot_bytes, "two_shot": found.two_shot_bytes}
            for code, found in self._crossovers.items()
        }
        return {"calls": dict(self._counts), "bytes_up_to": measured}

    def check(self) -> None:
        """Raises, as CollectiveBackendError, what has become known of earlier calls."""
        try:
            for lane in (self._eager, self._captured):
                if lane is not None:
                    lane.ipc.check()
        except CollectiveError as error:
            raise translate(error) from None

    def abort(self) -> None:
        """Ends kernels that wait, and with them the peers'. From any thread."""
        for lane in (self._eager, self._captured):
            if lane is not None:
                lane.ipc.abort()

    def close(self) -> None:
        """Ends it with the group, which no other thread uses any more. Waits for this rank's calls."""
        lanes = [lane for lane in (self._eager, self._captured) if lane is not None]
        self._eager = self._captured = None
        self._layout, self._link = Layout("the process group was destroyed"), None
        if lanes:
            self._group.timeout_s = min(self._group.timeout_s, _END_S)
        for lane in lanes:
            try:
                if lane is not lanes[0] and lane.used:
                    torch.cuda.synchronize(lane.ipc.device)  # replays, of which nobody else knows
                lane.ipc.close()
            except (CollectiveError, RuntimeError):
                # Not all ranks came to this end, or the GPU failed, which the call that met it has told: its memory is
                # given back with the process.
                continue

    # ---- what all ranks agree on; run by the executor

    def _find(self, device: int) -> None:
        if self._layout is not None:
            return
        from launcher._native import CUDA_MAX_RANKS

        said = exchange(self._group, _place(device, self._on).pack())
        layout = find_layout([Place.unpack(place) for place in said], CUDA_MAX_RANKS)
        if layout.no_nccl:
            self._engines.refuse_nccl()
            self._say(f"{layout.no_nccl}: CUDA IPC carries what it can of allreduce, and Gloo what is left")
        if layout.off:
            self._say(f"allreduce of small tensors in GPU memory does without CUDA IPC: {layout.off}")
        self._device = device
        self._layout = layout

    def _prepare(self, way: str, code: int, current: Any) -> None:
        if way == CONNECT and self._link is None:
            self._link = self._connect()
        elif way == MEASURE and code not in self._crossovers:
            self._crossovers[code] = self._measure(DType(code), current)

    def _connect(self) -> Link:
        """The memory of all ranks' GPUs, on all ranks or on none."""
        assert self._layout is not None
        order = "host" if self._layout.shared else "auto"
        try:
            ipc = self._make(order)
        except (UsageError, CollectiveError) as error:
            refused = self._refusal(error)
            self._say(f"allreduce of small tensors in GPU memory does without CUDA IPC: {refused}")
            return Link(refused)
        self._eager = _Lane(ipc)
        if ipc.order == "flags":
            try:
                self._captured = _Lane(self._make(order))
            except (UsageError, CollectiveError) as error:
                self._say(f"allreduce in CUDA graphs does without CUDA IPC: {self._refusal(error)}")
        return Link("", self._captured is not None)

    def _make(self, order: str) -> IpcAllreduce:
        return IpcAllreduce(self._group, self._device, staging_bytes=MOST_BYTES, order=order, ranks=self._ranks)

    def _refusal(self, error: UsageError | CollectiveError) -> str:
        """Why memory could not be shared, as all ranks know; raises where it is the group that failed."""
        if isinstance(error, CollectiveError) and error.reason != "system":
            raise error
        self._group.barrier()
        return str(error)

    def _measure(self, dtype: DType, current: Any) -> Crossover:
        assert self._eager is not None and self._layout is not None
        ipc, stream = self._eager.ipc, self._eager.stream
        repeats, calls = _REPEATS_CALLS[ipc.order]
        other = None if self._layout.no_nccl else self._nccl(dtype)
        stream.wait_stream(current)  # what is measured is not to compete with what the caller computes
        with torch.cuda.stream(stream):
            found = ipc.tune(dtype, other, sizes=_SIZES[ipc.order], repeats=repeats, calls=calls, stream=stream)
        if other is None:
            ways = f"by CUDA IPC, one_shot up to {found.one_shot_bytes} bytes"
        else:
            ways = (
                f"by CUDA IPC up to {found.two_shot_bytes} bytes (one_shot up to {found.one_shot_bytes}), above by "
                "NCCL, as measured now"
            )
        self._say(f"allreduce of {dtype.name} in GPU memory on {self._group.size} ranks goes {ways}")
        return found

    def _nccl(self, dtype: DType) -> Callable[[GpuArray], Callable[[], object]]:
        engine = self._engines.cuda("tensors in GPU memory")
        opts = c10d.AllreduceOptions()
        if hasattr(opts, "asyncOp"):
            opts.asyncOp = False

        def prepare(memory: GpuArray) -> Callable[[], object]:
            tensor = torch.as_tensor(memory, device=f"cuda:{self._device}").view(getattr(torch, dtype.name))

            def call() -> None:
                work = engine.allreduce([tensor], opts)
                if work is not None:
                    work.wait()

            return call

        return prepare

    def _say(self, text: str) -> None:
        if self._group.rank == 0:
            say_once(text, f'backend "launcher": {text}')

    # ---- calls

    def _decide(self, code: int | None, op: int | None, nbytes: int) -> tuple[str, bool]:
        assert self._layout is not None
        crossover = None if code is None else self._crossovers.get(code)
        way = decide(self._layout, self._link, crossover, code, op, nbytes, together=self.together)
        if way is ENGINE or not torch.cuda.is_current_stream_capturing():
            return way, False
        way = decide(self._layout, self._link, crossover, code, op, nbytes, capturing=True, together=self.together)
        return way, True

    def _start(
        self, tensors: list[Any], dtype: DType, op: ReduceOp, nbytes: int, at_once: bool, capturing: bool
    ) -> Any:
        lane = self._captured if capturing else self._eager
        assert lane is not None and self._eager is not None
        algorithm = self._eager.ipc.choose(nbytes, dtype) or "two_shot"
        current = torch.cuda.current_stream(self._device)
        by_host = lane.ipc.order == "host"
        lane.used = True
        if at_once and not capturing:
            fold = partial(self._fold, lane.ipc, tensors, dtype, op, algorithm, current)
            if by_host:
                self._executor.run(fold)
            else:
                with self._lock:
                    fold()
            return COMPLETED
        ready, done = torch.cuda.Event(), torch.cuda.Event()
        ready.record(current)

        def work() -> None:
            lane.stream.wait_event(ready)
            self._fold(lane.ipc, tensors, dtype, op, algorithm, lane.stream)
            done.record(lane.stream)

        if not at_once:
            for tensor in tensors:
                if tensor.get_device() == self._device:
                    tensor.record_stream(lane.stream)
        pending: Pending | _Launched = _Launched()
        if by_host:
            pending = self._executor.submit(work)
        else:
            with self._lock:
                work()
        started = CudaWork(pending, tensors, done, lane.stream, self.check)
        if at_once:  # of a graph, all calls are on one stream
            started.wait()
            return COMPLETED
        return started

    def _fold(
        self, ipc: IpcAllreduce, tensors: list[Any], dtype: DType, op: ReduceOp, algorithm: str, stream: Any
    ) -> None:
        """Puts the kernels on ``stream``; what has gaps, is in pieces or on another GPU of this rank goes by a copy."""
        if len(tensors) == 1 and tensors[0].is_contiguous() and tensors[0].get_device() == self._device:
            address = tensors[0].data_ptr()
            ipc.allreduce_memory(
                address, address, tensors[0].numel(), dtype, op, 1.0, algorithm, int(stream.cuda_stream)
            )
            return
        with torch.cuda.stream(stream):
            pieces = [tensor.detach().reshape(-1).to(stream.device, non_blocking=True) for tensor in tensors]
            flat = torch.cat(pieces)
            address = flat.data_ptr()
            ipc.allreduce_memory(address, address, flat.numel(), dtype, op, 1.0, algorithm, int(stream.cuda_stream))
            for tensor, piece in zip(tensors, flat.split([piece.numel() for piece in pieces]), strict=True):
                tensor.data.copy_(piece.view(tensor.shape), non_blocking=True)


def _place(device: int, on: bool) -> Place:
    nccl = dist.is_nccl_available()
    shares = nccl and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1" and torch.cuda.nccl.version() >= _NCCL_SHARES
    devices, reason = find_devices()
    if device < len(devices):
        return Place(on, nccl, shares, devices[device]["pci_bus_id"])
    return Place(on, nccl, shares, "", reason or f"GPU {device} is not visible to the launcher's CUDA library")
