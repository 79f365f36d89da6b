"""Types of elements and the operations that fold them, numbered as in native/include/launcher/elements.h."""

from __future__ import annotations

from enum import IntEnum


class DType(IntEnum):
    """Type of an element. 16-bit floating point is folded in float32 and rounded once."""

    float32 = 0
    float64 = 1
    float16 = 2
    bfloat16 = 3
    int8 = 4
    uint8 = 5
    int16 = 6
    int32 = 7
    int64 = 8
    bool = 9
    uint16 = 10
    uint32 = 11
    uint64 = 12


class ReduceOp(IntEnum):
    """How the ranks' elements become one.

    AVERAGE divides the sum by the number of ranks (integers: towards zero). MIN and MAX are NaN where any input is.
    Integers wrap around. For bool, SUM and MAX are "or", PRODUCT and MIN are "and". The BIT operations take integers
    and bool only.
    """

    SUM = 0
    AVERAGE = 1
    MIN = 2
    MAX = 3
    PRODUCT = 4
    BIT_AND = 5
    BIT_OR = 6
    BIT_XOR = 7


SIZES = (4, 8, 2, 2, 1, 1, 2, 4, 8, 1, 2, 4, 8)
"""Bytes of an element, by DType."""

FLOATING = frozenset((DType.float32, DType.float64, DType.float16, DType.bfloat16))
"""The types that take a prescale and a postscale."""

OPERATIONS = {
    "sum": ReduceOp.SUM,
    "average": ReduceOp.AVERAGE,
    "min": ReduceOp.MIN,
    "max": ReduceOp.MAX,
    "product": ReduceOp.PRODUCT,
    "bit_and": ReduceOp.BIT_AND,
    "bit_or": ReduceOp.BIT_OR,
    "bit_xor": ReduceOp.BIT_XOR,
}
"""Names of the operations, as the faces for people take them."""
