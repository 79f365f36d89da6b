"""Objects, parameters and optimizer state, from one rank to all or from all to all.

Objects travel as pickles, as Horovod's API has it: between the ranks of one job, which run the same code as the same
user, and over the job's own group, which nobody else can join.
"""

from __future__ import annotations

import importlib
import pickle

import torch

from launcher.errors import UsageError
from launcher.horovod.torch.basics import rank
from launcher.horovod.torch.process_sets import ProcessSet, global_process_set
from launcher.horovod.torch.requests import Call, call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any


def pickled(obj: Any) -> bytes:
    """The object as bytes; functions and classes of the script too where cloudpickle is installed."""
    try:
        dumps = importlib.import_module("cloudpickle").dumps
    except ImportError:
        dumps = pickle.dumps
    data: bytes = dumps(obj)
    return data


def _tensor_of(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.untyped_storage().tolist()) if tensor.numel() < 64 else tensor.numpy().tobytes()


def broadcast_object(
    obj: Any = None, root_rank: int = 0, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Any:
    """The object of rank ``root_rank``; on that rank ``obj`` itself."""
    is_root = rank() == root_rank
    data = _tensor_of(pickled(obj)) if is_root else None
    size = torch.tensor([0 if data is None else data.numel()])
    options: dict[str, Any] = {"root_rank": root_rank, "in_place": True, "wake": False}
    call("broadcast", [size], process_set, name and f"{name}.size", **options).wait()
    if data is None:
        data = torch.empty(int(size), dtype=torch.uint8)
    call("broadcast", [data], process_set, name and f"{name}.data", **options).wait()
    return obj if is_root else pickle.loads(_bytes_of(data))  # noqa: S301 - see the module's docstring


def allgather_object(obj: Any, name: str | None = None, process_set: ProcessSet = global_process_set) -> list[Any]:
    """The objects of all ranks, by rank."""
    data = _tensor_of(pickled(obj))
    sizes, everybody = call(
        "allgather", [torch.tensor([data.numel()]), data], process_set, name, grouped=True, wake=False
    ).wait()
    pieces = everybody.split(sizes.tolist())
    return [pickle.loads(_bytes_of(piece.clone())) for piece in pieces]  # noqa: S301 - see the module's docstring


def broadcast_parameters(params: Any, root_rank: int) -> None:
    """Makes parameters those of rank ``root_rank``, in place.

    Args:
        params: ``model.state_dict()``, or parameters, named (pairs) or not.

    Raises:
        ValueError: it is none of these.
    """
    named = _named(params)
    calls = [
        call(
            "broadcast",
            [tensor],
            global_process_set,
            None if name is None else f"parameter.{name}",
            root_rank=root_rank,
            in_place=True,
            wake=False,
        )
        for name, tensor in named
        if isinstance(tensor, torch.Tensor)
    ]
    _wait_all(calls)


def _named(params: Mapping[str, Any] | Iterable[Any]) -> list[tuple[str | None, Any]]:
    if isinstance(params, dict):
        return sorted(params.items())
    if isinstance(params, torch.Tensor) or not hasattr(params, "__iter__"):
        raise ValueError(
            f"broadcast_parameters: found {type(params).__name__}; expected a state dict, or parameters, named or not"
        )
    return [item if isinstance(item, tuple) else (None, item) for item in params]


def _wait_all(calls: list[Call]) -> None:
    for submitted in calls:
        submitted.wait()


class _Place:
    """Where a tensor stood in a state dict that was sent without its tensors."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape, self.dtype, self.device = tuple(tensor.shape), tensor.dtype, tensor.device.type

    def empty(self) -> torch.Tensor:
        device = torch.device("cuda", torch.cuda.current_device()) if self.device == "cuda" else "cpu"
        return torch.empty(self.shape, dtype=self.dtype, device=device)


def _without_tensors(value: Any, found: list[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        found.append(value)
        return _Place(value)
    if isinstance(value, dict):
        return {key: _without_tensors(item, found) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_without_tensors(item, found) for item in value)
    return value


def _with_tensors(value: Any, made: list[torch.Tensor]) -> Any:
    if isinstance(value, _Place):
        made.append(value.empty())
        return made[-1]
    if isinstance(value, dict):
        return {key: _with_tensors(item, made) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_with_tensors(item, made) for item in value)
    return value


def broadcast_optimizer_state(optimizer: torch.optim.Optimizer, root_rank: int, model: Any = None) -> None:
    """Makes state and options of an optimizer those of rank ``root_rank``.

    Args:
        model: accepted; sparse parameters need no other treatment here.

    Raises:
        UsageError: the optimizer's parameters are not those of the root's.
    """
    tensors: list[torch.Tensor] = []
    is_root = rank() == root_rank
    skeleton = _without_tensors(optimizer.state_dict(), tensors) if is_root else None
    packed = broadcast_object(skeleton, root_rank)
    if not is_root:
        tensors = []
        packed = _with_tensors(packed, tensors)
    options: dict[str, Any] = {"root_rank": root_rank, "in_place": True, "wake": False}
    _wait_all([call("broadcast", [tensor], global_process_set, None, **options) for tensor in tensors])
    if not is_root:
        _load(optimizer, packed)


def _load(optimizer: torch.optim.Optimizer, packed: dict[str, Any]) -> None:
    """As ``load_state_dict``, but into the groups that schedulers hold, and without casts."""
    groups, theirs = optimizer.param_groups, packed["param_groups"]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in theirs]:
        raise UsageError(
            f"broadcast_optimizer_state: this rank's optimizer has groups of "
            f"{[len(group['params']) for group in groups]} parameters, the root's of "
            f"{[len(group['params']) for group in theirs]}"
        )
    by_number: dict[Any, Any] = {}
    for group, other in zip(groups, theirs, strict=True):
        by_number.update(zip(other["params"], group["params"], strict=True))
        group.update({key: value for key, value in other.items() if key != "params"})
    optimizer.state.clear()
    for number, values in packed["state"].items():
        optimizer.state[by_number.get(number, number)] = values
