"""The leg between hosts over MPI: point-to-point messages through mpi4py, on a communicator of the group's own.

MPI's own collectives are not used: they fold in an order of their own, have no bfloat16, and take temporary memory for
each call. Messages stay below 4 MiB for the same reason.
"""

from __future__ import annotations

import ctypes
import os
import time
import zlib

from launcher.collectives.legs import LegError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

# The world's tags from here on are ours; MPI guarantees them up to 32767.
_TAGS, _STORE_TAG = 28_000, 32_001
# How long a wait only polls, then yields the processor between polls, before it sleeps between them.
_POLL_S, _YIELD_S, _SLEEP_S = 0.0005, 0.05, 0.0002
_POLLS_BETWEEN_LOOKS = 64


class MpiLeg:
    """See legs.Leg."""

    name = "mpi"
    # Measured with Open MPI 5 for 25 MiB both ways at 10 Gbit/s, four messages under way: 22.3 ms in messages of
    # 256 KiB, 24.5 ms in those of 1 MiB, 25.3 ms in those of 4 MiB; the wire itself takes 22.1 ms.
    message_bytes = 256 * 1024

    def __init__(self, name: str, ranks: Sequence[int], timeout_s: float) -> None:
        """Makes the communicator; collective over the members. ``ranks``: the members' ranks in MPI's world."""
        from mpi4py import MPI

        self._mpi = MPI
        self.timeout_s = timeout_s
        world = MPI.COMM_WORLD
        tag = _TAGS + zlib.crc32(name.encode()) % 4000
        members = world.Get_group().Incl(list(ranks))
        try:
            self._comm: Any = world.Create_group(members, tag)
        except MPI.Exception as error:
            raise LegError(-1, "system", f"MPI could not make a communicator: {error}") from error
        finally:
            members.Free()
        self._byte = MPI.BYTE
        self._watched: list[Any] = []
        self._receives: dict[int, Any] = {}

    def connect(self, peers: Sequence[int]) -> None:
        """All members are connected."""

    def isend(self, peer: int, address: int, nbytes: int, lane: int) -> Any:
        try:
            return self._comm.Isend([self._buffer(address, nbytes), self._byte], peer, lane), peer
        except self._mpi.Exception as error:
            raise LegError(peer, "lost", f"MPI: {error}") from error

    def irecv(self, peer: int, address: int, nbytes: int, lane: int) -> Any:
        try:
            handle = self._comm.Irecv([self._buffer(address, nbytes), self._byte], peer, lane), peer
        except self._mpi.Exception as error:
            raise LegError(peer, "lost", f"MPI: {error}") from error
        self._receives[id(handle)] = handle
        return handle

    def wait(self, handles: Iterable[Any]) -> None:
        for handle in handles:
            request, peer = handle
            try:
                if not request.Test():
                    self._poll(request, peer)
            except self._mpi.Exception as error:
                raise LegError(peer, "lost", f"MPI: {error}") from error
            self._receives.pop(id(handle), None)

    def _poll(self, request: Any, peer: int) -> None:
        began = time.monotonic()
        while True:
            for _ in range(_POLLS_BETWEEN_LOOKS):
                if request.Test():
                    return
            waited = time.monotonic() - began
            for notice, sender in self._watched:
                if notice.Test():
                    raise LegError(sender, "notice", "has given the group up")
            if waited > self.timeout_s:
                raise LegError(peer, "timeout", f"nothing came over MPI for {waited:.1f} s")
            if waited > _YIELD_S:
                time.sleep(_SLEEP_S)
            elif waited > _POLL_S:
                os.sched_yield()

    def watch(self, handles: Sequence[Any]) -> None:
        self._watched = list(handles)

    def arrived(self, handle: Any, limit_s: float) -> bool:
        request, _ = handle
        end = time.monotonic() + limit_s
        while not request.Test():  # True again once it is over: the request is then null
            if time.monotonic() > end:
                return False
            time.sleep(_SLEEP_S)
        return True

    def progress(self) -> None:
        self._comm.Iprobe(self._mpi.ANY_SOURCE, self._mpi.ANY_TAG)

    def close(self) -> None:
        """Receives that nothing will match are cancelled; the communicator stays, since freeing it is collective."""
        self._watched = []
        for request, _ in self._receives.values():
            if not request.Test():
                request.Cancel()
                request.Wait()
        self._receives = {}

    def _buffer(self, address: int, nbytes: int) -> Any:
        return (ctypes.c_char * nbytes).from_address(address)


class MpiStore:
    """A Store over MPI's world, to make groups with where torch is not: ``set`` tells all ranks, ``get`` waits."""

    def __init__(self, timeout_s: float) -> None:
        from mpi4py import MPI

        self._mpi, self._world = MPI, MPI.COMM_WORLD
        self.timeout_s = timeout_s
        self._values: dict[str, bytes] = {}
        self._sent: list[Any] = []

    def set(self, key: str, value: bytes) -> None:
        self._values[key] = bytes(value)
        message = len(key.encode()).to_bytes(4, "little") + key.encode() + bytes(value)
        self._sent = [one for one in self._sent if not one[0].Test()]
        for peer in range(self._world.Get_size()):
            if peer != self._world.Get_rank():
                self._sent.append((self._world.Isend([message, self._mpi.BYTE], peer, _STORE_TAG), message))

    def get(self, key: str) -> bytes:
        end = time.monotonic() + self.timeout_s
        status = self._mpi.Status()
        while key not in self._values:
            if self._world.Iprobe(self._mpi.ANY_SOURCE, _STORE_TAG, status):
                message = bytearray(status.Get_count(self._mpi.BYTE))
                self._world.Recv([message, self._mpi.BYTE], status.Get_source(), _STORE_TAG)
                length = int.from_bytes(message[:4], "little")
                self._values[message[4 : 4 + length].decode()] = bytes(message[4 + length :])
            elif time.monotonic() > end:
                raise TimeoutError(f"no {key} after {self.timeout_s:g} s")
            else:
                time.sleep(_SLEEP_S)
        return self._values[key]
