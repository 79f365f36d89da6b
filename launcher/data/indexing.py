"""The index of a channel, kept beside its data: scanned once per host, by one rank, while the others wait.

A sidecar is found by the path of the data, the format and its options; what it says of a file counts while the file has
the size and the time of change it had then. It is written whole or not at all, and checked before it is believed
(native/data/sidecar.h), so a rank that is killed at any moment leaves nothing to clean up: the lock is the kernel's.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import sys

from launcher import _data
from launcher.errors import DataError, UsageError
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Entry = tuple[str, int, int]

# An index of less data than this is made sooner than a sidecar is found and checked: a file is not worth it.
KEPT_FROM_BYTES = 16 << 20
SIDECAR = ".launcher-index-"
"""What the names of sidecars begin with."""


class IndexRequest(Record):
    """What an index is of.

    Attributes:
        root: the folder, or the one file.
        entries: (path relative to the folder, size in bytes, time of change in ns) of each file.
        files: the same, opened.
        key: the format, and all options that a scan depends on.
        where: ``auto`` (a sidecar that is there is used; one is written for data of 16 MiB and more), ``keep`` (one is
            written in any case), ``off``, or the path of a sidecar to use: then the times of change do not count.
    """

    root: str
    entries: tuple[Entry, ...]
    files: tuple[_data.File, ...]
    key: str
    where: str = "auto"


def index_files(request: IndexRequest, scan: Callable[[_data.File], _data.FileIndex]) -> list[_data.FileIndex]:
    """The index of each file: from a sidecar, else by ``scan``, which is called for one file after the other.

    Raises:
        DataError: what ``scan`` raises; a sidecar that was named can not be used.
        UsageError: there is no sidecar of the name given.
    """
    if request.where not in ("auto", "keep", "off"):
        return _named(request)
    places = [] if request.where == "off" else sidecar_paths(request.root, request.key)
    parts: list[_data.FileIndex | None] = [None] * len(request.entries)
    found = False
    for path in places:
        found = _fill(parts, path, request) or found
        if _complete(parts):
            return _all(parts)
    total = sum(size for _, size, _ in request.entries)
    if not places or (request.where == "auto" and not found and total < KEPT_FROM_BYTES):
        return _scan(parts, request, scan)
    return _make(places, parts, request, scan)


def sidecar_paths(root: str, key: str) -> list[str]:
    """Where the sidecar of the data at ``root`` may be: beside the data, in the user's cache, in the job's folder.

    A hidden file: the catalogue leaves it out.
    """
    folder = root if os.path.isdir(root) else os.path.dirname(root)
    name = os.path.basename(root) if folder != root else ""
    paths = [os.path.join(folder, SIDECAR + _digest(name, key))]
    elsewhere = SIDECAR + _digest(os.path.realpath(root), key)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if os.path.isabs(home):
        paths.append(os.path.join(home, "launcher", elsewhere))
    if os.environ.get("LAUNCHER_RUN_DIR"):
        paths.append(os.path.join(os.environ["LAUNCHER_RUN_DIR"], elsewhere))
    return paths


def _digest(*texts: str) -> str:
    joined = "\0".join(texts).encode("utf-8", "surrogateescape")
    return hashlib.blake2b(joined, digest_size=8).hexdigest()


def _named(request: IndexRequest) -> list[_data.FileIndex]:
    if not os.path.exists(request.where):
        raise UsageError(
            f"there is no index {request.where!r}; expected auto, keep, off, or the path of a file that "
            "`python -m launcher data index --output FILE` has written"
        )
    parts = _data.load_index(request.where, request.key, list(request.entries), any_time=True)
    for (path, size, _), part in zip(request.entries, parts, strict=True):
        if part is None:
            text = f"{request.where}: it has no file {path!r} of {size} bytes; index the data again"
            raise DataError(text, "changed", request.where)
    return _all(parts)


def _fill(parts: list[_data.FileIndex | None], path: str, request: IndexRequest) -> bool:
    """Puts what the sidecar has into ``parts`` where they have nothing; whether there is one, be it damaged."""
    try:
        loaded = _data.load_index(path, request.key, list(request.entries))
    except DataError as error:
        if error.problem == "changed":  # there is none
            return False
        say(str(error))
        return True
    for number, part in enumerate(loaded):
        if parts[number] is None:
            parts[number] = part
    return True


def _make(
    places: list[str],
    parts: list[_data.FileIndex | None],
    request: IndexRequest,
    scan: Callable[[_data.File], _data.FileIndex],
) -> list[_data.FileIndex]:
    reasons = []
    made: list[_data.FileIndex] = []
    for path in places:
        folder = os.path.dirname(path)
        try:
            if path != places[0]:
                os.makedirs(folder, mode=0o700, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(f"{folder} can not be written to")
            with _locked(folder):
                if not made:
                    _fill(parts, path, request)  # another rank may have made it meanwhile
                    if _complete(parts):
                        return _all(parts)
                    made = _scan(parts, request, scan)
                _data.save_index(path, request.key, list(request.entries), made)
                return made
        except OSError as error:
            reasons.append(str(error))
        except DataError as error:
            if error.file != path:
                raise
            reasons.append(str(error))
    say(f"the index is not kept, the next start will make it again: {'; '.join(reasons)}")
    return made or _scan(parts, request, scan)


def _scan(
    parts: Sequence[_data.FileIndex | None], request: IndexRequest, scan: Callable[[_data.File], _data.FileIndex]
) -> list[_data.FileIndex]:
    return [scan(file) if part is None else part for file, part in zip(request.files, parts, strict=True)]


def _complete(parts: Sequence[_data.FileIndex | None]) -> bool:
    return None not in parts


def _all(parts: Sequence[_data.FileIndex | None]) -> list[_data.FileIndex]:
    return [part for part in parts if part is not None]


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """One process at a time. The lock is on the folder itself: there is no file to be left over.

    Raises:
        OSError: the file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


_said: set[str] = set()


def say(text: str) -> None:
    """Tells the user, once per process."""
    if text not in _said:
        _said.add(text)
        print(f"[launcher] {text}", file=sys.stderr, flush=True)
