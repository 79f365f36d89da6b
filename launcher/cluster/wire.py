"""Authenticated, bounded messages between the launchers of two hosts over one TCP connection.

A frame is its length (u32, big endian) and that many bytes: JSON during the handshake, a 16-byte MAC and JSON after it.

    member -> leader   hi         protocol, job, host name, the member's nonce
    leader -> member   challenge  the leader's nonce                    (or a refusal: other job, other protocol)
    member -> leader   proof      HMAC-SHA256 of "member" and all that was said
    leader -> member   proof      HMAC-SHA256 of "leader" and all that was said (or a refusal, which is proven too)

Both nonces go into every proof, so a recorded handshake proves nothing; the labels differ, so a proof sent back to
whom made it proves nothing either. From then on each direction has a key of its own, and a frame's MAC covers its
number in that direction: a frame that is altered, repeated, dropped, reordered or sent back ends the connection.
Messages are authenticated, not encrypted: nothing secret may be sent.

A :class:`Channel` belongs to one event loop. It never waits and never raises for what the other side does.
"""

from __future__ import annotations

import hmac
import json
import os
import socket
import struct

from launcher.cluster.sockets import (
    UNREACHABLE,
    accept,
    begin_connect,
    connect_error,
    listen,
    numeric_name,
    set_options,
)
from launcher.errors import InternalError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Message = dict[str, Any]

__all__ = ["Channel", "accept", "begin_connect", "connect_error", "encode", "listen"]

PROTOCOL = 1
HANDSHAKE_S = 5.0  # a connection that is not proven by then is dropped
HANDSHAKE_FRAME_BYTES = 4 << 10
FRAME_BYTES = 4 << 20
UNSENT_BYTES = 32 << 20  # more than this that the peer does not read: it is dropped
HOST_CHARACTERS = 255

# Refusals that a leader gives by itself; others are what its ``admit`` says.
OTHER_JOB = "another job's launcher listens here"
WRONG_SECRET = "this host's secret is not the leader's"  # noqa: S105

_MAC_BYTES = 16
_NONCE_BYTES = 32
_CHUNK_BYTES = 64 << 10
_CHUNKS_PER_READ = 16  # 1 MiB, then the other connections have their turn
_LENGTH = struct.Struct(">I")
_NUMBER = struct.Struct(">Q")

# What a channel waits for.
_HI, _CHALLENGE, _MEMBER_PROOF, _LEADER_PROOF, _MESSAGES = range(5)

_encode_json = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode
_decode_json = json.JSONDecoder().decode


def encode(message: Message) -> bytes:
    """``message`` as :meth:`Channel.send` takes it: for one that goes to many hosts.

    Raises:
        InternalError: it is too long for a frame.
    """
    payload = _encode_json(message).encode("ascii")
    if len(payload) > FRAME_BYTES - _MAC_BYTES:
        raise InternalError(
            f"a message of {len(payload)} bytes with the fields {', '.join(map(str, message))} is too long for one "
            f"frame (at most {FRAME_BYTES - _MAC_BYTES} bytes)"
        )
    return payload


def _decode(payload: bytes) -> Message | None:
    """The message in ``payload``, or None when it is not a JSON object."""
    try:
        message = _decode_json(payload.decode())
    except (ValueError, RecursionError):  # not UTF-8, not JSON; nested too deep
        return None
    return message if isinstance(message, dict) else None


def _hex(message: Message, name: str, size: int) -> bytes:
    """The bytes of a field in hexadecimal digits; empty when it is not ``size`` bytes of them."""
    value = message.get(name)
    if not isinstance(value, str) or len(value) != 2 * size:
        return b""
    try:
        return bytes.fromhex(value)
    except ValueError:
        return b""


def _text(message: Message, name: str, longest: int) -> str:
    """A field's text; empty when it is not printable text of 1 to ``longest`` characters."""
    value = message.get(name)
    return value if isinstance(value, str) and len(value) <= longest and value.isprintable() else ""


def _digest(key: bytes, label: bytes, *parts: bytes) -> bytes:
    # Lengths in front: no two lists of parts give the same bytes.
    return hmac.digest(key, b"".join(_LENGTH.pack(len(part)) + part for part in (label, *parts)), "sha256")


class Channel:
    """One connection between a member and the leader.

    Attributes:
        host: the member's name; on the leader empty until the member has proven itself.
        address, local_address: numeric addresses of the peer and of this end.
        open: both sides have proven that they know the key, and the connection stands.
        closed: why it is closed, in words; empty while it is alive.
        cause: empty, or one of eof, reset, unreachable, garbage, oversized, bad-proof, replay, slow, refused, overflow.
        refusal: the reason that the leader gave for a refusal, as it was sent or received.
        refusal_proven: the refusal came from a leader that knows the key.
        heard_s: when something came from the peer, on the clock of the caller's ``now_s``.
        deadline_s: when :meth:`on_time` has something to do; infinite once the connection is open.
    """

    def __init__(self, sock: socket.socket, key: bytes, job: str, address: str, now_s: float, state: int) -> None:
        sock.setblocking(False)
        set_options(sock)
        self._sock: socket.socket | None = sock
        self._key, self._job, self._state = key, job, state
        self._admit: Callable[[str], str] | None = None
        self._member_nonce = self._leader_nonce = b""
        self._peer_host = ""  # the name that the peer claims to have
        self._send_key = self._receive_key = b""
        self._sent = self._received = 0
        self._in, self._need = bytearray(), _LENGTH.size
        self._out = bytearray()
        self._queue: list[bytes] = []  # what is sent once the connection is open
        self._queued_bytes = 0
        self._broken: OSError | None = None
        self.host = ""
        self.address = address
        self.local_address = numeric_name(sock, socket.socket.getsockname)
        self.open = False
        self.closed = self.cause = self.refusal = ""
        self.refusal_proven = False
        self.heard_s = now_s
        self.deadline_s = now_s + HANDSHAKE_S

    @classmethod
    def connecting(cls, sock: socket.socket, *, key: bytes, job: str, host: str, now_s: float) -> Channel:
        """A member's end. ``sock`` is connected; see :func:`begin_connect`."""
        channel = cls(sock, key, job, numeric_name(sock, socket.socket.getpeername), now_s, _CHALLENGE)
        channel.host = host
        channel._member_nonce = os.urandom(_NONCE_BYTES)
        nonce = channel._member_nonce.hex()
        channel._write_handshake({"kind": "hi", "protocol": PROTOCOL, "job": job, "host": host, "nonce": nonce})
        return channel

    @classmethod
    def accepted(
        cls, sock: socket.socket, *, key: bytes, job: str, address: str, now_s: float, admit: Callable[[str], str]
    ) -> Channel:
        """The leader's end of a connection that came in.

        Args:
            admit: for the name of a host that has proven itself, why it is refused right now; empty to let it in.
        """
        channel = cls(sock, key, job, address, now_s, _HI)
        channel._admit = admit
        return channel

    def fileno(self) -> int:
        """The socket's descriptor, -1 when closed."""
        return -1 if self._sock is None else self._sock.fileno()

    def wants_write(self) -> bool:
        """Whether something waits for the socket to be writable; then :meth:`flush`."""
        return bool(self._out) and self._broken is None

    def read(self, now_s: float) -> list[Message]:
        """What has come in, as far as it is complete. To be called again while the socket is readable."""
        messages: list[Message] = []
        for _ in range(_CHUNKS_PER_READ):
            if self._sock is None:
                break
            try:
                data = self._sock.recv(_CHUNK_BYTES)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                self._lost(error)
                break
            if not data:
                self._ended()
                break
            self.heard_s = now_s
            self._take(data, messages)
            if len(data) < _CHUNK_BYTES:
                break
        return messages

    def flush(self) -> None:
        """Writes what the socket takes."""
        while self._out and self._sock is not None and self._broken is None:
            try:
                sent = self._sock.send(self._out, socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                # What the peer said before it went may wait to be read: read() closes.
                self._broken = error
                self._out.clear()
                return
            del self._out[:sent]

    def send(self, message: Message | bytes) -> None:
        """Sends a message (or an :func:`encode` d one), after the handshake if that is not done. Closed: no effect.

        Raises:
            InternalError: it is too long for a frame.
        """
        payload = message if isinstance(message, bytes) else encode(message)
        if self._sock is None or self._broken is not None:
            return
        if self.open:
            self._write_message(payload)
        else:
            self._queue.append(payload)
            self._queued_bytes += len(payload)
            self._check_unsent()

    def on_time(self, now_s: float) -> None:
        """Drops a connection whose handshake takes too long."""
        if self._sock is not None and now_s >= self.deadline_s:
            self._drop("slow", f"{self._peer()} did not finish the handshake in time")

    def close(self, reason: str) -> None:
        """Ends the connection from this side; what the socket does not take at once is not sent."""
        if self._sock is None:
            return
        self.flush()
        # Closed with bytes unread, the kernel resets the connection, and what was just sent could be lost.
        try:
            for _ in range(_CHUNKS_PER_READ):
                if not self._sock.recv(_CHUNK_BYTES):
                    break
        except OSError:
            pass  # nothing more to read, which is what is wanted
        self._drop("", reason)

    # -- ends ----------------------------------------------------------------------------------------------------

    def _peer(self) -> str:
        if self._admit is None:
            return f"the leader at {self.address}"
        if self.host:
            return f"{self.host} at {self.address}"
        return f"{self.address} (claims to be {self._peer_host})" if self._peer_host else self.address

    def _drop(self, cause: str, reason: str) -> None:
        sock, self._sock = self._sock, None
        if sock is None:
            return
        self.cause, self.closed = cause, reason or "closed"
        self.open = False
        self.deadline_s = float("inf")
        self._out, self._in, self._queue = bytearray(), bytearray(), []
        sock.close()

    def _lost(self, error: OSError) -> None:
        error = self._broken or error
        stage = "" if self.open else " during the handshake"
        cause = "unreachable" if error.errno in UNREACHABLE else "reset"
        self._drop(cause, f"connection to {self._peer()} lost{stage}: {error.strerror or error}")

    def _ended(self) -> None:
        if self._broken is not None:
            self._lost(self._broken)
        elif self.open:
            self._drop("eof", f"{self._peer()} closed the connection")
        else:
            self._drop("eof", f"{self._peer()} closed the connection during the handshake")

    def _garbage(self, what: str) -> None:
        self._drop("garbage", f"{self._peer()} sent {what}")

    # -- frames --------------------------------------------------------------------------------------------------

    def _take(self, data: bytes | bytearray, messages: list[Message]) -> None:
        """Handles the whole frames in what was kept and ``data``; keeps the rest."""
        if self._in:
            self._in += data
            if len(self._in) < self._need:
                return
            data, self._in = self._in, bytearray()
        start, end = 0, len(data)
        self._need = _LENGTH.size
        while end - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(data, start)
            longest = FRAME_BYTES if self.open else HANDSHAKE_FRAME_BYTES
            if length > longest:
                self._drop("oversized", f"{self._peer()} announced a frame of {length} bytes; the limit is {longest}")
                return
            body = start + _LENGTH.size
            stop = body + length
            if stop > end:
                self._need = stop - start
                break
            if self.open:
                message = self._checked(data, body, stop)
                if message is None:
                    return
                messages.append(message)
            else:
                self._shake_hands(bytes(data[body:stop]))
                if self._sock is None:
                    return
            start = stop
        if start < end:
            self._in += data[start:] if start else data

    def _checked(self, data: bytes | bytearray, body: int, stop: int) -> Message | None:
        """The message of the frame ``data[body:stop]``; None, and closed, when it is not the next one of the peer."""
        text = body + _MAC_BYTES
        payload = bytes(data[text:stop])
        mac = hmac.digest(self._receive_key, _NUMBER.pack(self._received) + payload, "sha256")[:_MAC_BYTES]
        if not hmac.compare_digest(mac, bytes(data[body : min(text, stop)])):
            self._drop(
                "replay",
                f"frame {self._received} from {self._peer()} is not what it sent: altered, repeated or out of order",
            )
            return None
        self._received += 1
        message = _decode(payload)
        if message is None:
            self._garbage("a frame that is no JSON object")
        return message

    def _write_message(self, payload: bytes) -> None:
        mac = hmac.digest(self._send_key, _NUMBER.pack(self._sent) + payload, "sha256")[:_MAC_BYTES]
        self._sent += 1
        self._write(_LENGTH.pack(_MAC_BYTES + len(payload)) + mac + payload)

    def _write_handshake(self, message: Message) -> None:
        payload = _encode_json(message).encode("ascii")
        self._write(_LENGTH.pack(len(payload)) + payload)

    def _write(self, frame: bytes) -> None:
        if self._sock is None or self._broken is not None:
            return
        waiting = bool(self._out)
        self._out += frame
        if not waiting:
            self.flush()
        self._check_unsent()

    def _check_unsent(self) -> None:
        unsent = len(self._out) + self._queued_bytes
        if unsent > UNSENT_BYTES:
            self._drop("overflow", f"{self._peer()} does not read: {unsent} bytes wait, the limit is {UNSENT_BYTES}")

    # -- handshake -----------------------------------------------------------------------------------------------

    def _shake_hands(self, payload: bytes) -> None:
        message = _decode(payload)
        if message is None:
            self._garbage("a frame that is no JSON object during the handshake")
            return
        kind = message.get("kind")
        if self._state == _HI and kind == "hi":
            self._on_hi(message)
        elif self._state == _CHALLENGE and kind == "challenge":
            self._on_challenge(message)
        elif self._state == _MEMBER_PROOF and kind == "proof":
            self._on_member_proof(message)
        elif self._state == _LEADER_PROOF and kind == "proof":
            self._on_leader_proof(message)
        elif self._state in (_CHALLENGE, _LEADER_PROOF) and kind == "no":
            self._on_refusal(message)
        else:
            self._garbage("a frame that does not belong to this step of the handshake")

    def _on_hi(self, message: Message) -> None:
        protocol = message.get("protocol")
        if type(protocol) is not int:
            self._garbage("a hi without a protocol number")
        elif protocol != PROTOCOL:
            self._refuse(f"protocol {PROTOCOL} is spoken here, not {protocol}: install the same launcher on all hosts")
        else:
            job, host = _text(message, "job", 256), _text(message, "host", HOST_CHARACTERS)
            nonce = _hex(message, "nonce", _NONCE_BYTES)
            if not job or not host or not nonce:
                self._garbage("a hi whose job, host or nonce is missing or malformed")
            elif job != self._job:
                self._refuse(OTHER_JOB)
            else:
                self._peer_host, self._member_nonce = host, nonce
                self._leader_nonce = os.urandom(_NONCE_BYTES)
                self._state = _MEMBER_PROOF
                self._write_handshake({"kind": "challenge", "nonce": self._leader_nonce.hex()})

    def _on_challenge(self, message: Message) -> None:
        self._leader_nonce = _hex(message, "nonce", _NONCE_BYTES)
        if not self._leader_nonce:
            self._garbage("a challenge without a nonce")
            return
        self._peer_host = self.host
        self._state = _LEADER_PROOF
        self._write_handshake({"kind": "proof", "proof": self._proof(b"member").hex()})

    def _on_member_proof(self, message: Message) -> None:
        assert self._admit is not None
        if not hmac.compare_digest(self._proof(b"member"), _hex(message, "proof", 32)):
            self._refuse(
                WRONG_SECRET,
                cause="bad-proof",
                reason=f"{self._peer()} could not prove that it knows the job's secret",
            )
            return
        reason = self._admit(self._peer_host)
        if reason:
            self._refuse(reason, proven=True)
            return
        self.host = self._peer_host
        self._write_handshake({"kind": "proof", "proof": self._proof(b"leader").hex()})
        self._become_open(b"leader to member", b"member to leader")

    def _on_leader_proof(self, message: Message) -> None:
        if not hmac.compare_digest(self._proof(b"leader"), _hex(message, "proof", 32)):
            self._drop(
                "bad-proof",
                f"{self._peer()} could not prove that it knows the job's secret: it has another one, "
                "or another program listens there",
            )
            return
        self._become_open(b"member to leader", b"leader to member")

    def _on_refusal(self, message: Message) -> None:
        reason = _text(message, "reason", HANDSHAKE_FRAME_BYTES)
        if not reason:
            self._garbage("a refusal without a reason")
            return
        self.refusal = reason
        if self._state == _LEADER_PROOF:
            proof = self._proof(b"refusal", reason.encode())
            self.refusal_proven = hmac.compare_digest(proof, _hex(message, "proof", 32))
        self._drop("refused", f"{self._peer()} refused this host: {reason}")

    def _proof(self, label: bytes, *more: bytes) -> bytes:
        said = (
            self._job.encode(),
            self._peer_host.encode(errors="surrogatepass"),
            self._member_nonce,
            self._leader_nonce,
        )
        return _digest(self._key, label, _NUMBER.pack(PROTOCOL), *said, *more)

    def _refuse(self, refusal: str, *, cause: str = "refused", reason: str = "", proven: bool = False) -> None:
        """Tells the member why it can not join, and closes."""
        refusal = "".join(letter if letter.isprintable() else " " for letter in refusal)[:300]
        answer = {"kind": "no", "reason": refusal}
        if proven:
            answer["proof"] = self._proof(b"refusal", refusal.encode()).hex()
        reason = reason or f"refused {self._peer()}: {refusal}"
        self._write_handshake(answer)
        self.refusal, self.refusal_proven = refusal, proven
        self._drop(cause, reason)

    def _become_open(self, send_label: bytes, receive_label: bytes) -> None:
        self._send_key, self._receive_key = self._proof(send_label), self._proof(receive_label)
        self.open = self._sock is not None
        self._state = _MESSAGES
        self.deadline_s = float("inf")
        queue, self._queue, self._queued_bytes = self._queue, [], 0
        for payload in queue:
            self._write_message(payload)
