"""What the tests of data share: reading what a source has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from launcher import _data
from launcher.data.fields import Ragged, Sparse, source_fields


@pytest.fixture
def read_all() -> Callable[[_data.Source], dict[str, list[Any]]]:
    """All records of a source, in its order, through the engine: for each field a list of copies."""

    def read(source: _data.Source, batch: int = 5) -> dict[str, list[Any]]:
        epoch = {"shuffle": 0, "seed": 0, "epoch": 0, "records": source.records, "extent": 1, "window": 1, "lanes": 1}
        share = {"base": 0, "world": 1, "rank": 0, "batch": batch, "tail": 2, "agreed_steps": -1}
        fields = source_fields(source.fields)
        makers = {"fixed": None, "ragged": Ragged, "sparse": lambda *parts: Sparse(*parts, ())}
        engine = _data.Engine(source, epoch | share, [*(makers[field.kind] for field in fields), None, None])
        found: dict[str, list[Any]] = {field.name: [] for field in fields}
        for rows in engine:
            for name, values in found.items():
                values += [row.copy() if hasattr(row, "copy") else row for row in rows[name]]
        engine.close()
        return found

    return read
