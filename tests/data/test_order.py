"""The order of an epoch against its slow reference, bit for bit, and against what a good shuffle is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher import _data

from . import reference_order as reference

SHUFFLES = ("none", "full", "blocks")
GOLDEN = Path(__file__).with_name("golden_order.json")


def native(shuffle: str, seed: int, epoch: int, n: int, *blocks: int) -> _data.Order:
    return _data.Order(SHUFFLES.index(shuffle), seed, epoch, n, *blocks)


def test_f12_small_orders_are_the_reference() -> None:
    """F12: tables of Fisher and Yates, all lengths to 200 and some above, several seeds and epochs."""
    for n in (*range(1, 200), 1000, 4999, 5000):
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (2**64 - 1, 7)):
            assert native("full", seed, epoch, n).fill(0, n) == reference.order("full", seed, epoch, n), (n, seed)


def test_f12_large_orders_are_the_reference() -> None:
    """F12: networks, at powers of two and beside them, at places all over the order."""
    for bits in (16, 17, 20, 24, 31, 32, 33, 40):
        for n in (2**bits - 1, 2**bits, 2**bits + 1):
            order = native("full", bits, 3, n)
            permute = reference.Permutation(n, reference.derive(reference.derive(reference.mix(bits), 3), 0))
            for begin in (0, n // 3, n - 40):
                wanted = [permute(position) for position in range(begin, begin + 40)]
                assert order.fill(begin, 40) == wanted
                assert [order.at(position) for position in range(begin, begin + 40)] == wanted


@pytest.mark.parametrize("n", [1, 7, 64, 997, 5000])
def test_f12_blocks_are_the_reference(n: int) -> None:
    """F12: a last extent that is short lands anywhere; lanes are longer by one at the most."""
    for extent, window, lanes in (
        (1, 1, 1),
        (7, 3, 1),
        (8, 4, 3),
        (100, 2, 4),
        (n, 1, 2),
        (3, 2**62, 2),
        (2**63, 2, n + 2),
    ):
        wanted = reference.order("blocks", 5, n, n, extent, window, lanes)
        order = native("blocks", 5, n, n, extent, window, lanes)
        assert sorted(wanted) == list(range(n))
        assert order.fill(0, n) == wanted
        assert [order.at(position) for position in range(0, n, 1 + n // 100)] == wanted[:: 1 + n // 100]


def test_f12_golden_file_pins_the_order_version() -> None:
    """F12: what version 1 gave when it was made; another result needs another version, and a new file."""
    golden = json.loads(GOLDEN.read_text())
    assert golden["order_version"] == _data.ORDER_VERSION
    for case in golden["cases"]:
        order = native(case["shuffle"], *case["parameters"])
        assert [order.at(position) for position in case["positions"]] == case["records"], case


def test_blocks_keep_neighbours_together() -> None:
    """A window of the order holds the records of its extents, whole, and nothing else."""
    extent, window = 50, 4
    order = native("blocks", 1, 0, 10_000, extent, window, 1).fill(0, 10_000)
    assert order != list(range(10_000))
    for begin in range(0, 10_000, extent * window):
        records = order[begin : begin + extent * window]
        assert len({record // extent for record in records}) == window
        assert records != sorted(records)


def test_epochs_and_seeds_give_other_orders() -> None:
    for n in (1000, 100_000):
        orders = [native("full", seed, epoch, n).fill(0, 1000) for seed in range(4) for epoch in range(4)]
        for index, one in enumerate(orders):
            for other in orders[:index]:
                same = sum(left == right for left, right in zip(one, other, strict=True))
                assert same < 20  # of 1000; one is to be expected for n = 1000
    assert native("full", 1, 2, 1000).fill(0, 1000) != native("full", 2, 1, 1000).fill(0, 1000)


def test_arguments_out_of_range_are_refused() -> None:
    order = native("full", 0, 0, 10)
    for call in (
        lambda: order.at(10),
        lambda: order.fill(5, 6),
        lambda: order.fill(11, 0),
        lambda: order.fill(1, 2**63),
    ):
        with pytest.raises(IndexError, match="of an order of 10 records"):
            call()
    assert order.fill(10, 0) == []
    for blocks in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            native("blocks", 0, 0, 10, *blocks)
    with pytest.raises(ValueError, match=r"shuffle is 3; expected 0 \(none\), 1 \(full\), 2 \(blocks\)"):
        _data.Order(3, 0, 0, 10)
