"""Fields of a record, and the columns of a batch that are no plain arrays."""

from __future__ import annotations

from launcher.errors import UsageError
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

DTYPES = (
    "float32",
    "float64",
    "float16",
    "bfloat16",
    "int8",
    "uint8",
    "int16",
    "int32",
    "int64",
    "bool",
    "uint16",
    "uint32",
    "uint64",
)
"""Types of element by the number that the native part has for them (native/include/launcher/elements.h)."""

SIZES = (4, 8, 2, 2, 1, 1, 2, 4, 8, 1, 2, 4, 8)
"""Bytes of an element, likewise."""

KINDS = ("fixed", "ragged", "sparse")
"""Kinds of field by their number (native/data/batch.h)."""


class Field(Record):
    """A field of the records.

    ``kind``: ``fixed`` (the same number of values in each record), ``ragged`` (any number of values), ``sparse`` (keys
    and values). ``dtype``: one of :data:`DTYPES`. ``shape``: of one record, () for a scalar; of the dense record where
    it is sparse; () where it is ragged.
    """

    name: str
    kind: str = "fixed"
    dtype: str = "uint8"
    shape: tuple[int, ...] = ()


def dtype_number(name: object) -> int:
    """The number of the dtype that is called ``name``: a text, or a NumPy or torch dtype.

    Raises:
        UsageError: there is no such dtype.
    """
    text = str(getattr(name, "name", None) or getattr(name, "__name__", None) or name).removeprefix("torch.")
    if text not in DTYPES:
        raise UsageError(f"dtype {name!r} is not known; expected one of {', '.join(DTYPES)}")
    return DTYPES.index(text)


def source_fields(described: list[tuple[str, int, int, tuple[int, ...]]]) -> tuple[Field, ...]:
    """``Source.fields`` of the native part in words."""
    return tuple(Field(name, KINDS[kind], DTYPES[dtype], shape) for name, kind, dtype, shape in described)


class Ragged:
    """A column whose rows have different lengths. ``column[row]`` is one row, a view.

    Attributes:
        values: the values of all rows, one after the other (1-D array or tensor).
        offsets: int64, one more than rows; row ``r`` is ``values[offsets[r]:offsets[r + 1]]``.
    """

    __slots__ = ("offsets", "values")

    def __init__(self, values: Any, offsets: Any) -> None:
        self.values, self.offsets = values, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Any:
        number = _row(row, len(self))
        return self.values[int(self.offsets[number]) : int(self.offsets[number + 1])]

    def __iter__(self) -> Iterator[Any]:
        return (self[row] for row in range(len(self)))

    def to_torch(self) -> Ragged:
        """The same memory as tensors."""
        return Ragged(_as_tensor(self.values), _as_tensor(self.offsets))

    def __repr__(self) -> str:
        return f"Ragged({len(self)} rows, {len(self.values)} values of {self.values.dtype})"


class Sparse:
    """Rows of a sparse matrix (CSR). ``column[row]`` is the keys and the values of one row, views.

    Attributes:
        values: the values of all rows, one after the other (1-D array or tensor).
        offsets: int64, one more than rows; row ``r`` has the values ``offsets[r]:offsets[r + 1]``.
        keys: int64, one for each value: its place in the dense row; row-major where ``shape`` has several dimensions.
        shape: of one dense row.
    """

    __slots__ = ("keys", "offsets", "shape", "values")

    def __init__(self, values: Any, offsets: Any, keys: Any, shape: tuple[int, ...]) -> None:
        self.values, self.offsets, self.keys, self.shape = values, offsets, keys, shape

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> tuple[Any, Any]:
        number = _row(row, len(self))
        part = slice(int(self.offsets[number]), int(self.offsets[number + 1]))
        return self.keys[part], self.values[part]

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return (self[row] for row in range(len(self)))

    @property
    def columns(self) -> int:
        """Values of a dense row."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.csr_array`` of rows x columns that shares this memory."""
        from scipy.sparse import csr_array

        return csr_array((self.values, self.keys, self.offsets), shape=(len(self), self.columns))

    def to_torch(self) -> Any:
        """A ``torch.sparse_csr`` tensor of rows x columns that shares this memory; torch wants a row's keys sorted."""
        import torch

        parts = [_as_tensor(part) for part in (self.offsets, self.keys, self.values)]
        return torch.sparse_csr_tensor(*parts, size=(len(self), self.columns), check_invariants=False)

    def to_dense(self) -> Any:
        """A NumPy array of rows x ``shape``. Keys that come twice in a row are added up."""
        import numpy

        values, keys, offsets = (numpy.asarray(part) for part in (self.values, self.keys, self.offsets))
        dense = numpy.zeros((len(self), self.columns), values.dtype)
        rows: Any = numpy.repeat(numpy.arange(len(self)), numpy.diff(offsets))
        numpy.add.at(dense, (rows, keys), values)
        return dense.reshape(len(self), *self.shape)

    def __repr__(self) -> str:
        return f"Sparse({len(self)} rows of {self.shape}, {len(self.values)} values of {self.values.dtype})"


def _row(row: int, rows: int) -> int:
    number = row + rows if row < 0 else row
    if not 0 <= number < rows:
        raise IndexError(f"row {row} of a column with {rows} rows")
    return number


def _as_tensor(array: Any) -> Any:
    import torch

    return torch.as_tensor(array)
