"""Strict reading of the JSON files of ``input/config``, and the checks their fields share.

Every problem becomes one :class:`~launcher.errors.ContractError` that names file, field, what was found and what
is expected. Unknown fields are accepted everywhere: the platform adds some over time.
"""

from __future__ import annotations

import json

from launcher.errors import ContractError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

# The platform may still be writing a file when the container starts. An empty or cut text is read again this
# often and for this long before it is an error; no event tells when another container's write is complete.
RETRY_EVERY_S = 0.02
RETRY_FOR_S = 2.0

_SHOWN_CHARACTERS = 80


def shown(value: object) -> str:
    """``value`` as JSON for an error text, shortened to one line of at most 80 characters."""
    text = json.dumps(value, ensure_ascii=False)
    if len(text) > _SHOWN_CHARACTERS:
        text = text[: _SHOWN_CHARACTERS - 3] + "..."
    return text


def read_object(path: str, *, retry_for_s: float = RETRY_FOR_S) -> dict[str, Any] | None:
    """The JSON object in the file ``path``, or None when there is no such file.

    A byte order mark is accepted. Refused on purpose, although Python's parser lets them pass: a name given
    twice in one object (the first would vanish silently) and ``NaN``/``Infinity`` (not JSON).

    Raises:
        ContractError: unreadable, not UTF-8, empty, cut short, not JSON, or not an object.
    """
    import time

    deadline = time.monotonic() + retry_for_s
    while True:
        try:
            with open(path, "rb") as file:
                data = file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ContractError(path, "", f"an unreadable file ({error.strerror})", "a readable JSON file") from error
        if not _is_cut(data) or time.monotonic() >= deadline:
            return _parse(path, data)
        time.sleep(RETRY_EVERY_S)


def _is_cut(data: bytes) -> bool:
    """Whether ``data`` is empty or the beginning of a JSON text that goes on: inside a string, or a bracket open.

    Works on bytes: no byte of a multi-byte UTF-8 character equals one of the characters looked for.
    """
    if not data.strip():
        return True
    depth, in_string, escaped = 0, False, False
    for byte in data:
        if in_string:
            if escaped:
                escaped = False
            elif byte == 0x5C:  # backslash
                escaped = True
            elif byte == 0x22:  # quotation mark
                in_string = False
        elif byte == 0x22:
            in_string = True
        elif byte in b"[{":
            depth += 1
        elif byte in b"]}":
            depth -= 1
    return in_string or depth > 0


def _parse(path: str, data: bytes) -> dict[str, Any]:
    expected = "a JSON object"
    if not data.strip():
        raise ContractError(path, "", "an empty file", expected)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ContractError(path, twice, "the name twice in one object", "each name once")
        return result

    def constant(text: str) -> NoReturn:
        raise ContractError(path, "", f"the constant {text}", "JSON, which has no NaN or Infinity")

    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise ContractError(path, "", f"a byte that is not UTF-8 at offset {error.start}", "UTF-8 text") from error
    except json.JSONDecodeError as error:
        kind = "a JSON text that is cut short" if _is_cut(data) else "text that is not JSON"
        found = f"{kind} (line {error.lineno}, column {error.colno}: {error.msg})"
        raise ContractError(path, "", found, expected) from error
    except RecursionError as error:
        raise ContractError(path, "", "JSON nested too deeply to read", expected) from error
    except ValueError as error:  # a number with more digits than Python converts (sys.set_int_max_str_digits)
        raise ContractError(path, "", f"a number that cannot be read ({error})", expected) from error
    if not isinstance(value, dict):
        raise ContractError(path, "", shown(value), expected)
    return value


def text(file: str, field: str, value: object) -> str:
    """``value`` when it is a string that is not empty.

    Raises:
        ContractError: anything else.
    """
    if isinstance(value, str) and value:
        return value
    raise ContractError(file, field, shown(value), "a string that is not empty")


def text_list(file: str, field: str, value: object) -> tuple[str, ...]:
    """``value`` when it is a non-empty list of different, non-empty strings; order kept.

    Raises:
        ContractError: anything else, with the index of the offending item in the field.
    """
    items = object_list(file, field, value, "a list of strings")
    if not items:
        raise ContractError(file, field, "[]", "at least one name")
    result: list[str] = []
    for index, item in enumerate(items):
        name = text(file, f"{field}[{index}]", item)
        if name in result:
            raise ContractError(file, f"{field}[{index}]", f"{shown(name)} a second time", "each name once")
        result.append(name)
    return tuple(result)


def object_list(file: str, field: str, value: object, expected: str) -> list[Any]:
    """``value`` when it is a list.

    Raises:
        ContractError: anything else; ``expected`` is the error's text.
    """
    if isinstance(value, list):
        return value
    raise ContractError(file, field, shown(value), expected)
