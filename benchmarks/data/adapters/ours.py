"""This project's loader, as a user writes it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import CSV_COLUMNS, RECORDIO, Set, npy_path, recordio_path

import launcher
from adapters.base import Base, endless
from launcher.data import Loader
from launcher.data.catalogue import list_entries
from launcher.data.channel import find_place


class Adapter(Base):
    """options: ``threads`` (by itself where not given)."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self.version = f"launcher {launcher.__version__}, torch {torch.__version__}"
        self._given = {"threads": options["threads"]} if "threads" in options else {}
        self._loader: Any = None

    def open(self, which: Set, data: Path, rank: int, world: int, state: Mapping[str, Any] | None = None) -> None:
        self.set = which
        framed = which.name == RECORDIO
        folder = (recordio_path(data) if framed else npy_path(data, which)).parent
        # Of RecordIO the index is made anew each time; an .npy file needs none.
        given = self._given | ({"shuffle": "none", "index": "off"} if framed else {})
        self._loader = Loader(folder, which.batch, rank=rank, world_size=world, output="torch", **given)
        self._label = "label_values" if framed else "label"
        if state is not None:
            self._loader.load_state_dict(dict(state))

    def batches(self) -> Iterator[Any]:
        return endless(self._loader)

    def arrays(self, batch: Any) -> tuple[Any, Any]:
        return batch["values"].numpy(), batch[self._label].numpy().reshape(-1).astype(np.int64)

    def state(self, position: int) -> Any:
        """As saved after ``position`` records."""
        taken, iterator = 0, iter(self._loader)
        while taken < position:
            taken += len(next(iterator)[self._label])
        return self._loader.state_dict()

    def ring_bytes(self) -> int:
        """Memory of the batches themselves, those that are filled ahead included."""
        assert self.set is not None
        found: int = self._loader.statistics()["slots"] * self.set.batch * self.set.record_bytes
        return found

    def csv(self, order: Mapping[str, Any], rank: int) -> dict[str, Any]:
        """Reads the whole file, index included: seconds, and some rows for the check."""
        begin = time.perf_counter()
        table = np.empty((order["count"], CSV_COLUMNS), np.float32)
        at = 0
        with Loader(order["path"], order["batch"], shuffle="none", tail="short", index="off") as loader:
            for batch in loader:
                values = batch["values"]
                table[at : at + len(values)] = values
                at += len(values)
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "rows": table[order["rows"]].tolist(), "shape": list(table.shape)}

    def pipe(self, order: Mapping[str, Any], rank: int) -> dict[str, Any]:
        """Reads a channel in Pipe mode to its end: seconds from the making of the loader on, and bytes of frames."""
        os.environ["SAGEMAKER_BASE_DIR"] = order["base"]
        given = {"shuffle": self.options.get("shuffle", "none"), "tail": "short"}
        begin = time.perf_counter()
        records = 0
        with Loader(order["channel"], order["batch"], output="torch", **given) as loader:
            for batch in loader:
                records += len(batch["values"])
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "bytes": records * order["record_bytes"]}

    def listing(self, order: Mapping[str, Any], rank: int) -> dict[str, Any]:
        """Lists with sizes, sorted: seconds, and how many files."""
        begin = time.perf_counter()
        files = list_entries(find_place(order["root"]))
        return {"seconds": time.perf_counter() - begin, "files": len(files)}

    def close(self) -> None:
        if self._loader is not None:
            self._loader.close()
            self._loader = None
