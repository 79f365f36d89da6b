"""What is claimed, and whether the samples bear it out."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from contenders import (
    BATCHED,
    CONTAINER,
    COPY,
    DALI,
    GATHER,
    GRAIN,
    LIBPROTOBUF,
    LITDATA,
    LOADTXT,
    MDS,
    OURS,
    PANDAS,
    PYARROW,
    TORCH,
    UPB,
    WEBDATASET,
)

CSV, PIPE, FIRST, RESUME = "CSV, 1c", "FIFO", "first batch", "resume"
FIRST_INDEXED = "first batch of RecordIO, index included"
MEMORY, GROWTH, SHM, LISTING = "private memory", "growth of private memory", "/dev/shm", "listing"
# Unit and whether less is better, of each table that is not of records a second.
UNITS = {
    CSV: ("million values/s", False),
    PIPE: ("GB/s", False),
    FIRST: ("ms", True),
    FIRST_INDEXED: ("ms", True),
    RESUME: ("ms", True),
    MEMORY: ("MB", True),
    GROWTH: ("MB", True),
    SHM: ("bytes", True),
    LISTING: ("s", True),
}
FLOORS = (GATHER, COPY)
NO_RATIOS = (RESUME, MEMORY, GROWTH, SHM)  # may be nothing, or noise around it
RECORDS = ("records/s", False)


@dataclass(frozen=True)
class Sample:
    """One number: of a contender's setting, in a table, in a round."""

    table: str
    round: int
    label: str
    peer: str
    value: float


@dataclass(frozen=True)
class Bar:
    """How many times as good as the best of ``against`` (labels or peers) ours is to be in each round, in the median.

    With ``against`` empty, the number itself: at least ``wanted``, or at most where less is better.
    """

    table: str
    against: tuple[str, ...]
    wanted: float
    stretch: float
    ours: str = OURS


def _bars() -> Iterator[Bar]:
    for arrangement in ("1c", "2r"):
        small, medium, recordio = (f"{name}, {arrangement}" for name in ("small", "medium", "recordio"))
        yield Bar(small, (TORCH,), 35, 60)
        yield Bar(small, (f"{BATCHED}, nw 0",), 2.5, 4)
        yield Bar(small, (DALI,), 10, 20)
        yield Bar(small, (LITDATA,), 40, 70)
        yield Bar(small, (WEBDATASET,), 150, 300)
        yield Bar(small, (MDS,), 250, 500)
        yield Bar(small, (GRAIN,), 600, 1200)
        yield Bar(small, (GATHER,), 0.6, 0.8)
        yield Bar(medium, (f"{BATCHED}, nw 0",), 1, 1.3)
        yield Bar(medium, (f"{TORCH}, nw 0",), 4, 8)
        yield Bar(medium, (f"{TORCH}, nw 1", f"{TORCH}, nw 2"), 15, 30)
        yield Bar(medium, (DALI,), 1.5, 2.2)
        yield Bar(recordio, (UPB,), 60, 90)
        yield Bar(recordio, (CONTAINER,), 100, 150)
        yield Bar(recordio, (LIBPROTOBUF,), 4.5, 6)
        yield Bar(recordio, (COPY,), 0.75, 0.9)
    yield Bar(CSV, (PANDAS,), 3.3, 4.5)
    yield Bar(CSV, (PYARROW,), 3.8, 5)
    yield Bar(CSV, (LOADTXT,), 4.6, 6.5)
    yield Bar(PIPE, (), 2.5, 3.5)
    yield Bar(FIRST, (), 10, 5)
    yield Bar(FIRST_INDEXED, (), 60, 30)
    yield Bar(RESUME, (), 1, 0.1)
    for name in ("small", "medium"):
        yield Bar(MEMORY, (), 4, 1, f"{OURS}, {name}, over the ring")
        yield Bar(GROWTH, (), 1, 0.1, f"{OURS}, {name}")
        yield Bar(SHM, (), 0, 0, f"{OURS}, {name}")
    yield Bar(LISTING, (), 0.25, 0.15)


BARS = tuple(_bars())


@dataclass(frozen=True)
class Outcome:
    """A bar, the numbers that it is judged by (one a round), and against which setting they are."""

    bar: Bar
    values: tuple[float, ...]
    against: str
    limit: float = 0.0  # what the floor of the table reaches by the same measure, in the median; 0: there is none

    @property
    def measured(self) -> float:
        """The median."""
        return statistics.median(self.values)

    def reaches(self, limit: float) -> bool:
        """As good as ``limit``."""
        less = not self.bar.against and UNITS.get(self.bar.table, RECORDS)[1]
        return self.measured <= limit if less else self.measured >= limit

    @property
    def verdict(self) -> str:
        """In words."""
        if self.reaches(self.bar.stretch):
            return "met, and the stretch"
        return "met" if self.reaches(self.bar.wanted) else "**not met**"


def by_round(samples: Sequence[Sample], table: str) -> dict[int, list[Sample]]:
    """The samples of a table."""
    found: dict[int, list[Sample]] = {}
    for sample in samples:
        if sample.table == table:
            found.setdefault(sample.round, []).append(sample)
    return found


def _floor(table: str) -> str:
    """The floor that nothing in the table can be much faster than: in the order that the table's loaders read in."""
    return COPY if table.startswith("recordio") else GATHER


def judge(bar: Bar, samples: Sequence[Sample]) -> Outcome | None:
    """None: it was not measured."""
    values, named, limits = [], [], []
    for together in by_round(samples, bar.table).values():
        ours = [sample.value for sample in together if sample.label == bar.ours]
        theirs = [sample for sample in together if {sample.label, sample.peer} & set(bar.against)]
        if not ours or (bar.against and not theirs):
            continue
        if not bar.against:
            values.append(ours[0])
            continue
        best = max(theirs, key=lambda sample: sample.value)
        values.append(ours[0] / best.value)
        named.append(best.label)
        if best.label not in FLOORS and (floors := [one.value for one in together if one.label == _floor(bar.table)]):
            limits.append(max(floors) / best.value)
    against = max(set(named), key=named.count) if named else ""
    limit = statistics.median(limits) if limits else 0.0
    return Outcome(bar, tuple(values), against, limit) if values else None


def outcomes(samples: Sequence[Sample]) -> list[Outcome]:
    """Of all bars that were measured."""
    return [found for bar in BARS if (found := judge(bar, samples)) is not None]


def read(samples: Sequence[Mapping[str, Any]]) -> list[Sample]:
    """From what was written to JSON."""
    return [Sample(**sample) for sample in samples]
