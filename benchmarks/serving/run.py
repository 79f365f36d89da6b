"""Measure this project's model server against SageMaker's inference toolkit, gunicorn with Flask, LitServe, TorchServe.

    python benchmarks/serving/run.py --peer-env DIR [--rounds 5] [--out benchmarks/serving/results/<date>]

See README.md in this directory for what is measured, how, and how to get the peers.
"""

from __future__ import annotations

import argparse
import datetime
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
sys.path.append(str(_HERE.parent / "launch"))  # what it has serves here too

from contenders import NAMES, Contender, Finder  # noqa: E402
from measure import CONCURRENCY, Bench, find_wrk, kept_config  # noqa: E402
from processes import Failed, adopt  # noqa: E402
from report import machine, write  # noqa: E402
from tables import markdown  # noqa: E402

START, LOAD, SLOW, KILL = "start", "load", "slow", "kill"
PHASES = (START, LOAD, SLOW, KILL)
FEW = 3  # rounds of what hardly differs between rounds
GIVEN_UP = 2  # failures of a contender in a phase


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peer-env",
        type=Path,
        default=os.environ.get("PEER_ENV"),
        metavar="DIR",
        help="directory of environments (install_peers.py; default: $PEER_ENV)",
    )
    parser.add_argument("--seconds", type=float, default=4, help="of load at each concurrency (whole; default 4)")
    parser.add_argument("--warm-up", type=float, default=2, help="seconds of load before that (whole; default 2)")
    parser.add_argument("--rounds", type=int, default=5, help="of everything (default 5)")
    parser.add_argument("--quick", action="store_true", help="one round, a second a point: to see that it works")
    parser.add_argument("--only", default=",".join(NAMES), help="contenders, comma-separated: " + ", ".join(NAMES))
    parser.add_argument("--phases", default=",".join(PHASES), help="comma-separated: " + ", ".join(PHASES))
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md (default: results/<date>)")
    args = parser.parse_args()
    for name, known in (("only", tuple(NAMES)), ("phases", PHASES)):
        words = [word for word in getattr(args, name).split(",") if word]
        if unknown := [word for word in words if word not in known]:
            parser.error(f"--{name}: unknown: {', '.join(unknown)}; known: {', '.join(known)}")
        setattr(args, name, words)
    if args.peer_env is None:  # as `make bench` calls it
        print("nothing is measured: --peer-env is needed, the directory that install_peers.py was given")
        sys.exit(0)
    if args.quick:
        args.rounds, args.seconds, args.warm_up = 1, 1.0, 1.0
    if args.rounds < 1 or args.seconds < 1 or args.warm_up < 1:
        parser.error("--rounds, --seconds and --warm-up must be at least 1")
    args.peer_env = Path(args.peer_env).absolute()  # not resolved: a venv's Python is a link
    args.date = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    args.out = args.out or _HERE / "results" / args.date
    if args.out.suffix in {".json", ".md"}:
        args.out = args.out.with_suffix("")
    return args


def invocation(args: argparse.Namespace) -> str:
    """The command line for who wants to repeat it; where things lie on this machine is of no use to them."""
    hide = {str(args.peer_env): "DIR", str(args.out): args.out.name}
    words = []
    for word in sys.argv[1:]:
        option, equals, value = word.partition("=")
        words.append(hide.get(word.rstrip("/"), f"{option}={hide.get(value, value)}" if equals else word))
    return " ".join(["python", "benchmarks/serving/run.py", *words])


class Run:
    """The rounds of a run."""

    def __init__(self, bench: Bench, found: Sequence[Contender], failures: list[str]) -> None:
        self._bench, self._found, self._failures = bench, found, failures
        self._failed: Counter[tuple[str, str]] = Counter()

    def _try(self, phase: str, contender: Contender, measure: Callable[[], None]) -> None:
        if self._failed[phase, contender.label] >= GIVEN_UP:
            return
        try:
            measure()
        except Failed as error:
            self._failed[phase, contender.label] += 1
            self._failures.append(f"{phase}, {contender.label}, round {self._bench.round}: {error}")
            print(f"  {self._failures[-1]}", file=sys.stderr, flush=True)

    def phase(self, phase: str, number: int) -> None:
        """One round of one phase: all contenders in turn, another one first each round."""
        bench, shift = self._bench, number % max(1, len(self._found))
        bench.round = number
        for contender in (*self._found[shift:], *self._found[:shift]):
            if phase == LOAD:
                turn = number % len(CONCURRENCY)
                order = (*CONCURRENCY[turn:], *CONCURRENCY[:turn])
                self._try(phase, contender, lambda one=contender, order=order: bench.load(one, order))  # type: ignore[misc]
            elif contender.one_worker:
                self._try(phase, contender, lambda one=contender: getattr(bench, phase)(one))  # type: ignore[misc]
        print(f"{phase}: round {number + 1}", file=sys.stderr, flush=True)

    def warm(self) -> None:
        """Starts each once, uncounted: files come into the page cache, bytecode is written."""
        for contender in self._found:
            if contender.one_worker:
                self._try(START, contender, lambda one=contender: self._bench.start(one, counted=False))  # type: ignore[misc]


def medians(samples: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Table -> setting -> median over the rounds."""
    values: dict[str, dict[str, list[float]]] = {}
    for sample in samples:
        values.setdefault(sample["table"], {}).setdefault(sample["label"], []).append(sample["value"])
    return {
        table: {label: statistics.median(found) for label, found in by_label.items()}
        for table, by_label in values.items()
    }


def main() -> None:
    """Measure, write both files, print the tables; 1 when something failed."""
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started must not be left
    wrk = find_wrk()
    if wrk is None:
        sys.exit("no wrk (Debian: wrk): the load generator")
    adopt()
    result: dict[str, Any] = {
        "date": args.date,
        "name": args.out.name,
        "command": invocation(args),
        "quick": args.quick,
        "rounds": args.rounds,
        "seconds": args.seconds,
        "warm_up": args.warm_up,
        "machine": machine(),
        "versions": {},
        "absent": {},
        "failures": [],
    }
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lb-") as folder, kept_config():  # a short name: UNIX sockets go below it
        scratch = Path(folder)
        found = Finder(args.peer_env, scratch).find(args.only, result["absent"])
        result["versions"] = {contender.peer: contender.version for contender in found}
        said = subprocess.run([wrk, "-v"], capture_output=True, text=True, check=False)
        result["versions"]["load"] = " ".join((said.stdout + said.stderr).split()[:2])
        for peer, why in result["absent"].items():
            print(f"{peer}: left out: {why}", file=sys.stderr)
        bench = Bench(scratch, wrk, args.seconds, args.warm_up)
        run = Run(bench, found, result["failures"])
        run.warm()
        for number in range(args.rounds):
            for phase in args.phases:
                if phase in (START, LOAD) or number < FEW:
                    run.phase(phase, number)
    result["load_after"] = round(os.getloadavg()[0], 2)
    result["minutes"] = round((time.monotonic() - began) / 60, 1)
    result |= {"medians": medians(bench.samples), "said": bench.said, "samples": bench.samples}
    write(args.out, result, markdown(result))
    sys.exit(1 if result["failures"] else 0)


if __name__ == "__main__":
    main()
