"""Running a Python function as a rank, for ``launcher.launch(function)``.

The function and its result travel through files in the run directory (mode 0700, this user's), never over a network.
"""

from __future__ import annotations

import importlib
import os
import pickle
import runpy
import sys
import types

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# Set while a rank runs the caller's script for its definitions: a launch() then is one that lacks its guard.
LOADING = "LAUNCHER_LOADING_MAIN"


def dump_call(path: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Writes ``function`` and ``args`` so that ranks can run them.

    A function of an importable module travels by name. One defined in ``__main__`` travels with the path of that
    script, which each rank runs as ``__mp_main__`` (so guard it with ``if __name__ == "__main__"``, as for
    multiprocessing). One defined in a notebook or inside another function needs the ``cloudpickle`` package.

    Raises:
        TypeError: the function cannot be handed to another process, and what to do about it.
    """
    main = sys.modules["__main__"]
    script = getattr(main, "__file__", None)
    in_main = getattr(function, "__module__", None) == "__main__"
    header: dict[str, Any] = {"main": None, "path": list(sys.path), "codec": "pickle"}
    if in_main and script and "<locals>" not in function.__qualname__:
        header["main"] = os.path.abspath(script)
    try:
        if in_main and not header["main"]:
            raise pickle.PicklingError("defined in a notebook or an interactive session")
        body = pickle.dumps((function, args))
        if b"__main__" in body and script:  # an argument's class is the script's
            header["main"] = os.path.abspath(script)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        body = _cloudpickle(function, args, error)
        header["codec"] = "cloudpickle"
    with open(path, "wb") as file:
        pickle.dump(header, file)
        file.write(body)


def _cloudpickle(function: Callable[..., Any], args: tuple[Any, ...], reason: Exception) -> bytes:
    try:
        cloudpickle = importlib.import_module("cloudpickle")
    except ImportError:
        raise TypeError(
            f"cannot hand {function!r} to other processes ({reason}); define it at the top level of a module, "
            "or install cloudpickle"
        ) from reason
    body: bytes = cloudpickle.dumps((function, args))
    return body


def run_call(path: str) -> None:
    """Runs the function stored in ``path`` and stores what it returns in the file ``LAUNCHER_RESULT`` names."""
    with open(path, "rb") as file:
        header = pickle.load(file)
        sys.path[:] = header["path"]
        if header["main"]:
            os.environ[LOADING] = header["main"]
            content = runpy.run_path(header["main"], run_name="__mp_main__")
            module = types.ModuleType("__mp_main__")
            module.__dict__.update(content)
            sys.modules["__main__"] = sys.modules["__mp_main__"] = module
            del os.environ[LOADING]
        function, args = pickle.load(file)
    result = function(*args)
    target = os.environ["LAUNCHER_RESULT"]
    with open(target + ".part", "wb") as file:
        pickle.dump(result, file)
    os.replace(target + ".part", target)


def load_result(path: str) -> Any:
    """What the rank returned; None when it left without returning (``early_exit="ok"``)."""
    # The ranks ran the caller's script under this name, so its classes come back under it.
    before = sys.modules.get("__mp_main__")
    sys.modules["__mp_main__"] = sys.modules["__main__"]
    try:
        with open(path, "rb") as file:
            return pickle.load(file)
    except FileNotFoundError:
        return None
    finally:
        if before is None:
            del sys.modules["__mp_main__"]
        else:
            sys.modules["__mp_main__"] = before
