"""From samples to what is committed: the tables, the bars and whether they are met, the chart."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from bars import NO_RATIOS, RECORDS, UNITS, Outcome, Sample, by_round, outcomes, read
from contenders import OURS

_TITLES = {
    "small": "1,000,000 records of 1,024 bytes, batches of 256",
    "medium": "10,000 records of 102,400 bytes, batches of 64",
    "recordio": "1,000,000 protobufs of 1,064 bytes, batches of 256, unshuffled",
}
_ARRANGEMENTS = {"1c": "one rank pinned to one core", "2r": "two ranks, a core each"}


def number(value: float) -> str:
    """Three significant digits, no exponent."""
    magnitude = abs(value)
    if magnitude >= 1e6:
        return f"{value / 1e6:.3g} M"
    if magnitude >= 1000:
        return f"{value / 1e3:.3g} k"
    if value == int(value):
        return f"{value:.0f}"
    return f"{value:.0f}" if magnitude >= 100 else f"{value:.1f}" if magnitude >= 10 else f"{value:.2f}"


def span(values: Sequence[float]) -> str:
    """Median, and the range where there is one."""
    middle, least, most = (number(pick(values)) for pick in (statistics.median, min, max))
    return middle if least == most else f"{middle} ({least}-{most})"


def _title(table: str) -> str:
    name, _, arrangement = table.partition(", ")
    if name in _TITLES:
        return f"{name}, {_ARRANGEMENTS[arrangement]}: {_TITLES[name]}"
    return table


def _table(samples: Sequence[Sample], table: str) -> Iterator[str]:
    rounds = by_round(samples, table)
    unit, less = UNITS.get(table, RECORDS)
    labels = list(dict.fromkeys(sample.label for together in rounds.values() for sample in together))
    own = {turn: sample.value for turn, here in rounds.items() for sample in here if sample.label == OURS}
    own = {} if table in NO_RATIOS else own
    yield f"### {_title(table)}"
    yield ""
    yield f"| | {unit} |" + (f" {OURS} is better by |" if own else "")
    yield "|---|---|" + "---|" * bool(own)
    for label in labels:
        values = {turn: sample.value for turn, here in rounds.items() for sample in here if sample.label == label}
        cells = [span(list(values.values()))]
        if own:
            pairs = [(value, own[turn]) for turn, value in values.items() if turn in own and value > 0 < own[turn]]
            times = [value / ours if less else ours / value for value, ours in pairs]
            cells.append("" if label == OURS or not times else f"{span(times)} x")
        strong = "**" if label == OURS else ""
        yield f"| {strong}{label}{strong} | " + " | ".join(cells) + " |"
    yield ""


def _bar(outcome: Outcome) -> str:
    bar = outcome.bar
    unit, less = UNITS.get(bar.table, RECORDS)
    if not bar.against:
        sign, suffix = "<=" if less else ">=", f" {unit}"
    else:
        sign, suffix = ">=", " x"
    share = bool(bar.against) and bar.wanted < 1
    wanted = f"{bar.wanted:.0%}" if share else f"{bar.wanted:g}{suffix}"
    stretch = f"{bar.stretch:.0%}" if share else f"{bar.stretch:g}{suffix}"
    found = f"{outcome.measured:.0%}" if share else f"{span(outcome.values)}{suffix}"
    subject = bar.table if bar.ours == OURS else f"{bar.table}: {bar.ours}"
    limit = f"{number(outcome.limit)} x" if outcome.limit else ""
    cells = (subject, outcome.against or "-", f"{sign} {wanted}", stretch, found, limit, outcome.verdict)
    return f"| {' | '.join(cells)} |"


def markdown(result: Mapping[str, Any]) -> str:
    """The page that is committed beside the samples."""
    samples = read(result["samples"])
    facts, judged = result["machine"], outcomes(samples)
    met = sum(outcome.reaches(outcome.bar.wanted) for outcome in judged)
    stretched = sum(outcome.reaches(outcome.bar.stretch) for outcome in judged)
    lines = [
        f"# Data loading, {result['date']}",
        "",
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gb']} GB, Linux {facts['kernel']}, Python "
        f"{facts['python']}; load before {facts['load_1min']}, after {result['load_after']}; "
        f"{result['minutes']} minutes.",
        "",
        *(["**A quick run over a tenth of the data: to see that it works, not to be quoted.**", ""] * result["quick"]),
        *(f"- {label}: {version}" for label, version in result["versions"].items()),
        *(f"- {label}: not measured: {why}" for label, why in result["absent"].items()),
        "",
        f"Command: `{result['command']}`. Numbers are medians over {result['rounds']} rounds with their range; ratios "
        "are taken within a round, against the best setting of the peer in that round. "
        "[How each number is taken](../README.md).",
        "",
    ]
    if judged:
        lines += [
            "## The bars",
            "",
            f"{met} of {len(judged)} are met, {stretched} with the stretch.",
            "",
            "| table | against | wanted | stretch | measured | the floor reaches | |",
            "|---|---|---|---|---|---|---|",
            *map(_bar, judged),
            "",
        ]
    lines += [f"![records a second](./{result['name']}.svg)", "", "## All numbers", ""]
    for table in dict.fromkeys(sample.table for sample in samples):
        lines += _table(samples, table)
    if result["failures"]:
        lines += ["## What failed", "", *(f"- {text}" for text in result["failures"]), ""]
    return "\n".join(lines)


_WIDTH, _NAMES, _ROW, _HEAD = 900, 200, 16, 34


def _medians(samples: Sequence[Sample], table: str) -> dict[str, float]:
    """By label, of the better setting of each peer only, largest first."""
    best: dict[str, tuple[float, str]] = {}
    values: dict[str, list[float]] = {}
    peers = {}
    for together in by_round(samples, table).values():
        for sample in together:
            values.setdefault(sample.label, []).append(sample.value)
            peers[sample.label] = sample.peer
    for label, found in values.items():
        middle = statistics.median(found)
        best[peers[label]] = max(best.get(peers[label], (0.0, "")), (middle, label))
    return {label: middle for middle, label in sorted(best.values(), reverse=True)}


def charted(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """What the chart shows: title -> label -> records a second."""
    names = [f"{name}, {arrangement}" for name in _TITLES for arrangement in _ARRANGEMENTS]
    return {_title(name): found for name in names if (found := _medians(samples, name))}


def svg(charts: Mapping[str, Mapping[str, float]]) -> str:
    """Bars of records a second, from nothing on: lengths are comparable within a chart."""
    rows = sum(len(chart) for chart in charts.values())
    height = 20 + rows * _ROW + len(charts) * _HEAD
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-family="sans-serif">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
    ]
    at = 10
    for title, chart in charts.items():
        lines.append(f'<text x="10" y="{at + 18}" font-size="13" font-weight="bold">{escape(title)}</text>')
        at += _HEAD - 6
        most = max(chart.values())
        for label, value in chart.items():
            colour = "#d55e00" if label.startswith(OURS) else "#999999" if label.startswith("floor") else "#0072b2"
            width = max(1.0, value / most * (_WIDTH - _NAMES - 90))
            lines += [
                f'<text x="{_NAMES - 6}" y="{at + 12}" font-size="11" text-anchor="end">{escape(label)}</text>',
                f'<rect x="{_NAMES}" y="{at + 2}" width="{width:.1f}" height="{_ROW - 4}" fill="{colour}"/>',
                f'<text x="{_NAMES + width + 5:.1f}" y="{at + 12}" font-size="11">{number(value)}/s</text>',
            ]
            at += _ROW
        at += 6
    return "\n".join([*lines, "</svg>", ""])


def png(path: Path, charts: Mapping[str, Mapping[str, float]]) -> bool:
    """The same as a picture; False where there is no matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("agg")
    from matplotlib import pyplot

    heights = [len(chart) + 1.5 for chart in charts.values()]
    figure, axes = pyplot.subplots(
        len(charts), 1, figsize=(9, 0.22 * sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axis, (title, chart) in zip(axes[:, 0], charts.items(), strict=True):
        labels = list(chart)[::-1]
        colours = [
            "#d55e00" if label.startswith(OURS) else "#999999" if label.startswith("floor") else "#0072b2"
            for label in labels
        ]
        drawn = axis.barh(labels, [chart[label] for label in labels], color=colours)
        axis.bar_label(drawn, [f" {number(chart[label])}/s" for label in labels], fontsize=7)
        axis.set_title(title, fontsize=9, loc="left")
        axis.tick_params(labelsize=7)
        axis.set_xticks([])
        axis.margins(x=0.15)
        for side in ("top", "right", "bottom"):
            axis.spines[side].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def chart(result: Mapping[str, Any], out: Path) -> None:
    """Writes OUT.svg, and OUT.png where that can be."""
    charts = charted(read(result["samples"]))
    if charts:
        out.with_suffix(".svg").write_text(svg(charts))
        png(out.with_suffix(".png"), charts)
