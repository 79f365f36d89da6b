"""Measure this launcher against torchrun, accelerate launch and mpirun, in one run on one machine.

    python benchmarks/launch/run.py [--runs 15] [--out benchmarks/launch/results/<date>]

See README.md in this directory for what is measured and how.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from cases import CASES, Case, Sample, Variant
from contenders import MAKERS, find_contenders
from jobs import RunFailed
from report import Samples, invocation, machine, markdown, write

RESULTS = Path(__file__).resolve().parent / "results"
QUICK_RUNS = 3


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15, help="counted runs of each launcher in each case (default 15)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_RUNS} runs: to see that it works, not to publish")
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated (default: all): " + ", ".join(CASES))
    parser.add_argument("--contenders", default=",".join(MAKERS), help="comma-separated: " + ", ".join(MAKERS))
    parser.add_argument(
        "--out", type=Path, help="writes OUT.json and OUT.md (default: results/<date> beside this file)"
    )
    args = parser.parse_args()
    args.cases = [name for name in args.cases.split(",") if name]
    args.contenders = [name for name in args.contenders.split(",") if name]
    for given, known in ((args.cases, CASES), (args.contenders, MAKERS)):
        unknown = [name for name in given if name not in known]
        if unknown:
            parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    if args.runs < 1:
        parser.error("--runs must be at least 1")
    if args.quick:
        args.runs = QUICK_RUNS
    today = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    args.out = args.out or RESULTS / today
    if args.out.suffix in {".json", ".md"}:
        args.out = args.out.with_suffix("")
    args.date = today
    return args


def measure_case(
    case: Case, variants: list[Variant], runs: int, scratch: Path, failures: list[str]
) -> dict[str, list[Sample]]:
    """Run all variants in turn, one uncounted round first. A variant that fails twice is not tried again."""
    samples: dict[str, list[Sample]] = {variant.label: [] for variant in variants}
    failed = dict.fromkeys(samples, 0)
    for number in range(runs + 1):
        for variant in variants:
            limit = min(runs, QUICK_RUNS) if variant.label in case.few_runs else runs
            if failed[variant.label] >= 2 or number > limit:
                continue
            gc.collect()
            try:
                sample = case.measure(variant, scratch)
            except RunFailed as error:
                failed[variant.label] += 1
                failures.append(f"{case.name}, {variant.label}, run {number}: {error}")
                print(f"  {variant.label}: failed: {error}", file=sys.stderr, flush=True)
                continue
            if number > 0:
                samples[variant.label].append(sample)
        print(
            f"  {case.name}: round {number} of {runs}" + " (not counted)" * (number == 0), file=sys.stderr, flush=True
        )
    return {label: found for label, found in samples.items() if found}


def main() -> None:
    """Measure, write both files, print the table."""
    args = parse_arguments()
    contenders = find_contenders(args.contenders)
    failures: list[str] = []
    result: dict[str, Any] = {
        "date": args.date,
        "command": invocation(),
        "runs": args.runs,
        "machine": machine(),
        "versions": {contender.name: contender.version for contender in contenders},
        "commands": {},
    }
    samples: Samples = {}
    with tempfile.TemporaryDirectory(prefix="lb-") as folder:  # a short name: UNIX sockets go below it
        scratch = Path(folder)
        for name in args.cases:
            case = CASES[name]
            variants = case.variants(contenders)
            result["commands"][name] = {
                variant.label: [
                    "python"
                    if part == sys.executable
                    else part.rpartition("/")[2]
                    if part.endswith("/mpirun")
                    else part
                    for part in variant.command(4 if name == "import" else 2, Path("SCRIPT"))
                ]
                for variant in variants
            }
            print(case.title, file=sys.stderr, flush=True)
            samples[name] = measure_case(case, variants, args.runs, scratch, failures)
    result["load_after"] = round(os.getloadavg()[0], 2)
    result["medians"] = {
        name: {
            label: {
                column: statistics.median(found)
                for column in CASES[name].columns
                if (found := [run[column] for run in runs if column in run])
            }
            for label, runs in by_label.items()
        }
        for name, by_label in samples.items()
    }
    result |= {"failures": failures, "samples": samples}
    write(args.out, result, markdown(result))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
