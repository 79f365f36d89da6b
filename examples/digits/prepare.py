"""Write the handwritten digits that scikit-learn ships into a channel directory.

    python examples/digits/prepare.py data/training

1,797 grey images of 8 x 8 pixels (0..16), by 43 people (https://archive.ics.uci.edu/dataset/80). The split
is the same on every machine: one test image in five, drawn by a fixed seed. ``train.npy`` and ``test.npy`` hold records
of an ``image`` (8 x 8, uint8) and its ``label`` (int64).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

SEED = 1998  # the year the data set was published
TEST_SHARE = 5
RECORD = np.dtype([("image", np.uint8, (8, 8)), ("label", np.int64)])


def write_digits(directory: Path) -> None:
    """Write both files into ``directory``, which is made if it is missing; a reader never sees half a file."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    records = np.empty(len(digits.target), RECORD)
    records["image"], records["label"] = digits.images, digits.target
    order = np.random.default_rng(SEED).permutation(len(records))
    test_count = len(records) // TEST_SHARE
    directory.mkdir(parents=True, exist_ok=True)
    for name, chosen in (("test", order[:test_count]), ("train", order[test_count:])):
        partial = directory / f".{name}.partial.npy"
        np.save(partial, records[chosen])
        os.replace(partial, directory / f"{name}.npy")


def main() -> None:
    """Take the directory from the command line, and say what was written."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} DIRECTORY")
    directory = Path(sys.argv[1])
    write_digits(directory)
    for name in ("train", "test"):
        print(f"{directory / name}.npy: {len(np.load(directory / f'{name}.npy', mmap_mode='r'))} images")


if __name__ == "__main__":
    main()
