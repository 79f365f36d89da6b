"""What an adapter is, and the parts that most of them share."""

from __future__ import annotations

import fcntl
import io
import os
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from datasets import Set, memmap, once

TARS = 100
F_SETPIPE_SZ = 1031


class Opens(Protocol):
    """What the adapter of a loader has; those of parsers have what ``worker.Rank.task`` is told to call."""

    def open(self, which: Set, data: Path, rank: int, world: int) -> None:
        """Makes the loader of ``rank`` of ``world``: shuffled, only full batches."""

    def batches(self) -> Iterator[Any]:
        """Batches of epoch after epoch, without end."""


class Base:
    """What adapters have in common."""

    checked = True  # its batches hold values and labels that can be compared
    batches_a_step = 1
    ends_itself = False  # needs Python's own end of the process
    version = ""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options
        self.set: Set | None = None

    def prepare(self, which: Set, data: Path) -> None:
        """Makes the format that it reads below ``data``, unless it is there; most read the ``.npy`` file."""

    def arrays(self, batch: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Values and labels of a batch, for the check."""
        values, label = batch
        return values.numpy(), label.numpy()

    def close(self) -> None:
        """Lets go of the loader."""


def split(rows: Any, which: Set) -> tuple[Any, Any]:
    """Torch tensors of values and labels that share the memory of ``rows``: uint8, one record a row."""
    import torch

    records = rows.view(which.layout)
    return torch.from_numpy(records["values"][:, 0]), torch.from_numpy(records["label"][:, 0])


def announce(rank: int, world: int) -> None:
    """Tells a library by the environment which rank this is; MASTER_PORT is there already."""
    words = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world, "GLOBAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in words.items()} | {"MASTER_ADDR": "127.0.0.1"})


def endless(loader: Any) -> Iterator[Any]:
    """Batches of a loader that is iterated anew for each epoch."""
    while True:
        yield from loader


def tars(which: Set, data: Path) -> list[str]:
    """The set as tar files of at most 10,000 samples with one member each, ``<number>.bin``: the record's bytes."""
    folder = data / which.name / "tar"
    each = max(1, which.records // TARS)

    def make(target: Path) -> None:
        records = memmap(data, which)
        for number, begin in enumerate(range(0, which.records, each)):
            with tarfile.open(target / f"{number:04}.tar", "w") as tar:
                for at in range(begin, min(begin + each, which.records)):
                    info = tarfile.TarInfo(f"{at:08}.bin")
                    info.size = which.record_bytes
                    tar.addfile(info, io.BytesIO(records[at].tobytes()))

    once(folder, [which.facts(), TARS], make)
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def open_fifo(order: Mapping[str, Any]) -> BinaryIO:
    """Opens a FIFO for reading, with the pipe's size that the order names (0: the system's)."""
    file = open(order["fifo"], "rb")  # noqa: SIM115 - the caller's
    if order["size"]:
        fcntl.fcntl(file, F_SETPIPE_SZ, order["size"])
    return file
