"""Gradients of an optimizer's parameters, reduced while backward still computes others."""

from __future__ import annotations

import itertools
import threading
import weakref

import torch

from launcher.horovod.torch import basics, buckets
from launcher.horovod.torch.compression import CastCompressor, Compressor, NoneCompressor
from launcher.horovod.torch.ops import sparse_allreduce_async
from launcher.horovod.torch.process_sets import ProcessSet
from launcher.horovod.torch.requests import Average, call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from launcher.horovod.torch.buckets import Bucket, Slot


# Of the reducers of a process: all ranks make theirs in the same order.
_numbers = itertools.count()


class Watch:
    """A parameter, and how far its gradient of this step is.

    ``left``: backward passes until it is ready. ``slot``: its place in a bucket; None: it travels by itself, because it
    is sparse or has a compression of the script's own, and ``result`` gives what came of it.
    """

    __slots__ = ("left", "name", "parameter", "result", "slot", "sparse")

    def __init__(self, parameter: torch.Tensor, name: str, passes: int) -> None:
        self.parameter, self.name, self.left = parameter, name, passes
        self.slot: Slot | None = None
        self.sparse = 0  # sparse dimensions of its gradient
        self.result: Callable[[], torch.Tensor] | None = None


class Reducer:
    """Watches parameters' gradients and reduces them.

    The first step only looks: which gradients come in which order, and which are sparse. The ranks then agree on
    buckets in the order of the first rank. From the second step on a bucket goes on its way when its last gradient is
    there.

    Args:
        names: parameter -> name, the same on all ranks, in the order of the optimizer.
        passes: backward passes before a gradient is ready.
        groups: parameters that must travel together, or into how many buckets to put all.
    """

    def __init__(
        self,
        names: dict[torch.Tensor, str],
        compression: type[Compressor],
        passes: int,
        op: int,
        predivide: float,
        groups: Sequence[Sequence[torch.Tensor]] | int | None,
        sparse_as_dense: bool,
        process_set: ProcessSet,
    ) -> None:
        self._number = next(_numbers)
        self._compression, self._groups = compression, groups
        self._op, self._predivide = op, predivide
        self._sparse_as_dense, self._process_set = sparse_as_dense, process_set
        self._passes = passes
        self._watches: list[Watch] = []
        self._ready: list[Watch] = []  # in the first step, in the order in which they came
        self._buckets: list[Bucket] = []
        self._world: basics.World | None = None  # that the buckets were agreed on in
        self._plans = 0
        self._lock = threading.Lock()  # backward of several devices runs in several threads
        self.add(names)

    @property
    def busy(self) -> bool:
        """Whether gradients of this step have been counted, or are on their way."""
        return any(watch.left != self._passes for watch in self._watches)

    def add(self, names: dict[torch.Tensor, str]) -> None:
        """Watches more parameters. All ranks must do it."""
        own = weakref.ref(self)

        def hook_of(watch: Watch) -> Callable[[torch.Tensor], None]:
            def hook(parameter: torch.Tensor) -> None:
                reducer = own()
                if reducer is not None:  # else the optimizer is gone; its parameters may be another's by now
                    reducer._count(watch)

            return hook

        for parameter, name in names.items():
            self._watches.append(Watch(parameter, name, self._passes))
            parameter.register_post_accumulate_grad_hook(hook_of(self._watches[-1]))
        self._drop_buckets()

    def set_passes(self, passes: int) -> None:
        """Another number of backward passes, from the next step on."""
        self._passes = passes
        self.reset()

    def reset(self) -> None:
        """Forgets what was counted of the current step."""
        self._ready.clear()
        for watch in self._watches:
            watch.left, watch.result = self._passes, None
        if any(bucket.call is not None and not bucket.call.request.done for bucket in self._buckets):
            self._drop_buckets()  # one is still being reduced: its memory is not ours to fill
        for bucket in self._buckets:
            bucket.reset()

    # ---- while backward runs

    def _count(self, watch: Watch) -> None:
        with self._lock:
            if watch.left <= 0:
                raise AssertionError(
                    f"the gradient of {watch.name!r} was computed more than {self._passes} times before step(): raise "
                    "backward_passes_per_step to sum gradients over several backward passes"
                )
            watch.left -= 1
            if watch.left:
                return
            if self._world is None or self._world is not basics._world:
                self._ready.append(watch)
                return
            slot = watch.slot
            if slot is None:
                watch.result = self._send_alone(watch)
                return
            self._pack(slot)
            bucket = slot.bucket
            bucket.missing -= 1
            if not bucket.missing:
                self._send(bucket, wake=True)

    def _pack(self, slot: Slot) -> None:
        slot.packed = True
        parameter, view = slot.parameter, slot.view
        gradient = parameter.grad
        if gradient is None:
            view.zero_()
            return
        if gradient.requires_grad:  # of backward(create_graph=True)
            gradient = gradient.detach()
        if gradient.layout is not torch.strided:
            view.copy_(gradient.to_dense())
            return
        if gradient.data_ptr() == slot.address and gradient.dtype == view.dtype:
            return
        view.copy_(gradient)
        if gradient.dtype == view.dtype:
            parameter.grad = view  # frees the other one for the next gradients

    def _send(self, bucket: Bucket, wake: bool) -> None:
        assert bucket.flat is not None
        bucket.call = call(
            "allreduce",
            [bucket.flat],
            self._process_set,
            bucket.name,
            in_place=True,
            memory=bucket.memory,
            wake=wake,
            **self._scaling(),
        )

    def _scaling(self) -> dict[str, Any]:
        if self._op != Average:
            return {"op": self._op}
        return {"op": self._op, "prescale": 1.0 / self._predivide, "postscale": self._predivide}

    def _send_alone(self, watch: Watch) -> Callable[[], torch.Tensor]:
        name, parameter, gradient = f"gradient.{self._number}.{watch.name}", watch.parameter, watch.parameter.grad
        if watch.sparse and not self._sparse_as_dense:
            if gradient is None:
                indices = torch.empty((watch.sparse, 0), dtype=torch.int64, device=parameter.device)
                values = parameter.detach().new_empty((0, *parameter.shape[watch.sparse :]))
                gradient = torch.sparse_coo_tensor(indices, values, parameter.shape, check_invariants=False)
            return sparse_allreduce_async(gradient, name, self._op, self._process_set)
        dense = torch.zeros_like(parameter) if gradient is None else gradient.detach()
        travelling, ctx = self._compression.compress(dense.to_dense() if dense.is_sparse else dense)
        submitted = call("allreduce", [travelling], self._process_set, name, in_place=True, **self._scaling())
        return lambda: self._compression.decompress(submitted.wait(), ctx)

    # ---- at the end of a step

    def synchronize(self) -> None:
        """Every parameter's ``grad`` becomes the reduction of all ranks' gradients; of a missing one, zeros count.

        Raises:
            HorovodInternalError: a rank is gone, or trains another model.
        """
        if self._world is None or self._world is not basics._world:
            self._make_buckets()
        with self._lock:
            for bucket in self._buckets:
                if bucket.call is None:
                    for slot in bucket.slots:
                        if not slot.packed:
                            self._pack(slot)
                    self._send(bucket, wake=False)
            alone = [watch for watch in self._watches if watch.slot is None]
            for watch in alone:
                if watch.result is None:
                    watch.result = self._send_alone(watch)
            for bucket in self._buckets:
                assert bucket.call is not None
                bucket.call.wait()
            for watch in self._watches:
                if watch.slot is not None:
                    self._assign(watch, watch.slot.view)
            for watch in alone:
                assert watch.result is not None
                self._assign(watch, watch.result())
        self.reset()

    @staticmethod
    def _assign(watch: Watch, reduced: torch.Tensor) -> None:
        """Makes ``reduced`` the parameter's gradient; it may lie there already."""
        parameter = watch.parameter
        gradient = parameter.grad
        if gradient is reduced:
            return
        if reduced.is_sparse:
            parameter.grad = reduced
        elif watch.sparse:
            parameter.grad = reduced.to(parameter.dtype).to_sparse(watch.sparse)
        elif reduced.dtype == parameter.dtype and reduced.shape == parameter.shape:
            parameter.grad = reduced
        elif gradient is None:
            parameter.grad = torch.empty_like(parameter).copy_(reduced.view_as(parameter)).detach()
        else:
            gradient.detach().copy_(reduced.view_as(parameter))

    # ---- buckets

    def _make_buckets(self) -> None:
        world = basics.world()
        self._drop_buckets()
        self._plans += 1
        for watch in self._watches:
            gradient = watch.parameter.grad
            watch.sparse = gradient.sparse_dim() if gradient is not None and gradient.is_sparse else 0
        order = list(dict.fromkeys((*self._ready, *reversed(self._watches))))
        mine = buckets.describe([(watch.name, watch.parameter, watch.sparse) for watch in order], world.rank)
        line = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
        everybody = call("allgather", [line], self._process_set, None, wake=False).wait()
        names, sparse = buckets.compare(everybody.numpy().tobytes())
        by_name = {watch.name: watch for watch in self._watches}
        wires: dict[torch.Tensor, torch.dtype] = {}
        for name in names:
            watch = by_name[name]
            watch.sparse = sparse.get(name, 0)
            wire = self._wire_dtype(watch)
            if wire is not None:
                wires[watch.parameter] = wire
        prefix = f"gradients.{self._number}.{self._plans}"
        self._buckets = buckets.fill(wires, self._group_lists(list(wires)), prefix)
        slots = {slot.parameter: slot for bucket in self._buckets for slot in bucket.slots}
        for watch in self._watches:
            watch.slot = slots.get(watch.parameter)
        self._world = world

    def _wire_dtype(self, watch: Watch) -> torch.dtype | None:
        """What a gradient travels as in a bucket; None for one that travels by itself."""
        dtype = watch.parameter.dtype
        if watch.sparse and not self._sparse_as_dense:
            return None
        if issubclass(self._compression, NoneCompressor):
            return dtype
        if issubclass(self._compression, CastCompressor):
            return self._compression.wire_dtype if dtype.is_floating_point else dtype
        return None

    def _group_lists(self, parameters: list[torch.Tensor]) -> list[list[torch.Tensor]]:
        if not self._groups:
            return []
        if isinstance(self._groups, int):
            each, more = divmod(len(parameters), self._groups)
            ends = [each * (at + 1) + min(at + 1, more) for at in range(self._groups)]
            return [parameters[begin:end] for begin, end in zip([0, *ends], ends, strict=False) if begin < end]
        return [list(group) for group in self._groups]

    def _drop_buckets(self) -> None:
        for bucket in self._buckets:
            bucket.drop()
        self._buckets, self._world = [], None
        for watch in self._watches:
            watch.slot = None
