"""Measure this project's data loader against torch, DALI, litdata, webdataset, MDS, Grain, SPDL and some parsers.

    python benchmarks/data/run.py [--peer-env DIR] [--data DIR] [--rounds 5] [--out benchmarks/data/results/<date>]

See README.md in this directory for what is measured, how, and how to get the peers.
"""

from __future__ import annotations

import argparse
import datetime
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
sys.path.append(str(_HERE.parent / "launch"))  # what it has serves here too

import contenders  # noqa: E402
import datasets  # noqa: E402
import phases  # noqa: E402
import publish  # noqa: E402
from measure import Field, prepare, say, throughput  # noqa: E402
from report import machine, write  # noqa: E402

LOADERS, RECORDIO, CSV, PIPE, EPOCHS, LISTING = "loaders", "recordio", "csv", "pipe", "epochs", "listing"
PHASES = (LOADERS, RECORDIO, CSV, PIPE, EPOCHS, LISTING)
NAMES = {name.lower().replace(", ", "-").replace(" ", "-"): name for name in (contenders.OURS, *contenders.LOADERS)}
EPOCH_COUNT = 100


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each table (default 5)")
    parser.add_argument("--quick", action="store_true", help="one short round over a tenth of the data: to try it")
    parser.add_argument("--seconds", type=float, default=0.5, help="of a contender in a round (default 0.5)")
    parser.add_argument("--phases", default=",".join(PHASES), help="comma-separated: " + ", ".join(PHASES))
    parser.add_argument("--sets", default="small,medium", help="of the loaders: small, medium")
    parser.add_argument("--peers", default=",".join(NAMES), help="loaders, comma-separated: " + ", ".join(NAMES))
    parser.add_argument(
        "--peer-env",
        action="append",
        default=[part for part in os.environ.get("PEER_ENV", "").split(":") if part],
        metavar="DIR",
        help="environment with peers (install_peers.py); may be repeated (default: $PEER_ENV, split at colons)",
    )
    parser.add_argument(
        "--data", type=Path, help="where the data is made, once: 13 GB (default: below the temporary folder)"
    )
    parser.add_argument("--prepare", action="store_true", help="makes the data, if it is not there, and ends")
    parser.add_argument("--out", type=Path, help="writes OUT.json, .md, .svg, .png (default: results/<date>)")
    args = parser.parse_args()
    for name, known in (("phases", PHASES), ("peers", tuple(NAMES)), ("sets", tuple(datasets.sets(False)))):
        words = [word for word in getattr(args, name).split(",") if word]
        if unknown := [word for word in words if word not in known]:
            parser.error(f"--{name}: unknown: {', '.join(unknown)}; known: {', '.join(known)}")
        setattr(args, name, words)
    if args.quick:
        args.rounds, args.seconds = 1, min(args.seconds, 0.2)
    if args.rounds < 1 or args.seconds <= 0:
        parser.error("--rounds and --seconds must be above 0")
    args.peer_env = [Path(word).absolute() for word in args.peer_env]  # not resolved: a venv's Python is a link
    args.data = (args.data or Path(tempfile.gettempdir()) / "launcher-benchmark-data").absolute()
    args.data /= "quick" if args.quick else "full"
    args.date = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    args.out = args.out or _HERE / "results" / args.date
    if args.out.suffix in {".json", ".md", ".svg", ".png"}:
        args.out = args.out.with_suffix("")
    return args


def invocation(args: argparse.Namespace) -> str:
    """The command line for who wants to repeat it; where things lie on this machine is of no use to them."""
    words = []
    hide = {str(path): "DIR" for path in (*args.peer_env, args.data.parent)} | {str(args.out): args.out.name}
    for word in sys.argv[1:]:
        option, equals, value = word.partition("=")
        words.append(hide.get(word.rstrip("/"), f"{option}={hide.get(value, value)}" if equals else word))
    return " ".join(["python", "benchmarks/data/run.py", *words])


class Run:
    """One run: its contenders, its folders, and the result that the phases add to."""

    def __init__(self, args: argparse.Namespace, scratch: Path, result: dict[str, Any]) -> None:
        self.args, self.scratch, self.result = args, scratch, result
        self.samples: list[dict[str, Any]] = result["samples"]
        self.cores = sorted(os.sched_getaffinity(0))[:2]
        self.sets = [datasets.sets(args.quick)[name] for name in args.sets]
        self.able: list[contenders.Contender] = []  # that have their data
        self.finder = contenders.Finder(args.peer_env, scratch, result["absent"])

    def field(self, found: list[contenders.Contender]) -> Field:
        """Starts the contenders' ranks."""
        return Field(found, self.cores, self.scratch, self.result["failures"], self.result["versions"])

    def prepare(self) -> None:
        """Makes the data of the phases that are asked for, what is not there of it, and starts nothing."""
        data, quick, wanted = self.args.data, self.args.quick, set(self.args.phases)
        if wanted & {LOADERS, EPOCHS}:
            for which in self.sets:
                datasets.make_npy(data, which)
        if wanted & {LOADERS, RECORDIO, PIPE}:
            datasets.make_recordio(data, quick)
        if CSV in wanted:
            datasets.make_csv(data, quick)
        if LISTING in wanted:
            datasets.make_tree(data, quick)
        if LOADERS in wanted:
            self.able = self.finder.loaders([NAMES[name] for name in self.args.peers])
            for which in self.sets:
                self.able = prepare(self.able, which, data, self.result["absent"])
        say("the data is there")

    def loaders(self) -> None:
        """Throughput of all loaders, and how soon they deliver, and what they hold."""
        args, data = self.args, self.args.data
        recordio = datasets.recordio_set(args.quick)
        with self.field(self.able) as field:
            say(f"{len(field.contenders)} contenders")
            for which in self.sets:
                datasets.touch(data / which.name)
                for arrangement in ("1c", "2r"):
                    first = (which, arrangement) == (self.sets[0], "1c") and which.name == "small"
                    each = (lambda contender: phases.memory(field, contender, self.samples)) if first else None
                    throughput(field, which, data, arrangement, True, args.rounds, args.seconds, self.samples, each)
                if which.name == "small":
                    phases.first_batches(field, which, recordio, data, self.samples)

    def recordio(self) -> None:
        """Parsers of RecordIO-protobuf."""
        args, which = self.args, datasets.recordio_set(self.args.quick)
        datasets.touch(datasets.recordio_path(args.data).parent)
        with self.field(self.finder.parsers()) as field:
            for arrangement in ("1c", "2r"):
                throughput(field, which, args.data, arrangement, False, args.rounds, args.seconds, self.samples)

    def csv(self) -> None:
        """Parsers of CSV."""
        with self.field(self.finder.csv_readers()) as field:
            path = datasets.csv_path(self.args.data)
            phases.csv(field, path, self.args.rounds, self.args.quick, self.samples)

    def pipe(self) -> None:
        """Readers of a FIFO."""
        with self.field(self.finder.pipe_readers()) as field:
            source = datasets.recordio_path(self.args.data)
            phases.pipe(field, source, self.scratch, self.cores[1], self.args.rounds, 1, self.samples)

    def epochs(self) -> None:
        """This project's memory over many epochs."""
        count = EPOCH_COUNT // 10 if self.args.quick else EPOCH_COUNT
        found = [one for which in self.sets for one in self.finder.ours(which.name)]
        with self.field(found) as field:
            phases.epochs(field, self.sets, self.args.data, count, self.samples)

    def listing(self) -> None:
        """A folder with many files."""
        with self.field(self.finder.listers()) as field:
            root = datasets.tree_path(self.args.data)
            phases.listing(field, root, datasets.tree_files(self.args.quick), self.samples)


def main() -> None:
    """Measure, write the files, print the tables; 1 when something failed."""
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started and stopped must not be left
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("needs two cores: the ranks of a pair have one each")
    result: dict[str, Any] = {
        "date": args.date,
        "name": args.out.name,
        "command": invocation(args),
        "quick": args.quick,
        "rounds": args.rounds,
        "machine": {},
        "versions": {},
        "absent": {},
        "seconds": {},
        "failures": [],
        "samples": [],
    }
    args.data.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lb-") as folder:
        try:
            run = Run(args, Path(folder), result)
        except contenders.Absent as error:
            sys.exit(f"{error}: the benchmark builds its floors on the machine")
        run.prepare()
        result["seconds"]["preparing"] = round(time.monotonic() - began)
        if args.prepare:
            return
        result["machine"], began = machine(), time.monotonic()
        for name in args.phases:
            print(name, file=sys.stderr, flush=True)
            before = time.monotonic()
            getattr(run, name)()
            result["seconds"][name] = round(time.monotonic() - before)
    for label, why in result["absent"].items():
        print(f"{label}: left out: {why}", file=sys.stderr)
    result["load_after"] = round(os.getloadavg()[0], 2)
    result["minutes"] = round((time.monotonic() - began) / 60, 1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    publish.chart(result, args.out)
    write(args.out, result, publish.markdown(result))
    sys.exit(1 if result["failures"] else 0)


if __name__ == "__main__":
    main()
