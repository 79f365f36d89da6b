"""Short messages between hosts: receives that are posted ahead, so that nobody is asked whether they may be sent.

Every message begins with a header that says what is called, so that ranks which call different things are told so.
"""

from __future__ import annotations

import ctypes
from typing import Protocol

from launcher.collectives.legs import HEADER, Mismatch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from launcher.collectives.legs import Leg

BOXES = 2
"""Messages that a peer may send before the first of them is read; in an exchange it is one ahead at most."""
_ALIGN = 128


class Mailboxes(Protocol):
    """The short messages of one rank and its peers. Every method but ``mail`` raises LegError and Mismatch."""

    def mail(self, header: bytes, address: int, nbytes: int, peers: Sequence[int]) -> None:
        """Sends a copy to each of ``peers``; before the next one :meth:`sent` must be called."""

    def fetch(self, header: bytes, peer: int, target: int, nbytes: int) -> None:
        """Waits for the next message of ``peer``, whose header must be this one, and copies it to ``target``."""

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
        """Mails ``own`` to all peers in ``order``, and folds what all of them have mailed, in this order; -1 is this
        rank. As _native.reduce_into; ``own`` may be ``target``."""

    def sent(self) -> None:
        """Waits until all mail has left."""


class PostedMailboxes:
    """Over the messages of any leg."""

    def __init__(self, leg: Leg, allocate: Callable[[int], int], peers: Sequence[int], room: int, lane: int) -> None:
        """``room``: bytes of a message beside its header. ``allocate``: gives memory for as long as the leg is open."""
        from launcher import _native

        self._leg, self._lane = leg, lane
        self._copy, self._reduce = _native.copy_bytes, _native.reduce_into
        self._nbytes = HEADER.size + room
        stride = -(-self._nbytes // _ALIGN) * _ALIGN
        total = (len(peers) * BOXES + 1) * stride
        self._base = allocate(total)
        self._memory = memoryview((ctypes.c_char * total).from_address(self._base)).cast("B")
        self._out = self._base + len(peers) * BOXES * stride
        self._boxes: dict[int, list[tuple[Any, int]]] = {peer: [] for peer in peers}
        self._sends: list[Any] = []
        for index, peer in enumerate(peers):
            for box in range(BOXES):
                self._post(peer, self._base + (index * BOXES + box) * stride)

    def _post(self, peer: int, at: int) -> None:
        self._boxes[peer].append((self._leg.irecv(peer, at, self._nbytes, self._lane), at))

    def mail(self, header: bytes, address: int, nbytes: int, peers: Sequence[int]) -> None:
        """See Mailboxes."""
        at = self._out - self._base
        self._memory[at : at + HEADER.size] = header
        self._copy(self._out + HEADER.size, address, nbytes)
        for peer in peers:
            self._sends.append(self._leg.isend(peer, self._out, HEADER.size + nbytes, self._lane))

    def _take(self, header: bytes, peer: int) -> int:
        """Address of what follows the header of the next message."""
        handle, at = self._boxes[peer][0]
        self._leg.wait((handle,))
        theirs = self._memory[at - self._base : at - self._base + HEADER.size]
        if theirs != header:
            raise Mismatch(peer, HEADER.unpack(theirs))
        return at + HEADER.size

    def fetch(self, header: bytes, peer: int, target: int, nbytes: int) -> None:
        """See Mailboxes."""
        self._copy(target, self._take(header, peer), nbytes)
        self._post(peer, self._boxes[peer].pop(0)[1])

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
        """See Mailboxes."""
        from launcher.collectives.elements import SIZES

        self.mail(header, own, count * SIZES[dtype], [peer for peer in order if peer >= 0])
        sources = [own if peer < 0 else self._take(header, peer) for peer in order]
        self._reduce(target, sources, count, dtype, op, [], scale, divisor)
        for peer in order:
            if peer >= 0:
                self._post(peer, self._boxes[peer].pop(0)[1])
        self.sent()

    def sent(self) -> None:
        """See Mailboxes."""
        sends, self._sends = self._sends, []
        self._leg.wait(sends)
