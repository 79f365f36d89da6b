"""RecordIO-protobuf through libprotobuf in C++ (libprotobuf.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Set, recordio_path

from adapters.base import Base

RING = 4


class Adapter(Base):
    """options: ``library``; ``version``."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self.version = options["version"]
        self._parse = ctypes.CDLL(options["library"]).parse
        self._parse.restype = ctypes.c_int64

    def open(self, which: Set, data: Path, rank: int, world: int) -> None:
        self.set = which
        self._file = np.memmap(recordio_path(data), np.uint8, "r")

    def batches(self) -> Iterator[Any]:
        which, file = self.set, self._file
        ring = [
            (np.empty((which.batch, which.width), np.float32), np.empty(which.batch, np.float32)) for _ in range(RING)
        ]
        places = [(ctypes.c_void_p(values.ctypes.data), ctypes.c_void_p(labels.ctypes.data)) for values, labels in ring]
        data, size = ctypes.c_void_p(file.ctypes.data), ctypes.c_int64(len(file))
        while True:
            at = 0
            for number in range(which.records // which.batch):
                turn = number % RING
                at = self._parse(data, size, ctypes.c_int64(at), which.batch, which.width, *places[turn])
                if at < 0:
                    raise ValueError("a record that can not be parsed")
                yield ring[turn]

    def arrays(self, batch: Any) -> tuple[Any, Any]:
        return batch[0], batch[1].astype(np.int64)
