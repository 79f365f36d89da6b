"""The collectives of ``backend="launcher"``, as torch.distributed calls them, under old and new names."""

from __future__ import annotations

from functools import partial

import torch
from torch.distributed import distributed_c10d as c10d

from launcher.collectives.elements import SIZES
from launcher.collectives.torch_arguments import (
    DTYPES,
    OPS,
    PREMUL_SUM,
    agree,
    describe,
    element,
    flat,
    joined,
    listed,
    movable,
    nested,
    operation,
    options,
    reducible,
    room,
    spread,
    waited,
)
from launcher.collectives.torch_shared import LOOKED_AT, Buckets
from launcher.collectives.torch_work import COMPLETED, CollectiveWork, translate
from launcher.errors import CollectiveError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import timedelta
    from typing import Any

    from launcher.collectives.executor import Executor
    from launcher.collectives.group import Group
    from launcher.collectives.torch_cuda import GpuAllreduce
    from launcher.collectives.torch_engine import Engines

_Allreduce = c10d.AllreduceOptions
# Until some torch after 2.4 an allreduce does not tell whether its caller will wait at once.
_TELLS = hasattr(c10d.AllreduceOptions(), "asyncOp")
_STRIDED = torch.strided


class Operations:
    """The methods of a process group that carry out collectives.

    ``opts`` are torch's options for the call. Where the caller says that it waits at once (``asyncOp`` is False) the
    call returns when the result is in place, else with a work. Lists hold one tensor each, as torch passes them.
    """

    _group: Group
    _rank: int
    _size: int
    _timeout: timedelta
    _executor: Executor
    _run: Callable[[Callable[[], Any]], Any]
    _allreduce: Callable[..., None]
    _buckets: Buckets
    _engines: Engines
    _gpu: GpuAllreduce

    # ---- reductions

    def allreduce(self, tensors: Any, opts: Any = None, timeout: timedelta | None = None, *, op: Any = None) -> Any:
        """Every rank's tensor becomes the fold of all; list of one tensor, as torch.distributed passes it."""
        if _TELLS and type(opts) is _Allreduce and len(tensors) == 1:  # how dist.all_reduce calls: be quick
            tensor = tensors[0]
            code = DTYPES.get(tensor.dtype)
            if (
                code is not None
                and not opts.asyncOp
                and tensor.is_cpu
                and tensor.layout is _STRIDED
                and tensor.is_contiguous()
            ):
                number = hash(opts.reduceOp)
                if number != PREMUL_SUM:
                    count = tensor.numel()
                    if count * SIZES[code] < LOOKED_AT:
                        address = tensor.data_ptr()
                        work = partial(self._allreduce, address, address, count, code, OPS[number])
                    else:
                        work = partial(self._fold, tensor, code, OPS[number])
                    try:
                        self._run(work)
                    except CollectiveError as error:
                        raise translate(error) from None
                    return COMPLETED
        tensors, opts = listed(tensors), options(_Allreduce, opts, op, timeout)
        if len(tensors) != 1:
            return self.allreduce_coalesced(tensors, opts)
        (tensor,) = tensors
        if not reducible(tensor):
            ours = self._gpu.allreduce(tensors, opts)
            if ours is not None:
                return ours
            return self._engine(tensor, "the reduction of").allreduce(tensors, opts)
        number, scale = operation(opts.reduceOp, tensor)
        at_once = waited(opts)
        fold = partial(self._fold, tensor, DTYPES[tensor.dtype], number, scale, not at_once)
        return self._start(fold, at_once, tensors)

    def _fold(self, tensor: Any, code: int, number: int, scale: float = 1.0, candidate: bool = False) -> None:
        data = self._look(tensor, candidate)
        address = data.data_ptr()
        self._allreduce(address, address, data.numel(), code, number, scale)
        if data is not tensor:
            tensor.data.copy_(data)

    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> Any:
        """:meth:`allreduce` of several tensors, those of one type as one message."""
        tensors, opts = listed(tensors), options(c10d.AllreduceCoalescedOptions, opts)
        strange = next((tensor for tensor in tensors if not reducible(tensor)), None)
        if strange is not None:
            ours = self._gpu.allreduce(tensors, opts)
            if ours is not None:
                return ours
            return self._engine(strange, "the reduction of").allreduce_coalesced(tensors, opts)
        scales = [operation(opts.reduceOp, tensor) for tensor in tensors]

        def work() -> None:
            for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
                own = [index for index, tensor in enumerate(tensors) if tensor.dtype == dtype]
                flat = [self._look(tensors[index]) for index in own]
                addresses = [data.data_ptr() for data in flat]
                number, scale = scales[own[0]]
                self._group.allreduce_coalesced(
                    addresses, addresses, [data.numel() for data in flat], DTYPES[dtype], number, scale
                )
                for index, data in zip(own, flat, strict=True):
                    if data is not tensors[index]:
                        tensors[index].data.copy_(data)

        return self._start(work, waited(opts), tensors)

    def reduce(
        self, tensors: Any, opts: Any = None, op: Any = None, timeout: timedelta | None = None, **more: Any
    ) -> Any:
        """The fold of all ranks' tensors, on ``opts.rootRank`` alone."""
        tensors, opts = listed(tensors), options(c10d.ReduceOptions, opts, op, timeout, **more)
        (tensor,) = tensors
        if not reducible(tensor):
            return self._engine(tensor, "the reduction of").reduce(tensors, opts)
        number, scale = operation(opts.reduceOp, tensor)
        root = opts.rootRank

        def work() -> None:
            data = self._look(tensor)
            address = data.data_ptr()
            self._group.reduce(address, address, data.numel(), DTYPES[data.dtype], root, number, scale)
            if data is not tensor and self._rank == root:
                tensor.data.copy_(data)

        return self._start(work, waited(opts), tensors)

    def reduce_scatter_single(self, output: Any, input: Any, opts: Any = None) -> Any:
        """Rank r gets the r-th of ``size`` equal parts of the fold."""
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    def reduce_scatter_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        """:meth:`reduce_scatter_single` of several pairs."""
        opts = options(c10d.ReduceScatterOptions, opts)
        strange = next((tensor for tensor in (*inputs, *outputs) if not reducible(tensor)), None)
        if strange is not None:
            engine = self._engine(strange, "the reduction of")
            return self._each(engine, engine._reduce_scatter_base, outputs, inputs, opts)
        for output, source in zip(outputs, inputs, strict=True):
            agree("reduce_scatter", source, [output], source.numel() == output.numel() * self._size)
        scales = [operation(opts.reduceOp, tensor) for tensor in inputs]

        def work() -> None:
            for output, source, (number, scale) in zip(outputs, inputs, scales, strict=True):
                data, target = self._look(source), flat(output)
                self._group.reduce_scatter(
                    data.data_ptr(),
                    target.data_ptr(),
                    [target.numel()] * self._size,
                    DTYPES[data.dtype],
                    number,
                    scale,
                )
                if target is not output:
                    output.data.copy_(target)

        return self._start(work, waited(opts), list(outputs))

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None, *rest: Any) -> Any:
        """Rank r gets the fold of all ranks' ``inputs[0][r]``, whose sizes may differ from rank to rank."""
        outputs, inputs, opts = nested(c10d.ReduceScatterOptions, outputs, inputs, opts, *rest)
        (output,), (parts,) = outputs, inputs
        if not all(map(reducible, (output, *parts))):
            return self._engine(output, "the reduction of").reduce_scatter(outputs, inputs, opts)
        agree("reduce_scatter", output, parts, parts[self._rank].numel() == output.numel())
        number, scale = operation(opts.reduceOp, output)

        def work() -> None:
            data, target = joined(parts), flat(output)
            self._group.reduce_scatter(
                data.data_ptr(),
                target.data_ptr(),
                [part.numel() for part in parts],
                DTYPES[data.dtype],
                number,
                scale,
            )
            if target is not output:
                output.data.copy_(target)

        return self._start(work, waited(opts), outputs)

    # ---- moves: of any type, as bytes where the core does not know it

    def broadcast(self, tensors: Any, opts: Any = None, timeout: timedelta | None = None, *, root: int = 0) -> Any:
        """Everybody's tensors become those of ``opts.rootRank``."""
        if isinstance(opts, int):
            root, opts = opts, None
        tensors = listed(tensors)
        if opts is None:
            opts = options(c10d.BroadcastOptions, None, rootRank=root)
        if not all(map(movable, tensors)):
            return self._engine(tensors[0], "the broadcast of").broadcast(tensors, opts)
        root = opts.rootRank

        def work() -> None:
            for tensor in tensors:
                data = self._look(tensor)
                code, width = element(data)
                self._group.broadcast(data.data_ptr(), data.numel() * width, code, root)
                if data is not tensor and self._rank != root:
                    tensor.data.copy_(data)

        return self._start(work, waited(opts), tensors)

    def all_gather_single(self, output: Any, input: Any, opts: Any = None) -> Any:
        """All ranks' inputs, one after the other, on all of them."""
        return self.all_gather_single_coalesced([output], [input], opts)

    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        """:meth:`all_gather_single` of several pairs."""
        opts = options(c10d.AllgatherOptions, opts)
        strange = next((tensor for tensor in (*inputs, *outputs) if not movable(tensor)), None)
        if strange is not None:
            engine = self._engine(strange, "the gathering of")
            return self._each(engine, engine._allgather_base, outputs, inputs, opts)
        for output, source in zip(outputs, inputs, strict=True):
            agree("all_gather", source, [output], output.numel() == source.numel() * self._size)

        def work() -> None:
            for output, source in zip(outputs, inputs, strict=True):
                target, data = self._look(output), flat(source)
                code, width = element(data)
                self._group.all_gather(data.data_ptr(), target.data_ptr(), [data.numel() * width] * self._size, code)
                if target is not output:
                    output.data.copy_(target)

        return self._start(work, waited(opts), list(outputs))

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None, *rest: Any) -> Any:
        """All ranks' tensors as a list on all of them; ``outputs[0][r]`` has the size of rank r's."""
        outputs, inputs, opts = nested(c10d.AllgatherOptions, outputs, inputs, opts, *rest)
        (parts,), (source,) = outputs, inputs
        if not all(map(movable, (source, *parts))):
            return self._engine(source, "the gathering of").allgather(outputs, inputs, opts)
        agree("all_gather", source, parts, parts[self._rank].numel() == source.numel())

        def work() -> None:
            data = flat(source)
            target = room(parts)
            code, width = element(data)
            counts = [part.numel() * width for part in parts]
            self._group.all_gather(data.data_ptr(), target.data_ptr(), counts, code)
            spread(target, parts)

        return self._start(work, waited(opts), parts)

    def allgather_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        """:meth:`allgather` of several tensors; ``outputs[r]`` is the list of rank r's."""
        opts = options(c10d.AllgatherOptions, opts)
        works = [
            self.allgather([list(parts)], [tensor], opts)
            for tensor, parts in zip(inputs, zip(*outputs, strict=True), strict=True)
        ]
        return works[-1]  # the others come before it

    def gather(self, outputs: Any, inputs: Any, opts: Any = None, *rest: Any) -> Any:
        """All ranks' tensors as a list on ``opts.rootRank``; the others pass no list."""
        outputs, inputs, opts = nested(c10d.GatherOptions, outputs, inputs, opts, *rest)
        (source,) = inputs
        parts = list(outputs[0]) if self._rank == opts.rootRank else []
        if not all(map(movable, (source, *parts))):
            return self._engine(source, "the gathering of").gather(outputs, inputs, opts)
        if parts:
            agree("gather", source, parts, len(parts) == self._size)
        root = opts.rootRank

        def work() -> None:
            data = flat(source)
            code, width = element(data)
            sent = [0] * self._size
            sent[root] = data.numel() * width
            received = [part.numel() * width for part in parts] or [0] * self._size
            target = room(parts) if parts else data.new_empty(0)
            self._group.all_to_all(data.data_ptr(), target.data_ptr(), sent, received, code)
            spread(target, parts)

        return self._start(work, waited(opts), parts)

    def scatter(self, outputs: Any, inputs: Any, opts: Any = None, *rest: Any) -> Any:
        """Rank r gets the r-th tensor of the list on ``opts.rootRank``; the others pass no list."""
        outputs, inputs, opts = nested(c10d.ScatterOptions, outputs, inputs, opts, *rest)
        (output,) = outputs
        parts = list(inputs[0]) if self._rank == opts.rootRank else []
        if not all(map(movable, (output, *parts))):
            return self._engine(output, "the scattering of").scatter(outputs, inputs, opts)
        if parts:
            agree("scatter", output, parts, len(parts) == self._size)
        root = opts.rootRank

        def work() -> None:
            target = flat(output)
            code, width = element(target)
            received = [0] * self._size
            received[root] = target.numel() * width
            sent = [part.numel() * width for part in parts] or [0] * self._size
            data = joined(parts) if parts else target.new_empty(0)
            self._group.all_to_all(data.data_ptr(), target.data_ptr(), sent, received, code)
            if target is not output:
                output.data.copy_(target)

        return self._start(work, waited(opts), outputs)

    def all_to_all_single(
        self, output: Any, input: Any, output_splits: Sequence[int], input_splits: Sequence[int], opts: Any = None
    ) -> Any:
        """Part j of the first dimension goes to rank j; no splits: equal parts."""
        opts = options(c10d.AllToAllOptions, opts)
        if not (movable(output) and movable(input)):
            engine = self._engine(output, "the exchange of")
            return engine.alltoall_base(output, input, list(output_splits), list(input_splits), opts)
        agree("all_to_all", input, [output], True)
        received, sent = self._parts(output, output_splits), self._parts(input, input_splits)

        def work() -> None:
            data, target = flat(input), flat(output)
            code, width = element(data)
            self._group.all_to_all(
                data.data_ptr(),
                target.data_ptr(),
                [count * width for count in sent],
                [count * width for count in received],
                code,
            )
            if target is not output:
                output.data.copy_(target)

        return self._start(work, waited(opts), [output])

    def alltoall(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        """``inputs[j]`` goes to rank j, ``outputs[j]`` comes from it."""
        opts = options(c10d.AllToAllOptions, opts)
        if not all(map(movable, (*outputs, *inputs))):
            return self._engine(outputs[0], "the exchange of").alltoall(outputs, inputs, opts)
        agree("all_to_all", inputs[0], (*outputs, *inputs), len(outputs) == len(inputs) == self._size)

        def work() -> None:
            data, target = joined(inputs), room(outputs, fresh=True)
            code, width = element(data)
            self._group.all_to_all(
                data.data_ptr(),
                target.data_ptr(),
                [part.numel() * width for part in inputs],
                [part.numel() * width for part in outputs],
                code,
            )
            spread(target, outputs)

        return self._start(work, waited(opts), list(outputs))

    def barrier(self, opts: Any = None, timeout: timedelta | None = None) -> Any:
        """Returns when all ranks have called it; ``opts.timeout`` holds for this call."""
        opts = options(c10d.BarrierOptions, opts, None, timeout)
        seconds = opts.timeout.total_seconds()
        work = partial(self._barrier, seconds) if seconds > 0 else self._group.barrier
        return self._start(work, waited(opts), [])

    # ---- helpers

    def _start(self, work: Callable[[], Any], at_once: bool, tensors: list[Any]) -> Any:
        try:
            if not at_once:
                return CollectiveWork(self._executor.submit(work), tensors)
            self._run(work)
        except CollectiveError as error:
            raise translate(error) from None
        return COMPLETED

    def _engine(self, tensor: Any, what: str) -> Any:
        if tensor.is_cuda:
            self._gpu.look(tensor.get_device())
        return self._engines.of(tensor, f"{what} {describe(tensor)}")

    def _each(self, engine: Any, call: Callable[..., Any], outputs: Any, inputs: Any, opts: Any) -> Any:
        """``call`` for every pair, as one operation where the engine has that."""
        together = len(outputs) > 1 and engine.supports_coalescing
        if together:
            engine._start_coalescing()
        works = [call(output, source, opts) for output, source in zip(outputs, inputs, strict=True)]
        if together:
            return engine._end_coalescing()
        for work in works[:-1]:
            work.wait()
        return works[-1]

    def _look(self, tensor: Any, candidate: bool = False) -> Any:
        """The tensor, or its copy without gaps; its memory may be another one from here on."""
        if not tensor.is_contiguous():
            return tensor.detach().contiguous()
        nbytes = tensor.nbytes
        if nbytes >= LOOKED_AT:
            self._buckets.look(tensor, nbytes, candidate)
        return tensor

    def _barrier(self, seconds: float) -> None:
        usual = self._group.timeout_s
        self._group.timeout_s = seconds
        try:
            self._group.barrier()
        finally:
            self._group.timeout_s = usual

    def _parts(self, tensor: Any, splits: Sequence[int]) -> list[int]:
        """Elements for each rank."""
        rows = tensor.shape[0] if tensor.dim() else 1
        if not splits:
            if rows % self._size:
                raise ValueError(
                    f"all_to_all_single: dimension 0 has {rows} rows, which {self._size} ranks can not share equally; "
                    "pass split sizes"
                )
            return [tensor.numel() // self._size] * self._size
        if len(splits) != self._size or sum(splits) != rows:
            raise ValueError(
                f"all_to_all_single: split sizes {list(splits)} are for a dimension 0 of {sum(splits)} rows and "
                f"{len(splits)} ranks; the tensor has {rows}, the group {self._size}"
            )
        width = tensor.numel() // rows if rows else 0
        return [split * width for split in splits]

    # Names of older torch versions.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single
