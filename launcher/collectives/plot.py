"""A chart of bandwidth over message size, as SVG text; as a PNG picture too where matplotlib is installed."""

from __future__ import annotations

import importlib
import math

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 860, 480
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 220, 48, 56
# Okabe and Ito's colours, which most colour-blind people can tell apart, and two more.
_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#8a6d00",
    "#6a3d9a",
    "#444444",
    "#a0522d",
)
_DASHES = ("", "6 3", "2 3")


def size_text(nbytes: float) -> str:
    """``65536`` as ``64 KiB``: the largest unit that leaves a whole number."""
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if nbytes >= 1 << shift and nbytes % (1 << shift) == 0:
            return f"{int(nbytes) >> shift} {unit}"
    return f"{nbytes:g} B"


def svg(title: str, series: Mapping[str, Points], *, strong: Sequence[str] = (), limits: Sequence[str] = ()) -> str:
    """A chart with both axes logarithmic.

    Args:
        series: name -> points (message size in bytes, bandwidth in GB/s), both above 0, in the order of the legend.
        strong: names that are drawn with a thicker line.
        limits: names that are drawn in grey, dashed: what the machine gives.

    Returns:
        The text of an SVG document.
    """
    xs = sorted({x for points in series.values() for x, _ in points}) or [1.0, 2.0]
    ys = [y for points in series.values() for _, y in points] or [1.0]
    low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))
    high = max(high, low + 1)
    first, last = math.log2(xs[0]), max(math.log2(xs[-1]), math.log2(xs[0]) + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log2(x) - first) / (last - first)
        up = (math.log10(y) - low) / (high - low)
        return (
            round(_LEFT + across * (_WIDTH - _LEFT - _RIGHT), 1),
            round(_HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM), 1),
        )

    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="24" font-size="15" font-weight="bold">{_escaped(title)}</text>',
    ]
    for decade in range(low, high + 1):
        for step in (1, 2, 5) if decade < high and high - low <= 3 else (1,):
            value = step * 10.0**decade
            _, y = at(xs[0], value)
            grey = "#bbbbbb" if step == 1 else "#e6e6e6"
            out.append(f'<line x1="{_LEFT}" y1="{y}" x2="{right}" y2="{y}" stroke="{grey}"/>')
            out.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{value:g}</text>')
    shown = -math.inf
    for x in xs:
        place, _ = at(x, 10.0**low)
        out.append(f'<line x1="{place}" y1="{_TOP}" x2="{place}" y2="{bottom}" stroke="#e6e6e6"/>')
        if place - shown >= 52:  # else the texts would run into each other
            out.append(f'<text x="{place}" y="{bottom + 18}" text-anchor="middle">{size_text(x)}</text>')
            shown = place
    middle = (_TOP + bottom) // 2
    out.append(f'<text x="{(_LEFT + right) // 2}" y="{_HEIGHT - 12}" text-anchor="middle">message size</text>')
    turned = f'text-anchor="middle" transform="rotate(-90 18 {middle})"'
    out.append(f'<text x="18" y="{middle}" {turned}>message / time, GB/s</text>')
    for number, (name, points) in enumerate(series.items()):
        colour, dash, width = _style(number, name in limits, name in strong)
        places = [at(x, y) for x, y in sorted(points)]
        line = " ".join(f"{x},{y}" for x, y in places)
        pattern = f' stroke-dasharray="{dash}"' if dash else ""
        drawn = f'fill="none" stroke="{colour}" stroke-width="{width}"{pattern}'
        out.append(f'<polyline points="{line}" {drawn}/>')
        out += [f'<circle cx="{x}" cy="{y}" r="{width + 0.8}" fill="{colour}"/>' for x, y in places]
        y = _TOP + 6 + 20 * number
        out.append(f'<line x1="{right + 14}" y1="{y}" x2="{right + 42}" y2="{y}" {drawn}/>')
        weight = ' font-weight="bold"' if name in strong else ""
        out.append(f'<text x="{right + 48}" y="{y + 4}"{weight}>{_escaped(name)}</text>')
    return "\n".join([*out, "</svg>", ""])


def png(
    path: str, title: str, series: Mapping[str, Points], *, strong: Sequence[str] = (), limits: Sequence[str] = ()
) -> bool:
    """The same chart as a picture; False, and no file, where matplotlib is not installed. Raises OSError."""
    try:
        matplotlib = importlib.import_module("matplotlib")
        matplotlib.use("Agg")
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        return False
    figure, axes = pyplot.subplots(figsize=(10, 5.6))
    sizes = sorted({x for points in series.values() for x, _ in points})
    for number, (name, points) in enumerate(series.items()):
        colour, dash, width = _style(number, name in limits, name in strong)
        marks = [float(part) for part in dash.split()]
        style = (0, tuple(marks)) if marks else "-"
        xs, ys = [x for x, _ in sorted(points)], [y for _, y in sorted(points)]
        axes.plot(xs, ys, color=colour, linestyle=style, linewidth=width, marker="o", markersize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [size_text(size) for size in sizes], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel("message size")
    axes.set_ylabel("message / time, GB/s")
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
    axes.grid(color="#dddddd")
    if series:
        axes.legend(bbox_to_anchor=(1.01, 1), loc="upper left", frameon=False, fontsize=9)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=110)
    finally:
        pyplot.close(figure)
    return True


def _style(number: int, limit: bool, strong: bool) -> tuple[str, str, float]:
    if limit:
        return "#888888", "8 4", 1.5
    return _COLOURS[number % len(_COLOURS)], _DASHES[number // len(_COLOURS) % len(_DASHES)], 3.0 if strong else 1.5


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
