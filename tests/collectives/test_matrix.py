"""Operation x type x size x placement x path x ranks, against a float64 reference; the cases: programs/matrix.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

MATRIX = Path(__file__).parent / "programs" / "matrix.py"


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_matrix(ranks: Any, size: int) -> None:
    # Eight ranks on few cores: the ways that differ with the number of ranks only.
    paths = ["automatic", "small", "pipelined", "shared", "pulled"] if size in (2, 3) else ["automatic", "shared"]
    shown = ranks.run(size, MATRIX, *paths, deadline_s=100)
    for rank, one in enumerate(shown):
        assert one["wrong"] == [], f"rank {rank}"
        assert one["cases"] > 1000
    assert len({one["digest"] for one in shown}) == 1  # the same bits on every rank
    if size > 1:
        taken = {path for path, count in shown[0]["calls"].items() if count}
        assert taken >= {"small", "shared"}
    assert ranks.left() == []
