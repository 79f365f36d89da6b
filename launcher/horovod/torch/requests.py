"""From tensors to requests, and handles for those that are under way."""

from __future__ import annotations

import itertools

import torch

from launcher.horovod.channel import Channel, Request
from launcher.horovod.torch.basics import world
from launcher.horovod.torch.carrier import DTYPES, Body
from launcher.horovod.torch.process_sets import ProcessSet

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from launcher.horovod.torch.memory import SharedMemory

# Horovod's numbers for the reductions.
Average, Sum, Adasum, Min, Max, Product = range(6)
OP_NAMES = ("Average", "Sum", "Adasum", "Min", "Max", "Product")
# Kinds whose tensors may differ between ranks in their first dimension.
_ROWS_DIFFER = frozenset(("allgather", "alltoall"))


class Call:
    """A collective on its way: where it waits, and as what."""

    __slots__ = ("channel", "request")

    def __init__(self, channel: Channel, request: Request) -> None:
        self.channel, self.request = channel, request

    def wait(self) -> Any:
        """Its result. Raises HorovodInternalError when it has failed."""
        return self.channel.wait(self.request)


def call(
    kind: str,
    tensors: Sequence[torch.Tensor],
    process_set: ProcessSet,
    name: str | None,
    *,
    grouped: bool = False,
    in_place: bool = False,
    op: int | None = None,
    prescale: float = 1.0,
    postscale: float = 1.0,
    root_rank: int | None = None,
    splits: list[int] | None = None,
    memory: SharedMemory | None = None,
    wake: bool = True,
) -> Call:
    """Submits a collective.

    Args:
        grouped: the result is a list, as ``tensors`` are one.
        in_place: results go into ``tensors``.
        root_rank: as the job numbers it.
        memory: what holds the tensors, if all of it may be mapped by other ranks.
        wake: False when the caller waits for it at once.

    Raises:
        ValueError: a type, device, name or root that does not do.
        HorovodInternalError: the set has failed before.
    """
    channel = world().channel(process_set)
    if op == Adasum:
        if kind != "allreduce":
            raise ValueError(f"{kind}: op=Adasum is for allreduce only")
        _check_adasum(channel.size, tensors)
        kind = "adasum"
    first = -1 if kind in _ROWS_DIFFER else None
    what = (
        kind,
        tuple(_dtype_name(kind, tensor) for tensor in tensors),
        tuple(tuple(tensor.shape) if first is None else (first, *tensor.shape[1:]) for tensor in tensors),
        "" if op is None else _op_name(op),
        float(prescale),
        float(postscale),
        -1 if root_rank is None else _root(channel, root_rank),
        _device(kind, tensors),
    )
    sources = [tensor.detach().contiguous() for tensor in tensors]
    targets: list[torch.Tensor | None] = [*sources] if in_place else [None] * len(sources)
    body = Body(sources, targets, splits, memory)

    def finish() -> Any:
        if splits is not None:
            return body.targets[0], torch.tensor(body.received, dtype=torch.int32)
        if not in_place:
            return body.targets if grouped else body.targets[0]
        for tensor, target in zip(tensors, body.targets, strict=True):
            if target is not None and target.data_ptr() != tensor.data_ptr():  # it was not contiguous
                tensor.detach().copy_(target)
        return list(tensors) if grouped else tensors[0]

    nbytes = sum(source.numel() * source.element_size() for source in sources)
    request = Request(name if name is not None else channel.next_name(kind), what, body, finish, nbytes)
    channel.submit(request, wake)
    return Call(channel, request)


_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}


def _dtype_name(kind: str, tensor: torch.Tensor) -> str:
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{kind}: found {type(tensor).__name__}; expected a tensor")
    if tensor.dtype not in _NAMES or tensor.layout is not torch.strided:
        layout = "" if tensor.layout is torch.strided else f" and layout {tensor.layout}"
        raise ValueError(
            f"{kind}: a tensor of type {tensor.dtype}{layout} cannot be carried; expected a dense one of "
            f"{', '.join(_NAMES.values())}"
        )
    if kind in ("allgather", "alltoall", "reducescatter") and tensor.dim() == 0:
        raise ValueError(f"{kind}: a tensor without dimensions has no rows; use tensor.view(1)")
    return _NAMES[tensor.dtype]


def _device(kind: str, tensors: Sequence[torch.Tensor]) -> str:
    devices = {tensor.device.type for tensor in tensors}
    if len(devices) > 1 or not devices <= {"cpu", "cuda"}:
        raise ValueError(f"{kind}: tensors on {', '.join(sorted(devices))}; expected all on the CPU, or all on a GPU")
    return devices.pop() if devices else "cpu"


def _op_name(op: int) -> str:
    if not isinstance(op, int) or not 0 <= op < len(OP_NAMES):
        raise ValueError(f"op is {op!r}; expected one of {', '.join(OP_NAMES)}")
    return OP_NAMES[op]


def _root(channel: Channel, root_rank: int) -> int:
    if root_rank not in channel.ranks:
        ranks = ", ".join(map(str, channel.ranks))
        raise ValueError(f"root_rank is {root_rank}; expected a rank of {channel.label}: {ranks}")
    return channel.ranks.index(root_rank)


def _check_adasum(size: int, tensors: Sequence[torch.Tensor]) -> None:
    if size & (size - 1):
        raise NotImplementedError(f"Adasum of {size} ranks: it is defined for a power of two")
    for tensor in tensors:
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"Adasum of {tensor.dtype}: it needs floating point")


_handles: dict[int, Call] = {}
_numbers = itertools.count()


def handle_of(submitted: Call) -> int:
    """The number that a script holds for a call."""
    number = next(_numbers)
    _handles[number] = submitted
    return number


def poll(handle: int) -> bool:
    """Whether the result is there, so that ``synchronize`` does not block.

    Raises:
        ValueError: no such handle, or it was synchronized.
    """
    if handle not in _handles:
        raise ValueError(f"handle {handle!r} is unknown; was it synchronized before?")
    return _handles[handle].request.done


def synchronize(handle: Any) -> Any:
    """Blocks until the result of an asynchronous collective is there, and returns it; None for one that was returned.

    Raises:
        HorovodInternalError: the collective failed.
    """
    if callable(handle):  # sparse_allreduce_async
        return handle()
    submitted = _handles.pop(handle, None)
    return None if submitted is None else submitted.wait()
