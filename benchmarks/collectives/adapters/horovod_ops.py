"""Horovod's own allreduce of a torch tensor in place, over MPI, with its default cycle unless the options say else."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import horovod
import horovod.torch as hvd
import numpy as np
import torch

from adapters.base import Base, tensor_of


class Adapter(Base):
    """``hvd.allreduce_async_`` and ``hvd.synchronize``."""

    def __init__(self, support: Any, store: Any, options: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        os.environ |= options.get("environ", {})
        hvd.init()
        self.version = f"Horovod {horovod.__version__}, torch {torch.__version__}"

    def allreduce(self, buffer: np.ndarray, dtype: str) -> Callable[[], Any]:
        """The same name each time, so that its cache of responses serves."""
        tensor = tensor_of(buffer, dtype)
        name = f"{dtype}.{buffer.nbytes}"
        return lambda: hvd.synchronize(hvd.allreduce_async_(tensor, name=name, op=hvd.Sum))

    def close(self) -> None:
        """Ends its thread."""
        hvd.shutdown()
