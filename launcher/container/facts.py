"""Everything the container tells about its job, read once into one frozen record."""

from __future__ import annotations

import json

from launcher.container.channels import Channels, read_channels
from launcher.container.hyperparameters import Hyperparameters, read_hyperparameters
from launcher.container.paths import HYPERPARAMETERS, INPUT_DATA_CONFIG, Paths, base_dir
from launcher.container.reading import RETRY_FOR_S, shown, text_list
from launcher.container.resources import ResourceConfig, read_resource_config
from launcher.errors import ContractError
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from launcher.container.channels import Channel

# logging's numbers, without importing it.
LOG_LEVELS = {"CRITICAL": 50, "ERROR": 40, "WARNING": 30, "INFO": 20, "DEBUG": 10, "NOTSET": 0}
DEFAULT_LOG_LEVEL = 20

_GROUPS_FIELD = "sagemaker_distribution_instance_groups"


class Container(Record):
    """The facts of one host's container. Absent texts are None.

    Attributes:
        hyperparameters: the script's own (``.user``) and the reserved ones (``.reserved``, ``.flags``).
        distribution_groups: instance groups that train together; others run the script on their own.
        distribution_hosts: their hosts, group after group in the file's order; empty when nothing is distributed
            and the file lists groups; all hosts when it lists none.
        program: name of the entry point, relative to the code directory.
        framework_module: ``module:function`` that replaces the entry point.
        submit_dir: where the user's code comes from: URI, path, or the code directory itself.
        log_level: a number of the ``logging`` module.
        job_name: the platform's name of the job.
        sources: which file or variable each of the fields from ``program`` on came from; defaults have no entry.
    """

    paths: Paths
    hyperparameters: Hyperparameters
    resources: ResourceConfig
    input_data: Channels
    distribution_groups: tuple[str, ...]
    distribution_hosts: tuple[str, ...]
    program: str | None
    framework_module: str | None
    submit_dir: str
    log_level: int
    job_name: str | None
    job_arn: str | None
    region: str | None
    s3_output: str | None
    s3_endpoint_url: str | None
    model_parallel_parameters: str | None
    sources: dict[str, str]

    @property
    def user(self) -> dict[str, Any]:
        """The script's hyperparameters, typed, in the file's order."""
        return self.hyperparameters.user

    @property
    def reserved(self) -> dict[str, Any]:
        """The reserved hyperparameters, typed, in the file's order."""
        return self.hyperparameters.reserved

    @property
    def channels(self) -> dict[str, Channel]:
        """Channel name to channel."""
        return self.input_data.by_name

    @property
    def leader(self) -> str:
        """First of the hosts that train together, else first of all hosts."""
        return (self.distribution_hosts or self.resources.hosts)[0]

    @property
    def distribution_enabled(self) -> bool:
        """Whether this host's group is one of those that train together."""
        return self.resources.current_group_name in self.distribution_groups

    def flag(self, name: str) -> bool:
        """A reserved boolean; absent is False."""
        return self.hyperparameters.flags.get(name, False)


def read(base: str | None, environ: Mapping[str, str], *, retry_for_s: float = RETRY_FOR_S) -> Container:
    """Read the job tree under ``base`` (None: ``SAGEMAKER_BASE_DIR``, else ``/opt/ml``).

    ``resourceconfig.json`` is required; a missing ``hyperparameters.json`` means none, a missing
    ``inputdataconfig.json`` means that the directories under ``input/data`` are the channels. Nothing is written.

    Args:
        environ: the launcher's environment.
        retry_for_s: seconds for which a file that is empty or cut short is read again before it is an error.

    Raises:
        ContractError: a file is missing, malformed or contradictory.
    """
    paths = Paths.at(base_dir(environ) if base is None else base)
    resources = read_resource_config(paths.config_dir, retry_for_s=retry_for_s)
    hyperparameters = read_hyperparameters(paths.config_file(HYPERPARAMETERS), retry_for_s=retry_for_s)
    channels = read_channels(paths.config_file(INPUT_DATA_CONFIG), paths.data_dir, retry_for_s=retry_for_s)
    groups = _distribution_groups(hyperparameters, resources)
    settings, sources = _settings(paths, hyperparameters, environ)
    return Container(
        paths=paths,
        hyperparameters=hyperparameters,
        resources=resources,
        input_data=channels,
        distribution_groups=groups,
        distribution_hosts=_distribution_hosts(groups, resources),
        sources=sources,
        **settings,
    )


def _settings(
    paths: Paths, hyperparameters: Hyperparameters, environ: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The fields that have one or more possible sources each, first one wins; and which one did."""
    sources: dict[str, str] = {}

    def first(field: str, *names: str) -> str | None:
        for name in names:
            # Variables are written in capitals, hyperparameters are not.
            value = environ.get(name) if name.isupper() else hyperparameters.reserved_text(name)
            if value:
                sources[field] = f"environment {name}" if name.isupper() else f"{hyperparameters.file}: {name}"
                return value
        return None

    settings: dict[str, Any] = {
        "program": first("program", "SAGEMAKER_PROGRAM", "sagemaker_program"),
        "framework_module": first("framework_module", "SAGEMAKER_TRAINING_MODULE"),
        "submit_dir": first("submit_dir", "sagemaker_submit_directory") or paths.code_dir,
        "log_level": _log_level(hyperparameters),
        "job_name": first("job_name", "TRAINING_JOB_NAME"),
        "job_arn": first("job_arn", "TRAINING_JOB_ARN"),
        "region": first("region", "sagemaker_region", "AWS_DEFAULT_REGION", "AWS_REGION", "SAGEMAKER_REGION"),
        "s3_output": first("s3_output", "sagemaker_s3_output"),
        "s3_endpoint_url": first("s3_endpoint_url", "S3_ENDPOINT_URL"),
        # Empty and absent differ in SM_TRAINING_ENV, so no `first` here.
        "model_parallel_parameters": environ.get("SM_HP_MP_PARAMETERS"),
    }
    if "sagemaker_container_log_level" in hyperparameters.reserved:
        sources["log_level"] = f"{hyperparameters.file}: sagemaker_container_log_level"
    return settings, sources


def _log_level(hyperparameters: Hyperparameters) -> int:
    """A number, a number as text (some clients encode twice), or a name of the ``logging`` module."""
    field = "sagemaker_container_log_level"
    given = hyperparameters.reserved.get(field)
    value = given
    if isinstance(value, str):
        name = value.strip('" ').upper()
        value = LOG_LEVELS.get(name)
        if value is None and name.isdecimal() and len(name) < 4:
            value = json.loads(name.lstrip("0") or "0")
    if given is None:
        return DEFAULT_LOG_LEVEL
    if type(value) is int and value >= 0:
        return value
    raise ContractError(hyperparameters.file, field, shown(given), "a number such as 20, or DEBUG, INFO, WARNING, ...")


def _distribution_groups(hyperparameters: Hyperparameters, resources: ResourceConfig) -> tuple[str, ...]:
    """Those named by the reserved hyperparameter, else this host's own when a distribution flag is on."""
    named = hyperparameters.reserved.get(_GROUPS_FIELD)
    if named is None:
        return (resources.current_group_name,) if hyperparameters.distributed else ()
    if named == []:
        return ()
    groups = text_list(hyperparameters.file, _GROUPS_FIELD, named)
    known = [group.name for group in resources.instance_groups]
    for index, group in enumerate(groups):
        if known and group not in known:
            field = f"{_GROUPS_FIELD}[{index}]"
            raise ContractError(hyperparameters.file, field, shown(group), f"one of instance_groups, {shown(known)}")
    return groups


def _distribution_hosts(groups: tuple[str, ...], resources: ResourceConfig) -> tuple[str, ...]:
    if not resources.instance_groups:
        return resources.hosts
    return tuple(host for group in resources.instance_groups if group.name in groups for host in group.hosts)
