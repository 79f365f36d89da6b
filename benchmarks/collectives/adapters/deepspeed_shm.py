"""DeepSpeed's shared-memory operation (csrc/cpu/comm/shm.cpp), built by install_peers.py with DeepSpeed's own flags."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapters.base import Base, tensor_of


class Adapter(Base):
    """``inference_all_reduce_``, as DeepSpeed's inference engine and its CPU back-end call it."""

    def __init__(self, support: Any, store: Any, options: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        os.environ |= {"LOCAL_SIZE": str(support.size), "MASTER_ADDR": options["meeting"], "MASTER_PORT": "0"}
        spec = importlib.util.spec_from_file_location("deepspeed_shm_comm", options["extension"])
        assert spec is not None and spec.loader is not None
        extension = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(extension)
        extension.initialize(support.size, support.rank)
        support.barrier()
        # It never removes its segments. All ranks have them mapped by now.
        with contextlib.suppress(FileNotFoundError):
            name = f"deepspeed_allreduce_buffer_{os.getuid()}_{options['meeting']}_0_{support.rank}"
            Path("/dev/shm", name).unlink()
        self.version = f"DeepSpeed {options['version']}, torch {torch.__version__}"

    def allreduce(self, buffer: np.ndarray, dtype: str) -> Callable[[], Any]:
        """The operation as it is dispatched by torch."""
        return functools.partial(torch.ops.deepspeed.inference_all_reduce_.default, tensor_of(buffer, dtype))
