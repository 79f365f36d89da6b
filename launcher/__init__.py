"""Starts, supervises and judges the ranks of a training job, under the SageMaker container contract or without it.

The names below are resolved on first use: ``import launcher`` costs nothing that a rank or a script does not ask for.
"""

from __future__ import annotations

from launcher._version import __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from launcher.api import Result, launch
    from launcher.collectives.communicator import Communicator
    from launcher.errors import CollectiveError, JobFailed, LauncherError
    from launcher.rank.context import Context, init
    from launcher.serving import serve
    from launcher.serving.failures import InvocationError

__all__ = [
    "CollectiveError",
    "Communicator",
    "Context",
    "InvocationError",
    "JobFailed",
    "LauncherError",
    "Result",
    "__version__",
    "init",
    "launch",
    "serve",
]

_HOMES = {
    "CollectiveError": "launcher.errors",
    "Communicator": "launcher.collectives.communicator",
    "Context": "launcher.rank.context",
    "InvocationError": "launcher.serving.failures",
    "JobFailed": "launcher.errors",
    "LauncherError": "launcher.errors",
    "Result": "launcher.api",
    "init": "launcher.rank.context",
    "launch": "launcher.api",
    "serve": "launcher.serving",
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
