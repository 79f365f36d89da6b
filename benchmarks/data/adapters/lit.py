"""litdata: its StreamingDataset over chunks that its own ``optimize`` made, and its DataLoader."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import litdata
import numpy as np
from datasets import Set, memmap, once

from adapters.base import Base, announce, endless

SMALL_BYTES = 16 << 10


def _sample(data: str, facts: Mapping[str, Any], index: int) -> dict[str, Any]:
    which = Set(**facts)
    row = _rows(data, which)[index]
    values = np.array(row[: which.values_bytes]).view(which.dtype)
    return {"values": values, "label": int(row[which.values_bytes :].view("<i8")[0])}


@functools.cache
def _rows(data: str, which: Set) -> Any:
    return memmap(Path(data), which)


class Adapter(Base):
    """options: ``workers``."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self.version = f"litdata {version('litdata')}"
        self._loader: Any = None

    def prepare(self, which: Set, data: Path) -> None:
        def make(target: Path) -> None:
            litdata.optimize(
                functools.partial(_sample, str(data), which.facts()),
                list(range(which.records)),
                str(target),
                chunk_bytes="64MB",
                num_workers=1,
                verbose=False,
            )

        once(data / which.name / "litdata", which.facts(), make)

    def open(self, which: Set, data: Path, rank: int, world: int) -> None:
        announce(rank, world)
        folder = str(data / which.name / "litdata")
        # By itself it decodes 256 samples for each that is asked for; of large ones that is its worse setting by 12.
        decode = "auto" if which.record_bytes <= SMALL_BYTES else 0
        dataset = litdata.StreamingDataset(folder, shuffle=True, drop_last=True, batch_decode=decode)
        workers = self.options["workers"]
        self._loader = litdata.StreamingDataLoader(
            dataset, batch_size=which.batch, num_workers=workers, drop_last=True, persistent_workers=workers > 0
        )

    def batches(self) -> Iterator[Any]:
        return endless(self._loader)

    def arrays(self, batch: Any) -> tuple[Any, Any]:
        return batch["values"].numpy(), batch["label"].numpy()

    def close(self) -> None:
        self._loader = None
