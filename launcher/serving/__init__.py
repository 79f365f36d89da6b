"""Serving: the model that training left, behind ``/ping`` and ``/invocations``."""

from __future__ import annotations

from launcher.serving.failures import InvocationError

__all__ = ["InvocationError", "serve"]


def serve(**options: object) -> int:
    """Serves a model from a script, until SIGTERM or SIGINT; to be called in the main thread.

    ``launcher.serve(model_dir="model", code="src", workers=2)`` is ``python -m launcher serve --model-dir model
    --code src --workers 2``: options are those of the command line, with underscores.

    Returns:
        The exit code that the command would have: 0 when all requests in hand were answered.

    Raises:
        LauncherError: as the command's errors; ``exit_code`` is the command's.
    """
    import os
    import sys

    from launcher.serving.command import serve as run

    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return run(words, os.environ, lambda text: print(f"[launcher] {text}", file=sys.stderr, flush=True))
