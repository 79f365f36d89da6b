"""Measure the collectives of this project against those of Gloo, four MPIs, DeepSpeed, oneCCL and Horovod, in one run.

    python benchmarks/collectives/run.py [--peer-env DIR] [--rounds 5] [--out benchmarks/collectives/results/<date>]

See README.md in this directory for what is measured, how, and how to get the peers.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
sys.path += [str(_HERE.parent / "launch"), str(_HERE.parent / "cluster")]  # what they have serves here too

import publish  # noqa: E402
import rivals  # noqa: E402
from hosts import lacking, measure_hosts  # noqa: E402
from matrix import LARGE, Field, measure  # noqa: E402
from processes import Contender, RankFailed, compile_support  # noqa: E402
from report import machine, write  # noqa: E402
from statistic import FOUR, HOSTS, TWO  # noqa: E402
from training import BARS, CASES, LIMITS_US, train  # noqa: E402

from launcher.collectives.bench import parse_sizes  # noqa: E402
from launcher.errors import UsageError  # noqa: E402

PHASES = {"two": TWO, "four": FOUR, "torch": "through torch", "hosts": HOSTS}
SIZES = "1K,8K,64K,256K,1M,4M,25M,100M"
FEW_SIZES = "1K,64K,1M,25M"
QUICK_SIZES = "1K,1M"
FEW_ROUNDS = 3  # of what takes long


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each phase (default 5)")
    parser.add_argument("--quick", action="store_true", help="one short round: to see that it works, not to publish")
    parser.add_argument("--sizes", default="", help=f"of two ranks on two cores (default {SIZES})")
    parser.add_argument("--seconds", type=float, default=0.04, help="of a contender in a cell and mode (default 0.04)")
    parser.add_argument("--phases", default=",".join(PHASES), help="comma-separated: " + ", ".join(PHASES))
    parser.add_argument("--cases", default=",".join(CASES), help="of the torch phase: " + ", ".join(CASES))
    parser.add_argument("--peers", default=",".join(rivals.NAMES), help="comma-separated: " + ", ".join(rivals.NAMES))
    parser.add_argument(
        "--peer-env",
        action="append",
        default=[part for part in os.environ.get("PEER_ENV", "").split(":") if part],
        metavar="DIR",
        help="environment with peers (install_peers.py); may be repeated (default: $PEER_ENV, split at colons)",
    )
    parser.add_argument("--out", type=Path, help="writes OUT.json, .md, .svg, .png (default: results/<date>)")
    args = parser.parse_args()
    for name, known in (("phases", PHASES), ("peers", rivals.NAMES), ("cases", CASES)):
        words = [word for word in getattr(args, name).split(",") if word]
        if unknown := [word for word in words if word not in known]:
            parser.error(f"--{name}: unknown: {', '.join(unknown)}; known: {', '.join(known)}")
        setattr(args, name, words)
    if rivals.LIMIT.replace(" ", "-") not in args.peers:
        args.peers.insert(0, rivals.LIMIT.replace(" ", "-"))  # its ranks are those of the ping-pong, too
    try:
        args.sizes = parse_sizes(args.sizes or (QUICK_SIZES if args.quick else SIZES))
    except UsageError as error:
        parser.error(str(error))
    if args.quick:
        args.rounds, args.seconds = 1, min(args.seconds, 0.02)
    if args.rounds < 1 or args.seconds <= 0:
        parser.error("--rounds and --seconds must be above 0")
    args.peer_env = [Path(word).absolute() for word in args.peer_env]  # not resolved: a venv's Python is a link
    args.date = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    args.out = args.out or _HERE / "results" / args.date
    if args.out.suffix in {".json", ".md", ".svg", ".png"}:
        args.out = args.out.with_suffix("")
    return args


def invocation(args: argparse.Namespace) -> str:
    """The command line for who wants to repeat it; where things lie on this machine is of no use to them."""
    words = []
    hide = {str(path): "DIR" for path in args.peer_env} | {str(args.out): args.out.name}
    for word in sys.argv[1:]:
        option, equals, value = word.partition("=")
        words.append(hide.get(word.rstrip("/"), f"{option}={hide.get(value, value)}" if equals else word))
    return " ".join(["python", "benchmarks/collectives/run.py", *words])


def measure_phase(
    name: str,
    args: argparse.Namespace,
    contenders: list[Contender],
    scratch: Path,
    support: Path,
    result: dict[str, Any],
) -> None:
    """One phase; ``result`` gets what it finds."""
    samples, failures, versions = result["samples"], result["failures"], result["versions"]
    cores = sorted(os.sched_getaffinity(0))[:2]
    few = parse_sizes(QUICK_SIZES if args.quick else FEW_SIZES)
    if name == "two":
        with Field(contenders, 2, cores, scratch, support, failures, versions) as field:
            types = ("float32", "bfloat16")
            measure(field, TWO, args.sizes, types, ("hot", "fresh"), args.rounds, args.seconds, samples)
    elif name == "four":
        with Field(contenders, 4, cores, scratch, support, failures, versions) as field:
            measure(field, FOUR, few, ("float32",), ("hot",), args.rounds, args.seconds, samples)
    elif name == "torch":
        rounds = min(args.rounds, FEW_ROUNDS)
        result["training"] = train(args.cases, args.peer_env, scratch, support, cores, rounds, result)
    elif reason := lacking():
        result["absent"][HOSTS] = reason
    else:
        sizes = [size for size in args.sizes if args.quick or size in few or size >= LARGE]
        rounds = min(args.rounds, FEW_ROUNDS)
        result["network"] = measure_hosts(contenders, sizes, scratch, support, cores, rounds, result)


def measure_all(args: argparse.Namespace, contenders: list[Contender], scratch: Path, result: dict[str, Any]) -> None:
    """All phases that were asked for. One that is lost does not take what the others found with it."""
    support = compile_support(scratch)
    for name in args.phases:
        began = time.monotonic()
        print(PHASES[name], file=sys.stderr, flush=True)
        try:
            measure_phase(name, args, contenders, scratch, support, result)
        except RankFailed as error:  # of the ping-pong: a contender's own is reported where it happens
            result["failures"].append(f"{PHASES[name]}: given up: {error}")
            print(result["failures"][-1], file=sys.stderr, flush=True)
        result["seconds"][name] = round(time.monotonic() - began)


def main() -> None:
    """Measure, write the files, print the tables; 1 when something failed."""
    args = parse_arguments()
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("needs two cores: the ranks of a pair have one each")
    absent: dict[str, str] = {}
    contenders = list(rivals.find(args.peers, args.peer_env, absent))
    for label, why in absent.items():
        print(f"{label}: left out: {why}", file=sys.stderr)
    result: dict[str, Any] = {
        "date": args.date,
        "name": args.out.name,
        "command": invocation(args),
        "rounds": args.rounds,
        "machine": machine(),
        "versions": {},
        "absent": absent,
        "seconds": {},
        "failures": [],
        "training": [],
        "network": "",
        "samples": [],
    }
    began = time.monotonic()
    # In memory: the pages that ranks share there are never written to a disk. Short: UNIX sockets go below it.
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="lc-", dir=folder) as name:
        measure_all(args, contenders, Path(name), result)
    result["load_after"] = round(os.getloadavg()[0], 2)
    result["minutes"] = round((time.monotonic() - began) / 60, 1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    publish.chart(result, args.out)
    write(args.out, result, publish.markdown(result, BARS, LIMITS_US))
    sys.exit(1 if result["failures"] else 0)


if __name__ == "__main__":
    main()
