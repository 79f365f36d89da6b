"""All settings of a job in one table: command line, environment, YAML key, default and help come from here.

One table, not argparse: the same row serves five sources, ``plan`` can say which of them won, a mistyped name gets a
suggestion from it, and importing it costs nothing.
"""

from __future__ import annotations

from launcher.errors import UsageError
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping


class Option(Record):
    """One setting. ``name`` is its YAML key and, with dashes, its option; ``LAUNCHER_<NAME>`` is its variable.

    ``pet`` is torchrun's variable for the same thing (``PET_<NAME>``), ``hyperparameter`` the reserved one of the
    platform. ``kind``: ``text``, ``int``, ``seconds``, ``flag``, ``choice``, ``mode`` (a choice with "off",
    whose bare option, or "true", is the second one) or ``pairs`` (repeatable NAME=VALUE).
    """

    name: str
    kind: str
    default: object
    help: str
    metavar: str = ""
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    pet: str = ""
    hyperparameter: str = ""
    group: str = "job"


_RUN = (
    Option(
        "nproc_per_node",
        "text",
        "auto",
        "ranks on this host: a number, gpu, cpu, or auto (one per GPU, else 1)",
        "N",
        ("--nproc", "-n"),
        pet="PET_NPROC_PER_NODE",
        hyperparameter="sagemaker_mpi_num_of_processes_per_host",
    ),
    Option("module", "flag", False, "the script is a module name, as in python -m", aliases=("-m",), pet="PET_MODULE"),
    Option("no_python", "flag", False, "run the script itself, not by the interpreter", pet="PET_NO_PYTHON"),
    Option("standalone", "flag", False, "this host alone, whatever the host list says", pet="PET_STANDALONE"),
    Option("preload", "text", "", "modules imported once, before the ranks are forked (e.g. torch)", "MODULES"),
    Option("config", "text", "", "YAML file with any of these settings (default: launcher.yaml, if there)", "FILE"),
    Option("base_dir", "text", "", "the container's /opt/ml", "DIR", group="paths"),
    Option("job_dir", "text", "", "where to make the job tree when there is no /opt/ml", "DIR", group="paths"),
    Option("channel", "pairs", {}, "a channel of the job tree; may be repeated", "NAME=PATH", group="paths"),
)

_STOP = (
    Option(
        "max_restarts",
        "int",
        0,
        "restarts of the whole group after a failure",
        "N",
        pet="PET_MAX_RESTARTS",
        group="failures and stops",
    ),
    Option(
        "crash_loop_s",
        "seconds",
        60.0,
        "three failures alike, each without a step and sooner than this, end the restarts",
        "SECONDS",
        group="failures and stops",
    ),
    Option(
        "grace",
        "seconds",
        None,
        "time from SIGTERM to SIGKILL (default: 30 after a failure; on a stop, stop-timeout less stop-reserve)",
        "SECONDS",
        ("--shutdown-timeout",),
        pet="PET_SHUTDOWN_TIMEOUT",
        group="failures and stops",
    ),
    Option("stop_timeout", "seconds", 120.0, "what the platform gives a stop", "SECONDS", group="failures and stops"),
    Option(
        "stop_reserve",
        "seconds",
        10.0,
        "part of it kept for killing, reaping and writing the verdict",
        "SECONDS",
        group="failures and stops",
    ),
    Option(
        "hang_timeout",
        "seconds",
        1800.0,
        "no log, no step, no CPU and no I/O in any rank for this long is a hang; 0: never",
        "SECONDS",
        group="failures and stops",
    ),
    Option(
        "straggler_window",
        "seconds",
        60.0,
        "how often to look for a rank that the others wait for in collectives; 0: never",
        "SECONDS",
        group="failures and stops",
    ),
    Option(
        "early_exit",
        "choice",
        "wait",
        "when a rank leaves by os._exit(0) while others work: wait for them and fail, abort, or accept it",
        choices=("wait", "abort", "ok"),
        group="failures and stops",
    ),
    Option(
        "follow_parent",
        "choice",
        "auto",
        "end the job when the process that started the launcher ends (auto: for `train`)",
        choices=("auto", "on", "off"),
        group="failures and stops",
    ),
)

_LOGS = (
    Option("log_dir", "text", "", "where log files go; /dev/null for none", "DIR", pet="PET_LOG_DIR", group="logs"),
    Option(
        "redirects",
        "text",
        "0",
        "streams kept off the console: 0 none, 1 out, 2 err, 3 both, or by local rank 0-7:3,8:1",
        "MAP",
        ("-r",),
        pet="PET_REDIRECTS",
        group="logs",
    ),
    Option(
        "tee", "text", "0", "streams on the console although redirected", "MAP", ("-t",), pet="PET_TEE", group="logs"
    ),
    Option(
        "local_ranks_filter",
        "text",
        "",
        "only these local ranks on the console, e.g. 0,2-3",
        "RANKS",
        pet="PET_LOCAL_RANKS_FILTER",
        group="logs",
    ),
    Option(
        "log_prefix",
        "text",
        "auto",
        "template with ${host} ${rank} ${local_rank} ${role_name}; auto is [host rN lN], nothing for one rank",
        "TEXT",
        group="logs",
    ),
    Option("log_max_mb", "int", 256, "bound on each log file; the newest part is kept; 0: none", "MB", group="logs"),
)

_RANKS = (
    Option(
        "affinity",
        "choice",
        "split",
        "CPUs of each rank: an equal share of the allowed ones, or none",
        choices=("split", "none"),
        group="ranks",
    ),
    Option("role", "text", "default", "role name, for torchrun's variables", "NAME", pet="PET_ROLE", group="ranks"),
    Option("rdzv_id", "text", "", "run id", "ID", ("--run-id",), pet="PET_RDZV_ID", group="ranks"),
    Option("master_addr", "text", "", "MASTER_ADDR of the ranks", "ADDR", pet="PET_MASTER_ADDR", group="ranks"),
    Option(
        "master_port", "int", 0, "MASTER_PORT of the ranks; 0: a free one", "PORT", pet="PET_MASTER_PORT", group="ranks"
    ),
    Option(
        "virtual_local_rank",
        "flag",
        False,
        "LOCAL_RANK 0 and one visible GPU for every rank",
        pet="PET_VIRTUAL_LOCAL_RANK",
        group="ranks",
    ),
    Option(
        "nnodes",
        "text",
        "",
        "number of hosts, or MIN:MAX; checked against the host list where there is one",
        "N",
        pet="PET_NNODES",
        group="ranks",
    ),
    Option(
        "node_rank",
        "text",
        "",
        "this host's number, where no list of hosts tells it",
        "N",
        pet="PET_NODE_RANK",
        group="ranks",
    ),
    Option("python", "text", "", "interpreter of the ranks (default: this one)", "PATH", group="ranks"),
)

_HOSTS = (
    Option(
        "hosts",
        "text",
        "",
        "the job's hosts in order, each with its ranks if wanted: a:8,b:8",
        "LIST",
        group="several hosts",
    ),
    Option("hostfile", "text", "", "the same, a host a line, as `a slots=8` or `a:8`", "FILE", group="several hosts"),
    Option(
        "host",
        "text",
        "",
        "this host's name in the list (default: found by name or address)",
        "NAME",
        group="several hosts",
    ),
    Option(
        "host_addresses",
        "pairs",
        {},
        "where to reach a host, instead of resolving its name; may be repeated",
        "NAME=ADDRESS",
        group="several hosts",
    ),
    Option(
        "rdzv_endpoint",
        "text",
        "",
        "the first host, for torchrun's command lines without a list of hosts; the port is not used",
        "HOST[:PORT]",
        pet="PET_RDZV_ENDPOINT",
        group="several hosts",
    ),
    Option(
        "leader_port", "int", 7780, "port on which the first host waits for the others", "PORT", group="several hosts"
    ),
    Option(
        "secret_file",
        "text",
        "",
        "file with the secret that the hosts prove to each other (or LAUNCHER_SECRET in the environment)",
        "FILE",
        group="several hosts",
    ),
    Option(
        "join_timeout", "seconds", 600.0, "how long to wait for all hosts to come", "SECONDS", group="several hosts"
    ),
    Option(
        "min_hosts",
        "int",
        0,
        "go on with as few hosts when others do not come or are lost; 0: all are needed",
        "N",
        group="several hosts",
    ),
    Option(
        "host_timeout",
        "seconds",
        5.0,
        "a host that is silent for this long is lost",
        "SECONDS",
        group="several hosts",
    ),
    Option(
        "peer_check",
        "choice",
        "refuse",
        "what to do with a host whose code, packages or driver differ from the first one's",
        choices=("refuse", "warn", "off"),
        group="several hosts",
    ),
    Option(
        "interface",
        "text",
        "",
        "network interface for the ranks' traffic (default: the container's, if it exists)",
        "NAME",
        group="several hosts",
    ),
)

_ENGINE = (
    Option(
        "engine",
        "choice",
        "auto",
        "how ranks find each other; auto: mpi where the platform asks for it, else torch",
        choices=("auto", "torch", "mpi", "horovod"),
        group="engine",
    ),
    Option(
        "mpirun", "text", "", "mpirun or mpiexec to use (default: beside Python, or on PATH)", "PATH", group="engine"
    ),
    Option(
        "mpi_options",
        "text",
        "",
        "more options for mpirun; they win over the launcher's own",
        "TEXT",
        hyperparameter="sagemaker_mpi_custom_mpi_options",
        group="engine",
    ),
    Option(
        "mpi_processes",
        "int",
        0,
        "ranks of the whole job; 0: as many as there are slots",
        "N",
        hyperparameter="sagemaker_mpi_num_processes",
        group="engine",
    ),
    Option(
        "horovod_controller",
        "choice",
        "auto",
        "what carries Horovod's messages; auto: what the installed Horovod was built for",
        choices=("auto", "gloo", "mpi"),
        group="engine",
    ),
    Option(
        "horovod_compat",
        "mode",
        "off",
        "`import horovod.torch` is the launcher's own where Horovod is not installed; force: everywhere",
        choices=("off", "auto", "force"),
        group="engine",
    ),
)

OPTIONS: tuple[Option, ...] = (*_RUN, *_STOP, *_LOGS, *_RANKS, *_HOSTS, *_ENGINE)
BY_NAME: dict[str, Option] = {option.name: option for option in OPTIONS}

# torchrun options with nothing to do here: there is no agent store, no polling and no rendezvous back-end to choose.
# Name -> takes a value.
IGNORED: dict[str, bool] = {
    "rdzv_backend": True,
    "rdzv_conf": True,
    "monitor_interval": True,
    "start_method": True,
    "event_log_handler": True,
    "logs_specs": True,
    "local_addr": True,
    "signals_to_handle": True,
    "numa_binding": True,
    "duplicate_stdout_filters": True,
    "duplicate_stderr_filters": True,
    "run_path": False,
}

_TRUE = ("1", "true", "True")
_FALSE = ("0", "false", "False", "")


def suggest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean X?"`` for the known word nearest to ``word``, or an empty string."""
    import difflib

    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def convert(option: Option, raw: object, source: str) -> object:
    """The typed value of ``raw`` as it was found in ``source``.

    Raises:
        UsageError: naming the source, the value and what is allowed.
    """
    try:
        return _CONVERTERS[option.kind](option, raw)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{source}: {option.name} is {raw!r}; expected {error}") from None


def _text(option: Option, raw: object) -> str:
    if isinstance(raw, (dict, list)):
        raise ValueError("a single value")
    return str(raw)


def _int(option: Option, raw: object) -> int:
    try:
        value = int(str(raw))
    except ValueError:
        raise ValueError("a whole number") from None
    if value < 0:
        raise ValueError("a whole number, 0 or more")
    return value


def _seconds(option: Option, raw: object) -> float | None:
    if raw is None:
        return None
    try:
        value = float(str(raw))
    except ValueError:
        raise ValueError("a number of seconds") from None
    if not 0 <= value < 1e9:
        raise ValueError("a number of seconds, 0 or more")
    return value


def _flag(option: Option, raw: object) -> bool:
    if raw is True or str(raw) in _TRUE:
        return True
    if raw is False or str(raw) in _FALSE:
        return False
    raise ValueError("true/True/1 or false/False/0")


def _choice(option: Option, raw: object) -> str:
    # YAML 1.1 reads a bare on/off as a boolean.
    value = {True: "on", False: "off"}.get(raw, str(raw)) if isinstance(raw, bool) else str(raw)
    if value not in option.choices:
        raise ValueError("one of " + ", ".join(option.choices))
    return value


def _mode(option: Option, raw: object) -> str:
    text = str(raw)
    if text in _TRUE:
        return option.choices[1]
    return option.choices[0] if text in _FALSE else _choice(option, text)


def _pairs(option: Option, raw: object) -> dict[str, str]:
    if isinstance(raw, dict):
        return {str(key): str(value) for key, value in raw.items()}
    if raw in ("", [""]):  # `--channel=` takes back what the environment or the YAML file says
        return {}
    pairs: dict[str, str] = {}
    for item in raw if isinstance(raw, list) else str(raw).split(","):
        name, equals, value = str(item).partition("=")
        if not (name and equals and value):
            raise ValueError(f"{option.metavar}, found {item!r}")
        pairs[name] = value
    return pairs


_CONVERTERS: Mapping[str, Callable[[Option, object], object]] = {
    "text": _text,
    "int": _int,
    "seconds": _seconds,
    "flag": _flag,
    "choice": _choice,
    "mode": _mode,
    "pairs": _pairs,
}


class CommandLine(Record):
    """A parsed command line: ``given`` raw values by option name, ``ignored`` torchrun options that were given.

    ``directory`` is the ``--dir`` of ``simulate``, whose ``hosts`` are a number; ``sizes`` and ``output`` are of
    ``bench``, whose ``script`` is what to measure. All words after ``data``, ``serve`` and ``transform`` are
    ``script_args``.
    """

    command: str
    given: dict[str, object]
    ignored: tuple[str, ...]
    script: str
    script_args: tuple[str, ...]
    as_json: bool = False
    help: bool = False
    version: bool = False
    directory: str = ""
    sizes: str = ""
    output: str = ""


COMMANDS = ("run", "train", "serve", "transform", "plan", "simulate", "bench", "data")
# They run no script, and have tables of their own.
_APART = ("serve", "transform", "data")
# Options that one command has for itself, each with a value.
_OWN: dict[str, tuple[str, ...]] = {"simulate": ("dir",), "bench": ("sizes", "output")}
_AS_JSON = ("plan", "bench")


def parse(argv: list[str]) -> CommandLine:
    """Parses ``argv`` (without the program name). Options end at the first word that is not one: the script.

    Raises:
        UsageError: unknown option (with a suggestion), missing or superfluous value.
    """
    words = list(argv)
    command = "run"
    if words and words[0] in COMMANDS:
        command = words.pop(0)
    if command in _APART:
        return CommandLine(command, {}, (), "", tuple(words))
    if command == "plan" and words[:1] == ["train"]:
        words.pop(0)  # `plan` without a script shows what `train` would do
    script = words.pop(0) if command == "bench" and words and not words[0].startswith("-") else ""
    flags: dict[str, bool] = {"json": False, "help": False, "version": False}
    own: dict[str, str] = {}
    given: dict[str, object] = {}
    ignored: list[str] = []
    while words and words[0].startswith("-") and words[0] != "-":
        word = words.pop(0)
        if word == "--":
            break
        name, equals, inline = word.partition("=")
        key = {"-h": "help"}.get(name, name[2:] if name.startswith("--") else "")
        if key in flags:
            if key == "json" and command not in _AS_JSON:
                raise UsageError("--json belongs to `plan` and `bench`: python -m launcher plan --json ...")
            flags[key] = True
            continue
        if key in _OWN.get(command, ()):
            own[key] = inline if equals else _value(words, name)
            continue
        option, value = _match(name), inline if equals else None
        if isinstance(option, str):
            if IGNORED[option] and value is None:
                _value(words, name)
            ignored.append(name)
        elif option.kind in ("flag", "mode"):
            given[option.name] = True if value is None else value
        else:
            text = value if value is not None else _value(words, name)
            if option.kind == "pairs":
                given.setdefault(option.name, [])
                given[option.name].append(text)  # type: ignore[attr-defined]
            else:
                given[option.name] = text
    if not script and words:
        script = words.pop(0)
    return CommandLine(
        command,
        given,
        tuple(ignored),
        script,
        tuple(words),
        flags["json"],
        flags["help"],
        flags["version"],
        own.get("dir", ""),
        own.get("sizes", ""),
        own.get("output", ""),
    )


def _value(words: list[str], name: str) -> str:
    if not words:
        raise UsageError(f"option {name} needs a value; see --help")
    return words.pop(0)


def _match(name: str) -> Option | str:
    """The option called ``name``, or the name of an ignored torchrun option."""
    key = name[2:].replace("-", "_") if name.startswith("--") else ""
    if key in BY_NAME:
        return BY_NAME[key]
    if key in IGNORED:
        return key
    for option in OPTIONS:
        if name in option.aliases:
            return option
    spelled = ["--" + known.replace("_", "-") for known in (*BY_NAME, "help", "version", "json")]
    raise UsageError(f"unknown option {name}{suggest(name.replace('_', '-'), spelled)} (see --help)")
