"""From host to host: this rank's column, its messages, and the folds of what the hosts send each other.

The ranks with equal number on their hosts are a *column*; the first ranks, the leaders, are column 0. There are as many
columns as the smallest host has ranks, and what a host has more takes part inside the host only.
"""

from __future__ import annotations

import ctypes
import json
import struct

from launcher.collectives.elements import SIZES, DType
from launcher.collectives.legs import LegError
from launcher.collectives.wire import PIECE, ErrorFeedback

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from launcher._native import LocalGroup
    from launcher.collectives.legs import Leg

# Lanes of the leg; see legs.Leg.
MAIL, NOTICES, DATA, RESULTS, ROWS = 1, 2, 3, 4, 5
HEADER = struct.Struct("<QBBBxIQQ")  # number of the call, operation, dtype, op, root, two counts
NOTICE_BYTES = 1024
_MAILBOXES = 2  # for each peer: it is at most one exchange ahead
_ALIGN = 128


def split(count: int, parts: int) -> list[int]:
    """``count`` elements in ``parts`` nearly equal, but for the last ones whole multiples of 16."""
    each = -(-count // parts)
    each = -(-each // 16) * 16
    sizes = []
    for _ in range(parts):
        sizes.append(min(each, count))
        count -= sizes[-1]
    return sizes


def starts(sizes: Sequence[int]) -> list[int]:
    """Where each part begins, and the end of the last one."""
    found = [0]
    for size in sizes:
        found.append(found[-1] + size)
    return found


class Layout:
    """Who is where. Ranks are those of the group, hosts are numbered in the order of their first ranks.

    Attributes:
        hosts: ranks of each host, ascending; host, local: this rank's place in it.
        columns: number of columns; column: this rank's, -1 when it has none.
        order: all ranks, host after host; plain: whether that is 0, 1, 2, ...
        peers: (host, rank) of the others in this rank's column.
        most: ranks of the largest host.
    """

    def __init__(self, rank: int, hosts: Sequence[Sequence[int]], names: Sequence[str], ranks: Sequence[int]) -> None:
        self.rank, self.hosts, self.names, self.ranks = rank, [list(one) for one in hosts], list(names), list(ranks)
        self.size = len(self.ranks)
        self.host = next(index for index, members in enumerate(self.hosts) if rank in members)
        self.here = self.hosts[self.host]
        self.local = self.here.index(rank)
        self.columns = min(map(len, self.hosts))
        self.most = max(map(len, self.hosts))
        self.column = self.local if self.local < self.columns else -1
        self.order = [member for members in self.hosts for member in members]
        self.plain = self.order == list(range(self.size))
        self.peers: list[tuple[int, int]] = []
        if self.column >= 0:
            others = [index for index in range(len(self.hosts)) if index != self.host]
            self.peers = [(index, self.hosts[index][self.column]) for index in others]

    def host_of(self, rank: int) -> int:
        """Number of the host that a rank is on."""
        return next(index for index, members in enumerate(self.hosts) if rank in members)

    def who(self, rank: int) -> str:
        """``rank 3 on algo-2``, as the job numbers it."""
        return f"rank {self.ranks[rank]} on {self.names[self.host_of(rank)]}"

    def sources(self, bases: dict[int, int], stride: int, raw: bool) -> list[int]:
        """Addresses to fold, in the order of the fold. ``bases``: by host; with ``raw`` one part of ``stride`` bytes
        lies there for each rank of the host, and ranks are folded in their own order."""
        if not raw:
            return [bases[host] for host in range(len(self.hosts))]
        lines = {
            rank: bases[host] + line * stride
            for host, members in enumerate(self.hosts)
            for line, rank in enumerate(members)
        }
        return [lines[rank] for rank in range(self.size)]

    def shares(self, count: int) -> list[int]:
        """``count`` elements by local rank: the columns' shares, nothing for the other ranks."""
        return split(count, self.columns) + [0] * (len(self.here) - self.columns)


class Mismatch(Exception):
    """A rank of another host called something else. ``peer``: which; ``theirs``: its header."""

    def __init__(self, peer: int, theirs: tuple[int, ...]) -> None:
        self.peer, self.theirs = peer, theirs
        super().__init__(peer)


def notice_text(notice: dict[str, Any]) -> bytes:
    """A notice as it is sent: at most NOTICE_BYTES."""
    text = json.dumps(notice).encode()
    if len(text) > NOTICE_BYTES:
        text = json.dumps({**notice, "text": str(notice.get("text", ""))[:150]}).encode()[:NOTICE_BYTES]
    return text


def read_notice(text: bytes) -> dict[str, Any] | None:
    """The notice that was sent as ``text``, None when it is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


class Crossing:
    """This rank's messages to the others in its column.

    Short ones go to mailboxes: receives that are posted ahead, so that nobody is asked whether they may be sent. Every
    call begins with one that says what is called, so that hosts that call different things are told so.
    """

    def __init__(self, local: LocalGroup, leg: Leg, layout: Layout, mail_bytes: int) -> None:
        self.leg, self.layout = leg, layout
        self._local = local
        self.mail_bytes = mail_bytes if layout.column == 0 else 0  # what a message holds beside its header
        self._room = -(-(HEADER.size + self.mail_bytes) // _ALIGN) * _ALIGN
        peers = len(layout.peers)
        notices = (peers * _MAILBOXES + 1) * self._room
        self._base = local.allocate(max(1, notices + (peers + 1) * NOTICE_BYTES))
        self._out = self._base + peers * _MAILBOXES * self._room
        self._memory = memoryview(
            (ctypes.c_char * (notices + (peers + 1) * NOTICE_BYTES)).from_address(self._base)
        ).cast("B")
        self._boxes: dict[int, list[tuple[Any, int]]] = {}
        self._notices: dict[int, tuple[Any, int]] = {}
        self._sends: list[Any] = []
        self._notice_out = notices + peers * NOTICE_BYTES
        self._slots, self._slot_bytes, self._slot_count = 0, 0, 0
        self.sent_bytes = self.messages = 0
        for index, (_, peer) in enumerate(layout.peers):
            at = notices + index * NOTICE_BYTES
            self._notices[peer] = (leg.irecv(peer, self._base + at, NOTICE_BYTES, NOTICES), at)
            self._boxes[peer] = []
            for box in range(_MAILBOXES):
                self._post(peer, (index * _MAILBOXES + box) * self._room)
        leg.watch([handle for handle, _ in self._notices.values()])

    def _post(self, peer: int, at: int) -> None:
        handle = self.leg.irecv(peer, self._base + at, HEADER.size + self.mail_bytes, MAIL)
        self._boxes[peer].append((handle, at))

    # ---- short messages

    def mail(self, header: bytes, address: int, nbytes: int, peers: Sequence[int]) -> None:
        """Sends a header and ``nbytes`` after it; the memory may change at once, :meth:`sent` must be called later."""
        from launcher._native import copy_bytes

        at = self._out - self._base
        self._memory[at : at + HEADER.size] = header
        copy_bytes(self._out + HEADER.size, address, nbytes)
        for peer in peers:
            self._sends.append(self.send(peer, self._out, HEADER.size + nbytes, MAIL))

    def take(self, header: bytes, peer: int, nbytes: int) -> int:
        """Waits for the next message of ``peer``; address of the ``nbytes`` that follow the header. :meth:`free` gives
        it back.

        Raises:
            LegError: the peer is gone.
            Mismatch: its header is another one.
        """
        handle, at = self._boxes[peer][0]
        self.leg.wait((handle,))
        theirs = self._memory[at : at + HEADER.size]
        if theirs != header:
            raise Mismatch(peer, HEADER.unpack(theirs))
        return self._base + at + HEADER.size

    def free(self, peer: int) -> None:
        """The message that was taken last may be overwritten."""
        _, at = self._boxes[peer].pop(0)
        self._post(peer, at)

    def announce(self, header: bytes) -> None:
        """Tells the column what is called; :meth:`check` reads what the others have told."""
        self.mail(header, 0, 0, [peer for _, peer in self.layout.peers])

    def check(self, header: bytes) -> None:
        """Waits for the others' announcements."""
        for _, peer in self.layout.peers:
            self.take(header, peer, 0)
            self.free(peer)

    def sent(self) -> None:
        """Waits until all mail has left."""
        sends, self._sends = self._sends, []
        self.leg.wait(sends)

    def counted(self) -> tuple[int, int]:
        """Bytes and messages that this rank has sent."""
        return self.sent_bytes, self.messages

    # ---- long messages

    def send(self, peer: int, address: int, nbytes: int, lane: int) -> Any:
        """leg.isend, counted."""
        self.sent_bytes += nbytes
        self.messages += 1
        return self.leg.isend(peer, address, nbytes, lane)

    def slots(self, count: int, nbytes: int) -> list[int]:
        """Addresses of ``count`` pieces of scratch memory with at least ``nbytes`` each; valid until the next call."""
        nbytes = -(-max(nbytes, 1) // 4096) * 4096
        if nbytes > self._slot_bytes or count > self._slot_count:
            if self._slots:
                self._local.release(self._slots)
            self._slot_bytes, self._slot_count = max(nbytes, self._slot_bytes), max(count, self._slot_count)
            self._slots = self._local.allocate(self._slot_bytes * self._slot_count)
        return [self._slots + index * self._slot_bytes for index in range(count)]

    # ---- the end

    def notice_of(self, peer: int, limit_s: float) -> dict[str, Any] | None:
        """What ``peer`` has said about why it gave the group up, if it has."""
        if peer not in self._notices:
            return None
        handle, at = self._notices[peer]
        if not self.leg.arrived(handle, limit_s):
            return None
        return read_notice(bytes(self._memory[at : at + NOTICE_BYTES]).rstrip(b"\0"))

    def give_up(self, notice: dict[str, Any], orderly: bool = False) -> None:
        """Tells the column why this rank leaves, as far as it can be told, and closes the leg. ``orderly``: nothing
        went wrong, and those who still wait for others are not to be disturbed."""
        text = notice_text(notice)
        at = self._notice_out
        self._memory[at : at + NOTICE_BYTES] = text.ljust(NOTICE_BYTES, b"\0")
        limit, self.leg.timeout_s = self.leg.timeout_s, 0.5
        self.leg.watch(())
        sends = []
        for _, peer in self.layout.peers:
            try:
                sends.append(self.leg.isend(peer, self._base + at, NOTICE_BYTES, NOTICES))
            except LegError:
                continue  # it is gone itself
        for send in sends:
            try:
                self.leg.wait((send,))
            except LegError:
                continue
        self.leg.timeout_s = limit
        self._boxes, self._notices, self._sends = {}, {}, []
        self.leg.close()


class Fold:
    """How elements are folded between the hosts, and finished: scale for floating point, divisor for integers."""

    def __init__(self, dtype: int, op: int, scale: float, divisor: int, prescale: Sequence[float] = ()) -> None:
        import launcher._native as _native

        self.dtype, self.op, self.size = dtype, op, SIZES[dtype]
        self.scale, self.divisor, self._prescale = scale, divisor, list(prescale)
        self._reduce = _native.reduce_into

    def into(self, target: int, sources: list[int], count: int) -> None:
        """target[i] = finish(fold of sources[.][i])."""
        self._reduce(target, sources, count, self.dtype, self.op, self._prescale, self.scale, self.divisor)


class Direct:
    """Every host sends its part to every other one, and all of them fold everything. One message's time.

    With ``raw``, a host's part is not its sum but all that its ranks have, and the fold goes by the rank in the group.
    """

    def __init__(self, crossing: Crossing, fold: Fold, most: int, raw: bool = False) -> None:
        """``most``: elements of the largest share."""
        self._crossing, self._fold, self._most, self._raw = crossing, fold, most, raw
        layout = crossing.layout
        self._lines = [len(members) if raw else 1 for members in layout.hosts]
        self._offsets: dict[int, int] = {}
        at = 0
        for host, _ in layout.peers:
            self._offsets[host] = at
            at += self._lines[host] * most * fold.size
        self.slot_bytes = at  # what it needs of each slot
        self._posted: dict[int, list[Any]] = {}
        self._sends: dict[int, list[Any]] = {}

    def post(self, chunk: int, slot: int, count: int, target: int) -> None:
        """Posts the receives for a chunk in which this rank's share has ``count`` elements."""
        leg, size = self._crossing.leg, self._fold.size
        self._posted[chunk] = [
            leg.irecv(peer, slot + self._offsets[host], self._lines[host] * count * size, DATA)
            for host, peer in self._crossing.layout.peers
            if count
        ]

    def begin(self, chunk: int, slot: int, own: int, count: int) -> None:
        """Sends this host's part, which lies at ``own``."""
        layout = self._crossing.layout
        nbytes = self._lines[layout.host] * count * self._fold.size
        self._sends[chunk] = [self._crossing.send(peer, own, nbytes, DATA) for _, peer in layout.peers if count]

    def end(self, chunk: int, slot: int, own: int, count: int, target: int) -> None:
        """Waits for the others' parts and folds all into ``target``."""
        leg, layout = self._crossing.leg, self._crossing.layout
        leg.wait(self._posted.pop(chunk))
        leg.wait(self._sends.pop(chunk))  # `own` may be `target`
        if not count:
            return
        bases = {layout.host: own, **{host: slot + offset for host, offset in self._offsets.items()}}
        self._fold.into(target, layout.sources(bases, count * self._fold.size, self._raw), count)


class Owners:
    """Each host folds a part of its own and sends the result to the others: the wire carries 2 (H-1)/H of a share in
    place of H-1, in the time of two messages."""

    def __init__(self, crossing: Crossing, fold: Fold, most: int) -> None:
        self._crossing, self._fold = crossing, fold
        hosts = len(crossing.layout.hosts)
        self._part = max(split(most, hosts)) * fold.size
        self.slot_bytes = (hosts - 1) * self._part
        self._posted: dict[int, list[Any]] = {}
        self._results: dict[int, list[Any]] = {}
        self._sends: dict[int, list[Any]] = {}

    def _parts(self, count: int) -> list[tuple[int, int]]:
        sizes = split(count, len(self._crossing.layout.hosts))
        return list(zip(starts(sizes), sizes, strict=False))

    def post(self, chunk: int, slot: int, count: int, target: int) -> None:
        leg, layout, size = self._crossing.leg, self._crossing.layout, self._fold.size
        parts = self._parts(count)
        mine = parts[layout.host][1]
        self._posted[chunk] = [
            leg.irecv(peer, slot + index * self._part, mine * size, DATA)
            for index, (_, peer) in enumerate(layout.peers)
            if mine
        ]
        self._results[chunk] = [
            leg.irecv(peer, target + parts[host][0] * size, parts[host][1] * size, RESULTS)
            for host, peer in layout.peers
            if parts[host][1]
        ]

    def begin(self, chunk: int, slot: int, own: int, count: int) -> None:
        layout, size = self._crossing.layout, self._fold.size
        parts = self._parts(count)
        self._sends[chunk] = [
            self._crossing.send(peer, own + parts[host][0] * size, parts[host][1] * size, DATA)
            for host, peer in layout.peers
            if parts[host][1]
        ]

    def middle(self, chunk: int, slot: int, own: int, count: int, target: int) -> None:
        """Folds this host's part and sends it to the others."""
        leg, layout, size = self._crossing.leg, self._crossing.layout, self._fold.size
        leg.wait(self._posted.pop(chunk))
        start, mine = self._parts(count)[layout.host]
        if not mine:
            return
        received = iter(range(len(layout.peers)))
        sources = [
            own + start * size if host == layout.host else slot + next(received) * self._part
            for host in range(len(layout.hosts))
        ]
        result = target + start * size
        self._fold.into(result, sources, mine)
        self._sends[chunk] += [self._crossing.send(peer, result, mine * size, RESULTS) for _, peer in layout.peers]

    def end(self, chunk: int, slot: int, own: int, count: int, target: int) -> None:
        """Waits for the others' results."""
        self._crossing.leg.wait(self._results.pop(chunk))
        self._crossing.leg.wait(self._sends.pop(chunk))


class Rounded:
    """:class:`Direct` in 16 bits: float32 shares are rounded, sent, and summed as they were sent, the own one too.

    ``errors`` keeps what was rounded off by ``tensor``, for the ``total`` elements of this rank's shares.
    """

    def __init__(
        self,
        crossing: Crossing,
        fold: Fold,
        most: int,
        wire: DType,
        errors: ErrorFeedback,
        tensor: tuple[int, ...],
        total: int,
    ) -> None:
        self._crossing, self._fold, self._most, self._wire = crossing, fold, most, wire
        self._errors = errors.errors(tensor, total)
        self._hosts = len(crossing.layout.hosts)
        self._pieces = self._hosts * most * 2  # after the 16-bit parts of all hosts: one piece of each in float32
        self.slot_bytes = self._pieces + self._hosts * PIECE * 4
        self._posted: dict[int, list[Any]] = {}
        self._sends: dict[int, list[Any]] = {}

    def post(self, chunk: int, slot: int, count: int, target: int) -> None:
        leg = self._crossing.leg
        self._posted[chunk] = [
            leg.irecv(peer, slot + host * self._most * 2, count * 2, DATA)
            for host, peer in self._crossing.layout.peers
            if count
        ]

    def begin(self, chunk: int, slot: int, own: int, count: int) -> None:
        """Rounds this host's part and sends it."""
        from launcher._native import compress

        layout = self._crossing.layout
        rounded = slot + layout.host * self._most * 2
        compress(rounded, own, self._errors, count, self._wire)
        self._errors += count * 4
        self._sends[chunk] = [self._crossing.send(peer, rounded, count * 2, DATA) for _, peer in layout.peers if count]

    def end(self, chunk: int, slot: int, own: int, count: int, target: int) -> None:
        from launcher._native import decompress

        self._crossing.leg.wait(self._posted.pop(chunk))
        self._crossing.leg.wait(self._sends.pop(chunk))
        pieces = [slot + self._pieces + host * PIECE * 4 for host in range(self._hosts)]
        for start in range(0, count, PIECE):
            length = min(PIECE, count - start)
            for host, piece in enumerate(pieces):
                decompress(piece, slot + (host * self._most + start) * 2, length, self._wire)
            self._fold.into(target + start * 4, pieces, length)
