"""Makes ``backend="launcher"`` known to torch.distributed, now or when torch is imported. Imports no torch itself.

Called by ``launcher.init()``, by importing ``launcher.collectives.torch_backend``, and by torch itself at the end of
``import torch`` (entry point group ``torch.backends``, torch 2.5 and later): a script needs no line for it.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

NAME = "launcher"


def register() -> None:
    """Registers the back-end at once where torch.distributed is loaded, else as soon as it is."""
    when_imported("torch.distributed.distributed_c10d", _register)


def when_imported(name: str, callback: Callable[[ModuleType], object]) -> None:
    """Calls ``callback(module)`` now if the module ``name`` has been imported, else once, right after its import."""
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        callback(module)
    elif not any(isinstance(finder, _Watcher) and finder.same(name, callback) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher(name, callback))


class _Watcher:
    """A finder that finds nothing itself: it lets the others find its module, and hears when it has been run."""

    def __init__(self, name: str, callback: Callable[[ModuleType], object]) -> None:
        self._name = name
        self._callback = callback

    def same(self, name: str, callback: Callable[[ModuleType], object]) -> bool:
        return (self._name, self._callback) == (name, callback)

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        for finder in list(sys.meta_path):
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    self._follow(spec.loader)
                return spec
        return None

    def _follow(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            loader.exec_module = execute
            execute(module)
            self._callback(module)

        loader.exec_module = exec_module


def _register(module: ModuleType) -> None:
    backend = getattr(module, "Backend", None)
    # A torch built without distributed has the module's name but not its content.
    if backend is not None and not hasattr(backend, NAME.upper()):
        backend.register_backend(NAME, _create, extended_api=True, devices=["cpu", "cuda"])


def _create(options: Any, backend_options: Any) -> Any:
    from launcher.collectives.torch_backend import create

    return create(options, backend_options)
