"""A job tree as the platform would mount it, made by the launcher: for runs on a machine without one."""

from __future__ import annotations

import json
import os

from launcher.container.paths import HYPERPARAMETERS, INPUT_DATA_CONFIG, RESOURCE_CONFIGS, Paths
from launcher.container.resources import DEFAULT_GROUP, DEFAULT_INSTANCE_TYPE
from launcher.errors import OutputError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any


def make_job_tree(
    base: str,
    channels: Mapping[str, str],
    hyperparameters: Mapping[str, Any],
    *,
    host: str = "algo-1",
    hosts: Sequence[str] = (),
    network_interface_name: str = "lo",
) -> Paths:
    """Write directories and configuration files under ``base`` so that :func:`read` finds a whole job there.

    May be called again for the same ``base``: files are rewritten, links are replaced, ``model``, ``output`` and
    ``checkpoints`` keep what they hold.

    Args:
        channels: channel name to an existing directory (the channel becomes a link to it) or file (the channel
            becomes a directory with a link to it).
        hyperparameters: typed values; each is JSON-encoded, as the SageMaker Python SDK does.
        host: this host's name.
        hosts: all hosts; empty: this one alone.

    Raises:
        UsageError: the source of a channel does not exist, or a channel's place is taken by real data.
        OutputError: the tree cannot be written.
    """
    paths = Paths.at(base)
    names = list(hosts) or [host]
    group = {"instance_group_name": DEFAULT_GROUP, "instance_type": DEFAULT_INSTANCE_TYPE, "hosts": names}
    files = {
        HYPERPARAMETERS: {name: json.dumps(value) for name, value in hyperparameters.items()},
        INPUT_DATA_CONFIG: {
            name: {"TrainingInputMode": "File", "S3DistributionType": "FullyReplicated", "RecordWrapperType": "None"}
            for name in channels
        },
        RESOURCE_CONFIGS[0]: {
            "current_host": host,
            "current_instance_type": DEFAULT_INSTANCE_TYPE,
            "current_group_name": DEFAULT_GROUP,
            "hosts": names,
            "instance_groups": [group],
            "network_interface_name": network_interface_name,
        },
    }
    for name, source in channels.items():
        if not os.path.exists(source):
            raise UsageError(f"channel {name!r}: there is no file or directory {source}")
    try:
        _make_directories(paths)
        for name, source in channels.items():
            _link_channel(os.path.join(paths.data_dir, name), name, source)
        for file_name, content in files.items():
            _write(paths.config_file(file_name), json.dumps(content, indent=1))
    except OSError as error:
        raise OutputError(f"cannot make a job tree under {paths.base}: {error}") from error
    return paths


def _make_directories(paths: Paths) -> None:
    for path in (
        paths.config_dir,
        paths.data_dir,
        paths.code_dir,
        paths.model_dir,
        paths.checkpoints_dir,
        paths.output_data_dir,
    ):
        os.makedirs(path, exist_ok=True)


def _link_channel(place: str, name: str, source: str) -> None:
    target = os.path.abspath(source)
    if os.path.isdir(target):
        if os.path.isdir(place) and not os.path.islink(place) and not os.listdir(place):
            os.rmdir(place)
        _link(place, name, target)
        return
    if os.path.islink(place):
        os.unlink(place)
    os.makedirs(place, exist_ok=True)
    _link(os.path.join(place, os.path.basename(target)), name, target)


def _link(place: str, name: str, target: str) -> None:
    """Make ``place`` a link to ``target``; an existing link is replaced, anything else is not touched."""
    if os.path.islink(place):
        os.unlink(place)
    elif os.path.exists(place):
        raise UsageError(f"channel {name!r}: {place} exists and is not a link; move it away or choose another base")
    os.symlink(target, place)


def _write(path: str, text: str) -> None:
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)
