"""Parquet through pyarrow (an optional extra): columns become fields, row groups are decoded once.

A column of Parquet is compressed and can not be read in place, so all records are decoded when the channel is opened,
a row group at a time, into rows in memory of this process (a memfd: no file anywhere) or, given a folder, in a file
that the ranks of a host share; batches are then gathered from there like those of any other format. That takes as much
memory as the decoded set, or as much disk.

Numbers and booleans become scalars, fixed-size lists of numbers arrays of that length, lists of numbers, texts and
binary columns ragged fields. Whatever else a column has (structs, maps, lists of lists, times, decimals) and a null are
errors that name the column: leave it out with ``fields``, or give a value for nulls with ``fill``.
"""

from __future__ import annotations

import contextlib
import os

from launcher.data.fields import DTYPES, SIZES
from launcher.errors import DataError, UsageError
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from launcher._data import Source

_RUN_BYTES = 16  # of a ragged field in its row: where its values begin, and how many they are
_CACHED_BYTES = 1 << 18
_LAYOUT = 1  # of the decoded rows: part of the name of a file that is kept


class Column(Record):
    """A column that becomes a field.

    ``shape``: of a record's value; None: ragged. ``offset``: in the decoded row.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] | None
    offset: int


class Decoded(Record):
    """The decoded records, how many each file has, and what was left out: (offset, bytes, text) of each by file."""

    source: Source
    records: tuple[int, ...]
    damage: tuple[tuple[str, list[tuple[int, int, str]]], ...] = ()


def make_source(
    root: str,
    files: Sequence[str],
    *,
    fields: Sequence[str] | None = None,
    fill: Mapping[str, Any] | None = None,
    cache: str | None = None,
    skip: bool = False,
) -> Decoded:
    """The records of Parquet files.

    Args:
        root: the folder that ``files`` are relative to.
        files: paths; the records are in this order.
        fields: the columns that become fields; None: all.
        fill: for a column the value that stands for its nulls.
        cache: a folder for the decoded rows, which the ranks of a host share: the first one decodes, the others wait.
            They stay there until somebody removes them. None: each rank decodes into its own memory.
        skip: row groups that can not be read are left out; each rank then decodes into its own memory.

    Raises:
        DataError: a file is damaged, a column is of a type that no field has, has nulls without a ``fill``, or is
            not the same in all files.
        UsageError: pyarrow is not installed, or ``fields`` or ``fill`` names what is no column.
    """
    paths = [os.path.join(root, name) for name in files]
    parquet = _Parquet(paths, fields, fill or {})
    if cache is not None:
        try:
            return Decoded(parquet.source(_decode_once(parquet, cache), True), parquet.counts())
        except DataError:
            if not skip:
                raise
    descriptor = os.memfd_create("launcher-parquet", os.MFD_CLOEXEC)
    try:
        damage = parquet.decode(descriptor, skip)
        found = tuple((name, some) for name, some in zip(files, damage, strict=True) if some)
        return Decoded(parquet.source(f"/proc/self/fd/{descriptor}", False), parquet.counts(), found)
    finally:
        os.close(descriptor)


def _decode_once(parquet: _Parquet, cache: str) -> str:
    """The file in ``cache`` with the decoded rows: made by whoever comes first."""
    import fcntl

    path = os.path.join(cache, f"parquet-{parquet.key()}.rows")
    os.makedirs(cache, exist_ok=True)
    with open(f"{path}.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # goes with the process that holds it, whatever ends it
        if not os.path.exists(path):
            temporary = f"{path}.part"
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with contextlib.ExitStack() as undo:
                undo.callback(os.unlink, temporary)
                try:
                    parquet.decode(descriptor)
                finally:
                    os.close(descriptor)
                os.rename(temporary, path)
                undo.pop_all()
    return path


class _Parquet:
    def __init__(self, paths: Sequence[str], fields: Sequence[str] | None, fill: Mapping[str, Any]) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise UsageError(f"Parquet needs pyarrow: pip install pyarrow ({error})") from error
        self._arrow, self._read = pyarrow, pyarrow.parquet.ParquetFile
        self._paths, self._fill = list(paths), dict(fill)
        self._first: list[int] = []
        self.columns: list[Column] = []
        self.records = self.stride = 0
        schema = None
        for path in self._paths:
            with self._open(path) as file:
                names = self._names(file.schema_arrow.names, fields, path)
                own = [(name, file.schema_arrow.field(name).type) for name in names]
                if schema is None:
                    schema = own
                    self._lay_out(own, path)
                elif own != schema:
                    raise DataError(
                        f"{path}: the columns are {_described(own)}, in {self._paths[0]} {_described(schema)}; all "
                        "files of a channel must have the same, in the same order",
                        "mismatch",
                        path,
                    )
                self._first.append(self.records)
                self.records += file.metadata.num_rows
        self._stored = self.counts()  # records, as the files' ends say
        for name in self._fill:
            if schema is not None and name not in [column.name for column in self.columns]:
                raise UsageError(f"fill: {name!r} is no column that is read")

    def _open(self, path: str) -> Any:
        try:
            return self._read(path, page_checksum_verification=True)
        except self._arrow.ArrowException as error:
            raise DataError(
                f"{path}: no Parquet file, or a damaged one: {_one_line(error)}", "malformed", path
            ) from error
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}", "unreadable", path) from error

    def _names(self, names: Sequence[str], fields: Sequence[str] | None, path: str) -> list[str]:
        if len(set(names)) != len(names):
            raise DataError(f"{path}: two columns have the same name", "mismatch", path)
        for name in fields or ():
            if name not in names:
                raise UsageError(f"fields: {path} has no column {name!r}; its columns are {', '.join(names)}")
        return [name for name in names if fields is None or name in fields]

    def _lay_out(self, schema: Sequence[tuple[str, Any]], path: str) -> None:
        types = self._arrow.types
        offset = 0
        for name, stored in schema:
            kind = stored.value_type if types.is_dictionary(stored) else stored
            dtype, shape = _number(kind), ()  # type: tuple[str, tuple[int, ...] | None]
            if types.is_fixed_size_list(kind):
                dtype, shape = _number(kind.value_type), (kind.list_size,)
            elif types.is_list(kind) or types.is_large_list(kind):
                dtype, shape = _number(kind.value_type), None
            elif _is_bytes(types, kind):
                dtype, shape = "uint8", None
            if not dtype or (shape is not None and 0 in shape):
                raise DataError(
                    f"{path}: column {name!r} is {kind}; numbers, booleans, lists of them, texts and binary columns "
                    "can be read: leave it out (fields=...), or cast it when the file is written",
                    "mismatch",
                    path,
                )
            item = SIZES[DTYPES.index(dtype)]
            align = 8 if shape is None else item
            offset = (offset + align - 1) // align * align
            self.columns.append(Column(name, dtype, shape, offset))
            offset += _RUN_BYTES if shape is None else item * (shape[0] if shape else 1)
        self.stride = max(8, (offset + 7) // 8 * 8)

    def counts(self) -> tuple[int, ...]:
        """Records of each file."""
        return tuple(end - begin for begin, end in zip(self._first, [*self._first[1:], self.records], strict=True))

    def key(self) -> str:
        """Names the decoded rows: by the files as they are, the columns, and what stands for nulls."""
        import hashlib

        files = [(path, status.st_size, status.st_mtime_ns) for path in self._paths for status in [os.stat(path)]]
        text = repr((_LAYOUT, files, self.columns, sorted(self._fill.items())))
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]

    def source(self, path: str, named: bool) -> Source:
        """The records that were decoded into the file ``path``; ``named``: others can find it, too."""
        from launcher._data import File, decoded_source

        return decoded_source(
            File(path, "mapped"),
            self.records,
            self.stride,
            [
                (
                    column.name,
                    DTYPES.index(column.dtype),
                    None if column.shape is None else list(column.shape),
                    column.offset,
                )
                for column in self.columns
            ],
            list(zip(self._paths, self._first, strict=True)) or [("", 0)],
            named,
        )

    def decode(self, descriptor: int, skip: bool = False) -> list[list[tuple[int, int, str]]]:
        """Writes all rows, a row group at a time, and after them the values of ragged fields.

        Returns, for each file, offset, bytes and error of the row groups that ``skip`` leaves out: then there are fewer
        records.

        Raises:
            DataError: as make_source(). OutputError: the memory or the disk is full.
        """
        import numpy

        row = numpy.dtype(
            {
                "names": [str(number) for number in range(len(self.columns))],
                "formats": [
                    "(2,)u8" if column.shape is None else (column.dtype, column.shape) for column in self.columns
                ],
                "offsets": [column.offset for column in self.columns],
                "itemsize": self.stride,
            }
        )
        end = sum(self._stored) * self.stride
        os.ftruncate(descriptor, max(end, 1))
        damage: list[list[tuple[int, int, str]]] = []
        self._first, self.records = [], 0
        for path, count in zip(self._paths, self._stored, strict=True):
            done, first = 0, self.records
            left_out: list[tuple[int, int, str]] = []
            with self._open(path) as file:
                for group in range(file.num_row_groups):
                    try:
                        table = self._read_group(file, path, group)
                    except DataError as error:
                        if not skip:
                            raise
                        known = file.metadata.row_group(group)
                        nbytes = sum(known.column(column).total_compressed_size for column in range(known.num_columns))
                        left_out.append((error.offset, nbytes, str(error)))
                        count -= known.num_rows
                        continue
                    # Few rows at a time: a column after the other is put into them, while they are in the cache.
                    for batch in table.to_batches(max_chunksize=max(1, _CACHED_BYTES // self.stride)):
                        if batch.num_rows > count - done:
                            break
                        rows = numpy.zeros(batch.num_rows, row)
                        for number, column in enumerate(self.columns):
                            values = self._without_nulls(batch.column(column.name), column, path, done)
                            place = (path, done)
                            end += self._put(values, column, rows[str(number)], place, descriptor, end)
                        _write(descriptor, rows, (first + done) * self.stride)
                        done += batch.num_rows
            if done != count:
                raise DataError(
                    f"{path}: the row groups have {done} rows or more, the file says {count}; it is damaged",
                    "malformed",
                    path,
                )
            self._first.append(first)
            self.records += count
            damage.append(left_out)
        return damage

    def _read_group(self, file: Any, path: str, group: int) -> Any:
        try:
            return file.read_row_group(group, columns=[column.name for column in self.columns])
        except (self._arrow.ArrowException, OSError) as error:
            offset = _offset_of(file.metadata.row_group(group))
            raise DataError(
                f"{path}: byte {offset}: row group {group}, which begins there, can not be read: {_one_line(error)}; "
                "copy the file again, or leave the row group out (on_bad=skip)",
                "malformed",
                path,
                offset,
            ) from error

    def _without_nulls(self, values: Any, column: Column, path: str, first: int) -> Any:
        if self._arrow.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        if values.null_count == 0:
            return values
        if column.name in self._fill and not _is_list(self._arrow.types, values.type):
            value = self._fill[column.name]
            try:
                return values.fill_null(value)
            except (self._arrow.ArrowException, TypeError, ValueError) as error:
                raise UsageError(f"fill: {value!r} is no value for column {column.name!r}: {error}") from error
        raise _null(column, path, first + values.is_null().index(True).as_py())

    def _put(self, array: Any, column: Column, part: Any, place: tuple[str, int], descriptor: int, end: int) -> int:
        """Fills ``part``, the column's field in some rows. Returns how many bytes of values were written at ``end``."""
        import numpy

        if len(array) == 0:
            return 0
        types = self._arrow.types
        path, first = place
        if column.shape == ():
            part[:] = array.to_numpy(zero_copy_only=False)
            return 0
        if column.shape is not None:
            values = array.flatten()
            if values.null_count:
                raise _null(column, path, first + values.is_null().index(True).as_py() // column.shape[0])
            part[:] = values.to_numpy(zero_copy_only=False).reshape(part.shape)
            return 0
        if _is_list(types, array.type):
            offsets = array.offsets.to_numpy()
            kept = array.values.slice(offsets[0], offsets[-1] - offsets[0])
            if kept.null_count:
                null = offsets[0] + kept.is_null().index(True).as_py()
                raise _null(column, path, first + int(numpy.searchsorted(offsets, null, "right")) - 1)
            values = kept.to_numpy(zero_copy_only=False)
        else:
            texts = array.cast(self._arrow.large_binary())
            _, places, data = texts.buffers()
            offsets = numpy.frombuffer(places, numpy.int64)[texts.offset : texts.offset + len(texts) + 1]
            values = numpy.frombuffer(data or b"", numpy.uint8)[offsets[0] : offsets[-1]]
        values = numpy.ascontiguousarray(values, column.dtype)
        part[:, 0] = end + (offsets[:-1] - offsets[0]).astype(numpy.uint64) * values.itemsize
        part[:, 1] = numpy.diff(offsets)
        _write(descriptor, values, end)
        return int(values.nbytes)


def _offset_of(group: Any) -> int:
    """Where a row group begins in its file, as the file's end says."""
    columns = [group.column(number) for number in range(group.num_columns)]
    pages = [(column.dictionary_page_offset, column.data_page_offset) for column in columns]
    return min((page for both in pages for page in both if page), default=-1)


def _one_line(error: BaseException) -> str:
    return " ".join("".join(letter if letter.isprintable() else " " for letter in str(error)).split())


def _described(schema: Sequence[tuple[str, Any]]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in schema)


def _null(column: Column, path: str, record: int) -> DataError:
    return DataError(
        f"{path}: record {record}: column {column.name!r} has a null here; give a value that stands for it "
        f"(fill={{{column.name!r}: ...}}; not for lists), or leave the column out (fields=...)",
        "mismatch",
        path,
        record=record,
    )


def _is_list(types: Any, kind: Any) -> bool:
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _is_bytes(types: Any, kind: Any) -> bool:
    names = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "fixed_size_binary")
    return any(getattr(types, f"is_{name}")(kind) for name in names if hasattr(types, f"is_{name}"))


def _number(kind: Any) -> str:
    """The dtype of an Arrow type; "" where it is no number."""
    name = str(kind)
    name = {"halffloat": "float16", "float": "float32", "double": "float64"}.get(name, name)
    return name if name in DTYPES else ""


def _write(descriptor: int, array: Any, offset: int) -> None:
    from launcher.errors import OutputError

    if array.nbytes == 0:
        return
    view = memoryview(array.reshape(-1).view("u1"))
    while view:
        try:
            count = os.pwrite(descriptor, view, offset)
        except OSError as error:
            raise OutputError(
                f"the decoded rows of a Parquet channel could not be kept: {error.strerror}; they take "
                f"{offset + len(view)} bytes or more: read fewer columns (fields=...)"
            ) from error
        view, offset = view[count:], offset + count
