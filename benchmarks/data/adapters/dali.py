"""NVIDIA DALI's webdataset reader on the CPU, one thread; its outputs are used where they lie, nothing is copied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import nvidia.dali as dali
from datasets import Set
from nvidia.dali import fn

from adapters.base import Base, split, tars

BUFFERED = 1024  # samples that are shuffled: DALI's default


class Adapter(Base):
    """Reads the tar files that webdataset reads."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self.version = f"DALI {dali.__version__}"
        self._pipeline: Any = None

    def prepare(self, which: Set, data: Path) -> None:
        tars(which, data)

    def open(self, which: Set, data: Path, rank: int, world: int) -> None:
        self.set = which
        pipeline = dali.Pipeline(which.batch, num_threads=1, device_id=None, seed=7 + rank)
        with pipeline:
            pipeline.set_outputs(
                fn.readers.webdataset(
                    paths=tars(which, data),
                    ext=["bin"],
                    random_shuffle=True,
                    initial_fill=BUFFERED,
                    num_shards=world,
                    shard_id=rank,
                    missing_component_behavior="error",
                )
            )
        pipeline.build()
        self._pipeline = pipeline

    def batches(self) -> Iterator[Any]:
        assert self.set is not None
        while True:
            (records,) = self._pipeline.run()
            yield split(np.asarray(records.as_tensor()), self.set)

    def close(self) -> None:
        self._pipeline = None
