"""Ranks, CPU shares and stream maps: properties that hold for any input, and the texts of refusals."""

from __future__ import annotations

import random
from typing import Any

import pytest

from launcher.errors import UsageError
from launcher.job import Setting, count_ranks, parse_map, parse_ranks
from launcher.topology import plan, share_cpus, threads_for

SEEDS = range(40)


@pytest.mark.parametrize("seed", SEEDS)
def test_ranks_are_dense_host_by_host(seed: int) -> None:
    """Any number of hosts, any number of ranks on each: every rank on exactly one host, in the order of devices."""
    chance = random.Random(seed)
    hosts = [f"h{number}" for number in chance.sample(range(100), chance.randint(1, 9))]
    equal = chance.randint(1, 16)
    slots = [chance.choice([equal, chance.randint(1, 16)]) for _ in hosts]
    views = [plan(hosts, host, slots, [(rank,) for rank in range(16)], 1) for host in hosts]
    places = [place for view in views for place in view.local]
    assert [place.rank for place in places] == list(range(sum(slots)))
    for index, view in enumerate(views):
        assert [place.local_rank for place in view.local] == list(range(slots[index]))
        assert [place.cpus for place in view.local] == [(rank,) for rank in range(slots[index])]
        assert {(place.host, place.host_rank) for place in view.local} == {(hosts[index], index)}
        assert (view.host, view.host_rank) == (hosts[index], index)
        assert (view.world_size, view.slots, view.hosts) == (len(places), tuple(slots), tuple(hosts))


def test_eight_here_four_there() -> None:
    view = plan(["a", "b", "c"], "b", [8, 4, 8], [()] * 4, 2)
    assert [place.rank for place in view.local] == [8, 9, 10, 11]
    assert (view.world_size, view.threads_per_rank) == (20, 2)


def machine(chance: random.Random) -> tuple[list[int], dict[int, tuple[int, int]]]:
    """Allowed CPUs of some machine with several sockets and two threads a core, and where each of them is."""
    cores, sockets = chance.randint(1, 32), chance.choice([1, 2, 4])
    domains = {cpu: (cpu % cores * sockets // cores, cpu % cores) for cpu in range(2 * cores)}
    allowed = sorted(chance.sample(range(2 * cores), chance.randint(1, 2 * cores)))
    return allowed, domains


@pytest.mark.parametrize("seed", SEEDS)
def test_shares_are_disjoint_complete_and_equal(seed: int) -> None:
    chance = random.Random(seed)
    allowed, domains = machine(chance)
    ranks = chance.randint(1, 20)
    shares = share_cpus(allowed, ranks, domains)
    assert len(shares) == ranks
    if ranks == 1 or ranks > len(allowed):
        assert shares == ((),) * ranks
        return
    given = [cpu for share in shares for cpu in share]
    assert sorted(given) == allowed
    assert len(set(given)) == len(given)
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert all(list(share) == sorted(share) for share in shares)


def test_threads_of_a_core_stay_together() -> None:
    domains = {cpu: (0, cpu % 4) for cpu in range(8)}
    assert share_cpus(range(8), 4, domains) == ((0, 4), (1, 5), (2, 6), (3, 7))


def test_sockets_are_not_mixed_where_the_count_allows() -> None:
    domains = {cpu: (cpu % 2, cpu) for cpu in range(8)}
    assert share_cpus(range(8), 2, domains) == ((0, 2, 4, 6), (1, 3, 5, 7))


@pytest.mark.parametrize(
    ("allowed", "quota", "ranks", "threads"),
    [
        (8, None, 1, 8),
        (8, None, 3, 2),
        (2, None, 4, 1),
        (64, 4.0, 2, 2),
        (64, 0.5, 2, 1),
        (4, 64.0, 2, 2),
        (8, 3.5, 2, 2),
    ],
)
def test_threads_for(allowed: int, quota: float | None, ranks: int, threads: int) -> None:
    assert threads_for(allowed, quota, ranks) == threads


@pytest.mark.parametrize(
    ("value", "gpus", "neurons", "ranks"),
    [
        ("auto", 0, 0, 1),
        ("auto", 4, 0, 4),
        ("auto", 0, 2, 2),
        ("gpu", 4, 0, 4),
        ("cpu", 4, 0, 6),
        ("3", 4, 0, 3),
        (3, 4, 0, 3),
    ],
)
def test_count_ranks(value: Any, gpus: int, neurons: int, ranks: int) -> None:
    assert count_ranks(Setting(value, "x"), gpus, neurons, 6) == ranks


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many", "", "gpu", "True", "²"])
def test_count_ranks_refuses(value: str) -> None:
    with pytest.raises(UsageError, match="from option -n") as error:
        count_ranks(Setting(value, "option -n"), 0, 0, 6)
    assert value in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", {0: 0, 1: 0, 2: 0, 3: 0}),
        ("3", {0: 3, 1: 3, 2: 3, 3: 3}),
        ("0:3,1:1", {0: 3, 1: 1, 2: 0, 3: 0}),
        ("0-2:2", {0: 2, 1: 2, 2: 2, 3: 0}),
        ("0-1:3,3:1", {0: 3, 1: 3, 2: 0, 3: 1}),
    ],
)
def test_parse_map(text: str, expected: dict[int, int]) -> None:
    assert parse_map(text, "redirects", 4) == expected


@pytest.mark.parametrize("text", ["4", "", "0:4", "a:1", "0:1,", "4:1", "2-1:1", "0-9:1", "0:1:2", "-1:1"])
def test_parse_map_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="redirects"):
        parse_map(text, "redirects", 4)


@pytest.mark.parametrize("seed", SEEDS)
def test_ranges_are_what_their_members_are(seed: int) -> None:
    chance = random.Random(seed)
    pieces, expected = [], []
    for _ in range(chance.randint(1, 4)):
        first = chance.randint(0, 30)
        last = chance.randint(first, 31)
        pieces.append(str(first) if first == last else f"{first}-{last}")
        expected += range(first, last + 1)
    assert parse_ranks(",".join(pieces), "filter", 32) == expected
