"""What a training script can know and say about its job: ``launcher.init()``."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

from launcher.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any

    from launcher._native import StatusPage


class Context:
    """This rank's place in the job, its input and output, and its line to the supervisor.

    Attributes:
        rank, local_rank, world_size, local_world_size, host_rank: as torchrun numbers them.
        host: this host's name in the host list; hosts: all of them, in order.
        device: ``"cuda:N"`` when a GPU is visible to this rank, else ``"cpu"``.
        channels: channel name -> directory.
        hyperparameters: the job's user hyperparameters, typed.
        attempt: 0, and one more after each restart of the group.
        tells_steps: whether step() has been called in this process; what else counts steps is then silent.
    """

    tells_steps = False

    def __init__(self, environ: dict[str, str]) -> None:
        def number(name: str, default: int) -> int:
            raw = environ.get(name, "")
            try:
                return int(raw) if raw else default
            except ValueError:
                raise UsageError(f"environment variable {name} is {raw!r}; expected a whole number") from None

        self.rank = number("RANK", 0)
        self.world_size = number("WORLD_SIZE", 1)
        self.local_rank = number("LOCAL_RANK", 0)
        self.local_world_size = number("LOCAL_WORLD_SIZE", 1)
        self.host_rank = number("GROUP_RANK", 0)
        self.attempt = number("TORCHELASTIC_RESTART_COUNT", 0)
        self.host = environ.get("SM_CURRENT_HOST", "localhost")
        self.hosts: list[str] = _json(environ, "SM_HOSTS", [self.host])
        self.channels: dict[str, str] = {
            name: environ["SM_CHANNEL_" + name.upper()]
            for name in _json(environ, "SM_CHANNELS", [])
            if "SM_CHANNEL_" + name.upper() in environ
        }
        self.hyperparameters: dict[str, object] = _json(environ, "SM_HPS", {})
        self._directories = {
            "model": environ.get("SM_MODEL_DIR", "model"),
            "output": environ.get("SM_OUTPUT_DATA_DIR", "output"),
            "checkpoint": environ.get("LAUNCHER_CHECKPOINT_DIR", "checkpoints"),
        }
        self.device = _device(environ, self.local_rank)
        self._steps = 0
        self._samples = 0
        self._deadline_file = environ.get("LAUNCHER_STOP_DEADLINE", "")
        self._stop_signal = 0
        self._watches_signal = False
        self._handles_signal = False
        self._page = _open_page(environ.get("LAUNCHER_STATUS_PAGE", ""))

    @property
    def model_dir(self) -> str:
        """Where the model goes. Made when it is first asked for, as the two below."""
        return _directory(self._directories["model"])

    @property
    def output_data_dir(self) -> str:
        """Where other results go."""
        return _directory(self._directories["output"])

    @property
    def checkpoint_dir(self) -> str:
        """Where checkpoints go, and are found again after a restart of the job."""
        return _directory(self._directories["checkpoint"])

    def step(self, samples: int = 0) -> int:
        """Tells the supervisor that one more training step is done, with ``samples`` samples; returns the count.

        A store into a mapped page, no system call.
        """
        Context.tells_steps = True
        self._steps += 1
        self._samples += samples
        if self._page is not None:
            self._page.step(self._steps, self._samples)
        return self._steps

    @property
    def stop_requested(self) -> bool:
        """True once the job has been asked to stop (SIGTERM, Ctrl-C): write a checkpoint and return.

        From the first read on, the signal no longer ends this process at once; the script has until
        :attr:`stop_deadline`. Ranks learn it at slightly different steps: agree on one (an allreduce of the flag)
        before leaving a loop with collectives.
        """
        if not self._watches_signal:
            self._watches_signal = True
            try:
                if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                    signal.signal(signal.SIGTERM, self._on_stop)
                    self._handles_signal = True
                if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                    signal.signal(signal.SIGINT, self._on_stop)  # Ctrl-C; a second one kills
                else:
                    self._handles_signal = False  # a signal that the script takes for itself: the file tells
            except ValueError:
                # Only the main thread can set a handler; the deadline file still tells.
                print("[launcher] stop_requested was first read outside the main thread", file=sys.stderr)
        # The deadline is told just before the signal. A script that left on the file alone could meet the signal in the
        # interpreter's teardown, where its handler is gone, and so die of it.
        return bool(self._stop_signal) or (not self._handles_signal and self.stop_deadline is not None)

    @property
    def stop_deadline(self) -> float | None:
        """The time (``time.monotonic()`` seconds) at which this rank is killed, once a stop is under way."""
        try:
            with open(self._deadline_file, encoding="ascii") as file:
                return int(file.read()) / 1e9
        except (OSError, ValueError):
            return None  # no such file: no stop

    @property
    def stop_seconds_left(self) -> float | None:
        """Seconds until :attr:`stop_deadline`; None when there is none (no stop, or no launcher to set it)."""
        deadline = self.stop_deadline
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop_signal = number

    def __repr__(self) -> str:
        return f"Context(rank={self.rank}/{self.world_size}, local_rank={self.local_rank}, host={self.host!r})"


def init() -> Context:
    """This process's :class:`Context`. Without the launcher it is a world of one, so a script runs either way.

    ``torch.distributed.init_process_group("launcher")`` works from then on, whether torch is imported already or not.

    Raises:
        UsageError: a variable of the environment is not what the launcher (or torchrun) sets.
    """
    from launcher.collectives.torch_hook import register

    register()
    return Context(dict(os.environ))


def _json(environ: dict[str, str], name: str, default: Any) -> Any:
    raw = environ.get(name)
    if raw is None:
        return default
    try:
        return json.loads(raw)
    except ValueError as error:
        raise UsageError(f"environment variable {name} is not JSON: {error}") from None


def _directory(path: str) -> str:
    os.makedirs(path, exist_ok=True)
    return path


def _device(environ: dict[str, str], local_rank: int) -> str:
    from launcher.machine import count_gpus

    count = count_gpus(environ)
    return f"cuda:{local_rank % count}" if count else "cpu"


def _open_page(path: str) -> StatusPage | None:
    if not path:
        return None
    try:
        from launcher.rank.status import open_page

        return open_page(path, writable=True)
    except (ImportError, OSError, ValueError) as error:
        print(f"[launcher] no progress reports from this rank: {error}", file=sys.stderr)
        return None
