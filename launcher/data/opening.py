"""Opens the files of a channel in each format: where the records are, and a source that reads them."""

from __future__ import annotations

import itertools
import os

from launcher import _data
from launcher.data.formats import FORMATS, no_records
from launcher.data.indexing import KEPT_FROM_BYTES, IndexRequest, index_files, say
from launcher.errors import DataError, UsageError
from launcher.record import Record, replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from launcher.data.channel import Place
    from launcher.data.text import Csv, JsonLines, Libsvm, Lines

    Entry = tuple[str, int, int]
    Scan = Callable[[_data.File], _data.FileIndex]


_JPEG_DEFAULTS = {"size": (), "channels": 3, "crop": False}


class Request(Record):
    """What is to be opened.

    Attributes:
        place: the channel.
        root: the folder that the paths of ``entries`` are relative to.
        entries: (path, size in bytes, time of change in ns) of each file that may hold records.
        access: ``mapped`` or ``read``.
        fields: what the user wants of each record; None: all.
        skip: whether damaged records are left out.
        lenient: whether a record that can not be read is left to whoever reads it.
        index: see :class:`launcher.data.indexing.IndexRequest`.
        options: of the format.
    """

    place: Place
    root: str
    entries: tuple[Entry, ...]
    access: str
    fields: Any
    skip: bool
    index: str
    options: Mapping[str, Any]
    lenient: bool = False

    def option(self, name: str, default: Any = None) -> Any:
        """The value of an option of the format, or ``default``."""
        return self.options.get(name, default)

    def names(self) -> list[str] | None:
        """The fields that are wanted, by name; None: all.

        Raises:
            UsageError: ``fields`` is something else.
        """
        if self.fields is None:
            return None
        names = [self.fields] if isinstance(self.fields, str) else list(self.fields)
        if not names or not all(isinstance(name, str) for name in names):
            raise UsageError(f"fields is {self.fields!r}; expected names of fields")
        return names


class Made(Record):
    """An opened channel: its source, its files and the records of each, what was left out of them, and its index."""

    source: _data.Source
    entries: tuple[Entry, ...]
    records: tuple[int, ...]
    damage: tuple[tuple[str, list[tuple[int, int, str]]], ...] = ()
    index: _data.Index | None = None
    index_key: str = ""


def open_format(name: str, request: Request) -> Made:
    """The files of ``request`` in the format ``name``.

    Raises:
        UsageError: an option that the format does not have, or a value that it can not have.
        DataError: damaged or unreadable files.
    """
    format = FORMATS[name]
    for option in request.options:
        if option not in format.options:
            known = ", ".join(format.options) or "none"
            raise UsageError(f"format {name} has no option {option!r}; its options: {known}")
    entries = tuple(entry for entry in request.entries if not format.is_beside(entry[0]))
    if not entries and name != "mds":  # whose index tells what is missing
        raise DataError(
            f"{request.place.path}: no file holds records of format {name}", "malformed", request.place.path
        )
    options = {**_parameters(request.place.content_type, format.parameters), **request.options}
    every = request.entries if name == "mds" else entries  # mds reads what is beside its shards
    try:
        wanted = replace(request, entries=every, options=options)
        return _decoded(wanted, _OPENERS[name](wanted), "jpeg" in format.options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"format {name}: {error}") from error


def _decoded(request: Request, made: Made, named: bool) -> Made:
    """``made`` with the field that option ``jpeg`` names decoded; ``named``: the format has this option."""
    field = request.option("jpeg")
    if field is None:
        useless = [name for name in _JPEG_DEFAULTS if named and name in request.options]
        if useless:
            raise UsageError(f"option {useless[0]} is for JPEG images; say by jpeg= which field has them")
        return made
    return replace(made, source=_jpeg(request, made.source, str(field)))


def _jpeg(request: Request, source: _data.Source, field: str) -> _data.Source:
    from launcher.data.images import decode_jpeg

    size, channels, crop = (request.option(name, default) for name, default in _JPEG_DEFAULTS.items())
    return decode_jpeg(source, field, size, channels=channels, crop=bool(crop))


def _parameters(content_type: str, known: Sequence[str]) -> dict[str, str]:
    """Those of ``text/csv; label_size=1`` that the format knows."""
    result = {}
    for parameter in content_type.split(";")[1:]:
        name, _, value = parameter.partition("=")
        if name.strip().lower() in known:
            result[name.strip().lower()] = value.strip().strip('"')
    return result


def open_files(request: Request) -> tuple[_data.File, ...]:
    """The files of ``request``.

    Raises:
        DataError: one is not what it was a moment ago, when the folder was listed.
    """
    files = []
    for path, size, modified_ns in request.entries:
        whole = os.path.join(request.root, path)
        file = _data.File(whole, request.access)
        if (file.size, file.modified_ns) != (size, modified_ns):
            raise DataError(
                f"{whole}: the file is being written to: it had {size} bytes a moment ago and has {file.size}; "
                "start when the data is complete",
                "changed",
                whole,
            )
        files.append(file)
    return tuple(files)


def _indexed(request: Request, key: str, scan: Scan, files: tuple[_data.File, ...] = ()) -> _data.Index:
    files = files or open_files(request)

    def told(file: _data.File) -> _data.FileIndex:
        if request.access == "read" and file.size >= KEPT_FROM_BYTES:
            say(
                f"{file.path}: finding the records reads all of the file over FUSE, as there is no index of it; "
                "`python -m launcher data index` makes one beforehand, which index=PATH takes"
            )
        return scan(file)

    of = IndexRequest(request.place.path, request.entries, files, _key(request, key), request.index)
    index = _data.Index(files, index_files(of, told))
    parts = range(len(files))
    if index.records == 0 and not any(index.part(number).damage for number in parts):
        raise no_records(request.place, request.root, request.entries)
    return index


def _key(request: Request, key: str) -> str:
    return f"{key} skip={request.skip}"


def _made(request: Request, key: str, index: _data.Index, source: _data.Source) -> Made:
    first = index.first
    return Made(
        source=source,
        entries=request.entries,
        records=tuple(end - begin for begin, end in itertools.pairwise(first)),
        damage=tuple(
            (path, damage)
            for number, (path, _, _) in enumerate(request.entries)
            if (damage := index.part(number).damage)
        ),
        index=index,
        index_key=_key(request, key),
    )


def _all_or(request: Request, source: _data.Source) -> _data.Source:
    """``source``, when the fields that are wanted are all that it has."""
    names, known = request.names(), [field[0] for field in source.fields]
    if names is not None and names != known:
        raise UsageError(f"fields is {names}; this format has the fields {known}, which come together")
    return source


def _fixed(request: Request) -> Made:
    from launcher.data.fixed import layout_of, open_fixed

    if not isinstance(request.fields, dict):
        raise UsageError(
            "format fixed needs fields, for the files do not say what is in them: "
            "fields={'values': ('float32', 28), 'label': 'int64'}"
        )
    layout = layout_of(
        request.fields, stride=request.option("stride", 0), header_bytes=request.option("header_bytes", 0)
    )
    source = open_fixed(open_files(request), [layout] * len(request.entries))
    records = tuple((size - layout.header_bytes) // layout.stride for _, size, _ in request.entries)
    return Made(source, request.entries, records)


def _npy(request: Request) -> Made:
    from launcher.data.fixed import npy_layout, open_fixed

    files = open_files(request)
    layouts = [npy_layout(file) for file in files]
    source = open_fixed(files, layouts, request.names())
    return Made(source, request.entries, tuple(layout.records for layout in layouts))


def _recordio(request: Request) -> Made:
    dialect, image_header = str(request.option("dialect", "auto")), bool(request.option("image_header", False))
    key, index = _recordio_index(request, dialect)
    return _made(request, key, index, _all_or(request, _data.recordio_source(index, dialect, image_header)))


def _record_proto(request: Request) -> Made:
    dialect = str(request.option("dialect", "auto"))
    key, index = _recordio_index(request, dialect)
    source = _data.record_proto_source(index, dialect, request.option("schema"), request.names())
    return _made(request, key, index, source)


def _recordio_index(request: Request, dialect: str) -> tuple[str, _data.Index]:
    key = f"recordio dialect={dialect}"
    return key, _indexed(request, key, lambda file: _data.scan_recordio(file, dialect, request.skip))


def _tfrecord(request: Request) -> Made:
    index = _indexed(request, "tfrecord", lambda file: _data.scan_tfrecord(file, request.skip))
    check_sums, schema = bool(request.option("check_sums", True)), request.option("schema")
    if request.option("example", schema is not None):
        source = _data.example_source(index, check_sums, schema, request.names())
        return _made(request, "tfrecord", index, source)
    source = _data.tfrecord_source(index, check_sums)
    return _made(request, "tfrecord", index, _all_or(request, source))


def _tar(request: Request) -> Made:
    index = _indexed(request, "tar", lambda file: _data.scan_tar(file, request.skip))
    names = request.names()
    integers = list(request.option("integers", ()))
    if names is None:
        names = [*_data.tar_extensions(index), "key"]
    unknown = [name for name in integers if name not in names]
    if unknown:
        raise UsageError(f"integers names {unknown[0]!r}, which is no field; the fields are {', '.join(names)}")
    exact = bool(request.option("exact", request.fields is None))
    return _made(request, "tar", index, _data.tar_source(index, [(name, name in integers) for name in names], exact))


def _mds(request: Request) -> Made:
    from launcher.data.mds import find_shards, make_source

    by_path = {entry[0]: entry for entry in request.entries}
    sharded = request.place.distribution == "ShardedByS3Key"
    shards = find_shards(request.root, by_path, sharded=sharded)
    only = replace(request, entries=tuple(by_path[shard.path] for shard in shards))
    files = open_files(only)
    index = _indexed(only, "mds", lambda file: _data.scan_mds(file, request.skip), files)
    return _made(only, "mds", index, make_source(index, files, shards, fields=request.names()))


def _text(request: Request, text: Csv | Libsvm | JsonLines | Lines) -> Made:
    key = f"{type(text).__name__} {text.key()}"
    index = _indexed(request, key, lambda file: text.scan(file, request.skip))
    if index.records == 0:  # all of it is damage that is left out: what a record has can not be told
        raise _nothing_left(request, index)
    return _made(request, key, index, text.source(index, request.fields))


def _nothing_left(request: Request, index: _data.Index) -> DataError:
    for number, (name, _, _) in enumerate(request.entries):
        for offset, _, text in index.part(number).damage:
            path = os.path.join(request.root, name)
            text = text if path in text else f"{path}: byte {offset}: {text}"
            return DataError(f"{text}; no record is left", "malformed", path, offset)
    return no_records(request.place, request.root, request.entries)


def _csv(request: Request) -> Made:
    from launcher.data.text import Csv

    tabs = request.place.content_type.startswith("text/tab") or all(
        path.endswith(".tsv") for path, _, _ in request.entries
    )
    options = {"delimiter": "\t", **request.options} if tabs else request.options
    csv = Csv.of(options)
    made = _text(replace(request, options=options), csv)
    if made.index is not None:
        csv.check_first(made.source, made.index, lenient=request.lenient)
    return made


def _libsvm(request: Request) -> Made:
    from launcher.data.text import Libsvm

    return _text(request, Libsvm.of(request.options))


def _json_lines(request: Request) -> Made:
    from launcher.data.text import JsonLines

    return _text(request, JsonLines.of(request.options))


def _lines(request: Request) -> Made:
    from launcher.data.text import Lines

    return _text(request, Lines.of(request.options))


def _parquet(request: Request) -> Made:
    from launcher.data.parquet import make_source

    decoded = make_source(
        request.root,
        [path for path, _, _ in request.entries],
        fields=request.names(),
        fill=request.option("fill"),
        cache=request.option("cache"),
        skip=request.skip,
    )
    return Made(decoded.source, request.entries, decoded.records, decoded.damage)


def _images(request: Request) -> Made:
    from launcher.data.images import check_decodable, find_images, make_source

    folder = find_images(request.root, request.entries)
    if not folder.files:
        raise UsageError(
            f"{request.place.path}: no file has the suffix of an image; format='files' reads them as they are"
        )
    if folder.others:
        count = len(folder.others)
        what = "1 file is no image by its suffix" if count == 1 else f"{count} files are no images by their suffixes"
        say(f"{request.place.path}: {what}: {folder.others[0]}{', ...' * (count > 1)}")
    source = make_source(request.root, folder)
    if request.option("size") is not None:
        check_decodable(request.root, folder)
        source = _jpeg(request, source, "data")
    return Made(_all_or(request, source), folder.files, (1,) * len(folder.files))


def _files(request: Request) -> Made:
    source = _data.files_source(request.root, request.entries)
    return Made(_all_or(request, source), request.entries, (1,) * len(request.entries))


_OPENERS: dict[str, Callable[[Request], Made]] = {
    "fixed": _fixed,
    "npy": _npy,
    "recordio": _recordio,
    "recordio-protobuf": _record_proto,
    "tfrecord": _tfrecord,
    "csv": _csv,
    "libsvm": _libsvm,
    "jsonlines": _json_lines,
    "lines": _lines,
    "tar": _tar,
    "mds": _mds,
    "parquet": _parquet,
    "images": _images,
    "files": _files,
}
