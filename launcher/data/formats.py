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
    from collections.abc import Callable

    from launcher.data.channel import Place

    Entry = tuple[str, int, int]

_FIRST_BYTES = 4096
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


def detect(wanted: str, place: Place, entries: tuple[Entry, ...], root: str) -> str:
    """The name of the format of a channel's files.

    What is known goes before what is seen: ``wanted`` unless it is ``auto``, the channel's content type, the suffix
    that all files have, their first bytes. Where two formats are left it is an error, not a guess.

    Raises:
        UsageError: no such format; none fits, or more than one.
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
    first, start = _first_bytes(fits, entries, root)
    like = [name for name in fits or FORMATS if (look := FORMATS[name].looks_like) is not None and look(start)]
    if "recordio-protobuf" in like:
        like.remove("recordio")  # which it is as well
    if len(like) == 1:
        return like[0]
    raise UsageError(_untold(place, told, first, like or fits))


def _has_suffixes(format: Format, entries: tuple[Entry, ...]) -> bool:
    data = [path for path, _, _ in entries if not format.is_beside(path)]
    return bool(data) and bool(format.suffixes) and all(path.lower().endswith(format.suffixes) for path in data)


def _first_bytes(fits: list[str], entries: tuple[Entry, ...], root: str) -> tuple[str, bytes]:
    """The first file that is not empty, and how it begins."""
    for path, size, _ in entries:
        if size and not (fits and FORMATS[fits[0]].is_beside(path)):
            whole = os.path.join(root, path)
            try:
                with open(whole, "rb", buffering=0) as file:
                    return whole, file.read(_FIRST_BYTES)
            except OSError as error:
                raise DataError(f"{whole}: can not be read: {error.strerror}", "unreadable", whole) from error
    return root, b""


def _untold(place: Place, told: str, first: str, like: list[str]) -> str:
    if first.endswith(_COMPRESSED):
        return f"{first}: the file is compressed: records can not be found in it; decompress the channel's files"
    what = f"the content type is {told!r}, " if told else ""
    if like:
        return f"{place.path}: {what}the format may be {' or '.join(like)}; say which one by format="
    return (
        f"{place.path}: {what}{first} is of no format that is known; say which one by format=, of {', '.join(FORMATS)}"
    )
