"""The C structures of DLPack, read in place: NumPy's reader has no bfloat16, and may not be there at all.

Layouts: dlpack.h, version 1.1 (https://dmlc.github.io/dlpack/latest/c_api.html).
"""

from __future__ import annotations

import ctypes

from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_READ_ONLY = 1


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    ]


class Exported(Record):
    """An array's memory. ``code``, ``bits``, ``lanes``: type of element; ``strides``: in elements, None for dense."""

    pointer: int
    code: int
    bits: int
    lanes: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    read_only: bool

    @property
    def contiguous(self) -> bool:
        """Whether the elements follow each other in C order."""
        if self.strides is None or 0 in self.shape:
            return True
        dense = 1
        for extent, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if extent != 1 and stride != dense:
                return False
            dense *= extent
        return True


def export(array: Any) -> tuple[Exported, Any]:
    """The memory of ``array``, and the capsule that must live as long as it is used.

    Raises:
        BufferError: the array does not give its memory.
    """
    try:
        capsule = array.__dlpack__(max_version=(1, 1))
    except TypeError:  # made before versions were
        capsule = array.__dlpack__()
    api = ctypes.pythonapi
    api.PyCapsule_IsValid.argtypes = api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    if api.PyCapsule_IsValid(capsule, b"dltensor_versioned"):
        versioned = _Versioned.from_address(api.PyCapsule_GetPointer(capsule, b"dltensor_versioned"))
        if versioned.major != 1:
            raise BufferError(f"it speaks version {versioned.major}.{versioned.minor} of DLPack, 1.x was asked for")
        tensor, read_only = versioned.tensor, bool(versioned.flags & _READ_ONLY)
    else:
        tensor, read_only = _DLTensor.from_address(api.PyCapsule_GetPointer(capsule, b"dltensor")), False
    rank = tensor.ndim
    return (
        Exported(
            pointer=(tensor.data or 0) + tensor.byte_offset,
            code=tensor.code,
            bits=tensor.bits,
            lanes=tensor.lanes,
            shape=tuple(tensor.shape[:rank]),
            strides=tuple(tensor.strides[:rank]) if tensor.strides else None,
            read_only=read_only,
        ),
        capsule,
    )
