"""Memory of tensors that all ranks map, so that collectives need no copy: moved there in place, or allocated there."""

from __future__ import annotations

import ctypes
import os
import weakref
from bisect import bisect_right, insort
from collections import deque
from functools import partial

import torch

from launcher.collectives.place import read_switch
from launcher.collectives.torch_engine import say_once

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from launcher.collectives.group import Group

SWITCH = "LAUNCHER_ZERO_COPY"
# Smaller messages cost less to copy than to look after.
SMALLEST = 32 << 10
# Below this a message goes through a slot whatever memory it lies in, so nobody looks whether that is registered.
LOOKED_AT = 4 << 10
# torch shares storages through files here.
_SHARED_MEMORY = "/dev/shm"
_SEEN = 256
_SWEEP = 256
_UNUSED = 20_000
_BLOCK = 64 << 10


def switched_on() -> bool:
    """Whether tensors may be moved into shared memory: ``LAUNCHER_ZERO_COPY`` is not 0.

    Raises:
        UsageError: the variable is neither 0 nor 1.
    """
    return read_switch(SWITCH)


def _sharing_works() -> bool:
    """Whether this torch has what moving a storage takes: none of it is promised by torch's documentation."""
    try:
        storage = torch.empty(SMALLEST, dtype=torch.uint8).untyped_storage()
        if not storage.resizable() or torch._C._storage_Use_Count(storage._cdata) < 1:
            return False
        before = bytes(storage[:16])
        file, size = storage._share_fd_cpu_()
        return isinstance(file, int) and size >= SMALLEST and storage.is_shared() and bytes(storage[:16]) == before
    except (AttributeError, TypeError, ValueError, RuntimeError, OSError) as error:
        say_once("sharing", f"gradient buckets stay in private memory, collectives copy them: {error}")
        return False


class _Entry:
    __slots__ = ("address", "end", "last", "storage")

    def __init__(self, storage: Any, address: int, nbytes: int, last: int) -> None:
        self.storage = storage  # while it is held, nothing else can come to lie at its address
        self.address = address
        self.end = address + nbytes
        self.last = last


class Buckets:
    """Moves memory that is reduced again and again, DDP's gradient buckets, into memory which all ranks map.

    A candidate is a flat tensor that is the whole of its storage, with other tensors (the gradients) viewing it; it is
    moved when it comes for the second time, since DDP makes new buckets after its first iteration. Moving keeps every
    view valid, as ``Tensor.share_memory_`` does. Not moved: memory that NumPy or another library knows by its address
    (torch marks what it shares with NumPy; a lone tensor might be known elsewhere).

    Each rank decides for itself; the core copies when any rank's part of a message is not registered.
    """

    _possible: bool | None = None

    def __init__(self, group: Group) -> None:
        self._group = group
        self._on = switched_on()
        self._seen: dict[int, tuple[int, int]] = {}
        self._entries: dict[int, _Entry] = {}
        self._bases: list[int] = []
        self._clock = 0

    def look(self, tensor: Any, nbytes: int, candidate: bool) -> None:
        """To be called before the group gets ``tensor``'s address (it may change here), by the thread that calls it."""
        if self._bases:
            self._clock += 1
            address = tensor.data_ptr()
            index = bisect_right(self._bases, address) - 1
            if index >= 0:
                entry = self._entries[self._bases[index]]
                if address < entry.end:
                    if entry.storage.data_ptr() == entry.address and entry.storage.is_shared():
                        entry.last = self._clock
                        return
                    self._drop(entry)  # resized since: its memory is another one
            if self._clock % _SWEEP == 0:
                self._sweep()
        if candidate and self._on and nbytes >= SMALLEST and tensor.dim() == 1 and not tensor.requires_grad:
            self._consider(tensor, nbytes)

    def close(self) -> None:
        """Lets go of all storages; the group ends and with it their registration."""
        self._on = False
        self._entries.clear()
        self._bases.clear()
        self._seen.clear()

    def _consider(self, tensor: Any, nbytes: int) -> None:
        storage = tensor.untyped_storage()
        # Three: this tensor, one that views it, and the Python object `storage`.
        if storage.nbytes() != nbytes or torch._C._storage_Use_Count(storage._cdata) < 3:
            return
        address, identity = storage.data_ptr(), storage._cdata
        if self._seen.get(address) != (identity, nbytes):
            if len(self._seen) >= _SEEN:
                self._seen.clear()
            self._seen[address] = (identity, nbytes)
            return
        del self._seen[address]
        if storage.resizable() and self._is_possible() and self._has_room(nbytes):
            self._sweep()
            self._share(storage)

    def _share(self, storage: Any) -> None:
        try:
            file, size = storage._share_fd_cpu_()
            address = storage.data_ptr()
            self._group.register(address, size, file)
        except (RuntimeError, OSError) as error:
            self._give_up(str(error))
            return
        self._entries[address] = _Entry(storage, address, size, self._clock)
        insort(self._bases, address)

    def _drop(self, entry: _Entry) -> None:
        self._group.unregister(entry.address)
        del self._entries[entry.address]
        self._bases.remove(entry.address)

    def _sweep(self) -> None:
        for entry in list(self._entries.values()):
            alone = torch._C._storage_Use_Count(entry.storage._cdata) <= 1
            if alone or self._clock - entry.last > _UNUSED:
                self._drop(entry)

    def _has_room(self, nbytes: int) -> bool:
        """Other users of the folder, data loaders for one, keep half of what is free."""
        try:
            state = os.statvfs(_SHARED_MEMORY)
        except OSError as error:
            self._give_up(str(error))
            return False
        free = state.f_bavail * state.f_frsize
        if free < 2 * nbytes:
            self._give_up(
                f"{_SHARED_MEMORY} has {free >> 20} MiB free, a bucket of {nbytes >> 20} MiB asks for twice its size"
            )
            return False
        return True

    def _give_up(self, reason: str) -> None:
        self._on = False
        say_once("buckets", f"gradient buckets stay in private memory from now on, collectives copy them: {reason}")

    @classmethod
    def _is_possible(cls) -> bool:
        if cls._possible is None:
            cls._possible = _sharing_works()
        return cls._possible


class Pool:
    """Tensors in memory that all ranks of a group map. What a tensor leaves is taken for the next one of its size.

    Args:
        group: allocates; its mappings last as long as this pool, and the pool as long as any of its tensors.
        run: calls a function when the group is not in another call.
    """

    def __init__(self, group: Group, run: Callable[[Callable[[], Any]], Any]) -> None:
        self._group = group
        self._run = run
        self._idle: dict[int, list[int]] = {}
        self._idle_bytes = 0
        self._bytes = 0
        self._peak = 0  # of bytes in use
        self._returned: deque[tuple[int, int]] = deque()
        self.closed = False

    def tensor(self, numel: int, dtype: Any) -> Any:
        """An uninitialized flat tensor whose storage begins with it and is registered on this rank.

        Raises:
            OSError: no memory.
            CollectiveError: the group has failed.
        """
        if self.closed or numel == 0:
            return torch.empty(numel, dtype=dtype)
        nbytes = numel * dtype.itemsize
        size = -(-nbytes // _BLOCK) * _BLOCK
        self._collect()
        if self._idle.get(size):
            address = self._idle[size].pop()
            self._idle_bytes -= size
        else:
            address = self._run(partial(self._group.allocate, size))
        self._bytes += size
        self._peak = max(self._peak, self._bytes)
        buffer = (ctypes.c_char * nbytes).from_address(address)
        # deque.append alone: a tensor may die in any thread, and in the middle of tensor().
        weakref.finalize(buffer, self._returned.append, (address, size)).atexit = False
        buffer._pool = self
        return torch.frombuffer(buffer, dtype=dtype)

    def _collect(self) -> None:
        while self._returned:
            address, size = self._returned.popleft()
            self._bytes -= size
            if self._idle_bytes + size > self._peak:  # a model that is gone
                self._run(partial(self._group.release, address))
            else:
                self._idle.setdefault(size, []).append(address)
                self._idle_bytes += size
