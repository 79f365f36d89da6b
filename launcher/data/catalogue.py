"""What is in a channel: its files, their format, and a source of their records."""

from __future__ import annotations

import hashlib
import os

from launcher import _data
from launcher.data.channel import Place, find_place
from launcher.data.formats import detect, no_records
from launcher.data.indexing import SIDECAR, say
from launcher.data.opening import Request, open_format
from launcher.errors import DataError, UsageError
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ACCESS_VARIABLE = "LAUNCHER_DATA_ACCESS"
ON_BAD = ("raise", "substitute", "skip")
_OF_WHOLE_FILES = ("files", "images")  # formats of which a file without a byte is a record


class Damage(Record):
    """What was left out of a file (``on_bad="skip"``): ``bytes`` from ``offset`` on, and why."""

    file: str
    offset: int
    bytes: int
    text: str


class Opened(Record):
    """A channel that can be read.

    Attributes:
        source: for the engine.
        format: its name in :data:`launcher.data.formats.FORMATS`.
        files: (path relative to the channel's folder, size in bytes, records) of each, in the order of the records:
            sorted by the bytes of their paths.
        records: of all files.
        fields: (name, kind, dtype, shape) of each, as :func:`launcher.data.fields.source_fields` reads them.
        fingerprint: 64 bits, equal where path, size and records of all files, format and version of the order are.
        damage: what was left out.
        access: ``resident`` (files are mapped) or ``remote`` (files are read in large pieces: FUSE).
        distribution: ``FullyReplicated`` or ``ShardedByS3Key``.
        path: the folder, or the file.
        index: where each record is; None for formats that need none.
        index_key: what the index is for: the format, and what else a scan depends on.
    """

    source: _data.Source
    format: str
    files: tuple[tuple[str, int, int], ...]
    records: int
    fields: list[tuple[str, int, int, tuple[int, ...]]]
    fingerprint: int
    damage: tuple[Damage, ...]
    access: str
    distribution: str
    path: str
    index: _data.Index | None = None
    index_key: str = ""


def open_source(
    channel: str | os.PathLike[str],
    *,
    format: str = "auto",
    fields: Any = None,
    on_bad: str = "raise",
    hidden: bool = False,
    links: bool = False,
    index: str = "auto",
    quiet: bool = False,
    **options: Any,
) -> Opened:
    """Opens a channel of this job, or any folder or file.

    Args:
        channel: a channel's name, or a path.
        format: a name in :data:`launcher.data.formats.FORMATS`; ``auto``: by the channel's content type, else by the
            suffixes of the files, else by their first bytes.
        fields: what to read of each record; what it may be depends on the format, None is all.
        on_bad: ``skip`` leaves damaged records out and counts them in ``damage``; else they are errors, here or (what
            only the reading of a record can show) when it is read.
        hidden: files whose names begin with ``.`` or ``_``, too.
        links: follow symbolic links inside the folder. The folder itself may be one in any case.
        index: see :class:`launcher.data.indexing.IndexRequest`.
        quiet: what was left out is not told on stderr.
        options: of the format.

    Raises:
        UsageError: no such channel, path, format or option; two formats fit.
        DataError: the channel has no files; a file is damaged (with its path and offset), or can not be read.
        ContractError: the job's configuration.
    """
    if on_bad not in ON_BAD:
        raise UsageError(f"on_bad is {on_bad!r}; expected one of {', '.join(ON_BAD)}")
    place = find_place(channel)
    if place.mode == "Pipe":
        raise UsageError(f"channel {place.name} is in Pipe mode: it is a stream, which has no files to open")
    entries = list_entries(place, hidden=hidden, links=links)
    access = access_of(place.path)
    root = place.path if os.path.isdir(place.path) else os.path.dirname(place.path)
    chosen = detect(format, place, entries, root)
    if chosen not in _OF_WHOLE_FILES and not any(size for _, size, _ in entries):
        raise no_records(place, root, entries)
    request = Request(
        place=place,
        root=root,
        entries=entries,
        access=access,
        fields=fields,
        skip=on_bad == "skip",
        index=index,
        options=options,
        lenient=on_bad != "raise",
    )
    made = open_format(chosen, request)
    if made.source.records == 0 and not made.damage:
        raise no_records(place, root, made.entries)
    files = tuple((path, size, records) for (path, size, _), records in zip(made.entries, made.records, strict=True))
    damage = tuple(Damage(path, *one) for path, some in made.damage for one in some)
    if damage and not quiet:
        lost, places = sum(one.bytes for one in damage), f"{len(damage)} place{'s' * (len(damage) > 1)}"
        say(f"{place.path}: {lost} bytes are left out, at {places}; the first: {describe(damage[0], root)}")
    return Opened(
        source=made.source,
        format=chosen,
        files=files,
        records=made.source.records,
        fields=made.source.fields,
        fingerprint=fingerprint(chosen, files),
        damage=damage,
        access="remote" if access == "read" else "resident",
        distribution=place.distribution,
        path=place.path,
        index=made.index,
        index_key=made.index_key,
    )


def list_entries(place: Place, *, hidden: bool = False, links: bool = False) -> tuple[tuple[str, int, int], ...]:
    """(relative path, size in bytes, time of change in ns) of the channel's files, byte-sorted by path.

    That symbolic links were left out is told on stderr.

    Raises:
        DataError: there are none, or they can not be listed.
    """
    listed, left = _data.list_with_links(place.path, hidden, links)
    linked = f"{left} symbolic link{'s' * (left > 1)} left out, which links=True (--links) follows" if left else ""
    entries = tuple(entry for entry in listed if not os.path.basename(entry[0]).startswith(SIDECAR))
    if not entries:
        what = f"{place.path} is empty" if not left else f"{place.path} has no files but {linked}"
        what = f"channel {place.name} has no files: {what}" if place.name else what
        more = "" if hidden else " (names that begin with '.' or '_' do not count)"
        shard = ", because its objects are fewer than the hosts" if place.distribution == "ShardedByS3Key" else ""
        raise DataError(f"{what}{more}{shard}", "malformed", place.path)
    if linked:
        say(f"{place.path}: {linked}")
    return entries


def access_of(path: str) -> str:
    """How files at ``path`` are opened: ``read`` on FUSE, else ``mapped``. ``LAUNCHER_DATA_ACCESS`` forces either.

    Raises:
        UsageError: the variable is something else.
    """
    forced = os.environ.get(ACCESS_VARIABLE) or "automatic"
    if forced not in ("automatic", "mapped", "read"):
        raise UsageError(f"environment variable {ACCESS_VARIABLE} is {forced!r}; expected automatic, mapped or read")
    if forced != "automatic":
        return forced
    return "read" if _data.served_by_fuse(path) else "mapped"


def fingerprint(format: str, files: tuple[tuple[str, int, int], ...]) -> int:
    """64 bits that say which records these are, in which order: another set has others."""
    state = hashlib.blake2b(f"{format}\0{_data.ORDER_VERSION}\0".encode(), digest_size=8)
    for path, size, records in files:
        state.update(path.encode("utf-8", "surrogateescape") + f"\0{size}\0{records}\0".encode())
    return int.from_bytes(state.digest(), "little")


def describe(damage: Damage, root: str) -> str:
    """One line about what was left out."""
    path = os.path.join(root, damage.file)
    return damage.text if path in damage.text else f"{path}: byte {damage.offset}: {damage.text}"
