"""The leg between hosts over Gloo, as torch brings it.

A process group of its own is made for each group of ranks, and only its point-to-point messages are used: unlike Gloo's
collectives they change no thread on the side that sends. A receive that stands before the peer's message comes saves a
round trip, since Gloo otherwise asks whether it may send (measured between two network namespaces, 1 KiB exchanged:
29 us with receives posted ahead, 80 us without, 200 us for Gloo's allreduce). One connection is as fast as several.
"""

from __future__ import annotations

import ctypes
import os
from datetime import timedelta

from launcher.collectives.legs import LegError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from launcher.collectives.group import Store


class GlooLeg:
    """See legs.Leg."""

    name = "gloo"
    # Each message costs changes of threads on the side that receives. Measured for 25 MiB both ways at 10 Gbit/s: 25 ms
    # in messages of 4 MiB, 29 ms in those of 1 MiB, 35 ms in those of 256 KiB.
    message_bytes = 4 * 1024 * 1024

    def __init__(self, store: Store, prefix: str, rank: int, size: int, timeout_s: float) -> None:
        """Connects to all members; blocks until all have come.

        Raises:
            LegError: a connection could not be made.
        """
        import torch
        from torch import distributed as dist

        if not dist.is_available() or not dist.is_gloo_available():
            raise LegError(-1, "system", "this torch was built without Gloo")
        self._torch = torch
        # Gloo closes its connections with the last reference to a message, so all that are under way are known here.
        self._open: dict[int, list[Any]] = {}
        self.timeout_s = timeout_s
        options = dist.ProcessGroupGloo._Options()
        options._timeout = _delta(timeout_s)
        self._store = torch_store(store)  # what Gloo holds of it does not keep a store that is written in Python
        interfaces = [one for one in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if one]
        try:
            options._devices = [
                dist.ProcessGroupGloo.create_device(interface=interfaces[0])
                if interfaces
                else dist.ProcessGroupGloo.create_default_device()
            ]
            self._group: Any = dist.ProcessGroupGloo(
                dist.PrefixStore(f"{prefix}/gloo", self._store), rank, size, options
            )
        except RuntimeError as error:
            raise LegError(-1, "system", f"Gloo could not connect the hosts: {_plain(error)}") from error

    def connect(self, peers: Sequence[int]) -> None:
        """All members are connected."""

    def isend(self, peer: int, address: int, nbytes: int, lane: int) -> Any:
        return self._begin(True, peer, address, nbytes, lane)

    def irecv(self, peer: int, address: int, nbytes: int, lane: int) -> Any:
        return self._begin(False, peer, address, nbytes, lane)

    def _begin(self, send: bool, peer: int, address: int, nbytes: int, lane: int) -> Any:
        if self._group is None:
            raise LegError(peer, "closed", "the leg is closed")
        tensor = self._torch.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=self._torch.uint8)
        try:
            handle = [(self._group.send if send else self._group.recv)([tensor], peer, lane), peer]
        except RuntimeError as error:
            raise self._error(error, peer) from error
        self._open[id(handle)] = handle
        return handle

    def wait(self, handles: Iterable[Any]) -> None:
        limit = _delta(self.timeout_s)
        for handle in handles:
            if handle:
                self._wait(handle, limit)

    def _wait(self, handle: list[Any], limit: timedelta) -> None:
        peer = handle[1]
        try:
            handle[0].wait(limit)
        except RuntimeError as error:
            raise self._error(error, peer) from error
        finally:
            self._forget(handle)

    def _forget(self, handle: list[Any]) -> None:
        self._open.pop(id(handle), None)
        handle.clear()

    def watch(self, handles: Sequence[Any]) -> None:
        """A peer that fails closes its connections, which ends every wait for it: nothing to look at in between."""

    def arrived(self, handle: Any, limit_s: float) -> bool:
        try:
            self._wait(handle, _delta(limit_s))
        except LegError:  # the connection was closed without it
            return False
        return True

    def progress(self) -> None:
        """Gloo has a thread of its own."""

    def close(self) -> None:
        self._group = None
        for handle in list(self._open.values()):
            self._forget(handle)

    def _error(self, error: RuntimeError, peer: int) -> LegError:
        text = _plain(error)
        return LegError(peer, "timeout" if "timed out" in text.lower() else "lost", f"Gloo: {text}")


def torch_store(store: Store) -> Any:
    """``store`` as one of torch's. torch's own, or what has one in ``store.store``, is taken as it is."""
    from torch import distributed as dist

    for candidate in (store, getattr(store, "store", None)):
        if isinstance(candidate, dist.Store):
            return candidate

    class Adapter(dist.Store):  # type: ignore[misc]
        """What Gloo needs of a store: set, get, wait and check of keys that come once."""

        def set(self, key: str, value: bytes | str) -> None:
            store.set(key, value.encode() if isinstance(value, str) else bytes(value))

        def get(self, key: str) -> bytes:
            return store.get(key)

        def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
            for key in keys:
                store.get(key)

    return Adapter()


def _delta(seconds: float) -> timedelta:
    return timedelta(seconds=min(seconds, 1e9))


def _plain(error: RuntimeError) -> str:
    """Gloo's text without the place in its source that it begins with."""
    text = str(error)
    return text.rpartition("] ")[2] if text.startswith("[") and "] " in text else text
