"""Changes of fields that the native part makes on the way into the batch, a column at a time.

For what these can not do, a function of your own takes the whole batch: ``Loader(..., transform=function)``.
"""

from __future__ import annotations

from launcher.data.fields import DTYPES, dtype_number, source_fields
from launcher.errors import UsageError
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, TypeAlias

    from launcher._data import Source

    Change: TypeAlias = "Normalise | OneHot | Cast"

# As native (data::Change::Kind).
_AFFINE, _ONE_HOT, _CAST = range(3)


class Normalise(Record):
    """``(value - mean) / std`` for the field, as ``dtype`` (float32 or float64).

    ``mean``, ``std``: a number, or an array that NumPy broadcasts to one record's values.
    """

    field: str
    mean: Any = 0.0
    std: Any = 1.0
    dtype: str = "float32"


class OneHot(Record):
    """An integer field from 0 to ``classes`` - 1 as ``classes`` values: 1 at its place, 0 elsewhere.

    A class outside of that is a DataError (problem ``mismatch``) of its record.
    """

    field: str
    classes: int
    dtype: str = "float32"


class Cast(Record):
    """The field as ``dtype``. A value with a fraction loses it; one that the type can not hold is a DataError."""

    field: str
    dtype: str


def split(transform: object) -> tuple[list[Change], list[Callable[[Any], Any]]]:
    """The native changes and the functions in ``transform``: None, one, or a sequence of them, native ones first.

    Raises:
        UsageError: it is something else, or a native change comes after a function.
    """
    given = [] if transform is None else list(transform) if isinstance(transform, (list, tuple)) else [transform]
    native: list[Change] = []
    functions: list[Callable[[Any], Any]] = []
    for one in given:
        if isinstance(one, (Normalise, OneHot, Cast)):
            if functions:
                raise UsageError(f"transform {one!r} comes after a function; native ones come first")
            native.append(one)
        elif callable(one):
            functions.append(one)
        else:
            raise UsageError(
                f"transform {one!r} is no function of a batch, nor one of Normalise, OneHot and Cast "
                "(launcher.data.transforms)"
            )
    return native, functions


def change(source: Source, changes: Sequence[Change]) -> Source:
    """``source`` with ``changes`` made one after the other.

    Raises:
        UsageError: a field is not there, or can not be changed so.
    """
    from launcher import _data

    for one in changes:
        try:
            source = _data.changed_source(source, [_native(source, one)])
        except ValueError as error:
            raise UsageError(f"transform {one!r}: {error}") from None
    return source


def _native(source: Source, one: Change) -> tuple[int, str, int, list[float], list[float], int]:
    """Kind, field, dtype of the result, scale, shift, classes: as _data.changed_source() takes them."""
    dtype = dtype_number(one.dtype)
    if isinstance(one, OneHot):
        return _ONE_HOT, one.field, dtype, [], [], one.classes
    if isinstance(one, Cast):
        return _CAST, one.field, dtype, [], [], 0
    if DTYPES[dtype] not in ("float32", "float64"):
        raise UsageError(f"transform {one!r}: expected dtype 'float32' or 'float64'")
    import numpy

    found = [field for field in source_fields(source.fields) if field.name == one.field]
    shape = found[0].shape if found else ()
    mean, std = numpy.asarray(one.mean, numpy.float64), numpy.asarray(one.std, numpy.float64)
    if not (std > 0).all():
        raise UsageError(f"transform {one!r}: std must be above 0 everywhere")
    try:
        # One of each where it is the same for all values: the loop is then a faster one.
        wanted = () if mean.size == std.size == 1 else shape
        scale = numpy.broadcast_to(1.0 / std.reshape(std.shape if wanted else ()), wanted)
        shift = numpy.broadcast_to((-mean / std).reshape((-mean / std).shape if wanted else ()), wanted)
    except ValueError:
        raise UsageError(f"transform {one!r}: mean or std does not fit a record of shape {list(shape)}") from None
    return _AFFINE, one.field, dtype, scale.ravel().tolist(), shift.ravel().tolist(), 0
