"""What is to be run, and where each decision came from.

Sources, strongest first: command line, ``LAUNCHER_*`` environment, torchrun's ``PET_*`` environment, reserved
hyperparameters, ``launcher.yaml``, defaults.
"""

from __future__ import annotations

import os
import re
import sys

from launcher import container as contract
from launcher import hosts as host_lists
from launcher.errors import ContractError, OutputError, UsageError
from launcher.options import BY_NAME, OPTIONS, CommandLine, Option, convert, suggest
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from launcher.container import Container
    from launcher.hosts import HostList

# Kinds of entry point. `call` and `function` are made by the library and by SAGEMAKER_TRAINING_MODULE.
SCRIPT, MODULE, COMMAND, FUNCTION, CALL = "script", "module", "command", "function", "call"

# Variables of ours that are no settings: what ranks are given (seen by a launcher that runs inside a rank).
_OWN_VARIABLES = (
    "LAUNCHER_AGENT_SOCKET",
    "LAUNCHER_ATTEMPT",
    "LAUNCHER_CHECKPOINT_DIR",
    "LAUNCHER_COLLECTIVE_LEG",
    "LAUNCHER_COLLECTIVE_WIRE",
    "LAUNCHER_CUDA_IPC",
    "LAUNCHER_DATA_ACCESS",
    "LAUNCHER_GUARDIAN",
    "LAUNCHER_ISA",
    "LAUNCHER_JOB_ID",
    "LAUNCHER_LOADING_MAIN",
    "LAUNCHER_RESULT",
    "LAUNCHER_RUN_DIR",
    "LAUNCHER_SECRET",
    "LAUNCHER_STATUS_PAGE",
    "LAUNCHER_STOP_DEADLINE",
    "LAUNCHER_ZERO_COPY",
)


class Setting(Record):
    """A value and the source that won."""

    value: Any
    source: str


class Entry(Record):
    """The program of a rank. ``target``: path, dotted module name, ``module:function``, or payload file (call)."""

    kind: str
    target: str
    args: tuple[str, ...]
    directory: str
    python: str
    name: str


class JobSpec(Record):
    """One host's view of the job before anything is started.

    Attributes:
        container: this host's job tree, as it was read.
        hosts: those that form the job.
        mode: ``run`` or ``train``.
        made_tree: the job tree was made for this run.
    """

    run_id: str
    entry: Entry
    settings: dict[str, Setting]
    container: Container
    hosts: HostList
    mode: str
    made_tree: bool = False

    def __getitem__(self, name: str) -> Any:
        return self.settings[name].value


def resolve(
    line: CommandLine, environ: Mapping[str, str], log: Callable[[str], None], entry: Entry | None = None
) -> JobSpec:
    """Reads all sources and decides. ``train`` also fetches code and installs requirements; ``plan`` does neither.

    Args:
        entry: the entry point, when a library call brings its own.

    Raises:
        UsageError: a bad option or setting, or no such script.
        ContractError: bad input under the base directory.
    """
    for name in environ:
        if name.startswith("LAUNCHER_") and name[9:].lower() not in BY_NAME and name not in _OWN_VARIABLES:
            known = ["LAUNCHER_" + option.upper() for option in BY_NAME]
            log(f"environment variable {name} is not a setting, and has no effect{suggest(name, known)}")
    cli = _from_line(line)
    yaml_file, yaml = _read_yaml(cli, environ)
    early = _settle(cli, environ, {}, yaml, yaml_file)
    run_id = _run_id(early, environ)
    # `plan SCRIPT` shows what a run would do, `plan` alone what `train` would.
    mode = line.command if line.command != "plan" else ("run" if line.script or entry else "train")
    python = _interpreter(early, environ)
    if mode == "run" and entry is None:
        entry = _command_line_entry(line, early, python, environ)  # a mistake in it must leave nothing behind
    facts, hosts = _container(early, environ, mode, run_id, write=line.command != "plan")
    settings = _settle(cli, environ, facts.reserved, yaml, yaml_file)
    made = hosts is not None
    if hosts is None:
        hosts = host_lists.find(settings, facts.resources, _training_hosts(facts), environ, host_lists.here())
    if entry is None:
        if line.script:
            raise UsageError(f"train takes no script: found {line.script!r}; the container contract names it")
        entry = _contract_entry(facts, python, environ, log, prepare=line.command != "plan")
    if settings["preload"].value and entry.kind == COMMAND:
        log("--preload has no effect: the entry point is not run by Python")
    if settings["horovod_compat"].value != "off":
        if entry.kind == COMMAND:
            log("--horovod-compat has no effect: the entry point is not run by Python")
        if settings["engine"].value == "horovod":
            raise UsageError(
                "--engine horovod runs an installed Horovod, --horovod-compat is for a job without one: leave one out"
            )
    if "rdzv_endpoint" in cli and hosts.named:
        log(f"--rdzv-endpoint has no effect: the hosts are those of {hosts.source}")
    node_rank = settings["node_rank"].value
    if node_rank and node_rank != str(hosts.host_rank):
        log(f"--node-rank {node_rank} has no effect: this is host {hosts.host_rank} of the list from {hosts.source}")
    return JobSpec(
        run_id=run_id, entry=entry, settings=settings, container=facts, hosts=hosts, mode=mode, made_tree=made
    )


def preview(line: CommandLine, environ: Mapping[str, str]) -> tuple[str, dict[str, Setting]]:
    """The run id and the settings, as far as they are known without a job tree; the entry point is checked as well.

    Raises:
        UsageError: a bad option or setting, or no such script.
    """
    cli = _from_line(line)
    yaml_file, yaml = _read_yaml(cli, environ)
    settings = _settle(cli, environ, {}, yaml, yaml_file)
    _command_line_entry(line, settings, _interpreter(settings, environ), environ)
    return _run_id(settings, environ), settings


def _training_hosts(facts: Container) -> tuple[str, ...]:
    """The hosts that train together: those of the instance groups that were named for it, else all."""
    return facts.distribution_hosts if facts.distribution_groups else facts.resources.hosts


def _from_line(line: CommandLine) -> dict[str, Any]:
    return {name: convert(BY_NAME[name], raw, _spelled(name)) for name, raw in line.given.items()}


def _interpreter(settings: dict[str, Setting], environ: Mapping[str, str]) -> str:
    return settings["python"].value or environ.get("PYTHON_EXEC") or sys.executable


def _run_id(settings: dict[str, Setting], environ: Mapping[str, str]) -> str:
    given = settings["rdzv_id"].value or environ.get("TRAINING_JOB_NAME") or _fresh_id()
    return re.sub(r"[^A-Za-z0-9._-]", "_", given).lstrip(".") or _fresh_id()  # it becomes the name of a directory


def _spelled(name: str) -> str:
    return "option --" + name.replace("_", "-")


def _fresh_id() -> str:
    import time

    return time.strftime("%Y%m%d-%H%M%S-") + os.urandom(3).hex()


def _settle(
    cli: dict[str, Any], environ: Mapping[str, str], reserved: Mapping[str, Any], yaml: dict[str, Any], yaml_file: str
) -> dict[str, Setting]:
    return {option.name: _setting(option, cli, environ, reserved, yaml, yaml_file) for option in OPTIONS}


def _setting(
    option: Option,
    cli: dict[str, Any],
    environ: Mapping[str, str],
    reserved: Mapping[str, Any],
    yaml: dict[str, Any],
    yaml_file: str,
) -> Setting:
    if option.name in cli:
        return Setting(cli[option.name], "command line")
    for variable in ("LAUNCHER_" + option.name.upper(), option.pet):
        if variable and environ.get(variable):
            source = f"environment {variable}"
            return Setting(convert(option, environ[variable], source), source)
    if option.hyperparameter and option.hyperparameter in reserved:
        source = f"hyperparameter {option.hyperparameter}"
        return Setting(convert(option, reserved[option.hyperparameter], source), source)
    if option.name in yaml:
        return Setting(convert(option, yaml[option.name], yaml_file), yaml_file)
    return Setting(option.default, "default")


def _read_yaml(cli: dict[str, Any], environ: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    path = str(cli.get("config") or environ.get("LAUNCHER_CONFIG") or "")
    if not path:
        path = "launcher.yaml"
        if not os.path.exists(path):
            return "", {}
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return path, {}
    if not isinstance(content, dict):
        raise UsageError(f"{path}: found a {type(content).__name__}; expected a mapping of setting: value")
    settings = {str(key).replace("-", "_"): value for key, value in content.items()}
    for key in settings:
        if key not in BY_NAME:
            raise UsageError(f"{path}: unknown setting {key!r}{suggest(key, BY_NAME)}")
    return path, settings


def _container(
    settings: dict[str, Setting], environ: Mapping[str, str], mode: str, run_id: str, write: bool
) -> tuple[Container, HostList | None]:
    """The job tree: the platform's where there is one, else one made for this run, and for which hosts."""
    base = settings["base_dir"].value or environ.get("SAGEMAKER_BASE_DIR")
    if not base:
        config = "/opt/ml/input/config"
        present = any(os.path.exists(f"{config}/{name}") for name in ("resourceconfig.json", "resourceConfig.json"))
        if present or mode == "train":
            base = contract.Paths.at("/opt/ml").base
            if not os.path.isdir(base):
                raise ContractError(
                    base,
                    "",
                    "no such directory",
                    "the container's job tree (--base-dir or SAGEMAKER_BASE_DIR names another; without one, run "
                    "`python -m launcher SCRIPT`)",
                )
    if base:
        if settings["channel"].value:
            raise UsageError(f"--channel makes a job tree, but there is one already: {base}; leave one of the two out")
        return contract.read(base, environ), None
    hosts = host_lists.find(settings, None, (), environ, host_lists.here())
    base = settings["job_dir"].value or os.path.join("launcher_runs", run_id)
    if len(hosts.hosts) > 1:
        base = os.path.join(base, hosts.host)  # the same command runs on all hosts, on a file system they may share
    if not write:  # `plan` touches nothing: show the tree as it would be read back
        import tempfile

        with tempfile.TemporaryDirectory() as scratch:
            _make_tree(scratch, settings, hosts)
            facts = contract.read(scratch, environ, retry_for_s=0)
        from launcher.record import moved

        facts = moved(facts, os.path.abspath(scratch), os.path.abspath(base))
        return facts, hosts
    try:
        _make_tree(base, settings, hosts)
    except OutputError as error:
        raise OutputError(f"{error}; --job-dir names another place") from error
    return contract.read(base, environ), hosts


def _make_tree(base: str, settings: dict[str, Setting], hosts: HostList) -> None:
    interface = "lo"
    if len(hosts.hosts) > 1:
        from launcher.interfaces import default_interface

        interface = settings["interface"].value or default_interface() or interface
    contract.make_job_tree(
        base, settings["channel"].value, {}, host=hosts.host, hosts=hosts.hosts, network_interface_name=interface
    )


def _command_line_entry(
    line: CommandLine, settings: dict[str, Setting], python: str, environ: Mapping[str, str]
) -> Entry:
    script = line.script
    if not script:
        raise UsageError("no script given; usage: python -m launcher [options] SCRIPT [script arguments], see --help")
    name = os.path.basename(script)
    if settings["module"].value:
        return Entry(MODULE, script, line.script_args, os.getcwd(), python, script)
    if settings["no_python"].value:
        return Entry(COMMAND, _executable(script, environ), line.script_args, os.getcwd(), python, name)
    if not os.path.exists(script):
        raise UsageError(f"no such script: {script}{suggest(script, ('train', 'plan', 'simulate'))}")
    if os.path.isdir(script) and not os.path.exists(os.path.join(script, "__main__.py")):
        raise UsageError(f"{script} is a directory without a __main__.py")
    if script.endswith(".sh") and not (os.access(script, os.X_OK) and _has_shebang(script)):
        return Entry(COMMAND, "/bin/sh", (script, *line.script_args), os.getcwd(), python, name)
    if not script.endswith((".py", ".pyc", ".pyz")) and os.path.isfile(script) and os.access(script, os.X_OK):
        return Entry(COMMAND, os.path.abspath(script), line.script_args, os.getcwd(), python, name)
    return Entry(SCRIPT, script, line.script_args, os.getcwd(), python, name)


def _has_shebang(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(2) == b"#!"
    except OSError:
        return True  # executable but not readable: the kernel will tell


def _executable(name: str, environ: Mapping[str, str]) -> str:
    if os.sep in name:
        if os.access(name, os.X_OK) and os.path.isfile(name):
            return os.path.abspath(name)
        raise UsageError(f"--no-python {name}: not an executable file")
    for directory in environ.get("PATH", os.defpath).split(os.pathsep):
        path = os.path.join(directory, name)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return os.path.abspath(path)
    raise UsageError(f"--no-python {name}: not found on PATH")


def _contract_entry(
    facts: Container, python: str, environ: Mapping[str, str], log: Callable[[str], None], prepare: bool
) -> Entry:
    code_dir = facts.paths.code_dir
    args = tuple(contract.to_args(facts.user))
    if facts.framework_module:
        return Entry(FUNCTION, facts.framework_module, args, code_dir, python, facts.framework_module)
    if not facts.program:
        raise ContractError(
            facts.hyperparameters.file,
            "sagemaker_program",
            "nothing",
            "the name of the entry point, here or in SAGEMAKER_PROGRAM (or a function in SAGEMAKER_TRAINING_MODULE)",
        )
    if prepare:
        contract.prepare_code(facts, log)
    elif not os.path.isdir(code_dir) or not os.listdir(code_dir):
        # `plan` before the code is there: its name tells what it will be, unless a setup.py comes with it.
        kind = COMMAND if not facts.program.endswith(".py") else SCRIPT
        return Entry(kind, facts.program, args, code_dir, python, facts.program)
    found = contract.entry_point_kind(facts.program, code_dir)
    if prepare:
        contract.make_executable(found)
        if found.kind == "package":
            contract.install_package(code_dir, python, log, environ)
        else:
            contract.install_requirements(code_dir, python, log, environ)
    if found.kind == "program":
        return Entry(SCRIPT, found.name, args, code_dir, python, found.name)
    if found.kind in ("package", "module"):
        return Entry(MODULE, found.module, args, code_dir, python, found.name)
    argv = contract.command_for(found, args, python=python)
    target = argv[0] if os.path.isabs(argv[0]) else os.path.join(code_dir, argv[0])
    return Entry(COMMAND, target, tuple(argv[1:]), code_dir, python, found.name)


def parse_map(text: str, what: str, ranks: int) -> dict[int, int]:
    """torchrun's stream map, with ranges: ``3`` for all, or ``0:3,4-7:1``. Local rank -> 0 none, 1 out, 2 err, 3 both.

    Raises:
        UsageError: naming the piece that is wrong.
    """
    streams = ("0", "1", "2", "3")
    if text in streams:
        return dict.fromkeys(range(ranks), int(text))
    result = dict.fromkeys(range(ranks), 0)
    for piece in text.split(","):
        local_ranks, colon, value = piece.partition(":")
        if not colon or value not in streams:
            raise UsageError(f"{what} {text!r}: {piece!r} is not RANKS:STREAMS, with STREAMS 0, 1, 2 or 3")
        for local_rank in parse_ranks(local_ranks, what, ranks):
            result[local_rank] = int(value)
    return result


def parse_ranks(text: str, what: str, ranks: int) -> list[int]:
    """``0,2-3`` as a list of local ranks. Raises UsageError for what is not a local rank of this host."""
    result: list[int] = []
    for piece in text.split(","):
        first, dash, last = piece.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UsageError(f"{what} {text!r}: {piece!r} is not a local rank or a range of them")
        wanted = range(int(first), int(last or first) + 1)
        if not wanted or wanted[-1] >= ranks:
            raise UsageError(f"{what} {text!r}: {piece!r} is outside of the local ranks 0..{ranks - 1}")
        result += wanted
    return result


def count_ranks(setting: Setting, gpus: int, neurons: int, cpus: int) -> int:
    """Ranks on this host from ``nproc_per_node``.

    Raises:
        UsageError: not a number and none of the words, or ``gpu`` without a GPU.
    """
    text = str(setting.value)
    if text == "auto":
        return gpus or neurons or 1
    if text == "cpu":
        return cpus
    if text == "gpu":
        if gpus == 0:
            raise UsageError(f"nproc_per_node (from {setting.source}) is gpu, but no GPU is visible on this host")
        return gpus
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise UsageError(f"nproc_per_node (from {setting.source}) is {text!r}; expected a number above 0, auto, gpu or cpu")
