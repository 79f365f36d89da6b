"""DistributedOptimizer: any optimizer of torch, with gradients that are reduced over the ranks."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import torch

from launcher.horovod.torch import basics
from launcher.horovod.torch.compression import Compression, Compressor
from launcher.horovod.torch.process_sets import ProcessSet, global_process_set
from launcher.horovod.torch.reducer import Reducer
from launcher.horovod.torch.requests import Adasum, Average, call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Any


class _Distributed:
    """What is put before the class of the optimizer that is wrapped."""

    _reducer: Reducer | None = None
    _synchronized = False
    _should_synchronize = True

    def synchronize(self) -> None:
        """Finishes the reduction of this step's gradients. ``step`` does it unless under ``skip_synchronize``."""
        if self._reducer is not None:
            self._reducer.synchronize()
        self._synchronized = True

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """For a ``step`` after ``synchronize``, with the gradients clipped in between, say."""
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True

    def step(self, closure: Any = None) -> Any:
        """As the wrapped optimizer's. Gradients that ``closure`` computes are reduced each time it has run."""
        if self._should_synchronize:
            if self._synchronized:
                warnings.warn(
                    "step() after synchronize() reduces once more: put it under `with optimizer.skip_synchronize():`",
                    stacklevel=2,
                )
            if closure is None:
                self.synchronize()
            elif self._reducer is not None:
                closure = self._reducing(closure)
        self._synchronized = False
        return super().step(closure)  # type: ignore[misc]

    def _reducing(self, closure: Any) -> Any:
        def run() -> Any:
            loss = closure()
            self.synchronize()
            return loss

        return run

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the wrapped optimizer's.

        Raises:
            AssertionError: gradients of this step are on their way.
        """
        if self._reducer is not None and self._reducer.busy:
            raise AssertionError(
                "zero_grad() between backward() and step() or synchronize(): gradients are being reduced; call it "
                "before backward() or after step()"
            )
        super().zero_grad(set_to_none)  # type: ignore[misc]

    def set_backward_passes_per_step(self, passes: int) -> None:
        """How many backward passes are summed before gradients are reduced."""
        if self._reducer is not None:
            self._reducer.set_passes(passes)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the wrapped optimizer's; all ranks must call it."""
        super().add_param_group(param_group)  # type: ignore[misc]
        if self._reducer is not None:
            groups: list[dict[str, Any]] = self.param_groups  # type: ignore[attr-defined]
            prefix = f"group{len(groups) - 1}"
            added = {item: f"{prefix}.{at}" for at, item in enumerate(groups[-1]["params"]) if item.requires_grad}
            self._reducer.add(added)

    def load_state_dict(self, state_dict: Any) -> None:
        """As the wrapped optimizer's; what was counted of the current step is forgotten."""
        self._synchronized, self._should_synchronize = False, True
        if self._reducer is not None:
            self._reducer.reset()
        super().load_state_dict(state_dict)  # type: ignore[misc]


class _DistributedAdasum:
    """The same for Adasum: every rank makes its own step, and the steps are combined."""

    _compression: type[Compressor]

    def synchronize(self) -> None:
        """Nothing: there is no reduction before ``step``."""

    def skip_synchronize(self) -> Any:
        """Not with Adasum."""
        raise AssertionError("skip_synchronize() does not go with op=Adasum: the reduction is part of step()")

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Accepted: gradients are summed until ``step`` in any case."""

    def step(self, closure: Any = None) -> Any:
        """As the wrapped optimizer's, then the adaptive sum of all ranks' changes of each parameter."""
        groups: list[dict[str, Any]] = self.param_groups  # type: ignore[attr-defined]
        parameters = [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]
        before = [parameter.detach().clone() for parameter in parameters]
        loss = super().step(closure)  # type: ignore[misc]
        changes = [parameter.detach() - start for parameter, start in zip(parameters, before, strict=True)]
        both = [self._compression.compress(change) for change in changes]
        sent = [travelling for travelling, _ in both]
        summed = call("allreduce", sent, global_process_set, None, grouped=True, op=Adasum, wake=False).wait()
        with torch.no_grad():
            for parameter, start, change, (_, ctx) in zip(parameters, before, summed, both, strict=True):
                parameter.copy_(start + self._compression.decompress(change, ctx))
        return loss


def _names(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, torch.Tensor]] | None
) -> dict[torch.Tensor, str]:
    """The optimizer's parameters that are trained, in its order, with their names."""
    groups = [group["params"] for group in optimizer.param_groups]
    if named_parameters is None:
        named = [(f"{at}.{place}", item) for at, group in enumerate(groups) for place, item in enumerate(group)]
    else:
        named = list(named_parameters)
        if any(not isinstance(item, tuple) or len(item) != 2 for item in named):
            raise ValueError("named_parameters: expected pairs of name and parameter, as in model.named_parameters()")
    given = [name for name, _ in named]
    twice = sorted({name for name in given if given.count(name) > 1}) if len(set(given)) < len(given) else []
    if twice:
        raise ValueError(f"named_parameters: names must be unique, found several of {', '.join(twice)}")
    by_parameter = {parameter: name for name, parameter in named}
    wanted = [parameter for group in groups for parameter in group]
    without = sum(parameter not in by_parameter for parameter in wanted)
    if without:
        raise ValueError(f"named_parameters: {without} of the optimizer's {len(wanted)} parameters have no name in it")
    return {parameter: by_parameter[parameter] for parameter in wanted if parameter.requires_grad}


def _check_groups(groups: Any) -> None:
    if isinstance(groups, int):
        if groups < 0:
            raise ValueError(f"groups is {groups}; expected 0 or more, or lists of parameters")
        return
    if not isinstance(groups, (list, tuple)):
        raise ValueError(f"groups: found {type(groups).__name__}; expected a number, or lists of parameters")
    members = [parameter for group in groups for parameter in group]
    if any(not isinstance(parameter, torch.Tensor) for parameter in members):
        raise ValueError("groups: expected lists of parameters")
    if len({id(parameter) for parameter in members}) < len(members):
        raise ValueError("groups: a parameter can be in one group only")


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.Tensor]] | None = None,
    compression: type[Compressor] = Compression.none,
    backward_passes_per_step: int = 1,
    op: int = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | Sequence[Sequence[torch.Tensor]] | None = None,
    sparse_as_dense: bool = False,
    process_set: ProcessSet = global_process_set,
) -> torch.optim.Optimizer:
    """An optimizer of the same class, whose ``step`` works on gradients reduced over the ranks.

    Gradients are packed into flat buckets of HOROVOD_FUSION_THRESHOLD bytes (25 MiB), which the ranks of a host map
    from each other; each bucket is reduced when its last gradient is there, beside backward. After ``step`` or
    ``synchronize`` the ``grad`` of a parameter lies in its bucket: it is overwritten by the next backward pass even
    after ``zero_grad``, so clone one that is to be kept.

    It shares parameter groups and state with ``optimizer``.

    Args:
        named_parameters: names for messages and to find parameters that differ; ``model.named_parameters()``.
        compression: what gradients travel as.
        backward_passes_per_step: passes whose gradients are summed before they are reduced.
        op: Average, Sum, or Adasum (which combines the ranks' steps instead of their gradients).
        gradient_predivide_factor: of an average, gradients are divided by it before the sum and multiplied after it.
        num_groups: out of date: use ``groups``.
        groups: how many buckets to make, or lists of parameters that are to share a bucket.
        sparse_as_dense: reduce sparse gradients as dense ones.
        process_set: the ranks to reduce over; on others, the optimizer works as if not wrapped.

    Raises:
        ValueError: an argument does not fit.
    """
    if gradient_predivide_factor != 1.0 and op != Average:
        raise ValueError("gradient_predivide_factor goes with op=Average only")
    if num_groups:
        warnings.warn("num_groups is out of date: use groups", DeprecationWarning, stacklevel=2)
        groups = num_groups if groups is None else groups
    if groups is not None:
        _check_groups(groups)
    if backward_passes_per_step <= 0:
        raise ValueError(f"backward_passes_per_step is {backward_passes_per_step}; expected 1 or more")
    names = _names(optimizer, named_parameters)
    world = basics.world()
    adasum = op == Adasum and world.size > 1
    if adasum and process_set is not global_process_set:
        raise NotImplementedError("op=Adasum works on all ranks only")
    wrapped = type(optimizer)
    cls: Any = type(
        wrapped.__name__, (_DistributedAdasum if adasum else _Distributed, wrapped), {"__module__": __name__}
    )
    made: Any = cls.__new__(cls)
    # Not __init__: that would want the optimizer's own arguments, and lose the state it may have. A step that a
    # scheduler has put into the instance belongs to that instance.
    made.__dict__.update({name: value for name, value in optimizer.__dict__.items() if name != "step"})
    if adasum:
        made._compression = compression
        return made
    channel = world.channels.get(process_set.process_set_id or 0) if process_set.included() else None
    if channel is not None and channel.size > 1 and names:
        made._reducer = Reducer(
            names,
            compression,
            backward_passes_per_step,
            op,
            gradient_predivide_factor,
            groups,
            sparse_as_dense,
            process_set,
        )
    return made
