"""Tensors on a GPU: carried by NCCL, through torch's process group. Made at the first such tensor."""

from __future__ import annotations

import datetime

import torch

from launcher.errors import UsageError
from launcher.horovod.torch.adasum import combine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from launcher.horovod.negotiation import Signature
    from launcher.horovod.torch.carrier import Body


class DeviceGroup:
    """The process set's group of torch for tensors on a GPU.

    Calls run on the stream of the thread that makes them, after what the caller's stream held at submission, and are
    over when they return: what the caller starts later sees the result whatever its stream.

    Args:
        backend: ``nccl``; ``gloo`` runs the same calls on CPU tensors, for tests.

    Raises:
        UsageError: this torch has no such back-end, or the environment names no place to meet.
    """

    def __init__(self, name: str, rank: int, size: int, timeout_s: float, backend: str = "nccl") -> None:
        from torch import distributed

        self._rank, self._size = rank, size
        if size == 1:
            return  # nobody to meet
        available = {"nccl": distributed.is_nccl_available, "gloo": distributed.is_gloo_available}[backend]
        if not distributed.is_available() or not available():
            raise UsageError(f"horovod: a tensor on a GPU needs a torch with {backend}; copy it to the CPU before")
        timeout = datetime.timedelta(seconds=timeout_s)
        try:
            store, _, _ = next(distributed.rendezvous("env://", timeout=timeout))
        except ValueError as error:
            raise UsageError(f"horovod: ranks cannot meet for tensors on a GPU: {error}") from error
        store = distributed.PrefixStore(f"launcher-{name}", store)
        if backend == "nccl":
            self._group = distributed.ProcessGroupNCCL(store, rank, size)
        else:
            self._group = distributed.ProcessGroupGloo(store, rank, size, timeout)

    def run(self, signature: Signature, bodies: Sequence[Body]) -> None:
        """Carries out a request, or several allreduces that differ in shape only."""
        carry = getattr(self, f"_{signature.kind}")
        if signature.device != "cuda":
            carry(signature, bodies)
            return
        with torch.cuda.device(bodies[0].sources[0].device):
            for body in bodies:
                body.event.wait()
            carry(signature, bodies)
            torch.cuda.current_stream().synchronize()

    def close(self) -> None:
        """Lets go of the group. What was asked of it is over."""
        self._group = None

    def _wait(self, method: str, *arguments: Any) -> None:
        """Calls the group, unless there is only this rank."""
        if self._size > 1:
            getattr(self._group, method)(*arguments).wait()

    def _allreduce(self, signature: Signature, bodies: Sequence[Body]) -> None:
        from torch.distributed import AllreduceOptions, ReduceOp

        options = AllreduceOptions()
        options.reduceOp = {"Min": ReduceOp.MIN, "Max": ReduceOp.MAX, "Product": ReduceOp.PRODUCT}.get(
            signature.op, ReduceOp.SUM
        )
        factor = signature.postscale / (self._size if signature.op == "Average" else 1)
        for body in bodies:
            for at, source in enumerate(body.sources):
                target = body.targets[at]
                if target is None:
                    target = body.targets[at] = torch.empty_like(source)
                if target is not source:
                    target.copy_(source)
                _scale(target, signature.prescale)
                self._wait("allreduce", [target], options)
                _scale(target, factor)

    def _gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all ranks, which have one shape."""
        everybody = [torch.empty_like(tensor) if rank != self._rank else tensor.clone() for rank in range(self._size)]
        self._wait("allgather", [everybody], [tensor])
        return everybody

    def _numbers(self, numbers: Sequence[int], like: torch.Tensor) -> list[list[int]]:
        everybody = self._gather(torch.tensor(numbers, dtype=torch.int64, device=like.device))
        return [row.tolist() for row in everybody]

    def _adasum(self, signature: Signature, bodies: Sequence[Body]) -> None:
        for body in bodies:
            for at, source in enumerate(body.sources):
                result = combine(torch.stack(self._gather(source.flatten() * signature.prescale))) * signature.postscale
                target = body.targets[at]
                body.targets[at] = result.view_as(source) if target is None else target.copy_(result.view_as(source))

    def _allgather(self, signature: Signature, bodies: Sequence[Body]) -> None:
        for body in bodies:
            rows = self._numbers([source.shape[0] for source in body.sources], body.sources[0])
            for at, source in enumerate(body.sources):
                counts = [rank_rows[at] for rank_rows in rows]
                padded = source.new_zeros((max(counts), *source.shape[1:]))
                padded[: source.shape[0]] = source
                pieces = self._gather(padded)
                body.targets[at] = torch.cat([piece[:count] for piece, count in zip(pieces, counts, strict=True)])

    def _broadcast(self, signature: Signature, bodies: Sequence[Body]) -> None:
        from torch.distributed import BroadcastOptions

        options = BroadcastOptions()
        options.rootRank = signature.root
        for body in bodies:
            for at, source in enumerate(body.sources):
                target = body.targets[at]
                if target is None:
                    target = body.targets[at] = source.clone()
                elif target is not source:
                    target.copy_(source)
                self._wait("broadcast", [target], options)

    def _alltoall(self, signature: Signature, bodies: Sequence[Body]) -> None:
        from torch.distributed import AllToAllOptions

        for body in bodies:
            (source,) = body.sources
            assert body.splits is not None
            body.received = [row[self._rank] for row in self._numbers(body.splits, source)]
            sent = source[: sum(body.splits)]
            target = source.new_empty((sum(body.received), *source.shape[1:])) if self._size > 1 else sent.clone()
            body.targets[0] = target
            self._wait("alltoall_base", target, sent, body.received, body.splits, AllToAllOptions())

    def _reducescatter(self, signature: Signature, bodies: Sequence[Body]) -> None:
        from launcher.horovod.torch.carrier import Body, shares

        for body in bodies:
            whole = Body([*body.sources], [None] * len(body.sources))
            self._allreduce(signature, [whole])
            for at, target in enumerate(whole.targets):
                assert target is not None
                body.targets[at] = target.split(shares(target.shape[0], self._size))[self._rank].clone()


def _scale(tensor: torch.Tensor, factor: float) -> None:
    if factor == 1.0:
        return
    if tensor.dtype.is_floating_point:
        tensor.mul_(factor)
    else:
        tensor.copy_((tensor.double() * factor).to(tensor.dtype))
