"""The user's functions: found in a module, and called with what their signatures ask for.

The reference counts parameters, n or n + 1 for the context. Counted that way a default, ``*args`` or a keyword-only
``context`` is an error, and a decorated function a wrong guess; here the signature itself is asked.
"""

from __future__ import annotations

import os
import sys

from launcher.errors import ContractError
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import Any

# name -> its arguments; each function may ask for the context after them.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "pre_model_fn": ("model_dir",),
    "model_fn": ("model_dir",),
    "model_warmup_fn": ("model_dir", "model"),
    "input_fn": ("body", "content_type"),
    "predict_fn": ("data", "model"),
    "batch_predict_fn": ("data", "model"),
    "output_fn": ("prediction", "accept"),
    "transform_fn": ("model", "body", "content_type", "accept"),
    "create_model": ("model_dir",),
    "bidirectional_fn": ("messages", "model"),
}
# Flags of a code object (the inspect module's CO_*).
_VARARGS, _COROUTINE, _ASYNC_GENERATOR = 0x04, 0x80, 0x200
_PARTS = ("input_fn", "predict_fn", "output_fn", "batch_predict_fn")


class Function(Record):
    """A function of the user's, called with its arguments and the context."""

    name: str
    call: Callable[..., Any]
    asynchronous: bool

    def __call__(self, *arguments: Any) -> Any:
        """``arguments`` are all of :data:`ARGUMENTS`, and the context."""
        return self.call(*arguments)


def import_program(code_dir: str, program: str, required: bool) -> ModuleType | None:
    """The user's module; None when there is none and none is required. Its directory comes first on ``sys.path``.

    Args:
        program: a file of ``code_dir``, or the name of a module; ``.py`` may be missing.

    Raises:
        ContractError: it is required and not there.
    """
    import importlib.util

    path = os.path.join(code_dir, program if program.endswith(".py") else program + ".py")
    if not os.path.isfile(path):
        dotted = program.removesuffix(".py").replace("/", ".")
        if required and "/" not in program and importlib.util.find_spec(dotted) is not None:
            return importlib.import_module(dotted)  # a module of the image
        if not required:
            return None
        there = ", ".join(sorted(os.listdir(code_dir))[:8]) if os.path.isdir(code_dir) else "no such directory"
        raise ContractError(
            code_dir, "program", f"no {program}", f"a file with the inference functions; there: {there}"
        )
    for directory in dict.fromkeys((code_dir, os.path.dirname(path))):
        if directory not in sys.path:
            sys.path.insert(0, directory)
    return importlib.import_module(os.path.basename(path).removesuffix(".py"))


def find_functions(module: ModuleType | None) -> dict[str, Function]:
    """The functions of :data:`ARGUMENTS` that ``module`` has.

    Raises:
        ContractError: a name that is no function, a signature that takes something else, or transform_fn beside
            functions that it takes the place of.
    """
    if module is None:
        return {}
    file = getattr(module, "__file__", None) or module.__name__
    found: dict[str, Function] = {}
    for name, arguments in ARGUMENTS.items():
        function = getattr(module, name, None)
        if function is None:
            continue
        if not callable(function):
            raise ContractError(file, name, f"a {type(function).__name__}", "a function")
        found[name] = _adapted(name, function, arguments, file)
    beside = [name for name in _PARTS if name in found]
    if "transform_fn" in found and beside:
        raise ContractError(
            file,
            "transform_fn",
            f"transform_fn and {', '.join(beside)}: Cannot use transform_fn implementation in conjunction with "
            "input_fn, predict_fn, and/or output_fn implementation",
            "one or the others",
        )
    return found


class _Signature(Record):
    """What matters of a signature: ``names`` that may be given by place, ``required`` of them; keyword-only ones."""

    text: str
    names: tuple[str, ...]
    required: int
    any_number: bool
    keywords: tuple[str, ...]
    required_keywords: tuple[str, ...]
    asynchronous: bool


def _adapted(name: str, function: Callable[..., Any], arguments: tuple[str, ...], file: str) -> Function:
    signature = _signature_of(function)
    how = _context(signature, len(arguments))
    if how is None:
        wanted = ", ".join(arguments)
        raise ContractError(file, name, name + signature.text, f"{name}({wanted}) or {name}({wanted}, context)")
    call = function
    if how == "keyword":
        call = lambda *values: function(*values[:-1], context=values[-1])  # noqa: E731  # as the one below
    elif how == "none":
        call = lambda *values: function(*values[:-1])  # noqa: E731
    return Function(name, call, signature.asynchronous)


def _context(signature: _Signature, count: int) -> str | None:
    """How a function of ``count`` arguments takes the context: positional, keyword or none; None: it does not fit."""
    names, required = signature.names, signature.required
    if any(keyword != "context" for keyword in signature.required_keywords):
        return None
    if required > count + 1 or (len(names) < count and not signature.any_number):
        return None
    if "context" in signature.keywords:
        return "keyword" if required <= count else None
    if required == count + 1 or (len(names) > count and names[count] == "context"):
        return "positional"
    return "none"


def _signature_of(function: Callable[..., Any]) -> _Signature:
    code = getattr(function, "__code__", None)
    if code is None or hasattr(function, "__wrapped__") or hasattr(function, "__self__"):
        return _inspected(function)
    # A plain function. inspect would say the same, and takes as long to import as a small model to load.
    names = code.co_varnames[: code.co_argcount]
    keywords = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
    given = getattr(function, "__kwdefaults__", None) or {}
    return _Signature(
        text=f"({', '.join((*names, *keywords))})",
        names=names,
        required=len(names) - len(getattr(function, "__defaults__", None) or ()),
        any_number=bool(code.co_flags & _VARARGS),
        keywords=keywords,
        required_keywords=tuple(name for name in keywords if name not in given),
        asynchronous=bool(code.co_flags & (_COROUTINE | _ASYNC_GENERATOR)),
    )


def _inspected(function: Callable[..., Any]) -> _Signature:
    """Of a method, a decorated function, an object that can be called."""
    import inspect

    called = function if inspect.isroutine(function) or inspect.isclass(function) else type(function).__call__
    asynchronous = inspect.iscoroutinefunction(called) or inspect.isasyncgenfunction(called)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of a builtin: it takes what it takes
        return _Signature("(...)", (), 0, True, (), (), asynchronous)
    kinds = inspect.Parameter
    positional = [p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    by_name = [p for p in parameters if p.kind is kinds.KEYWORD_ONLY]
    return _Signature(
        text=str(inspect.signature(function)),
        names=tuple(p.name for p in positional),
        required=sum(p.default is kinds.empty for p in positional),
        any_number=any(p.kind is kinds.VAR_POSITIONAL for p in parameters),
        keywords=tuple(p.name for p in by_name),
        required_keywords=tuple(p.name for p in by_name if p.default is kinds.empty),
        asynchronous=asynchronous,
    )
