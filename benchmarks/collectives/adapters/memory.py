"""The memory's limit: both buffers are mapped by all ranks, and each rank adds its part of them. Nobody waits.

What an allreduce of two ranks in place cannot do without: each byte of both is read and written once. For more ranks it
is what a pair of them needs.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from adapters.base import Base

_HUGE = 2 << 20


class Adapter(Base):
    """a, b <- a + b, each rank its share; huge pages where the system has them."""

    checked = False

    def __init__(self, support: Any, store: Any, options: dict[str, Any]) -> None:
        self._support, self._store = support, store
        self._made = 0
        self._other: np.ndarray | None = None
        self.version = "support.c, " + _isa()

    def buffer(self, nbytes: int) -> np.ndarray:
        """This rank's buffer; rank 0 and rank 1 have one each."""
        self._made += 1
        length = -(-nbytes // _HUGE) * _HUGE
        rank = self._support.rank % 2
        if self._support.rank < 2:
            fd = os.memfd_create("limit")
            os.ftruncate(fd, length)
            self._store.set(f"limit.{self._made}.{rank}", f"/proc/{os.getpid()}/fd/{fd}".encode())
        else:
            fd = -1
        both = [self._map(number, length, nbytes) for number in range(2)]
        self._support.barrier()
        if fd >= 0:
            os.close(fd)
        own, self._other = both[rank], both[1 - rank]
        return own

    def _map(self, number: int, length: int, nbytes: int) -> np.ndarray:
        fd = os.open(self._store.get(f"limit.{self._made}.{number}").decode(), os.O_RDWR)
        memory = mmap.mmap(fd, length)
        os.close(fd)
        memory.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(memory, dtype=np.uint8, count=nbytes)

    def allreduce(self, buffer: np.ndarray, dtype: str) -> Callable[[], Any]:
        """This rank's part of the sum. Two bytes of any type count as two bytes: nothing is slower than the memory."""
        assert self._other is not None
        share = -(-buffer.nbytes // 64 // self._support.size) * 64
        begin = min(share * self._support.rank, buffer.nbytes)
        count = max(min(share, buffer.nbytes - begin), 0) // 4
        first, second = (memory.ctypes.data + begin for memory in (buffer, self._other))
        return self._support.add_both_call(first, second, count)


def _isa() -> str:
    with open("/proc/cpuinfo") as lines:
        flags = next((line for line in lines if line.startswith("flags")), "").split()
    return next((name for name in ("avx512f", "avx2") if name in flags), "baseline")
