"""What the codecs share: how they fail, and values as arrays."""

from __future__ import annotations

import functools

MOST_DIMENSIONS = 32  # that every NumPy has

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class CodecError(Exception):
    """A body that can not be read, or a value that can not be written. The message is for the client."""


class UnsupportedMediaType(CodecError):
    """There is no codec of this name, or of this charset (HTTP status 415)."""


class MalformedBody(CodecError):
    """The body is not what its media type says (HTTP status 400)."""


class NotEncodable(CodecError):
    """The media type can not hold the value (HTTP status 406 where the client asked for the type)."""


@functools.cache
def has_numpy() -> bool:
    """Whether NumPy is installed: a model of Python's own values does without."""
    from importlib.util import find_spec

    return find_spec("numpy") is not None


def is_array_like(value: Any) -> bool:
    return hasattr(value, "__array__") or hasattr(value, "detach") or hasattr(value, "to_numpy")


def array_of(value: Any, objects: bool = False) -> Any:
    """``value`` as an array, of ``objects`` only where they are allowed."""
    import numpy

    try:
        if hasattr(value, "detach"):
            value = _from_tensor(value.detach().cpu())
        elif hasattr(value, "to_numpy"):
            value = value.to_numpy()
        array = numpy.asarray(value)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise NotEncodable(f"a value of type {type_name(value)} is no array: {error}") from None
    if array.dtype.hasobject and not objects:
        raise NotEncodable(f"a value of type {type_name(value)} is no array of numbers or texts, but of objects")
    return array


def _from_tensor(tensor: Any) -> Any:
    try:
        return tensor.numpy()
    except TypeError:  # bfloat16, and the floats of 8 bits, which NumPy has not
        return tensor.float().numpy()


def utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise NotEncodable(
            f"the text has half a character (a surrogate) at {error.start}, not known to UTF-8"
        ) from None


def text_name(name: object) -> str:
    if not isinstance(name, str):
        raise NotEncodable(f"the name {name!r:.40} is no text; arrays need names")
    utf8(name)
    return name


def type_name(value: object) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
