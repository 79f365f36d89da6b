"""From samples to what is committed: the bars and whether they are met, the tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from contenders import NAMES, OURS, REFERENCE
from measure import (
    BACK,
    CONCURRENCY,
    CPU,
    P50,
    P99,
    PROCESSES,
    PSS_AFTER,
    PSS_IDLE,
    RATE,
    RSS_AFTER,
    RSS_IDLE,
    SLOW_ANSWER,
    SLOW_EARLY,
    SLOW_PING,
    SOCKET,
    START,
    START_ANSWER,
    Sample,
    at,
)

PEERS = [peer for peer in NAMES.values() if peer != OURS]
START_MS, START_TIMES, RATE_TIMES, MEMORY_TIMES = 250.0, 10.0, 3.0, 2.0
MORE_IS_BETTER = (RATE,)


def number(value: float) -> str:
    """Three significant digits, no exponent."""
    magnitude = abs(value)
    if magnitude >= 1e6:
        return f"{value / 1e6:.3g} M"
    if magnitude >= 9999.5:
        return f"{value / 1e3:.3g} k"
    if value == int(value) or magnitude >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if magnitude >= 9.995 else f"{value:.2f}"


def span(values: Sequence[float]) -> str:
    """Median, and the range where there is one."""
    if not values:
        return "-"
    middle, least, most = (number(pick(values)) for pick in (statistics.median, min, max))
    return middle if least == most else f"{middle} ({least}-{most})"


@dataclass(frozen=True)
class Outcome:
    """A bar: what is claimed, and the numbers (one a round) that it is judged by."""

    claim: str
    against: str
    wanted: float
    unit: str  # "x": times as good as the other, at least; else at most
    values: tuple[float, ...]

    @property
    def met(self) -> bool:
        """In the median."""
        measured = statistics.median(self.values)
        return measured >= self.wanted if self.unit == "x" else measured <= self.wanted

    def row(self) -> str:
        """Of the table of bars."""
        sign = ">=" if self.unit == "x" else "<="
        wanted, measured = f"{sign} {self.wanted:g} {self.unit}", f"{span(self.values)} {self.unit}"
        verdict = "met" if self.met else "**not met**"
        return f"| {self.claim} | {self.against} | {wanted} | {measured} | {verdict} |"


def by_round(samples: Sequence[Sample], table: str) -> dict[int, list[Sample]]:
    """The samples of a table."""
    found: dict[int, list[Sample]] = {}
    for sample in samples:
        if sample.table == table:
            found.setdefault(sample.round, []).append(sample)
    return found


def against(samples: Sequence[Sample], table: str, peer: str) -> tuple[tuple[float, ...], str]:
    """How many times as good ours is, in each round, and against which setting that mostly is.

    The peer's best setting of the round, against our best with no more workers than that.
    """
    more = table.startswith(MORE_IS_BETTER)
    best: Callable[..., Sample] = max if more else min
    values, labels = [], []
    for together in by_round(samples, table).values():
        theirs = [sample for sample in together if sample.peer == peer]
        if not theirs:
            continue
        rival = best(theirs, key=lambda sample: sample.value)
        ours = [sample for sample in together if sample.peer == OURS and sample.workers <= rival.workers]
        if ours and (own := best(ours, key=lambda sample: sample.value)).value > 0 < rival.value:
            values.append(own.value / rival.value if more else rival.value / own.value)
            labels.append(rival.label)
    return tuple(values), max(set(labels), key=labels.count) if labels else ""


def one_worker(samples: Sequence[Sample]) -> list[Sample]:
    """Those of settings with one worker."""
    return [sample for sample in samples if sample.workers == 1]


def outcomes(samples: Sequence[Sample]) -> list[Outcome]:
    """Of all bars that were measured."""

    def every() -> Iterator[Outcome]:
        for table, what in ((START, "the first 200 of /ping"), (START_ANSWER, "the first good answer")):
            own = tuple(sample.value for sample in samples if sample.table == table and sample.peer == OURS)
            yield Outcome(f"exec to {what}", "-", START_MS, "ms", own)
            yield Outcome(f"exec to {what}", REFERENCE, START_TIMES, "x", against(samples, table, REFERENCE)[0])
        for connections in CONCURRENCY:
            for peer in PEERS:
                values, label = against(samples, table := at(RATE, connections), peer)
                yield Outcome(table, label, RATE_TIMES if peer == REFERENCE else 1, "x", values)
        for connections in CONCURRENCY:
            for peer in PEERS:
                values, label = against(samples, table := at(P99, connections), peer)
                yield Outcome(f"{table}: shorter", label, 1, "x", values)
        for table in (PSS_IDLE, PSS_AFTER):
            for peer in PEERS:
                values, label = against(one_worker(samples), table, peer)
                yield Outcome(f"{table}, 1 worker: less", label, MEMORY_TIMES, "x", values)

    return [outcome for outcome in every() if outcome.values]


def _rows(samples: Sequence[Sample], columns: Mapping[str, str], first: str = "") -> Iterator[str]:
    """A table; ``columns``: the table of the samples -> the head of its column."""
    labels = list(dict.fromkeys(sample.label for sample in samples if sample.table in columns))
    if not labels:
        return
    yield f"| {first} | " + " | ".join(columns.values()) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for label in labels:
        cells = [
            span([sample.value for sample in samples if (sample.table, sample.label) == (table, label)])
            for table in columns
        ]
        strong = "**" if label.startswith(OURS) else ""
        yield f"| {strong}{label}{strong} | " + " | ".join(cells) + " |"


def _section(title: str, rows: Sequence[str], text: str = "") -> Iterator[str]:
    if rows:
        yield from (f"### {title}", "")
        yield from ([text, ""] if text else [])
        yield from (*rows, "")


def _points(table: str, unit: str) -> dict[str, str]:
    return {at(table, connections): f"c={connections}, {unit}" for connections in CONCURRENCY}


def _said(rows: Sequence[str], said: Mapping[str, str], head: str) -> list[str]:
    """The rows with a last column: what was answered meanwhile."""
    if not rows:
        return []
    found, listed = [f"{rows[0]} {head} |", f"{rows[1]}---|"], set()
    for row in rows[2:]:
        label = row.split("|")[1].strip().strip("*")
        listed.add(label)
        found.append(f"{row} {said.get(label, '')} |")
    width = rows[0].count("|") - 2
    found += [f"| {label} |{' - |' * width} {text} |" for label, text in said.items() if label not in listed]
    return found


def markdown(result: Mapping[str, Any]) -> str:
    """The page that is committed beside the samples."""
    samples = [Sample(**sample) for sample in result["samples"]]
    facts, judged, said = result["machine"], outcomes(samples), result["said"]
    lines = [
        f"# Serving, {result['date']}",
        "",
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gb']} GB, Linux {facts['kernel']}, Python "
        f"{facts['python']}; load before {facts['load_1min']}, after {result['load_after']}; "
        f"{result['minutes']} minutes.",
        "",
        *(["**A quick run: to see that it works, not to be quoted.**", ""] * result["quick"]),
        *(f"- {peer}: {version}" for peer, version in result["versions"].items()),
        *(f"- {peer}: not measured: {why}" for peer, why in result["absent"].items()),
        "",
        f"Command: `{result['command']}`. Numbers are medians over {result['rounds']} rounds with their range, "
        f"{result['seconds']:g} s a point after {result['warm_up']:g} s of warm-up; ratios are taken within a round: "
        "the peer's best setting in it against ours with no more workers. MB = 1,000,000 bytes. "
        "[How each number is taken](../README.md).",
        "",
    ]
    if judged:
        lines += ["## The bars", "", f"{sum(outcome.met for outcome in judged)} of {len(judged)} are met.", ""]
        lines += ["| | against | wanted | measured | |", "|---|---|---|---|---|"]
        lines += [*(outcome.row() for outcome in judged), ""]
    lines += ["## All numbers", ""]
    start = {START: "first 200 of /ping, ms", START_ANSWER: "first good answer of /invocations, ms"}
    lines += _section("Start: exec to ...", list(_rows(samples, start)))
    lines += _section("Requests a second", list(_rows(samples, _points(RATE, "requests/s"))))
    lines += _section("How long a request takes: half of them", list(_rows(samples, _points(P50, "ms"))))
    lines += _section("How long a request takes: all but one of a hundred", list(_rows(samples, _points(P99, "ms"))))
    lines += _section("CPU time of the whole server a request", list(_rows(samples, _points(CPU, "µs"))))
    lines += _section("Broken connections", list(_rows(samples, _points(SOCKET, "count"))))
    memory = {
        PSS_IDLE: "PSS, idle, MB",
        PSS_AFTER: "PSS, after the load, MB",
        RSS_IDLE: "RSS, idle, MB",
        RSS_AFTER: "RSS, after the load, MB",
        PROCESSES: "processes",
    }
    lines += _section("Memory of all processes of a server", list(_rows(samples, memory)))
    slow = {
        SLOW_PING: "first 200 of /ping, ms",
        SLOW_ANSWER: "first good answer, ms",
        SLOW_EARLY: "/ping said 200 before the model was there by, ms",
    }
    rows = _said(list(_rows(samples, slow)), said.get(SLOW_PING, {}), "/ping until then")
    lines += _section("A model that takes 2 s to load: exec to ...", rows)
    rows = _said(list(_rows(samples, {BACK: "ms"})), said.get(BACK, {}), "requests until then")
    lines += _section("SIGKILL of the only worker to the next good answer", rows)
    if result["failures"]:
        lines += ["## What failed", "", *(f"- {text}" for text in result["failures"]), ""]
    return "\n".join(lines)
