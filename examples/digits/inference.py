"""Serve the network that ``train.py`` left.

    python -m launcher serve --base-dir JOB
    curl localhost:8080/invocations -H 'Content-Type: application/json' -d '[[0, 0, 5, 13, ...]]'

The input is one image of 8 x 8 or 64 numbers from 0 to 16, or several; JSON, CSV and NPY are read by default. The
answer has a digit and its probability for each image. The launcher loads ``model.pt`` into the network made here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from network import DigitNet

from launcher import InvocationError

PIXELS = 64


def create_model(model_dir: str) -> DigitNet:
    """Make the network that the weights of ``model.pt`` are loaded into."""
    return DigitNet()


def predict_fn(images: Any, model: DigitNet) -> dict[str, list[Any]]:
    """Return the digit of each image, and how sure the network is of it (0..1)."""
    values = np.asarray(images)
    if values.dtype.kind not in "iuf" or values.size == 0 or values.size % PIXELS:
        raise InvocationError(400, f"an array of {values.dtype} and shape {values.shape} is no images of 8 x 8 numbers")
    pixels = torch.as_tensor(values, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    with torch.inference_mode():
        probabilities = model(pixels.to(next(model.parameters()).device)).softmax(dim=1).cpu()
    sure, digits = probabilities.max(dim=1)
    return {"digit": digits.tolist(), "probability": sure.tolist()}
