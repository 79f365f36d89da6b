"""What is measured beside the throughput of loaders: CSV, a FIFO, first batches, resuming, memory, listing."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
from bars import CSV, FIRST, FIRST_INDEXED, GROWTH, LISTING, MEMORY, PIPE, RESUME, SHM
from contenders import COPY, GATHER, OURS
from datasets import Set
from measure import Field, add, say
from processes import Contender

MB = 1e6
CSV_BATCH = 1000
WARM_EPOCHS = 3
PIPE_SIZES = {"64 KiB": 0, "1 MiB": 1 << 20}  # the reader's F_SETPIPE_SZ; 0: as the system makes it
PIPE_BATCH = 256
CHANNEL = "stream"
LISTING_ROUNDS = 5
FIRSTS, FIRSTS_OF_PEERS = 9, 3

# Writes a file into a FIFO as often as it is told, then closes it.
_FEED = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    data = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
print("ready", flush=True)
with open(sys.argv[2], "wb", buffering=0) as fifo:
    try:
        for _ in range(int(sys.argv[3])):
            for at in range(0, len(data), 1 << 20):
                part = data[at : at + (1 << 20)]
                while part:
                    part = part[fifo.write(part) :]
    except BrokenPipeError:
        pass
"""


def csv(field: Field, path: Path, rounds: int, quick: bool, samples: list[dict[str, Any]]) -> None:
    """Million values a second, the whole file to one matrix, on one core."""
    count = datasets.csv_rows(quick)
    wanted = [0, 1, count // 2, count - 1]
    lines = path.read_text().splitlines()
    rows = [[float(word) for word in lines[at].split(",")] for at in wanted]
    order = {"do": "task", "task": "csv", "path": str(path), "rows": wanted, "count": count, "batch": CSV_BATCH}
    for number in range(-1, rounds):
        for contender in list(field.contenders):
            answers = field.order(contender, 1, order)
            if answers is None:
                continue
            answer = answers[0]
            close = all(
                abs(value - right) <= 1e-6 * abs(right)
                for row, found in zip(rows, answer["rows"], strict=True)
                for right, value in zip(row, found, strict=True)
            )
            if answer["shape"] != [count, datasets.CSV_COLUMNS] or not close:
                field.lost(contender, f"CSV: other values than the file's, of shape {answer['shape']}")
                field.contenders.remove(contender)
            elif number >= 0:
                add(samples, CSV, number, contender, count * datasets.CSV_COLUMNS / answer["seconds"] / 1e6)
    say(f"CSV: {rounds} rounds")


def _channel(base: Path) -> Path:
    """The files of a job that has a channel in Pipe mode; where its first FIFO is to be."""
    for name in ("config", "data"):
        (base / "input" / name).mkdir(parents=True, exist_ok=True)
    channel = {"TrainingInputMode": "Pipe", "S3DistributionType": "FullyReplicated", "RecordWrapperType": "None"}
    channel["ContentType"] = "application/x-recordio-protobuf"
    (base / "input" / "config" / "inputdataconfig.json").write_text(json.dumps({CHANNEL: channel}))
    return base / "input" / "data" / f"{CHANNEL}_0"


@contextlib.contextmanager
def _feeding(source: Path, fifo: Path, times: int, core: int) -> Iterator[None]:
    """A process on a core of its own that writes the file into the FIFO."""
    os.mkfifo(fifo)
    command = [sys.executable, "-c", _FEED, str(source), str(fifo), str(times)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    os.sched_setaffinity(process.pid, {core})
    try:
        assert process.stdout is not None
        process.stdout.readline()  # its start is nobody's time
        yield
    finally:
        process.kill()
        process.communicate()
        fifo.unlink()


def pipe(
    field: Field, source: Path, scratch: Path, core: int, rounds: int, times: int, samples: list[dict[str, Any]]
) -> None:
    """GB/s of RecordIO-protobuf through a FIFO: framed and parsed by ours, framed or only read by the others."""
    total, frame = source.stat().st_size * times, len(datasets.record_template()[0])
    for number in range(-1, rounds):
        for contender in field.contenders:
            sizes = {"": 0} if contender.peer == OURS else PIPE_SIZES  # ours sets the size by itself
            for name, size in sizes.items():
                fifo = _channel(scratch / "opt-ml")
                order = {"do": "task", "task": "pipe", "fifo": str(fifo), "size": size}
                order |= {"base": str(scratch / "opt-ml"), "channel": CHANNEL}
                order |= {"batch": PIPE_BATCH, "record_bytes": frame}
                with _feeding(source, fifo, times, core):
                    answers = field.order(contender, 1, order)
                if answers is None:
                    break
                if answers[0]["bytes"] != total:
                    field.lost(contender, f"FIFO: {answers[0]['bytes']} of {total} bytes")
                    break
                if number >= 0:
                    label = f"{contender.label}, pipe of {name}" if name else contender.label
                    add(samples, PIPE, number, contender, total / answers[0]["seconds"] / 1e9, label)
    say(f"FIFO: {rounds} rounds")


def first_batches(field: Field, small: Set, recordio: Set, data: Path, samples: list[dict[str, Any]]) -> None:
    """From a call in a warm process to the first batch; from a saved state on, where there is one."""
    order = {"set": small.facts(), "data": str(data)}
    for contender in field.contenders:
        if contender.label in (GATHER, COPY):
            continue
        times = FIRSTS if contender.peer == OURS else FIRSTS_OF_PEERS  # some of theirs take seconds
        given: dict[str, Any] = {"do": "first", "times": times, **order}
        if contender.options.get("workers", 0) == 0 and contender.adapter in ("ours", "mds", "grain_records"):
            answers = field.order(contender, 1, {"do": "state", "position": small.records // 2, **order})
            if answers is None:
                continue
            given["state"] = answers[0]["state"]
        answers = field.order(contender, 1, given)
        for number, value in enumerate(answers[0]["ms"] if answers else ()):
            add(samples, FIRST, number, contender, value)
        if answers and "resumed_ms" in answers[0]:
            pairs = zip(answers[0]["resumed_ms"], answers[0]["ms"], strict=True)
            for number, (resumed, cold) in enumerate(pairs):
                add(samples, RESUME, number, contender, resumed - cold)
        if contender.label == OURS:
            given.pop("state", None)
            answers = field.order(contender, 1, {**given, "set": recordio.facts()})
            for number, value in enumerate(answers[0]["ms"] if answers else ()):
                add(samples, FIRST_INDEXED, number, contender, value)
    say("first batches")


def epochs(field: Field, sets: Sequence[Set], data: Path, count: int, samples: list[dict[str, Any]]) -> None:
    """This project's memory over the ring, and what ``count`` epochs more add to it; in fresh processes."""
    for contender, which in zip(list(field.contenders), sets, strict=False):
        order = {"set": which.facts(), "data": str(data), "before": WARM_EPOCHS, "epochs": count}
        answers = field.order(contender, 1, {"do": "epochs", **order})
        if answers is None:
            continue
        label = f"{OURS}, {which.name}"
        add(samples, MEMORY, 0, contender, answers[0]["over"] / MB, f"{label}, over the ring")
        add(samples, GROWTH, 0, contender, answers[0]["growth"] / MB, label)
        add(samples, SHM, 0, contender, answers[0]["shm"], label)
    say(f"{count} epochs")


def memory(field: Field, contender: Contender, samples: list[dict[str, Any]]) -> None:
    """What a rank has, in all, beside NumPy and torch, while its loader of the small set is open."""
    answers = field.order(contender, 1, {"do": "memory"})
    if answers is not None and contender.label not in (GATHER, COPY):
        add(samples, MEMORY, 0, contender, answers[0]["private"] / MB, f"{contender.label}, small")
        add(samples, SHM, 0, contender, answers[0]["shm"], f"{contender.label}, small, at work")


def listing(field: Field, root: Path, files: int, samples: list[dict[str, Any]]) -> None:
    """Seconds to list a folder with many files, with their sizes, sorted."""
    for number in range(-1, LISTING_ROUNDS):
        for contender in list(field.contenders):
            answers = field.order(contender, 1, {"do": "task", "task": "listing", "root": str(root)})
            if answers is None:
                continue
            if answers[0]["files"] != files:
                field.lost(contender, f"listed {answers[0]['files']} of {files} files")
                field.contenders.remove(contender)
            elif number >= 0:
                add(samples, LISTING, number, contender, answers[0]["seconds"])
    say(f"listing: {LISTING_ROUNDS} rounds")
