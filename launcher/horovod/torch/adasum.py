"""The adaptive sum of gradients: between an average, where they agree, and a sum, where they are orthogonal.

Formula: Maleki et al., "Scaling Distributed Training with Adaptive Summation" (MLSys 2021). Of two gradients a and b,

    adasum(a, b) = (1 - a.b / (2 |a|^2)) a + (1 - a.b / (2 |b|^2)) b

and of 2^k ranks, pairs of neighbours, then pairs of pairs, and so on.
"""

from __future__ import annotations

import torch


def combine(everybody: torch.Tensor) -> torch.Tensor:
    """The adaptive sum of the rows of ``everybody`` (ranks x elements, floating point).

    Dot products are in double precision. Every rank computes all of it from the same rows, so all get the same bits;
    that takes (ranks) times the memory of a message, which is meant for the tensors of a layer, one at a time.

    Raises:
        ValueError: the number of rows is not a power of two.
    """
    count = everybody.shape[0]
    if count & (count - 1):
        raise ValueError(f"Adasum of {count} ranks; it needs a power of two")
    rows = list(everybody.double())
    while len(rows) > 1:
        rows = [_pair(rows[at], rows[at + 1]) for at in range(0, len(rows), 2)]
    return rows[0].to(everybody.dtype)


def _pair(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    dot = torch.dot(first, second)
    return _weight(dot, first) * first + _weight(dot, second) * second


def _weight(dot: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    norm = torch.dot(own, own)
    # The row of a rank without data is all zeros: the other's counts whole.
    return torch.where(norm > 0, 1 - dot / (2 * norm), torch.ones_like(norm))
