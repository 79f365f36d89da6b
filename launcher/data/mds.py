"""Data sets of MosaicML streaming (MDS, version 2): the index file, the columns of the shards, their hashes.

A folder has ``index.json`` and shards. The shards say what is in them, so the index is only what they are checked
against; it may be missing (of a channel with S3DistributionType ShardedByS3Key, one host alone gets it).
The layout of a shard is in native/data/mds.h. Encodings of columns and what they become:

- ``int`` (int64), ``uint8`` to ``float64``: a number; ``ndarray:dtype:shape``: an array of that shape.
- ``ndarray:dtype``: arrays of one dimension and any length, ragged.
- ``str``, ``bytes``, ``json``, ``jpeg``, ``png``, ``str_int`` and all others: their bytes as they are, ragged uint8.
  Nothing is unpickled: a ``pkl`` column is bytes.
"""

from __future__ import annotations

import json
import os

from launcher.data.fields import DTYPES, SIZES
from launcher.errors import DataError, UsageError
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from launcher._data import File, Index, Source

_NUMBERS = frozenset(DTYPES) - {"bfloat16", "bool"}
_SCALARS = {"int": "int64", **{name: name for name in _NUMBERS}}
_LARGEST = 1 << 32  # offsets in a shard have 32 bits


class Column(Record):
    """A column of the shards.

    ``shape``: of one value; None: any length. ``size``: bytes of one value; 0: the sample says. ``shaped``: the array's
    shape is stored before it.
    """

    name: str
    encoding: str
    dtype: str
    shape: tuple[int, ...] | None
    size: int
    shaped: bool = False


class Shard(Record):
    """A shard as ``index.json`` has it: path relative to the channel, bytes, samples, hashes by algorithm.

    Without an index: -1, -1, none.
    """

    path: str
    size: int
    samples: int
    hashes: tuple[tuple[str, str], ...] = ()


def find_shards(root: str, files: Iterable[str], *, sharded: bool = False) -> list[Shard]:
    """The shards among ``files`` (paths relative to ``root``), sorted, as the index files beside them describe them.

    ``sharded``: this host has only a part of the shards (ShardedByS3Key), so those that are missing are no error.

    Raises:
        DataError: an index that can not be read or is not of version 2, a shard that it lists and that is not there
            or only compressed, a shard that it does not list.
    """
    names = set(files)
    found: dict[str, Shard] = {}
    folders = set()
    for name in sorted(names):
        if os.path.basename(name) == "index.json":
            folders.add(os.path.dirname(name))
            for shard in _read_index(os.path.join(root, name), os.path.dirname(name), names, sharded):
                found[shard.path] = shard
    for name in sorted(names):
        if name.endswith((".mds.zstd", ".mds.zst", ".mds.gz", ".mds.br", ".mds.bz2", ".mds.snappy")):
            raw = name.rpartition(".")[0]
            if raw not in names:
                raise _compressed(os.path.join(root, name))
        if name.endswith(".mds") and name not in found:
            if os.path.dirname(name) in folders:
                raise DataError(
                    f"{os.path.join(root, name)}: index.json beside it does not list this shard; remove it, or merge "
                    "the indexes of the data sets in this folder",
                    "mismatch",
                    os.path.join(root, name),
                )
            found[name] = Shard(name, -1, -1)
    return [found[name] for name in sorted(found)]


def _compressed(path: str) -> DataError:
    return DataError(
        f"{path}: a compressed shard: shards are read in place and must not be compressed; decompress them beside "
        "their index (zstd -d *.zstd), or write the data set without compression",
        "mismatch",
        path,
    )


def _read_index(path: str, folder: str, names: set[str], sharded: bool) -> list[Shard]:
    def wrong(text: str) -> DataError:
        return DataError(f"{path}: {text}", "malformed", path)

    try:
        with open(path, "rb") as file:
            content = json.loads(file.read())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", "unreadable", path) from error
    except ValueError as error:
        raise wrong(f"no JSON: {error}; copy it again") from error
    if not isinstance(content, dict) or not isinstance(content.get("shards"), list):
        raise wrong("found no list of shards; this is no index of an MDS data set")
    shards = []
    for number, entry in enumerate(content["shards"]):
        if not isinstance(entry, dict) or entry.get("version") != 2 or entry.get("format") != "mds":
            raise wrong(f"shards[{number}] is not of format mds, version 2; other formats of streaming can not be read")
        raw = entry.get("raw_data")
        basename = raw.get("basename") if isinstance(raw, dict) else None
        samples = _count(entry.get("samples"))
        if not isinstance(basename, str) or basename != os.path.basename(basename) or samples < 0:
            raise wrong(f"shards[{number}] has no file name in raw_data.basename, or no number of samples")
        assert isinstance(raw, dict)
        name = os.path.join(folder, basename)
        if name not in names:
            packed = entry.get("zip_data")
            packed_name = packed.get("basename") if isinstance(packed, dict) else None
            if isinstance(packed_name, str) and os.path.join(folder, packed_name) in names:
                raise _compressed(os.path.join(os.path.dirname(path), packed_name))
            if sharded:
                continue
            missing = os.path.join(os.path.dirname(path), basename)
            raise DataError(f"{missing}: {path} lists this shard, and it is not there", "changed", missing)
        hashes = raw.get("hashes")
        shards.append(
            Shard(
                name,
                _count(raw.get("bytes")),
                samples,
                tuple((str(key), str(value)) for key, value in hashes.items()) if isinstance(hashes, dict) else (),
            )
        )
    return shards


def _count(value: object) -> int:
    """A number of things; -1 where ``value`` is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else -1


def read_columns(file: File) -> tuple[Column, ...]:
    """The columns that the header of a shard describes, in its order.

    Raises:
        DataError: the header is not what it should be.
    """
    from launcher._data import mds_header

    def wrong(text: str) -> DataError:
        return DataError(f"{file.path}: the header of the shard {text}; write the shard again", "malformed", file.path)

    try:
        header = json.loads(mds_header(file))
    except ValueError as error:
        raise wrong(f"is no JSON ({error})") from error
    keys = ("column_names", "column_encodings", "column_sizes")
    names, encodings, sizes = (header.get(key) if isinstance(header, dict) else None for key in keys)
    if not (isinstance(names, list) and isinstance(encodings, list) and isinstance(sizes, list)):
        raise wrong(f"lacks one of {', '.join(keys)}")
    if not len(names) == len(encodings) == len(sizes) == len(set(map(str, names))):
        raise wrong(
            f"has {len(names)} names, {len(encodings)} encodings and {len(sizes)} sizes of columns, or one twice"
        )
    columns = []
    for name, encoding, size in zip(names, encodings, sizes, strict=True):
        if not isinstance(name, str) or not isinstance(encoding, str):
            raise wrong(f"has the column {name!r} with encoding {encoding!r}; both should be texts")
        if size is not None and not 0 < _count(size) < _LARGEST:
            raise wrong(f"gives column {name!r} the size {size!r}")
        columns.append(_column(name, encoding, size or 0, wrong))
    return tuple(columns)


def _column(name: str, encoding: str, size: int, wrong: Any) -> Column:
    kind, _, rest = encoding.partition(":")
    dtype, _, dimensions = rest.partition(":")
    column = None
    if encoding in _SCALARS:
        column = Column(name, encoding, _SCALARS[encoding], (), _bytes_of(_SCALARS[encoding]))
    elif kind == "ndarray" and dtype in _NUMBERS:
        if not dimensions:
            return Column(name, encoding, dtype, None, 0, shaped=True)
        shape = []
        for text in dimensions.split(","):
            if not text.isdecimal() or not 0 < int(text) < _LARGEST:
                raise wrong(f"gives column {name!r} the encoding {encoding!r}, whose shape is none")
            shape.append(int(text))
        total = _bytes_of(dtype)
        for length in shape:
            total *= length
        column = Column(name, encoding, dtype, tuple(shape), total)
    if column is None:
        return Column(name, encoding, "uint8", (size,) if size else None, size)
    if column.size != size:
        raise wrong(f"gives column {name!r} of encoding {encoding!r} {size} bytes; it has {column.size}")
    return column


def _bytes_of(dtype: str) -> int:
    return SIZES[DTYPES.index(dtype)]


def make_source(
    index: Index, files: Sequence[File], shards: Sequence[Shard] = (), *, fields: Sequence[str] | None = None
) -> Source:
    """The records of the shards: a field for each column, or for those named in ``fields``.

    ``index`` is of ``files``, in their order; ``shards``, if given, are what :func:`find_shards` said about them.

    Raises:
        DataError: columns that differ between shards, a shard with another number of samples than the index says.
        UsageError: ``fields`` names a column that is none.
    """
    from launcher._data import mds_source

    columns: tuple[Column, ...] = ()
    for number, file in enumerate(files):
        part = index.part(number)
        if number < len(shards) and shards[number].samples >= 0 and not part.damage:
            wanted, found = shards[number].samples, part.records
            if wanted != found:
                raise DataError(
                    f"{file.path}: the shard has {found} samples, and index.json says {wanted}; write the index again",
                    "mismatch",
                    file.path,
                )
        if file.size == 0:
            continue
        own = read_columns(file)
        if columns and own != columns:
            raise DataError(
                f"{file.path}: the columns are {_names(own)}, those of {files[0].path} are {_names(columns)}; all "
                "shards must have the same",
                "mismatch",
                file.path,
            )
        columns = own
    known = [column.name for column in columns]
    for name in fields or ():
        if name not in known:
            raise UsageError(f"fields: {name!r} is no column; the columns are {', '.join(known)}")
    return mds_source(
        index,
        [
            (
                column.name,
                DTYPES.index(column.dtype),
                None if column.shape is None else list(column.shape),
                column.size,
                column.shaped,
                fields is None or column.name in fields,
            )
            for column in columns
        ],
    )


def _names(columns: Sequence[Column]) -> str:
    return ", ".join(f"{column.name} ({column.encoding})" for column in columns)


def verify(root: str, shards: Sequence[Shard]) -> tuple[list[DataError], list[str]]:
    """Compares sizes and hashes of the shards with the index: what is wrong, and which checks could not be made.

    Reads all of each shard that has hashes.
    """
    import hashlib

    errors = []
    unknown: dict[str, int] = {}
    for shard in shards:
        path = os.path.join(root, shard.path)
        try:
            size = os.stat(path).st_size
            if 0 <= shard.size != size:
                errors.append(
                    DataError(f"{path}: {size} bytes, and index.json says {shard.size}", "truncated", path, size)
                )
                continue
            for algorithm, wanted in shard.hashes:
                if algorithm not in hashlib.algorithms_available:
                    unknown[algorithm] = unknown.get(algorithm, 0) + 1
                    continue
                found = _hash(path, algorithm)
                if found != wanted:
                    errors.append(
                        DataError(
                            f"{path}: {algorithm} is {found}, and index.json says {wanted}; copy the shard again",
                            "malformed",
                            path,
                        )
                    )
        except OSError as error:
            errors.append(DataError(f"{path}: {error.strerror}", "unreadable", path))
    notes = [
        f"{root}: {algorithm} of {count} shards was not compared: Python's hashlib does not have it"
        for algorithm, count in unknown.items()
    ]
    return errors, notes


def _hash(path: str, algorithm: str) -> str:
    import hashlib

    state = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb", buffering=0) as file:
        memory = bytearray(1 << 20)
        while count := file.readinto(memory):
            state.update(memoryview(memory)[:count])
    return state.hexdigest()
