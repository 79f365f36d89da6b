"""What the differential fuzzers of this folder's text formats share: files until there were enough records."""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path


def check_files(cases: int, seed: int, check: Callable[[random.Random], int]) -> tuple[int, int]:
    """Calls ``check``, which draws a file and returns its records, until these are ``cases`` at least.

    Returns:
        How many records they were, and of how many files.
    """
    draw = random.Random(seed)
    records = files = 0
    while records < cases:
        records += check(draw)
        files += 1
    return records, files


def main(description: str, run: Callable[[int, int, Path], tuple[int, int]]) -> None:
    """The command: ``run(cases, seed, folder)`` with what its arguments say, in a folder that is removed."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        records, files = run(options.cases, options.seed, Path(folder))
    print(f"seed {options.seed}: {records} records of {files} files the same, in {time.monotonic() - begin:.0f} s")
