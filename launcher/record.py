"""Frozen, typed records: what flows from one stage of a job to the next.

A launcher's start-up is paid by every job, and ``import dataclasses`` is a good part of it: it pulls in
``inspect`` (try ``python -X importtime``). This module gives what is needed here at a fraction of that: positional
and keyword construction, defaults, equality, ``repr``, immutability. Type checkers see a dataclass (PEP 681).
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeVar

    from typing_extensions import dataclass_transform

    _T = TypeVar("_T")
else:

    def dataclass_transform(**_):
        """Stand in for :func:`typing.dataclass_transform`, which type checkers alone read."""
        return lambda cls: cls


@dataclass_transform(frozen_default=True, eq_default=True, kw_only_default=False)
class Record:
    """Base of all records. Subclasses list their fields as annotations, defaults as class attributes.

    Raises:
        TypeError: at construction, for a missing, unknown or doubly given field.
        AttributeError: on assignment to a field.
    """

    _fields: tuple[str, ...] = ()
    _defaults: dict[str, Any] = {}

    def __init_subclass__(cls) -> None:
        own = [name for name in cls.__dict__.get("__annotations__", {}) if not name.startswith("_")]
        cls._fields = (*cls._fields, *(name for name in own if name not in cls._fields))
        cls._defaults = {**cls._defaults, **{name: cls.__dict__[name] for name in own if name in cls.__dict__}}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if len(args) > len(self._fields):
            raise TypeError(f"{type(self).__name__}() takes {len(self._fields)} fields, {len(args)} were given")
        values = self.__dict__
        values.update(self._defaults)
        given = dict(zip(self._fields, args, strict=False))
        for name in kwargs:
            if name not in self._fields:
                raise TypeError(f"{type(self).__name__}() has no field {name!r}; fields: {', '.join(self._fields)}")
            if name in given:
                raise TypeError(f"{type(self).__name__}() got field {name!r} twice")
        values.update(given)
        values.update(kwargs)
        if len(values) != len(self._fields):
            missing = [name for name in self._fields if name not in values]
            raise TypeError(f"{type(self).__name__}() misses {', '.join(missing)}")

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen: cannot set {name!r}; use replace()")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen: cannot delete {name!r}")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((type(self), *(self.__dict__[name] for name in self._fields)))

    def __repr__(self) -> str:
        body = ", ".join(f"{name}={self.__dict__[name]!r}" for name in self._fields)
        return f"{type(self).__name__}({body})"


def replace(record: _T, **changes: object) -> _T:
    """A copy of ``record`` with ``changes`` applied."""
    return type(record)(**{**record.__dict__, **changes})


def as_dict(value: object) -> Any:
    """``value`` with every record in it, at any depth, turned into a plain dict (for JSON and msgpack)."""
    if isinstance(value, Record):
        return {name: as_dict(value.__dict__[name]) for name in value._fields}
    if isinstance(value, dict):
        return {key: as_dict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_dict(item) for item in value]
    return value


def moved(value: Any, old: str, new: str) -> Any:
    """``value`` with the path ``old`` replaced by ``new`` in all texts that begin with it, at any depth."""
    if isinstance(value, str):
        inside = value == old or value.startswith((old + "/", old + ":"))
        return new + value[len(old) :] if inside else value
    if isinstance(value, Record):
        return type(value)(**{name: moved(item, old, new) for name, item in value.__dict__.items()})
    if isinstance(value, dict):
        return {key: moved(item, old, new) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(moved(item, old, new) for item in value)
    return value
