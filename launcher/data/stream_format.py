"""The formats of streams: how records are found in them, and what takes them apart."""

from __future__ import annotations

import os

from launcher import _data
from launcher.data.channel import Place
from launcher.data.fields import KINDS
from launcher.data.fixed import Layout, layout_of
from launcher.data.formats import FORMATS
from launcher.data.opening import Request, open_format
from launcher.errors import DataError, UsageError
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

# quote, delimiter, comment, keep blank lines, header: what native/data/lines.h has as LineRules.
Text = tuple[str, str, str, bool, bool]
_NO_TEXT: Text = ("", "", "", False, False)


class Framing(Record):
    """How records are found in the stream: ``recordio``, ``tfrecord``, ``fixed`` or ``lines``.

    ``unit``: records of a sample (recordio), or bytes of a record (fixed).
    """

    kind: str
    unit: int = 1
    text: Text = _NO_TEXT


def framing_of(format: str, options: Mapping[str, Any], fields: Any) -> Framing:
    """How the records of a format are found in a stream.

    Raises:
        UsageError: they can not be.
    """
    if format in ("recordio", "recordio-protobuf"):
        return Framing("recordio")
    if format == "tfrecord":
        return Framing("tfrecord")
    if format == "fixed":
        return Framing("fixed", _fixed_layout(options, fields).stride)
    if format == "csv":
        quote, delimiter = str(options.get("quote", '"')), str(options.get("delimiter", ","))
        header = options.get("header", False) in (True, "true", "True", "present", "1")
        return Framing("lines", text=(quote, delimiter, "", False, header))
    if format == "libsvm":
        return Framing("lines", text=("", "", "#", False, False))
    if format in ("jsonlines", "lines"):
        return Framing("lines", text=("", "", "", format == "lines", False))
    raise UsageError(
        f"format {format} can not be read from a pipe, where nothing tells the end of an object; use File or FastFile "
        "mode, or set RecordWrapperType to RecordIO and read the objects by format='recordio'"
    )


def _fixed_layout(options: Mapping[str, Any], fields: Any) -> Layout:
    if not isinstance(fields, dict):
        raise UsageError("format fixed needs fields: fields={'values': ('float32', 28), 'label': 'int64'}")
    return layout_of(fields, stride=options.get("stride", 0), header_bytes=0)


def format_of(place: Place, wanted: str) -> str:
    """The format of a channel's stream, by its content type where ``wanted`` is ``auto``.

    Raises:
        UsageError: that does not tell it, or its records are whole objects.
    """
    format = _told(place, wanted)
    if place.record_wrapper == "RecordIO" and not format.startswith("recordio"):
        raise UsageError(
            f"channel {place.name!r} has RecordWrapperType RecordIO: each record is a whole object; read them by "
            f"format='recordio', or set RecordWrapperType to None to read the records of {format}"
        )
    return format


def _told(place: Place, wanted: str) -> str:
    if wanted != "auto":
        if wanted not in FORMATS:
            raise UsageError(f"format {wanted!r} is not known; expected auto, {', '.join(FORMATS)}")
        return wanted
    if place.record_wrapper == "RecordIO":
        return "recordio"
    told = place.content_type.partition(";")[0].strip().lower()
    fits = [name for name, format in FORMATS.items() if told and format.has_type(told)]
    if len(fits) != 1:
        raise UsageError(
            f"channel {place.name!r}: the content type {told!r} does not tell the format, and a stream can not be "
            f"looked at before it is read; pass format=, one of {', '.join(FORMATS)}"
        )
    return fits[0]


def with_parameters(place: Place, options: Mapping[str, Any]) -> dict[str, Any]:
    """The format's options, those of the channel's content type (``text/csv; header=true``) among them."""
    found: dict[str, Any] = {}
    for parameter in place.content_type.split(";")[1:]:
        name, _, value = parameter.partition("=")
        found[name.strip().lower()] = value.strip().strip('"')
    return {**found, **options}


def decoder_of(
    format: str, place: Place, fields: Any, options: Mapping[str, Any], sample: bytes, file: str
) -> _data.StreamDecoder:
    """What takes the records of a stream apart.

    Args:
        sample: its first record: it is looked at as the first record of a file would be.
        file: the stream's path, for messages.

    Raises:
        DataError, UsageError: as for files.
    """
    if format == "fixed":
        layout = _fixed_layout(with_parameters(place, options), fields)
        known = [(field.name, KINDS.index("fixed"), field.dtype, field.shape) for field in layout.fields]
        return _data.fixed_decoder(known, [field.offset for field in layout.fields], layout.stride)
    descriptor = os.memfd_create("launcher-sample")
    try:
        with open(descriptor, "wb", closefd=False) as whole:
            whole.write(sample)
        path = f"/proc/self/fd/{descriptor}"
        request = Request(
            place=Place(name=place.name, path=path, content_type=place.content_type),
            root=os.path.dirname(path),
            entries=((os.path.basename(path), len(sample), os.fstat(descriptor).st_mtime_ns),),
            access="mapped",
            fields=fields,
            skip=False,
            index="off",
            options=options,
            lenient=True,
        )
        try:
            return _data.stream_decoder(open_format(format, request).source)
        except DataError as error:
            text = str(error).replace(path, file)
            raise DataError(text, error.problem, file, error.offset, error.record) from None
    finally:
        os.close(descriptor)
