"""What the checks share. Importing it joins the ranks.

It says ``import horovod.torch``, so the checks run with the real Horovod as well (``python -m launcher --engine
horovod``); those of what only the launcher's has are left out then.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch

OURS = hvd.__name__.startswith("launcher.")
CHECKS: dict[str, Callable[[], None]] = {}
FLOATS = [torch.float32, torch.float64, torch.float16]
INTEGERS = [torch.int32, torch.int64]
if OURS:
    FLOATS.append(torch.bfloat16)
    INTEGERS += [torch.int8, torch.uint8, torch.int16]

hvd.init()
RANK, SIZE = hvd.rank(), hvd.size()
DIRECTORY = Path(sys.argv[1])


def check(function: Callable[[], None]) -> Callable[[], None]:
    """Decorator of a check; all ranks call it."""
    CHECKS[function.__name__] = function
    return function


def ours(function: Callable[[], None]) -> Callable[[], None]:
    """Decorator of a check that is not for the real Horovod."""
    return check(function) if OURS else function


def equal(found: Any, expected: Any) -> None:
    expected = torch.as_tensor(expected, dtype=found.dtype)
    assert found.shape == expected.shape, f"{found.shape} instead of {expected.shape}"
    assert torch.equal(found, expected), f"{found} instead of {expected}"


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    assert found.shape == expected.shape, f"{found.shape} instead of {expected.shape}"
    assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance), f"{found} instead of {expected}"


def fails(kind: type[BaseException], call: Callable[[], Any], *words: str) -> str:
    try:
        found = call()
    except kind as error:
        missing = [word for word in words if OURS and word not in str(error)]
        assert not missing, f"{missing} not in: {error}"
        return str(error)
    raise AssertionError(f"no {kind.__name__}, but {found}")


def everybody(value: torch.Tensor) -> list[torch.Tensor]:
    """The value of each rank, which must have one shape."""
    return list(hvd.allgather(value.unsqueeze(0)))
