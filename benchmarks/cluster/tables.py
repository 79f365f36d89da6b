"""From samples to what is committed: the bars, and a table for each case."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from report import show

Sample = dict[str, float]
Samples = dict[str, dict[str, list[Sample]]]  # case -> label -> one sample a run
OURS = "launcher"


@dataclass(frozen=True)
class Table:
    """How a case is shown; columns: name -> heading, the decisive one first."""

    title: str
    columns: dict[str, str]


TABLES = {
    "first-line": Table(
        "Start: exec of the launchers to the first line of the script on both hosts, nothing heavy imported",
        {"last_ms": "last rank's first line, ms", "first_ms": "first rank's, ms", "job_ms": "whole job, ms"},
    ),
    "exit": Table(
        "A rank of host 2 ends with exit(3), all others sleep: to the end of both launchers and all ranks",
        {
            "gone_ms": "launchers and all ranks gone, ms",
            "failing_host_ms": "launcher of host 2, ms",
            "other_host_ms": "launcher of host 1, ms",
            "other_ranks_ms": "ranks of host 1, ms",
            "code_1": "code on host 1",
            "code_2": "code on host 2",
        },
    ),
    "loss": Table(
        "One of three hosts is cut off without a word, all ranks sleep: to the end of the others' launchers and ranks",
        {
            "others_ms": "all other hosts ended, ms",
            "itself_ms": "launcher of the lost host, ms",
            "named": "all others name it",
            "code": "code",
        },
    ),
    "mpi-end": Table(
        "End of a successful MPI job on two hosts",
        {
            "after_mpirun_ms": "mpirun's end to the end of both launchers, ms",
            "mpirun_ms": "the last rank's go to mpirun's end, ms",
        },
    ),
    "scale": Table(
        "Simulated hosts against one leader",
        {
            "formed_ms": "first connect to the last host's start, ms",
            "told_ms": "failure to the last host told to stop, ms",
            "verdict_ms": "failure to the last host's verdict, ms",
            "forming_cpu_s": "leader's CPU while forming, s",
            "idle_cpu_percent": "leader's CPU while idle, % of a core",
            "uss_mb": "leader's memory while idle (USS), MB",
            "peak_rss_mb": "leader's peak resident size, MB",
            "warnings": "false warnings of silent hosts",
        },
    ),
}


@dataclass(frozen=True)
class Bar:
    """A claim about our own number. ``worst``: no run may be above the limit; else the median may not."""

    claim: str
    case: str
    label: str
    column: str
    limit: float
    unit: str
    worst: bool = False
    least: bool = False


_SCALE = "4096 hosts"
BARS = (
    Bar("first line on both hosts", "first-line", OURS, "last_ms", 150, "ms"),
    Bar("exit(3) on host 2 to both launchers and all ranks gone", "exit", OURS, "gone_ms", 60, "ms"),
    Bar("silent loss of a host: all others ended, every run", "loss", OURS, "others_ms", 6000, "ms", worst=True),
    Bar("silent loss of a host: all others name it, every run", "loss", OURS, "named", 1, "", worst=True, least=True),
    Bar("end of mpirun to the launchers' exit", "mpi-end", "launcher-mpi", "after_mpirun_ms", 1000, "ms"),
    Bar("4,096 hosts formed", "scale", _SCALE, "formed_ms", 5000, "ms"),
    Bar("4,096 hosts told of a failure", "scale", _SCALE, "told_ms", 1000, "ms"),
    Bar("leader of 4,096 hosts, peak resident size", "scale", _SCALE, "peak_rss_mb", 300, "MB"),
)


def values(samples: list[Sample], column: str) -> list[float]:
    """The numbers of one column; runs that have none are left out."""
    return [sample[column] for sample in samples if column in sample]


def capped(samples: list[Sample], column: str) -> float:
    """From where on a number of this column says only "or more"; infinite where nothing was cut short."""
    return min(values(samples, "cap_ms"), default=float("inf")) if column.endswith("_ms") else float("inf")


def cell(samples: list[Sample], column: str) -> str:
    """Median, then the range; a number that was cut short has a sign before it."""
    numbers, cap = values(samples, column), capped(samples, column)
    if not numbers:
        return "-"
    median, least, most = (_shown(pick(numbers), cap) for pick in (statistics.median, min, max))
    return median if least == most else f"{median} ({least}-{most})"


def _shown(value: float, cap: float) -> str:
    return f">= {show(cap)}" if value >= cap else show(value)


def times_ours(ours: list[Sample], theirs: list[Sample], column: str) -> str:
    """Theirs over ours, run by run: the runs of one round share the state that the machine was in."""
    pairs = zip(values(ours, column), values(theirs, column), strict=False)
    found = [other / own for own, other in pairs if own > 0]
    if not found:
        return "-"
    cut = any(value >= capped(theirs, column) for value in values(theirs, column))
    return (">= " if cut else "") + show(statistics.median(found))


def judge(bar: Bar, samples: Samples) -> tuple[str, str] | None:
    """What was measured for a bar, and whether it is met; None when it was not measured."""
    runs = samples.get(bar.case, {}).get(bar.label, [])
    numbers = values(runs, bar.column)
    if not numbers:
        return None
    pick = (min if bar.least else max) if bar.worst else statistics.median
    measured = pick(numbers)
    met = measured >= bar.limit if bar.least else measured <= bar.limit
    outcome = "met" if met else f"missed: {show(measured)} {bar.unit}".rstrip()
    return f"{cell(runs, bar.column)} {bar.unit}".rstrip(), outcome


def _bars(samples: Samples) -> Iterator[str]:
    yield "| bar | wanted | measured: median (min-max) | |"
    yield "|---|---|---|---|"
    for bar in BARS:
        judged = judge(bar, samples)
        if judged is not None:
            wanted = f"{'at least' if bar.least else 'at most'} {show(bar.limit)} {bar.unit}".rstrip()
            yield f"| {bar.claim} | {wanted} | {judged[0]} | {judged[1]} |"


def _case(name: str, by_label: dict[str, list[Sample]]) -> Iterator[str]:
    table = TABLES[name]
    columns = [column for column in table.columns if any(values(runs, column) for runs in by_label.values())]
    ours = by_label.get(OURS) if len(by_label) > 1 and name != "scale" else None
    yield f"## {table.title}"
    yield ""
    heads = " | ".join(table.columns[column] for column in columns)
    yield f"| | runs | {heads} |" + (f" times {OURS} |" if ours else "")
    yield "|---|---|" + "---|" * (len(columns) + bool(ours))
    for label, runs in by_label.items():
        cells = [cell(runs, column) for column in columns]
        if ours:
            cells.append("" if label == OURS else times_ours(ours, runs, columns[0]))
        yield f"| {label} | {len(runs)} | " + " | ".join(cells) + " |"
    yield ""


def markdown(result: dict[str, Any]) -> str:
    """The tables that are committed beside the samples."""
    samples: Samples = result["samples"]
    facts = result["machine"]
    loads = ", ".join(f"{name} {load}" for name, load in result["loads"].items())
    lines = [
        f"# Launching on many hosts, {result['date']}",
        "",
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gb']} GB, Linux {facts['kernel']}, "
        f"Python {facts['python']}; load before the first run {facts['load_1min']}, at the end "
        f"of each case {loads}. All hosts are on this one machine and share its cores.",
        "",
        *(f"- {name}: {version}" for name, version in result["versions"].items()),
        "",
        f"Command: `{result['command']}`, {result['took_s']:.0f} s. Ranks per host: {result['ranks']} on two hosts, "
        f"1 where a host is lost, {result['simulated_ranks']} (made up) on each simulated host. Numbers are medians "
        "with the range of all runs; the runs of all launchers are interleaved, the first round is thrown away, ratios "
        "are taken run by run. `>=`: it was not over when the benchmark stopped to wait. MB = 1,000,000 bytes. "
        "[How each number is taken](../README.md).",
        "",
        "## The bars",
        "",
        *_bars(samples),
        "",
    ]
    for name, by_label in samples.items():
        if by_label:
            lines += _case(name, by_label)
    if result["failures"]:
        lines += ["## Runs that failed", "", *(f"- {text}" for text in result["failures"]), ""]
    return "\n".join(lines)
