"""State of models, optimizers, samplers and plain objects."""

from __future__ import annotations

import copy

import torch

from launcher.horovod.common.elastic import ObjectState
from launcher.horovod.torch.basics import rank
from launcher.horovod.torch.elastic.sampler import ElasticSampler
from launcher.horovod.torch.functions import broadcast_object, broadcast_optimizer_state, broadcast_parameters

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class StateHandler:
    """Saves, restores and sends around one object that has a state dict."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.kept: Any = None
        self.save()

    def save(self) -> None:
        """Keeps a copy of its state."""
        self.kept = copy.deepcopy(self.value.state_dict())

    def restore(self) -> None:
        """Goes back to the copy."""
        self.value.load_state_dict(copy.deepcopy(self.kept))

    def sync(self) -> None:
        """Makes it that of rank 0."""
        self.value.load_state_dict(broadcast_object(self.value.state_dict(), 0))

    def set_value(self, value: Any) -> None:
        """Another object in its place."""
        self.value = value
        self.save()


class ModelStateHandler(StateHandler):
    """Of a module."""

    def sync(self) -> None:
        broadcast_parameters(self.value.state_dict(), root_rank=0)


class OptimizerStateHandler(StateHandler):
    """Of an optimizer."""

    def sync(self) -> None:
        broadcast_optimizer_state(self.value, root_rank=0)


_HANDLERS = (
    (torch.nn.Module, ModelStateHandler),
    (torch.optim.Optimizer, OptimizerStateHandler),
    (ElasticSampler, StateHandler),
)


class TorchState(ObjectState):
    """What a training process has reached.

    Modules, optimizers and ElasticSamplers are saved by their state dicts, all else as objects; each is an attribute.
    """

    def __init__(self, model: Any = None, optimizer: Any = None, **kwargs: Any) -> None:
        self._handlers: dict[str, StateHandler] = {}
        plain = {}
        for name, value in {"model": model, "optimizer": optimizer, **kwargs}.items():
            handler = next((made for kind, made in _HANDLERS if isinstance(value, kind)), None)
            if handler is None:
                plain[name] = value
            else:
                object.__setattr__(self, name, value)
                self._handlers[name] = handler(value)
        super().__init__(broadcast_object, rank, **plain)

    def save(self) -> None:
        for handler in self._handlers.values():
            handler.save()
        super().save()

    def restore(self) -> None:
        for handler in self._handlers.values():
            handler.restore()
        super().restore()

    def sync(self) -> None:
        for handler in self._handlers.values():
            handler.sync()
            handler.save()
        super().sync()

    def reset(self) -> None:
        for handler in self._handlers.values():
            if isinstance(handler.value, ElasticSampler):
                handler.value.reset()

    def saved(self) -> Any:
        return {name: handler.kept for name, handler in self._handlers.items()}, super().saved()

    def load(self, saved: Any) -> None:
        kept, plain = saved
        for name, handler in self._handlers.items():
            handler.kept = kept[name]
        super().load(plain)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_handlers", {}):
            self._handlers[name].set_value(value)
        super().__setattr__(name, value)
