"""Arrays of any library, seen as memory: pointer, number and type of elements.

Libraries are used where their own arrays come in; none is imported for anything else.
"""

from __future__ import annotations

import sys
from ctypes import addressof, c_char

from launcher.collectives.elements import SIZES, DType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

_NAMES = {dtype.name: dtype for dtype in DType}
_numpy_types: dict[Any, DType] = {}  # of numpy.dtype; filled as they are met
_torch_types: dict[Any, DType] = {}

# DLPack: kind of element and its bits -> type. Kinds: 0 signed, 1 unsigned, 2 floating point, 4 bfloat16, 6 bool.
_DLPACK = {
    (2, 32): DType.float32,
    (2, 64): DType.float64,
    (2, 16): DType.float16,
    (4, 16): DType.bfloat16,
    (0, 8): DType.int8,
    (1, 8): DType.uint8,
    (0, 16): DType.int16,
    (0, 32): DType.int32,
    (0, 64): DType.int64,
    (6, 8): DType.bool,
    (1, 16): DType.uint16,
    (1, 32): DType.uint32,
    (1, 64): DType.uint64,
}
_DLPACK_CPU = (1, 3, 11)  # CPU, and CPU memory that CUDA or ROCm has pinned
_KINDS = "float32, float64, float16, bfloat16, int8 to int64, uint8 to uint64 and bool"


class View:
    """The memory of an array. ``make(shape)`` gives a new array of the same kind and type."""

    __slots__ = ("_keep", "array", "count", "dtype", "make", "pointer", "shape")

    def __init__(
        self,
        array: Any,
        pointer: int,
        dtype: DType,
        shape: tuple[int, ...],
        count: int,
        make: Callable[[tuple[int, ...]], Any],
        keep: Any = None,
    ) -> None:
        self.array = array
        self._keep = keep  # has the memory, where the array alone does not
        self.pointer, self.dtype, self.shape, self.count, self.make = pointer, dtype, shape, count, make

    @property
    def nbytes(self) -> int:
        return self.count * SIZES[self.dtype]

    def overlaps(self, other: View) -> bool:
        """Whether the two share a byte."""
        return self.pointer < other.pointer + other.nbytes and other.pointer < self.pointer + self.nbytes


def view(array: Any, what: str, *, writable: bool) -> View:
    """The memory of ``array``: NumPy, a CPU tensor of torch, or what has ``__dlpack__`` or ``__array_interface__``.

    Args:
        what: the argument's name, for messages.
        writable: whether it is written to.

    Raises:
        TypeError: no array, or a type of element that collectives do not take.
        ValueError: not in CPU memory, not C-contiguous, or read-only.
    """
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(array, numpy.ndarray):
        return _numpy_view(array, what, writable)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return _torch_view(array, what)
    if hasattr(array, "__dlpack__"):
        return _dlpack_view(array, what, writable)
    if hasattr(array, "__array_interface__"):
        from numpy import asarray

        return _numpy_view(asarray(array), what, writable, original=array)
    raise TypeError(
        f"{what} is of type {type(array).__name__}; expected a NumPy array, a CPU tensor, or an object with __dlpack__ "
        "or __array_interface__ (numpy.asarray makes one of lists and numbers, numpy.frombuffer of bytes)"
    )


def dtype_of_numpy(dtype: Any, what: str) -> DType:
    """The type of a ``numpy.dtype``, bfloat16 of ml_dtypes among them. Raises TypeError."""
    found = _numpy_types.get(dtype)
    if found is None:
        found = _NAMES.get(dtype.name)
        if found is None or not dtype.isnative:
            hint = "; convert with array.astype(array.dtype.newbyteorder('='))" if not dtype.isnative else ""
            hint = "; array.view(real type) shows complex numbers as pairs" if dtype.kind == "c" else hint
            raise TypeError(f"{what} has dtype {dtype}; expected one of {_KINDS}{hint}")
        _numpy_types[dtype] = found
    return found


def dtype_of_torch(dtype: Any, what: str) -> DType:
    """The type of a ``torch.dtype``. Raises TypeError."""
    found = _torch_types.get(dtype)
    if found is None:
        found = _NAMES.get(str(dtype).removeprefix("torch."))
        if found is None:
            raise TypeError(f"{what} has dtype {dtype}; expected one of {_KINDS}")
        _torch_types[dtype] = found
    return found


def _numpy_view(array: Any, what: str, writable: bool, original: Any = None) -> View:
    dtype = _numpy_types.get(array.dtype)
    if dtype is None:
        dtype = dtype_of_numpy(array.dtype, what)
    flags = array.flags
    if not flags.c_contiguous:
        raise _not_contiguous(what, f"strides {array.strides}", "numpy.ascontiguousarray(array)")
    if writable and not flags.writeable:
        raise ValueError(f"{what} is read-only and would be written to; pass array.copy(), or out=")
    kind = type(array)

    def make(shape: tuple[int, ...]) -> Any:
        import numpy

        return numpy.empty(shape, array.dtype) if kind is numpy.ndarray else numpy.empty_like(array, shape=shape)

    pointer = 0
    if flags.writeable:
        try:
            pointer = addressof(c_char.from_buffer(array))  # a third of the time of what works for all arrays
        except (TypeError, ValueError):
            pass  # no byte in it, or a type that NumPy shows to nobody (ml_dtypes)
    if not pointer:
        pointer = array.__array_interface__["data"][0]
    return View(array if original is None else original, pointer, dtype, array.shape, array.size, make)


def _torch_view(tensor: Any, what: str) -> View:
    if not tensor.is_cpu:
        raise _not_on_cpu(what, str(tensor.device))
    if tensor.layout is not sys.modules["torch"].strided:
        raise ValueError(f"{what} is a tensor of layout {tensor.layout}; pass tensor.to_dense()")
    if not tensor.is_contiguous():
        raise _not_contiguous(what, f"strides {tensor.stride()}", "tensor.contiguous()")
    dtype = _torch_types.get(tensor.dtype)
    if dtype is None:
        dtype = dtype_of_torch(tensor.dtype, what)

    def make(shape: tuple[int, ...]) -> Any:
        return tensor.new_empty(shape)

    return View(tensor, tensor.data_ptr(), dtype, tensor.shape, tensor.numel(), make)


def _dlpack_view(array: Any, what: str, writable: bool) -> View:
    device = array.__dlpack_device__()[0]
    if device not in _DLPACK_CPU:
        raise _not_on_cpu(what, f"DLPack device {int(device)}")
    from launcher.collectives import dlpack

    try:
        tensor, capsule = dlpack.export(array)
    except BufferError as error:
        raise ValueError(
            f"{what}: {type(array).__name__} does not give its memory: {error}; pass a copy of it"
        ) from None
    if writable and tensor.read_only:
        raise ValueError(f"{what} is read-only and would be written to; pass a copy, or out=")
    dtype = _DLPACK.get((tensor.code, tensor.bits)) if tensor.lanes == 1 else None
    if dtype is None:
        raise TypeError(
            f"{what} has DLPack type (code {tensor.code}, {tensor.bits} bits, {tensor.lanes} lanes); "
            f"expected one of {_KINDS}"
        )
    if not tensor.contiguous:
        raise _not_contiguous(what, f"strides {tensor.strides}", "a contiguous copy")

    def make(shape: tuple[int, ...]) -> Any:
        try:
            namespace = array.__array_namespace__()
        except AttributeError:
            raise TypeError(f"no new {type(array).__name__} can be made for the result; pass out=") from None
        return namespace.empty(shape, dtype=array.dtype)

    # The unused capsule gives the memory back when it goes; that must not be before the last use of it here.
    return View(array, tensor.pointer, dtype, tensor.shape, product(tensor.shape), make, capsule)


def shared_array(buffer: Any, shape: Sequence[int], dtype: Any) -> Any:
    """An array on ``buffer`` (of ctypes): a tensor when ``dtype`` is torch's, else of NumPy."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(dtype, torch.dtype):
        if not product(shape):
            return torch.zeros(tuple(shape), dtype=dtype)
        return torch.frombuffer(buffer, dtype=dtype, count=product(shape)).view(tuple(shape))
    import numpy

    return numpy.frombuffer(buffer, dtype=numpy_type(dtype), count=product(shape)).reshape(shape)


def element_type(dtype: Any) -> DType:
    """The DType that ``dtype`` (a name, or NumPy's or torch's type) stands for. Raises TypeError."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(dtype, torch.dtype):
        return dtype_of_torch(dtype, "the new array")
    return dtype_of_numpy(numpy_type(dtype), "the new array")


def numpy_type(dtype: Any) -> Any:
    """``numpy.dtype(dtype)``; "bfloat16" is that of ml_dtypes. Raises TypeError."""
    import numpy

    if isinstance(dtype, DType):
        dtype = dtype.name
    if dtype == "bfloat16":
        extension = sys.modules.get("ml_dtypes")
        if extension is None:
            raise TypeError("NumPy has no bfloat16 of its own: import ml_dtypes first, or pass torch.bfloat16")
        dtype = extension.bfloat16
    return numpy.dtype(dtype)


def product(shape: Sequence[int]) -> int:
    """Number of elements of an array of this shape."""
    count = 1
    for extent in shape:
        count *= extent
    return count


def _not_contiguous(what: str, strides: str, remedy: str) -> ValueError:
    return ValueError(f"{what} is not C-contiguous ({strides}); pass {remedy}")


def _not_on_cpu(what: str, device: str) -> ValueError:
    return ValueError(f"{what} is on {device}; expected CPU memory: copy it there first")
