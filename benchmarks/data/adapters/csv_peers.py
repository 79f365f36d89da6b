"""A CSV file of numbers to one float32 matrix, with one thread, by pandas, pyarrow and NumPy."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import CSV_COLUMNS

from adapters.base import Base


def _pandas(path: str) -> Any:
    import pandas

    return pandas.read_csv(path, header=None, dtype=np.float32, engine="c").to_numpy()


def _pyarrow(path: str) -> Any:
    import pyarrow
    from pyarrow import csv

    names = [f"c{number}" for number in range(CSV_COLUMNS)]
    table = csv.read_csv(
        path,
        read_options=csv.ReadOptions(column_names=names, use_threads=False),
        convert_options=csv.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.float32())),
    )
    return np.column_stack([table.column(name).to_numpy() for name in names])


def _loadtxt(path: str) -> Any:
    return np.loadtxt(path, np.float32, delimiter=",")


_READERS = {"pandas": _pandas, "pyarrow": _pyarrow, "numpy": _loadtxt}


class Adapter(Base):
    """options: ``reader``: pandas, pyarrow or numpy."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        package = importlib.import_module(options["reader"])
        self.version = f"{options['reader']} {package.__version__}"

    def csv(self, order: Mapping[str, Any], rank: int) -> dict[str, Any]:
        """Reads the whole file: seconds, and some rows for the check."""
        begin = time.perf_counter()
        table = _READERS[self.options["reader"]](order["path"])
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "rows": table[order["rows"]].tolist(), "shape": list(table.shape)}
