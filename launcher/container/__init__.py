"""The contract of a training container: what it tells about the job, what is told back, and in which form.

Knows files, names and encodings; nothing of processes (pip and S3 apart) or sockets. What a job needs before its
ranks start is imported here; the rest on first use, as start-up time is paid by every job.
"""

from __future__ import annotations

from launcher.container.arguments import to_args
from launcher.container.channels import Channel
from launcher.container.entry_point import EntryPoint, command_for, entry_point_kind, make_executable
from launcher.container.environment import check_lengths, sm_environment
from launcher.container.facts import Container, read
from launcher.container.failure import (
    FailureNotWritten,
    StaleMark,
    note_stale,
    user_failure,
    write_failure,
    write_success,
)
from launcher.container.hyperparameters import Hyperparameters
from launcher.container.paths import Paths, base_dir
from launcher.container.resources import InstanceGroup, ResourceConfig, TopologyEntry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from launcher.container.code import prepare_code
    from launcher.container.job_tree import make_job_tree
    from launcher.container.masking import mask_args, mask_secrets, mask_text, mask_value
    from launcher.container.requirements import install_package, install_requirements

_LATER = {
    "prepare_code": "code",
    "make_job_tree": "job_tree",
    "mask_args": "masking",
    "mask_secrets": "masking",
    "mask_text": "masking",
    "mask_value": "masking",
    "install_package": "requirements",
    "install_requirements": "requirements",
}

__all__ = [
    "Channel",
    "Container",
    "EntryPoint",
    "FailureNotWritten",
    "Hyperparameters",
    "InstanceGroup",
    "Paths",
    "ResourceConfig",
    "StaleMark",
    "TopologyEntry",
    "base_dir",
    "check_lengths",
    "command_for",
    "entry_point_kind",
    "install_package",
    "install_requirements",
    "make_executable",
    "make_job_tree",
    "mask_args",
    "mask_secrets",
    "mask_text",
    "mask_value",
    "note_stale",
    "prepare_code",
    "read",
    "sm_environment",
    "to_args",
    "user_failure",
    "write_failure",
    "write_success",
]


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    globals()[name] = value
    return value
