"""What ``models/*.py`` do, for servers that have no model_fn and predict_fn: a list of numbers in, a list out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

Task = Callable[[Any], list[Any]]


def matrix(model_dir: str) -> Task:
    """``models/matrix.py``."""
    import numpy as np

    model = np.load(os.path.join(model_dir, "W.npy"))
    return lambda values: (np.array(values) @ model).tolist()


def trivial(model_dir: str) -> Task:
    """``models/trivial.py``."""
    return lambda values: [len(values)]


def slow(model_dir: str) -> Task:
    """``models/slow.py``."""
    time.sleep(2)
    with open(os.environ["SERVING_LOADED"], "a") as file:
        file.write(f"{time.monotonic_ns()}\n")
    return lambda values: [len(values)]


def pid(model_dir: str) -> Task:
    """``models/pid.py``."""
    return lambda values: [os.getpid()]


TASKS = {"matrix": matrix, "trivial": trivial, "slow": slow, "pid": pid}


def load(model_dir: str) -> Task:
    """The task that the benchmark asked for."""
    return TASKS[os.environ["SERVING_TASK"]](model_dir)
