"""Files whose records all have the same number of bytes: raw binary files, and ``.npy``."""

from __future__ import annotations

import ast

from launcher.data.fields import DTYPES, SIZES, dtype_number
from launcher.errors import DataError, UsageError
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from launcher._data import File, Source

_NPY_MAGIC = b"\x93NUMPY"
_NPY_HEADER_BYTES_MOST = 1 << 20
_KINDS = {
    "f4": "float32",
    "f8": "float64",
    "f2": "float16",
    "i1": "int8",
    "u1": "uint8",
    "i2": "int16",
    "u2": "uint16",
    "i4": "int32",
    "u4": "uint32",
    "i8": "int64",
    "u8": "uint64",
    "b1": "bool",
}


class FixedField(Record):
    """A field at a fixed place of the record. ``dtype``: by number; ``offset``: in bytes from the record's begin."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        """Bytes of one record's values."""
        count = SIZES[self.dtype]
        for extent in self.shape:
            count *= extent
        return count


class Layout(Record):
    """How the records of a file lie. ``records``: that the file says it has; -1: as many as there is room for."""

    header_bytes: int
    stride: int
    fields: tuple[FixedField, ...]
    records: int = -1


def layout_of(fields: Mapping[str, Any], *, stride: int = 0, header_bytes: int = 0) -> Layout:
    """The layout of a raw file.

    Args:
        fields: name -> dtype, or (dtype, shape), or (dtype, shape, offset in the record in bytes). Without an offset a
            field follows the one before it, without a gap. A dtype is a name ("float32") or a NumPy dtype.
        stride: bytes from record to record; 0: up to the end of the last field.
        header_bytes: before the first record of each file.

    Raises:
        UsageError: a field is not understood, or is not inside the record.
    """
    found = []
    at = 0
    for name, given in fields.items():
        parts = given if isinstance(given, tuple) else (given,)
        if not 1 <= len(parts) <= 3:
            raise UsageError(f"field {name!r} is {given!r}; expected a dtype, (dtype, shape) or (dtype, shape, offset)")
        shape = parts[1] if len(parts) > 1 else ()
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        offset = parts[2] if len(parts) > 2 else at
        if not all(isinstance(number, int) and number >= 0 for number in (*shape, offset)):
            raise UsageError(f"field {name!r} is {given!r}; expected shape and offset in whole numbers from 0 on")
        found.append(FixedField(name, dtype_number(parts[0]), shape, offset))
        at = offset + found[-1].bytes
    end = max((field.offset + field.bytes for field in found), default=0)
    if not found or end == 0:
        raise UsageError("fields is empty; expected the fields of a record, say {'values': ('float32', 28)}")
    if stride and stride < end:
        raise UsageError(f"stride is {stride}, but the fields take {end} bytes of a record")
    return Layout(header_bytes, stride or end, tuple(found))


def npy_layout(file: File) -> Layout:
    """The layout of an ``.npy`` file: its first dimension are the records.

    An array of plain elements is the field "values"; one of a structured dtype has its fields. Format: NumPy
    Enhancement Proposal 1 and numpy.lib.format.

    Raises:
        DataError: it is no such file, it is cut, or its elements are of a type that has no field.
    """
    header, body = _npy_header(file)
    descr, shape = header["descr"], header["shape"]
    if not shape:
        raise _malformed(file, "the array has no dimensions; its first one would be the records")
    if header["fortran_order"] and len(shape) > 1:
        raise _malformed(
            file, "the array is in Fortran order, where a record is all over the file; save numpy.ascontiguousarray(it)"
        )
    found: list[FixedField] = []
    if isinstance(descr, str):
        dtype = _npy_dtype(file, descr)
        found.append(FixedField("values", dtype, tuple(shape[1:]), 0))
        stride = found[0].bytes
    else:
        if len(shape) > 1:
            raise _malformed(file, f"a structured array of shape {shape}; expected one dimension")
        stride = _structured(file, descr, found)
    if stride == 0:
        raise _malformed(file, f"records of no bytes: dtype {descr!r}, shape {shape}")
    records = shape[0]
    if file.size - body < records * stride:
        whole = max(0, file.size - body) // stride
        raise DataError(
            f"{file.path}: byte {body + whole * stride}: record {whole}: the header says {records} records of {stride} "
            f"bytes, which end at byte {body + records * stride}, but the file has {file.size} bytes; copy it again",
            "truncated",
            file.path,
            body + whole * stride,
            whole,
        )
    if file.size - body > records * stride:
        end = body + records * stride
        raise _malformed(file, f"{file.size - end} bytes after the last of the {records} records", end)
    return Layout(body, stride, tuple(found), records)


def open_fixed(files: Sequence[File], layouts: Sequence[Layout], fields: Sequence[str] | None = None) -> Source:
    """The records of ``files``, which all have the same layout but for their headers and lengths.

    ``fields``: names of those that are wanted; None: all.

    Raises:
        DataError: a file's layout is not the first one's; a file ends inside a record.
        UsageError: there is no file, or no field of that name.
    """
    from launcher import _data

    if not layouts:
        raise UsageError("no file to read records from")
    first = layouts[0]
    for file, layout in zip(files, layouts, strict=True):
        if (layout.stride, layout.fields) != (first.stride, first.fields):
            raise DataError(
                f"{file.path}: its records are of {_words(layout)}, those of {files[0].path} of {_words(first)}; the "
                "files of a channel must have the same fields",
                "mismatch",
                file.path,
            )
    known = {field.name: field for field in first.fields}
    unknown = [name for name in fields or () if name not in known]
    if unknown:
        raise UsageError(f"no field {unknown[0]!r} in {files[0].path}; it has {', '.join(known)}")
    chosen = [known[name] for name in (known if fields is None else fields)]
    return _data.fixed_source(
        list(files),
        [layout.header_bytes for layout in layouts],
        first.stride,
        [(field.name, field.dtype, list(field.shape), field.offset) for field in chosen],
    )


def _words(layout: Layout) -> str:
    parts = ", ".join(f"{field.name} {DTYPES[field.dtype]}{list(field.shape)}" for field in layout.fields)
    return f"{layout.stride} bytes ({parts})"


def _malformed(file: File, text: str, offset: int = -1) -> DataError:
    where = f"{file.path}: byte {offset}" if offset >= 0 else file.path
    return DataError(f"{where}: {text}", "malformed", file.path, offset)


def _npy_header(file: File) -> tuple[dict[str, Any], int]:
    """The dict of the header, and where the elements begin."""
    start = file.read(0, min(file.size, 12))
    if not start.startswith(_NPY_MAGIC):
        raise _malformed(file, f"begins with {start[:6]!r}; an .npy file begins with {_NPY_MAGIC!r}", 0)
    version = start[6:8]
    if len(version) == 2 and version[0] not in (1, 2, 3):
        raise _malformed(file, f"version {version[0]}.{version[1]} of the .npy format; known are 1 to 3", 6)
    width = 2 if version[:1] == b"\x01" else 4
    length = int.from_bytes(start[8 : 8 + width], "little")
    body = 8 + width + length
    if len(start) < 8 + width or file.size < body:
        raise DataError(
            f"{file.path}: byte {file.size}: the file ends in its header, which has {body} bytes; copy it again",
            "truncated",
            file.path,
            file.size,
        )
    if length > _NPY_HEADER_BYTES_MOST:
        raise _malformed(file, f"a header of {length} bytes", 8)
    text = file.read(8 + width, length).decode("utf-8" if version[0] == 3 else "latin-1", "replace")
    try:
        header = ast.literal_eval(text.strip())
        good = {"descr", "fortran_order", "shape"} <= header.keys() and all(
            isinstance(extent, int) and extent >= 0 for extent in header["shape"]
        )
    except (ValueError, SyntaxError, AttributeError, TypeError, MemoryError, RecursionError):
        good = False
    if not good:
        raise _malformed(
            file, f"the header is {text[:80]!r}; expected a dict of descr, fortran_order and shape", 8 + width
        )
    return header, body


def _npy_dtype(file: File, descr: object) -> int:
    text = descr if isinstance(descr, str) else ""
    order, kind = text[:1], text[1:]
    if kind not in _KINDS:
        raise _malformed(
            file,
            f"elements of dtype {descr!r}; expected floats of 2, 4 or 8 bytes, integers, or bool: {', '.join(_KINDS)}",
        )
    if order == ">" and kind[1] != "1":
        raise _malformed(file, f"elements of dtype {descr!r} are big-endian; save them with .astype('<{kind}')")
    return DTYPES.index(_KINDS[kind])


def _structured(file: File, descr: object, found: list[FixedField], prefix: str = "", at: int = 0) -> int:
    """Appends the fields of a structured dtype that begins at byte ``at`` of the record; returns where it ends."""
    if not isinstance(descr, list):
        raise _malformed(file, f"dtype {descr!r}; expected a text or a list of fields")
    for entry in descr:
        if not (isinstance(entry, tuple) and len(entry) in (2, 3)):
            raise _malformed(file, f"a field {entry!r}; expected (name, dtype) or (name, dtype, shape)")
        name, inner = entry[0], entry[1]
        name = name[1] if isinstance(name, tuple) else name  # (title, name)
        shape = entry[2] if len(entry) == 3 else ()
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if isinstance(inner, str) and inner[1:2] == "V" and inner[2:].isdecimal():
            at += int(inner[2:])  # padding
        elif isinstance(inner, list) and not shape:
            at = _structured(file, inner, found, f"{prefix}{name}.", at)
        else:
            field = FixedField(f"{prefix}{name}", _npy_dtype(file, inner), shape, at)
            found.append(field)
            at += field.bytes
    return at
