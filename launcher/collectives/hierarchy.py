"""Groups on several hosts: shared memory inside each host, an engine's leg across.

A large allreduce goes in chunks: a reduce-scatter inside the host leaves each column (crossing.py) its share, the
ranks of a column exchange and fold their shares, an all-gather inside the host puts them together. While one chunk is
on the wire, the next ones are folded inside the hosts. Short messages go to the hosts' leaders, from leader to leader,
and back.

Every element is folded in the order of ranks inside each host and then in the order of hosts, whatever the timing, and
by one rank for all or by all in the same order, so that all ranks get the same bits. The result depends on which ranks
share a host, since floating-point addition is not associative: with ``independent`` the leg carries what every rank
has, not the hosts' sums, and the fold goes by rank alone. Then the result is that of the same ranks on one host, and
the wire carries as many times more as there are ranks on a host. The factors must then be the same on all ranks.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys

from launcher.collectives.crossing import HEADER, Layout, Mismatch, starts
from launcher.collectives.elements import FLOATING, SIZES, DType, ReduceOp
from launcher.collectives.legs import LEGS, LegError, agree
from launcher.collectives.legs import job_store as job_store
from launcher.collectives.messages import SMALL_BYTES, Messages
from launcher.collectives.ordered import Ordered
from launcher.collectives.wire import wire_of
from launcher.errors import CollectiveError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType
    from typing import Any

    from launcher._native import LocalGroup
    from launcher.collectives.group import Store
    from launcher.collectives.legs import Leg
    from launcher.collectives.messages import Quick

_NAMES = ("barrier", "allreduce", "reduce_scatter", "all_gather", "broadcast", "reduce", "all_to_all")
_BITS = (ReduceOp.BIT_AND, ReduceOp.BIT_OR, ReduceOp.BIT_XOR)
# How a rank tells the others on its host who is to blame; theirs is the error of its leaving.
_CULPRIT = re.compile(r"culprit: rank (-?\d+) on ([^;]*); (\w+): (.*)", re.DOTALL)
_LEG_VARIABLE, _WIRE_VARIABLE = "LAUNCHER_COLLECTIVE_LEG", "LAUNCHER_COLLECTIVE_WIRE"
_said: set[str] = set()
_LATER_S = 30.0
_KINDS = 256  # of allreduces, whose short way is kept


def make(
    local: LocalGroup,
    name: str,
    rank: int,
    size: int,
    *,
    ranks: Sequence[int],
    hosts: Sequence[Sequence[int]],
    names: Sequence[str],
    store: Store,
    timeout_s: float,
    leg: str = "auto",
    wire: str = "none",
    independent: bool = False,
) -> HierarchicalGroup:
    """The group of ``size`` ranks whose members on this host are ``local``; blocks until all hosts are connected.

    Args:
        ranks: the members' numbers in the job. hosts: ranks of the group by host, in the order of their first ones.
        names: of the hosts. store: reached by all members.
        leg: ``sockets``, ``mpi``, ``gloo``, or ``auto``, see legs.agree. ``auto`` looks at LAUNCHER_COLLECTIVE_LEG
            first.
        wire: ``bf16`` or ``fp16``: sums of float32 of more than SMALL_BYTES cross in 16 bits, see wire.py. ``none``
            looks at LAUNCHER_COLLECTIVE_WIRE first.
        independent: the result does not depend on which ranks share a host; not together with ``wire``.

    Raises:
        CollectiveError: a member did not come, or was given other options.
        UsageError: no engine leads to the other hosts, or an option has an unknown value.
    """
    if leg == "auto":
        leg = os.environ.get(_LEG_VARIABLE) or "auto"
    if wire == "none" and not independent:
        wire = os.environ.get(_WIRE_VARIABLE) or "none"
    if leg not in LEGS:
        raise UsageError(f"group {name!r}: leg is {leg!r}; expected {', '.join(LEGS)}")
    if independent and wire != "none":
        raise UsageError(f"group {name!r}: independent takes no wire, but wire is {wire!r}; leave one of them out")
    try:
        wire_of(wire)
    except ValueError as error:
        raise UsageError(f"group {name!r}: {error}") from None
    layout = Layout(rank, hosts, names, ranks)
    prefix = f"launcher/{os.environ.get('LAUNCHER_ATTEMPT', '0')}/{name}"
    asked = {"leg": leg, "wire": wire, "independent": independent}
    members = [layout.who(index) for index in range(size)]
    chosen, why = agree(name, rank, members, store, asked, prefix)
    try:
        way: Leg
        if chosen == "mpi":
            from launcher.collectives.leg_mpi import MpiLeg

            way = MpiLeg(prefix, ranks, timeout_s)
        elif chosen == "sockets":
            from launcher.collectives.leg_sockets import SocketsLeg

            way = SocketsLeg(store, prefix, layout, timeout_s)
        else:
            from launcher.collectives.leg_gloo import GlooLeg

            way = GlooLeg(store, prefix, rank, size, timeout_s)
        group = HierarchicalGroup(local, name, layout, way, why, timeout_s, wire, independent)
    except LegError as error:
        raise CollectiveError(
            f"join of group {name!r}: {error.text}",
            error.kind,
            rank=ranks[error.peer] if error.peer >= 0 else -1,
            host=names[layout.host_of(error.peer)] if error.peer >= 0 else "",
            operation="join",
        ) from error
    text = f"collectives: {_engine(chosen)} between the hosts ({why})"
    if wire != "none":
        text += f", float32 sums in {wire}"
    if ranks[rank] == 0 and text not in _said:
        _said.add(text)
        print(f"[launcher] {text}", file=sys.stderr, flush=True)
    return group


def _engine(leg: str) -> str:
    return {"mpi": "MPI", "sockets": "TCP sockets"}.get(leg, leg.capitalize())


class HierarchicalGroup:
    """Ranks of several hosts; see group.Group for what each method does, and the module for how."""

    def __init__(
        self,
        local: LocalGroup,
        name: str,
        layout: Layout,
        leg: Leg,
        why: str,
        timeout_s: float,
        wire: str,
        independent: bool,
    ) -> None:
        self.name, self.leg_name, self.why = name, leg.name, why
        self._local, self._leg, self._layout = local, leg, layout
        self._failure: CollectiveError | None = None
        self._farewell: dict[str, Any] = {}  # what the others are told about it
        self._closed = False
        self._sequence = 0
        self._messages = Messages(local, leg, layout, wire_of(wire), independent)
        self._quick: dict[tuple[int, int, float, float], Quick] = {}
        self.timeout_s = timeout_s

    @property
    def rank(self) -> int:
        """See Group."""
        return self._layout.rank

    @property
    def size(self) -> int:
        """See Group."""
        return self._layout.size

    @property
    def sequence(self) -> int:
        """Number of calls so far."""
        return self._sequence

    @property
    def timeout_s(self) -> float:
        """See Group."""
        return self._timeout_s

    @timeout_s.setter
    def timeout_s(self, seconds: float) -> None:
        # Inside the host a little longer: whoever waits for a rank that waits for another host is to be told by it.
        self._local.timeout_s = seconds + min(_LATER_S, max(1.0, seconds / 10))  # which refuses what makes no sense
        self._timeout_s = seconds
        if not self._over():
            self._leg.timeout_s = seconds

    # ---- operations

    def allreduce(
        self,
        source: int,
        target: int,
        count: int,
        dtype: int,
        op: int = 0,
        prescale: float = 1.0,
        postscale: float = 1.0,
    ) -> None:
        """See Group."""
        kind = (dtype, op, prescale, postscale)
        quick = self._quick.get(kind)
        if quick is not None and 0 < count <= quick[0]:
            self._sequence += 1
            try:
                quick[1](self._sequence, source, target, count)
            except BaseException as error:
                call = _Call(self, "allreduce", dtype, op, 0, count)
                call.failed(error)
                raise
            return
        _check_fold(*kind)
        if count and kind not in self._quick and not self._over():
            if len(self._quick) >= _KINDS:
                self._quick.clear()
            self._quick[kind] = found = self._messages.quick(*kind) or (0, _nothing)
            if count <= found[0]:
                return self.allreduce(source, target, count, *kind)
        with _Call(self, "allreduce", dtype, op, 0, count) as header:
            if count:
                self._messages.allreduce(header, source, target, count, dtype, op, prescale, postscale)

    def allreduce_coalesced(
        self,
        sources: Sequence[int],
        targets: Sequence[int],
        counts: Sequence[int],
        dtype: int,
        op: int = 0,
        prescale: float = 1.0,
        postscale: float = 1.0,
    ) -> None:
        """See Group. Neighbours that are short are put together and cross as one message."""
        if not len(sources) == len(targets) == len(counts):
            raise ValueError(
                f"allreduce_coalesced got {len(sources)} sources, {len(targets)} targets and {len(counts)} counts; "
                "expected one of each per piece"
            )
        _check_fold(dtype, op, prescale, postscale)
        from launcher._native import copy_bytes

        item = SIZES[dtype]
        for batch in _batches(counts, item):
            total = sum(counts[index] for index in batch)
            if len(batch) == 1:
                self.allreduce(sources[batch[0]], targets[batch[0]], total, dtype, op, prescale, postscale)
                continue
            room = (ctypes.c_char * max(1, total * item))()
            base = ctypes.addressof(room)
            places = starts([counts[index] * item for index in batch])
            for index, at in zip(batch, places, strict=False):
                copy_bytes(base + at, sources[index], counts[index] * item)
            self.allreduce(base, base, total, dtype, op, prescale, postscale)
            for index, at in zip(batch, places, strict=False):
                copy_bytes(targets[index], base + at, counts[index] * item)

    def reduce_scatter(
        self,
        source: int,
        target: int,
        counts: Sequence[int],
        dtype: int,
        op: int = 0,
        prescale: float = 1.0,
        postscale: float = 1.0,
    ) -> None:
        """See Group."""
        self._check_counts(counts)
        _check_fold(dtype, op, prescale, postscale)
        from launcher._native import copy_bytes

        layout, messages, item, begins = self._layout, self._messages, SIZES[dtype], starts(counts)
        total = begins[-1]
        with _Call(self, "reduce_scatter", dtype, op, 0, total) as header:
            if not total:
                return
            if total * item <= messages.small_bytes:
                room = (ctypes.c_char * (total * item))()
                base = ctypes.addressof(room)
                messages.allreduce(header, source, base, total, dtype, op, prescale, postscale)
                copy_bytes(target, base + begins[layout.rank] * item, counts[layout.rank] * item)
                return
            sizes = [[counts[member] for member in members] for members in layout.hosts]
            with Ordered(layout.order, source, begins, item, read=True) as ordered:
                messages.scatter(header, ordered, target, sizes, dtype, op, prescale, postscale)

    def all_gather(self, source: int, target: int, counts: Sequence[int], dtype: int) -> None:
        """See Group."""
        self._check_counts(counts)
        layout, item, begins = self._layout, SIZES[dtype], starts(counts)
        sizes = [[counts[member] for member in members] for members in layout.hosts]
        totals = [sum(one) for one in sizes]
        with _Call(self, "all_gather", dtype, 0, 0, begins[-1]) as header:
            if not begins[-1]:
                return
            with Ordered(layout.order, target, begins, item, write=True) as ordered:
                mine = ordered + sum(totals[: layout.host]) * item
                self._local.all_gather(source, mine, sizes[layout.host], dtype)
                self._messages.gather(header, ordered, totals, dtype)

    def broadcast(self, pointer: int, count: int, dtype: int, root: int) -> None:
        """See Group."""
        self._check_root(root)
        layout = self._layout
        home = layout.host_of(root)
        with _Call(self, "broadcast", dtype, 0, root, count) as header:
            if not count:
                return
            if home == layout.host:
                self._local.broadcast(pointer, count, dtype, layout.here.index(root))
            self._messages.spread(header, pointer, count, dtype, home)

    def reduce(
        self,
        source: int,
        target: int,
        count: int,
        dtype: int,
        root: int,
        op: int = 0,
        prescale: float = 1.0,
        postscale: float = 1.0,
    ) -> None:
        """See Group."""
        self._check_root(root)
        _check_fold(dtype, op, prescale, postscale)
        from launcher._native import copy_bytes

        layout, messages, nbytes = self._layout, self._messages, count * SIZES[dtype]
        home = layout.host_of(root)
        with _Call(self, "reduce", dtype, op, root, count) as header:
            if not count:
                return
            if nbytes > messages.small_bytes:
                sizes = [[count if member == root else 0 for member in members] for members in layout.hosts]
                messages.scatter(header, source, target, sizes, dtype, op, prescale, postscale)
                return
            room = (ctypes.c_char * nbytes)()
            base = ctypes.addressof(room)
            messages.to_leaders(header, source, base, count, dtype, op, prescale, postscale, (home,))
            if home == layout.host:
                self._local.broadcast(base, count, dtype, 0)
            if layout.rank == root:
                copy_bytes(target, base, nbytes)

    def all_to_all(
        self, source: int, target: int, send_counts: Sequence[int], receive_counts: Sequence[int], dtype: int
    ) -> None:
        """See Group."""
        self._check_counts(send_counts)
        self._check_counts(receive_counts)
        with _Call(self, "all_to_all", dtype, 0, 0, 0) as header:
            self._messages.rows(header, source, target, send_counts, receive_counts, dtype)

    def barrier(self) -> None:
        """See Group."""
        with _Call(self, "barrier", 0, 0, 0, 0) as header:
            self._messages.meet(header)

    # ---- memory and the rest

    def allocate(self, nbytes: int) -> int:
        """See Group: memory that the ranks of this host map."""
        return self._local.allocate(nbytes)

    def release(self, address: int) -> None:
        """See Group."""
        self._local.release(address)

    def register(self, address: int, nbytes: int, fd: int) -> None:
        """See Group."""
        self._local.register(address, nbytes, fd)

    def unregister(self, address: int) -> None:
        """See Group."""
        self._local.unregister(address)

    def statistics(self) -> dict[str, Any]:
        """Those of the group inside the host, and ``between``: of what crossed."""
        sent_bytes, messages = self._messages.crossing.counted()
        between = {
            "leg": self.leg_name,
            "why": self.why,
            "calls": self._messages.counted(),
            "sent_bytes": sent_bytes,
            "messages": messages,
            "chunk_bytes": self._messages.chunk_bytes,
        }
        return {**self._local.statistics(), "between": between}

    def set_path(self, name: str) -> None:
        """See Group: of the group inside the host."""
        self._local.set_path(name)

    def abort(self, reason: str) -> None:
        """See Group. A call of this rank that waits for another host ends when that host has heard."""
        if not self._closed and self._failure is None:
            self._end(self._error("left", self.rank, reason, "abort"), reason)

    def close(self) -> None:
        """See Group."""
        if not self._closed:
            self._closed = True
            self._quick = {}
            if self._failure is None:
                notice = self._notice("left", self.rank, "closed its end of the group")
                self._messages.crossing.give_up(notice, orderly=True)
            self._local.close()

    def __repr__(self) -> str:
        hosts = len(self._layout.hosts)
        return f"HierarchicalGroup({self.name!r}, rank {self.rank} of {self.size}, {hosts} hosts, {self.leg_name})"

    # ---- errors

    def _check_counts(self, counts: Sequence[int]) -> None:
        if len(counts) != self.size or min(counts) < 0:
            raise ValueError(f"counts is {list(counts)}; expected {self.size} numbers, none negative")

    def _check_root(self, root: int) -> None:
        if not 0 <= root < self.size:
            raise ValueError(f"root is {root}; expected a rank of the group, 0 to {self.size - 1}")

    def _over(self) -> bool:
        return self._closed or self._failure is not None

    def _enter(self) -> None:
        """Before a call."""
        if self._over():
            text = "the group was closed" if self._failure is None else f"the group has failed: {self._failure}"
            before = self._failure
            raise CollectiveError(
                f"group {self.name!r}: {text}; make another one",
                "closed",
                before.rank if before else self._layout.ranks[self.rank],
                before.host if before else self._layout.names[self._layout.host],
            )
        self._sequence += 1

    def _error(self, reason: str, peer: int, text: str, operation: str) -> CollectiveError:
        """``peer``: the culprit, in the group; -1: not known."""
        layout = self._layout
        who = layout.who(peer) if peer >= 0 else "a rank"
        return CollectiveError(
            f"{operation} #{self._sequence} of group {self.name!r}: {who}: {text}",
            reason,
            layout.ranks[peer] if peer >= 0 else -1,
            layout.names[layout.host_of(peer)] if peer >= 0 else "",
            operation,
            self._sequence,
        )

    def _notice(self, reason: str, peer: int, text: str) -> dict[str, Any]:
        layout = self._layout
        host = layout.names[layout.host_of(peer)] if peer >= 0 else ""
        return {"reason": reason, "rank": layout.ranks[peer] if peer >= 0 else -1, "host": host, "text": text}

    def _failed(self, error: BaseException, operation: str, header: bytes) -> CollectiveError | None:
        """Ends the group over ``error``; what to raise in its place, None for itself."""
        if self._failure is not None:  # abort() of another thread; this one may end the process before it has told
            self._messages.crossing.give_up(self._farewell)
            return self._failure
        found: CollectiveError | None = None
        text = ""
        if isinstance(error, LegError):
            notice = None
            if error.kind in ("lost", "notice"):
                notice = self._messages.crossing.notice_of(error.peer, 1.0)
            if notice is not None:
                found, text = self._told(notice, operation)
            else:
                kind = "lost" if error.kind == "notice" else error.kind
                text = f"{error.text}; see whether it is still alive" if kind == "lost" else error.text
                found = self._error(kind, error.peer, text, operation)
        elif isinstance(error, Mismatch):
            text = f"calls {_called(error.theirs)} while this rank calls {_called(HEADER.unpack(header))}"
            found = self._error("mismatch", error.peer, text, operation)
        elif isinstance(error, CollectiveError):
            culprit = _CULPRIT.search(str(error))
            if culprit is not None:
                number, host, reason, text = culprit.groups()
                found, text = self._told({"rank": int(number), "host": host, "reason": reason, "text": text}, operation)
            else:
                text = str(error)
                found = CollectiveError(
                    f"{operation} #{self._sequence} of group {self.name!r}: {text}",
                    *(error.reason, error.rank, error.host, operation, self._sequence),
                )
        own = found or self._error("left", self.rank, f"{type(error).__name__}: {error}", operation)
        self._end(own, text or f"{type(error).__name__}: {error}")
        return found

    def _told(self, notice: dict[str, Any], operation: str) -> tuple[CollectiveError, str]:
        """The error that another rank has told of."""
        rank, host, text = int(notice.get("rank", -1)), str(notice.get("host", "")), str(notice.get("text", ""))
        who = f"rank {rank} on {host}" if rank >= 0 else "a rank"
        error = CollectiveError(
            f"{operation} #{self._sequence} of group {self.name!r}: {who}: {text}",
            str(notice.get("reason", "lost")),
            rank,
            host,
            operation,
            self._sequence,
        )
        return error, text

    def _end(self, error: CollectiveError, text: str) -> None:
        """Tells the ranks of this host and this rank's column; the first one to know names the culprit."""
        self._farewell = {"reason": error.reason, "rank": error.rank, "host": error.host, "text": text}
        self._failure = error
        self._quick = {}
        self._local.abort(f"culprit: rank {error.rank} on {error.host}; {error.reason}: {text}")
        self._messages.crossing.give_up(self._farewell)


class _Call:
    """One call of a group: its number, its header, and what happens when it fails."""

    def __init__(self, group: HierarchicalGroup, operation: str, dtype: int, op: int, root: int, count: int) -> None:
        self._group, self._operation = group, operation
        self._fields = (dtype, op, root, count)
        self._header = b""

    def __enter__(self) -> bytes:
        self._group._enter()
        return self._say()

    def _say(self) -> bytes:
        dtype, op, root, count = self._fields
        number = _NAMES.index(self._operation)
        self._header = HEADER.pack(self._group.sequence, number, dtype, op, root, count, 0)
        return self._header

    def failed(self, error: BaseException) -> None:
        """What leaving it over ``error`` does, for a call that was not entered but counted."""
        self._say()
        self.__exit__(type(error), error, None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            found = self._group._failed(error, self._operation, self._header)
            if found is not None:
                raise found from error


def _nothing(sequence: int, source: int, target: int, count: int) -> None:
    """The short way of those that have none."""


def _called(header: tuple[int, ...]) -> str:
    """``allreduce #5 (sum of 100 float32)``."""
    sequence, operation, dtype, op, root, count, _ = header
    name = _NAMES[operation] if operation < len(_NAMES) else f"operation {operation}"
    if name in ("barrier", "all_to_all"):
        return f"{name} #{sequence}"
    what = f"{count} {DType(dtype).name}" if dtype < len(SIZES) else f"{count} elements"
    if name in ("allreduce", "reduce_scatter", "reduce") and op < len(ReduceOp):
        what = f"{ReduceOp(op).name.lower()} of {what}"
    return f"{name} #{sequence} ({what}{f', root {root}' if name in ('broadcast', 'reduce') else ''})"


def _check_fold(dtype: int, op: int, prescale: float, postscale: float) -> None:
    """Raises ValueError for what no type folds; see elements.ReduceOp."""
    kind, operation = DType(dtype), ReduceOp(op)
    if operation in _BITS and kind in FLOATING:
        raise ValueError(f"{operation.name} is not defined for {kind.name}")
    if operation == ReduceOp.AVERAGE and kind == DType.bool:
        raise ValueError("AVERAGE is not defined for bool")
    if kind not in FLOATING and (prescale != 1.0 or postscale != 1.0):
        raise ValueError(f"prescale is {prescale} and postscale {postscale}; {kind.name} takes neither")


def _batches(counts: Sequence[int], item: int) -> Iterator[list[int]]:
    """Indices of pieces that cross together: neighbours of at most SMALL_BYTES each, up to a megabyte together."""
    batch: list[int] = []
    nbytes = 0
    for index, count in enumerate(counts):
        size = count * item
        if batch and (size > SMALL_BYTES or nbytes + size > 1024 * 1024):
            yield batch
            batch, nbytes = [], 0
        if size > SMALL_BYTES:
            yield [index]
        elif size:
            batch.append(index)
            nbytes += size
    if batch:
        yield batch
