"""How the ranks of a host come to share the stream that one of them reads.

The first rank listens on a UNIX socket in the job's folder, the others come. When all are there, each gets the memory
of a ring (native/data/ring.h); the socket stays, for each side to wake the other, and to learn that it has ended.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import socket
import time

from launcher import _data
from launcher.errors import CollectiveError, UsageError
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    from launcher.collectives.place import Place

_ANSWER_BYTES = 65536
_LOOK_S = 0.01  # between two looks for a first rank that is not there yet


class Outlets(Record):
    """What the meeting gave: the rank's own end, and on the first rank the ends that the dealer writes to.

    All are file descriptors; ``close()`` them when the native part has taken copies.
    """

    ring: int
    socket: int
    dealer_rings: tuple[int, ...] = ()
    dealer_sockets: tuple[int, ...] = ()

    def close(self) -> None:
        """Closes all of them."""
        for descriptor in {self.ring, self.socket, *self.dealer_rings, *self.dealer_sockets}:
            os.close(descriptor)


def meet(
    name: str, place: Place | None, arguments: Mapping[str, object], *, ring_bytes: int, timeout_s: float
) -> Outlets:
    """Meets the other ranks of this host; all of them call it with the same name and arguments.

    Args:
        name: of the meeting; used once in a job.
        place: this rank's; None without a launcher: it is alone.
        arguments: what all ranks must have been given alike.
        ring_bytes: memory between the reader and each rank.
        timeout_s: how long to wait for another rank, in seconds.

    Raises:
        CollectiveError: a rank did not come in time, or is gone.
        UsageError: the ranks were given different arguments.
        OSError: the operating system refused memory or a socket.
    """
    if place is None or len(place.local_ranks) == 1:
        return _first([], ring_bytes)
    text = json.dumps(arguments, sort_keys=True)
    deadline = time.monotonic() + timeout_s
    with _address(name, place) as address:
        if place.rank == place.local_ranks[0]:
            return _host(address, place, text, ring_bytes, deadline)
        return _guest(address, place, text, deadline)


@contextlib.contextmanager
def _address(name: str, place: Place) -> Iterator[str]:
    """The socket's address, through /proc: the folder's path may be longer than what an address holds."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
    folder = os.open(place.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/stream-{place.attempt}-{digest}"
    finally:
        os.close(folder)


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _first(others: list[socket.socket], ring_bytes: int) -> Outlets:
    """The first rank's ends: of its own ring, and of those of ``others``, which are sent theirs."""
    own, dealer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    rings = []
    try:
        for _ in range(len(others) + 1):
            rings.append(_data.make_ring(ring_bytes))
        for other, ring in zip(others, rings[1:], strict=True):
            socket.send_fds(other, [b"{}"], [ring])
    except OSError:
        for ring in rings:
            os.close(ring)
        raise
    sockets = (dealer.detach(), *(other.detach() for other in others))
    return Outlets(ring=rings[0], socket=own.detach(), dealer_rings=tuple(rings), dealer_sockets=sockets)


def _host(address: str, place: Place, text: str, ring_bytes: int, deadline: float) -> Outlets:
    others: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_socket())
        with contextlib.suppress(FileNotFoundError):
            os.unlink(address)  # of a stream that was killed while it was being opened
        listener.bind(address)
        stack.callback(os.unlink, address)
        listener.listen(len(place.local_ranks))
        while len(others) < len(place.local_ranks) - 1:
            missing = [rank for rank in place.local_ranks[1:] if rank not in others]
            other, said = _come(listener, missing[0], place, deadline)
            stack.callback(other.close)
            others[int(said["rank"])] = other
            if said["arguments"] != text:
                refusal = _difference(int(said["rank"]), json.loads(said["arguments"]), place.rank, json.loads(text))
                for one in others.values():
                    one.send(json.dumps({"refused": refusal}).encode())
                raise UsageError(refusal)
        outlets = _first([others[rank] for rank in place.local_ranks[1:]], ring_bytes)
    return outlets


def _come(listener: socket.socket, missing: int, place: Place, deadline: float) -> tuple[socket.socket, dict[str, Any]]:
    try:
        listener.settimeout(max(0.0, deadline - time.monotonic()) or _LOOK_S)
        other, _ = listener.accept()
        other.settimeout(max(0.0, deadline - time.monotonic()) or _LOOK_S)
        return other, json.loads(other.recv(_ANSWER_BYTES))
    except (TimeoutError, ValueError) as error:
        raise CollectiveError(
            f"rank {missing} on {place.host} did not come to share a stream with rank {place.rank}; see whether it is "
            "alive, and whether all ranks open the same channels in the same order",
            "timeout",
            rank=missing,
            host=place.host,
        ) from error


def _guest(address: str, place: Place, text: str, deadline: float) -> Outlets:
    first = place.local_ranks[0]
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(_socket())
        while True:
            try:
                own.connect(address)
                break
            except (FileNotFoundError, ConnectionRefusedError) as error:
                if time.monotonic() >= deadline:
                    raise CollectiveError(
                        f"rank {first} on {place.host}, which reads the stream for its host, did not open it; see "
                        "whether it is alive, and whether all ranks open the same channels in the same order",
                        "timeout",
                        rank=first,
                        host=place.host,
                    ) from error
            select.select([], [], [], _LOOK_S)
        own.send(json.dumps({"rank": place.rank, "arguments": text}).encode())
        own.settimeout(max(0.0, deadline - time.monotonic()) or _LOOK_S)
        rings: list[int] = []
        try:
            answer, rings, _, _ = socket.recv_fds(own, _ANSWER_BYTES, 1)
        except TimeoutError:
            answer = b""
        if answer and not rings:
            raise UsageError(str(json.loads(answer)["refused"]))
        if not rings:
            raise CollectiveError(
                f"rank {first} on {place.host}, which reads the stream for its host, gave up opening it",
                "lost",
                rank=first,
                host=place.host,
            )
        own.setblocking(True)
        return Outlets(ring=rings[0], socket=own.detach())


def _difference(rank: int, theirs: Mapping[str, object], first: int, ours: Mapping[str, object]) -> str:
    for name in (*ours, *theirs):
        if ours.get(name) != theirs.get(name):
            return (
                f"channel {ours.get('channel')!r}: {name} is {theirs.get(name)!r} on rank {rank} and "
                f"{ours.get(name)!r} on rank {first}; all ranks must pass the same arguments"
            )
    return f"rank {rank} and rank {first} were given different arguments"
