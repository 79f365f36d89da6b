"""SPDL: a pipeline whose one stage gathers a batch with NumPy in a thread."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Set, memmap
from spdl.pipeline import PipelineBuilder

from adapters.base import Base, split


class Adapter(Base):
    """One thread, four batches ahead."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self.version = f"SPDL {version('spdl-core')}"
        self._pipeline: Any = None

    def open(self, which: Set, data: Path, rank: int, world: int) -> None:
        rows = memmap(data, which)

        def indices() -> Iterator[Any]:
            epoch = 0
            while True:
                order = np.random.default_rng(epoch).permutation(which.records)[rank::world]
                for begin in range(0, len(order) - which.batch + 1, which.batch):
                    yield order[begin : begin + which.batch]
                epoch += 1

        def gather(chosen: Any) -> Any:
            return split(rows[chosen], which)

        builder = PipelineBuilder().add_source(indices()).pipe(gather, concurrency=1).add_sink(4)
        self._pipeline = builder.build(num_threads=1)
        self._pipeline.start()

    def batches(self) -> Iterator[Any]:
        return iter(self._pipeline.get_iterator())

    def close(self) -> None:
        if self._pipeline is not None:
            self._pipeline.stop()
            self._pipeline = None
