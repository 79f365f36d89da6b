"""Flat memory for gradients: many tensors, one message, no copy where the gradient can lie in it."""

from __future__ import annotations

import json
import os

import torch

from launcher.errors import UsageError
from launcher.horovod.common.exceptions import HorovodInternalError
from launcher.horovod.torch.memory import SharedMemory
from launcher.horovod.torch.requests import Call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

# Size of a bucket. Large enough for full bandwidth, small enough that the first is ready long before the last.
_BUCKET_BYTES = 25 << 20
_ALIGN_BYTES = 64


def bucket_bytes() -> int:
    """HOROVOD_FUSION_THRESHOLD (bytes), 25 MiB by default.

    Raises:
        UsageError: it is not a whole number.
    """
    text = os.environ.get("HOROVOD_FUSION_THRESHOLD", "")
    try:
        return int(text) if text else _BUCKET_BYTES
    except ValueError:
        raise UsageError(
            f"environment variable HOROVOD_FUSION_THRESHOLD is {text!r}; expected a number of bytes"
        ) from None


class Slot:
    """A parameter's place in a bucket. ``view`` has the parameter's shape and, where it is dense, its strides."""

    __slots__ = ("address", "bucket", "packed", "parameter", "view")

    def __init__(self, parameter: torch.Tensor, bucket: Bucket) -> None:
        self.parameter, self.bucket = parameter, bucket
        self.view: torch.Tensor = None  # given when the bucket's memory is made
        self.address = 0  # of the view
        self.packed = False


class Bucket:
    """Gradients that are reduced together. All of one type and device."""

    def __init__(self, name: str, dtype: torch.dtype, device: torch.device) -> None:
        self.name, self.dtype, self.device = name, dtype, device
        self.slots: list[Slot] = []
        self.nbytes = 0
        self.missing = 0
        self.call: Call | None = None
        self.memory: SharedMemory | None = None
        self.flat: torch.Tensor | None = None

    def add(self, parameter: torch.Tensor) -> Slot:
        """Appends a parameter."""
        self.slots.append(Slot(parameter, self))
        self.nbytes += slot_bytes(parameter, self.dtype)
        return self.slots[-1]

    def make(self) -> None:
        """Makes the memory and the slots' views of it."""
        size = self.dtype.itemsize
        count = self.nbytes // size
        if self.device.type == "cpu":
            self.memory = SharedMemory(self.nbytes)
            self.flat = self.memory.tensor(self.dtype, count)
        else:
            self.flat = torch.zeros(count, dtype=self.dtype, device=self.device)
        offset = 0
        for slot in self.slots:
            parameter = slot.parameter
            # Of a dense parameter the strides are kept: so autograd lays out its gradient, and optimizers like it.
            strides = torch.empty_like(parameter, device="meta").stride()
            slot.view = self.flat.as_strided(parameter.shape, strides, offset)
            slot.address = slot.view.data_ptr()
            offset += slot_bytes(parameter, self.dtype) // size
        self.reset()

    def reset(self) -> None:
        """Ready for the next step."""
        self.call, self.missing = None, len(self.slots)
        for slot in self.slots:
            slot.packed = False

    def drop(self) -> None:
        """Nothing will be reduced here any more. Gradients that lie here stay valid."""
        if self.memory is not None:
            self.memory.unused = True


def slot_bytes(parameter: torch.Tensor, dtype: torch.dtype) -> int:
    """Bytes of a slot, with the padding that keeps the next one aligned."""
    nbytes = int(parameter.numel() * dtype.itemsize)
    return -(-nbytes // _ALIGN_BYTES) * _ALIGN_BYTES


def fill(
    wire_dtypes: dict[torch.Tensor, torch.dtype], groups: Sequence[Sequence[torch.Tensor]], prefix: str
) -> list[Bucket]:
    """Distributes parameters over buckets.

    Args:
        wire_dtypes: what each travels as, in the order in which their gradients come.
        groups: those that must be together; the others are put together up to bucket_bytes().
        prefix: of the buckets' names, which must be the same on all ranks.
    """
    limit = bucket_bytes()
    group_of = {parameter: number for number, group in enumerate(groups) for parameter in group}
    buckets: list[Bucket] = []
    current: dict[tuple[Any, ...], Bucket] = {}
    for parameter, dtype in wire_dtypes.items():
        group = group_of.get(parameter, -1)
        key = (group, dtype, parameter.device)
        bucket = current.get(key)
        if bucket is None or (group < 0 and bucket.nbytes + slot_bytes(parameter, dtype) > limit):
            bucket = current[key] = Bucket(f"{prefix}.{len(buckets)}", dtype, parameter.device)
            buckets.append(bucket)
        bucket.add(parameter)
    for bucket in buckets:
        bucket.make()
    return buckets


def describe(parameters: Iterable[tuple[str, torch.Tensor, int]], rank: int) -> bytes:
    """One rank's parameters as a line, for :func:`compare`.

    Args:
        parameters: name, parameter and sparse dimensions of its gradient (0: dense), in the order of their gradients.
    """
    rows = [[name, str(item.dtype), list(item.shape), list(item.stride()), sparse] for name, item, sparse in parameters]
    return json.dumps([rank, rows]).encode() + b"\n"


def compare(lines: bytes) -> tuple[list[str], dict[str, int]]:
    """All ranks' lines: the order of the first rank, by name, and which parameters are sparse anywhere (sparse dims).

    Raises:
        HorovodInternalError: the ranks' parameters differ, with the first difference.
    """
    (first_rank, first), *others = [json.loads(line) for line in lines.splitlines()]
    wanted = {row[0]: row[1:4] for row in first}
    sparse = {row[0]: row[4] for row in first if row[4]}
    for rank, rows in others:
        found = {row[0]: row[1:4] for row in rows}
        sparse.update({row[0]: row[4] for row in rows if row[4]})
        if found != wanted:
            name = next(name for name in {**wanted, **found} if wanted.get(name) != found.get(name))
            raise HorovodInternalError(
                f"the ranks train different models: parameter {name!r} is {_said(wanted.get(name))} on rank "
                f"{first_rank} and {_said(found.get(name))} on rank {rank}"
            )
    return [row[0] for row in first], sparse


def _said(row: Any) -> str:
    return "missing" if row is None else f"{row[0].removeprefix('torch.')}{row[1]} with strides {row[2]}"
