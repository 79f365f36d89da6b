"""Frames between the server and its workers, over a stream socket of this host.

A frame is a head of 24 bytes, its texts and its body::

    kind u8, 3 bytes of zero, id u32, bytes of the texts u32, number u32, bytes of the body u64    (little endian)

``id`` names a request; ``number`` is the kind's own. The texts are joined by NUL, which none of them has: HTTP allows
it neither in names nor in values of headers (RFC 9110, 5.5).
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

# From a worker.
HELLO = 1  # it is there; id: its slot. texts: the token that it was given
READY = 2  # the model is loaded; number: how many requests it takes at a time. texts: a line for the log
FAILED = 3  # it can not be loaded; number: exit code. texts: type, message, place, traceback
ANSWER = 4  # number: status. texts: content type, then names and values of headers
BEGIN = 5  # as ANSWER, of an answer that comes in pieces
PIECE = 6  # number: 1 for a text of a conversation
END = 7  # of the pieces; number: 0, or 1 when they ended by an error. texts: the error
ERROR = 8  # number: status. texts: type, message, traceback
COUNTS = 9  # of the user's own, to be added up. texts: names and numbers
TAKEN = 10  # number: bytes of messages that the handler has taken

# To a worker.
REQUEST = 16  # number: 1 when it opens a conversation. texts: see request_of()
TOGETHER = 17  # number: so many requests follow, to be answered together
CREDIT = 18  # number: bytes of pieces that the client has taken
CANCEL = 19  # the client has gone
CLOSE_SESSION = 20  # texts: its id
STOP = 21  # end, after what is in hand
MESSAGE = 22  # from the client, in a conversation; number: 1 for a text
MESSAGES_END = 23  # the client will say no more

HEAD = struct.Struct("<B3xIIIQ")
MAX_TEXTS = 1 << 20
# Pieces that a worker may have under way before it waits for the client; messages, before the client waits for it.
WINDOW_BYTES = 1 << 20
PIECE_BYTES = 256  # that a piece or a message is counted with besides its own: an empty one takes memory, too


class WireError(Exception):
    """The other side does not speak this protocol."""


class Frame:
    """One frame."""

    __slots__ = ("body", "id", "kind", "number", "texts")

    def __init__(self, kind: int, id: int, number: int, texts: tuple[str, ...], body: bytes) -> None:
        self.kind, self.id, self.number, self.texts, self.body = kind, id, number, texts, body


def pack(kind: int, id: int = 0, number: int = 0, texts: Iterable[str] = (), body_bytes: int = 0) -> bytes:
    """Head and texts of a frame whose body has ``body_bytes``. A NUL in a text becomes U+FFFD."""
    joined = "\0".join([text.replace("\0", "\ufffd") if "\0" in text else text for text in texts])
    encoded = joined.encode("utf-8", "surrogateescape")
    if len(encoded) > MAX_TEXTS:
        encoded = encoded[:MAX_TEXTS]
    return HEAD.pack(kind, id, len(encoded), number, body_bytes) + encoded


def unpack_texts(encoded: bytes | bytearray | memoryview) -> tuple[str, ...]:
    """The texts of a frame."""
    return tuple(str(encoded, "utf-8", "surrogateescape").split("\0")) if encoded else ()


class Splitter:
    """Makes frames of the bytes of a stream, however they are cut.

    Args:
        max_body: bytes of a body at most.
    """

    def __init__(self, max_body: int) -> None:
        self._max_body = max_body
        self._held = bytearray()
        self._wanted = HEAD.size

    def feed(self, piece: bytes | bytearray | memoryview) -> list[Frame]:
        """The frames that are whole with ``piece``.

        Raises:
            WireError: a frame that is larger than allowed.
        """
        held = self._held
        data: bytes | bytearray | memoryview = piece  # mostly a whole frame, and nothing is held
        if held:
            held += piece
            data = held
        if len(data) < self._wanted:
            if data is not held:
                held += piece
            return []
        frames, at = [], 0
        self._wanted = HEAD.size
        while len(data) - at >= HEAD.size:
            kind, id, text_bytes, number, body_bytes = HEAD.unpack_from(data, at)
            if text_bytes > MAX_TEXTS or body_bytes > self._max_body:
                raise WireError(f"a frame of kind {kind} with {text_bytes} bytes of texts and {body_bytes} of body")
            middle = at + HEAD.size + text_bytes
            end = middle + body_bytes
            if end > len(data):
                self._wanted = end - at
                break
            frames.append(Frame(kind, id, number, unpack_texts(data[at + HEAD.size : middle]), bytes(data[middle:end])))
            at = end
        if data is held:
            del held[:at]
        elif at < len(data):
            held += data[at:]
        return frames
