"""Writers of files that the loader reads: RecordIO (of any records, or of ``Record`` messages), TFRecord, ``.npy``.

A file appears under its name when it is complete: it is written under a hidden name beside it, flushed to disk, and
renamed by ``close()``. A writer that is left by an exception leaves nothing.
"""

from __future__ import annotations

import os

from launcher.data.fields import DTYPES, Field, Ragged, Sparse, dtype_number
from launcher.errors import OutputError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType
    from typing import Any

    from typing_extensions import Self

_CHUNK_BYTES = 4 << 20  # of records that are encoded at a time
_DIGITS = 20  # room for the number of records in a header that is written before it is known
_KIND_NUMBERS = {"fixed": 0, "ragged": 1, "sparse": 2}


class _Writer:
    """What all writers have: the file that is renamed at the end."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.records = 0
        folder, name = os.path.split(self.path)
        if not name:
            raise UsageError(f"path {self.path!r} names no file")
        self._partial = os.path.join(folder, f".{name}.{os.getpid()}.partial")
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            self._file = os.fdopen(os.open(self._partial, flags, 0o666), "wb", buffering=1 << 20)
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(f"{self.path}: can not be written: {error.strerror or error}")

    def _write(self, data: bytes | memoryview) -> None:
        if self._file.closed:
            raise UsageError(f"{self.path}: the writer is closed; make another one")
        try:
            self._file.write(data)
        except OSError as error:
            raise self._failed(error) from error

    def _finish(self) -> None:
        """What is still to be written when the last record is."""

    def close(self) -> None:
        """Completes the file; a second call does nothing.

        Raises:
            OutputError: the operating system refused it; then there is no file.
        """
        if self._file.closed:
            return
        complete = False
        try:
            self._finish()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._partial, self.path)
            complete = True
        except OSError as error:
            raise self._failed(error) from error
        finally:
            if not complete:
                self.discard()

    def discard(self) -> None:
        """Ends without a file. Does nothing after ``close()``."""
        try:
            self._file.close()
        except OSError:  # what could not be flushed is thrown away in any case
            pass
        try:
            os.unlink(self._partial)
        except FileNotFoundError:
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


class RecordIOWriter(_Writer):
    """Writes records of any bytes as RecordIO.

    ``escape``: a record that holds the frames' magic at a multiple of 4 is split there, as dmlc has it, so that readers
    that begin in the middle of a file are not misled. SageMaker's own readers (ml-io, the TensorFlow extensions) do not
    put the magic back: for them, turn it off; whoever reads from the beginning needs no escape.

    Raises:
        OutputError: the operating system refused to write.
    """

    def __init__(self, path: str | os.PathLike[str], *, escape: bool = True) -> None:
        super().__init__(path)
        self._escape = escape

    def write(self, record: bytes) -> None:
        """Adds one record of less than 512 MiB.

        Raises:
            UsageError: it is larger, or no bytes.
        """
        from launcher import _data

        _check_bytes(self.path, self.records, record)
        try:
            framed = _data.encode_recordio(record, self._escape)
        except ValueError as error:
            raise UsageError(f"{self.path}: record {self.records}: {error}") from error
        self._write(framed)
        self.records += 1


class TFRecordWriter(_Writer):
    """Writes records of any bytes as TFRecord, each with its checksums.

    Raises:
        OutputError: the operating system refused to write.
    """

    def write(self, record: bytes) -> None:
        """Adds one record.

        Raises:
            UsageError: it is no bytes.
        """
        from launcher import _data

        _check_bytes(self.path, self.records, record)
        self._write(_data.encode_tfrecord(record))
        self.records += 1


class RecordProtoWriter(_Writer):
    """Writes batches of arrays as ``Record`` messages in RecordIO, as SageMaker's algorithms read them.

    ``escape``: see :class:`RecordIOWriter`; off, since SageMaker's readers of this format know no escape.

    Raises:
        OutputError: the operating system refused to write.
    """

    def __init__(self, path: str | os.PathLike[str], *, escape: bool = False) -> None:
        super().__init__(path)
        self._escape = escape
        self._fields: tuple[Field, ...] = ()

    def write(self, columns: Mapping[str, Any]) -> None:
        """Adds a record for each row.

        ``columns``: names to arrays of rows x shape (NumPy, or what NumPy can view), to :class:`Ragged` or
        :class:`Sparse` columns, SciPy's sparse matrices of rows x columns, or lists of ``bytes``. Names that begin with
        ``label_`` go into the map ``label`` without the prefix, the others into ``features``. float64 is stored as
        Float64Tensor, float32 and float16 as Float32Tensor, whole numbers and bool as Int32Tensor, bytes as Bytes.

        Raises:
            UsageError: a dtype that the format has not, a whole number of more than 32 bits, columns of different
                lengths, or other fields than in the batch before.
        """
        from launcher import _data

        if not hasattr(columns, "items"):
            raise UsageError(f"{self.path}: got {type(columns).__name__}; expected names with their columns, a dict")
        prepared = [_prepare(name, column) for name, column in columns.items()]
        if not prepared:
            raise UsageError(f"{self.path}: a record needs one field at least")
        fields = tuple(column.field for column in prepared)
        if self._fields and fields != self._fields:
            raise UsageError(f"{self.path}: the fields were {self._fields} and are now {fields}; keep them the same")
        self._fields = fields
        rows = _same_rows(self.path, {column.field.name: column.rows for column in prepared})
        native = [column.native() for column in prepared]
        step = max(1, _CHUNK_BYTES * max(rows, 1) // max(1, sum(column.bytes for column in prepared)))
        for begin in range(0, rows, step):
            try:
                framed = _data.encode_record_proto(native, begin, min(begin + step, rows), self._escape)
            except ValueError as error:
                raise UsageError(f"{self.path}: {error}") from error
            self._write(framed)
        self.records += rows


class FixedWriter(_Writer):
    """Writes records of fixed size as one ``.npy`` file: of an array, or, of several fields, of a structured type.

    Raises:
        OutputError: the operating system refused to write.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._dtype: Any = None
        self._shape: tuple[int, ...] = ()
        self._header_bytes = 0

    def write(self, columns: Any) -> None:
        """Adds a record for each row.

        ``columns``: an array of rows x shape, or a mapping of names to such arrays.

        Raises:
            UsageError: arrays of different lengths, other types or shapes than in the batch before, or a type without
                a fixed size.
        """
        import numpy

        if isinstance(columns, (Ragged, Sparse)):
            raise UsageError(f"{self.path}: rows have no fixed size; write them as RecordIO")
        array = _structured(self.path, columns) if hasattr(columns, "items") else numpy.asarray(columns)
        if array.ndim == 0 or array.dtype.hasobject:
            raise UsageError(f"{self.path}: expected an array of rows of fixed size, got {array.dtype} {array.shape}")
        if self._dtype is None:
            self._dtype, self._shape = array.dtype, array.shape[1:]
            header = self._header(10 ** (_DIGITS - 1))
            self._header_bytes = len(header)
            self._write(header)
        elif (array.dtype, array.shape[1:]) != (self._dtype, self._shape):
            raise UsageError(
                f"{self.path}: rows were {self._dtype} {self._shape} and are now {array.dtype} {array.shape[1:]}"
            )
        self._write(numpy.ascontiguousarray(array).reshape(-1).view(numpy.uint8).data)
        self.records += len(array)

    def _header(self, records: int) -> bytes:
        """The file's begin. Source: numpy.lib.format, the .npy format version 2.0."""
        from numpy.lib.format import dtype_to_descr

        described = {"descr": dtype_to_descr(self._dtype), "fortran_order": False, "shape": (records, *self._shape)}
        text = repr(described).encode()
        whole = self._header_bytes or (12 + len(text) + 1 + 63) // 64 * 64
        bytes_of_text = whole - 12
        return b"\x93NUMPY\x02\x00" + bytes_of_text.to_bytes(4, "little") + text.ljust(bytes_of_text - 1) + b"\n"

    def _finish(self) -> None:
        if self._dtype is None:
            raise UsageError(f"{self.path}: no batch was written, so that nobody knows the type of its records")
        self._file.seek(0)
        self._write(self._header(self.records))


def _check_bytes(path: str, number: int, record: object) -> None:
    if not isinstance(record, bytes):
        hint = "; encode it" if isinstance(record, str) else ""
        raise UsageError(f"{path}: record {number} is of type {type(record).__name__}; expected bytes{hint}")


class _Column:
    """One column as the native encoder takes it: contiguous arrays."""

    def __init__(self, field: Field, values: Any, offsets: Any = None, keys: Any = None) -> None:
        self.field, self.values, self.offsets, self.keys = field, values, offsets, keys
        self.rows = len(values) if offsets is None else len(offsets) - 1
        self.bytes = values.nbytes + (0 if keys is None else keys.nbytes)

    def native(self) -> tuple[tuple[str, int, int, Sequence[int]], Any, Any, Any]:
        field = self.field
        described = (field.name, _KIND_NUMBERS[field.kind], dtype_number(field.dtype), list(field.shape))
        return described, self.values, self.offsets, self.keys


def _prepare(name: str, column: Any) -> _Column:
    import numpy

    if isinstance(column, list) and column and all(isinstance(one, bytes) for one in column):
        lengths = numpy.cumsum([0, *(len(one) for one in column)], dtype=numpy.int64)
        column = Ragged(numpy.frombuffer(b"".join(column), numpy.uint8), lengths)
    elif hasattr(column, "tocsr"):
        matrix = column.tocsr()
        column = Sparse(matrix.data, matrix.indptr, matrix.indices, (matrix.shape[1],))
    if not isinstance(column, (Ragged, Sparse)):
        values = _storable(name, numpy.asarray(column))
        if values.ndim == 0:
            raise UsageError(f"field {name!r}: expected an array of rows, got a single value")
        return _Column(Field(name, "fixed", values.dtype.name, values.shape[1:]), values)
    offsets = numpy.ascontiguousarray(column.offsets, numpy.int64)
    raw = numpy.asarray(column.values)
    if isinstance(column, Ragged):
        values = raw if raw.dtype == numpy.uint8 else _storable(name, raw)
        return _Column(Field(name, "ragged", values.dtype.name), numpy.ascontiguousarray(values), offsets)
    keys = numpy.asarray(column.keys)
    if keys.size and (int(keys.min()) < 0 or int(keys.max()) >= column.columns):
        raise UsageError(f"field {name!r}: a key is not within 0 .. {column.columns - 1}, as its shape wants it")
    keys = numpy.ascontiguousarray(keys, numpy.uint64)
    values = _storable(name, raw)
    return _Column(Field(name, "sparse", values.dtype.name, tuple(column.shape)), values, offsets, keys)


def _storable(name: str, values: Any) -> Any:
    """``values`` as float32, float64 or int32, without loss."""
    import numpy

    kind = values.dtype.kind
    if values.dtype == numpy.float16:
        values = values.astype(numpy.float32)
    elif kind in "biu" and values.dtype != numpy.int32:
        limits = numpy.iinfo(numpy.int32)
        if values.size and kind != "b" and (int(values.min()) < limits.min or int(values.max()) > limits.max):
            raise UsageError(f"field {name!r}: a whole number needs more than 32 bits; a Record has none so wide")
        values = values.astype(numpy.int32)
    if values.dtype.name not in ("float32", "float64", "int32") or not values.dtype.isnative:
        raise UsageError(
            f"field {name!r}: a Record stores float32, float64, whole numbers of 32 bits, and bytes; got {values.dtype}"
        )
    return numpy.ascontiguousarray(values)


def _structured(path: str, columns: Mapping[str, Any]) -> Any:
    import numpy

    arrays = {}
    for name, column in columns.items():
        if not isinstance(column, (Ragged, Sparse)):
            arrays[name] = numpy.asarray(column)
        if name not in arrays or arrays[name].ndim == 0 or arrays[name].dtype.name not in DTYPES:
            raise UsageError(
                f"{path}: field {name!r} has no rows of fixed size; write it as RecordIO (RecordProtoWriter, --to "
                "recordio-protobuf), or leave it out (fields)"
            )
    if not arrays:
        raise UsageError(f"{path}: a record needs one field at least")
    rows = _same_rows(path, {name: len(array) for name, array in arrays.items()})
    packed = numpy.empty(rows, [(name, array.dtype, array.shape[1:]) for name, array in arrays.items()])
    for name, array in arrays.items():
        packed[name] = array
    return packed


def _same_rows(path: str, rows: Mapping[str, int]) -> int:
    if len(set(rows.values())) != 1:
        raise UsageError(f"{path}: the columns have different numbers of rows: {dict(rows)}")
    return next(iter(rows.values()))
