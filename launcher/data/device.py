"""Batches in GPU memory: copied there beside the script's own work, or made there of a set that the GPU holds.

Both take the place of the native engine in :class:`launcher.data.Loader`, and give the same records in the same order.
"""

from __future__ import annotations

from collections import deque

from launcher.data.fields import Ragged, Sparse, source_fields
from launcher.errors import LauncherError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, Protocol

    from launcher._data import Engine, Source

    class Batches(Protocol):
        """What a loader uses of ``launcher._data.Engine``, and finds here."""

        @property
        def step(self) -> int: ...
        def next(self) -> dict[str, Any] | None: ...
        def restart(self, epoch: dict[str, int]) -> None: ...
        def close(self) -> None: ...
        def statistics(self) -> dict[str, Any]: ...


# Copies that are begun before the script asks for their batches: one is then under way while the script works with the
# last one, and the next can begin as soon as it is done.
_AHEAD = 2


def find_device(device: object, cache: bool) -> Any:
    """The ``torch.device`` that a loader's ``device`` means; ``cuda`` is the current GPU. None: there is no copy.

    Raises:
        UsageError: there is no such GPU for torch, or with ``cache`` for the package, or ``cache`` without a device.
    """
    if device is None:
        if cache:
            raise UsageError("device_cache is True without a device; pass device='cuda' or 'cuda:N' with it")
        return None
    try:
        import torch
    except ImportError:
        raise UsageError(f"device is {device!r}, which needs torch; install it, or leave device out") from None
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise UsageError(f"device is {device!r}; expected 'cuda', 'cuda:N' or 'cpu'") from None
    if found.type == "cpu" and not cache:
        return None
    if found.type != "cuda":
        what = "device_cache is True, which needs a GPU" if cache else "batches can be on no such device"
        raise UsageError(f"device is {device!r}; expected 'cuda' or 'cuda:N': {what}")
    if not torch.cuda.is_available():
        raise UsageError(
            f"device is {device!r}, but torch ({torch.__version__}) finds no CUDA device; see nvidia-smi and "
            "CUDA_VISIBLE_DEVICES, and whether this torch is built for CUDA"
        )
    index = torch.cuda.current_device() if found.index is None else found.index
    if index >= torch.cuda.device_count():
        raise UsageError(f"device is {device!r}, but torch finds {torch.cuda.device_count()} GPUs, counted from 0")
    if cache:
        from launcher._native import cuda_devices

        devices, reason = cuda_devices()
        if index >= len(devices):
            raise UsageError(
                f"device_cache is True, but the package's own CUDA library does not see {device!r}: {reason}"
            )
    return torch.device("cuda", index)


def on_device(
    source: Source, epoch: dict[str, int], device: Any, *, cache: bool, pin: bool | None, **options: Any
) -> Batches:
    """What gives the batches of ``epoch`` on ``device``, in place of ``launcher._data.Engine``.

    Args:
        source, epoch, options: as for the engine.
        device: from find_device().
        cache: hold all records on the device; they are read here.
        pin: False: do not have the host's memory pinned.

    Raises:
        DataError: a file is not as it was; with ``cache``: any record can not be read.
        UsageError: with ``cache``: the GPU has not the memory for the records, or they are not of one size.
    """
    if cache:
        from launcher.data.device_cache import CachedBatches

        return CachedBatches(source, epoch, device, pin, options)
    return CopiedBatches(source, epoch, device, pin, options)


class Copies:
    """A stream for copies to the device, and what they read from, which is kept until they are done."""

    def __init__(self, device: Any) -> None:
        import torch

        self._torch, self.device = torch, device
        self.stream = torch.cuda.Stream(device)
        self._held: deque[tuple[Any, object]] = deque()

    def mark(self, held: object) -> Any:
        """The event after what was given to the stream until now; ``held`` is kept until then."""
        event = self._torch.cuda.Event()
        event.record(self.stream)
        self._held.append((event, held))
        return event

    def let_go(self, most: int) -> None:
        """Drops what is done with, and waits where more than ``most`` are not."""
        while self._held and (self._held[0][0].query() or len(self._held) > most):
            self._held[0][0].synchronize()
            self._held.popleft()

    def finish(self) -> None:
        """Waits for all of it."""
        self.let_go(0)


def make_engine(
    source: Source, epoch: dict[str, int], device: Any, pin: bool | None, options: Mapping[str, Any]
) -> Engine:
    """An engine of tensors, in pinned memory unless ``pin`` is False; it has a batch back when nobody holds it."""
    from launcher import _data
    from launcher.data.torch_data import makers_of, registering

    given = {**options, "reuse": False}
    if pin is not False:
        given |= registering(device)
    return _data.Engine(source, epoch, makers_of(source_fields(source.fields)), **given)


class CopiedBatches:
    """An engine's batches, on the device: copied by a stream of their own, begun before they are asked for.

    The memory is torch's, the batch the caller's for good. Work that the caller's current stream is given after next()
    waits for the copy. For another stream, the rules are those of any tensor of torch (``record_stream``).
    """

    def __init__(
        self, source: Source, epoch: dict[str, int], device: Any, pin: bool | None, options: Mapping[str, Any]
    ) -> None:
        import torch

        self._torch, self._device, self._pin = torch, device, pin is not False
        self._batches, self._rows = 0, 0
        self._copies = Copies(device)
        # What is on its way to the device is not the user's: it needs slots beyond the user's ring.
        ring = max(options["ring"], _AHEAD + 2)
        given = {**options, "ring": ring, "ring_limit": max(options["ring_limit"], ring)}
        self._engine = make_engine(source, epoch, device, pin, given)
        self._begin()

    def _begin(self) -> None:
        self._ahead: deque[tuple[dict[str, Any], Any]] = deque()
        self._host: dict[str, Any] | None = None  # a batch whose copy is still to be begun
        self._error: LauncherError | None = None  # that comes after those that are under way
        self._ended = False
        self._step = 0

    @property
    def step(self) -> int:
        """That comes next: batches that were copied ahead do not count."""
        return self._step

    def next(self) -> dict[str, Any] | None:
        """The next batch, or None after the last one. Errors as the engine's, and in their turn."""
        while len(self._ahead) < _AHEAD and not self._ended and self._error is None:
            self._copy_next()
        if not self._ahead:
            if self._error is not None:
                raise self._error
            return None
        batch, copied = self._ahead.popleft()
        current = self._torch.cuda.current_stream(self._device)
        current.wait_event(copied)
        for tensor in _tensors(batch):
            tensor.record_stream(current)  # it was allocated for the copies' stream
        self._step += 1
        self._batches += 1
        self._rows += len(next(iter(batch.values())))
        return batch

    def _copy_next(self) -> None:
        self._copies.let_go(_AHEAD)
        if self._host is None:
            try:
                self._host = self._engine.next()
            except LauncherError as error:
                self._error = error
                return
        if self._host is None:
            self._ended = True
            return
        try:
            with self._torch.cuda.stream(self._copies.stream):
                batch = {name: self._to_device(column) for name, column in self._host.items()}
        finally:  # an error (no memory, say) leaves the batch for the next call, but some of it may be under way
            copied = self._copies.mark(self._host)
        self._ahead.append((batch, copied))
        self._host = None

    def _to_device(self, column: Any) -> Any:
        if isinstance(column, Ragged):
            return Ragged(self._to_device(column.values), self._to_device(column.offsets))
        if isinstance(column, Sparse):
            values, offsets, keys = (self._to_device(part) for part in (column.values, column.offsets, column.keys))
            return Sparse(values, offsets, keys, column.shape)
        # What the engine does not pin (the mask, columns that grow) goes through torch's pinned memory, which it keeps
        # until the copy is done: from other memory, the host would wait for the copies before.
        if self._pin and column.numel() and not column.is_pinned():
            column = column.pin_memory()
        return column.to(self._device, non_blocking=True)

    def restart(self, epoch: dict[str, int]) -> None:
        """As the engine's."""
        self._begin()
        self._engine.restart(epoch)

    def statistics(self) -> dict[str, Any]:
        """As the engine's; ``lent``: batches whose copy is under way."""
        return {**self._engine.statistics(), "batches": self._batches, "records": self._rows}

    def close(self) -> None:
        """Waits for copies under way. Batches that were given stay valid."""
        self._copies.finish()
        self._begin()
        self._engine.close()

    def __del__(self) -> None:
        # Memory that a copy reads from must not go before it is done. (Not there: the constructor failed.)
        copies = self.__dict__.get("_copies")
        if copies is not None:
            copies.finish()


def _tensors(batch: Mapping[str, Any]) -> list[Any]:
    found = []
    for column in batch.values():
        if isinstance(column, Ragged):
            found += [column.values, column.offsets]
        elif isinstance(column, Sparse):
            found += [column.values, column.offsets, column.keys]
        else:
            found.append(column)
    return found
