"""What ranks contribute, and what is to come of it, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from launcher.collectives.elements import DType, ReduceOp

NUMPY = {
    DType.float32: np.float32,
    DType.float64: np.float64,
    DType.float16: np.float16,
    DType.int8: np.int8,
    DType.uint8: np.uint8,
    DType.int32: np.int32,
    DType.int64: np.int64,
    DType.bool: np.uint8,
}


def to_bits(values: Any, dtype: DType) -> Any:
    """float64 values as elements; bfloat16 as uint16 (values are chosen so that nothing is rounded)."""
    if dtype == DType.bfloat16:
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if dtype not in NUMPY:
        return values.astype(
            {DType.int16: np.int16, DType.uint16: np.uint16, DType.uint32: np.uint32}.get(dtype, np.uint64)
        )
    return values.astype(NUMPY[dtype])


def to_float(bits: Any, dtype: DType) -> Any:
    if dtype == DType.bfloat16:
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.astype(np.float64)


def values_of(rank: int, count: int, dtype: DType, seed: int = 0, small: bool = False) -> Any:
    """What a rank contributes, as float64 that the type holds exactly."""
    random = np.random.default_rng((rank, count, seed))
    if dtype == DType.bool:
        return random.integers(0, 2, count).astype(np.float64)
    if dtype in (DType.uint8, DType.uint16, DType.uint32, DType.uint64):
        return random.integers(0, 9, count).astype(np.float64)
    if small or dtype not in (DType.float32, DType.float64):
        return random.integers(-8, 9, count).astype(np.float64)
    return random.standard_normal(count).astype(np.float32).astype(np.float64)


def folded(parts: list[Any], dtype: DType, op: ReduceOp, pre: float, post: float) -> Any:
    """The reference."""
    stack = np.stack(parts) * pre
    if dtype == DType.bool:
        fold = {ReduceOp.SUM: stack.max(0), ReduceOp.MAX: stack.max(0), ReduceOp.MIN: stack.min(0)}
        fold[ReduceOp.PRODUCT] = stack.min(0)
        integers = stack.astype(np.int64)
    else:
        fold = {ReduceOp.SUM: stack.sum(0), ReduceOp.MAX: stack.max(0), ReduceOp.MIN: stack.min(0)}
        fold[ReduceOp.AVERAGE] = stack.sum(0) / len(parts)
        fold[ReduceOp.PRODUCT] = stack.prod(0)
        integers = stack.astype(np.int64)
        if dtype >= DType.int8:  # wraps around
            fold[ReduceOp.PRODUCT] = integers.prod(0).astype(to_bits(np.zeros(1), dtype).dtype).astype(np.float64)
        if dtype >= DType.int8 and op == ReduceOp.AVERAGE:
            fold[ReduceOp.AVERAGE] = np.trunc(fold[ReduceOp.AVERAGE])
    if op in (ReduceOp.BIT_AND, ReduceOp.BIT_OR, ReduceOp.BIT_XOR):
        how = {ReduceOp.BIT_AND: np.bitwise_and, ReduceOp.BIT_OR: np.bitwise_or, ReduceOp.BIT_XOR: np.bitwise_xor}
        return how[op].reduce(integers, axis=0).astype(np.float64)
    return fold[op] * post
