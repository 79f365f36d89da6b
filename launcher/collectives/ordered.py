"""Messages whose parts do not lie in the order in which they go."""

from __future__ import annotations

import ctypes
from itertools import pairwise

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType


class Ordered:
    """Parts of a message, those of ``members`` in this order, as one piece of memory: the message's own where they are
    one piece there. ``read``: they are put together; ``write``: they are put back when all went well."""

    def __init__(
        self,
        members: Sequence[int],
        base: int,
        begins: Sequence[int],
        item: int,
        read: bool = False,
        write: bool = False,
    ) -> None:
        self._parts = [(base + begins[one] * item, (begins[one + 1] - begins[one]) * item) for one in members]
        self._read, self._write = read, write
        follow = all(left + 1 == right for left, right in pairwise(members))
        self._room = None if follow else (ctypes.c_char * max(1, sum(nbytes for _, nbytes in self._parts)))()

    def _copy(self, back: bool) -> None:
        from launcher._native import copy_bytes

        assert self._room is not None
        at = ctypes.addressof(self._room)
        for address, nbytes in self._parts:
            copy_bytes(*((address, at) if back else (at, address)), nbytes)
            at += nbytes

    def __enter__(self) -> int:
        if self._room is None:
            return self._parts[0][0]
        if self._read:
            self._copy(back=False)
        return ctypes.addressof(self._room)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._room is not None and self._write and kind is None:
            self._copy(back=True)
