"""``python -m launcher data``: what is in a channel, whether it is whole, and where it is not."""

from __future__ import annotations

import json
import os

from launcher.data.inspection import convert_channel, index_channel, inspect_channel, verify_channel
from launcher.errors import UsageError
from launcher.options import Option, convert, suggest
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_ACTIONS = {
    "inspect": "what is there: format, files, records, fields",
    "index": "find the records and keep where they are, so that no rank has to",
    "verify": "read every record; what is damaged is named with file and byte offset, and the exit code is 65",
    "convert": "write the records in another format, in one file",
}
_EVERY = tuple(_ACTIONS)
# name, the actions that have it, and the row as in launcher.options
_TABLE: tuple[tuple[tuple[str, ...], Option], ...] = (
    (_EVERY, Option("format", "text", "auto", "the format; auto: by content type, suffix, first bytes", "NAME")),
    (
        _EVERY,
        Option("fields", "text", "", "fields to read: a,b,c; of raw files JSON: {name: [dtype, shape]}", "FIELDS"),
    ),
    (_EVERY, Option("option", "pairs", {}, "an option of the format; may be repeated", "NAME=VALUE")),
    (_EVERY, Option("hidden", "flag", False, "files whose names begin with . or _, too")),
    (_EVERY, Option("links", "flag", False, "follow symbolic links inside the folder")),
    (
        ("inspect", "index", "convert"),
        Option("on_bad", "choice", "raise", "damaged records: an error, or left out", choices=("raise", "skip")),
    ),
    (("index", "convert"), Option("output", "text", "", "the file to write", "FILE")),
    (
        ("convert",),
        Option(
            "to",
            "choice",
            "",
            "the format to write",
            choices=("recordio", "recordio-protobuf", "tfrecord", "npy"),
        ),
    ),
    (("verify",), Option("most", "int", 100, "damaged places to list; all are counted", "N")),
    (_EVERY, Option("json", "flag", False, "the answer as JSON")),
)


class Command(Record):
    """What is to be done: ``action`` on the channel or path ``where``, with the options by name."""

    action: str
    where: str
    options: dict[str, Any]

    def opening(self) -> dict[str, Any]:
        """The keyword arguments of :func:`launcher.data.catalogue.open_source`."""
        given = {name: self.options[name] for name in ("format", "hidden", "links")}
        values = {name: _json_or_text(value) for name, value in self.options["option"].items()}
        return {**values, **given, "fields": _fields(self.options["fields"])}


def run_command(words: list[str], log: Callable[[str], None]) -> tuple[str, int]:
    """Does what the words after ``data`` say: the text of the answer, and the exit code (65: the data is damaged).

    Raises:
        UsageError: the words.
        DataError: the data can not be opened.
        OutputError: the result can not be written.
    """
    if not words or words[0] in ("-h", "--help") or "--help" in words[1:]:
        return _usage(), 0
    command = parse(words)
    act = {
        "inspect": inspect_channel,
        "index": index_channel,
        "verify": verify_channel,
        "convert": convert_channel,
    }[command.action]
    answer = act(command.where, command.opening(), command.options, log)
    text = json.dumps(answer.facts, indent=1) if command.options["json"] else answer.text
    return text, answer.exit_code


def parse(words: list[str]) -> Command:
    """The command of ``ACTION CHANNEL_OR_PATH [options]``; the options may come first, too.

    Raises:
        UsageError: an unknown action or option, a missing or bad value.
    """
    action, rest = words[0], words[1:]
    if action not in _ACTIONS:
        raise UsageError(f"data {action!r}: expected {', '.join(_ACTIONS)}{suggest(action, _ACTIONS)}")
    known = {option.name: option for actions, option in _TABLE if action in actions}
    raw: dict[str, Any] = {}
    places = []
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            places.append(word)
            continue
        name, equals, value = word.partition("=")
        option = known.get(name.removeprefix("--").replace("-", "_"))
        if option is None:
            spelled = ["--" + one.replace("_", "-") for one in known]
            raise UsageError(f"data {action}: unknown option {name}{suggest(name, spelled)} (see data --help)")
        if option.kind != "flag" and not equals:
            if not rest:
                raise UsageError(f"option {name} needs a value; see data --help")
            value = rest.pop(0)
        if option.kind == "pairs":
            raw.setdefault(option.name, []).append(value)
        else:
            raw[option.name] = value if equals or option.kind != "flag" else True
    if len(places) != 1:
        raise UsageError(f"data {action}: expected one channel or path, found {len(places)}: {' '.join(places)}")
    options = {option.name: option.default for _, option in _TABLE}
    options.update({name: convert(known[name], value, "data " + action) for name, value in raw.items()})
    return Command(action, places[0], options)


def _json_or_text(value: str) -> Any:
    """``5``, ``true`` and ``["a", "b"]`` are what they are in JSON; all else is text."""
    try:
        return json.loads(value)
    except ValueError:
        return value


def _fields(text: str) -> Any:
    if not text:
        return None
    if not text.startswith("{"):
        return text.split(",")
    try:
        given = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--fields is {text!r}, which is no JSON: {error}") from None
    return {name: _as_tuple(value) for name, value in given.items()}


def _as_tuple(value: Any) -> Any:
    return (
        tuple(tuple(part) if isinstance(part, list) else part for part in value) if isinstance(value, list) else value
    )


def _usage() -> str:
    lines = ["usage: python -m launcher data ACTION CHANNEL_OR_PATH [options]", "", "actions:"]
    lines += [f"  {name:<12} {text}" for name, text in _ACTIONS.items()]
    lines += ["", "options:"]
    for actions, option in _TABLE:
        value = option.metavar or ("{" + ",".join(option.choices) + "}" if option.choices else "")
        head = f"  --{option.name.replace('_', '-')} {value}".rstrip()
        of = "" if actions == _EVERY else f" ({', '.join(actions)})"
        default = f" [{option.default}]" if option.default not in ("", None, {}, False) else ""
        body = f"{option.help}{default}{of}"
        lines.append(f"{head:<28} {body}" if len(head) < 28 else f"{head}\n{'':<28} {body}")
    return "\n".join([*lines, "", f"Paths are of the host this runs on; a channel is one of {_job()}."])


def _job() -> str:
    return "the job under " + (os.environ.get("SAGEMAKER_BASE_DIR") or "/opt/ml")
