"""Write a million images of digits into a channel directory, as records of RecordIO.

    python examples/million_records/prepare.py data/training

Each is one of scikit-learn's 1,797 digits, moved by up to a pixel and with noise: made here, so that there are as many
as wanted. A record is 65 bytes: the 64 pixels (0..16, uint8) and the label.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from launcher.data.writers import RecordIOWriter

RECORDS = 1_000_000
SHARDS = 4
SEED = 1998
RECORD = np.dtype([("image", np.uint8, (64,)), ("label", np.uint8)])


def draw_records(count: int, random: np.random.Generator) -> np.ndarray:
    """Return ``count`` records of moved and noisy digits."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = random.integers(len(digits.target), size=count)
    moves = random.integers(-1, 2, size=(count, 2))
    around = np.pad(digits.images.astype(np.int8), ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(around, (8, 8), axis=(1, 2))
    images = windows[chosen, 1 + moves[:, 0], 1 + moves[:, 1]]
    noisy = images + random.integers(-2, 3, size=images.shape, dtype=np.int8)
    records = np.empty(count, RECORD)
    records["image"] = noisy.clip(0, 16).reshape(count, 64)
    records["label"] = digits.target[chosen]
    return records


def write_records(directory: Path, count: int = RECORDS) -> None:
    """Write ``count`` records as ``SHARDS`` files, each complete when it appears under its name."""
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(SEED)
    for shard in range(SHARDS):
        records = draw_records(count * (shard + 1) // SHARDS - count * shard // SHARDS, random)
        with RecordIOWriter(directory / f"part-{shard}.rec") as writer:
            for record in records:
                writer.write(record.tobytes())


def main() -> None:
    """Take directory and number from the command line, and say what was written."""
    parser = argparse.ArgumentParser(description="Write noisy digits as records.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--records", type=int, default=RECORDS)
    args = parser.parse_args()
    write_records(args.directory, args.records)
    print(f"{args.directory}: {args.records} records in {SHARDS} files")


if __name__ == "__main__":
    main()
