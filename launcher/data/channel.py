"""Where a channel's data is, and what the job's configuration says about it."""

from __future__ import annotations

import os
import stat

from launcher.container.channels import read_channels
from launcher.container.paths import INPUT_DATA_CONFIG, Paths, base_dir
from launcher.errors import DataError, UsageError
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from launcher.container.channels import Channel


class Place(Record):
    """What was asked for.

    Attributes:
        name: of the channel; ``""`` for a path that is none.
        path: absolute path of its folder, or of one file. In Pipe mode it does not exist: ``<path>_<epoch>`` does.
        mode: ``File``, ``FastFile`` or ``Pipe``.
        distribution: ``FullyReplicated``, or ``ShardedByS3Key``: other hosts hold other files.
        record_wrapper: ``None`` or ``RecordIO``.
        content_type: ``""`` when the configuration has none.
    """

    name: str
    path: str
    mode: str = "File"
    distribution: str = "FullyReplicated"
    record_wrapper: str = "None"
    content_type: str = ""


def find_place(where: str | os.PathLike[str], environ: Mapping[str, str] | None = None) -> Place:
    """The place called ``where``: a channel of this job, else a path.

    A path that is a channel's folder is that channel, with all that the configuration says about it.

    Raises:
        UsageError: there is no such channel, and no such path, or it is neither a file nor a folder.
        DataError: the path can not be looked at.
        ContractError: the job's ``inputdataconfig.json`` is not as it should be.
    """
    environ = os.environ if environ is None else environ
    text = os.fspath(where) if isinstance(where, os.PathLike) else where
    if not isinstance(text, str) or not text:
        several = "; put several files into a folder, or links to them (links=True)" if hasattr(text, "__len__") else ""
        raise UsageError(
            f"channel is {where!r}; expected the name of a channel, or the path of a file or folder{several}"
        )
    channels = _channels(environ)
    if text in channels:
        return _of_channel(channels[text])
    path = os.path.abspath(text)
    for channel in channels.values():
        if path == channel.path or os.path.realpath(path) == os.path.realpath(channel.path):
            return _of_channel(channel)
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = 0
    except OSError as error:
        raise DataError(f"{path}: can not be looked at: {error.strerror}", "unreadable", path) from error
    if mode and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UsageError(
            f"{path}: neither a file nor a folder, but a device, a pipe or a socket: it can not be read from"
        )
    if not mode:
        known = (
            "the channels of this job are " + ", ".join(sorted(channels)) if channels else "this job has no channels"
        )
        raise UsageError(f"no channel and no path {text!r}; {known}")
    return Place(name="", path=path)


def _channels(environ: Mapping[str, str]) -> dict[str, Channel]:
    """By the variables that a rank has, else by the job tree."""
    paths = Paths.at(base_dir(environ))
    file = os.path.join(environ.get("SM_INPUT_CONFIG_DIR") or paths.config_dir, INPUT_DATA_CONFIG)
    data_dir = environ.get("SM_INPUT_DATA_DIR") or paths.data_dir
    return read_channels(file, data_dir, retry_for_s=0.0).by_name


def _of_channel(channel: Channel) -> Place:
    return Place(
        name=channel.name,
        path=channel.path,
        mode=channel.mode,
        distribution=channel.distribution,
        record_wrapper=channel.record_wrapper,
        content_type=channel.content_type,
    )
