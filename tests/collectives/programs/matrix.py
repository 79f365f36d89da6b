"""One rank of the correctness matrix: operation x type x size x placement x path, against a float64 reference.

Every rank can compute every rank's input, so each checks its own result; a digest of all results is shown, which must
be the same on all ranks where the operation gives all of them the same. The first argument names the paths.
"""

import ctypes
import functools
import hashlib
import json
import os
import sys
from collections.abc import Iterator

import numpy as np

from launcher.collectives.elements import FLOATING, SIZES, DType, ReduceOp
from launcher.collectives.group import join

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
NUMPY = {dtype: np.dtype("uint16" if dtype is DType.bfloat16 else dtype.name) for dtype in DType}
COUNTS = (0, 1, 2, 3, 17, 1023, 4099)
LARGE = (70_001, 600_011)  # of float32 and bfloat16, in automatic: past the first block, and several chunks
ROOM = 4 * 700_000 + 256
GUARD = 0xA5
# Half a unit in the last place of each type, and the smallest number it tells from 0.
ROUNDING = {DType.float32: 2.0**-24, DType.float64: 2.0**-53, DType.float16: 2.0**-11, DType.bfloat16: 2.0**-8}
TINY = {DType.float32: 2.0**-149, DType.float64: 0.0, DType.float16: 2.0**-24, DType.bfloat16: 2.0**-133}

group = join("matrix", RANK, SIZE)
digest = hashlib.sha256()
cases = 0
wrong: list[str] = []


# ---- values


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def values_of(array: np.ndarray, dtype: DType) -> np.ndarray:
    """As float64 (integers as they are)."""
    if dtype is DType.bfloat16:
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64) if dtype in FLOATING else array


@functools.cache
def pool(dtype: DType, rank: int, kind: str) -> np.ndarray:
    """Numbers of ``rank`` to take inputs from: making new ones for each case would take most of the time."""
    count = 16 + max(LARGE if dtype in (DType.float32, DType.bfloat16) else COUNTS)
    random = np.random.default_rng([dtype, rank])
    if dtype in FLOATING:
        values = random.uniform(0.5, 1.5, count) if kind == "near 1" else random.normal(0, 4, count)
        return to_bfloat16(values) if dtype is DType.bfloat16 else values.astype(NUMPY[dtype])
    if dtype is DType.bool:
        return random.integers(0, 2, count).astype(np.bool_)
    info = np.iinfo(NUMPY[dtype])
    low, high = (info.min // 16, info.max // 16) if kind == "small" else (info.min, info.max)
    return random.integers(low, high, count, dtype=NUMPY[dtype], endpoint=True)


def made(dtype: DType, count: int, seed: int, rank: int, op: ReduceOp | None = None) -> np.ndarray:
    """The input of ``rank``. Products stay finite, and sums that are divided do not wrap around."""
    kind = {ReduceOp.PRODUCT: "near 1", ReduceOp.AVERAGE: "small"}.get(op, "")
    return pool(dtype, rank, kind)[seed : seed + count]


def folded(parts: np.ndarray, dtype: DType, op: ReduceOp) -> np.ndarray:
    """The reference over the first axis; floating point in float64, the rest in its own type."""
    if dtype is DType.bool:
        union, cut = (ReduceOp.SUM, ReduceOp.MAX, ReduceOp.BIT_OR), (ReduceOp.PRODUCT, ReduceOp.MIN, ReduceOp.BIT_AND)
        if op in union:
            return parts.any(axis=0)
        return parts.all(axis=0) if op in cut else np.logical_xor.reduce(parts, axis=0)
    if op is ReduceOp.AVERAGE:
        total = np.add.reduce(parts, axis=0, dtype=parts.dtype)
        if dtype in FLOATING:
            return total / SIZE
        quotient = np.abs(total.astype(object)) // SIZE  # towards zero
        return np.where(total < 0, -quotient, quotient).astype(parts.dtype)
    ufunc = {
        ReduceOp.SUM: np.add,
        ReduceOp.MIN: np.minimum,
        ReduceOp.MAX: np.maximum,
        ReduceOp.PRODUCT: np.multiply,
        ReduceOp.BIT_AND: np.bitwise_and,
        ReduceOp.BIT_OR: np.bitwise_or,
        ReduceOp.BIT_XOR: np.bitwise_xor,
    }[op]
    return ufunc.reduce(parts, axis=0, dtype=parts.dtype)


def near(found: np.ndarray, expected: np.ndarray, parts: np.ndarray, dtype: DType, op: ReduceOp) -> bool:
    """Whether the error is within one rounding of the type and those of the accumulation (float32 for 16 bits)."""
    found = values_of(found, dtype)
    if dtype not in FLOATING or op in (ReduceOp.MIN, ReduceOp.MAX):
        return np.array_equal(found, expected)
    magnitude = np.abs(expected) if op is ReduceOp.PRODUCT else np.abs(parts).sum(axis=0)
    accumulator = ROUNDING[DType.float64 if dtype is DType.float64 else DType.float32]
    bound = 1.01 * ROUNDING[dtype] * np.abs(expected) + (SIZE + 3) * accumulator * magnitude + TINY[dtype]
    return bool(np.all(np.abs(found - expected) <= bound))


# ---- memory


class Block:
    """Memory for one argument. ``shift``: bytes by which it is not aligned."""

    def __init__(self, shared: bool) -> None:
        if shared:
            self.memory = np.frombuffer((ctypes.c_ubyte * ROOM).from_address(group.allocate(ROOM)), np.uint8)
        else:
            self.memory = np.zeros(ROOM, np.uint8)
        self.address = self.memory.ctypes.data

    def put(self, array: np.ndarray, shift: int) -> int:
        data = array.view(np.uint8)
        self.memory[: shift + 64 + data.size + 64] = GUARD
        self.memory[shift + 64 : shift + 64 + data.size] = data
        return self.address + shift + 64

    def get(self, count: int, dtype: DType, shift: int) -> np.ndarray:
        nbytes = count * SIZES[dtype]
        around = self.memory[: shift + 64], self.memory[shift + 64 + nbytes : shift + 128 + nbytes]
        if any(np.any(part != GUARD) for part in around):
            wrong.append(f"case {cases}: written beside the target")
        return self.memory[shift + 64 : shift + 64 + nbytes].copy().view(NUMPY[dtype])


def check(ok: bool, what: str) -> None:
    global cases
    cases += 1
    if not ok and len(wrong) < 20:
        wrong.append(what)


def shares(count: int) -> list[int]:
    """Uneven parts of ``count``, the first one empty where there are several."""
    if SIZE == 1:
        return [count]
    cuts = sorted(np.random.default_rng(count).integers(0, count + 1, SIZE - 2).tolist())
    return [0, *np.diff([0, *cuts, count]).tolist()]


# ---- the cases


def operations(dtype: DType) -> Iterator[ReduceOp]:
    for op in ReduceOp:
        undefined = op >= ReduceOp.BIT_AND if dtype in FLOATING else op is ReduceOp.AVERAGE and dtype is DType.bool
        if undefined:
            try:
                group.allreduce(0, 0, 0, dtype, op)
                check(False, f"{op.name} of {dtype.name} was not refused")
            except ValueError:
                check(True, "")
        else:
            yield op


@functools.lru_cache(2)
def reference(dtype: DType, count: int, op: ReduceOp) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[float, float]]:
    """This rank's input, all ranks' values as they are folded, the result, and this rank's scale."""
    inputs = [made(dtype, count, 1, rank, op) for rank in range(SIZE)]
    parts = np.stack([values_of(one, dtype) for one in inputs])
    scale = (1.0, 1.0)
    if dtype in FLOATING and op is ReduceOp.SUM and count % 2:
        scale = (0.5 * (RANK + 1), 3.0)  # each rank its own
        parts = parts * 1.5 * np.arange(1, SIZE + 1)[:, None]
    return inputs[RANK], parts, folded(parts, dtype, op), scale


def reductions(source: Block, target: Block, dtype: DType, count: int, op: ReduceOp, shift: int, how: str) -> None:
    what = f"{op.name} of {count} {dtype.name}, {how}, shift {shift}"
    mine, parts, expected, scale = reference(dtype, count, op)

    for name in ("new", "in place"):
        put = source.put(mine, shift)
        out = put if name == "in place" else target.put(np.zeros(count, NUMPY[dtype]), shift)
        group.allreduce(put, out, count, dtype, op, *scale)
        found = (source if name == "in place" else target).get(count, dtype, shift)
        check(near(found, expected, parts, dtype, op), f"allreduce {name}: {what}")
        digest.update(found.tobytes())

    root = count % SIZE
    put = source.put(mine, shift)
    out = target.put(np.zeros(count, NUMPY[dtype]), shift)
    group.reduce(put, out, count, dtype, root, op, *scale)
    found = target.get(count, dtype, shift)
    if root == RANK:
        check(near(found, expected, parts, dtype, op), f"reduce: {what}")
    else:
        check(not np.any(found.view(np.uint8)), f"reduce wrote on another rank than its root: {what}")

    counts = shares(count)
    first = sum(counts[:RANK])
    part = slice(first, first + counts[RANK])
    put = source.put(mine, shift)
    out = target.put(np.zeros(counts[RANK], NUMPY[dtype]), shift)
    group.reduce_scatter(put, out, counts, dtype, op, *scale)
    found = target.get(counts[RANK], dtype, shift)
    check(near(found, expected[part], parts[:, part], dtype, op), f"reduce_scatter: {what}")
    untouched = source.get(count, dtype, shift)
    check(untouched.tobytes() == mine.tobytes(), f"reduce_scatter wrote to its source: {what}")
    group.reduce_scatter(put, put + first * SIZES[dtype], counts, dtype, op, *scale)
    found = source.get(count, dtype, shift)
    check(near(found[part], expected[part], parts[:, part], dtype, op), f"reduce_scatter in place: {what}")


def coalesced(source: Block, dtype: DType, count: int, shift: int, how: str) -> None:
    pieces = [count // 3, 0, count - count // 3]
    inputs = [made(dtype, count, 2, rank) for rank in range(SIZE)]
    parts = np.stack([values_of(one, dtype) for one in inputs])
    put = source.put(inputs[RANK], shift)
    pointers = [put + sum(pieces[:index]) * SIZES[dtype] for index in range(3)]
    group.allreduce_coalesced(pointers, pointers, pieces, dtype)
    found = source.get(count, dtype, shift)
    what = f"allreduce_coalesced of {count} {dtype.name}, {how}, shift {shift}"
    check(near(found, folded(parts, dtype, ReduceOp.SUM), parts, dtype, ReduceOp.SUM), what)
    digest.update(found.tobytes())


def movements(source: Block, target: Block, dtype: DType, count: int, shift: int, how: str) -> None:
    what = f"{count} {dtype.name}, {how}, shift {shift}"
    inputs = [made(dtype, count, 3, rank) for rank in range(SIZE)]
    root = (count + 1) % SIZE
    out = target.put(inputs[RANK], shift)
    group.broadcast(out, count, dtype, root)
    found = target.get(count, dtype, shift)
    check(found.tobytes() == inputs[root].tobytes(), f"broadcast: {what}")
    digest.update(found.tobytes())

    counts = shares(count)
    expected = np.concatenate([inputs[rank][: counts[rank]] for rank in range(SIZE)]).tobytes()
    put = source.put(inputs[RANK][: counts[RANK]], shift)
    out = target.put(np.zeros(count, NUMPY[dtype]), shift)
    group.all_gather(put, out, counts, dtype)
    found = target.get(count, dtype, shift)
    check(found.tobytes() == expected, f"all_gather: {what}")
    own = np.zeros(count, NUMPY[dtype])
    first = sum(counts[:RANK])
    own[first : first + counts[RANK]] = inputs[RANK][: counts[RANK]]
    out = target.put(own, shift)
    group.all_gather(out + first * SIZES[dtype], out, counts, dtype)
    check(target.get(count, dtype, shift).tobytes() == expected, f"all_gather in place: {what}")

    # Rank r sends part (r + j) mod SIZE of the shares to rank j.
    sent = [counts[(RANK + other) % SIZE] for other in range(SIZE)]
    received = [counts[(other + RANK) % SIZE] for other in range(SIZE)]
    put = source.put(inputs[RANK][: sum(sent)], shift)
    out = target.put(np.zeros(sum(received), NUMPY[dtype]), shift)
    group.all_to_all(put, out, sent, received, dtype)
    pieces = []
    for other in range(SIZE):
        begin = sum(counts[(other + before) % SIZE] for before in range(RANK))
        pieces.append(inputs[other][begin : begin + received[other]])
    found = target.get(sum(received), dtype, shift)
    check(found.tobytes() == np.concatenate(pieces).tobytes(), f"all_to_all: {what}")


def run(paths: list[str]) -> None:
    few = SIZE > 4  # with more ranks than cores: what differs with the number of ranks
    counts = (0, 1, 17, 4099) if few else COUNTS
    blocks = {shared: (Block(shared), Block(shared)) for shared in (False, True)}
    for path in paths:
        group.set_path(path)
        source, target = blocks[path == "shared"]
        whole = path == "automatic" and not few
        for index, count in enumerate(counts):
            shift = index % 4
            for dtype in DType if whole or count == 17 else (DType.float32, DType.bfloat16, DType.int64, DType.bool):
                movements(source, target, dtype, count, shift, path)
                coalesced(source, dtype, count, shift, path)
                # Every operation of every type once for each size; the other paths need not repeat the arithmetic.
                for op in operations(dtype) if whole or count == 17 else (ReduceOp.SUM, ReduceOp.MIN):
                    reductions(source, target, dtype, count, op, shift, path)
        for count in LARGE[:1] if few else LARGE:
            for dtype in (DType.float32, DType.bfloat16):
                reductions(source, target, dtype, count, ReduceOp.SUM, 0, path)
                movements(source, target, dtype, count, 2 * (count % 2), path)
                coalesced(source, dtype, count, 1, path)
        group.barrier()


run(sys.argv[1:])
group.set_path("automatic")
with open(os.environ["SHOWN"], "w") as file:
    json.dump({"cases": cases, "wrong": wrong, "digest": digest.hexdigest(), **group.statistics()}, file)
group.close()
