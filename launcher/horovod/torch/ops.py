"""The collectives, under Horovod's names and with its arguments.

Ranks match requests by name; those without one by the order of the calls of that kind. What they give must agree in
type and shape (but for the first dimension in ``allgather`` and ``alltoall``), else all of them get a
HorovodInternalError that says how they differ. Names that end in ``_async`` return a handle for ``poll`` and
``synchronize``; those with ``_`` before that, or at the end, work in place. ``process_set`` limits a call to its ranks.
"""

from __future__ import annotations

import warnings

import torch

from launcher.horovod.channel import Request
from launcher.horovod.torch import autograd
from launcher.horovod.torch.basics import world
from launcher.horovod.torch.compression import Compression, Compressor
from launcher.horovod.torch.process_sets import ProcessSet, global_process_set
from launcher.horovod.torch.requests import Average, Sum, call, handle_of, poll, synchronize

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

__all__ = [
    "allgather",
    "allgather_async",
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "alltoall",
    "alltoall_async",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_async",
    "broadcast_async_",
    "grouped_allgather",
    "grouped_allgather_async",
    "grouped_allreduce",
    "grouped_allreduce_",
    "grouped_allreduce_async",
    "grouped_allreduce_async_",
    "grouped_reducescatter",
    "grouped_reducescatter_async",
    "join",
    "poll",
    "reducescatter",
    "reducescatter_async",
    "sparse_allreduce_async",
    "synchronize",
]


def _reduction(average: bool | None, op: int | None) -> int:
    """``op``, from the argument that came before it in Horovod's history."""
    if average is None:
        return Average if op is None else op
    if op is not None:
        raise ValueError("both average and op are given; give op alone")
    warnings.warn("the argument average is out of date: give op=Average or op=Sum", DeprecationWarning, stacklevel=3)
    return Average if average else Sum


def _allreduce_options(average: bool | None, op: int | None, prescale: float, postscale: float) -> dict[str, Any]:
    return {"op": _reduction(average, op), "prescale": prescale, "postscale": postscale}


# ---- allreduce


def allreduce_async(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Begins an allreduce. ``op`` is Average unless given; the factors multiply before and after the reduction."""
    options = _allreduce_options(average, op, prescale_factor, postscale_factor)
    return handle_of(call("allreduce", [tensor], process_set, name, **options))


def allreduce_async_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Begins an allreduce in place."""
    options = _allreduce_options(average, op, prescale_factor, postscale_factor)
    return handle_of(call("allreduce", [tensor], process_set, name, in_place=True, **options))


def allreduce(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """The reduction of all ranks' tensors, a new tensor. Gradients go through it."""
    options = _allreduce_options(average, op, prescale_factor, postscale_factor)
    travelling, ctx = compression.compress(tensor)
    if autograd.differentiable([travelling]):
        (reduced,) = autograd.Allreduce.apply(process_set, name, options, travelling)
    else:
        reduced = call("allreduce", [travelling], process_set, name, wake=False, **options).wait()
    return compression.decompress(reduced, ctx)


def allreduce_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """Reduces in place and returns the tensor."""
    options = _allreduce_options(average, op, prescale_factor, postscale_factor)
    result: torch.Tensor = call("allreduce", [tensor], process_set, name, in_place=True, wake=False, **options).wait()
    return result


def grouped_allreduce_async(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Begins an allreduce of several tensors as one message."""
    options = _allreduce_options(average, op, prescale_factor, postscale_factor)
    return handle_of(call("allreduce", tensors, process_set, name, grouped=True, **options))


def grouped_allreduce_async_(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Begins an allreduce of several tensors in place."""
    options = _allreduce_options(average, op, prescale_factor, postscale_factor)
    return handle_of(call("allreduce", tensors, process_set, name, grouped=True, in_place=True, **options))


def grouped_allreduce(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[torch.Tensor]:
    """The reductions of several tensors. Gradients go through it."""
    options = _allreduce_options(average, op, prescale_factor, postscale_factor)
    travelling, contexts = _compress(compression, tensors)
    if autograd.differentiable(travelling):
        reduced = autograd.Allreduce.apply(process_set, name, options, *travelling)
    else:
        reduced = autograd.run("allreduce", travelling, process_set, name, **options)
    return [compression.decompress(tensor, ctx) for tensor, ctx in zip(reduced, contexts, strict=True)]


def grouped_allreduce_(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[torch.Tensor]:
    """Reduces several tensors in place and returns them."""
    options = _allreduce_options(average, op, prescale_factor, postscale_factor)
    result: list[torch.Tensor] = autograd.run("allreduce", tensors, process_set, name, in_place=True, **options)
    return result


def sparse_allreduce_async(
    tensor: torch.Tensor, name: str | None, op: int, process_set: ProcessSet = global_process_set
) -> Callable[[], torch.Tensor]:
    """Begins to add up (Sum) or average sparse tensors: everybody's entries are gathered. Call the result for it."""
    if op not in (Average, Sum):
        raise ValueError("a sparse allreduce takes op=Average or op=Sum")
    entries = tensor.detach()
    indices, values = entries._indices().t().contiguous(), entries._values()
    if op == Average:
        values = values / process_set.size()
    both = call("allgather", [indices, values], process_set, None if name is None else f"{name}.sparse", grouped=True)

    def result() -> torch.Tensor:
        all_indices, all_values = both.wait()
        where = {"device": tensor.device, "check_invariants": False}
        return torch.sparse_coo_tensor(all_indices.t(), all_values, tensor.shape, **where)

    return result


# ---- allgather


def allgather_async(tensor: torch.Tensor, name: str | None = None, process_set: ProcessSet = global_process_set) -> int:
    """Begins an allgather."""
    return handle_of(call("allgather", [tensor], process_set, name))


def allgather(
    tensor: torch.Tensor, name: str | None = None, process_set: ProcessSet = global_process_set
) -> torch.Tensor:
    """All ranks' rows, in rank order. Gradients go through it."""
    if autograd.differentiable([tensor]):
        result: torch.Tensor = autograd.Allgather.apply(process_set, name, tensor)[0]
    else:
        result = call("allgather", [tensor], process_set, name, wake=False).wait()
    return result


def grouped_allgather_async(
    tensors: Sequence[torch.Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> int:
    """Begins an allgather of several tensors."""
    return handle_of(call("allgather", tensors, process_set, name, grouped=True))


def grouped_allgather(
    tensors: Sequence[torch.Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> list[torch.Tensor]:
    """All ranks' rows of several tensors. Gradients go through it."""
    if autograd.differentiable(tensors):
        return list(autograd.Allgather.apply(process_set, name, *tensors))
    result: list[torch.Tensor] = autograd.run("allgather", tensors, process_set, name)
    return result


# ---- broadcast


def broadcast_async(
    tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> int:
    """Begins a broadcast."""
    return handle_of(call("broadcast", [tensor], process_set, name, root_rank=root_rank))


def broadcast_async_(
    tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> int:
    """Begins a broadcast in place."""
    return handle_of(call("broadcast", [tensor], process_set, name, root_rank=root_rank, in_place=True))


def broadcast(
    tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> torch.Tensor:
    """The tensor of rank ``root_rank``, as the job numbers it. Gradients go through it."""
    if autograd.differentiable([tensor]):
        result: torch.Tensor = autograd.Broadcast.apply(tensor, root_rank, process_set, name)
    else:
        result = call("broadcast", [tensor], process_set, name, root_rank=root_rank, wake=False).wait()
    return result


def broadcast_(
    tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> torch.Tensor:
    """Makes the tensor that of rank ``root_rank`` and returns it."""
    options: dict[str, Any] = {"root_rank": root_rank, "in_place": True, "wake": False}
    result: torch.Tensor = call("broadcast", [tensor], process_set, name, **options).wait()
    return result


# ---- alltoall


def _splits(tensor: torch.Tensor, splits: Any, size: int) -> list[int]:
    rows = tensor.shape[0] if tensor.dim() else 0
    if splits is None:
        if rows % size:
            raise ValueError(f"alltoall: {rows} rows cannot be split equally among {size} ranks; give splits")
        return [rows // size] * size
    wanted = [int(count) for count in (splits.tolist() if isinstance(splits, torch.Tensor) else splits)]
    if len(wanted) != size:
        raise ValueError(f"alltoall: {len(wanted)} splits for {size} ranks; give one for each")
    if min(wanted) < 0 or sum(wanted) > rows:
        raise ValueError(f"alltoall: splits {wanted} of a tensor with {rows} rows; they may not be more, nor negative")
    return wanted


def alltoall_async(
    tensor: torch.Tensor, splits: Any = None, name: str | None = None, process_set: ProcessSet = global_process_set
) -> int:
    """Begins an alltoall; its result is the tensor and the rows that came from each rank."""
    counts = _splits(tensor, splits, world().channel(process_set).size)
    return handle_of(call("alltoall", [tensor], process_set, name, splits=counts))


def alltoall(
    tensor: torch.Tensor, splits: Any = None, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Any:
    """Sends ``splits[r]`` rows to rank r, equally many to each without ``splits``.

    Returns:
        What came, in rank order; with ``splits`` also the rows from each rank (int32). Gradients go through it.
    """
    counts = _splits(tensor, splits, world().channel(process_set).size)
    if autograd.differentiable([tensor]):
        output, received = autograd.Alltoall.apply(tensor, counts, process_set, name)
    else:
        output, received = call("alltoall", [tensor], process_set, name, splits=counts, wake=False).wait()
    return output if splits is None else (output, received)


# ---- reducescatter


def reducescatter_async(
    tensor: torch.Tensor,
    name: str | None = None,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> int:
    """Begins a reducescatter."""
    options: dict[str, Any] = {"op": op, "prescale": prescale_factor, "postscale": postscale_factor}
    return handle_of(call("reducescatter", [tensor], process_set, name, **options))


def reducescatter(
    tensor: torch.Tensor,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> torch.Tensor:
    """This rank's rows of the reduction; the first ranks get one more where the rows do not divide equally."""
    factors = {"prescale_factor": prescale_factor, "postscale_factor": postscale_factor}
    return grouped_reducescatter([tensor], name, compression, op, process_set, **factors)[0]


def grouped_reducescatter_async(
    tensors: Sequence[torch.Tensor],
    name: str | None = None,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> int:
    """Begins a reducescatter of several tensors."""
    options: dict[str, Any] = {"op": op, "prescale": prescale_factor, "postscale": postscale_factor}
    return handle_of(call("reducescatter", tensors, process_set, name, grouped=True, **options))


def grouped_reducescatter(
    tensors: Sequence[torch.Tensor],
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[torch.Tensor]:
    """This rank's rows of the reductions of several tensors. Gradients go through it."""
    options: dict[str, Any] = {"op": op, "prescale": prescale_factor, "postscale": postscale_factor}
    travelling, contexts = _compress(compression, tensors)
    if autograd.differentiable(travelling):
        reduced = autograd.Reducescatter.apply(process_set, name, options, *travelling)
    else:
        reduced = autograd.run("reducescatter", travelling, process_set, name, **options)
    return [compression.decompress(tensor, ctx) for tensor, ctx in zip(reduced, contexts, strict=True)]


def _compress(compression: type[Compressor], tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[Any]]:
    both = [compression.compress(tensor) for tensor in tensors]
    return [tensor for tensor, _ in both], [ctx for _, ctx in both]


# ---- without tensors


def join(device: int = -1) -> int:
    """Tells that this rank has no more data, and waits until no rank has any.

    Until then it takes part with zeros in the others' allreduces (an average is still over all ranks), and with no rows
    in their allgathers; other collectives of theirs fail.

    Args:
        device: accepted; zeros are made where the others' tensors are.

    Returns:
        The rank that joined last; of several at once, the highest.
    """
    return world().channel(global_process_set).join()


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Returns when all ranks of the set have called it."""
    channel = world().channel(process_set)
    what = ("barrier", (), (), "", 1.0, 1.0, -1, "cpu")
    channel.wait(channel.submit(Request(channel.next_name("barrier"), what), wake=False))
