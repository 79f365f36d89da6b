"""``bench collectives``: what it prints and draws. The numbers themselves are nobody's business here."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from launcher.collectives import plot
from launcher.collectives.bench import Cell, Report, draw, parse_sizes, run
from launcher.errors import OutputError, UsageError

SVG = "{http://www.w3.org/2000/svg}"


def bench(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher", "bench", *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=60, check=False)


def polylines(path: Path) -> list[list[tuple[float, float]]]:
    found = []
    for line in ElementTree.parse(path).getroot().iter(f"{SVG}polyline"):
        found.append([tuple(map(float, point.split(","))) for point in line.attrib["points"].split()])
    return found  # type: ignore[return-value]


def test_the_command_prints_a_table_and_draws_a_chart(tmp_path: Path) -> None:
    done = bench(tmp_path, "collectives", "--nproc", "2", "--sizes", "1K,64K")
    assert done.returncode == 0, done.stderr
    assert "2 ranks" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r" *(1|64) KiB ", line)]
    assert [row[:2] for row in rows] == [["1", "KiB"], ["64", "KiB"]]
    for name in ("any tensor", "registered", "memory limit"):
        assert name in done.stdout
    assert all(float(number.replace(",", "")) > 0 for row in rows for number in row[2:6])
    chart = tmp_path / "bench-collectives.svg"
    assert f"chart: {chart.name}" in done.stdout
    assert all(len(line) == 2 for line in polylines(chart))
    assert chart.with_suffix(".png").exists() == (importlib.util.find_spec("matplotlib") is not None)
    assert ("no PNG" in done.stderr) != chart.with_suffix(".png").exists()
    assert set(tmp_path.iterdir()) <= {chart, chart.with_suffix(".png")}, "a job tree was left behind"


def test_json_has_every_number(tmp_path: Path) -> None:
    done = bench(tmp_path, "collectives", "--json", "--nproc=2", "--sizes=4K", f"--output={tmp_path / 'here.svg'}")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ranks"] == 2 and found["files"][0] == str(tmp_path / "here.svg")
    cells = {cell["name"]: cell for cell in found["cells"]}
    assert {"any tensor", "registered", "memory limit"} <= set(cells)
    for cell in cells.values():
        assert cell["nbytes"] == 4096
        assert cell["gb_per_s"] == pytest.approx(4096 / cell["time_us"] / 1e3)
    for name, module in (("Gloo", "torch"), ("MPI", "mpi4py")):
        assert (name in cells) != (name in found["absent"])
        if importlib.util.find_spec(module) is None:
            assert module in found["absent"][name]


def test_as_a_library_call() -> None:
    report = run([1024], nproc=3, seconds=0.005, rounds=1, peers=())
    assert report.ranks == 3 and report.absent == {}
    assert report.names == ["any tensor", "registered", "memory limit"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "not 'nothing'"),
        (["collective"], "not 'collective'"),
        (["collectives", "train.py"], "'collectives train.py'"),
        (["collectives", "--sizes", "1K,65"], "'65' is no size"),
        (["collectives", "--nproc", "gpu"], "expected a number of ranks"),
        (["collectives", "--nproc", "1"], "expected 2 to 1024 ranks"),
        (["collectives", "--max-restarts", "2"], "--max-restarts has no meaning"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = bench(tmp_path, *arguments)
    assert done.returncode == 64 and said in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_sizes() -> None:
    assert parse_sizes("25M,1k, 64K,1024") == [1024, 65536, 25 << 20]
    for text in ("", "1K,", "-64", "1.5K", "17G", "K", "63"):
        with pytest.raises(UsageError, match="is no size"):
            parse_sizes(text)
    assert [plot.size_text(size) for size in (1024, 1536, 25 << 20, 1 << 30, 100)] == [
        "1 KiB",
        "1536 B",
        "25 MiB",
        "1 GiB",
        "100 B",
    ]


def report(**changes: object) -> Report:
    cells = tuple(
        Cell(name, size, size / rate / 1e3, rate)
        for name, rate in (("any tensor", 10.0), ("memory <limit>", 40.0))
        for size in (1024, 65536)
    )
    return Report(
        **{"ranks": 2, "cores": 2, "ping_ns": 41.6, "cells": cells, "absent": {"Gloo": "no torch"}, **changes}
    )


def test_the_table_of_a_report() -> None:
    text = report().table()
    assert "42 ns" in text and "Gloo: not measured: no torch" in text
    assert "share" not in text and "4 ranks share 2 cores" in report(ranks=4).table()
    partly = report(cells=report().cells[:3]).table()
    assert [line.split()[-2:] for line in partly.splitlines() if "64 KiB" in line] == [["-", "-"]]


def test_the_chart_is_well_formed_and_right(tmp_path: Path) -> None:
    files, _ = draw(report(), str(tmp_path / "chart"))
    slow, fast = polylines(Path(files[0]))
    assert slow[0][1] == slow[1][1] > fast[0][1], "a higher rate is higher up"
    assert slow[0][0] < slow[1][0]
    assert "memory <limit>" in [node.text for node in ElementTree.parse(files[0]).getroot().iter(f"{SVG}text")]


def test_an_empty_chart_is_one_too(tmp_path: Path) -> None:
    files, _ = draw(report(cells=()), str(tmp_path / "chart.svg"))
    assert polylines(Path(files[0])) == []


def test_a_chart_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="--output names another place"):
        draw(report(), str(tmp_path / "none" / "chart"))
