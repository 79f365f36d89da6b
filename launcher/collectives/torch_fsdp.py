"""FSDP2's communication buffers in memory that all ranks map.

``fully_shard`` gives every group of parameters an object that allocates its buffers and starts its collectives
(torch 2.9 and later). As soon as a process group of ours exists, the default ones allocate from its pool when they
belong to it; nothing else about them changes, and with another process group nothing does.
"""

from __future__ import annotations

import math

from launcher.collectives.torch_hook import when_imported
from launcher.collectives.torch_shared import SMALLEST

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType
    from typing import Any

    from launcher.collectives.torch_shared import Pool

_MODULE = "torch.distributed.fsdp._fully_shard._fsdp_param_group"
_DEFAULTS = ("DefaultAllGather", "DefaultReduceScatter")


def install() -> None:
    """Replaces FSDP2's default communication classes, now or when they are imported."""
    when_imported(_MODULE, _replace)


def optimize_fsdp(module: Any) -> int:
    """Makes a model that was sharded by FSDP2 before its process group was ours, or with other custom communication,
    allocate from the process group's pool; returns the number of sharded modules in it.

    A model that is sharded after ``init_process_group(backend="launcher")`` does so by itself.

    Raises:
        RuntimeError: this torch's FSDP2 takes no custom communication.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group

    if not hasattr(FSDPModule, "set_custom_all_gather") or not hasattr(_fsdp_param_group, _DEFAULTS[0]):
        raise RuntimeError(
            "FSDP2 takes custom communication from torch 2.9 on; this torch has no set_custom_all_gather"
        )
    _replace(_fsdp_param_group)
    sharded = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in sharded:
        part.set_custom_all_gather(_fsdp_param_group.DefaultAllGather())
        part.set_custom_reduce_scatter(_fsdp_param_group.DefaultReduceScatter())
    return len(sharded)


def _replace(module: ModuleType) -> None:
    for name, own in zip(_DEFAULTS, (_SharedAllGather, _SharedReduceScatter), strict=True):
        default = getattr(module, name, None)
        if default is not None and not issubclass(default, _Shared):
            setattr(module, name, type(name, (own, default), {}))


class _Shared:
    """Allocates from the pool of the process group it was last called with."""

    _pool: Pool | None = None
    _size = 0

    def __call__(self, output_tensor: Any, input_tensor: Any, group: Any, *rest: Any, **options: Any) -> Any:
        pool = getattr(group, "pool", None)
        if pool is not self._pool:
            self._pool, self._size = pool, group.size()
        return super().__call__(output_tensor, input_tensor, group, *rest, **options)  # type: ignore[misc]

    def _take(self, size: Sequence[int], dtype: Any, device: Any) -> Any:
        pool = self._pool
        numel = math.prod(size)
        if pool is None or pool.closed or device.type != "cpu" or numel * dtype.itemsize < SMALLEST:
            return None
        # The storage begins with the tensor: FSDP2 addresses parts of it by their offset in the storage.
        return pool.tensor(numel, dtype).view(*size)


class _SharedAllGather(_Shared):
    def allocate(self, size: Sequence[int], *, dtype: Any, device: Any) -> Any:
        """The output, of which this rank's input is a part."""
        taken = self._take(size, dtype, device)
        return super().allocate(size, dtype=dtype, device=device) if taken is None else taken  # type: ignore[misc]


class _SharedReduceScatter(_Shared):
    _input = 0

    def allocate(self, size: Sequence[int], *, dtype: Any, device: Any) -> Any:
        """The input, then the output. That one, whose parts become the gradients, is no other rank's business."""
        numel = math.prod(size)
        taken = None
        if self._input and numel * self._size == self._input:
            self._input = 0
        else:
            self._input = numel
            taken = self._take(size, dtype, device)
        return super().allocate(size, dtype=dtype, device=device) if taken is None else taken  # type: ignore[misc]
