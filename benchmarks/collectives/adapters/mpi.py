"""Any MPI, through mpi4py, whose one wheel fits all; MPI4PY_LIBMPI names the library."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

from adapters.base import Base


class Adapter(Base):
    """MPI_Allreduce in place, with its default algorithms."""

    def __init__(self, support: Any, store: Any, options: dict[str, Any]) -> None:
        self._world = MPI.COMM_WORLD
        if (self._world.rank, self._world.size) != (support.rank, support.size):
            raise RuntimeError(f"rank {self._world.rank} of {self._world.size}, not {support.rank} of {support.size}")
        self.version = " ".join(MPI.Get_library_version().partition("\n")[0].partition(",")[0].rstrip("\0").split())

    def allreduce(self, buffer: np.ndarray, dtype: str) -> Callable[[], Any]:
        """The call with its message described beforehand."""
        if dtype != "float32":
            raise ValueError(f"MPI's standard types have no {dtype}")
        message = [buffer, buffer.nbytes // 4, MPI.FLOAT]
        return functools.partial(self._world.Allreduce, MPI.IN_PLACE, message, MPI.SUM)

    def close(self) -> None:
        """As MPI wants it."""
        MPI.Finalize()
