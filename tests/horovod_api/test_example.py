"""examples/horovod_digits, which says ``import horovod.torch``, without Horovod."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "horovod_digits" / "train.py"
lacking = [name for name in ("torch", "sklearn") if importlib.util.find_spec(name) is None]


@pytest.mark.torch
@pytest.mark.skipif(bool(lacking), reason=f"not installed: {', '.join(lacking)}")
def test_digits(job: Any) -> None:
    assert "launcher" not in EXAMPLE.read_text().split('"""')[2], "it is to know nothing of the launcher"
    assert job.run("--horovod-compat=force", "-n", "2", EXAMPLE, "--epochs", "4", deadline_s=100) == 0, job.output()
    accuracy = [float(found) for found in re.findall(r"test accuracy (\S+)", job.stdout)]
    assert len(accuracy) == 4
    assert accuracy[-1] > 0.9
    assert "trained by 2 ranks" in job.stdout
    assert (job.directory / "horovod_digits.pt").exists()
