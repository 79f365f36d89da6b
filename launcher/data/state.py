"""Where a channel's reading stands: one position in the order of one epoch, the same on all ranks.

The state says nothing about ranks or batches, so it is as good for another number of ranks. What it does hold is what
the order follows from, and a fingerprint of the files, for going on in the same place of something else would repeat
some records and lose others.
"""

from __future__ import annotations

import hashlib
import warnings

from launcher._data import ORDER_VERSION
from launcher.data.order import MOST, SHUFFLES, Shuffling
from launcher.errors import DataError, UsageError
from launcher.record import Record, replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    # Of each file: path relative to the channel, size in bytes, records; in the catalogue's order.
    FileTable = Sequence[tuple[str, int, int]]

STATE_VERSION = 1
ON_RESHARD = ("refuse", "epoch_restart")
_MARKS = 16  # parts of the file table that have a mark of their own
_MARK_DIGITS = 3


class State(Record):
    """A position in the order of a channel's records.

    Attributes:
        fingerprint: of the files, 64 bits.
        seed, epoch, shuffling: what the order follows from, with ``records``.
        records: of the whole channel.
        position: records of the epoch that were read. Where each host has records of its own: rows that each host
            has read.
        files, marks: number of files, and marks (see :func:`marks`) by which one that has changed is found.
        hosts: where each host has files of its own: the hosts' names, sorted, with their numbers of records, and
            ``files`` and ``marks`` are of hosts in place of files; () otherwise.
        order_version: of the order.
    """

    fingerprint: int
    records: int
    seed: int = 0
    epoch: int = 0
    position: int = 0
    shuffling: Shuffling = Shuffling()
    files: int = 0
    marks: str = ""
    hosts: tuple[tuple[str, int], ...] = ()
    order_version: int = ORDER_VERSION

    def to_dict(self) -> dict[str, object]:
        """Whole numbers and texts only (and for ``hosts`` a dict of them), for JSON, torch.save and the like."""
        value: dict[str, object] = {
            "version": STATE_VERSION,
            "order": self.order_version,
            "data": f"{self.fingerprint:016x}",
            "records": self.records,
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self.position,
            "shuffle": self.shuffling.shuffle,
        }
        if self.shuffling.shuffle == "blocks":
            value |= {name: getattr(self.shuffling, name) for name in ("extent", "window", "lanes")}
        if self.marks:
            value |= {"files": self.files, "marks": self.marks}
        if self.hosts:
            value["hosts"] = dict(self.hosts)
        return value

    def at(self, other: State) -> State:
        """This data, in the epoch, in the order, and at the position of ``other``."""
        return replace(self, seed=other.seed, epoch=other.epoch, position=other.position, shuffling=other.shuffling)


def from_dict(value: Mapping[str, object]) -> State:
    """The state that :meth:`State.to_dict` made a dict of.

    Raises:
        UsageError: it is no such dict, or one of another version.
    """
    if not hasattr(value, "keys"):
        raise UsageError(f"the state is {type(value).__name__}; expected the dict that state_dict() gave")
    version = value.get("version")
    if version != STATE_VERSION:
        raise UsageError(
            f"the state is of version {version!r}, this launcher reads version {STATE_VERSION}; load it with the "
            "launcher that saved it, or pass strict=False to begin an epoch anew"
        )

    def number(name: str, least: int = 0) -> int:
        found = value.get(name)
        if not isinstance(found, int) or isinstance(found, bool) or not least <= found <= MOST:
            raise UsageError(f"the state's field {name!r} is {found!r}; expected a whole number of at least {least}")
        return found

    def text(name: str) -> str:
        found = value.get(name, "")
        if not isinstance(found, str):
            raise UsageError(f"the state's field {name!r} is {found!r}; expected a text")
        return found

    try:
        fingerprint = int(text("data") or "none", 16)
    except ValueError:
        raise UsageError(f"the state's field 'data' is {value.get('data')!r}; expected 16 hexadecimal digits") from None
    shuffle = text("shuffle")
    if shuffle not in SHUFFLES:
        raise UsageError(f"the state's field 'shuffle' is {shuffle!r}; expected one of {', '.join(SHUFFLES)}")
    blocks = (number("extent", 1), number("window", 1), number("lanes", 1)) if shuffle == "blocks" else ()
    hosts = value.get("hosts", {})
    if not isinstance(hosts, dict) or not all(isinstance(name, str) and type(n) is int for name, n in hosts.items()):
        raise UsageError(f"the state's field 'hosts' is {hosts!r}; expected records by host")
    state = State(
        fingerprint=fingerprint,
        records=number("records"),
        seed=number("seed"),
        epoch=number("epoch"),
        position=number("position"),
        shuffling=Shuffling(shuffle, *blocks),
        files=number("files") if "marks" in value else 0,
        marks=text("marks"),
        hosts=tuple(hosts.items()),
        order_version=number("order", 1),
    )
    if state.position > state.records:
        raise UsageError(f"the state's position is {state.position}, beyond its {state.records} records")
    return state


def resume(
    saved: Mapping[str, object],
    now: State,
    *,
    strict: bool = True,
    on_reshard: str = "refuse",
    directory: str = "",
    files: FileTable = (),
    saved_files: FileTable = (),
) -> State:
    """The state to go on from.

    Args:
        saved: what ``state_dict()`` gave; its seed and order are taken over for the epoch that it is in.
        now: the state of the channel as it has been opened.
        strict: False: where the saved position means nothing any more, its epoch begins anew, with a warning.
        on_reshard: the same where each host has files of its own and there are other hosts now: ``refuse`` or
            ``epoch_restart`` (without a warning, for it was asked for).
        directory, files: the channel's folder and files, to name one that has changed.
        saved_files: the files when the state was saved, where they are known, to name it exactly.

    Raises:
        UsageError: the state can not be used: it is of another version or for other hosts, or is no state.
        DataError: problem ``changed``: the files are not those that the state was saved with.
    """
    if on_reshard not in ON_RESHARD:
        raise UsageError(f"on_reshard is {on_reshard!r}; expected {' or '.join(map(repr, ON_RESHARD))}")
    try:
        state = from_dict(saved)
        if state.order_version != now.order_version:
            raise UsageError(
                f"the state is for version {state.order_version} of the order, this launcher has version "
                f"{now.order_version}; resume with the launcher that saved it, or pass strict=False to begin epoch "
                f"{state.epoch} anew"
            )
        if len(state.hosts) != len(now.hosts):
            if on_reshard == "epoch_restart":
                return replace(now, seed=state.seed, epoch=state.epoch, position=0)
            raise UsageError(
                f"each host has files of its own, and the state was saved on {_hosts(state)}, this job is on "
                f"{_hosts(now)}: which records are still to be read can not be told; resume on as many hosts, or pass "
                "on_reshard='epoch_restart' to begin the epoch anew"
            )
        if state.fingerprint != now.fingerprint or state.records != now.records:
            raise _changed(state, now, directory, files, saved_files)
    except (UsageError, DataError) as error:
        if strict:
            raise
        epoch, seed = saved.get("epoch"), saved.get("seed")
        began = replace(
            now,
            epoch=epoch if type(epoch) is int and 0 <= epoch <= MOST else now.epoch,
            seed=seed if type(seed) is int and 0 <= seed <= MOST else now.seed,
            position=0,
        )
        warnings.warn(f"{error}; epoch {began.epoch} begins anew (strict=False)", RuntimeWarning, stacklevel=3)
        return began
    return now.at(state)


def _hosts(state: State) -> str:
    count = len(state.hosts)
    if not count:
        return "hosts that all had the same files"
    return f"{count} host{'s' * (count > 1)} ({', '.join(f'{name}: {records}' for name, records in state.hosts)})"


def _changed(state: State, now: State, directory: str, files: FileTable, saved_files: FileTable) -> DataError:
    if saved_files and files:
        path, text = first_difference(saved_files, files)
    elif now.hosts:
        path, text = _host_difference(state, now)
    else:
        path, text = _marked_difference(state, files)
    where = f"{directory.rstrip('/')}/{path}" if directory and path else path
    prefix = f"{where}: " if where else ""
    return DataError(
        f"{prefix}the data is not what it was when the state was saved: {text}; there were {state.records} records and "
        f"are {now.records}; resume with the data of then, or pass strict=False to begin epoch {state.epoch} anew",
        "changed",
        where,
    )


def first_difference(then: FileTable, now: FileTable) -> tuple[str, str]:
    """The first file in which two tables differ, and how."""
    for old, new in zip(then, now, strict=False):
        if old[0] != new[0]:
            if old[0].encode(errors="surrogateescape") < new[0].encode(errors="surrogateescape"):
                return old[0], "this file is gone"
            return new[0], "this file is new"
        if old[1] != new[1]:
            return new[0], f"the file had {old[1]} bytes and has {new[1]}"
        if old[2] != new[2]:
            return new[0], f"the file had {old[2]} records and has {new[2]}"
    if len(then) > len(now):
        return then[len(now)][0], "this file is gone"
    if len(now) > len(then):
        return now[len(then)][0], "this file is new"
    return "", "its files are the same, but their format, or what is read of them, is not"


def marks(files: FileTable) -> str:
    """Short digests of up to 16 equal parts of a file table: what makes a state name the part that has changed.

    A part that has changed looks the same once in 4096 cases.
    """
    count = len(files)
    parts = min(count, _MARKS)
    return "".join(_mark(files[count * part // parts : count * (part + 1) // parts]) for part in range(parts))


def _mark(files: FileTable) -> str:
    text = "\0".join(f"{path}\0{size}\0{records}" for path, size, records in files)
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).hexdigest()[:_MARK_DIGITS]


def differing_part(files: int, one: str, other: str) -> str:
    """The numbers of the files (from 0) that the first mark in which two differ is of: "3", or "12 to 17"."""
    parts = len(one) // _MARK_DIGITS
    for part in range(parts):
        place = slice(part * _MARK_DIGITS, (part + 1) * _MARK_DIGITS)
        if one[place] != other[place]:
            begin, end = files * part // parts, files * (part + 1) // parts
            return str(begin) if end - begin == 1 else f"{begin} to {end - 1}"
    return ""


def _marked_difference(state: State, files: FileTable) -> tuple[str, str]:
    """As first_difference(), from what the state has of the files of then."""
    count, parts = state.files, len(state.marks) // _MARK_DIGITS
    counts = f"there were {count} files and are {len(files)}"
    for part in range(parts):
        begin, end = count * part // parts, count * (part + 1) // parts
        if state.marks[part * _MARK_DIGITS : (part + 1) * _MARK_DIGITS] == _mark(files[begin:end]):
            continue
        here = files[begin:end]
        if not here:
            return "", f"{counts}; the last ones are gone"
        if len(files) == count and end - begin == 1:
            return here[0][0], "the file's name, size, or number of records is another"
        if end - begin == 1:
            return here[0][0], f"{counts}; this is the first that differs (it is new, has changed, or one is gone)"
        return here[0][0], f"{counts}; the first that differs is among {here[0][0]} .. {here[-1][0]}"
    if parts and len(files) > count:
        return files[count][0], f"{counts}; this is the first new one"
    return "", f"{counts}, or their format, or what is read of them, is not the same"


def _host_difference(state: State, now: State) -> tuple[str, str]:
    """As first_difference(), between hosts; their names are in order, and each has a mark."""
    before = dict(state.hosts)
    for name, records in now.hosts:
        if name in before and before[name] != records:
            return "", f"host {name} had {before[name]} records and has {records}"
    if state.files == now.files == len(now.hosts) <= _MARKS:
        for part, (name, _) in enumerate(now.hosts):
            place = slice(part * _MARK_DIGITS, (part + 1) * _MARK_DIGITS)
            if state.marks[place] != now.marks[place]:
                return "", f"host {name} has other files"
    return "", "the hosts have other files"
