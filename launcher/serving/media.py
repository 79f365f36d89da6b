"""Media types, and which of them a client takes: the headers Content-Type and Accept (RFC 9110, 8.3 and 12.5.1)."""

from __future__ import annotations

import re

from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_CHARACTERS = 8192
"""Of a header's value that is looked at; what the servers in front of a container let through, too."""

_WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # a token: RFC 9110, 5.6.2
_QUOTED = r'"((?:[^"\\\x00-\x08\x0a-\x1f\x7f]|\\[^\x00-\x08\x0a-\x1f\x7f])*)"'  # RFC 9110, 5.6.4
# A type of "*" alone is what Java's HttpURLConnection sends by default, beside "*/*".
_ESSENCE = re.compile(rf"[ \t]*(?:({_WORD}/{_WORD})|\*)[ \t]*")
_PARAMETER = re.compile(rf";[ \t]*(?:({_WORD})=(?:({_WORD})|{_QUOTED})[ \t]*)?")
_ESCAPED = re.compile(r"\\(.)")
_BETWEEN = re.compile(r"[ \t,]*")
# RFC 9110, 12.4.2. Without the zero, ".2", it is Java's HttpURLConnection again.
_QUALITY = re.compile(r"(?:0?\.[0-9]{1,3}|0\.?|1(?:\.0{0,3})?)")
_SHOWN_CHARACTERS = 40


class MediaType(Record):
    """A media type, or a range of them.

    ``essence``: ``type/subtype`` in lower case. ``parameters``: names in lower case, values as they are meant (quotes
    and escapes taken off), in the order given.
    """

    essence: str
    parameters: tuple[tuple[str, str], ...] = ()

    def parameter(self, name: str) -> str | None:
        """The first parameter of this name (in lower case); None: there is none."""
        for known, value in self.parameters:
            if known == name:
                return value
        return None


def parse_media_type(text: str) -> MediaType:
    """The media type that a Content-Type field names.

    Raises:
        ValueError: it is none by RFC 9110, 8.3.1, or longer than 8 KiB.
    """
    _check_length(text)
    found, end = _parse_one(text, 0)
    if end != len(text):
        raise ValueError(f"found {_shown(text, end)} after {found.essence}; expected ; and a parameter, or the end")
    if found.essence.endswith("/*"):
        raise ValueError(f"{found.essence} is a range of media types; expected one, such as application/json")
    return found


def parse_accept(text: str) -> list[tuple[MediaType, float]]:
    """The ranges of an Accept field with their qualities, 0 to 1; the best first, equal ones in the order given.

    The parameter ``q`` is not among the parameters of a range. Empty elements are skipped (RFC 9110, 5.6.1.2).

    Raises:
        ValueError: it is no such list by RFC 9110, 12.5.1, or longer than 8 KiB.
    """
    _check_length(text)
    ranges: list[tuple[MediaType, float]] = []
    position = _after_commas(text, 0)
    while position < len(text):
        found, end = _parse_one(text, position)
        if end < len(text) and text[end] != ",":
            raise ValueError(f"found {_shown(text, end)} after {found.essence}; expected a comma, or ; and a parameter")
        ranges.append(_weighed(found))
        position = _after_commas(text, end)
    ranges.sort(key=_less_wanted)
    return ranges


def choose(accept: str, offered: Sequence[str]) -> str | None:
    """Which of the essences ``offered`` (in lower case, the server's favourite first) answers an Accept field best.

    Of the ranges that match a type the most specific one gives its quality: the type itself, ``type/*``, ``*/*``
    (parameters are not looked at); 0 means never. The highest quality wins. Between equal ones, types that the client
    names go first, in its order, then those that a ``*`` covers, in the server's order. None: nothing fits. An empty
    ``accept`` stands for ``*/*``.

    Raises:
        ValueError: as :func:`parse_accept`.
    """
    ranges = parse_accept(accept)
    if not ranges:
        return offered[0] if offered else None
    # Of ranges that are the same but for parameters the first counts, which has the highest quality.
    by_essence: dict[str, tuple[float, int]] = {}
    for place, (found, quality) in enumerate(ranges):
        by_essence.setdefault(found.essence, (quality, place))
    best, best_rank = None, (0.0, 0)
    for essence in offered:
        exact = by_essence.get(essence)
        family = essence.partition("/")[0] + "/*"
        quality, place = exact or by_essence.get(family) or by_essence.get("*/*") or (0.0, 0)
        rank = (quality, -place if exact else -len(ranges))
        if quality > 0 and (best is None or rank > best_rank):
            best, best_rank = essence, rank
    return best


def _check_length(text: str) -> None:
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{len(text)} characters; at most {MOST_CHARACTERS} are looked at")


def _parse_one(text: str, start: int) -> tuple[MediaType, int]:
    """A media range and where what follows it begins."""
    match = _ESSENCE.match(text, start)
    if match is None:
        raise ValueError(f"found {_shown(text, start)} where a media type, such as application/json, must begin")
    essence = (match[1] or "*/*").lower()
    if essence.startswith("*/") and essence != "*/*":
        raise ValueError(f"{essence} is no media range; a * before the / goes only with a * behind it")
    position, parameters = match.end(), []
    while match := _PARAMETER.match(text, position):
        position = match.end()
        name, token, quoted = match.groups()
        if name is not None:
            parameters.append((name.lower(), _ESCAPED.sub(r"\1", quoted) if token is None else token))
        elif position < len(text) and text[position] not in ";,":  # a lone ; is allowed (RFC 9110, 5.6.6)
            raise ValueError(f"found {_shown(text, position)} where a parameter (name=value) must begin")
    return MediaType(essence, tuple(parameters)), position


def _weighed(found: MediaType) -> tuple[MediaType, float]:
    weights = [value for name, value in found.parameters if name == "q"]
    if not weights:
        return found, 1.0
    if len(weights) > 1:
        raise ValueError(f"{found.essence} has q {len(weights)} times; expected it once")
    if not _QUALITY.fullmatch(weights[0]):
        raise ValueError(
            f"{found.essence} has q={_shown(weights[0], 0)}; expected 0 to 1 with up to three digits after the point"
        )
    return MediaType(found.essence, tuple(one for one in found.parameters if one[0] != "q")), float(weights[0])


def _less_wanted(weighed: tuple[MediaType, float]) -> float:
    return -weighed[1]


def _after_commas(text: str, start: int) -> int:
    match = _BETWEEN.match(text, start)
    return match.end() if match else start


def _shown(text: str, start: int) -> str:
    rest = text[start : start + _SHOWN_CHARACTERS + 1]
    if not rest:
        return "nothing"
    return repr(rest[:_SHOWN_CHARACTERS] + ("..." if len(rest) > _SHOWN_CHARACTERS else ""))
