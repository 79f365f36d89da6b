"""Gradients on a GPU: many tensors into one bucket and back, and 16 bits for the wire with the error kept.

All work is enqueued on a stream and not waited for; tensors must stay alive until it is done, as with any kernel. The
calls do not read anything back, so a CUDA graph may capture them. Allreduce between GPUs is in
launcher.collectives.cuda_ipc.
"""

from __future__ import annotations

import math
import sys

from launcher.collectives.elements import SIZES, DType
from launcher.errors import CollectiveError, UsageError
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from launcher._native import CudaDevice

PACKED = (DType.float32, DType.float16, DType.bfloat16)
"""Types that a bucket and its tensors may have."""

WIRE = (DType.float16, DType.bfloat16)
"""Types that go over the wire."""

# A tensor that begins at a multiple of this many elements is moved by 16 bytes at a time, whatever its type.
_ALIGNMENT = 8
_NAMES = {dtype.name: dtype for dtype in DType}
# __cuda_array_interface__ has no bfloat16: such arrays come from torch, or are a GpuArray.
_TYPESTR = {
    "<f4": DType.float32,
    "<f8": DType.float64,
    "<f2": DType.float16,
    "<i4": DType.int32,
    "<i8": DType.int64,
    "|u1": DType.uint8,
}


def find_devices(*, free_memory: bool = False) -> tuple[list[CudaDevice], str]:
    """The GPUs that this process sees, or none and the reason. Starts the CUDA driver: do not fork ranks afterwards."""
    from launcher._native import cuda_devices

    return cuda_devices(free_memory=free_memory)


def require_device(index: int) -> CudaDevice:
    """GPU ``index`` of this process.

    Raises:
        UsageError: there is no such GPU, and why.
    """
    devices, reason = find_devices()
    if not devices:
        raise UsageError(
            f"no GPU is visible to this process: {reason}; see nvidia-smi and CUDA_VISIBLE_DEVICES, and for containers "
            "whether the NVIDIA runtime is used"
        )
    if not 0 <= index < len(devices):
        raise UsageError(f"GPU {index} is not visible to this process, which sees {len(devices)}, counted from 0")
    return devices[index]


class GpuMemory(Record):
    """The memory of an array on a GPU: address, number and type of elements, number of the GPU."""

    pointer: int
    count: int
    dtype: DType
    device: int

    @property
    def nbytes(self) -> int:
        """Bytes from the first element to the last."""
        return self.count * SIZES[self.dtype]


def memory_of(array: Any, what: str) -> GpuMemory:
    """The memory of a CUDA tensor of torch, or of an array with ``__cuda_array_interface__``.

    Args:
        what: the argument's name, for messages.

    Raises:
        TypeError: no array on a GPU, or a type of element that is not known here.
        ValueError: not contiguous.
    """
    if hasattr(array, "data_ptr"):
        name = str(array.dtype).rpartition(".")[2]
        if not array.is_cuda:
            raise TypeError(f"{what}: a tensor on {array.device}; expected one on a GPU")
        if name not in _NAMES:
            raise TypeError(f"{what}: elements of {array.dtype}; expected one of {', '.join(_NAMES)}")
        if not array.is_contiguous():
            raise ValueError(f"{what}: a tensor of strides {tuple(array.stride())}; expected a contiguous one")
        return GpuMemory(array.data_ptr(), array.numel(), _NAMES[name], array.get_device())
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is None:
        raise TypeError(f"{what}: {type(array).__name__}; expected a CUDA tensor or __cuda_array_interface__")
    if isinstance(array, GpuArray):
        return array.memory
    if interface["typestr"] not in _TYPESTR:
        raise TypeError(f"{what}: elements of {interface['typestr']}; expected one of {', '.join(_TYPESTR)}")
    dtype, shape = _TYPESTR[interface["typestr"]], interface["shape"]
    dense = tuple(SIZES[dtype] * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    strides = interface.get("strides")
    if strides is not None and tuple(strides) != dense and math.prod(shape) > 1:
        raise ValueError(f"{what}: an array of strides {tuple(strides)}; expected a C-contiguous one")
    device = getattr(getattr(array, "device", None), "id", 0)
    return GpuMemory(interface["data"][0], math.prod(shape), dtype, device)


class GpuArray:
    """Flat memory on a GPU that is not a library's own: ``torch.as_tensor(array.as_bytes(), device="cuda")`` sees it.

    ``owner`` is kept alive with it.
    """

    def __init__(self, memory: GpuMemory, owner: object) -> None:
        self.memory, self._owner = memory, owner

    def as_bytes(self) -> GpuArray:
        """The same memory as uint8: ``.view(dtype)`` of a library gives it any type, bfloat16 too."""
        return GpuArray(GpuMemory(self.memory.pointer, self.memory.nbytes, DType.uint8, self.memory.device), self)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        typestr = {dtype: text for text, dtype in _TYPESTR.items()}.get(self.memory.dtype)
        if typestr is None:
            raise AttributeError(f"{self.memory.dtype.name} has no name in this interface; use as_bytes()")
        return {"shape": (self.memory.count,), "typestr": typestr, "data": (self.memory.pointer, False), "version": 3}


def stream_of(stream: Any, device: int) -> int:
    """A stream as a number. None: torch's current stream of the GPU where torch is loaded, else the default stream."""
    if stream is None:
        torch = sys.modules.get("torch")
        return int(torch.cuda.current_stream(device).cuda_stream) if torch is not None else 0
    for name in ("cuda_stream", "ptr"):  # torch's and CuPy's
        if hasattr(stream, name):
            return int(getattr(stream, name))
    return int(stream)


def enqueue(work: Any, *arguments: Any) -> None:
    """Calls native code that starts work on a GPU; what the CUDA runtime refuses becomes a CollectiveError."""
    try:
        work(*arguments)
    except RuntimeError as error:
        raise CollectiveError(f"GPU: {error}", "system") from error


class GradientBucket:
    """Many tensors as one: packed, scaled and converted by one kernel, and back by another.

    The layout is fixed here; where the tensors lie may change from step to step. Values are multiplied by ``scale`` in
    float32 and rounded once, to nearest even; beyond the range of float16 they become infinite, as with ``tensor.to``.

    Args:
        tensors: contiguous, of one GPU and one type (float32, float16 or bfloat16); they are looked at, not kept.
        dtype: of the bucket: float32, float16 or bfloat16.
        dense: lay tensors out without gaps (DDP does). Else each begins at a multiple of 8 elements, which is what 16
            bytes at a time need; gaps are never written, so give a bucket that was zeroed once.
        chunk: elements that a block of threads takes, a multiple of 8; 0: 32,768.

    Raises:
        UsageError: no such GPU.
        TypeError, ValueError: tensors or types that do not fit.
    """

    def __init__(
        self, tensors: Sequence[Any], dtype: DType = DType.float32, *, dense: bool = False, chunk: int = 0
    ) -> None:
        if not tensors:
            raise ValueError("tensors: none; expected at least one")
        if dtype not in PACKED:
            raise TypeError(f"dtype: {DType(dtype).name}; expected one of {', '.join(kind.name for kind in PACKED)}")
        if chunk < 0 or chunk % _ALIGNMENT:
            raise ValueError(f"chunk: {chunk}; expected a multiple of {_ALIGNMENT}, or 0")
        found = [memory_of(tensor, f"tensors[{number}]") for number, tensor in enumerate(tensors)]
        first = found[0]
        if first.dtype not in PACKED:
            raise TypeError(f"tensors[0]: {first.dtype.name}; expected one of {', '.join(k.name for k in PACKED)}")
        require_device(first.device)
        self.dtype, self.tensor_dtype, self.device = DType(dtype), first.dtype, first.device
        self.counts = tuple(memory.count for memory in found)
        offsets = []
        end = 0
        for count in self.counts:
            if not dense:
                end = -(-end // _ALIGNMENT) * _ALIGNMENT
            offsets.append(end)
            end += count
        self.offsets = tuple(offsets)
        """Of each tensor in the bucket, in elements."""
        self.count = end
        """Elements that a bucket needs."""
        from launcher._native import CudaBucket

        self._native = CudaBucket(self.counts, self.offsets, int(self.tensor_dtype), int(self.dtype), chunk)
        self._known: list[int] = []
        self._pointers(tensors)

    @property
    def nbytes(self) -> int:
        """Bytes that a bucket needs."""
        return self.count * SIZES[self.dtype]

    def pack(self, tensors: Sequence[Any], bucket: Any, scale: float = 1.0, stream: Any = None) -> None:
        """bucket[offsets[i]:] = tensors[i] * scale, for all i. ``bucket``: an array of :attr:`dtype`, or longer."""
        self._move(tensors, bucket, scale, stream, False)

    def unpack(self, bucket: Any, tensors: Sequence[Any], scale: float = 1.0, stream: Any = None) -> None:
        """tensors[i] = bucket[offsets[i]:] * scale, for all i."""
        self._move(tensors, bucket, scale, stream, True)

    def _move(self, tensors: Sequence[Any], bucket: Any, scale: float, stream: Any, unpack: bool) -> None:
        memory = memory_of(bucket, "bucket")
        if memory.dtype != self.dtype or memory.count < self.count or memory.device != self.device:
            raise ValueError(
                f"bucket: {memory.count} of {memory.dtype.name} on GPU {memory.device}; expected at least {self.count} "
                f"of {self.dtype.name} on GPU {self.device}"
            )
        pointers = self._pointers(tensors)
        enqueue(self._native.move, pointers, memory.pointer, scale, self.device, stream_of(stream, self.device), unpack)

    def _pointers(self, tensors: Sequence[Any]) -> list[int]:
        """Addresses of the tensors. Those of the last call were checked then."""
        if len(tensors) != len(self.counts):
            raise ValueError(f"tensors: {len(tensors)}; expected {len(self.counts)}")
        if self._known and all(hasattr(tensor, "data_ptr") for tensor in tensors):
            pointers = [tensor.data_ptr() for tensor in tensors]
            if pointers == self._known and tuple(tensor.numel() for tensor in tensors) == self.counts:
                return pointers
        pointers = []
        for number, (tensor, count) in enumerate(zip(tensors, self.counts, strict=True)):
            memory = memory_of(tensor, f"tensors[{number}]")
            if memory.count != count or memory.dtype != self.tensor_dtype or memory.device != self.device:
                raise ValueError(
                    f"tensors[{number}]: {memory.count} of {memory.dtype.name} on GPU {memory.device}; expected "
                    f"{count} of {self.tensor_dtype.name} on GPU {self.device}"
                )
            pointers.append(memory.pointer)
        self._known = pointers
        return pointers


class Compressor:
    """float32 to 16 bits for the wire and back; the rounding error of a call can be kept for the next one.

    With ``error``: v = source + error; target = v to nearest even; error = v - target, 0 where that is no number.
    float16 saturates at +-65504 where v is finite. The bits are those of the CPU's ``compress``.

    Args:
        wire: float16 or bfloat16.
        error: float32 on a GPU, as many elements as every source, zeroed before the first call; None: not kept.

    Raises:
        UsageError: no such GPU.
        TypeError, ValueError: types that do not fit.
    """

    def __init__(self, wire: DType = DType.bfloat16, error: Any = None) -> None:
        if wire not in WIRE:
            raise TypeError(f"wire: {DType(wire).name}; expected float16 or bfloat16")
        self.wire = DType(wire)
        self.error = error
        self._memory = None if error is None else memory_of(error, "error")
        if self._memory is not None:
            if self._memory.dtype != DType.float32:
                raise TypeError(f"error: {self._memory.dtype.name}; expected float32")
            require_device(self._memory.device)

    def compress(self, source: Any, target: Any, stream: Any = None) -> None:
        """target = source (float32) in :attr:`wire`'s type. As many elements each; they do not overlap."""
        values, wire = memory_of(source, "source"), memory_of(target, "target")
        self._check(values, "source", wire, "target")
        if self._memory is not None and (self._memory.count, self._memory.device) != (values.count, values.device):
            raise ValueError(
                f"source: {values.count} elements on GPU {values.device}, but the error that is kept has "
                f"{self._memory.count} on GPU {self._memory.device}; a compressor belongs to one source"
            )
        self._run(values, wire, self._memory.pointer if self._memory is not None else 0, stream, False)

    def decompress(self, source: Any, target: Any, stream: Any = None) -> None:
        """target (float32) = source (of :attr:`wire`'s type)."""
        wire, values = memory_of(source, "source"), memory_of(target, "target")
        self._check(values, "target", wire, "source")
        self._run(values, wire, 0, stream, True)

    def _run(self, values: GpuMemory, wire: GpuMemory, error: int, stream: Any, decompress: bool) -> None:
        from launcher._native import cuda_compress

        device = values.device
        number = stream_of(stream, device)
        enqueue(
            cuda_compress, values.pointer, wire.pointer, error, values.count, int(self.wire), device, number, decompress
        )

    def _check(self, values: GpuMemory, values_name: str, wire: GpuMemory, wire_name: str) -> None:
        if values.dtype != DType.float32:
            raise TypeError(f"{values_name}: {values.dtype.name}; expected float32")
        if wire.dtype != self.wire:
            raise TypeError(f"{wire_name}: {wire.dtype.name}; expected {self.wire.name}")
        if (values.count, values.device) != (wire.count, wire.device):
            raise ValueError(
                f"{values_name} has {values.count} elements on GPU {values.device}, {wire_name} {wire.count} on GPU "
                f"{wire.device}; expected as many on the same"
            )
