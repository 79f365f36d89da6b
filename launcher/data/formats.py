"""The formats of record files: what each is called, and how it is recognised."""

from __future__ import annotations

import os

from launcher.data.recognition import (
    like_csv,
    like_image,
    like_json_lines,
    like_libsvm,
    like_npy,
    like_parquet,
    like_record_proto,
    like_recordio,
    like_tar,
    like_tfrecord,
)
from launcher.errors import DataError, UsageError
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from launcher.data.channel import Place

    Entry = tuple[str, int, int]

_FIRST_BYTES = 4096
_MDS_KEY = b'"shards"'
_COMPRESSED = (".gz", ".zst", ".zstd", ".bz2", ".xz", ".lz4", ".snappy", ".br")


class Format(Record):
    """One format.

    Attributes:
        name, help: of it.
        content_types: of channels; one that ends with ``*`` stands for all that begin so.
        suffixes: of its files.
        beside: names, or suffixes, of files that lie between its files and hold no records.
        looks_like: whether a file that begins with these bytes is of the format; None: no telling.
        options: that :func:`launcher.data.catalogue.open_source` takes for it; those in ``parameters`` may also be
            parameters of the content type, as in ``text/csv;label_size=1``.
    """

    name: str
    help: str
    content_types: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    looks_like: Callable[[bytes], bool] | None = None
    options: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()

    def has_type(self, content_type: str) -> bool:
        """Whether a channel of this type (lower case, without parameters) has this format."""
        return any(
            content_type.startswith(known[:-1]) if known.endswith("*") else content_type == known
            for known in self.content_types
        )

    def is_beside(self, path: str) -> bool:
        """Whether a file holds no records."""
        return path.lower().endswith(self.beside) or os.path.basename(path) in self.beside


_RECORDIO_OPTIONS = ("dialect",)
_JPEG_OPTIONS = ("jpeg", "size", "channels", "crop")
_TABLE = (
    Format(
        "fixed",
        "raw binary records of the same size: fields={'name': (dtype, shape)} says what is in them",
        suffixes=(".bin", ".raw", ".dat"),
        options=("stride", "header_bytes"),
    ),
    Format("npy", "NumPy arrays, a record for each entry of the first dimension", (), (".npy",), (), like_npy),
    Format(
        "recordio",
        "RecordIO frames around records of any content",
        ("application/x-recordio", "recordio"),
        (".rec", ".recordio"),
        (".idx", ".lst"),
        like_recordio,
        (*_RECORDIO_OPTIONS, "image_header", *_JPEG_OPTIONS),
    ),
    Format(
        "recordio-protobuf",
        "RecordIO frames around Record messages (SageMaker's built-in algorithms)",
        ("application/x-recordio-protobuf", "recordio-protobuf"),
        (".pbr", ".pr", ".rec", ".recordio", ".recordio-protobuf"),
        (".idx", ".lst"),
        like_record_proto,
        (*_RECORDIO_OPTIONS, "schema"),
    ),
    Format(
        "tfrecord",
        "TensorFlow's records",
        ("application/x-tfrecord", "tfrecord"),
        (".tfrecord", ".tfrecords"),
        (),
        like_tfrecord,
        ("check_sums", "example", "schema", *_JPEG_OPTIONS),
    ),
    Format(
        "csv",
        "lines of comma-separated numbers and texts",
        ("text/csv", "csv", "text/tab-separated-values"),
        (".csv", ".tsv"),
        (),
        like_csv,
        ("header", "delimiter", "quote", "label_size", "dtype"),
        ("label_size", "header", "delimiter"),
    ),
    Format(
        "libsvm",
        "lines of label and index:value",
        ("text/libsvm", "text/x-libsvm", "libsvm"),
        (".libsvm", ".svm", ".svmlight"),
        (),
        like_libsvm,
        ("base", "columns", "dtype", "qid"),
    ),
    Format(
        "jsonlines",
        "a JSON object a line",
        ("application/jsonlines", "application/x-jsonlines", "application/jsonl", "jsonlines"),
        (".jsonl", ".jsonlines", ".ndjson"),
        (),
        like_json_lines,
    ),
    Format("lines", "lines of text, as they are", ("text/plain",), (".txt",)),
    Format(
        "tar",
        "tar archives of samples, as WebDataset has them",
        ("application/x-tar",),
        (".tar",),
        (),
        like_tar,
        ("integers", "exact", *_JPEG_OPTIONS),
    ),
    # Compressed shards are told apart here so that they can be refused with what to do about them.
    Format("mds", "shards of MosaicML streaming", (), (".mds", ".mds.zstd"), ("index.json",), None, _JPEG_OPTIONS),
    Format(
        "parquet",
        "Parquet tables (needs pyarrow)",
        ("application/x-parquet", "application/vnd.apache.parquet", "parquet"),
        (".parquet", ".pq"),
        (),
        like_parquet,
        ("fill", "cache", *_JPEG_OPTIONS),
    ),
    Format(
        "images",
        "an image a file, in folders by class",
        ("image/*", "application/x-image"),
        (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp"),
        (".lst", ".json", ".txt"),
        like_image,
        ("size", "channels", "crop"),
    ),
    Format("files", "a record a file, of any content"),
)
FORMATS: dict[str, Format] = {format.name: format for format in _TABLE}


def no_records(place: Place, root: str, entries: tuple[Entry, ...]) -> DataError:
    """The error for files without a record. One that is empty among others is fine: this is for all of a channel."""
    count = len(entries)
    path = os.path.join(root, entries[0][0]) if count == 1 else place.path
    what = ("the file is" if count == 1 else f"its {count} files are") if count else "its index lists no files, it is"
    if any(size for _, size, _ in entries):
        what = "the file has" if count == 1 else f"its {count} files have"
        return DataError(f"{path}: {what} no records; a channel has one at least", "malformed", path)
    return DataError(f"{path}: {what} empty; a channel has one record at least", "malformed", path)


def detect(wanted: str, place: Place, entries: tuple[Entry, ...], root: str) -> str:
    """The name of the format of a channel's files.

    What is known goes before what is seen: ``wanted`` unless it is ``auto``, the channel's content type, the suffix
    that all files have, their first bytes. Where two formats are left it is an error, not a guess.

    Raises:
        UsageError: no such format; none fits, or more than one; the suffixes are those of different formats.
        DataError: the files are empty, or do not begin as those of a format that their suffix says begin.
    """
    if wanted != "auto":
        if wanted not in FORMATS:
            raise UsageError(f"format {wanted!r} is not known; expected auto, {', '.join(FORMATS)}")
        return wanted
    told = place.content_type.partition(";")[0].strip().lower()
    by_type = [name for name, format in FORMATS.items() if told and format.has_type(told)]
    if len(by_type) == 1:
        return by_type[0]
    fits = [name for name, format in FORMATS.items() if _has_suffixes(format, entries)]
    if len(fits) == 1:
        return fits[0]
    if not fits:
        _check_alike(place, entries)
    first, start, like = "", b"", []
    for path, begin in _beginnings(fits, entries, root):
        first, start = first or path, start or begin
        like = [name for name in fits or FORMATS if (look := FORMATS[name].looks_like) is not None and look(begin)]
        if like or not fits:  # else the file is damaged: another one tells which of two formats it is
            break
    if not start:
        raise no_records(place, root, entries)
    if _MDS_KEY in start and all(FORMATS["mds"].is_beside(path) for path, _, _ in entries):
        return "mds"  # whose shards are missing
    if "recordio-protobuf" in like:
        like.remove("recordio")  # which it is as well
    if len(like) == 1:
        return like[0]
    if fits and not like:
        raise DataError(
            f"{first}: byte 0: begins with {start[:8]!r}, as no file of format {' or '.join(fits)} does; it is "
            "damaged, or of another format, which format= would say",
            "malformed",
            first,
            0,
        )
    raise UsageError(_untold(place, told, first, like or fits))


def _check_alike(place: Place, entries: tuple[Entry, ...]) -> None:
    """Raises UsageError where the suffixes of two files are those of different formats."""
    seen: dict[str, tuple[str, list[str]]] = {}  # by suffix: a file, and the formats that have it
    for path, _, _ in entries:
        suffix = path.lower().rpartition(".")[2]
        if suffix in seen:
            continue
        own = [name for name, format in FORMATS.items() if format.suffixes and path.lower().endswith(format.suffixes)]
        seen[suffix] = path, own
        for other, theirs in seen.values():
            beside = any(FORMATS[name].is_beside(path) for name in theirs)
            beside = beside or any(FORMATS[name].is_beside(other) for name in own)
            if own and theirs and not beside and not set(own) & set(theirs):
                raise UsageError(
                    f"{place.path}: {other} is of format {' or '.join(theirs)} by its suffix, {path} of "
                    f"{' or '.join(own)}; put the files of each format into a folder of their own, or say by format= "
                    "what all of them are"
                )


def _has_suffixes(format: Format, entries: tuple[Entry, ...]) -> bool:
    data = [path for path, _, _ in entries if not format.is_beside(path)]
    return bool(data) and bool(format.suffixes) and all(path.lower().endswith(format.suffixes) for path in data)


def _beginnings(fits: list[str], entries: tuple[Entry, ...], root: str) -> Iterator[tuple[str, bytes]]:
    """The files that are not empty, and how they begin."""
    for path, size, _ in entries:
        if size and not (fits and FORMATS[fits[0]].is_beside(path)):
            whole = os.path.join(root, path)
            try:
                with open(whole, "rb", buffering=0) as file:
                    yield whole, file.read(_FIRST_BYTES)
            except OSError as error:
                raise DataError(f"{whole}: can not be read: {error.strerror}", "unreadable", whole) from error


def _untold(place: Place, told: str, first: str, like: list[str]) -> str:
    if first.endswith(_COMPRESSED):
        return f"{first}: the file is compressed: records can not be found in it; decompress the channel's files"
    what = f"the content type is {told!r}, " if told else ""
    if like:
        return f"{place.path}: {what}the format may be {' or '.join(like)}; say which one by format="
    return (
        f"{place.path}: {what}{first} is of no format that is known; say which one by format=, of {', '.join(FORMATS)}"
    )
