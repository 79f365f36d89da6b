"""The leg between hosts over MPI: point-to-point messages on a communicator of the group's own.

mpi4py starts MPI and makes the communicator; the messages themselves go from C++ (native/python/mpi.cpp), through the
functions of the MPI that mpi4py is linked to. MPI's own collectives are not used: they fold in an order of their own,
have no bfloat16, and take temporary memory for each call.
"""

from __future__ import annotations

import sys
import time
import zlib

from launcher.collectives.legs import HEADER, LegError, Mismatch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any

    from launcher.collectives.mailboxes import Mailboxes

# The world's tags from here on are ours; MPI guarantees them up to 32767.
_TAGS, _STORE_TAG = 28_000, 32_001
_SLEEP_S = 0.0002
# A short message is sent in pieces that go out at once: Open MPI asks before it sends more than 64 KiB over TCP.
_PIECE_BYTES = 32 * 1024


class MpiLeg:
    """See legs.Leg. Handles are numbers."""

    name = "mpi"
    # Measured with Open MPI 5 for 25 MiB both ways at 10 Gbit/s, four messages under way: 22.3 ms in messages of
    # 256 KiB, 24.5 ms in those of 1 MiB, 25.3 ms in those of 4 MiB; the wire itself takes 22.1 ms.
    message_bytes = 256 * 1024

    def __init__(self, name: str, ranks: Sequence[int], timeout_s: float) -> None:
        """Makes the communicator; collective over the members. ``ranks``: the members' ranks in MPI's world."""
        from mpi4py import MPI

        from launcher._native import MpiChannel

        self.timeout_s = timeout_s
        world = MPI.COMM_WORLD
        tag = _TAGS + zlib.crc32(name.encode()) % 4000
        members = world.Get_group().Incl(list(ranks))
        try:
            self._communicator: Any = world.Create_group(members, tag)
            self._channel = MpiChannel(
                str(sys.modules["mpi4py.MPI"].__file__), MPI._handleof(self._communicator), MPI._handleof(MPI.BYTE)
            )
        except (MPI.Exception, RuntimeError) as error:
            raise LegError(-1, "system", f"MPI could not connect the hosts: {error}") from error
        finally:
            members.Free()

    def isend(self, peer: int, address: int, nbytes: int, lane: int) -> Any:
        try:
            return self._channel.isend(peer, address, nbytes, lane)
        except RuntimeError as error:
            raise LegError(peer, "lost", str(error)) from error

    def irecv(self, peer: int, address: int, nbytes: int, lane: int) -> Any:
        try:
            return self._channel.irecv(peer, address, nbytes, lane)
        except RuntimeError as error:
            raise LegError(peer, "lost", str(error)) from error

    def wait(self, handles: Iterable[Any]) -> None:
        self.finish(self._channel.wait, list(handles))

    def finish(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Calls a method of the channel that waits, and raises what it came to."""
        try:
            outcome = call(*arguments, self.timeout_s)
        except RuntimeError as error:
            raise LegError(-1, "lost", str(error)) from error
        if outcome is None:
            return
        kind, peer, header = outcome
        if kind == "mismatch":
            raise Mismatch(peer, HEADER.unpack(header))
        text = f"nothing came over MPI for {self.timeout_s:g} s" if kind == "timeout" else "has given the group up"
        raise LegError(peer, kind, text)

    def mailboxes(self, allocate: Callable[[int], int], peers: Sequence[int], room: int, lane: int) -> Mailboxes:
        return _NativeMailboxes(self, self._channel, allocate, peers, room, lane)

    def watch(self, handles: Sequence[Any]) -> None:
        self._channel.watch(list(handles))

    def arrived(self, handle: Any, limit_s: float) -> bool:
        end = time.monotonic() + limit_s
        while not self._channel.test(handle):
            if time.monotonic() > end:
                return False
            time.sleep(_SLEEP_S)
        return True

    def close(self) -> None:
        """Receives that nothing has matched are cancelled; the communicator stays, since freeing it is collective."""
        self._channel.close()


class _NativeMailboxes:
    """See mailboxes.Mailboxes."""

    def __init__(
        self,
        leg: MpiLeg,
        channel: Any,
        allocate: Callable[[int], int],
        peers: Sequence[int],
        room: int,
        lane: int,
    ) -> None:
        from launcher.collectives.mailboxes import BOXES

        self._finish, self._channel = leg.finish, channel
        piece = min(room, _PIECE_BYTES)
        pieces = -(-room // piece) if room else 1
        count = BOXES * pieces
        base = allocate((len(peers) * count + pieces) * channel.box_bytes(piece))
        channel.open_boxes(list(peers), base, piece, count, lane)
        self.mail, self._fetch, self._fold, self._sent = channel.mail, channel.fetch, channel.fold, channel.sent

    def fetch(self, header: bytes, peer: int, target: int, nbytes: int) -> None:
        self._finish(self._fetch, header, peer, target, nbytes)

    def fold(
        self,
        header: bytes,
        own: int,
        target: int,
        count: int,
        dtype: int,
        op: int,
        scale: float,
        divisor: int,
        order: Sequence[int],
    ) -> None:
        self._finish(self._fold, header, own, target, count, dtype, op, scale, divisor, order)

    def sent(self) -> None:
        self._finish(self._sent)


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
