"""Collectives that gradients go through, as Horovod defines their derivatives."""

from __future__ import annotations

import torch

from launcher.horovod.torch.process_sets import ProcessSet
from launcher.horovod.torch.requests import Average, Sum, call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any


def differentiable(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the result has to be part of a graph."""
    return torch.is_grad_enabled() and any(
        isinstance(tensor, torch.Tensor) and tensor.requires_grad for tensor in tensors
    )


def run(kind: str, tensors: Sequence[torch.Tensor], process_set: ProcessSet, name: str | None, **options: Any) -> Any:
    """A blocking collective; a list of results."""
    return call(kind, tensors, process_set, name, grouped=True, wake=False, **options).wait()


class Allreduce(torch.autograd.Function):  # type: ignore[misc]
    """The gradient is reduced in the same way."""

    @staticmethod
    def forward(ctx: Any, process_set: ProcessSet, name: str | None, options: dict[str, Any], *tensors: Any) -> Any:
        ctx.process_set, ctx.options = process_set, options
        return tuple(run("allreduce", tensors, process_set, name, **options))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return (None, None, None, *run("allreduce", gradients, ctx.process_set, None, **ctx.options))


class Allgather(torch.autograd.Function):  # type: ignore[misc]
    """Each rank gets its rows of the gradient, averaged over the ranks."""

    @staticmethod
    def forward(ctx: Any, process_set: ProcessSet, name: str | None, *tensors: Any) -> Any:
        ctx.process_set, ctx.rows = process_set, [tensor.shape[0] for tensor in tensors]
        return tuple(run("allgather", tensors, process_set, name))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        reduced = run("allreduce", gradients, ctx.process_set, None, op=Average)
        (everybody,) = run("allgather", [torch.tensor([ctx.rows])], ctx.process_set, None)
        before = everybody[: ctx.process_set.rank()].sum(0).tolist()
        own = [gradient.narrow(0, at, rows) for gradient, at, rows in zip(reduced, before, ctx.rows, strict=True)]
        return (None, None, *own)


class Broadcast(torch.autograd.Function):  # type: ignore[misc]
    """The root gets the average of all gradients, the others get zeros."""

    @staticmethod
    def forward(ctx: Any, tensor: Any, root_rank: int, process_set: ProcessSet, name: str | None) -> Any:
        ctx.process_set, ctx.root_rank = process_set, root_rank
        return run("broadcast", [tensor], process_set, name, root_rank=root_rank)[0]

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        from launcher.horovod.torch.basics import rank

        (reduced,) = run("allreduce", [gradient], ctx.process_set, None, op=Average)
        return (reduced if rank() == ctx.root_rank else torch.zeros_like(reduced)), None, None, None


class Alltoall(torch.autograd.Function):  # type: ignore[misc]
    """Gradients go back the way the rows came."""

    @staticmethod
    def forward(ctx: Any, tensor: Any, splits: list[int], process_set: ProcessSet, name: str | None) -> Any:
        output, received = call("alltoall", [tensor], process_set, name, splits=splits, wake=False).wait()
        ctx.process_set, ctx.received, ctx.rows = process_set, received.tolist(), tensor.shape[0]
        ctx.mark_non_differentiable(received)
        return output, received

    @staticmethod
    def backward(ctx: Any, gradient: Any, *_: Any) -> Any:
        back, _ = call("alltoall", [gradient], ctx.process_set, None, splits=ctx.received, wake=False).wait()
        if back.shape[0] < ctx.rows:  # rows that the splits left out went nowhere
            back = torch.cat([back, back.new_zeros((ctx.rows - back.shape[0], *back.shape[1:]))])
        return back, None, None, None


class Reducescatter(torch.autograd.Function):  # type: ignore[misc]
    """All ranks' rows of the gradient, times the number of ranks for a sum."""

    @staticmethod
    def forward(ctx: Any, process_set: ProcessSet, name: str | None, options: dict[str, Any], *tensors: Any) -> Any:
        ctx.process_set = process_set
        ctx.factor = options["prescale"] * options["postscale"]
        if options["op"] == Sum:
            ctx.factor *= process_set.size()
        return tuple(run("reducescatter", tensors, process_set, name, **options))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        factored = [gradient * ctx.factor for gradient in gradients]
        return (None, None, None, *run("allgather", factored, ctx.process_set, None))
