"""Measure the images: what the launcher adds to one, and a container's cold start.

    python benchmarks/images/run.py [--runs 15] [--out benchmarks/images/results/<date>]

See README.md in this directory for what is measured and how.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path += [str(ROOT / "tests"), str(HERE.parent / "launch")]  # what they have serves here too

from containers.engine import CommandFailed, Engine, Unavailable, base_image, build, find_engine  # noqa: E402
from report import machine  # noqa: E402

SCRIPT = "import time\nprint('first line', time.monotonic(), flush=True)\n"
CONFIGURATION = {
    "resourceconfig.json": {"current_host": "algo-1", "hosts": ["algo-1"], "network_interface_name": "lo"},
    "hyperparameters.json": {"sagemaker_program": '"train.py"', "sagemaker_submit_directory": '"/opt/ml/code"'},
    "inputdataconfig.json": {},
}
# The host has the name of the configuration, as on the platform: the reference waits for it to be known.
_OPTIONS = ("--rm", "--network", "none", "--hostname", "algo-1")
PLAIN, OURS, REFERENCE = "python train.py", "launcher", "sagemaker-training"


def make_tree(base: Path) -> None:
    """A job tree with the script."""
    config = base / "input" / "config"
    config.mkdir(parents=True)
    for name in ("code", "model", "output/data", "checkpoints", "input/data"):
        (base / name).mkdir(parents=True, exist_ok=True)
    for name, content in CONFIGURATION.items():
        (config / name).write_text(json.dumps(content))
    (base / "code" / "train.py").write_text(SCRIPT)


def first_line_ms(engine: Engine, tree: Path, image: str, *words: str) -> float:
    """Milliseconds from the engine's start of a container to the script's first line; the clock is the kernel's."""
    began_s = time.monotonic()
    output = engine("run", *_OPTIONS, "--volume", f"{tree}:/opt/ml", *words[:-1], image, words[-1])
    line = next(line for line in output.splitlines() if "first line" in line)
    return (float(line.split()[-1]) - began_s) * 1000


def cold(drop: bool) -> None:
    """Forgets all that is cached of files, where this is asked for."""
    if drop:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")


def span(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f}-{max(values):.0f})" if values else "-"


def measure(engine: Engine, images: dict[str, str], runs: int, drop_caches: bool) -> dict[str, dict[str, list[float]]]:
    """Milliseconds to the first line, by way and contender; runs interleaved, the first round thrown away."""
    ways: dict[str, Callable[[Path], float]] = {
        PLAIN: lambda tree: first_line_ms(
            engine, tree, images["train"], "--entrypoint", "python", "/opt/ml/code/train.py"
        ),
        OURS: lambda tree: first_line_ms(engine, tree, images["train"], "train"),
    }
    if REFERENCE in images:
        ways[REFERENCE] = lambda tree: first_line_ms(engine, tree, images[REFERENCE], "--entrypoint", "train", "train")
    times: dict[str, dict[str, list[float]]] = {}
    for title, drop in (("files in the page cache", False), ("nothing cached", True)):
        if drop and not drop_caches:
            continue
        times[title] = {name: [] for name in ways}
        for number in range(runs + 1):
            for name, act in ways.items():
                with tempfile.TemporaryDirectory(prefix="tree-") as directory:
                    tree = Path(directory, "ml")
                    make_tree(tree)
                    cold(drop)
                    taken = act(tree)
                if number:
                    times[title][name].append(taken)
        print(f"  {title}: done", file=sys.stderr)
    return times


def markdown(result: dict[str, Any]) -> str:
    """What is committed for people."""
    about = result["machine"]
    lines = [
        f"# Images, {result['date']}",
        "",
        f"{about['cpu']}, {about['cores']} cores, {about['memory_gb']} GB, Linux {about['kernel']}; "
        f"{result['engine']}; base image: {result['base']}.",
        "",
        f"Command: `{result['command']}`. MB = 1,000,000 bytes, uncompressed. "
        "[How each number is taken](../README.md).",
        "",
        "| image | its own layer, MB | whole image without a framework, MB |",
        "|---|---|---|",
    ]
    for name, size in result["sizes"].items():
        lines.append(f"| {name} | {size['layer'] / 1e6:.1f} | {size['image'] / 1e6:.0f} |")
    for title, times in result["first_line_ms"].items():
        lines += [
            "",
            f"## Start of a container to the script's first line, {title}: median (range) of {result['runs']}, ms",
            "",
            "| | ms | more than python train.py, ms |",
            "|---|---|---|",
        ]
        for name, values in times.items():
            more = [a - b for a, b in zip(values, times[PLAIN], strict=True)]
            lines.append(f"| {name} | {span(values)} | {'' if name == PLAIN else span(more)} |")
    if result["absent"]:
        lines += ["", *(f"Not measured: {line}" for line in result["absent"])]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Build, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15, help="counted runs of each (default 15)")
    parser.add_argument("--drop-caches", action="store_true", help="also with nothing in the page cache (as root)")
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    args = parser.parse_args()
    date = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    try:
        engine = find_engine(install=False)
        base = base_image(engine)
    except Unavailable as reason:
        print(f"not measured: {reason}")
        return
    about = machine()
    images = {name: build(engine, name, base) for name in ("train", "serve", "combined")}
    absent = []
    try:
        images[REFERENCE] = engine.build(
            HERE / "reference.Dockerfile", "localhost/launcher-bench-reference", ROOT, BASE_IMAGE=base
        )
    except CommandFailed as error:
        absent.append(f"{REFERENCE}: its image can not be built: {str(error).strip().splitlines()[-1]}")
    sizes = {
        name: {"layer": engine.layer_bytes(image), "image": engine.inspect(image)["Size"]}
        for name, image in images.items()
    }
    result = {
        "date": date,
        "machine": about,
        "engine": engine("--version").strip(),
        "base": base,
        "command": " ".join(["python", "benchmarks/images/run.py", *sys.argv[1:]]),
        "runs": args.runs,
        "sizes": sizes,
        "first_line_ms": measure(engine, images, args.runs, args.drop_caches),
        "absent": absent,
    }
    text = markdown(result)
    print(text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
