"""The environment of the user's script: every ``SM_*`` variable of the reference toolkit, byte for byte.

Encoding: the name is ``SM_`` and the upper-case key, no other character changed; text unchanged, null empty, all
else as JSON without spaces, keys sorted, non-ASCII escaped. On purpose different from the reference
(sagemaker-training 5.1.4):

* ``PYTHONPATH`` is not set: the reference exports the search path of its own interpreter, which breaks scripts
  that run in another one.
* A distribution flag written ``"False"`` is off; the reference takes every non-empty text for on.
* Without ``current_group_name`` the group is the one that lists this host, not always ``homogeneousCluster``.
* ``SAGEMAKER_REGION`` falls back to ``AWS_REGION`` and to its own earlier value.
* Names with characters that shells cannot read get an alias with underscores besides
  (``SM_HP_BATCH_SIZE`` beside ``SM_HP_BATCH-SIZE``), unless a real hyperparameter has that name.
* The variables that version 3 of the SageMaker Python SDK sets are added (``SM_HOST_COUNT`` and others).
"""

from __future__ import annotations

import json

from launcher.container.arguments import to_args
from launcher.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from launcher.container.facts import Container

# Linux: MAX_ARG_STRLEN, 32 pages of 4 KiB, the NUL at the end included (include/uapi/linux/binfmts.h).
LONGEST_STRING_BYTES = 32 * 4096 - 1


def sm_environment(
    container: Container,
    *,
    num_cpus: int,
    num_gpus: int = 0,
    num_neurons: int = 0,
    user_entry_point: str | None = None,
    smddprun_installed: bool = False,
    smddpmprun_installed: bool = False,
    master_port: int | None = None,
) -> dict[str, str]:
    """The variables to add to the script's environment. Pure: what was probed on the machine is passed in.

    Args:
        num_cpus: processors to report; the reference counts those of the host.
        user_entry_point: name of the script; None: the container's own.
        smddprun_installed, smddpmprun_installed: whether those two tools are on the path.
        master_port: for ``SM_MASTER_PORT``; None leaves it out.
    """
    entry_point = user_entry_point or container.program
    probes = {
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        "num_neurons": num_neurons,
        "is_smddprun_installed": smddprun_installed,
        "is_smddpmprun_installed": smddpmprun_installed,
    }
    facts = _training_env(container, entry_point) | probes
    result = {_name(key): _value(facts[key]) for key in _PUBLISHED}
    result["SM_HPS"] = _value(facts["hyperparameters"])
    result["SM_FRAMEWORK_PARAMS"] = _value(facts["additional_framework_parameters"])
    result["SM_CHANNELS"] = _value(sorted(container.channels))
    result["SM_TRAINING_ENV"] = _value(facts)
    result["SM_USER_ARGS"] = _value(to_args(container.user))
    if facts["topology"]:
        result["SM_TOPOLOGY"] = _value(facts["topology"])
    for name, channel in container.channels.items():
        result[_name(f"channel_{name}")] = channel.path
    for name, value in container.user.items():
        result[_name(f"hp_{name}")] = _value(value)
    result["SAGEMAKER_JOB_NAME"] = container.hyperparameters.reserved_text("sagemaker_job_name") or ""
    result["SAGEMAKER_REGION"] = container.region or ""
    result["CURRENT_HOST"] = container.resources.current_host
    # The reference's own variables are complete here: what follows only fills gaps.
    for name, value in {**_aliases(result), **_sdk_v3(container, entry_point, master_port)}.items():
        result.setdefault(name, value)
    return result


def check_lengths(environ: Mapping[str, str]) -> None:
    """Refuse variables that the kernel would refuse with a bare E2BIG.

    Raises:
        UsageError: a ``NAME=value`` is longer than 131,071 bytes; the text names the variable and its size.
    """
    for name, value in environ.items():
        size = len(name.encode("utf-8", "surrogateescape")) + 1 + len(value.encode("utf-8", "surrogateescape"))
        if size > LONGEST_STRING_BYTES:
            raise UsageError(
                f"environment variable {name} is {size} bytes long; Linux takes at most {LONGEST_STRING_BYTES}: "
                "put long hyperparameters into a file in a channel"
            )


# Keys of SM_TRAINING_ENV that have a variable of the same name.
_PUBLISHED = (
    "hosts",
    "network_interface_name",
    "user_entry_point",
    "resource_config",
    "input_data_config",
    "output_data_dir",
    "current_host",
    "current_instance_type",
    "current_instance_group",
    "current_instance_group_hosts",
    "instance_groups",
    "instance_groups_dict",
    "distribution_instance_groups",
    "is_hetero",
    "module_name",
    "log_level",
    "framework_module",
    "input_dir",
    "input_config_dir",
    "output_dir",
    "num_cpus",
    "num_gpus",
    "num_neurons",
    "model_dir",
    "module_dir",
    "output_intermediate_dir",
)


def _training_env(container: Container, entry_point: str | None) -> dict[str, Any]:
    """The 37 properties of ``SM_TRAINING_ENV``, less the five that come from probes."""
    paths, resources = container.paths, container.resources
    groups = resources.raw.get("instance_groups", [])
    parallel = container.model_parallel_parameters
    return {
        "additional_framework_parameters": container.hyperparameters.framework,
        "channel_input_dirs": {name: channel.path for name, channel in container.channels.items()},
        "current_host": resources.current_host,
        "current_instance_group": resources.current_group_name,
        "current_instance_group_hosts": resources.current_group_hosts,
        "current_instance_type": resources.current_instance_type,
        "distribution_hosts": container.distribution_hosts,
        "distribution_instance_groups": container.distribution_groups,
        "framework_module": container.framework_module,
        "hosts": resources.hosts,
        "hyperparameters": container.user,
        "input_config_dir": paths.config_dir,
        "input_data_config": container.input_data.raw,
        "input_dir": paths.input_dir,
        "instance_groups": [group.name for group in resources.instance_groups],
        "instance_groups_dict": {group["instance_group_name"]: group for group in groups},
        "is_hetero": len(groups) > 1,
        "is_master": resources.current_host == container.leader,
        # Intentional: null when the variable is absent, "" when it is empty; so does the reference.
        "is_modelparallel_enabled": parallel and parallel != "{}",
        "job_name": container.job_name,
        # As given: a client that sends the text "20" finds the text "20".
        "log_level": container.reserved.get("sagemaker_container_log_level", container.log_level),
        "master_hostname": container.leader,
        "model_dir": paths.model_dir,
        "module_dir": container.submit_dir,
        "module_name": _module_name(entry_point),
        "network_interface_name": resources.network_interface_name,
        "output_data_dir": paths.output_data_dir,
        "output_dir": paths.output_dir,
        "output_intermediate_dir": paths.intermediate_dir,
        "resource_config": resources.raw,
        "topology": resources.raw.get("topology", []),
        "user_entry_point": entry_point,
    }


def _module_name(entry_point: str | None) -> str:
    # Intentional: "None" without an entry point, as in the reference.
    return str(entry_point).removesuffix(".py")


def _name(key: str) -> str:
    return "SM_" + key.upper()


def _value(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _aliases(variables: dict[str, str]) -> dict[str, str]:
    result = {}
    for name, value in variables.items():
        if name.startswith(("SM_HP_", "SM_CHANNEL_")):
            alias = "".join(c if c.isascii() and c.isalnum() else "_" for c in name)
            result[alias] = value
    return result


def _sdk_v3(container: Container, entry_point: str | None, master_port: int | None) -> dict[str, str]:
    """What the SDK's own drivers export, with its constants replaced by this job's facts."""
    hosts = container.resources.hosts
    result = {
        "SM_MASTER_ADDR": container.leader,
        "SM_HOST_COUNT": str(len(hosts)),
        "SM_CURRENT_HOST_RANK": str(container.resources.host_rank),
        "SM_INPUT_DATA_DIR": container.paths.data_dir,
        "SM_OUTPUT_FAILURE": container.paths.failure_file,
        "SM_SOURCE_DIR": container.paths.code_dir,
    }
    if entry_point is not None:
        result["SM_ENTRY_SCRIPT"] = entry_point
    if master_port is not None:
        result["SM_MASTER_PORT"] = str(master_port)
    return result
