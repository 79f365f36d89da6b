"""``--horovod-compat``: ``import horovod.torch`` in an unchanged script is ``launcher.horovod.torch``.

A finder in ``sys.meta_path``. It imports nothing before the script asks for horovod.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

VARIABLE = "LAUNCHER_HOROVOD_COMPAT"
OURS = "launcher.horovod"
# Modules of Horovod that scripts import names from, where ours have another name.
_OTHER_NAMES = {
    "horovod.common.basics": f"{OURS}.torch.basics",
    "horovod.common.process_sets": f"{OURS}.torch.process_sets",
    "horovod.torch.mpi_ops": f"{OURS}.torch",
}


def install(mode: str) -> None:
    """Puts the finder in place.

    Args:
        mode: ``auto``: the real package wins where it is installed; ``force``: it does not.
    """
    if not any(isinstance(finder, HorovodFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, HorovodFinder(mode))


class HorovodFinder:
    """Answers for ``horovod`` and all below it with the modules of launcher.horovod themselves."""

    def __init__(self, mode: str) -> None:
        self._mode = mode
        self._ours: bool | None = None

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of one of our modules; None for all that is not ours to answer."""
        if name != "horovod" and not name.startswith("horovod."):
            return None
        if self._ours is None:
            self._ours = self._decide()
        if not self._ours:
            return None
        own = _OTHER_NAMES.get(name, OURS + name.removeprefix("horovod"))
        if importlib.util.find_spec(own) is None:
            raise ModuleNotFoundError(
                f"{name}: the launcher's Horovod API is that of horovod.torch; it has no {name} (--horovod-compat)",
                name=name,
            )
        return ModuleSpec(name, _Alias(own), is_package=True)

    def _decide(self) -> bool:
        real = PathFinder.find_spec("horovod")
        there = real is not None and real.origin is not None  # a mere folder of this name has no origin
        ours = self._mode == "force" or not there
        if os.environ.get("RANK", "0") == "0":
            if ours:
                line = "horovod is the launcher's own" + (f", not {_folder(real)}" if there else "")
            else:
                line = f"horovod is {_folder(real)}; --horovod-compat=force takes the launcher's own"
            print(f"[launcher] {line}", file=sys.stderr, flush=True)
        return ours


def _folder(spec: ModuleSpec | None) -> str:
    return os.path.dirname(str(spec.origin)) if spec is not None else ""


class _Alias(Loader):
    """A loader that gives a module which another name has already, or imports it under that."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._name)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import system has put the alias's there
