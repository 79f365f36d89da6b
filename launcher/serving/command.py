"""``python -m launcher serve``: from settings to a server with its workers."""

from __future__ import annotations

import _socket  # socket imports enum and selectors: the workers come first
import os

from launcher._version import __version__
from launcher.errors import ContractError, UsageError
from launcher.machine import count_gpus, probe
from launcher.options import Option
from launcher.serving.handler import WorkerPlan
from launcher.serving.processes import Processes
from launcher.serving.settings import resolve, usage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from launcher.serving.pool import Pool
    from launcher.serving.settings import Settings

_NEEDED = "uvicorn, httptools and uvloop: pip install 'launcher[serve]'"
_DEFAULT_PROGRAM = "inference.py"
_BACKLOG = 2048  # connections that wait while the server is still being imported

_TRANSFORM: tuple[Option, ...] = (
    Option("input", "text", "", "what to transform: a directory or a file", "PATH"),
    Option("output", "text", "", "where the answers go", "DIR"),
    Option("content_type", "text", "", "of the input (default: by suffix)", "TYPE"),
    Option("accept", "text", "", "content type of the answers", "TYPE"),
    Option("split", "choice", "None", "how a file is split into records", choices=("None", "Line")),
    Option(
        "strategy",
        "choice",
        "MultiRecord",
        "records in a request: one, or as many as fit",
        choices=("SingleRecord", "MultiRecord"),
    ),
    Option("assemble", "choice", "None", "how answers are put together", choices=("None", "Line")),
    Option("payload_mb", "int", 6, "largest request; 0: no bound", "MB"),
    Option("concurrent", "int", 0, "requests at a time; 0: two for each worker", "N"),
)


def serve(words: Sequence[str], environ: Mapping[str, str], log: Callable[[str], None]) -> int:
    """Serves until it is told to end; returns the exit code.

    Raises:
        UsageError: an option, or a port that is taken.
        ContractError: there is no model, or no program where one was named.
        LauncherError: its requirements can not be installed.
    """
    settings, _ = resolve(words, environ)
    _check_installed(settings)
    listener = _listen(settings.host, settings.port, "port")
    metrics_listener = _listen_for_metrics(settings, listener.getsockname()[1])
    code_dir = find_code(settings, log, environ)
    gpus = visible_gpus(environ)
    workers = worker_count(settings, environ, gpus)
    plan = plan_for(settings, "", settings.model_dir, code_dir)
    processes = Processes(environ, settings.python, threads(environ, workers))
    try:
        # Before the imports below: workers load the model while the server loads itself.
        slots = [] if settings.multi_model else start_workers(processes, plan, workers, gpus)
        import socket

        from launcher.serving.pool import Pool
        from launcher.serving.server import Server, raise_file_limit

        def make(name: str, model_dir: str, on_fatal: Callable[[int, str], None]) -> Pool:
            its_plan = plan_for(settings, name, model_dir, code_dir) if name else plan
            size = (settings.workers or 1) if name else workers
            return Pool(settings, processes, its_plan, size, gpus, on_fatal)

        raise_file_limit()
        said = "" if metrics_listener is None else f", metrics at port {metrics_listener.getsockname()[1]}"
        log(f"serving at port {listener.getsockname()[1]} with {_count(workers, settings)}{said}")
        server = Server(settings, processes, make, slots)
        return server.run(
            socket.socket(fileno=listener.detach()),
            None if metrics_listener is None else socket.socket(fileno=metrics_listener.detach()),
        )
    finally:
        processes.close()


def transform(words: Sequence[str], environ: Mapping[str, str], log: Callable[[str], None]) -> int:
    """Transforms files with the model; returns the exit code.

    Raises:
        UsageError: an option.
        ContractError: there is no model, or nothing to transform.
        ServingError: the model could not be loaded, or did not answer each request.
        OutputError: the answers can not be written.
    """
    settings, own = resolve(words, environ, _TRANSFORM)
    for name in ("input", "output"):
        if not own[name]:
            raise UsageError(f"transform needs --{name} (see transform --help)")
    code_dir = find_code(settings, log, environ)
    gpus = visible_gpus(environ)
    workers = worker_count(settings, environ, gpus)
    plan = plan_for(settings, "", settings.model_dir, code_dir)
    payload = (environ.get("SAGEMAKER_MAX_PAYLOAD_IN_MB") and settings.max_payload) or int(str(own["payload_mb"])) << 20
    together = int(str(own["concurrent"])) or settings.max_concurrent_transforms
    from launcher.serving.transform import Job, Transform, find_inputs

    job = Job(
        source=os.path.abspath(str(own["input"])),
        target=os.path.abspath(str(own["output"])),
        content_type=str(own["content_type"]),
        accept=str(own["accept"]),
        split=str(own["split"]),
        strategy=str(own["strategy"]),
        assemble=str(own["assemble"]),
        payload=payload,
        together=together or 2 * workers * settings.batch_size,
    )
    inputs = find_inputs(job)
    processes = Processes(environ, settings.python, threads(environ, workers))
    try:
        from launcher.serving.pool import Pool

        def make(on_fatal: Callable[[int, str], None]) -> Pool:
            return Pool(settings, processes, plan, workers, gpus, on_fatal)

        work = Transform(job, settings, processes, make)
        work.run(inputs, start_workers(processes, plan, workers, gpus))
    finally:
        processes.close()
    log(f"transformed {len(inputs)} files in {work.requests} requests: {job.target}")
    return 0


def help_text(command: str) -> str:
    """The text of ``serve --help`` and ``transform --help``."""
    if command == "serve":
        lines = [
            "usage: python -m launcher serve [--check] [options]",
            "",
            "Serves the model in /opt/ml/model at /ping and /invocations, with the functions of its code/inference.py.",
            "--check only asks /ping of such a server on this machine: exit code 0 when it is well, else 1.",
        ]
    else:
        lines = [
            "usage: python -m launcher transform --input DIR --output DIR [options]",
            "",
            "A batch-transform job on this machine: each file of the input is sent to the model as the platform would,",
            "with the handlers of `serve`; the answers become files of the same name with .out added.",
        ]
    lines += [
        "Each option can also be set as LAUNCHER_SERVE_<NAME> in the environment; the platform's own variables",
        "(SAGEMAKER_BIND_TO_PORT, SAGEMAKER_PROGRAM, ...) are read where neither is given.",
        "",
    ]
    return "\n".join([*lines, *usage(_TRANSFORM if command == "transform" else ())])


def plan_for(settings: Settings, name: str, model_dir: str, code_dir: str) -> WorkerPlan:
    """What the workers of a model are told. A model's own code comes before that of the server."""
    own = os.path.join(model_dir, "code")
    return WorkerPlan(
        model_dir=model_dir,
        code_dir=own if name and os.path.isdir(own) else code_dir,
        program=settings.program,
        program_required=settings.program != _DEFAULT_PROGRAM,
        model_name=name,
        gpu=None,
        allow_pickle=settings.allow_pickle,
        batch_size=settings.batch_size,
        default_accept=settings.default_accept,
        server_version=__version__,
        log_level=settings.log_level,
        concurrency=settings.concurrency,
    )


def find_code(settings: Settings, log: Callable[[str], None], environ: Mapping[str, str]) -> str:
    """The directory of the user's code, filled from where it was said to be, with its requirements installed.

    Raises:
        ContractError: there is no model, or the code can not be had.
        LauncherError: pip failed.
    """
    from launcher.container import install_requirements

    if not os.path.isdir(settings.model_dir):
        raise ContractError(settings.model_dir, "", "no such directory", "what training left (--model-dir says where)")
    inside = os.path.join(settings.model_dir, "code")
    source = settings.submit_directory
    if not source or os.path.realpath(source) == os.path.realpath(inside):
        code_dir = inside if os.path.isdir(inside) else settings.model_dir
    elif os.path.isdir(source):
        code_dir = os.path.abspath(source)
    else:
        from launcher.container.code import CodeSource, fetch_code

        code_dir = os.path.join(settings.base, "code")
        region = environ.get("SAGEMAKER_REGION") or environ.get("AWS_REGION")
        endpoint = environ.get("S3_ENDPOINT_URL")
        fetch_code(CodeSource(source, "environment", "SAGEMAKER_SUBMIT_DIRECTORY", region, endpoint), code_dir, log)
    install_requirements(code_dir, settings.python, log, environ)
    return code_dir


def worker_count(settings: Settings, environ: Mapping[str, str], gpus: Sequence[str]) -> int:
    """Workers of a model: as said, one for each GPU, or as many as there are CPUs (whole ones of a quota)."""
    return settings.workers or len(gpus) or cpus(environ)


def cpus(environ: Mapping[str, str]) -> int:
    """CPUs that this container may use, 1 or more."""
    machine = probe(environ)
    return max(1, min(len(machine.cpus), int(machine.quota or len(machine.cpus))))


def threads(environ: Mapping[str, str], workers: int) -> int:
    """Threads for each worker's pools, so that all workers together have one for each CPU."""
    return max(1, cpus(environ) // workers)


def visible_gpus(environ: Mapping[str, str]) -> tuple[str, ...]:
    """What ``CUDA_VISIBLE_DEVICES`` calls each GPU of this container."""
    named = environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(name.strip() for name in named.split(",") if name.strip() not in ("", "-1"))
    return tuple(str(number) for number in range(count_gpus(environ)))


def start_workers(processes: Processes, plan: WorkerPlan, count: int, gpus: Sequence[str]) -> list[int]:
    """Starts all workers of a model; returns their slots."""
    return [processes.spawn(plan, number, gpus) for number in range(count)]


def _count(workers: int, settings: Settings) -> str:
    if settings.multi_model:
        return "no model yet"
    return f"{workers} worker{'s' if workers > 1 else ''}"


def _check_installed(settings: Settings) -> None:
    from importlib.util import find_spec

    missing = [name for name in ("uvicorn", "httptools", "uvloop") if find_spec(name) is None]
    if missing:
        raise UsageError(f"serve needs {_NEEDED}; not installed: {', '.join(missing)}")
    if settings.bidirectional and find_spec("websockets") is None:
        raise UsageError("--bidirectional needs websockets: pip install 'launcher[bidirectional]'")
    if settings.bidirectional and settings.multi_model:
        raise UsageError("--bidirectional and --multi-model: a conversation is with one model, take one or the other")


def _listen(host: str, port: int, option: str) -> Any:
    family = _socket.AF_INET6 if ":" in host else _socket.AF_INET
    sock = _socket.socket(family, _socket.SOCK_STREAM)
    sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(_BACKLOG)
    except OSError as error:
        raise UsageError(f"--{option} {port}: cannot listen on {host}: {error.strerror}") from error
    return sock


def _listen_for_metrics(settings: Settings, serving_port: int) -> Any:
    """A socket for the metrics: at the port that was said, or at the first free one of the safe range."""
    if settings.metrics_port:
        return _listen(settings.host, settings.metrics_port, "metrics-port")
    if settings.safe_ports is None:
        return None
    first, last = settings.safe_ports
    for port in range(first, last + 1):
        if port == serving_port:
            continue
        try:
            return _listen(settings.host, port, "metrics-port")
        except UsageError:
            continue  # another container's
    raise UsageError(f"SAGEMAKER_SAFE_PORT_RANGE {first}-{last}: no port of it is free")
