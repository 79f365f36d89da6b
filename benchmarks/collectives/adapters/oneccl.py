"""oneCCL's CPU build, through a small C++ shim (oneccl_shim.cpp): it has no C interface of its own."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from adapters.base import Base


class Adapter(Base):
    """``ccl::allreduce`` and its wait."""

    def __init__(self, support: Any, store: Any, options: dict[str, Any]) -> None:
        self._shim = ctypes.CDLL(options["shim"])
        size = self._shim.shim_address_bytes()
        address = ctypes.create_string_buffer(size)
        if support.rank == 0:
            self._done(self._shim.shim_make_address(address))
            store.set("oneccl", address.raw)
        self._done(self._shim.shim_join(support.size, support.rank, store.get("oneccl")))
        text = ctypes.create_string_buffer(64)
        self._shim.shim_version(text, 64)
        self.version = f"oneCCL {text.value.decode()}"

    @staticmethod
    def _done(code: int) -> None:
        if code:
            raise RuntimeError("oneCCL threw an exception (it is on stderr)")

    def allreduce(self, buffer: np.ndarray, dtype: str) -> Callable[[], Any]:
        """One call into the shim."""
        count = buffer.nbytes // (4 if dtype == "float32" else 2)
        call, address = self._shim.shim_allreduce, ctypes.c_void_p(buffer.ctypes.data)
        size, half = ctypes.c_size_t(count), ctypes.c_int(dtype != "float32")
        return lambda: call(address, size, half)
