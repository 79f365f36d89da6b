"""Grain over ArrayRecord files, in threads: its DataLoader with an IndexSampler."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grain
import numpy as np
import torch
from array_record.python.array_record_module import ArrayRecordWriter
from datasets import Set, memmap, once

from adapters.base import Base

FILES = 10


class _Parse(grain.transforms.Map):  # type: ignore[misc]
    def __init__(self, which: Set) -> None:
        self._layout = which.layout

    def map(self, element: bytes) -> dict[str, Any]:
        row = np.frombuffer(element, self._layout)[0]
        return {"values": row["values"], "label": row["label"]}


class Adapter(Base):
    """options: ``threads`` that read."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self.version = f"grain {version('grain')}, array_record {version('array_record')}"
        self._loader: Any = None
        self._state: str | None = None

    def prepare(self, which: Set, data: Path) -> None:
        def make(target: Path) -> None:
            records = memmap(data, which)
            for number, part in enumerate(np.array_split(np.arange(which.records), FILES)):
                writer = ArrayRecordWriter(str(target / f"{number}.array_record"), "group_size:1,uncompressed")
                for at in part:
                    writer.write(records[at].tobytes())
                writer.close()

        once(data / which.name / "array_record", which.facts(), make)

    def open(self, which: Set, data: Path, rank: int, world: int, state: Mapping[str, Any] | None = None) -> None:
        folder = data / which.name / "array_record"
        source = grain.sources.ArrayRecordDataSource([str(path) for path in sorted(folder.iterdir())])
        shards = grain.sharding.ShardOptions(rank, world, drop_remainder=True)
        sampler = grain.samplers.IndexSampler(len(source), shards, shuffle=True, seed=7)
        self._loader = grain.DataLoader(
            data_source=source,
            sampler=sampler,
            operations=[_Parse(which), grain.transforms.Batch(which.batch, drop_remainder=True)],
            worker_count=0,
            read_options=grain.ReadOptions(num_threads=self.options["threads"], prefetch_buffer_size=500),
        )
        self._state = json.dumps(state) if state is not None else None

    def state(self, position: int) -> Any:
        """As saved after ``position`` records: what it gives after the first batch, with the other position."""
        iterator = iter(self._loader)
        next(iterator)
        found = json.loads(iterator.get_state())
        found["last_seen_indices"] = dict.fromkeys(found["last_seen_indices"], position - 1)
        return found

    def batches(self) -> Iterator[Any]:
        iterator = iter(self._loader)
        if self._state is not None:
            iterator.set_state(self._state.encode())
        for batch in iterator:
            yield torch.from_numpy(batch["values"]), torch.from_numpy(batch["label"])

    def close(self) -> None:
        self._loader = None
