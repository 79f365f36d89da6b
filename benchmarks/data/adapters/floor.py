"""The limits of the memory: C++ that copies the records in an order and does nothing else."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import RECORDIO, Set, memmap, record_template, recordio_path

from adapters.base import Base, open_fifo

STEP_BYTES = 16 << 20  # a step is as many batches: what Python costs is not the memory's
PIPE_BUFFER = 1 << 20


class Walk(ctypes.Structure):
    """As in floors.cpp."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("stride", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("label", ctypes.c_uint64),
        ("records", ctypes.c_uint64),
        ("batch", ctypes.c_uint64),
        ("order", ctypes.c_void_p),
        ("ring", ctypes.c_void_p),
        ("at", ctypes.c_uint64),
        ("turn", ctypes.c_uint64),
    ]


class Adapter(Base):
    """options: ``library``; ``walk``: gather or copy."""

    checked = False

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self.version = "floors.cpp"
        self._library = ctypes.CDLL(options["library"])
        self._library.drain.restype = ctypes.c_int64
        self._library.ring_batches.restype = self._library.walk_bytes.restype = ctypes.c_uint64
        if self._library.walk_bytes() != ctypes.sizeof(Walk):
            raise AssertionError("floor.py and floors.cpp do not agree about Walk")
        self._kept: list[Any] = []

    def open(self, which: Set, data: Path, rank: int, world: int) -> None:
        if which.name == RECORDIO:
            template, values_at, label_at = record_template()
            rows = np.memmap(recordio_path(data), np.uint8, "r")
            stride, copied, label = len(template), which.values_bytes, label_at - values_at
        else:
            rows = memmap(data, which)
            stride, copied, label, values_at = which.record_bytes, which.record_bytes, 0, 0
        order = np.random.default_rng(0).permutation(which.records)[rank::world].astype(np.uint32)
        base = rows.ctypes.data + values_at
        if self.options["walk"] == "copy":
            base += rank * (which.records // world) * stride
        ring = mmap.mmap(-1, self._library.ring_batches() * which.batch * stride)
        ring_at = ctypes.addressof(ctypes.c_char.from_buffer(ring))
        numbers = (stride, copied, label, which.records // world, which.batch)
        self._walk = Walk(base, *numbers, order.ctypes.data, ring_at, 0, 0)
        self._kept = [rows, order, ring]
        self.batches_a_step = max(1, STEP_BYTES // (which.batch * stride))

    def batches(self) -> Iterator[Any]:
        step, walk, count = getattr(self._library, self.options["walk"]), ctypes.byref(self._walk), self.batches_a_step
        while True:
            for _ in range(count):
                step(walk)
            yield None

    def pipe(self, order: Mapping[str, Any], rank: int) -> dict[str, Any]:
        """Reads a FIFO to its end: seconds and bytes."""
        buffer = mmap.mmap(-1, PIPE_BUFFER)
        with open_fifo(order) as file:
            begin = time.perf_counter()
            count = self._library.drain(
                file.fileno(), ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(buffer))), len(buffer)
            )
            return {"seconds": time.perf_counter() - begin, "bytes": count}

    def close(self) -> None:
        self._kept = []
