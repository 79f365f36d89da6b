"""torch's DataLoader with a DistributedSampler: as its documentation has it, or with batches by fancy indexing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Set, memmap
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from adapters.base import Base, split


class Records(Dataset[Any]):
    """A map-style dataset: one record, copied out of the mapped file, at a time."""

    def __init__(self, data: Path, which: Set) -> None:
        self.rows = memmap(data, which)
        self.set = which

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        row = self.rows[index]
        values = np.array(row[: self.set.values_bytes]).view(self.set.dtype)
        return torch.from_numpy(values), int(row[self.set.values_bytes :].view("<i8")[0])


class Batches(Records):
    """The same, a whole batch with one call of NumPy."""

    def __getitems__(self, indices: list[int]) -> Any:
        return split(self.rows[np.asarray(indices)], self.set)


def _as_it_is(batch: Any) -> Any:
    return batch


class Adapter(Base):
    """options: ``workers``; ``batched``."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self.version = f"torch {torch.__version__}"
        self._loader: Any = None

    def open(self, which: Set, data: Path, rank: int, world: int) -> None:
        batched, workers = self.options.get("batched", False), self.options["workers"]
        dataset = (Batches if batched else Records)(data, which)
        self._sampler = DistributedSampler(dataset, world, rank, shuffle=True, drop_last=True)
        self._loader = DataLoader(
            dataset,
            which.batch,
            sampler=self._sampler,
            num_workers=workers,
            drop_last=True,
            collate_fn=_as_it_is if batched else None,
            persistent_workers=workers > 0,
        )

    def batches(self) -> Iterator[Any]:
        epoch = 0
        while True:
            self._sampler.set_epoch(epoch)
            yield from self._loader
            epoch += 1

    def close(self) -> None:
        self._loader = self._sampler = None
