"""Which records each rank reads at each step: every one once, whatever the world size and the batch were before."""

from __future__ import annotations

import random

import pytest

from launcher import _data

from . import reference_order as reference

SHUFFLES = ("none", "full", "blocks")
TAILS = ("drop", "pad", "short")
WORLDS = (1, 2, 3, 5, 8)
BLOCKS = {1: (6, 3, 1), 4: (6, 3, 4)}  # extent, window, lanes


def order_of(n: int, lanes: int, epoch: int = 0) -> _data.Order:
    return _data.Order(2, 11, epoch, n, *BLOCKS[lanes]) if lanes > 1 else _data.Order(1, 11, epoch, n)


def ranks_rows(
    order: _data.Order, base: int, world: int, batch: int, tail: str, limit: int | None = None
) -> list[list[tuple[list[int], int]]]:
    """By rank, then by step: records and how many of them are valid."""
    number = TAILS.index(tail)
    steps = _data.steps(order.records, base, world, batch, number)
    steps = steps if limit is None else min(steps, limit)
    return [
        [_data.rows_of(order, step, base, world, rank, batch, number) for step in range(steps)] for rank in range(world)
    ]


def valid_records(rows: list[list[tuple[list[int], int]]]) -> list[int]:
    return [record for rank in rows for records, valid in rank for record in records[:valid]]


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("world", WORLDS)
def test_f13_the_union_of_the_shares_is_each_record_once(world: int, tail: str) -> None:
    """F13: over several lengths, batches and epochs, with and without lanes; as many steps on every rank."""
    for n in (1, 39, 40, 41, 120, 257):
        for batch in (1, 4, 7):
            for lanes, epoch in ((1, 0), (1, 1), (4, 0)):
                order = order_of(n, lanes, epoch)
                rows = ranks_rows(order, 0, world, batch, tail)
                records = valid_records(rows)
                whole = n // (world * batch) * world * batch
                assert len(records) == len(set(records)) == (whole if tail == "drop" else n)
                assert set(records) == set(order.fill(0, len(records)))
                assert len({len(rank) for rank in rows}) == 1
                if tail != "short":
                    assert all(len(records) == batch for rank in rows for records, _ in rank)


@pytest.mark.parametrize("lanes", [1, 4])
def test_f13_shares_are_the_reference(lanes: int) -> None:
    """F13: rank for rank and step for step, from positions in the middle of the epoch too."""
    for n in (5, 100, 119):
        order = order_of(n, lanes)
        positions = order.fill(0, n)
        for base in (0, 3, n // 2, n - 1, n):
            for world, batch in ((1, 5), (3, 4), (4, 16), (8, 1)):
                for tail in TAILS:
                    rows = ranks_rows(order, base, world, batch, tail)
                    for rank in range(world):
                        wanted = reference.share(positions, base, world, rank, batch, lanes, tail)
                        assert rows[rank] == wanted, (n, base, world, rank, batch, tail)


@pytest.mark.parametrize("lanes", [1, 4])
def test_f14_another_world_goes_on_where_the_first_stopped(lanes: int) -> None:
    """F14: world 4 stops at a random step; 2, 3 and 8 ranks with other batches read what is left, each record once."""
    chance = random.Random(14)
    for _ in range(20):
        n, batch = chance.randrange(200, 400), chance.randrange(1, 9)
        order = order_of(n, lanes)
        stop = chance.randrange(_data.steps(n, 0, 4, batch, 0) + 1)
        before = valid_records(ranks_rows(order, 0, 4, batch, "drop", stop))
        position = stop * 4 * batch
        for world in (2, 3, 8):
            other = chance.randrange(1, 9)
            for tail in ("short", "pad"):
                after = valid_records(ranks_rows(order, position, world, other, tail))
                assert sorted(before + after) == list(range(n))
            # Twice stopped and gone on.
            middle = ranks_rows(order, position, world, other, "drop", 3)
            steps = len(middle[0])
            end = ranks_rows(order, position + steps * world * other, 5, 2, "short")
            assert sorted(before + valid_records(middle) + valid_records(end)) == list(range(n))


def test_f14_the_same_world_reads_the_same_batches() -> None:
    """F14: steps counted from a later position are the steps of the uninterrupted epoch."""
    for lanes in (1, 4):
        order = order_of(333, lanes)
        whole = ranks_rows(order, 0, 4, 5, "pad")
        again = ranks_rows(order, 6 * 20, 4, 5, "pad")
        assert [rank[6:] for rank in whole] == again


def test_f11_more_ranks_than_records() -> None:
    """F11: no step with ``drop``; one with ``pad``, where masks say which rows are real; one with ``short``."""
    order = order_of(3, 1)
    assert _data.steps(3, 0, 8, 2, TAILS.index("drop")) == 0
    padded = ranks_rows(order, 0, 8, 2, "pad")
    assert [[valid for _, valid in rank] for rank in padded] == [[2], [1], [0], [0], [0], [0], [0], [0]]
    first = order.fill(0, 3)
    assert [record for rank in padded for records, _ in rank for record in records] == (first * 6)[:16]
    short = ranks_rows(order, 0, 8, 2, "short")
    assert [[len(records) for records, _ in rank] for rank in short] == [[2], [1], [0], [0], [0], [0], [0], [0]]


def test_lanes_keep_a_rank_on_the_records_of_its_lane() -> None:
    """Two hosts of two ranks, two lanes: each rank's rows are of one lane, so a host reads half of the extents."""
    extent, n = 10, 2000
    order = _data.Order(2, 3, 0, n, extent, 4, 2)
    read = []
    for rank in range(4):
        rows = [_data.rows_of(order, step, 0, 4, rank, 8, 0)[0] for step in range(_data.steps(n, 0, 4, 8, 0))]
        read.append({record // extent for records in rows for record in records})
    first, second = read[0] | read[1], read[2] | read[3]
    assert len(first & second) <= 1
    assert len(first) <= 101 and len(second) <= 101


def test_agreed_steps_go_beyond_the_records_of_a_rank() -> None:
    """Ranks whose host has fewer records than others have go on with padding, or with empty steps."""
    order = order_of(10, 1)
    positions = order.fill(0, 10)
    padded = [_data.rows_of(order, step, 0, 2, 1, 3, TAILS.index("pad"), 4) for step in range(4)]
    assert [valid for _, valid in padded] == [3, 1, 0, 0]
    assert padded[1][0] == [positions[9], *positions[0:2]]
    assert [len(records) for records, _ in padded] == [3, 3, 3, 3]
    short = [_data.rows_of(order, step, 0, 2, 1, 3, TAILS.index("short"), 4) for step in range(4)]
    assert [len(records) for records, _ in short] == [3, 1, 0, 0]
    # Fewer than it would have.
    with pytest.raises(IndexError, match="step 1 of 1"):
        _data.rows_of(order, 1, 0, 2, 1, 3, TAILS.index("drop"), 1)


def test_huge_numbers_do_not_wrap() -> None:
    most = 2**64 - 1
    assert _data.steps(most, 0, 1, 1, 0) == most
    assert _data.steps(most - 1, 0, 2**40, 2**40, 0) == 0
    assert _data.steps(10, 0, 2**40, 2**40, 1) == 1
    assert _data.steps(10, most, 1, 1, 1) == 0
    order = _data.Order(1, 0, 0, most)
    step = _data.steps(most, 0, 2**20, 5, 0) - 1
    records, valid = _data.rows_of(order, step, 0, 2**20, 2**20 - 1, 5, 0)
    assert valid == 5 and all(record < most for record in records)
    with pytest.raises(ValueError, match="rank 2, world 2"):
        _data.rows_of(order, 0, 0, 2, 2, 1, 0)
