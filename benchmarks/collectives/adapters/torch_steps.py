"""Training steps, and single calls, as an application makes them through torch: DistributedDataParallel or Horovod."""

from __future__ import annotations

import gc
import importlib
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from adapters.base import Base

BATCH, RATE = 4, 1e-6


class Adapter(Base):
    """``options["carrier"]``: none, gloo, launcher (back-ends of torch.distributed), or the module of a Horovod API.

    For DistributedDataParallel ``views`` sets gradient_as_bucket_view, and ``silent`` a hook that sends nothing.
    """

    def __init__(self, support: Any, store: Any, options: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self._support = support
        self._carrier = options["carrier"]
        self._views, self._silent = options.get("views", False), options.get("silent", False)
        self._horovod: Any = None
        self.version = f"torch {torch.__version__}"
        if self._carrier == "launcher":
            importlib.import_module("launcher.collectives.torch_backend")
        if self._carrier in ("gloo", "launcher"):
            where = f"file://{os.path.join(options['scratch'], 'torch')}"
            dist.init_process_group(self._carrier, init_method=where, rank=support.rank, world_size=support.size)
        elif self._carrier != "none":
            self._horovod = importlib.import_module(self._carrier)
            self._horovod.init()
            package = importlib.import_module(self._carrier.partition(".")[0])
            self.version = f"{self._carrier.partition('.')[0]} {package.__version__}, {self.version}"
            if self._horovod.size() != support.size:
                raise RuntimeError(f"{self._carrier} sees {self._horovod.size()} ranks of {support.size}")

    def call(self, order: dict[str, Any]) -> dict[str, float]:
        """``dist.all_reduce`` of a small tensor, back to back."""
        tensor = torch.zeros(order["bytes"] // 4)
        now = time.perf_counter_ns
        times: list[int] = []
        for number in range(order["steps"] + 50):
            if number == 50:
                self._support.barrier()
            begin = now()
            dist.all_reduce(tensor)
            times.append(now() - begin)
        return {"median_us": statistics.median(times[50:]) / 1e3}

    def step(self, order: dict[str, Any]) -> dict[str, float]:
        """Forward, backward, sum of the gradients, SGD; the model is made for it and dropped afterwards."""
        model = _model(order["layers"], order["width"])
        data = torch.full((BATCH, order["width"]), 0.01)
        run = self._stepper(model, data)
        times: list[int] = []
        for number in range(order["warm"] + order["steps"]):
            self._support.barrier()
            begin = time.perf_counter_ns()
            run()
            if number >= order["warm"]:
                times.append(time.perf_counter_ns() - begin)
        del run, model
        gc.collect()
        return {"median_us": statistics.median(times) / 1e3}

    def _stepper(self, model: torch.nn.Module, data: torch.Tensor) -> Callable[[], None]:
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=RATE)
        if self._horovod is not None:
            optimizer = self._horovod.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
            self._horovod.broadcast_parameters(model.state_dict(), root_rank=0)
        elif self._carrier != "none":
            model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=self._views)
            if self._silent:
                model.register_comm_hook(None, _keep)

        def run() -> None:
            optimizer.zero_grad()
            model(data).square().mean().backward()
            optimizer.step()

        return run

    def close(self) -> None:
        """Ends Horovod's thread; the others' groups go with the process."""
        if self._horovod is not None:
            self._horovod.shutdown()


def _keep(_state, bucket):  # type: ignore[no-untyped-def]  # torch takes annotations that are no strings, or none
    """A communication hook that takes the rank's own gradients for the result."""
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def _model(layers: int, width: int) -> torch.nn.Module:
    made = []
    for _ in range(layers):
        layer = torch.nn.utils.skip_init(torch.nn.Linear, width, width)
        torch.nn.init.constant_(layer.weight, 1 / width)
        torch.nn.init.zeros_(layer.bias)
        made += [layer, torch.nn.ReLU()]
    return torch.nn.Sequential(*made)
