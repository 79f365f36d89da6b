"""What ``serve`` and ``transform`` are told: by the command line, the environment, and the platform's variables.

In this order; the first that says something wins. An own variable of an option is ``LAUNCHER_SERVE_<NAME>``.
"""

from __future__ import annotations

import os

from launcher.container.paths import base_dir
from launcher.errors import UsageError
from launcher.options import Option, convert, suggest
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_VARIABLE = "LAUNCHER_SERVE_"
MIB = 1 << 20


class Settings(Record):
    """Everything a server is told. Times are seconds, sizes MiB where the name says so and bytes else.

    Attributes:
        port: of ``/ping`` and ``/invocations``; 0: a free one.
        metrics_port: of ``/metrics``; 0: the first free one of ``safe_ports``; none when there are none.
        program: the user's module, a file of the code directory.
        submit_directory: where the code is, if said: a path, ``file://`` or ``s3://``.
        workers: processes of each model; 0: one per GPU, else one per CPU (of a multi-model server: one).
        timeout_s: for one answer, from the last byte of the request on.
        stream_timeout_s: for an answer that comes in pieces.
        queue: requests of a model that may wait for a worker.
        concurrency: requests that an asynchronous handler answers at a time, in each worker.
        max_payload: bytes of a request's body at most; 0: no bound.
        max_worker_mb: a worker that holds more memory is replaced between two requests; 0: never.
        crash_limit: workers that die in a row, none of them having answered, until the server gives up.
        bidirectional: whether WebSocket is spoken, for ``bidirectional_fn``.
        batch: whether the platform runs a batch-transform job.
    """

    host: str
    port: int
    metrics_port: int
    safe_ports: tuple[int, int] | None
    base: str
    model_dir: str
    program: str
    submit_directory: str
    workers: int
    timeout_s: float
    stream_timeout_s: float
    startup_timeout_s: float
    drain_s: float
    header_timeout_s: float
    body_timeout_s: float
    keep_alive_s: float
    queue: int
    concurrency: int
    batch_size: int
    batch_delay_s: float
    max_payload: int
    max_worker_mb: int
    crash_limit: int
    default_accept: str
    multi_model: bool
    sessions: bool
    session_ttl_s: float
    bidirectional: bool
    access_log: bool
    error_details: bool
    allow_pickle: bool
    log_level: str
    batch: bool
    batch_strategy: str
    max_concurrent_transforms: int
    python: str


OPTIONS: tuple[Option, ...] = (
    Option("host", "text", "0.0.0.0", "address to listen on", "ADDRESS"),
    Option("port", "int", 8080, "port of /ping and /invocations; 0: a free one", "PORT"),
    Option("metrics_port", "int", 0, "port of /metrics (default: the first free one of the safe range)", "PORT"),
    Option("base_dir", "text", "", "the container's /opt/ml", "DIR"),
    Option("model_dir", "text", "", "what training left (default: model in /opt/ml)", "DIR"),
    Option("program", "text", "", "the module with model_fn and the others (default: inference.py)", "FILE"),
    Option("code", "text", "", "where it is: a directory, a tar archive, s3:// (default: code in the model)", "DIR"),
    Option("workers", "int", 0, "worker processes; 0: one per GPU, else one per CPU", "N"),
    Option("timeout", "seconds", 60.0, "for one answer; the worker is replaced (batch transform: 600)", "SECONDS"),
    Option("stream_timeout", "seconds", 480.0, "for an answer that comes in pieces", "SECONDS"),
    Option("startup_timeout", "seconds", 600.0, "for loading the model", "SECONDS"),
    Option("drain", "seconds", 25.0, "for the requests in hand, from SIGTERM on", "SECONDS"),
    Option("header_timeout", "seconds", 20.0, "for the header of a request", "SECONDS"),
    Option("body_timeout", "seconds", 30.0, "between two pieces of a request's body", "SECONDS"),
    Option("keep_alive", "seconds", 75.0, "for the next request of a connection", "SECONDS"),
    Option("queue", "int", 1000, "requests that may wait for a worker; more are answered 503", "N"),
    Option("concurrency", "int", 64, "requests at a time in each worker, where the handler is async", "N"),
    Option("batch_size", "int", 1, "requests that a worker gets together", "N"),
    Option("batch_delay", "seconds", 0.0, "how long a worker may wait for more of them", "SECONDS"),
    Option("max_payload_mb", "int", 100, "largest body of a request; 0: no bound", "MB"),
    Option("max_worker_mb", "int", 0, "a worker with more memory is replaced between requests; 0: never", "MB"),
    Option("crash_limit", "int", 5, "workers that die in a row without an answer until the server ends", "N"),
    Option(
        "default_accept", "text", "application/json", "content type of answers where the client has no wish", "TYPE"
    ),
    Option("multi_model", "flag", False, "serve the multi-model API: /models"),
    Option("sessions", "flag", False, "stateful sessions"),
    Option("session_ttl", "seconds", 1200.0, "life of a session after its last request", "SECONDS"),
    Option("bidirectional", "flag", False, "speak WebSocket, for a model with bidirectional_fn"),
    Option("access_log", "flag", False, "a line of JSON for each request"),
    Option("error_details", "flag", False, "put the traceback of a failed handler into the answer, too"),
    Option("allow_pickle", "flag", False, "let default functions load pickled models (they may run any code)"),
    Option("log_level", "text", "info", "of the user's logging: debug, info, warning, error, critical", "LEVEL"),
    Option("python", "text", "", "interpreter of the workers (default: this one)", "PATH"),
)
_BY_NAME = {option.name: option for option in OPTIONS}

# By option: the variables that the platform, its SDK or the reference toolkits set.
_PLATFORM: dict[str, tuple[str, ...]] = {
    "port": ("SAGEMAKER_BIND_TO_PORT",),
    "program": ("SAGEMAKER_PROGRAM",),
    "code": ("SAGEMAKER_SUBMIT_DIRECTORY",),
    "workers": ("SAGEMAKER_MODEL_SERVER_WORKERS",),
    "timeout": (
        "SAGEMAKER_MODEL_SERVER_TIMEOUT_SECONDS",
        "SAGEMAKER_MODEL_SERVER_TIMEOUT",
        "SAGEMAKER_TS_RESPONSE_TIMEOUT",
    ),
    "startup_timeout": ("SAGEMAKER_STARTUP_TIMEOUT",),
    "batch_size": ("SAGEMAKER_TS_BATCH_SIZE",),
    "max_payload_mb": ("SAGEMAKER_MAX_PAYLOAD_IN_MB",),
    "default_accept": ("SAGEMAKER_DEFAULT_INVOCATIONS_ACCEPT",),
    "multi_model": ("SAGEMAKER_MULTI_MODEL",),
    "sessions": ("SAGEMAKER_ENABLE_STATEFUL_SESSIONS",),
    "session_ttl": ("SAGEMAKER_SESSIONS_EXPIRATION",),
    "log_level": ("SAGEMAKER_CONTAINER_LOG_LEVEL",),
}
_LEVELS = {"10": "debug", "20": "info", "30": "warning", "40": "error", "50": "critical"}
_BATCH_TIMEOUT_S = 600.0  # the platform's own limit of a batch request


def resolve(
    words: Sequence[str], environ: Mapping[str, str], own: Sequence[Option] = ()
) -> tuple[Settings, dict[str, object]]:
    """The settings, and the values of ``own``: options that the command has besides.

    Raises:
        UsageError: an unknown option or a value that is none; the message names the option or the variable.
    """
    options = {**_BY_NAME, **{option.name: option for option in own}}
    given = _parse(words, options)
    values: dict[str, object] = {}
    for name, option in options.items():
        value, source = _lookup(option, given, environ)
        values[name] = option.default if value is None else convert(option, value, source)
    return _settings(values, environ, said="timeout" in given), {option.name: values[option.name] for option in own}


def usage(own: Sequence[Option] = ()) -> list[str]:
    """A line or two of help for each option."""
    lines = []
    for option in (*own, *OPTIONS):
        head = f"  --{option.name.replace('_', '-')} {option.metavar}".rstrip()
        default = f" [{option.default}]" if option.kind != "flag" and option.default not in ("", None, 0, 0.0) else ""
        pad = f"{head:<32}" if len(head) < 32 else f"{head}\n{'':<32}"
        lines.append(f"{pad} {option.help}{default}")
    return lines


def _parse(words: Sequence[str], options: Mapping[str, Option]) -> dict[str, object]:
    given: dict[str, object] = {}
    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, inline = word.partition("=")
        option = options.get(name[2:].replace("-", "_")) if name.startswith("--") else None
        if option is None:
            known = ["--" + known.replace("_", "-") for known in options]
            raise UsageError(f"unknown argument {word}{suggest(name.replace('_', '-'), known)} (see --help)")
        if equals:
            given[option.name] = inline
        elif option.kind == "flag":
            given[option.name] = True
        elif left:
            given[option.name] = left.pop(0)
        else:
            raise UsageError(f"option {name} needs a value; see --help")
    return given


def _lookup(option: Option, given: Mapping[str, object], environ: Mapping[str, str]) -> tuple[object, str]:
    if option.name in given:
        return given[option.name], "--" + option.name.replace("_", "-")
    for variable in (_VARIABLE + option.name.upper(), *_PLATFORM.get(option.name, ())):
        if environ.get(variable):
            return environ[variable], variable
    return None, ""


def _settings(values: dict[str, object], environ: Mapping[str, str], said: bool) -> Settings:
    import sys

    def number(name: str) -> int:
        value = values[name]
        assert isinstance(value, int)
        return value

    def seconds(name: str) -> float:
        value = values[name]
        assert isinstance(value, (int, float))
        return float(value)

    batch = environ.get("SAGEMAKER_BATCH", "").lower() == "true"
    timeout_s = seconds("timeout")
    if batch and timeout_s == _BY_NAME["timeout"].default and not said:
        timeout_s = _BATCH_TIMEOUT_S
    base = os.path.abspath(str(values["base_dir"]) or base_dir(environ))
    multi_model = bool(values["multi_model"])
    level = str(values["log_level"]).lower()
    level = _LEVELS.get(level, level)
    if level not in _LEVELS.values():
        raise UsageError(f"log level {level!r}: expected one of {', '.join(_LEVELS.values())}, or 10 to 50")
    for name in ("batch_size", "queue", "concurrency", "crash_limit"):
        if number(name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} is 0; expected 1 or more")
    strategy = environ.get("SAGEMAKER_BATCH_STRATEGY") or "MULTI_RECORD"
    if strategy.upper().replace("_", "") not in ("SINGLERECORD", "MULTIRECORD"):
        raise UsageError(f"SAGEMAKER_BATCH_STRATEGY is {strategy!r}; expected SINGLE_RECORD or MULTI_RECORD")
    return Settings(
        host=str(values["host"]),
        port=_port("port", number("port")),
        metrics_port=_port("metrics-port", number("metrics_port")),
        safe_ports=_safe_ports(environ.get("SAGEMAKER_SAFE_PORT_RANGE", "")),
        base=base,
        model_dir=os.path.abspath(str(values["model_dir"]) or os.path.join(base, "models" if multi_model else "model")),
        program=str(values["program"]) or "inference.py",
        submit_directory=str(values["code"]).removeprefix("file://"),
        workers=number("workers"),
        timeout_s=timeout_s,
        stream_timeout_s=seconds("stream_timeout"),
        startup_timeout_s=seconds("startup_timeout"),
        drain_s=seconds("drain"),
        header_timeout_s=seconds("header_timeout"),
        body_timeout_s=seconds("body_timeout"),
        keep_alive_s=seconds("keep_alive"),
        queue=number("queue"),
        concurrency=number("concurrency"),
        batch_size=number("batch_size"),
        batch_delay_s=seconds("batch_delay"),
        max_payload=number("max_payload_mb") * MIB,
        max_worker_mb=number("max_worker_mb"),
        crash_limit=number("crash_limit"),
        default_accept=str(values["default_accept"]),
        multi_model=multi_model,
        sessions=bool(values["sessions"]),
        session_ttl_s=seconds("session_ttl"),
        bidirectional=bool(values["bidirectional"]),
        access_log=bool(values["access_log"]),
        error_details=bool(values["error_details"]),
        allow_pickle=bool(values["allow_pickle"]),
        log_level=level,
        batch=batch,
        batch_strategy="SINGLE_RECORD" if strategy.upper().startswith("SINGLE") else "MULTI_RECORD",
        max_concurrent_transforms=_transforms(environ),
        python=str(values["python"]) or sys.executable,
    )


def _port(name: str, value: int) -> int:
    if value > 65535:
        raise UsageError(f"--{name} is {value}; expected a port, 0 to 65535")
    return value


def _safe_ports(text: str) -> tuple[int, int] | None:
    """The bounds of ``SAGEMAKER_SAFE_PORT_RANGE``, both allowed; None when it is not set."""
    if not text:
        return None
    first, dash, last = text.partition("-")
    if not (dash and first.isdigit() and last.isdigit() and 0 < int(first) <= int(last) <= 65535):
        raise UsageError(f"SAGEMAKER_SAFE_PORT_RANGE is {text!r}; expected two ports, such as 25000-25999")
    return int(first), int(last)


def _transforms(environ: Mapping[str, str]) -> int:
    text = environ.get("SAGEMAKER_MAX_CONCURRENT_TRANSFORMS") or "0"
    if not text.isdigit():
        raise UsageError(f"SAGEMAKER_MAX_CONCURRENT_TRANSFORMS is {text!r}; expected a whole number")
    return int(text)
