"""Tensors in memory that the ranks of a host map from each other, so that they are reduced where they lie."""

from __future__ import annotations

import contextlib
import mmap
import os

import torch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PAGE_BYTES = mmap.PAGESIZE
_HUGE_BYTES = 2 << 20


class SharedMemory:
    """Zeroed memory behind a memfd, for a group's ``register``.

    It stays mapped for as long as a tensor in it lives, whatever becomes of the group.

    Attributes:
        address, nbytes, descriptor: what ``register`` takes.
        unused: nobody will ask for a collective on it any more; the group may forget it.

    Raises:
        OSError: the operating system refused the memory.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = max(-(-nbytes // _PAGE_BYTES) * _PAGE_BYTES, _PAGE_BYTES)
        self.unused = False
        self.descriptor = os.memfd_create("launcher-horovod", os.MFD_CLOEXEC)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, self.descriptor)
            os.ftruncate(self.descriptor, self.nbytes)
            self._map = mmap.mmap(self.descriptor, self.nbytes)
            undo.pop_all()
        if self.nbytes >= _HUGE_BYTES:
            try:
                self._map.madvise(mmap.MADV_HUGEPAGE)
            except OSError:
                pass  # a kernel without huge pages for shared memory; small ones do as well
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self.address = int(self._bytes.data_ptr())

    def tensor(self, dtype: Any, count: int) -> torch.Tensor:
        """The first ``count`` elements."""
        return torch.frombuffer(self._map, dtype=dtype, count=count)

    def __del__(self) -> None:
        descriptor = self.__dict__.get("descriptor", -1)
        if descriptor >= 0:
            os.close(descriptor)
