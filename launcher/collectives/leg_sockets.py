"""The leg between hosts over TCP sockets of our own, which need nothing that is not there.

Each rank listens at its host's address in the cluster and publishes address, port and two secrets of 128 bits in the
group's store; who connects has to show one and is answered with the other. What goes over the connections, and how it
is waited for, is native (native/crossing); an allreduce with one rank per host is one native call.
"""

from __future__ import annotations

import hashlib
import json
import os

from launcher._native import SocketLeg as NativeLeg
from launcher._native import local_address
from launcher.collectives.crossing import Crossing, notice_text, read_notice
from launcher.collectives.legs import LegError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from launcher._native import LocalGroup, Message
    from launcher.collectives.crossing import Layout
    from launcher.collectives.group import Store

# Of a pair in a column, beside the connection for short messages. Other pairs, which meet in all_to_all only, have one.
# Measured for 25 MiB both ways at 10 Gbit/s: see docs/collectives.md.
_STREAMS = 2
# How long a wait polls before it sleeps: a wake-up costs 5 to 50 us. With more ranks than cores the one that is waited
# for may need this very core.
_POLL_US, _POLL_CROWDED_US = 100, 2


class SocketsLeg:
    """See legs.Leg."""

    name = "sockets"
    message_bytes = 1024 * 1024

    def __init__(self, store: Store, prefix: str, layout: Layout, timeout_s: float) -> None:
        """Connects to the other ranks of this rank's column; blocks until all of them have come.

        Raises:
            LegError: one of them could not be reached, or its address is not known.
        """
        self._store, self._prefix, self._layout = store, f"{prefix}/sockets", layout
        interface = next((one for one in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if one), "")
        try:
            host = local_address(interface, os.environ.get("MASTER_ADDR", ""))
            crowded = len(layout.here) > len(os.sched_getaffinity(0))
            self.native = NativeLeg(
                hashlib.blake2b(prefix.encode(), digest_size=24).hexdigest(),
                layout.rank,
                layout.size,
                host,
                timeout_s,
                _POLL_CROWDED_US if crowded else _POLL_US,
            )
        except (OSError, ValueError) as error:
            store.set(f"{self._prefix}/{layout.rank}", json.dumps({"error": str(error)}).encode())
            raise LegError(layout.rank, "system", f"{layout.who(layout.rank)} could not listen: {error}") from error
        address, port, asks, answers = self.native.endpoint
        mine = {"address": address, "port": port, "asks": asks.hex(), "answers": answers.hex()}
        store.set(f"{self._prefix}/{layout.rank}", json.dumps(mine).encode())
        try:
            self.connect([peer for _, peer in layout.peers], _STREAMS)
        except BaseException as error:
            self._leave(error)
            raise

    def _leave(self, error: BaseException) -> None:
        """Tells those that are connected why the others are not; raises what one of them has told."""
        layout, told = self._layout, None
        peer, kind, text = layout.rank, "left", f"could not take part: {type(error).__name__}: {error}"
        if isinstance(error, LegError):
            peer, kind, text = error.peer, "lost" if error.kind == "notice" else error.kind, error.text
            if error.kind in ("lost", "notice"):
                told = read_notice(self.native.notice_of(peer, 1.0))
        if told is not None and told.get("rank") in layout.ranks:
            peer = layout.ranks.index(told["rank"])
            kind, text = str(told.get("reason", "lost")), str(told.get("text", ""))
        rank, host = (layout.ranks[peer], layout.names[layout.host_of(peer)]) if peer >= 0 else (-1, "")
        self.native.give_up(notice_text({"reason": kind, "rank": rank, "host": host, "text": text}), False)
        if isinstance(error, LegError):
            named = peer < 0 or text.startswith(layout.who(peer))
            raise LegError(peer, kind, text if named else f"{layout.who(peer)}: {text}") from error

    @property
    def timeout_s(self) -> float:
        """How long a wait is for a message, in seconds."""
        return self.native.timeout_s

    @timeout_s.setter
    def timeout_s(self, seconds: float) -> None:
        self.native.timeout_s = seconds

    @property
    def calls(self) -> tuple[int, int]:
        """Allreduces that were one native call: short and long ones."""
        return self.native.calls

    def connect(self, peers: Sequence[int], streams: int = 1) -> None:
        missing = [peer for peer in peers if not self.native.connected(peer)]
        if missing:
            self.native.connect([self._find(peer) for peer in missing], streams)

    def _find(self, peer: int) -> tuple[int, str, str, int, bytes, bytes]:
        who = self._layout.who(peer)
        try:
            told = json.loads(self._store.get(f"{self._prefix}/{peer}"))
        except (OSError, RuntimeError, LookupError) as error:  # what stores raise on their timeout
            raise LegError(peer, "timeout", f"{who} did not tell its address: {error}") from error
        if "error" in told:
            raise LegError(peer, "system", f"{who} could not listen: {told['error']}")
        return (peer, who, told["address"], told["port"], bytes.fromhex(told["asks"]), bytes.fromhex(told["answers"]))

    def isend(self, peer: int, address: int, nbytes: int, lane: int) -> Message:
        return self.native.isend(peer, address, nbytes, lane)

    def irecv(self, peer: int, address: int, nbytes: int, lane: int) -> Message:
        return self.native.irecv(peer, address, nbytes, lane)

    def wait(self, handles: Iterable[Message]) -> None:
        self.native.wait(handles)

    def watch(self, handles: Sequence[Any]) -> None:
        """Notices end every wait by themselves."""

    def arrived(self, handle: Message, limit_s: float) -> bool:
        limit, self.timeout_s = self.timeout_s, limit_s
        try:
            self.native.wait((handle,))
        except LegError:
            return False
        finally:
            self.timeout_s = limit
        return True

    def progress(self) -> None:
        self.native.progress()

    def close(self) -> None:
        self.native.give_up(b"", True)


class SocketsCrossing(Crossing):
    """:class:`Crossing` without mailboxes: the native leg keeps what is short, and compares headers."""

    leg: SocketsLeg

    def __init__(self, local: LocalGroup, leg: SocketsLeg, layout: Layout, mail_bytes: int) -> None:
        self.leg, self.layout, self._local = leg, layout, local
        self._native = leg.native
        self._slots, self._slot_bytes, self._slot_count = 0, 0, 0
        self.sent_bytes = self.messages = 0
        if layout.column >= 0:
            column = [members[layout.column] for members in layout.hosts]
            self._native.set_column(column, layout.host, mail_bytes)

    def mail(self, header: bytes, address: int, nbytes: int, peers: Sequence[int]) -> None:
        self._native.call(header, address, nbytes, list(peers))

    def take(self, header: bytes, peer: int, nbytes: int) -> int:
        return self._native.take(header, peer, nbytes)

    def free(self, peer: int) -> None:
        self._native.free(peer)

    def sent(self) -> None:
        self._native.flush()

    def counted(self) -> tuple[int, int]:
        native = self._native
        return self.sent_bytes + native.sent_bytes, self.messages + native.messages

    def notice_of(self, peer: int, limit_s: float) -> dict[str, Any] | None:
        return read_notice(self._native.notice_of(peer, limit_s))

    def give_up(self, notice: dict[str, Any], orderly: bool = False) -> None:
        self._native.give_up(notice_text(notice), orderly)
