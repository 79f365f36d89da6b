"""What most adapters share: ordinary memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from rank import private_buffer


class Base:
    """Ordinary memory, and a result that can be checked."""

    version = ""
    checked = True

    def buffer(self, nbytes: int) -> np.ndarray:
        """Memory as torch would give it."""
        return private_buffer(nbytes)

    def release(self, buffer: np.ndarray) -> None:
        """Memory goes with its last user."""

    def allreduce(self, buffer: np.ndarray, dtype: str) -> Callable[[], Any]:
        """The call to time."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing to do for most."""


def tensor_of(buffer: np.ndarray, dtype: str) -> Any:
    """A torch tensor on the same memory."""
    import torch

    return torch.from_numpy(buffer).view(getattr(torch, dtype))
