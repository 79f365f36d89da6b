"""This project: any memory (``registered`` false), or memory that the group gave (true)."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
from collections.abc import Callable
from typing import Any

import numpy as np

from adapters.base import Base
from launcher.collectives.elements import SIZES, DType
from launcher.collectives.group import join


class Adapter(Base):
    """A group of this project on one host or several, called as its own faces call it."""

    def __init__(self, support: Any, store: Any, options: dict[str, Any]) -> None:
        if options.get("mpi"):
            from mpi4py import MPI

            MPI.COMM_WORLD.Barrier()  # where an engine is there, it is up before it is used
        self._group = join("bench", support.rank, support.size, store=store, **options.get("join", {}))
        if options.get("path"):
            self._group.set_path(options["path"])
        self._registered = options.get("registered", False)
        self._support = support
        self.version = f"launcher {importlib.metadata.version('launcher')}"

    def buffer(self, nbytes: int) -> np.ndarray:
        """Memory of the group, or anybody's."""
        if not self._registered:
            return super().buffer(nbytes)
        address = self._group.allocate(nbytes)
        self._support.barrier()
        return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=np.uint8)

    def release(self, buffer: np.ndarray) -> None:
        """Gives the group its memory back."""
        if self._registered:
            self._support.barrier()
            self._group.release(buffer.ctypes.data)

    def allreduce(self, buffer: np.ndarray, dtype: str) -> Callable[[], Any]:
        """The native call."""
        kind, address = DType[dtype], buffer.ctypes.data
        return functools.partial(self._group.allreduce, address, address, buffer.nbytes // SIZES[kind], int(kind))

    def statistics(self, order: dict[str, Any]) -> dict[str, Any]:
        """What the group has counted and measured."""
        return self._group.statistics()

    def close(self) -> None:
        """Leaves when all are done."""
        self._support.barrier()
        self._group.close()
