"""Request bodies as Python values, and predictions as response bodies, by media type.

Nothing here runs code that a body brings, and nothing takes much more memory than a body has bytes, whatever its
headers claim. What a body becomes does not hang on how many rows it has: CSV always gives two dimensions.
"""

from __future__ import annotations

import csv
import io
import json
import re
from itertools import chain

from launcher.serving.array_codecs import (
    decode_npy,
    decode_npz,
    decode_records,
    encode_npy,
    encode_npz,
    encode_records,
)
from launcher.serving.media import MediaType
from launcher.serving.values import (
    MOST_DIMENSIONS,
    MalformedBody,
    NotEncodable,
    UnsupportedMediaType,
    array_of,
    has_numpy,
    is_array_like,
    type_name,
    utf8,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Body = bytes | bytearray | memoryview


JSON = "application/json"
CSV = "text/csv"
JSON_LINES = "application/jsonlines"
NPY = "application/x-npy"
NPZ = "application/x-npz"
TEXT = "text/plain"
RECORDS = "application/x-recordio-protobuf"

_JSON_LINES_ALSO = ("application/x-jsonlines", "application/jsonl", "application/x-ndjson")
DECODED: tuple[str, ...] = (JSON, CSV, JSON_LINES, NPY, NPZ, TEXT, RECORDS, *_JSON_LINES_ALSO)
"""Media types that :func:`decode` knows, besides any ``application/*+json``; aliases last."""
ENCODED: tuple[str, ...] = DECODED
"""Media types that :func:`encode` knows, the preferred one first; aliases last."""

# Names of charsets go into Python's table of codecs, which holds much that is none and imports what it is asked for.
_CHARSETS = frozenset(
    (
        *("utf-8", "utf8", "utf-16", "utf-16le", "utf-16be", "utf-32", "utf-32le", "utf-32be", "us-ascii", "ascii"),
        *("latin1", "koi8-r", "koi8-u", "shift_jis", "euc-jp", "iso-2022-jp", "gb2312", "gbk", "gb18030", "big5"),
        *("euc-kr", *(f"iso-8859-{part}" for part in range(1, 17) if part != 12)),
        *(f"windows-125{page}" for page in range(9)),
    )
)
_MOST_TEXT_TIMES = 4  # that an array of texts may have more characters than the texts
_SMALL_CHARACTERS = 1 << 20  # of an array of texts, which need no saving
_LISTS: set[type] = {list}
_NUMBERS: set[type] = {int, float}
_BOOLS: set[type] = {bool}
_ENCODED_BY_NUMPY = frozenset((NPY, NPZ, RECORDS))
_DECODED_BY_NUMPY = _ENCODED_BY_NUMPY | {CSV}


def decode(body: Body, content_type: MediaType) -> object:
    """The value that a request's body stands for.

    - JSON: a number, a bool, or a (nested) list of them in which all lists of a depth have the same length becomes an
      array, of int64, float64 or bool. Anything else is what Python's parser gives: objects, texts, null, lists that
      are ragged or have other values, whole numbers that int64 does not hold. ``[]`` is an array of no float64.
      ``NaN`` and ``Infinity``, which are not JSON, are read as Python and NumPy write them. Where NumPy is not
      installed, all is what Python's parser gives.
    - CSV: an array of rows x columns, no header row: of int64 where all cells are whole numbers, of float64 where all
      are numbers or empty (nan), else of texts as they are (str; objects where str would waste memory).
    - JSON Lines: the values of the lines as if they were the elements of a JSON list.
    - NPY: an array. NPZ: a dict of arrays; of scipy.sparse.save_npz(), the sparse matrix.
    - Plain text: str.
    - RecordIO-protobuf: the tensor called "values" where there is nothing else, else a dict of the tensors, labels with
      the prefix ``label_``. A tensor is an array of records x its shape; where it has keys a SciPy CSR matrix
      (:class:`launcher.data.Sparse` without SciPy, or of several dimensions); bytes: :class:`launcher.data.Ragged`.

    Raises:
        UnsupportedMediaType: the type, its charset or what it needs (NumPy; for sparse matrices SciPy) is not there.
        MalformedBody: the body is damaged, or of another type.
    """
    decoder = _DECODERS.get(content_type.essence)
    if decoder is None:
        if not (content_type.essence.startswith("application/") and content_type.essence.endswith("+json")):
            raise UnsupportedMediaType(
                f"content type {content_type.essence} is not supported; supported: {', '.join(DECODED)}; "
                "an input_fn can read others"
            )
        decoder = _decode_json  # RFC 6839, 3.1
    if content_type.essence in _DECODED_BY_NUMPY and not has_numpy():
        raise UnsupportedMediaType(f"content type {content_type.essence} needs NumPy, which the server does not have")
    return decoder(body, content_type)


def encode(value: object, essence: str) -> bytes:
    """``value`` as the media type ``essence``.

    ``value``: arrays and scalars of NumPy, torch (on any device) and pandas, and Python's own values. ``bytes`` are
    taken for an answer that is complete, whatever the type.

    - JSON: numbers that are not finite become null, since JSON has none.
    - CSV: a value a line, or of two dimensions a row a line; floats with the digits that are needed, nan as ``nan``.
    - JSON Lines: a line for each element of the first dimension; a dict, a text or a scalar is one line.
    - NPZ: a dict of arrays; one array is called ``arr_0``, as NumPy does.
    - Plain text: a text, a scalar, or a line for each of several texts.
    - RecordIO-protobuf: a record a row, as SageMaker's algorithms answer: the label "score", float32 (whole numbers:
      int32). A dict gives several labels, by name, and keeps float64.

    Raises:
        UnsupportedMediaType: the type is not among :data:`ENCODED`, or needs NumPy, which is not installed.
        NotEncodable: the type can not hold this value.
    """
    if isinstance(value, bytes):
        return value
    encoder = _ENCODERS.get(essence)
    if encoder is None:
        raise UnsupportedMediaType(f"content type {essence} can not be written; supported: {', '.join(ENCODED)}")
    if essence in _ENCODED_BY_NUMPY and not has_numpy():
        raise UnsupportedMediaType(f"content type {essence} needs NumPy, which the server does not have")
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    return encoder(value)


def writable() -> tuple[str, ...]:
    """Of :data:`ENCODED`, what can be written with what is installed."""
    return ENCODED if has_numpy() else tuple(name for name in ENCODED if name not in _ENCODED_BY_NUMPY)


def warm_up() -> None:
    """Does what the first request would else wait for: imports NumPy, and goes the usual ways once."""
    ways = ((JSON, b"[[1, 2.5]]"), (CSV, b"1,2.5\n"))
    for essence, body in ways if has_numpy() else ways[:1]:
        encode(decode(body, MediaType(essence)), essence)


# --- text: JSON, CSV, JSON Lines, plain -------------------------------------------------------------------------------


def _text(body: Body, content_type: MediaType) -> str:
    """The body as text, without its byte order mark."""
    charset = (content_type.parameter("charset") or "utf-8").lower()
    if charset not in _CHARSETS:
        raise UnsupportedMediaType(f"charset {charset!r} is not supported; utf-8 always is")
    return _decoded(body, charset)


def _decoded(body: Body, charset: str) -> str:
    try:
        return str(body, charset).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise MalformedBody(f"the body is not {charset}: byte {error.start}: {error.reason}") from None


def _decode_json(body: Body, content_type: MediaType) -> object:
    if content_type.parameters and content_type.parameter("charset") is not None:
        text = _text(body, content_type)
    else:
        text = _decoded(body, json.detect_encoding(bytes(body[:4])))
    return _as_array(_parsed(text))


def _decode_json_lines(body: Body, content_type: MediaType) -> object:
    lines = _text(body, content_type).split("\n")
    return _as_array([_parsed(line, number) for number, line in enumerate(lines, 1) if line and not line.isspace()])


_JSON_DECODER = json.JSONDecoder()


def _parsed(text: str, line: int = 0) -> Any:
    """The value of a JSON text; ``line``: its number among JSON Lines, 0: it is a text of its own."""
    where = f"line {line}: " if line else ""
    try:
        return _JSON_DECODER.decode(text)
    except json.JSONDecodeError as error:
        place = f"line {line or error.lineno}, column {error.colno}"
        raise MalformedBody(f"the body is not JSON{' Lines' if line else ''}: {place}: {error.msg}") from None
    except RecursionError:
        raise MalformedBody(f"{where}the JSON text is nested too deeply to read") from None
    except ValueError as error:  # a number with more digits than Python converts (sys.set_int_max_str_digits)
        raise MalformedBody(f"{where}a number can not be read: {error}") from None


def _as_array(value: Any) -> Any:
    """``value`` as an array where it is a number, a bool, or rectangular lists of them; else itself."""
    if not has_numpy():
        return value
    # The elements are looked at before NumPy sees them: it would take whatever it is given, as objects or as texts.
    if isinstance(value, list):
        flat, shape = value, [len(value)]
    else:
        flat, shape = [value], []
    kinds = set(map(type, flat))
    while kinds == _LISTS:
        lengths = set(map(len, flat))
        if len(lengths) != 1 or len(shape) == MOST_DIMENSIONS:
            return value
        shape.append(lengths.pop())
        flat = list(chain.from_iterable(flat))
        kinds = set(map(type, flat))
    if not kinds <= _NUMBERS and kinds != _BOOLS:
        return value
    import numpy

    kind = numpy.float64 if float in kinds or not kinds else numpy.int64 if int in kinds else numpy.bool_
    try:
        return numpy.array(flat, kind).reshape(shape)
    except OverflowError:
        return value


def _decode_csv(body: Body, content_type: MediaType) -> object:
    text = _text(body, content_type)
    blanks = text[len(text.rstrip(" \t\r\n")) :]
    text = text[: len(text) - len(blanks.lstrip(" \t"))]  # blank lines at the end are no rows
    if not text or text.isspace():
        raise MalformedBody("the body is not CSV: it has no rows")
    if '"' in text:
        cells, rows = _quoted_cells(text)
    else:
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        lines = text.split("\n")
        commas = lines[0].count(",")
        if text.count(",") != commas * len(lines) or any(line.count(",") != commas for line in lines):
            number, line = next((n, line) for n, line in enumerate(lines, 1) if line.count(",") != commas)
            raise _ragged(number, line.count(",") + 1, commas + 1)
        cells, rows = text.replace("\n", ",").split(","), len(lines)
    return _cells_as_array(cells, text).reshape(rows, -1)


def _quoted_cells(text: str) -> tuple[list[str], int]:
    """All cells, and the number of rows."""
    cells: list[str] = []
    rows = columns = 0
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            cells += row or ("",)  # an empty line is one cell, which is empty
            columns = columns or len(cells)
            rows += 1
            if len(cells) != rows * columns:
                raise _ragged(reader.line_num, len(row) or 1, columns)
    except csv.Error as error:
        raise MalformedBody(f"the body is not CSV: line {reader.line_num}: {error}") from None
    return cells, rows


def _ragged(line: int, found: int, columns: int) -> MalformedBody:
    return MalformedBody(
        f"the body is not CSV: line {line} has {found} cell{'s' * (found != 1)}, and the first row has {columns}"
    )


def _cells_as_array(cells: list[str], text: str) -> Any:
    """Cells as numbers where all of them are, else as texts; ``text`` is what they are from."""
    import numpy

    # Python's parsers of numbers take underscores and the digits of every script, too.
    if text.isascii() and "_" not in text:
        try:
            if "." not in text:
                return numpy.array(cells, numpy.int64)
        except (ValueError, OverflowError):
            pass
        try:
            return numpy.array(cells, numpy.float64)
        except ValueError:
            pass
        try:
            return numpy.array([float(cell) if cell and not cell.isspace() else numpy.nan for cell in cells])
        except ValueError:
            pass
    # An array of str has room for the longest one in every cell, and drops zeros at the end of each.
    wasteful = len(cells) * max(map(len, cells)) > max(_SMALL_CHARACTERS, _MOST_TEXT_TIMES * len(text))
    return numpy.array(cells, dtype=object if wasteful or "\0" in text else str)


def _decode_text(body: Body, content_type: MediaType) -> object:
    return _text(body, content_type)


_DECODERS: dict[str, Callable[[Body, MediaType], object]] = {
    JSON: _decode_json,
    CSV: _decode_csv,
    NPY: decode_npy,
    NPZ: decode_npz,
    TEXT: _decode_text,
    RECORDS: decode_records,
    **dict.fromkeys((JSON_LINES, *_JSON_LINES_ALSO), _decode_json_lines),
}


# --- encoders: text ---------------------------------------------------------------------------------------------------


def _python(value: Any) -> Any:
    """What JSON's encoder does not know, as Python's own values: arrays, scalars, tensors, series, frames."""
    if not hasattr(value, "tolist"):
        if not hasattr(value, "to_numpy") and not hasattr(value, "detach"):
            raise NotEncodable(
                f"a value of type {type_name(value)} can not be written; give arrays or Python's own values"
            )
        value = array_of(value, objects=True)
    try:
        return value.tolist()
    except (RuntimeError, TypeError, ValueError) as error:  # torch: tensors that are sparse, for one
        raise NotEncodable(f"a value of type {type_name(value)} can not be written: {error}") from None


_JSON_ENCODER = json.JSONEncoder(allow_nan=False, check_circular=False, default=_python)  # a circle: RecursionError


def _json(value: Any) -> str:
    try:
        return _JSON_ENCODER.encode(value)
    except (TypeError, ValueError):
        pass  # nan or infinity; keys that are NumPy's numbers; or what can not be helped
    except RecursionError:
        raise NotEncodable("the value is nested too deeply for JSON, or contains itself") from None
    try:
        return _JSON_ENCODER.encode(_without_nan(value))
    except (TypeError, ValueError) as error:
        raise NotEncodable(f"the value has no form in JSON: {error}") from None
    except RecursionError:
        raise NotEncodable("the value is nested too deeply for JSON, or contains itself") from None


def _without_nan(value: Any) -> Any:
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {
            key.item() if hasattr(key, "item") and not isinstance(key, str) else key: _without_nan(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return list(map(_without_nan, value))
    return _without_nan(_python(value))


def _encode_json(value: Any) -> bytes:
    return _json(value).encode("ascii")


def _encode_json_lines(value: Any) -> bytes:
    if not isinstance(value, (str, dict, list, tuple, int, float, type(None))):
        value = _python(value)
    lines = value if isinstance(value, (list, tuple)) else (value,)
    return "".join([f"{_json(line)}\n" for line in lines]).encode("ascii")


def _encode_csv(value: Any) -> bytes:
    if is_array_like(value):
        array = array_of(value, objects=True)
        if array.dtype.kind not in "biufUO":
            raise NotEncodable(f"an array of {array.dtype} has no form in CSV; expected numbers or texts")
        if array.dtype.kind in "biuf" and array.size:
            return _csv_of_numbers(array)
        value = array.tolist()
    if isinstance(value, dict):
        raise NotEncodable("a dict has no form in CSV; expected an array, or lists of at most two dimensions")
    items = list(map(_listed, value)) if isinstance(value, (list, tuple)) else [value]
    rows = items if items and all(isinstance(item, (list, tuple)) for item in items) else [[item] for item in items]
    if len(set(map(len, rows))) > 1:
        raise NotEncodable("rows of different lengths have no form in CSV")
    if rows and not rows[0]:
        raise NotEncodable("rows without columns have no form in CSV")
    single = bool(rows) and len(rows[0]) == 1
    return utf8("".join([",".join([_cell(cell, single) for cell in row]) + "\n" for row in rows]))


def _listed(item: Any) -> Any:
    return _python(item) if hasattr(item, "tolist") or hasattr(item, "detach") else item


def _csv_of_numbers(array: Any) -> bytes:
    if array.ndim > 2:
        raise NotEncodable(f"an array of {array.ndim} dimensions has no form in CSV; expected at most two")
    rows = array.reshape(-1, 1) if array.ndim < 2 else array
    # Python's floats have 64 bits; of narrower and wider ones NumPy knows which digits are needed.
    texts = repr if array.dtype.kind != "f" or array.dtype.itemsize == 8 else str
    listed = rows.tolist() if texts is repr else rows
    return ("\n".join([",".join(map(texts, row)) for row in listed]) + "\n").encode("ascii")


_TO_QUOTE = re.compile('[",\r\n]').search


def _cell(value: Any, single: bool) -> str:
    """A cell as RFC 4180 has it; ``single``: it is its row's only one."""
    if isinstance(value, str):
        # A row of nothing but blanks would be read as no row.
        if _TO_QUOTE(value) or (single and (not value or value.isspace())):
            return '"' + value.replace('"', '""') + '"'
        return value
    value = _listed(value)
    if value is None:
        return '""' if single else ""
    if isinstance(value, float):
        return float.__repr__(value)
    if isinstance(value, int):
        return str(value)
    raise NotEncodable(f"a cell of type {type_name(value)} has no form in CSV; expected numbers or texts")


def _encode_text(value: Any) -> bytes:
    if is_array_like(value):
        array = array_of(value, objects=True)
        # A scalar with the digits that its type needs.
        value = str(array[()]) if not array.ndim and array.dtype.kind in "biufU" else array.tolist()
    if isinstance(value, (list, tuple)) and all(isinstance(line, str) for line in value):
        return utf8("".join([f"{line}\n" for line in value]))
    if not isinstance(value, (str, int, float)):
        raise NotEncodable(f"a value of type {type_name(value)} is no plain text; expected a text, texts, or a number")
    return utf8(str(value))


_ENCODERS: dict[str, Callable[[Any], bytes]] = {
    JSON: _encode_json,
    CSV: _encode_csv,
    NPY: encode_npy,
    NPZ: encode_npz,
    TEXT: _encode_text,
    RECORDS: encode_records,
    **dict.fromkeys((JSON_LINES, *_JSON_LINES_ALSO), _encode_json_lines),
}
