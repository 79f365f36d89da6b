"""Samples by cell and round, ratios within a round, and the bars that the project sets itself."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rivals import DEEPSPEED, GLOO, HOROVOD, LIMIT, MPIS, OURS, PEERS, REGISTERED

KIB, MIB = 1 << 10, 1 << 20
Key = tuple[str, str, str, int]  # phase, type, mode, bytes
TWO, FOUR, HOSTS = "two ranks", "four ranks on two cores", "two hosts"


class Round:
    """All contenders' medians of one cell in one round, in us, and the state that the cores were in all along."""

    def __init__(self) -> None:
        self.by_label: dict[str, float] = {}
        self.by_peer: dict[str, float] = {}  # in the peer's better setting of this round
        self._states: set[str] = set()
        self.pings: list[float] = []

    def add(self, sample: dict[str, Any]) -> None:
        """Takes a sample."""
        value = sample["median_us"]
        self.by_label[sample["label"]] = value
        peer = sample["label"] if sample["peer"] == "launcher" else sample["peer"]
        self.by_peer[peer] = min(value, self.by_peer.get(peer, value))
        self._states.add(sample["state"])
        self.pings += sample["ping_ns"]

    @property
    def state(self) -> str:
        """near, far or mixed."""
        return self._states.copy().pop() if len(self._states) == 1 else "mixed"


class Measured:
    """The samples of a run."""

    def __init__(self, samples: Sequence[dict[str, Any]]) -> None:
        self._rounds: dict[Key, dict[int, Round]] = {}
        for sample in samples:
            key = (sample["phase"], sample["dtype"], sample["mode"], sample["bytes"])
            self._rounds.setdefault(key, {}).setdefault(sample["round"], Round()).add(sample)

    def __iter__(self) -> Iterator[Key]:
        """All cells, in the order in which they were measured."""
        return iter(self._rounds)

    def rounds(self, key: Key, state: str = "") -> list[Round]:
        """The rounds of a cell; of those in one state only, if it is given."""
        return [found for found in self._rounds.get(key, {}).values() if state in ("", found.state)]

    def states(self, phase: str) -> list[str]:
        """The states that occurred in a phase."""
        found = {one.state for key in self._rounds if key[0] == phase for one in self.rounds(key)}
        return [state for state in ("near", "far", "mixed") if state in found]


def median_of(rounds: Sequence[Round], label: str) -> float | None:
    """Median over the rounds of a contender's (or, in its better setting, a peer's) time, us."""
    found = [value for one in rounds if (value := one.by_label.get(label, one.by_peer.get(label))) is not None]
    return statistics.median(found) if found else None


def peer_median(rounds: Sequence[Round], peer: str) -> float | None:
    """As :func:`median_of`, of the peer's better setting in each round."""
    found = [one.by_peer[peer] for one in rounds if peer in one.by_peer]
    return statistics.median(found) if found else None


def best_peer(rounds: Sequence[Round], among: Sequence[str] = PEERS) -> str:
    """The fastest of the peers in these rounds, "" when there is none."""
    medians = {peer: found for peer in among if (found := peer_median(rounds, peer)) is not None}
    return min(medians, key=lambda peer: medians[peer]) if medians else ""


def ratio(rounds: Sequence[Round], ours: str, peer: str) -> list[float]:
    """The peer's time over ours, round by round: above 1, ours is faster."""
    return [one.by_peer[peer] / one.by_label[ours] for one in rounds if peer in one.by_peer and ours in one.by_label]


@dataclass(frozen=True)
class Bar:
    """A claim about a cell: ``ours`` is at least ``wanted`` times as fast as the best of ``peers``, in these states.

    ``limit_us`` instead of that: at most so long.
    """

    key: Key
    ours: str
    peers: tuple[str, ...]
    wanted: float
    states: tuple[str, ...] = ("near", "far")
    limit_us: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What was measured for a bar in one state; ``values`` round by round."""

    bar: Bar
    state: str
    against: str
    values: list[float]

    @property
    def met(self) -> bool:
        """On the median."""
        middle = statistics.median(self.values)
        return middle <= self.bar.limit_us if self.bar.limit_us else middle >= self.bar.wanted


def _intra_host() -> Iterator[Bar]:
    both, near, far = ("near", "far"), ("near",), ("far",)
    # bytes: registered, any tensor near, any tensor far; against Gloo: any tensor, registered
    table: dict[int, tuple[float, float, float, float, float]] = {
        1 * KIB: (1.5, 1.5, 1.5, 60, 60),
        8 * KIB: (2.0, 1.5, 1.0, 60, 60),
        64 * KIB: (2.8, 1.3, 1.0, 50, 50),
        256 * KIB: (3.0, 1.2, 1.0, 25, 25),
        1 * MIB: (2.8, 1.3, 1.0, 15, 15),
        25 * MIB: (3.2, 1.8, 1.0, 8, 13),
        100 * MIB: (3.0, 2.2, 1.0, 7, 9),
    }
    for size, (registered, any_near, any_far, gloo_any, gloo_registered) in table.items():
        key = (TWO, "float32", "fresh", size)
        yield Bar(key, REGISTERED, PEERS, registered, both)
        yield Bar(key, OURS, PEERS, any_near, near)
        yield Bar(key, OURS, PEERS, any_far, far)
        yield Bar(key, REGISTERED, (GLOO,), gloo_registered, both)
        yield Bar(key, OURS, (GLOO,), gloo_any, both)
    for size, share in ((1 * MIB, 0.80), (25 * MIB, 0.85), (100 * MIB, 0.90)):
        yield Bar((TWO, "float32", "fresh", size), REGISTERED, (LIMIT,), share, both)
    for label in (REGISTERED, OURS):
        yield Bar((TWO, "float32", "fresh", KIB), label, (), 0, both, limit_us=0.9)


def _more() -> Iterator[Bar]:
    for ours, small, large in ((OURS, 500, 3), (REGISTERED, 500, 5)):
        yield Bar((TWO, "float32", "fresh", KIB), ours, (HOROVOD,), small)
        yield Bar((TWO, "float32", "fresh", 25 * MIB), ours, (HOROVOD,), large)
    for ours, gloo, deepspeed in ((OURS, 6, 2), (REGISTERED, 14, 4)):
        key = (TWO, "bfloat16", "fresh", 25 * MIB)
        yield Bar(key, ours, (GLOO,), gloo, ("near",))
        yield Bar(key, ours, (DEEPSPEED,), deepspeed, ("near",))
    for size, any_tensor, registered in ((KIB, 1, 1), (64 * KIB, 1, 1), (MIB, 1, 3), (25 * MIB, 1.3, 3)):
        key = (FOUR, "float32", "hot", size)
        yield Bar(key, OURS, PEERS, any_tensor)
        yield Bar(key, REGISTERED, PEERS, registered)
    for size, gloo in ((KIB, 30.0), (64 * KIB, 1.0), (MIB, 1.0), (25 * MIB, 1.3), (100 * MIB, 1.3)):
        key = (HOSTS, "float32", "fresh", size)
        yield Bar(key, OURS, (GLOO,), gloo)
        yield Bar(key, OURS, MPIS, 1.0)
    for size, share in ((25 * MIB, 0.95), (100 * MIB, 0.90)):
        yield Bar((HOSTS, "float32", "fresh", size), OURS, (LIMIT,), share)


BARS = (*_intra_host(), *_more())


def judge(measured: Measured, bar: Bar) -> Iterator[Outcome]:
    """What was measured for a bar, one for each state that it is about and that occurred."""
    for state in bar.states:
        rounds = measured.rounds(bar.key, state)
        against = best_peer(rounds, bar.peers) if bar.peers else ""
        if bar.limit_us:
            values = [one.by_label[bar.ours] for one in rounds if bar.ours in one.by_label]
        else:
            values = ratio(rounds, bar.ours, against) if against else []
        if values:
            yield Outcome(bar, state, against, values)


def outcomes(measured: Measured) -> list[Outcome]:
    """All bars that could be judged."""
    return [outcome for bar in BARS for outcome in judge(measured, bar)]
