"""webdataset: shuffled tar files, a buffer of samples that is shuffled, batches made by itself."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from datasets import Set

from adapters.base import Base, announce, endless, tars

BUFFERED = 1000  # samples that are shuffled, as its documentation has it


def _decode(which: Set, sample: Any) -> tuple[torch.Tensor, int]:
    row = np.frombuffer(bytearray(sample["bin"]), which.layout)[0]
    return torch.from_numpy(row["values"]), int(row["label"])


def _collate(samples: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([values for values, _ in samples]), torch.tensor([label for _, label in samples])


class Adapter(Base):
    """options: ``workers``."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self.version = f"webdataset {version('webdataset')}"
        self._loader: Any = None

    def prepare(self, which: Set, data: Path) -> None:
        tars(which, data)

    def open(self, which: Set, data: Path, rank: int, world: int) -> None:
        announce(rank, world)
        dataset = (
            webdataset.WebDataset(tars(which, data), shardshuffle=100, nodesplitter=webdataset.split_by_node)
            .shuffle(BUFFERED)
            .map(functools.partial(_decode, which))
            .batched(which.batch, collation_fn=_collate, partial=False)
        )
        workers = self.options["workers"]
        self._loader = webdataset.WebLoader(
            dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0
        )

    def batches(self) -> Iterator[Any]:
        return endless(self._loader)

    def close(self) -> None:
        self._loader = None
