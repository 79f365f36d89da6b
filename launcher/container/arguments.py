"""Hyperparameters as command-line arguments, by the rules of the reference toolkit.

Names in code-point order; ``--name``, or ``-n`` for a name of one character, or an empty argument for an empty
name; then always exactly one argument for the value: text as it is, null as "", everything else as Python's
``str`` (so ``True``, ``0.001``, ``['x', 'y']``), an object as ``key=value`` pairs sorted and joined with commas.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


def to_args(hyperparameters: Mapping[str, Any]) -> list[str]:
    """``hyperparameters`` (typed values) as an argument list for ``execve``: never joined, never quoted."""
    result: list[str] = []
    for name in sorted(hyperparameters):
        dashes = "" if not name else "-" if len(name) == 1 else "--"
        result += (dashes + name, _value(hyperparameters[name]))
    return result


def _value(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return ",".join(f"{key}={item}" for key, item in sorted(value.items()))
    return str(value)
