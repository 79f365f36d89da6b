"""Measure jobs on several hosts: this launcher against torchrun and mpirun on two, and its leader against thousands.

    python benchmarks/cluster/run.py [--runs 15] [--out benchmarks/cluster/results/<date>]

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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
sys.path.append(str(_HERE.parent / "launch"))  # jobs.py and report.py of the benchmark on one host serve here too

import two_hosts  # noqa: E402
from jobs import RunFailed  # noqa: E402
from peers import MAKERS, Peer, Request, find_peers  # noqa: E402
from report import machine, write  # noqa: E402
from scale import scale, sizes_here  # noqa: E402
from stage import Stage, load_netns  # noqa: E402
from tables import TABLES, Sample, Samples, markdown, values  # noqa: E402

QUICK_RUNS = 3
IDLE_RUNS = 3  # of a simulated cluster; each takes some seconds more
LOSS_RUNS = 1  # of a launcher that never notices: each takes the whole cap

Measure = Callable[[int], Sample]  # number of the run -> its sample


class Variant:
    """Who or what is measured in a case, and in how many of the runs."""

    def __init__(self, label: str, measure: Measure, runs: int) -> None:
        self.label, self.measure, self.runs = label, measure, runs


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15, help="counted runs of each launcher in each case (default 15)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_RUNS} runs: to see that it works, not to publish")
    parser.add_argument(
        "--cases", default=",".join(TABLES), help="comma-separated (default: all): " + ", ".join(TABLES)
    )
    parser.add_argument("--contenders", default=",".join(MAKERS), help="comma-separated: " + ", ".join(MAKERS))
    parser.add_argument("--ranks", type=int, default=2, help="ranks on each of the two hosts (default 2)")
    parser.add_argument("--hosts", default="2,16,128,1024,4096", help="sizes of the simulated clusters")
    parser.add_argument("--simulated-ranks", type=int, default=8, help="ranks of a simulated host (default 8)")
    parser.add_argument("--secret", action="store_true", help="give the simulated hosts a secret (they have none)")
    parser.add_argument(
        "--cap", type=float, default=5.0, metavar="S", help="how long a failed job may run on (default 5 s)"
    )
    parser.add_argument(
        "--loss-cap", type=float, default=20.0, metavar="S", help="the same where a host is lost (default 20 s)"
    )
    parser.add_argument(
        "--profile", default="", metavar="FILE", help="what cProfile finds in the last leader of `scale`"
    )
    parser.add_argument(
        "--out", type=Path, help="writes OUT.json and OUT.md (default: results/<date> beside this file)"
    )
    args = parser.parse_args()
    args.cases = [name for name in args.cases.split(",") if name]
    args.contenders = [name for name in args.contenders.split(",") if name]
    args.hosts = [int(size) for size in args.hosts.split(",") if size]
    for given, known in ((args.cases, TABLES), (args.contenders, MAKERS)):
        unknown = [name for name in given if name not in known]
        if unknown:
            parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    if min([args.runs, args.ranks, args.simulated_ranks, *(size - 1 for size in args.hosts)]) < 1:
        parser.error("--runs, --ranks and --simulated-ranks must be at least 1, --hosts at least 2")
    if args.quick:
        args.runs = QUICK_RUNS
    today = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    args.out = args.out or _HERE / "results" / today
    if args.out.suffix in {".json", ".md"}:
        args.out = args.out.with_suffix("")
    args.date = today
    return args


def variants_of(
    name: str, args: argparse.Namespace, peers: dict[str, Peer], stage: Stage | None, scratch: Path
) -> list[Variant]:
    """Who is measured in a case."""
    if name == "scale":
        return [_simulated(size, args, scratch) for size in sizes_here(args.hosts)]
    assert stage is not None
    mpi = {label: peer for label, peer in peers.items() if label == "launcher-mpi"}
    others = {label: peer for label, peer in peers.items() if label not in mpi}
    return [_on_hosts(name, args, label, peer, stage) for label, peer in (mpi if name == "mpi-end" else others).items()]


def _simulated(size: int, args: argparse.Namespace, scratch: Path) -> Variant:
    def measure(number: int) -> Sample:
        return scale(scratch, size, args.simulated_ranks, args.secret, 0 < number <= IDLE_RUNS, args.profile)

    return Variant(f"{size} hosts", measure, args.runs)


def _on_hosts(name: str, args: argparse.Namespace, label: str, peer: Peer, stage: Stage) -> Variant:
    ours = label == "launcher"

    def measure(number: int) -> Sample:
        if name == "first-line":
            return two_hosts.first_line(stage, peer, args.ranks)
        if name == "exit":
            return two_hosts.exit_code(stage, peer, args.ranks, args.cap)
        if name == "mpi-end":
            return two_hosts.mpi_end(stage, peer, args.ranks)
        # Ours loses each of the hosts in turn; mpirun has no way to go on without its own.
        lost = number % two_hosts.LOSS_HOSTS if ours else two_hosts.LOSS_HOSTS - 1
        return two_hosts.loss(stage, peer, args.loss_cap, lost)

    return Variant(label, measure, args.runs if name != "loss" or ours else LOSS_RUNS)


def measure_case(name: str, variants: list[Variant], runs: int, failures: list[str]) -> dict[str, list[Sample]]:
    """Run all variants in turn, one uncounted round first. A variant that fails twice is not tried again."""
    samples: dict[str, list[Sample]] = {variant.label: [] for variant in variants}
    failed = dict.fromkeys(samples, 0)
    for number in range(runs + 1):
        for variant in variants:
            if (
                failed[variant.label] >= 2
                or number > variant.runs
                or (number == 0 and variant.runs == LOSS_RUNS < runs)
            ):
                continue
            gc.collect()
            try:
                sample = variant.measure(number)
            except RunFailed as error:
                failed[variant.label] += 1
                failures.append(f"{name}, {variant.label}, run {number}: {str(error).splitlines()[0]}")
                print(f"  {variant.label}: failed: {error}", file=sys.stderr, flush=True)
                continue
            if number > 0:
                samples[variant.label].append(sample)
        print(f"  {name}: round {number} of {runs}" + " (not counted)" * (number == 0), file=sys.stderr, flush=True)
    return {label: found for label, found in samples.items() if found}


def invocation(args: argparse.Namespace) -> str:
    """The command line, for the reader who wants to repeat it; where the results went is theirs to choose."""
    words = [word.replace(str(args.out), args.out.name) for word in sys.argv[1:]]
    return " ".join(["python", "benchmarks/cluster/run.py", *words])


def example_commands(peers: dict[str, Peer], ranks: int) -> dict[str, list[str]]:
    """What is started on each host, as a reader would type it."""
    request = Request(("algo-1", "algo-2"), ranks, 29500, Path("AGENT"), Path("SCRIPT"))
    names = {sys.executable: "python"}
    return {
        label: [
            " ".join(names.get(word, word.rpartition("/")[2] if word.endswith("/mpirun") else word) for word in command)
            for command in peer.commands(request)
        ]
        for label, peer in peers.items()
    }


def measure_all(
    args: argparse.Namespace, peers: dict[str, Peer], failures: list[str], loads: dict[str, float]
) -> Samples:
    """All cases, one after the other; ``loads`` gets the machine's load at the end of each."""
    samples: Samples = {}
    with tempfile.TemporaryDirectory(prefix="cb-") as folder:  # a short name: UNIX sockets go below it
        scratch = Path(folder)
        stage = Stage(scratch / "stage", two_hosts.LOSS_HOSTS) if set(args.cases) - {"scale"} else None
        try:
            for name in args.cases:
                print(TABLES[name].title, file=sys.stderr, flush=True)
                variants = variants_of(name, args, peers, stage, scratch)
                samples[name] = measure_case(name, variants, args.runs, failures)
                loads[name] = round(os.getloadavg()[0], 2)
        finally:
            if stage is not None:
                stage.close()
    return samples


def main() -> None:
    """Measure, write both files, print the tables."""
    args = parse_arguments()
    if set(args.cases) - {"scale"} and (reason := load_netns().lacking()):
        print(f"no hosts in network namespaces here ({reason}): only `scale` is measured", file=sys.stderr)
        args.cases = [name for name in args.cases if name == "scale"]
    peers = find_peers(args.contenders)
    failures: list[str] = []
    began = time.monotonic()
    result: dict[str, Any] = {
        "date": args.date,
        "command": invocation(args),
        "runs": args.runs,
        "ranks": args.ranks,
        "simulated_ranks": args.simulated_ranks,
        "machine": machine(),
        "versions": {label: peer.version for label, peer in peers.items()},
        "commands": example_commands(peers, args.ranks),
    }
    loads: dict[str, float] = {}
    samples = measure_all(args, peers, failures, loads)
    result |= {"took_s": round(time.monotonic() - began, 1), "loads": loads}
    result["medians"] = {
        name: {
            label: {
                column: statistics.median(found) for column in TABLES[name].columns if (found := values(runs, column))
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
