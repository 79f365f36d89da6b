"""From samples to what is committed: statistics, ratios run by run, the bars and how far from them, a table."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases import CASES, Sample

Samples = dict[str, dict[str, list[Sample]]]  # case -> label -> one sample a run
OURS = ("launcher --preload torch", "launcher")
FLOOD_DELAY_MS = 100.0  # "on time" for a line that comes every 50 ms: no later than the one after it is written


@dataclass(frozen=True)
class Bar:
    """A claim. ``peer`` None: our number against ``limit``; else how many times the peer's is ours, against it."""

    claim: str
    case: str
    ours: str
    column: str
    limit: float
    peer: str | None = None
    unit: str = ""


BARS = (
    Bar("first line of the last of 2 ranks", "first-line", "launcher", "last_ms", 60, unit="ms"),
    Bar("first line, ahead of torchrun", "first-line", "launcher", "last_ms", 20, "torchrun"),
    Bar("exit(3) of a rank to all gone", "exit", "launcher", "gone_ms", 20, unit="ms"),
    Bar("exit(3), ahead of torchrun", "exit", "launcher", "gone_ms", 30, "torchrun"),
    Bar("SIGKILL of a rank to all gone", "kill", "launcher", "gone_ms", 20, unit="ms"),
    Bar("SIGKILL, ahead of torchrun", "kill", "launcher", "gone_ms", 30, "torchrun"),
    Bar("launcher memory (USS)", "memory", "launcher", "uss_mb", 20, unit="MB"),
    Bar("launcher memory, below torchrun's", "memory", "launcher", "uss_mb", 10, "torchrun"),
    Bar("4 ranks with torch, ahead of torchrun", "import", OURS[0], "last_ms", 2.5, "torchrun"),
    Bar("private memory of 4 ranks, below torchrun's", "import", OURS[0], "ranks_uss_mb", 3, "torchrun"),
    Bar("flood: launcher's peak resident size", "flood", "launcher", "peak_rss_mb", 100, unit="MB"),
    Bar("flood: lines of the other rank that never came", "flood", "launcher", "missing_lines", 0),
    Bar("flood: other rank's lines, p99 of the delay", "flood", "launcher", "delay_p99_ms", FLOOD_DELAY_MS, unit="ms"),
)


def values(samples: list[Sample], column: str) -> list[float]:
    """The numbers of one column; runs that have none are left out."""
    return [sample[column] for sample in samples if column in sample]


def ratios(ours: list[Sample], peer: list[Sample], column: str) -> list[float]:
    """Peer's number over ours, run by run: the runs of one round share the state that the machine was in."""
    pairs = zip(values(ours, column), values(peer, column), strict=False)
    return [theirs / own for own, theirs in pairs if own > 0]


def show(value: float) -> str:
    """Three significant digits, no exponent; whole numbers (exit codes, counts) as such."""
    if value == int(value) or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def summary(numbers: list[float]) -> str:
    """Median, then the range."""
    if not numbers:
        return "-"
    median, least, most = (show(pick(numbers)) for pick in (statistics.median, min, max))
    return median if least == most else f"{median} ({least}-{most})"


def judge(bar: Bar, samples: Samples) -> tuple[str, str] | None:
    """What was measured for a bar, and whether it is met or by how much not; None when it was not measured."""
    case = samples.get(bar.case, {})
    ours = case.get(bar.ours, [])
    if bar.peer is None:
        numbers = values(ours, bar.column)
        if not numbers:
            return None
        measured = statistics.median(numbers)
        over = f"{measured / bar.limit - 1:.0%}" if bar.limit else show(measured)
        outcome = "met" if measured <= bar.limit else f"missed: {over} over"
        return f"{summary(numbers)} {bar.unit}", outcome
    numbers = ratios(ours, case.get(bar.peer, []), bar.column)
    if not numbers:
        return None
    measured = statistics.median(numbers)
    outcome = "met" if measured >= bar.limit else f"missed: {measured / bar.limit:.0%} of the way"
    return f"{summary(numbers)} x", outcome


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Hardware", "CPU implementer")):
            model = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e9, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def _bars(samples: Samples) -> Iterator[str]:
    yield "| bar | wanted | measured: median (min-max) | |"
    yield "|---|---|---|---|"
    for bar in BARS:
        judged = judge(bar, samples)
        if judged is None:
            continue
        wanted = f"at most {show(bar.limit)} {bar.unit}" if bar.peer is None else f"at least {bar.limit:g} x"
        yield f"| {bar.claim} | {wanted} | {judged[0]} | {judged[1]} |"


def _case(name: str, by_label: dict[str, list[Sample]]) -> Iterator[str]:
    case = CASES[name]
    columns = [column for column in case.columns if any(values(runs, column) for runs in by_label.values())]
    heads = [f"{case.columns[column][1]}{unit}" for column in columns for unit in [_unit(case.columns[column][0])]]
    base = next((label for label in OURS if label in by_label), None)
    yield f"## {case.title}"
    yield ""
    yield "| | runs | " + " | ".join(heads) + (f" | times {base} |" if base else " |")
    yield "|---|---|" + "---|" * (len(heads) + bool(base))
    for label, runs in by_label.items():
        cells = [summary(values(runs, column)) for column in columns]
        if base:
            cells.append("" if label == base else summary(ratios(by_label[base], runs, columns[0])))
        yield f"| {label} | {len(runs)} | " + " | ".join(cells) + " |"
    yield ""


def _unit(unit: str) -> str:
    return f", {unit}" if unit else ""


def markdown(result: dict[str, Any]) -> str:
    """The table that is committed beside the samples."""
    samples: Samples = result["samples"]
    facts = result["machine"]
    lines = [
        f"# Launchers on one host, {result['date']}",
        "",
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gb']} GB, Linux {facts['kernel']}, "
        f"Python {facts['python']}; load before the first run {facts['load_1min']}, after the last "
        f"{result['load_after']}.",
        "",
        *(f"- {name}: {version}" for name, version in result["versions"].items()),
        "",
        f"Command: `{result['command']}`. Numbers are medians with the range of all runs; the runs of all launchers "
        "are interleaved, the first round is thrown away, ratios are taken run by run. MB = 1,000,000 bytes. "
        "[How each number is taken](../README.md).",
        "",
        "## The bars",
        "",
        *_bars(samples),
        "",
    ]
    for name, by_label in samples.items():
        lines += _case(name, by_label)
    if result["failures"]:
        lines += ["## Runs that failed", "", *(f"- {text}" for text in result["failures"]), ""]
    return "\n".join(lines)


def invocation() -> str:
    """The command line of this benchmark, for the reader who wants to repeat it."""
    return " ".join(["python", "benchmarks/launch/run.py", *sys.argv[1:]])


def write(out: Path, result: dict[str, Any], text: str) -> None:
    """Writes ``OUT.json`` and ``OUT.md``, and prints the tables."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    out.with_suffix(".md").write_text(text)
    print(text)
    print(f"written: {out}.json and {out}.md", file=sys.stderr)
