"""Arguments of torch.distributed's calls, in what forms they come, and as the core wants them."""

from __future__ import annotations

import torch
from torch.distributed import distributed_c10d as c10d

from launcher.collectives.elements import FLOATING, DType, ReduceOp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta
    from typing import Any

DTYPES: dict[Any, int] = {getattr(torch, dtype.name): int(dtype) for dtype in DType if hasattr(torch, dtype.name)}
"""torch's types as the core numbers them; uint16 and wider unsigned types are newer than torch 2.2."""

PREMUL_SUM = hash(c10d.ReduceOp.PREMUL_SUM)
# A ReduceOp's hash is its number: the one way to it that costs no second object.
OPS: dict[int, int] = {
    hash(getattr(c10d.ReduceOp, theirs)): int(own)
    for theirs, own in {
        "SUM": ReduceOp.SUM,
        "AVG": ReduceOp.AVERAGE,
        "MIN": ReduceOp.MIN,
        "MAX": ReduceOp.MAX,
        "PRODUCT": ReduceOp.PRODUCT,
        "BAND": ReduceOp.BIT_AND,
        "BOR": ReduceOp.BIT_OR,
        "BXOR": ReduceOp.BIT_XOR,
        "PREMUL_SUM": ReduceOp.SUM,
    }.items()
}
_BYTE = int(DType.uint8)


def listed(tensors: Any) -> list[Any]:
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


def nested(kind: Any, outputs: Any, inputs: Any, opts: Any, *rest: Any) -> tuple[list[Any], list[Any], Any]:
    """Arguments of the list forms: torch.distributed passes lists in lists, others may pass what is inside."""
    del rest  # the timeout of the short forms: the group's holds
    outputs, inputs = listed(outputs), listed(inputs)
    if kind in (c10d.AllgatherOptions, c10d.GatherOptions):
        if outputs and isinstance(outputs[0], torch.Tensor):
            outputs = [outputs]
    elif inputs and isinstance(inputs[0], torch.Tensor):
        inputs = [inputs]
    if isinstance(opts, int) and not isinstance(opts, kind):
        opts = options(kind, None, rootRank=opts)
    return outputs, inputs, options(kind, opts)


def options(kind: Any, opts: Any, op: Any = None, timeout: timedelta | None = None, **fields: Any) -> Any:
    """``opts``, or options made of what the short forms take in their place."""
    if opts is not None and hasattr(opts, "timeout"):
        return opts
    made = kind()
    op = opts if op is None else op
    if op is not None:
        made.reduceOp = op
    if timeout is not None:
        made.timeout = timeout
    for name, value in fields.items():
        setattr(made, "rootRank" if name == "root" else name, value)
    return made


def waited(opts: Any) -> bool:
    """Whether the caller waits at once."""
    return not getattr(opts, "asyncOp", True)


def reducible(tensor: Any) -> bool:
    return tensor.is_cpu and tensor.layout is torch.strided and tensor.dtype in DTYPES


def movable(tensor: Any) -> bool:
    return tensor.is_cpu and tensor.layout is torch.strided and not tensor.is_quantized


def describe(tensor: Any) -> str:
    """For people: which tensors are meant."""
    if tensor.layout is not torch.strided:
        return "sparse tensors"
    return f"{str(tensor.dtype).removeprefix('torch.')} tensors"


def element(tensor: Any) -> tuple[int, int]:
    """The core's type for moving, and how many of it make an element."""
    code = DTYPES.get(tensor.dtype)
    return (_BYTE, tensor.dtype.itemsize) if code is None else (code, 1)


def operation(op: Any, tensor: Any) -> tuple[int, float]:
    """The core's operation and the factor that goes before it.

    Raises:
        ValueError: the type does not have it.
    """
    number = hash(op)
    if number not in OPS:
        raise ValueError(f'{op} is no reduction that backend "launcher" knows')
    if number != PREMUL_SUM:
        return OPS[number], 1.0
    if DTYPES[tensor.dtype] not in FLOATING:
        raise ValueError(f"PREMUL_SUM takes floating point tensors, not {tensor.dtype}")
    # torch 2.13 shows the factor; before, only the way a ReduceOp is pickled does.
    factor = op.factor if hasattr(op, "factor") else op.__getstate__()[1]
    return OPS[number], float(factor)


def agree(operation: str, tensor: Any, others: Sequence[Any], sizes: bool) -> None:
    """Raises ValueError unless all have one type, and ``sizes`` is true."""
    for other in others:
        if other.dtype != tensor.dtype:
            raise ValueError(f"{operation}: tensors of one call have one type, not {tensor.dtype} and {other.dtype}")
    if not sizes:
        raise ValueError(
            f"{operation}: {tensor.numel()} elements do not fit to {[other.numel() for other in others]} on this rank"
        )


def flat(tensor: Any) -> Any:
    return tensor if tensor.is_contiguous() else tensor.detach().contiguous()


def joined(parts: Sequence[Any]) -> Any:
    """The parts one after the other; a view of them where they already lie so."""
    return _row(parts) if _in_a_row(parts) else torch.cat([part.detach().reshape(-1) for part in parts])


def room(parts: Sequence[Any], fresh: bool = False) -> Any:
    """Memory for all parts, one after the other: their own where it lies so."""
    if not fresh and _in_a_row(parts):
        return _row(parts)
    return parts[0].new_empty(sum(part.numel() for part in parts), requires_grad=False)


def spread(target: Any, parts: Sequence[Any]) -> None:
    if parts and target.data_ptr() != parts[0].data_ptr():
        for part, data in zip(parts, target.split([part.numel() for part in parts]), strict=True):
            part.data.copy_(data.view(part.shape))


def _in_a_row(parts: Sequence[Any]) -> bool:
    end = parts[0].data_ptr()
    for part in parts:
        if not part.is_contiguous() or part.data_ptr() != end:
            return False
        end += part.nbytes
    return bool(parts[0].untyped_storage().data_ptr() == parts[-1].untyped_storage().data_ptr())


def _row(parts: Sequence[Any]) -> Any:
    count = sum(part.numel() for part in parts)
    return parts[0].detach().as_strided((count,), (1,))
