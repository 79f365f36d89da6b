"""Gloo, through torch's process group: the object's own method, which skips the checks of ``dist.all_reduce``."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from adapters.base import Base, tensor_of


class Adapter(Base):
    """A group of torch over a file that the ranks share."""

    def __init__(self, support: Any, store: Any, options: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        meeting = dist.FileStore(os.path.join(options["scratch"], "gloo"), support.size)
        self._group = dist.ProcessGroupGloo(meeting, support.rank, support.size, datetime.timedelta(seconds=60))
        self._options = dist.AllreduceOptions()
        self.version = f"torch {torch.__version__}"

    def allreduce(self, buffer: np.ndarray, dtype: str) -> Callable[[], Any]:
        """A sum that has been waited for."""
        tensors, group, options = [tensor_of(buffer, dtype)], self._group, self._options
        return lambda: group.allreduce(tensors, options).wait()
