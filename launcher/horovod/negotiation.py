"""Which of the requests that the ranks have made can be carried out now, and in which order. Pure.

In every round each rank offers its oldest requests: for each the hash of its name and the hash of what is to be done.
What all ranks offer is carried out, in the order of the lowest rank. Where that gives nothing, or somebody has joined
(has no more data), the ranks exchange the full list of what they wait for.
"""

from __future__ import annotations

import hashlib
import json
import struct

from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

# Requests in one offer. With 15 an offer is 256 bytes: one small message.
SLOTS = 15
JOINED = 1
_OFFER = struct.Struct(f"<QQ{2 * SLOTS}Q")
OFFER_BYTES = _OFFER.size
_ZEROS = (0,) * (2 * SLOTS)
# What a rank may wait for at once, as JSON; a longer list is a fault.
LIST_LIMIT_BYTES = 64 << 20

# Kinds of requests that a rank without data can take part in: with zeros, or with no rows.
WITHOUT_DATA = frozenset(("allreduce", "adasum", "allgather"))
NEUTRAL_OPS = frozenset(("Sum", "Average", "Adasum"))


class Signature(Record):
    """What is to be done under a name; equal on all ranks.

    Attributes:
        kind: allreduce, adasum, allgather, broadcast, alltoall, reducescatter or barrier.
        dtypes, shapes: of each tensor. A first dimension that may differ between ranks is -1.
        op: name of the reduction, "" for none.
        root: rank in the set that a broadcast starts from, else -1.
        device: ``cpu`` or ``cuda``.
    """

    name: str
    kind: str
    dtypes: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    op: str = ""
    prescale: float = 1.0
    postscale: float = 1.0
    root: int = -1
    device: str = "cpu"

    def as_list(self) -> list[Any]:
        """Plain data, in the order of the fields."""
        return [self.__dict__[name] for name in self._fields]

    @classmethod
    def of(cls, values: Sequence[Any]) -> Signature:
        """The inverse of :meth:`as_list`, after JSON.

        Raises:
            ValueError: it is not the list of a signature.
        """
        try:
            name, kind, dtypes, shapes, op, prescale, postscale, root, device = values
            return cls(
                str(name),
                str(kind),
                tuple(str(dtype) for dtype in dtypes),
                tuple(tuple(int(dimension) for dimension in shape) for shape in shapes),
                str(op),
                float(prescale),
                float(postscale),
                int(root),
                str(device),
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"not the description of a request: {error}") from None


def key_of(kind: str, name: str) -> int:
    """The number that a request is found by. Never 0, which stands for an empty slot."""
    return _hash(f"{kind} {name}")


_digests: dict[tuple[Any, ...], int] = {}
_DIGESTS_KEPT = 4096


def digest_of(what: tuple[Any, ...]) -> int:
    """The hash of all of a signature but its name."""
    digest = _digests.get(what)
    if digest is None:
        if len(_digests) >= _DIGESTS_KEPT:
            _digests.clear()
        digest = _digests[what] = _hash(repr(what))
    return digest


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") or 1


def encode_offer(flags: int, entries: Sequence[tuple[int, int]], total: int) -> bytes:
    """An offer of at most SLOTS entries (key, digest), of ``total`` requests that wait."""
    flat = [number for entry in entries for number in entry]
    return _OFFER.pack(flags, total, *flat, *_ZEROS[len(flat) :])


def match(offers: bytes) -> tuple[list[int], bool]:
    """Keys that every rank offers alike, in the order of the first rank; and whether full lists are needed."""
    ranks = []
    flags = 0
    for numbers in _OFFER.iter_unpack(offers):
        flags |= numbers[0]
        ranks.append({numbers[at]: numbers[at + 1] for at in range(2, 2 + 2 * SLOTS, 2) if numbers[at]})
    if flags & JOINED:
        return [], True
    common = [key for key in ranks[0] if all(key in rank for rank in ranks)]
    alike = all(rank[key] == ranks[0][key] for key in common for rank in ranks)
    return (common, False) if common and alike else ([], True)


class Waiting(Record):
    """All that one rank waits for: signatures by key, in the order they were asked for."""

    joined: bool
    requests: dict[int, Signature]


def encode_list(joined: bool, signatures: Iterable[Signature]) -> bytes:
    """What :func:`decode_list` reads."""
    return json.dumps([joined, [signature.as_list() for signature in signatures]]).encode()


def decode_list(data: bytes) -> Waiting:
    """Raises ValueError for what is not such a list."""
    content = json.loads(data)
    if not isinstance(content, list) or len(content) != 2 or not isinstance(content[1], list):
        raise ValueError("not the list of a rank's requests")
    signatures = [Signature.of(item) for item in content[1]]
    return Waiting(bool(content[0]), {key_of(signature.kind, signature.name): signature for signature in signatures})


class Agreement(Record):
    """What to do next, the same on all ranks.

    Attributes:
        run: what to carry out, in this order. A rank that has not asked for it has joined.
        refused: keys of requests that fail on all ranks that made them, with the reason.
        lacking: for each other key the ranks that have not asked for it.
        all_joined: nobody has data any more.
    """

    run: dict[int, Signature]
    refused: dict[int, str]
    lacking: dict[int, list[int]]
    all_joined: bool


def agree(lists: Sequence[Waiting], ranks: Sequence[int]) -> Agreement:
    """The next step from everybody's list. ``ranks``: the members as the job numbers them, for messages."""
    run: dict[int, Signature] = {}
    refused: dict[int, str] = {}
    lacking: dict[int, list[int]] = {}
    everybody = list(zip(ranks, lists, strict=True))
    for key in dict.fromkeys(key for waiting in lists for key in waiting.requests):
        held = {rank: waiting.requests[key] for rank, waiting in everybody if key in waiting.requests}
        absent = [rank for rank, waiting in everybody if key not in waiting.requests and not waiting.joined]
        first = next(iter(held.values()))
        if any(signature != first for signature in held.values()):
            refused[key] = difference(held)
        elif absent:
            lacking[key] = absent
        elif len(held) < len(lists) and not _neutral(first):
            refused[key] = (
                f"{first.kind} {first.name!r}{' with ' + first.op if first.op else ''}: some ranks have called join() "
                "and have no data for it; only allreduce (Sum, Average, Adasum) and allgather go on without them"
            )
        else:
            run[key] = first
    idle = not any(waiting.requests for waiting in lists)
    return Agreement(run, refused, lacking, idle and all(waiting.joined for waiting in lists))


def _neutral(signature: Signature) -> bool:
    return signature.kind in WITHOUT_DATA and (not signature.op or signature.op in NEUTRAL_OPS)


_SAID = {
    "dtypes": "data types",
    "shapes": "shapes",
    "op": "reductions",
    "prescale": "prescale factors",
    "postscale": "postscale factors",
    "root": "root ranks",
    "device": "devices",
}


def difference(held: dict[int, Signature]) -> str:
    """What the ranks disagree about, with each rank's value."""
    (lowest, first), *others = held.items()
    for field, said in _SAID.items():
        wanted = getattr(first, field)
        for rank, signature in others:
            found = getattr(signature, field)
            if found != wanted:
                return (
                    f"{first.kind} {first.name!r}: the ranks gave different {said}: rank {lowest} {_show(wanted)}, "
                    f"rank {rank} {_show(found)}; all ranks must give the same under one name"
                )
    return f"{first.kind} {first.name!r}: the ranks asked for different things under this name"


def _show(value: object) -> str:
    if not isinstance(value, tuple):
        return str(value)
    if value and isinstance(value[0], (tuple, str)):  # of several tensors
        return ", ".join(_show(item) for item in value)
    return _shape(value)


def _shape(shape: tuple[Any, ...]) -> str:
    return "[" + ", ".join("any" if size == -1 else str(size) for size in shape) + "]"
