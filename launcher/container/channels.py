"""``inputdataconfig.json``: the data channels and how each is delivered.

An object from channel name to ``{TrainingInputMode: "File" | "FastFile" | "Pipe", S3DistributionType:
"FullyReplicated" | "ShardedByS3Key", RecordWrapperType: "None" | "RecordIO", ContentType: str}``; local mode
writes ``TrainingInputMode`` alone. The data of a channel is at ``input/data/<channel>``; in Pipe mode that path
does not exist and the FIFOs ``<channel>_<epoch>`` beside it do.
"""

from __future__ import annotations

import os
import re

from launcher.container.reading import read_object, shown
from launcher.errors import ContractError
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Field -> allowed values (None: any string) and what an absent field means.
_FIELDS: dict[str, tuple[tuple[str, ...] | None, str]] = {
    "TrainingInputMode": (("File", "FastFile", "Pipe"), "File"),
    "S3DistributionType": (("FullyReplicated", "ShardedByS3Key"), "FullyReplicated"),
    "RecordWrapperType": (("None", "RecordIO"), "None"),
    "ContentType": (None, ""),
}
# The pattern of the platform's API for a channel name; it also keeps the path inside input/data.
_NAME = r"[A-Za-z0-9._-]{1,64}"


class Channel(Record):
    """One channel. ``content_type`` is "" when none was given."""

    name: str
    path: str
    mode: str
    distribution: str
    record_wrapper: str
    content_type: str


class Channels(Record):
    """``by_name`` in the file's order, and the file's object as it was read ({} when there is no file)."""

    file: str
    by_name: dict[str, Channel]
    raw: dict[str, Any]


def read_channels(file: str, data_dir: str, *, retry_for_s: float) -> Channels:
    """Read ``file``. When it does not exist, each directory in ``data_dir`` is a channel in File mode.

    The second form serves trees made by hand; ``raw`` stays empty then, so that nothing is claimed about them.

    Raises:
        ContractError: malformed file, unknown value, a field or name that differs from another only in case.
    """
    raw = read_object(file, retry_for_s=retry_for_s)
    if raw is None:
        listed: dict[str, Any] = {name: {} for name in _directories(data_dir)}
        return Channels(file=file, by_name=_parse(file, data_dir, listed), raw={})
    return Channels(file=file, by_name=_parse(file, data_dir, raw), raw=raw)


def _directories(path: str) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ContractError(path, "", f"an unreadable directory ({error.strerror})", "a readable one") from error


def _parse(file: str, data_dir: str, raw: dict[str, Any]) -> dict[str, Channel]:
    result: dict[str, Channel] = {}
    by_upper: dict[str, str] = {}
    for name, fields in raw.items():
        if not re.fullmatch(_NAME, name) or name in (".", ".."):
            raise ContractError(file, name, f"the channel name {shown(name)}", "1 to 64 of A-Z a-z 0-9 . _ -")
        twin = by_upper.setdefault(name.upper(), name)
        if twin != name:
            found = f"a channel that differs from {shown(twin)} only in case"
            raise ContractError(file, name, found, f"names that give different SM_CHANNEL_{name.upper()} variables")
        if not isinstance(fields, dict):
            raise ContractError(file, name, shown(fields), "an object")
        values = {field: _value(file, name, fields, field) for field in _FIELDS}
        result[name] = Channel(
            name=name,
            path=os.path.join(data_dir, name),
            mode=values["TrainingInputMode"],
            distribution=values["S3DistributionType"],
            record_wrapper=values["RecordWrapperType"],
            content_type=values["ContentType"],
        )
    return result


def _value(file: str, channel: str, fields: dict[str, Any], field: str) -> str:
    allowed, default = _FIELDS[field]
    for given in fields:
        if given != field and given.lower() == field.lower():
            raise ContractError(file, f"{channel}.{given}", f"the name {shown(given)}", f"the spelling {shown(field)}")
    value = fields.get(field, default)
    if allowed is None:
        if value is None or isinstance(value, str):
            return value or ""
        raise ContractError(file, f"{channel}.{field}", shown(value), "a string")
    if value in allowed:
        return str(value)
    expected = " or ".join(shown(known) for known in allowed)
    raise ContractError(file, f"{channel}.{field}", shown(value), expected)
