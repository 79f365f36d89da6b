"""Carries out what the ranks have agreed on: tensors' memory to the group's calls."""

from __future__ import annotations

import torch

from launcher.collectives.elements import DType, ReduceOp
from launcher.horovod.channel import Request
from launcher.horovod.torch.adasum import combine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from launcher.collectives.group import Group
    from launcher.horovod.negotiation import Signature
    from launcher.horovod.torch.device import DeviceGroup
    from launcher.horovod.torch.memory import SharedMemory

DTYPES: dict[torch.dtype, DType] = {
    torch.float32: DType.float32,
    torch.float64: DType.float64,
    torch.float16: DType.float16,
    torch.bfloat16: DType.bfloat16,
    torch.int8: DType.int8,
    torch.uint8: DType.uint8,
    torch.int16: DType.int16,
    torch.int32: DType.int32,
    torch.int64: DType.int64,
    torch.bool: DType.bool,
}
OPS = {
    "Average": ReduceOp.AVERAGE,
    "Sum": ReduceOp.SUM,
    "Min": ReduceOp.MIN,
    "Max": ReduceOp.MAX,
    "Product": ReduceOp.PRODUCT,
}
# Allreduces smaller than this are put together into one message of at most _TOGETHER_BYTES.
_SMALL_BYTES, _TOGETHER_BYTES = 1 << 20, 16 << 20


class Body:
    """The tensors of a request, all contiguous.

    ``sources`` and ``targets`` are as many; a target that is None is made when its size is known, and found here.
    ``splits``: rows for each rank (alltoall); afterwards ``received``: rows from each. ``memory``: what holds the
    tensors, if the group is to map it.
    """

    __slots__ = ("event", "memory", "received", "sources", "splits", "targets")

    def __init__(
        self,
        sources: list[torch.Tensor],
        targets: list[torch.Tensor | None],
        splits: list[int] | None = None,
        memory: SharedMemory | None = None,
    ) -> None:
        self.sources, self.targets, self.splits, self.memory = sources, targets, splits, memory
        self.received: list[int] = []
        self.event: Any = None
        if sources and sources[0].is_cuda:
            self.event = torch.cuda.current_stream(sources[0].device).record_event()


class TorchCarrier:
    """See launcher.horovod.channel.Carrier. ``device_group`` makes what moves tensors of a GPU, at its first use."""

    def __init__(self, group: Group, device_group: Callable[[], DeviceGroup]) -> None:
        self._group, self._make_device_group = group, device_group
        self._device_group: DeviceGroup | None = None
        self._registered: dict[int, SharedMemory] = {}

    def run(self, requests: Sequence[Request], done: Callable[[Request], None]) -> None:
        for together in _together(requests):
            for request in together:
                if request.body is not None and request.body.memory is not None:
                    self._register(request.body.memory)
            signature = together[0].signature
            if signature.device == "cpu":
                _ON_HOST[signature.kind](self._group, signature, [request.body for request in together])
            else:
                if self._device_group is None:
                    self._device_group = self._make_device_group()
                self._device_group.run(signature, [request.body for request in together])
            for request in together:
                done(request)

    def stand_in(self, signature: Signature) -> Request:
        device = torch.device(signature.device, torch.cuda.current_device() if signature.device == "cuda" else None)
        rows = [tuple(0 if size == -1 else size for size in shape) for shape in signature.shapes]
        types = [getattr(torch, name) for name in signature.dtypes]
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in zip(rows, types, strict=True)]
        targets: list[torch.Tensor | None] = [*zeros] if signature.kind != "allgather" else [None] * len(zeros)
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in zeros)
        return Request(signature.name, tuple(signature.as_list()[1:]), Body(zeros, targets), nbytes=nbytes)

    def _register(self, memory: SharedMemory) -> None:
        if memory.address not in self._registered:
            self._group.register(memory.address, memory.nbytes, memory.descriptor)
            self._registered[memory.address] = memory  # which keeps it mapped for as long as the group knows it
        for address, known in list(self._registered.items()):
            if known.unused:
                self._group.unregister(address)
                del self._registered[address]

    def close(self) -> None:
        for address in self._registered:
            self._group.unregister(address)
        self._registered.clear()
        if self._device_group is not None:
            self._device_group.close()


def _together(requests: Sequence[Request]) -> Iterator[list[Request]]:
    """Neighbours that can be one message; the same on all ranks, which have the same requests in the same order."""
    batch: list[Request] = []
    nbytes = 0
    for request in requests:
        small = request.what[0] == "allreduce" and request.nbytes < _SMALL_BYTES
        same = batch and small and _how(batch[0]) == _how(request)
        if not same or nbytes + request.nbytes > _TOGETHER_BYTES:
            if batch:
                yield batch
            batch, nbytes = [], 0
        batch.append(request)
        nbytes += request.nbytes
        if not small:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch


def _how(request: Request) -> tuple[Any, ...]:
    """What must be equal for two allreduces to be one message; their shapes and types need not be."""
    kind, _, _, op, prescale, postscale, _, device = request.what
    return kind, op, prescale, postscale, device


def scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """Integers times a factor, in double precision and cut off, as Horovod has it. Factor 1: the tensor itself."""
    return tensor if factor == 1.0 else (tensor.double() * factor).to(tensor.dtype)


def _own_target(body: Body, index: int) -> torch.Tensor:
    target = body.targets[index]
    if target is None:
        target = body.targets[index] = torch.empty_like(body.sources[index])
    return target


def _allreduce(group: Group, signature: Signature, bodies: list[Body]) -> None:
    pairs = [(source, _own_target(body, at)) for body in bodies for at, source in enumerate(body.sources)]
    op = OPS[signature.op]
    for dtype in dict.fromkeys(source.dtype for source, _ in pairs):
        chosen = [(source, target) for source, target in pairs if source.dtype == dtype and source.numel()]
        if not chosen:
            continue
        prescale, postscale = signature.prescale, signature.postscale
        if not dtype.is_floating_point:
            chosen = [(scaled(source, prescale), target) for source, target in chosen]
            prescale = postscale = 1.0
        if len(chosen) == 1:
            source, target = chosen[0]
            pointers = source.data_ptr(), target.data_ptr(), source.numel()
            group.allreduce(*pointers, DTYPES[dtype], op, prescale, postscale)
        else:
            group.allreduce_coalesced(
                [source.data_ptr() for source, _ in chosen],
                [target.data_ptr() for _, target in chosen],
                [source.numel() for source, _ in chosen],
                DTYPES[dtype],
                op,
                prescale,
                postscale,
            )
        if not dtype.is_floating_point and signature.postscale != 1.0:
            for _, target in chosen:
                target.copy_(scaled(target, signature.postscale))


def _adasum(group: Group, signature: Signature, bodies: list[Body]) -> None:
    for body in bodies:
        for at, source in enumerate(body.sources):
            target = _own_target(body, at)
            if not source.numel():
                continue
            everybody = torch.empty((group.size, source.numel()), dtype=source.dtype)
            counts = [source.numel()] * group.size
            scaled_source = source if signature.prescale == 1.0 else source * signature.prescale
            group.all_gather(scaled_source.data_ptr(), everybody.data_ptr(), counts, DTYPES[source.dtype])
            target.copy_(combine(everybody).view_as(target) * signature.postscale)


def _exchange_numbers(group: Group, numbers: Sequence[int]) -> list[list[int]]:
    """As many whole numbers of each rank, by rank."""
    mine = torch.tensor(numbers, dtype=torch.int64)
    everybody = torch.empty((group.size, len(numbers)), dtype=torch.int64)
    group.all_gather(mine.data_ptr(), everybody.data_ptr(), [len(numbers)] * group.size, DType.int64)
    found: list[list[int]] = everybody.tolist()
    return found


def _allgather(group: Group, signature: Signature, bodies: list[Body]) -> None:
    for body in bodies:
        rows = _exchange_numbers(group, [source.shape[0] for source in body.sources])
        for at, source in enumerate(body.sources):
            counts = [rank_rows[at] for rank_rows in rows]
            target = body.targets[at] = source.new_empty((sum(counts), *source.shape[1:]))
            if target.numel():
                row = source.shape[1:].numel()
                elements = [count * row for count in counts]
                group.all_gather(source.data_ptr(), target.data_ptr(), elements, DTYPES[source.dtype])


def _broadcast(group: Group, signature: Signature, bodies: list[Body]) -> None:
    for body in bodies:
        for at, source in enumerate(body.sources):
            target = _own_target(body, at)
            if target is not source and group.rank == signature.root:
                target.copy_(source)
            if target.numel():
                group.broadcast(target.data_ptr(), target.numel(), DTYPES[target.dtype], signature.root)


def _alltoall(group: Group, signature: Signature, bodies: list[Body]) -> None:
    for body in bodies:
        (source,) = body.sources
        assert body.splits is not None
        body.received = [row[group.rank] for row in _exchange_numbers(group, body.splits)]
        target = body.targets[0] = source.new_empty((sum(body.received), *source.shape[1:]))
        row = source.shape[1:].numel()
        group.all_to_all(
            source.data_ptr(),
            target.data_ptr(),
            [count * row for count in body.splits],
            [count * row for count in body.received],
            DTYPES[source.dtype],
        )


def shares(rows: int, size: int) -> list[int]:
    """Rows of each rank after a reducescatter: equal, and one more for the first ones where that does not work out."""
    return [rows // size + (rank < rows % size) for rank in range(size)]


def _reducescatter(group: Group, signature: Signature, bodies: list[Body]) -> None:
    for body in bodies:
        for at, source in enumerate(body.sources):
            floating = source.dtype.is_floating_point
            rows = shares(source.shape[0], group.size)
            row = source.shape[1:].numel()
            target = body.targets[at] = source.new_empty((rows[group.rank], *source.shape[1:]))
            if not source.numel():
                continue
            given = source if floating else scaled(source, signature.prescale)
            group.reduce_scatter(
                given.data_ptr(),
                target.data_ptr(),
                [count * row for count in rows],
                DTYPES[source.dtype],
                OPS[signature.op],
                signature.prescale if floating else 1.0,
                signature.postscale if floating else 1.0,
            )
            if not floating:
                target.copy_(scaled(target, signature.postscale))


def _barrier(group: Group, signature: Signature, bodies: list[Body]) -> None:
    group.barrier()


_ON_HOST = {
    "allreduce": _allreduce,
    "adasum": _adasum,
    "allgather": _allgather,
    "broadcast": _broadcast,
    "alltoall": _alltoall,
    "reducescatter": _reducescatter,
    "barrier": _barrier,
}
