"""What goes between hosts in 16 bits: float32 sums, rounded on the way, with what was rounded off kept for next time.

Each rank rounds its host's partial sum v = x + e to w (bfloat16 or float16, to nearest even), sends w, and keeps
e = v - w. What one step loses the next ones bring, so that over many steps the sum of what arrived differs from the
true sum by no more than one rounding of one step (error feedback, as in 1-bit SGD: Seide et al., Interspeech 2014).
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict

from launcher.collectives.elements import DType, ReduceOp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

WIRES = {"none": None, "bf16": DType.bfloat16, "fp16": DType.float16}
# Tensors whose errors are kept: more than any model has buckets. The one that was longest not reduced makes room.
_TENSORS = 1024
# A piece that is rounded or folded at a time: its float32 copies stay in the cache.
PIECE = 32_768


def wire_of(name: str) -> DType | None:
    """The type on the wire; None for "none".

    Raises:
        ValueError: there is no such name.
    """
    if name not in WIRES:
        raise ValueError(f"wire is {name!r}; expected {', '.join(WIRES)}")
    return WIRES[name]


def applies(wire: DType | None, dtype: int, op: int) -> bool:
    """Whether messages of this type and operation are rounded: sums and averages of float32 only."""
    return wire is not None and dtype == DType.float32 and op in (ReduceOp.SUM, ReduceOp.AVERAGE)


class ErrorFeedback:
    """What was rounded off, by tensor. A tensor is known by its address and number of elements."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

    def errors(self, tensor: tuple[Any, ...], count: int) -> int:
        """Address of ``count`` float32, zero at first. ``tensor``: what tells it from others."""
        key = (*tensor, count)
        kept = self._kept.get(key)
        if kept is None:
            kept = self._kept[key] = (ctypes.c_float * max(1, count))()
            while len(self._kept) > _TENSORS:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(key)
        return ctypes.addressof(kept)
