"""From samples to what is committed: the tables, the bars and whether they are met, the charts."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rivals import GLOO, HOROVOD, LIMIT, OURS, PEERS, REGISTERED, TUNED, UNPINNED
from statistic import (
    HOSTS,
    TWO,
    Key,
    Measured,
    Outcome,
    Round,
    best_peer,
    median_of,
    outcomes,
    peer_median,
    ratio,
)

from launcher.collectives import plot

MODES = {"fresh": "each buffer rewritten before each call", "hot": "back to back on the same buffer"}
# In the cases through torch: the step without the others, and which of ours is held against whom.
ALONE = "no communication"
OURS_AGAINST = {
    "launcher": (GLOO, HOROVOD),
    "launcher, bucket views": (f"{GLOO}, bucket views",),
    "launcher.horovod": (HOROVOD,),
}


def number(value: float) -> str:
    """Three significant digits, no exponent."""
    magnitude = abs(value)
    if magnitude >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if magnitude >= 100 else f"{value:.1f}" if magnitude >= 10 else f"{value:.2f}"


def span(values: Sequence[float]) -> str:
    """Median, and the range where there is one."""
    middle, least, most = (number(pick(values)) for pick in (statistics.median, min, max))
    return middle if least == most else f"{middle} ({least}-{most})"


def _cells(measured: Measured, phase: str) -> dict[tuple[str, str], list[Key]]:
    found: dict[tuple[str, str], list[Key]] = {}
    for key in measured:
        if key[0] == phase:
            found.setdefault((key[1], key[2]), []).append(key)
    return found


def _table(measured: Measured, keys: Sequence[Key], state: str) -> Iterator[str]:
    columns: list[list[Round]] = [measured.rounds(key, state) for key in keys]
    labels = list(dict.fromkeys(label for rounds in columns for one in rounds for label in one.by_label))
    yield "| us | " + " | ".join(plot.size_text(key[3]) for key in keys) + " |"
    yield "|---|" + "---|" * len(keys)
    best = [best_peer(rounds) for rounds in columns]
    for label in labels:
        cells = []
        for rounds in columns:
            middle = median_of(rounds, label)
            cells.append("-" if middle is None else number(middle))
        yield f"| {label} | " + " | ".join(cells) + " |"
    yield "| *best peer* | " + " | ".join(f"*{name or '-'}*" for name in best) + " |"
    for label in (OURS, REGISTERED):
        if label in labels:
            found = [ratio(rounds, label, peer) for rounds, peer in zip(columns, best, strict=True)]
            cells = [f"{number(statistics.median(values))} x" if values else "-" for values in found]
            yield f"| **{label}: times the best peer** | " + " | ".join(f"**{cell}**" for cell in cells) + " |"
            share = [ratio(rounds, label, LIMIT) for rounds in columns]
            if any(share):
                cells = [f"{statistics.median(values):.0%}" if values else "-" for values in share]
                yield f"| {label}: share of the limit | " + " | ".join(cells) + " |"


def _phase(measured: Measured, phase: str) -> Iterator[str]:
    for (dtype, mode), keys in _cells(measured, phase).items():
        for state in measured.states(phase):
            counts = [len(measured.rounds(key, state)) for key in keys]
            if not any(counts):
                continue
            pings = [ping for key in keys for one in measured.rounds(key, state) for ping in one.pings]
            yield f"### {phase}, {dtype}, {mode} buffers, cores {state}"
            yield ""
            yield (
                f"{MODES[mode][:1].upper()}{MODES[mode][1:]}; ping-pong {span(pings)} ns one-way; rounds a column: "
                f"{', '.join(map(str, counts))}."
            )
            yield ""
            yield from _table(measured, [key for key, count in zip(keys, counts, strict=True) if count], state)
            yield ""


def _bar(outcome: Outcome) -> str:
    bar, (phase, dtype, mode, size) = outcome.bar, outcome.bar.key
    middle = statistics.median(outcome.values)
    if bar.limit_us:
        wanted, found, against = f"<= {bar.limit_us:g} us", f"{span(outcome.values)} us", ""
    elif bar.peers == (LIMIT,):
        wanted, found, against = f">= {bar.wanted:.0%}", f"{middle:.0%}", "the limit"
    else:
        wanted, found, against = f">= {bar.wanted:g} x", f"{span(outcome.values)} x", outcome.against
        if bar.peers == PEERS:
            against = f"best peer: {against}"
    verdict = "met" if outcome.met else "**not met**"
    what = f"{phase}, {dtype}, {mode}, {plot.size_text(size)}"
    return f"| {what} | {bar.ours} | {outcome.state} | {against} | {wanted} | {found} | {verdict} |"


def _bars(found: Sequence[Outcome]) -> Iterator[str]:
    yield "| cell | ours | cores | against | wanted | measured | |"
    yield "|---|---|---|---|---|---|---|"
    for outcome in found:
        yield _bar(outcome)


def _training(
    samples: Sequence[Mapping[str, Any]], wanted: Mapping[str, float], limits_us: Mapping[str, float]
) -> Iterator[str]:
    """Times by case; ``wanted`` is how many times as fast as each peer one is to be, ``limits_us`` how long at most."""
    for case in dict.fromkeys(sample["case"] for sample in samples):
        here = [sample for sample in samples if sample["case"] == case]
        by_label: dict[str, dict[int, float]] = {}
        for sample in here:
            by_label.setdefault(sample["label"], {})[sample["round"]] = sample["median_us"]
        yield f"### {case}"
        yield ""
        yield f"{here[0]['about']} Ping-pong {span([ping for one in here for ping in one['ping_ns']])} ns one-way."
        yield ""
        own, floor = by_label.get("launcher", {}), by_label.get(ALONE, {})
        yield "| | us |" + " more than without communication, us |" * bool(floor) + " times this project's |"
        yield "|---|---|" + "---|" * bool(floor) + "---|"
        for label, values in by_label.items():
            extra = [value - floor[turn] for turn, value in values.items() if turn in floor]
            cells = [span(list(values.values()))]
            if floor:
                cells.append("" if label == ALONE or not extra else number(statistics.median(extra)))
            times = [value / own[turn] for turn, value in values.items() if turn in own]
            cells.append("" if label in ("launcher", ALONE) or not times else f"{span(times)} x")
            yield f"| {label} | " + " | ".join(cells) + " |"
        yield ""
        yield from _step_bars(here, by_label, wanted.get(case, 0.0))
        if own and case in limits_us:
            middle = statistics.median(own.values())
            verdict = "met" if middle <= limits_us[case] else "**not met**"
            yield f"- bar: at most {limits_us[case]:g} us: {span(list(own.values()))} us, {verdict}"
        yield ""


def _step_bars(
    samples: Sequence[Mapping[str, Any]], by_label: Mapping[str, Mapping[int, float]], wanted: float
) -> Iterator[str]:
    """Ours against each peer's better setting in each round; against Horovod also by the same interface."""
    pairs = [(ours, peer) for ours, peers in OURS_AGAINST.items() for peer in peers]
    for ours, peer in pairs if wanted else ():
        labels = {one["label"] for one in samples if one["peer"] == peer}
        times = [
            min(by_label[label][number] for label in labels if number in by_label[label]) / value
            for number, value in by_label.get(ours, {}).items()
            if any(number in by_label[label] for label in labels)
        ]
        if times:
            verdict = "met" if statistics.median(times) >= wanted else "**not met**"
            yield f"- bar: {ours} {wanted:g} x against {peer} in its better setting: {span(times)} x, {verdict}"


def _once(versions: Mapping[str, str]) -> dict[str, str]:
    """A library in another setting is the same library."""
    return {label: version for label, version in versions.items() if not label.endswith((TUNED, UNPINNED))}


def markdown(result: Mapping[str, Any], wanted: Mapping[str, float], limits_us: Mapping[str, float]) -> str:
    """The page that is committed beside the samples."""
    measured = Measured(result["samples"])
    facts, judged = result["machine"], outcomes(measured)
    met = sum(outcome.met for outcome in judged)
    lines = [
        f"# Collectives, {result['date']}",
        "",
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gb']} GB, Linux {facts['kernel']}, Python "
        f"{facts['python']}; load before {facts['load_1min']}, after {result['load_after']}; "
        f"{result['minutes']} minutes.",
        "",
        *(f"- {label}: {version}" for label, version in _once(result["versions"]).items()),
        *(f"- {label}: not measured: {why}" for label, why in result["absent"].items()),
        "",
        f"Command: `{result['command']}`. Times are medians over the rounds of medians over the calls, of the slower "
        "rank; ratios are taken within a round, against the peer's better setting in that round. "
        "[How each number is taken](../README.md).",
        "",
    ]
    if judged:
        lines += [
            "## The bars",
            "",
            f"{met} of {len(judged)} are met; those through torch are further below.",
            "",
            *_bars(judged),
            "",
        ]
    if any(sample["phase"] == TWO for sample in result["samples"]):
        lines += [f"![bandwidth over size](./{result['name']}.svg)", ""]
    for phase in dict.fromkeys(key[0] for key in measured):
        lines += [f"## {phase[:1].upper()}{phase[1:]}", ""]
        if phase == HOSTS:
            lines += [result["network"], ""]
        lines += _phase(measured, phase)
    if result["training"]:
        lines += ["## Through torch", "", *_training(result["training"], wanted, limits_us)]
    if result["failures"]:
        lines += ["## What failed", "", *(f"- {text}" for text in result["failures"]), ""]
    return "\n".join(lines)


def chart(result: Mapping[str, Any], out: Path) -> list[Path]:
    """Writes the chart of two ranks, float32, fresh buffers, in the state that occurred most; the files made."""
    measured = Measured(result["samples"])
    keys = _cells(measured, TWO).get(("float32", "fresh"), [])
    counts = {state: sum(len(measured.rounds(key, state)) for key in keys) for state in measured.states(TWO)}
    if not counts:
        return []
    state = max(counts, key=lambda name: counts[name])
    series: dict[str, list[tuple[float, float]]] = {}
    for name in (REGISTERED, OURS, *PEERS, LIMIT):
        for key in keys:
            if (time_us := peer_median(measured.rounds(key, state), name)) is not None:
                series.setdefault(name, []).append((float(key[3]), key[3] / time_us / 1e3))
    title = f"Allreduce of float32, 2 ranks, fresh buffers, cores {state}"
    how: dict[str, Any] = {"strong": (OURS, REGISTERED), "limits": (LIMIT,)}
    out.with_suffix(".svg").write_text(plot.svg(title, series, **how))
    made = [out.with_suffix(".svg")]
    if plot.png(str(out.with_suffix(".png")), title, series, **how):
        made.append(out.with_suffix(".png"))
    return made
