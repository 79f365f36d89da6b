"""Codecs of arrays: NPY, NPZ (never with a pickle), RecordIO-protobuf.

Nothing takes much more memory than a body has bytes, whatever its headers claim.
"""

from __future__ import annotations

import io
import re

from launcher.serving.values import (
    MOST_DIMENSIONS,
    MalformedBody,
    NotEncodable,
    UnsupportedMediaType,
    array_of,
    text_name,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from launcher.serving.media import MediaType

    Body = bytes | bytearray | memoryview

_MOST_UNPACKED_BYTES = 256 << 20
_MOST_UNPACKED_TIMES = 100
_NPY_MAGIC = b"\x93NUMPY"
_MOST_NPY_HEADER = 10_000  # characters; NumPy's own limit
# Numbers, bool, texts and times; no objects, which would be pickled, and no structures.
_NPY_DTYPE = re.compile(r"[<>|=]?(?:[biufcSUV][0-9]{1,9}|[mM]8(?:\[[0-9]{0,9}[A-Za-z]{1,2}\])?)")
_MOST_EMPTY_ROWS = 1 << 16  # that an array without a number may have, beyond the body's bytes
# What zipfile raises for archives that are damaged, besides its own error and those of zlib and struct.
_BAD_ARCHIVE = (EOFError, IndexError, OSError, OverflowError, RuntimeError, ValueError)
_SPARSE_FORMATS = ("csr", "csc", "bsr", "coo", "dia")


def decode_npy(body: Body, content_type: MediaType) -> object:
    return _npy(body)


def _npy(data: Body) -> Any:
    """The array of a ``.npy`` file. Source: numpy.lib.format, versions 1.0 to 3.0.

    Not numpy.load(): that makes the array that the header claims before it sees whether there is as much data.
    """
    import numpy

    start = bytes(data[:12])
    if not start.startswith(_NPY_MAGIC) or len(start) < 12:
        raise MalformedBody("the body is not NPY: it does not begin as such a file does")
    if start[6] not in (1, 2, 3):
        raise MalformedBody(f"the body is NPY of version {start[6]}.{start[7]}; versions 1.0 to 3.0 are known")
    begin = 10 if start[6] == 1 else 12
    end = begin + int.from_bytes(start[8:begin], "little")
    if end - begin > _MOST_NPY_HEADER or end > len(data):
        raise MalformedBody(f"the NPY header claims {end - begin} bytes; the body has {len(data) - begin}")
    kind, fortran, shape = _npy_header(bytes(data[begin:end]), "utf-8" if start[6] == 3 else "latin-1")
    count = _product(shape)
    if count * kind.itemsize != len(data) - end:
        raise MalformedBody(
            f"the NPY header tells of {count * kind.itemsize} bytes of data ({kind} {shape}); the body has "
            f"{len(data) - end}"
        )
    if not count:
        rows, whole = _product(shape[: shape.index(0)]), _product([size or 1 for size in shape]) * kind.itemsize
        if rows > _MOST_EMPTY_ROWS + len(data) or whole >= 1 << 63:
            raise MalformedBody(f"the NPY header tells of a very large array without data, of shape {shape!r:.80}")
    array = numpy.frombuffer(data, kind, count, end) if count else numpy.empty(0, kind)
    if kind.kind == "U" and count and int(array.view(kind.str[0] + "u4").max()) > 0x10FFFF:
        raise MalformedBody("the NPY data has texts with characters that do not exist")
    # A copy: it can be written to, whatever the body is, and has the order of bytes that torch wants.
    return array.astype(kind.newbyteorder("=")).reshape(shape, order="F" if fortran else "C")


def _npy_header(header: bytes, charset: str) -> tuple[Any, bool, tuple[int, ...]]:
    """dtype, Fortran order, and shape."""
    import ast

    import numpy

    try:
        fields = ast.literal_eval(header.decode(charset))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        fields = None
    if not isinstance(fields, dict) or set(fields) != {"descr", "fortran_order", "shape"}:
        raise MalformedBody("the NPY header is not the dict of descr, fortran_order and shape that it must be")
    described, fortran, shape = fields["descr"], fields["fortran_order"], fields["shape"]
    if not isinstance(fortran, bool) or not isinstance(shape, tuple) or len(shape) > MOST_DIMENSIONS:
        raise MalformedBody(f"the NPY header has fortran_order {fortran!r:.40} and shape {shape!r:.80}")
    if not all(type(size) is int and 0 <= size < 1 << 63 for size in shape):
        raise MalformedBody(f"the NPY header has the shape {shape!r:.80}")
    if not isinstance(described, str) or not _NPY_DTYPE.fullmatch(described):
        advice = "objects would be pickled, which is not read; send an array of numbers or texts, or NPZ with several"
        raise MalformedBody(f"the NPY header has the dtype {described!r:.80}: {advice}")
    try:
        kind = numpy.dtype(described)
    except (TypeError, ValueError) as error:
        raise MalformedBody(f"the NPY header has the dtype {described!r}: {error}") from None
    if not kind.itemsize:
        raise MalformedBody(f"the NPY header has the dtype {described!r}, of no bytes")
    return kind, fortran, shape


def _product(sizes: Sequence[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def decode_npz(body: Body, content_type: MediaType) -> object:
    import struct
    import zipfile
    import zlib

    compressions = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    arrays: dict[str, Any] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            members = archive.infolist()
            most = max(_MOST_UNPACKED_BYTES, _MOST_UNPACKED_TIMES * len(body))
            if sum(member.file_size for member in members) > most:
                raise MalformedBody(f"the NPZ archive would unpack to more than {most} bytes")
            for member in members:
                shown = f"{member.filename!r:.80}"
                if not member.filename.endswith(".npy") or member.compress_type not in compressions:
                    raise MalformedBody(f"the NPZ archive has {shown}, which is no .npy as NumPy writes it")
                with archive.open(member) as file:
                    # With a length, no more than that is unpacked, whatever the compressed data holds.
                    data = file.read(member.file_size + 1)
                try:
                    arrays[member.filename[:-4]] = _npy(data)
                except MalformedBody as error:
                    raise MalformedBody(f"{shown}: {error}") from None
    except (zipfile.BadZipFile, zlib.error, struct.error, *_BAD_ARCHIVE) as error:
        raise MalformedBody(f"the body is not NPZ: {error!s:.200}") from None
    return _sparse_matrix(arrays) if {"format", "shape", "data"} <= arrays.keys() else arrays


def _sparse_matrix(arrays: dict[str, Any]) -> Any:
    """The matrix of scipy.sparse.save_npz()."""
    import numpy

    try:
        from scipy import sparse
    except ImportError as error:
        raise UnsupportedMediaType(f"NPZ of sparse matrices needs SciPy, which is not installed: {error}") from None
    form = arrays["format"].item() if arrays["format"].ndim == 0 else None
    form = form.decode("latin-1") if isinstance(form, bytes) else form
    if form not in _SPARSE_FORMATS:
        known = ", ".join(_SPARSE_FORMATS)
        raise MalformedBody(f"the NPZ archive has a sparse matrix of the format {form!r:.40}; known: {known}")
    names = ("row", "col") if form == "coo" else ("offsets",) if form == "dia" else ("indices", "indptr")
    if missing := [name for name in names if name not in arrays]:
        raise MalformedBody(f"the NPZ archive has a sparse matrix of the format {form} without {missing[0]}.npy")
    data, *places = arrays["data"], *(arrays[name] for name in names)
    if arrays["shape"].shape != (2,) or any(one.dtype.kind not in "iu" for one in (arrays["shape"], *places)):
        raise MalformedBody("the NPZ archive has a sparse matrix whose shape or places are no whole numbers")
    if data.dtype.kind not in "biufc":
        raise MalformedBody(f"the NPZ archive has a sparse matrix of {data.dtype}; expected numbers")
    shape = tuple(arrays["shape"].tolist())
    made: Any = getattr(sparse, f"{form}_{'array' if '_is_array' in arrays else 'matrix'}")
    try:
        if form == "coo":
            return made((data, tuple(places)), shape=shape)
        matrix = made((data, *places), shape=shape)
        if form == "dia":
            if places[0].size and int(numpy.abs(places[0].astype(numpy.float64)).max()) > max(shape):
                raise ValueError("an offset beyond the shape")
        else:
            matrix.check_format(full_check=True)  # SciPy's compiled code follows indices without a look at them
        return matrix
    except (ValueError, TypeError, OverflowError, IndexError) as error:
        raise MalformedBody(f"the NPZ archive has a sparse matrix that is none: {error!s:.200}") from None


def decode_records(body: Body, content_type: MediaType) -> object:
    import os

    from launcher import _data
    from launcher.errors import DataError

    with os.fdopen(os.memfd_create("body", os.MFD_CLOEXEC), "wb") as file:
        path = f"/proc/self/fd/{file.fileno()}"
        file.write(body)
        file.flush()
        try:
            opened = _data.File(path, "mapped")
            source = _data.record_proto_source(_data.Index([opened], [_data.scan_recordio(opened)]))
            columns = _all_records(source, len(body))
        except (DataError, ValueError) as error:
            text = str(error).removeprefix(f"{path}: ").partition(";")[0]
            raise MalformedBody(f"the body is not RecordIO-protobuf: {text:.300}") from None
    return columns["values"] if columns.keys() == {"values"} else columns


def _all_records(source: Any, body_bytes: int) -> dict[str, Any]:
    """The columns of all records, in their order."""
    from launcher import _data
    from launcher.data.fields import SIZES, Ragged

    records, makers, row_bytes = source.records, [], 0
    for _, kind, dtype, shape in source.fields:
        makers.append((None, Ragged, _sparse_maker(shape))[kind])
        row_bytes += _product(shape) * SIZES[dtype] if kind == 0 else 0
    # A small body must not ask for much memory: a number of 4 bytes takes 1 byte at least in each record.
    if records * row_bytes > 4 * body_bytes:
        raise ValueError(f"the first record has more values than {records} records of these bytes can have")
    epoch = {"shuffle": 0, "seed": 0, "epoch": 0, "records": records, "extent": 1, "window": 1, "lanes": 1}
    share = {"base": 0, "world": 1, "rank": 0, "batch": records, "tail": 2, "agreed_steps": 1}
    engine = _data.Engine(source, {**epoch, **share}, [*makers, None, None], ring=1, ring_limit=1, threads=0)
    try:
        return engine.next() or {}
    finally:
        engine.close()


def _sparse_maker(shape: tuple[int, ...]) -> Callable[..., Any]:
    from launcher.data.fields import Sparse

    def make(values: Any, offsets: Any, keys: Any) -> Any:
        if len(shape) == 1:
            try:
                from scipy.sparse import csr_matrix
            except ImportError:
                pass
            else:
                return csr_matrix((values, keys, offsets), shape=(len(offsets) - 1, shape[0]))
        return Sparse(values, offsets, keys, shape)

    return make


def encode_npy(value: Any) -> bytes:
    from numpy.lib import format as npy

    file = io.BytesIO()
    npy.write_array(file, array_of(value), allow_pickle=False)
    return file.getvalue()


def encode_npz(value: Any) -> bytes:
    import zipfile

    file = io.BytesIO()
    if hasattr(value, "tocsr"):
        from scipy import sparse

        sparse.save_npz(file, value if value.format in _SPARSE_FORMATS else value.tocsr())
        return file.getvalue()
    arrays: Mapping[Any, Any] = value if isinstance(value, dict) else {"arr_0": value}
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            archive.writestr(zipfile.ZipInfo(f"{text_name(name)}.npy"), encode_npy(array))
    return file.getvalue()


def encode_records(value: Any) -> bytes:
    from launcher import _data
    from launcher.data.fields import dtype_number

    labels = value if isinstance(value, dict) else {"score": _narrowed(array_of(value))}
    columns = []
    for name, label in labels.items():
        array = _storable(text_name(name), array_of(label))
        described = (f"label_{name}", 0, dtype_number(array.dtype), list(array.shape[1:]))
        columns.append((described, array, None, None))
    lengths = {len(array) for _, array, _, _ in columns}
    if len(lengths) != 1:
        raise NotEncodable(f"labels of {sorted(lengths)} rows have no form as records; expected as many of each")
    try:
        return _data.encode_record_proto(columns, 0, lengths.pop())
    except ValueError as error:
        raise NotEncodable(f"the value has no form as records: {error}") from None


def _narrowed(array: Any) -> Any:
    """float64 as float32, which readers of algorithms' answers look for."""
    import numpy

    if array.dtype != numpy.float64:
        return array
    with numpy.errstate(all="ignore"):
        narrow = array.astype(numpy.float32)
    return narrow if (numpy.isinf(narrow) == numpy.isinf(array)).all() else array


def _storable(name: str, array: Any) -> Any:
    """As rows of float32, float64 or int32, without loss."""
    import numpy

    if array.dtype.kind in "biu":
        limits = numpy.iinfo(numpy.int32)
        if array.size and (int(array.min()) < limits.min or int(array.max()) > limits.max):
            raise NotEncodable(f"{name!r} has whole numbers of more than 32 bits; a Record has none so wide")
        kind = numpy.int32
    elif array.dtype.kind == "f" and array.dtype.itemsize <= 8:
        kind = numpy.float64 if array.dtype.itemsize == 8 else numpy.float32
    else:
        raise NotEncodable(f"{name!r} is of {array.dtype}; a Record stores float32, float64 and int32")
    rows = array.reshape(-1, 1) if array.ndim < 2 else array
    return numpy.ascontiguousarray(rows, kind)
