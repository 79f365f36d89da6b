"""How messages go through hosts: inside, across, inside again; short ones over the leaders, long ones in chunks."""

from __future__ import annotations

import functools
import sys
from itertools import pairwise

from launcher.collectives.crossing import DATA, ROWS, Crossing, Direct, Fold, Layout, Owners, Rounded, split, starts
from launcher.collectives.elements import FLOATING, SIZES, DType, ReduceOp
from launcher.collectives.ordered import Ordered
from launcher.collectives.wire import ErrorFeedback, applies

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from launcher._native import LocalGroup
    from launcher.collectives.legs import Leg

    # Up to how many elements, and what is called with the call's number, source, target and count.
    Quick = tuple[int, Callable[[int, int, int, int], None]]

SMALL_BYTES = 64 * 1024
"""Up to so many bytes a message goes over the leaders."""
_MOST_BYTES = 4 * 1024 * 1024  # of one message on the wire
_LEAST_BYTES = 512 * 1024  # where several ranks of a host share its wire
_CHAIN_CHUNK_BYTES = 1024 * 1024
_ALL_MAIL_BYTES = 8 * 1024 * 1024  # the most that a leader's mailboxes take
_DIRECT_BYTES = 1024 * 1024  # up to so much goes to all other hosts at once, rather than part by part
_AHEAD = 4  # chunks whose receives are posted
_LAG = _AHEAD - 1  # chunks that are begun before the first one is ended


class Stages:
    """How an allreduce is cut into chunks, what is done to a chunk inside the host, and how hosts are folded.

    An average is a sum that is divided once, at the end. Sums of float16 are scaled inside the host already where
    it has several ranks: what a host sends is float16, and could overflow where the average does not.
    """

    def __init__(
        self, messages: Messages, count: int, dtype: int, op: int, pre: float, post: float, parts: int = 1
    ) -> None:
        """``parts``: messages of this many elements that go at the same time, to different hosts."""
        layout = messages.layout
        self._messages, self._dtype, self._pre = messages, dtype, pre
        self.item, self.raw = SIZES[dtype], messages.independent
        self.inner = ReduceOp.SUM if op == ReduceOp.AVERAGE else ReduceOp(op)
        scale, divisor = post, 1
        if op == ReduceOp.AVERAGE:
            if dtype in FLOATING:
                scale = post / layout.size
            else:
                divisor = layout.size
        self.early = 1.0
        if dtype == DType.float16 and self.inner == ReduceOp.SUM and layout.most > 1 and not self.raw:
            self.early, scale = scale, 1.0
        factors = [pre] * layout.size if self.raw and pre != 1.0 else []
        self.fold = Fold(dtype, self.inner, scale, divisor, factors)
        share = messages.chunk_bytes // self.item // parts // (layout.most if self.raw else 1)
        most = max(share, 16) * layout.columns
        self.chunks = list(ranges(count, most, 16 * layout.columns))
        self.most = max((max(split(length, layout.columns)) for _, length in self.chunks), default=0)
        lines = len(layout.here) if self.raw else 1
        self.own_bytes = self.most * lines * self.item if self._copies() else 0

    def _copies(self) -> bool:
        """Whether a chunk inside the host is anything but the source itself."""
        changed = self.early != 1.0 or (self._pre != 1.0 and not self.raw)
        return changed or len(self._messages.layout.here) > 1

    def inside(self, source: int, own: int, length: int) -> int:
        """Folds a chunk inside the host; address of this rank's share, ``own`` or ``source``."""
        layout, local = self._messages.layout, self._messages.local
        if len(layout.here) == 1:
            return self._alone(source, own, length)
        shares = layout.shares(length)
        if self.raw:
            local.all_to_all(source, own, shares, [shares[layout.local]] * len(layout.here), self._dtype)
        else:
            local.reduce_scatter(source, own, shares, self._dtype, self.inner, self._pre, self.early)
        return own

    def to_leader(self, source: int, own: int, count: int) -> int:
        """Folds a whole message inside the host; address of the result on the leader."""
        layout, local = self._messages.layout, self._messages.local
        if len(layout.here) == 1:
            return self._alone(source, own, count)
        if self.raw:
            local.all_gather(source, own, [count] * len(layout.here), self._dtype)
        else:
            local.reduce(source, own, count, self._dtype, 0, self.inner, self._pre, self.early)
        return own

    def _alone(self, source: int, own: int, count: int) -> int:
        from launcher._native import reduce_into

        if not self._copies():
            return source
        reduce_into(own, [source], count, self._dtype, ReduceOp.SUM, [self._pre], self.early)
        return own


def ranges(count: int, most: int, unit: int) -> Iterator[tuple[int, int]]:
    """``count`` elements in as few nearly equal pieces (start, length) of at most ``most`` as there can be; all lengths
    but the last are multiples of ``unit``, unless ``most`` is less."""
    pieces = -(-count // most) if count else 0
    each = -(-count // pieces) if pieces else 0
    each = min(most, -(-each // unit) * unit)
    for start in range(0, count, max(each, 1)):
        yield start, min(each, count - start)


def _crossing(local: LocalGroup, leg: Leg, layout: Layout, mail_bytes: int) -> Crossing:
    if leg.name != "sockets":
        return Crossing(local, leg, layout, mail_bytes)
    from launcher.collectives.leg_sockets import SocketsCrossing, SocketsLeg

    assert isinstance(leg, SocketsLeg)
    return SocketsCrossing(local, leg, layout, mail_bytes)


class Messages:
    """What each operation sends. Callers hold the arguments to be right, and know what to do with errors.

    ``header``: says what is called; the other hosts' must be the same (crossing.Mismatch).
    """

    def __init__(self, local: LocalGroup, leg: Leg, layout: Layout, wire: DType | None, independent: bool) -> None:
        self.local, self.leg, self.layout = local, leg, layout
        self.independent = independent
        self._wire, self._errors = wire, ErrorFeedback()
        hosts = len(layout.hosts)
        mail = min(SMALL_BYTES, _ALL_MAIL_BYTES // (2 * (hosts - 1)))
        self.crossing = _crossing(local, leg, layout, mail)
        most = min(leg.message_bytes, _MOST_BYTES)
        self.chunk_bytes = max(min(most, _LEAST_BYTES), most // layout.columns)
        self._scratch = local.allocate(mail)
        self.small_bytes = mail // (layout.most if independent else 1)
        self.calls = {"small": 0, "chunked": 0}
        self._alone = len(layout.here) == 1
        self._leader = layout.column == 0

    # ---- operations

    def meet(self, header: bytes) -> None:
        """A barrier."""
        self.local.barrier()
        if self._leader:
            self.crossing.announce(header)
            self.crossing.check(header)
            self.crossing.sent()
        self.local.barrier()

    def allreduce(
        self, header: bytes, source: int, target: int, count: int, dtype: int, op: int, pre: float, post: float
    ) -> None:
        """See Group."""
        layout, local = self.layout, self.local
        if count * SIZES[dtype] <= self.small_bytes:
            self.to_leaders(header, source, target, count, dtype, op, pre, post, range(len(layout.hosts)))
            if not self._alone:
                local.broadcast(target, count, dtype, 0)
            return
        stages = Stages(self, count, dtype, op, pre, post)
        exchange = self._exchange(stages, count, (source, dtype, op), op)
        item, across = stages.item, exchange.slot_bytes if exchange else 0
        slots = self.crossing.slots(_AHEAD, across + stages.own_bytes)
        # Of each chunk: its slot, where it starts, its length, this rank's share of it and where that goes to.
        plan = []
        for index, (start, length) in enumerate(stages.chunks):
            shares = layout.shares(length)
            result = target + (start + starts(shares)[layout.local]) * item
            plan.append((slots[index % _AHEAD], start, length, shares, shares[layout.local], result))
        owns: dict[int, int] = {}

        def post_chunk(index: int) -> None:
            if exchange is not None:
                slot, _, _, _, share, result = plan[index]
                exchange.post(index, slot, share, result)

        def begin(index: int) -> None:
            slot, start, length, _, share, _ = plan[index]
            owns[index] = stages.inside(source + start * item, slot + across, length)
            if exchange is not None:
                exchange.begin(index, slot, owns[index], share)

        def middle(index: int) -> None:
            if isinstance(exchange, Owners):
                slot, _, _, _, share, result = plan[index]
                exchange.middle(index, slot, owns[index], share, result)

        def end(index: int) -> None:
            slot, start, _, shares, share, result = plan[index]
            own = owns.pop(index)
            if exchange is not None:
                exchange.end(index, slot, own, share, result)
            if not self._alone:
                local.all_gather(result, target + start * item, shares, dtype)

        self._pipeline(header, len(plan), post_chunk, begin, middle if isinstance(exchange, Owners) else None, end)

    def quick(self, dtype: int, op: int, pre: float, post: float) -> Quick | None:
        """The short way of allreduces of this kind, where the leg has one."""
        native = getattr(self.leg, "native", None)
        if native is None or self.independent:
            return None
        from launcher._native import CrossingPlan

        layout = self.layout
        stages = Stages(self, 0, dtype, op, pre, post)
        own = (pre, stages.early) if self._alone else (1.0, 1.0)  # else it is scaled inside the host
        plan = CrossingPlan(dtype, op, stages.inner, *own, stages.fold.scale, stages.fold.divisor)
        long = layout.most == 1 and not applies(self._wire, dtype, op)
        most = sys.maxsize if long else self.small_bytes // stages.item
        if self._alone:
            return most, functools.partial(native.allreduce, plan)
        local, scratch, inner, early = self.local, self._scratch, stages.inner, stages.early
        across = native.allreduce if self._leader else None

        def through_leader(sequence: int, source: int, target: int, count: int) -> None:
            local.reduce(source, scratch, count, dtype, 0, inner, pre, early)
            if across is not None:
                across(plan, sequence, scratch, target, count)
            local.broadcast(target, count, dtype, 0)

        return most, through_leader

    def counted(self) -> dict[str, int]:
        """Calls by the way they went."""
        short, chunked = getattr(self.leg, "calls", (0, 0))
        return {"small": self.calls["small"] + short, "chunked": self.calls["chunked"] + chunked}

    def _exchange(
        self, stages: Stages, count: int, tensor: tuple[int, ...], op: int
    ) -> Direct | Owners | Rounded | None:
        """What carries and folds this rank's shares; None for a rank without a column."""
        layout = self.layout
        if layout.column < 0:
            return None
        hosts = len(layout.hosts)
        if applies(self._wire, tensor[1], op):
            assert self._wire is not None
            total = sum(layout.shares(length)[layout.local] for _, length in stages.chunks)
            return Rounded(self.crossing, stages.fold, stages.most, self._wire, self._errors, tensor, total)
        if stages.raw:
            return Direct(self.crossing, stages.fold, stages.most, raw=True)
        if hosts == 2 or count * stages.item * (hosts - 1) <= _DIRECT_BYTES:
            return Direct(self.crossing, stages.fold, stages.most)
        return Owners(self.crossing, stages.fold, stages.most)

    def to_leaders(
        self,
        header: bytes,
        source: int,
        target: int,
        count: int,
        dtype: int,
        op: int,
        pre: float,
        post: float,
        homes: Sequence[int],
    ) -> None:
        """A short message: the leaders of the hosts ``homes`` get the fold of all ranks at ``target``."""
        self.calls["small"] += 1
        stages = Stages(self, count, dtype, op, pre, post)
        own = stages.to_leader(source, self._scratch, count)
        if not self._leader:
            return
        layout, crossing = self.layout, self.crossing
        lines = len(layout.here) if self.independent else 1
        crossing.mail(header, own, lines * count * stages.item, [peer for host, peer in layout.peers if host in homes])
        if layout.host in homes:
            bases = {layout.host: own}
            for host, peer in layout.peers:
                theirs = len(layout.hosts[host]) if self.independent else 1
                bases[host] = crossing.take(header, peer, theirs * count * stages.item)
            stages.fold.into(target, layout.sources(bases, count * stages.item, self.independent), count)
            for _, peer in layout.peers:
                crossing.free(peer)
        crossing.sent()

    def scatter(
        self,
        header: bytes,
        source: int,
        target: int,
        sizes: Sequence[Sequence[int]],
        dtype: int,
        op: int,
        pre: float,
        post: float,
    ) -> None:
        """Folds what lies at ``source`` host after host; the ranks of host h get sizes[h][0], sizes[h][1], ... of it.

        All hosts' parts go at the same time: chunk i is that of each of them.
        """
        layout, local = self.layout, self.local
        totals = [sum(one) for one in sizes]
        begins, hosts = starts(totals), range(len(totals))
        stages = Stages(self, max(totals), dtype, op, pre, post, parts=max(1, len(totals) - 1))
        item = stages.item
        lines = {host: len(layout.hosts[host]) if stages.raw else 1 for host in hosts}
        room = stages.most * item
        received = starts([lines[host] * room for host in hosts])
        kept = received[-1]  # after what is received: what this host sends, for each host, and the result
        slots = self.crossing.slots(_AHEAD, kept + len(totals) * stages.own_bytes + room)
        handles: dict[int, list[Any]] = {}
        sends: dict[int, list[Any]] = {}
        owns: dict[int, int] = {}

        def length_of(index: int, host: int) -> int:
            start, length = stages.chunks[index]
            return max(0, min(length, totals[host] - start))

        def share_of(index: int, host: int) -> int:
            return split(length_of(index, host), layout.columns)[layout.column] if layout.column >= 0 else 0

        def post_chunk(index: int) -> None:
            count, slot = share_of(index, layout.host), slots[index % _AHEAD]
            handles[index] = [
                self.leg.irecv(peer, slot + received[host], lines[host] * count * item, DATA)
                for host, peer in layout.peers
                if count
            ]

        def begin(index: int) -> None:
            slot, start = slots[index % _AHEAD], stages.chunks[index][0]
            peers = dict(layout.peers)
            sends[index] = []
            for host in hosts:
                if not length_of(index, host):
                    continue
                at = source + (begins[host] + start) * item
                own = stages.inside(at, slot + kept + host * stages.own_bytes, length_of(index, host))
                nbytes = lines[layout.host] * share_of(index, host) * item
                if host == layout.host:
                    owns[index] = own
                elif nbytes:
                    sends[index].append(self.crossing.send(peers[host], own, nbytes, DATA))

        def end(index: int) -> None:
            self.leg.wait(handles.pop(index))
            self.leg.wait(sends.pop(index))
            length, count, slot = length_of(index, layout.host), share_of(index, layout.host), slots[index % _AHEAD]
            if not length:
                return
            start = stages.chunks[index][0]
            result = target + start * item if self._alone else slot + kept + len(totals) * stages.own_bytes
            if count:
                bases = {host: slot + received[host] for host in hosts}
                bases[layout.host] = owns.pop(index)
                stages.fold.into(result, layout.sources(bases, count * item, stages.raw), count)
            if self._alone:
                return
            parts = starts(sizes[layout.host])
            shares = [start + at for at in starts(layout.shares(length))]
            mine, part = (shares[layout.local], shares[layout.local + 1]), parts[layout.local]
            local.all_to_all(
                result,
                target + max(0, start - part) * item,
                [common(mine, (one, other)) for one, other in pairwise(parts)],
                [common((one, other), (part, parts[layout.local + 1])) for one, other in pairwise(shares)],
                dtype,
            )

        self._pipeline(header, len(stages.chunks), post_chunk, begin, None, end)

    def gather(self, header: bytes, target: int, totals: Sequence[int], dtype: int) -> None:
        """Every host's block, of totals[host] elements, lies at its place in ``target`` on its ranks; then on all."""
        layout, item, begins = self.layout, SIZES[dtype], starts(totals)
        if begins[-1] * item <= self.small_bytes:
            self._gather_small(header, target, begins, dtype)
            return
        chunks = list(ranges(max(totals), self.chunk_bytes // item * layout.columns, 16 * layout.columns))
        handles: dict[int, list[Any]] = {}

        def block(index: int, host: int) -> tuple[int, list[int]]:
            start, length = chunks[index]
            length = max(0, min(length, totals[host] - start))
            return target + (begins[host] + start) * item, layout.shares(length)

        def share(index: int, host: int) -> tuple[int, int]:
            at, shares = block(index, host)
            return at + starts(shares)[layout.local] * item, shares[layout.local] * item

        def post_chunk(index: int) -> None:
            handles[index] = []
            for host, peer in layout.peers:
                at, nbytes = share(index, host)
                if nbytes:
                    handles[index].append(self.leg.irecv(peer, at, nbytes, DATA))

        def begin(index: int) -> None:
            at, nbytes = share(index, layout.host)
            handles[index] += [self.crossing.send(peer, at, nbytes, DATA) for _, peer in layout.peers if nbytes]

        def end(index: int) -> None:
            self.leg.wait(handles.pop(index))
            for host in range(len(totals)):
                at, shares = block(index, host)
                if host != layout.host and not self._alone and any(shares):
                    self.local.all_gather(share(index, host)[0], at, shares, dtype)

        self._pipeline(header, len(chunks), post_chunk, begin, None, end)

    def _gather_small(self, header: bytes, target: int, begins: list[int], dtype: int) -> None:
        from launcher._native import copy_bytes

        self.calls["small"] += 1
        layout, crossing, item = self.layout, self.crossing, SIZES[dtype]
        if self._leader:
            nbytes = [(end - begin) * item for begin, end in pairwise(begins)]
            mine = target + begins[layout.host] * item
            crossing.mail(header, mine, nbytes[layout.host], [peer for _, peer in layout.peers])
            for host, peer in layout.peers:
                copy_bytes(target + begins[host] * item, crossing.take(header, peer, nbytes[host]), nbytes[host])
                crossing.free(peer)
            crossing.sent()
        if not self._alone:
            self.local.broadcast(target, begins[-1], dtype, 0)

    def spread(self, header: bytes, pointer: int, count: int, dtype: int, home: int) -> None:
        """From the ranks of host ``home``, which all have it, to all ranks of the other hosts."""
        if count * SIZES[dtype] <= self.small_bytes:
            self._spread_small(header, pointer, count * SIZES[dtype], home)
            if self.layout.host != home and not self._alone:
                self.local.broadcast(pointer, count, dtype, 0)
            return
        layout, item = self.layout, SIZES[dtype]
        hosts = len(layout.hosts)
        place = (layout.host - home) % hosts  # in the chain of hosts, each of which passes on what it gets
        peers = dict(layout.peers)
        most = self.chunk_bytes if hosts == 2 else min(self.chunk_bytes, _CHAIN_CHUNK_BYTES)
        chunks = list(ranges(count, most // item * layout.columns, 16 * layout.columns))
        handles: dict[int, list[Any]] = {}
        sends: list[Any] = []

        def share(index: int) -> tuple[int, int, list[int]]:
            start, length = chunks[index]
            shares = layout.shares(length)
            return pointer + (start + starts(shares)[layout.local]) * item, shares[layout.local] * item, shares

        def pass_on(index: int) -> None:
            at, nbytes, _ = share(index)
            if layout.column >= 0 and nbytes and place < hosts - 1:
                sends.append(self.crossing.send(peers[(layout.host + 1) % hosts], at, nbytes, DATA))

        def post_chunk(index: int) -> None:
            at, nbytes, _ = share(index)
            from_peer = place and layout.column >= 0 and nbytes
            handles[index] = [self.leg.irecv(peers[(layout.host - 1) % hosts], at, nbytes, DATA)] if from_peer else []

        def begin(index: int) -> None:
            if not place:
                pass_on(index)

        def end(index: int) -> None:
            self.leg.wait(handles.pop(index))
            if place:
                pass_on(index)
                at, _, shares = share(index)
                if not self._alone:
                    self.local.all_gather(at, pointer + chunks[index][0] * item, shares, dtype)
            self.leg.wait(sends[:-_AHEAD])
            del sends[:-_AHEAD]

        self._pipeline(header, len(chunks), post_chunk, begin, None, end)
        self.leg.wait(sends)

    def _spread_small(self, header: bytes, pointer: int, nbytes: int, home: int) -> None:
        from launcher._native import copy_bytes

        self.calls["small"] += 1
        layout, crossing = self.layout, self.crossing
        if not self._leader:
            return
        if layout.host == home:
            crossing.mail(header, pointer, nbytes, [peer for _, peer in layout.peers])
            crossing.sent()
        else:
            peer = layout.hosts[home][0]
            copy_bytes(pointer, crossing.take(header, peer, nbytes), nbytes)
            crossing.free(peer)

    def rows(
        self,
        header: bytes,
        source: int,
        target: int,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        dtype: int,
    ) -> None:
        """all_to_all: every pair of ranks on different hosts exchanges its part directly."""
        layout, item = self.layout, SIZES[dtype]
        self.crossing.announce(header)
        to, came = starts(send_counts), starts(receive_counts)
        outside = [peer for peer in layout.order if peer not in layout.here]
        self.leg.connect(outside)
        handles = [
            self.leg.irecv(peer, target + came[peer] * item + at, nbytes, ROWS)
            for peer in outside
            for at, nbytes in ranges(receive_counts[peer] * item, _MOST_BYTES, 1)
        ]
        handles += [
            self.crossing.send(peer, source + to[peer] * item + at, nbytes, ROWS)
            for peer in outside
            for at, nbytes in ranges(send_counts[peer] * item, _MOST_BYTES, 1)
        ]
        here = layout.here
        sends, receives = [send_counts[peer] for peer in here], [receive_counts[peer] for peer in here]
        with (
            Ordered(here, source, to, item, read=True) as packed,
            Ordered(here, target, came, item, write=True) as unpacked,
        ):
            self.local.all_to_all(packed, unpacked, sends, receives, dtype)
        self.crossing.check(header)
        self.leg.wait(handles)
        self.crossing.sent()

    # ---- chunk by chunk

    def _pipeline(
        self,
        header: bytes,
        chunks: int,
        post: Callable[[int], None],
        begin: Callable[[int], None],
        middle: Callable[[int], None] | None,
        end: Callable[[int], None],
    ) -> None:
        """Every chunk is posted, begun, brought to its middle and ended, in this order, several of them at a time."""
        self.calls["chunked"] += 1
        self.crossing.announce(header)
        for index in range(min(_AHEAD, chunks)):
            post(index)
        checked = False
        for index in range(chunks + _LAG):
            if index < chunks:
                begin(index)
                self.leg.progress()
            if not checked and (index == chunks or index == (_LAG if middle is None else 1)):
                self.crossing.check(header)  # before anything is waited for that other calls would not send
                self.crossing.sent()
                checked = True
            if middle is not None and 0 < index <= chunks:
                middle(index - 1)
            if index >= _LAG:
                end(index - _LAG)
                if index - _LAG + _AHEAD < chunks:
                    post(index - _LAG + _AHEAD)


def common(one: tuple[int, int], other: tuple[int, int]) -> int:
    """How many elements two ranges (begin, end) share."""
    return max(0, min(one[1], other[1]) - max(one[0], other[0]))
