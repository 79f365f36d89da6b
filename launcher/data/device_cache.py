"""Batches that are made on the device of records that it holds, all of them."""

from __future__ import annotations

from launcher.data.device import Copies, make_engine
from launcher.data.fields import DTYPES, SIZES, source_fields
from launcher.data.order import SHUFFLES, TAILS
from launcher.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from launcher._data import Source
    from launcher.data.fields import Field

# A copy over PCIe reaches its full rate with some MiB.
_LOAD_BYTES = 32 << 20
_ALLOCATION = 512  # torch's allocator rounds up to this
_MOST_ROW_BYTES = (1 << 31) - 1024  # what a row of the native gather may have, by single bytes


def check_cache(fields: Sequence[Field]) -> None:
    """Raises UsageError where records of these fields can not be held by a GPU."""
    for field in fields:
        if field.kind != "fixed":
            raise UsageError(
                f"device_cache holds fields that are of one size in all records, but {field.name!r} is {field.kind}; "
                "leave the field out (fields=...), or leave device_cache out"
            )
        if _record_bytes(field) > _MOST_ROW_BYTES:
            raise UsageError(
                f"device_cache: field {field.name!r} has {_record_bytes(field)} bytes in each record; "
                f"{_MOST_ROW_BYTES} are the most"
            )


class CachedBatches:
    """Batches of records that the device holds, all of them: two kernels a batch (native/cuda/gather.h), no copy.

    They run on the caller's current stream. The records' numbers are computed on the device too, but for the order
    ``blocks``, whose numbers come from the host. A batch is the caller's for good.
    """

    def __init__(
        self, source: Source, epoch: dict[str, int], device: Any, pin: bool | None, options: Mapping[str, Any]
    ) -> None:
        import torch

        from launcher._native import CudaGather

        self._torch, self._device = torch, device
        self._fields = source_fields(source.fields)
        check_cache(self._fields)
        self._with_mask, self._with_numbers = options["mask"], options["numbers"]
        self._records = epoch["records"]
        # Where other records may stand in for bad ones, it is known of each record whether it is itself.
        self._substituted = options["substitute"]
        self._columns: dict[str, Any] = self._allocate()
        self._batches, self._rows = 0, 0
        self._bad: dict[str, Any] = {"substituted": 0, "first_bad": ""}
        self._load(source, pin, options)
        sizes = [column[:1].nbytes if self._records else 0 for column in self._columns.values()]
        self._gather = CudaGather(
            self._records, [column.data_ptr() for column in self._columns.values()], sizes, device.index
        )
        self._table: Any = None  # of the order of few records
        self._table_there: Any = None
        self._streams: set[int] = set()
        self.restart(epoch)

    # --- loading ------------------------------------------------------------------------------------------------------

    def _allocate(self) -> dict[str, Any]:
        torch, device = self._torch, self._device
        wanted = {field.name: (field.shape, getattr(torch, field.dtype)) for field in self._fields}
        needed = sum(_rounded(self._records * _record_bytes(field)) for field in self._fields)
        if self._substituted:
            wanted["mask"] = ((), torch.bool)
            needed += _rounded(self._records)
        available, total = torch.cuda.mem_get_info(device)
        available += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if needed <= available:
            try:
                return {
                    name: torch.empty((self._records, *shape), dtype=dtype, device=device)
                    for name, (shape, dtype) in wanted.items()
                }
            except torch.cuda.OutOfMemoryError:  # it is free, but in pieces, or somebody else has it now
                pass
        raise UsageError(
            f"device_cache: {self._records} records take {_mebibytes(needed)} MiB of GPU memory, but {device} has "
            f"{_mebibytes(available)} MiB free of {_mebibytes(total)}; take fewer fields or a smaller type (Cast), or "
            "leave device_cache out"
        )

    def _load(self, source: Source, pin: bool | None, options: Mapping[str, Any]) -> None:
        """Reads all records, as they come, through an engine of large batches."""
        if self._records == 0:
            return
        each = max(1, sum(_record_bytes(field) for field in self._fields))
        epoch = {
            "shuffle": SHUFFLES.index("none"),
            "seed": 0,
            "epoch": 0,
            "records": self._records,
            "extent": 1,
            "window": 1,
            "lanes": 1,
            "base": 0,
            "world": 1,
            "rank": 0,
            "batch": max(1, min(self._records, _LOAD_BYTES // each)),
            "tail": TAILS.index("short"),
            "agreed_steps": -1,
        }
        ring = options["threads"] + 3  # of which one is copied, and one waits for it
        given = {**options, "ring": ring, "ring_limit": ring, "mask": self._substituted, "numbers": False}
        copies = Copies(self._device)
        # torch's memory may still be in use by what the current stream was given before it was freed.
        copies.stream.wait_stream(self._torch.cuda.current_stream(self._device))
        engine = make_engine(source, epoch, self._device, pin, given)
        try:
            done = 0
            while (batch := engine.next()) is not None:
                rows = 0
                with self._torch.cuda.stream(copies.stream):
                    for name, column in self._columns.items():
                        rows = len(batch[name])
                        column[done : done + rows].copy_(batch[name], non_blocking=True)
                done += rows
                copies.mark(batch)
                del batch
                copies.let_go(2)
            seen = engine.statistics()
            self._bad = {name: seen[name] for name in self._bad}
        finally:
            copies.finish()
            engine.close()

    # --- batches ------------------------------------------------------------------------------------------------------

    def restart(self, epoch: dict[str, int]) -> None:
        """As the engine's. The records stay."""
        from launcher import _data

        if epoch["records"] != self._records:
            raise ValueError(f"an order of {epoch['records']} records; the device holds {self._records}")
        self._epoch, self._step = dict(epoch), 0
        share = [epoch[name] for name in ("base", "world", "rank", "batch", "tail", "agreed_steps")]
        self._base, self._world, self._rank, self._batch, self._tail, self._agreed = share
        self._steps = self._agreed
        if self._agreed < 0:
            self._steps = _data.steps(self._records, self._base, self._world, self._batch, self._tail)
        names = ("shuffle", "seed", "epoch", "records", "extent", "window", "lanes")
        self._order = _data.Order(*(epoch[name] for name in names))
        self._on_host = SHUFFLES[epoch["shuffle"]] == "blocks"
        if self._on_host:
            return
        table = self._order.table
        if table:
            # From pinned memory, so the epoch begins without waiting; int16 has uint16's bits.
            host = self._torch.frombuffer(bytearray(table), dtype=self._torch.int16).pin_memory()
            self._table = host.to(self._device, non_blocking=True)
            self._table_there = self._torch.cuda.current_stream(self._device).record_event()
            self._streams.clear()
        self._gather.set_order(self._order.network, self._table.data_ptr() if table else 0)

    @property
    def step(self) -> int:
        """That comes next."""
        return self._step

    def next(self) -> dict[str, Any] | None:
        """The next batch, or None after the last one."""
        if self._step == self._steps:
            return None
        torch, device = self._torch, self._device
        stream = torch.cuda.current_stream(device)
        self._meet(stream)
        if self._on_host:
            numbers, valid = self._numbers_of_host()
        else:
            numbers, valid = self._numbers_of_device(stream.cuda_stream)
        rows = len(numbers)
        found = {
            name: torch.empty((rows, *column.shape[1:]), dtype=column.dtype, device=device)
            for name, column in self._columns.items()
        }
        self._gather.gather(
            [column.data_ptr() for column in found.values()], numbers.data_ptr(), rows, stream.cuda_stream
        )
        if self._with_mask:
            mask = found["mask"] if self._substituted else torch.ones(rows, dtype=torch.bool, device=device)
            if valid < rows:
                mask[valid:] = False
            found["mask"] = mask
        if self._with_numbers:
            found["record"] = numbers
        self._step += 1
        self._batches += 1
        self._rows += rows
        return found

    def _meet(self, stream: Any) -> None:
        """``stream`` waits for the table, and what is given to it is waited for before memory is used for others."""
        if stream.cuda_stream in self._streams:
            return
        self._streams.add(stream.cuda_stream)
        for column in self._columns.values():
            column.record_stream(stream)
        if self._table is not None:
            stream.wait_event(self._table_there)
            self._table.record_stream(stream)

    def _numbers_of_device(self, stream: int) -> tuple[Any, int]:
        from launcher import _data

        begin, padding, rows, valid = _data.span_of(
            self._records, self._step, self._base, self._world, self._rank, self._batch, self._tail, self._agreed
        )
        numbers = self._torch.empty(rows, dtype=self._torch.int64, device=self._device)
        self._gather.number(numbers.data_ptr(), begin, padding, rows, valid, stream)
        return numbers, valid

    def _numbers_of_host(self) -> tuple[Any, int]:
        from launcher import _data

        numbers, valid = _data.rows_of(
            self._order, self._step, self._base, self._world, self._rank, self._batch, self._tail, self._agreed
        )
        host = self._torch.tensor(numbers, dtype=self._torch.int64)
        return (host.pin_memory() if numbers else host).to(self._device, non_blocking=True), valid

    def statistics(self) -> dict[str, Any]:
        """As the engine's; nothing is waited for or lent here."""
        given = {"batches": self._batches, "records": self._rows}
        return {**given, **self._bad, "waited_s": 0.0, "full_s": 0.0, "slots": 0, "lent": 0}

    def close(self) -> None:
        """Gives the device's memory back. Batches that were given stay valid."""
        self._columns, self._table = {}, None
        self._steps = self._step


def _record_bytes(field: Field) -> int:
    count = SIZES[DTYPES.index(field.dtype)]
    for extent in field.shape:
        count *= extent
    return count


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _ALLOCATION) * _ALLOCATION


def _mebibytes(nbytes: int) -> int:
    return -(-nbytes >> 20)
