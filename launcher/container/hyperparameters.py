"""Hyperparameters: typed values, and the reserved ones apart from those of the user's script.

The file is a flat JSON object. The platform's API carries strings only, so every value arrives as a string; the
SageMaker Python SDK JSON-encodes each one (``"\\"SGD\\""``, ``"0.1"``), other clients send bare text (``"SGD"``).
Each string is therefore decoded once as JSON and kept as it is when that fails, without a word about it. Files
written by hand may hold other JSON values; those are taken as they are.
"""

from __future__ import annotations

import json

from launcher.container.reading import read_object, shown
from launcher.errors import ContractError
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

RESERVED_PREFIX = "sagemaker_"
# Reserved, and with a meaning of their own: left out of SM_FRAMEWORK_PARAMS. The last two lack the prefix.
NAMED = (
    "sagemaker_program",
    "sagemaker_submit_directory",
    "sagemaker_enable_cloudwatch_metrics",
    "sagemaker_region",
    "sagemaker_container_log_level",
    "sagemaker_job_name",
    "sagemaker_s3_output",
    "default_user_module_name",
    "_tuning_objective_metric",
)
# For the launchers alone: of no use to the script, and not for its environment.
LAUNCHERS_OWN = ("sagemaker_launcher_secret",)
# Each asks for a way to run the script on several hosts; any of them switches "distribution" on for the group.
DISTRIBUTION_FLAGS = (
    "sagemaker_mpi_enabled",
    "sagemaker_parameter_server_enabled",
    "sagemaker_distributed_dataparallel_enabled",
    "sagemaker_pytorch_ddp_enabled",
    "sagemaker_pytorch_xla_multi_worker_enabled",
    "sagemaker_multi_worker_mirrored_strategy_enabled",
    "sagemaker_torch_distributed_enabled",
)
FLAGS = (*DISTRIBUTION_FLAGS, "sagemaker_toolkit_native_launcher_enabled")

_TRUE = (True, 1, "true", "True", "1")
_FALSE = (False, 0, "false", "False", "0")


class Hyperparameters(Record):
    """What ``hyperparameters.json`` holds. Both dicts keep the file's order.

    Attributes:
        file: path of the file (it need not exist).
        user: typed values for the script.
        reserved: typed values of ``sagemaker_*`` and of the two reserved names without the prefix.
        flags: the reserved booleans that were given.
        raw: the values before they were typed.
    """

    file: str
    user: dict[str, Any]
    reserved: dict[str, Any]
    flags: dict[str, bool]
    raw: dict[str, Any]

    @property
    def framework(self) -> dict[str, Any]:
        """The reserved values that have no meaning of their own (``SM_FRAMEWORK_PARAMS``)."""
        return {name: value for name, value in self.reserved.items() if name not in (*NAMED, *LAUNCHERS_OWN)}

    @property
    def distributed(self) -> bool:
        """Whether any distribution flag is on."""
        return any(self.flags.get(name, False) for name in DISTRIBUTION_FLAGS)

    def reserved_text(self, name: str) -> str | None:
        """A reserved value that is a text: a bare ``123`` is then the text "123". None when absent, null or empty.

        Raises:
            ContractError: the file holds something that is not a string.
        """
        value = self.reserved.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            value = self.raw[name]
        if not isinstance(value, str):
            raise ContractError(self.file, name, shown(value), "a string")
        return value or None


def read_hyperparameters(file: str, *, retry_for_s: float) -> Hyperparameters:
    """Read ``file``; a missing file is a job without hyperparameters.

    Raises:
        ContractError: malformed file, a reserved boolean that is neither, or a name or value that no operating
            system can put into an environment or a command line.
    """
    raw = read_object(file, retry_for_s=retry_for_s) or {}
    user: dict[str, Any] = {}
    reserved: dict[str, Any] = {}
    for name, value in raw.items():
        typed = _typed(file, name, value)
        _check_passable(file, name, typed)
        target = reserved if name in NAMED or name.startswith(RESERVED_PREFIX) else user
        target[name] = typed
    flags = {name: parse_flag(file, name, reserved[name]) for name in FLAGS if name in reserved}
    return Hyperparameters(file=file, user=user, reserved=reserved, flags=flags, raw=raw)


def parse_flag(file: str, field: str, value: object) -> bool:
    """A reserved boolean. ``"False"``, which Python clients send, is false.

    Raises:
        ContractError: anything but the spellings listed in the text.
    """
    for known in (*_TRUE, *_FALSE):
        # The type is compared too: 1 == 1.0 == True, but 1.0 is not a spelling of a boolean.
        if type(value) is type(known) and value == known:
            return known in _TRUE
    raise ContractError(file, field, shown(value), "true, True, 1, false, False or 0")


def _typed(file: str, name: str, value: object) -> Any:
    if not isinstance(value, str):
        return value
    try:
        # NaN and Infinity are numbers here, as in the reference: users write them as values.
        return json.loads(value)
    except ValueError:
        return value
    except RecursionError as error:
        raise ContractError(file, name, "JSON nested too deeply to read", "a shallower value") from error


def _check_passable(file: str, name: str, value: object) -> None:
    """Refuse what ``execve`` cannot carry: NUL and lone surrogates anywhere, ``=`` in a variable's name."""
    if "=" in name:
        raise ContractError(file, name, "'=' in the name", "a name that can be part of an environment variable's")
    texts = [name]
    if isinstance(value, str):
        texts.append(value)
    elif isinstance(value, dict):  # becomes "key=value,..." on the command line
        texts.extend(part for item in value.items() for part in item if isinstance(part, str))
    for text in texts:
        if "\0" in text:
            raise ContractError(file, name, "a NUL character", "text without NUL, which no program can be given")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ContractError(file, name, "half of a surrogate pair", "text that can be encoded as UTF-8")
