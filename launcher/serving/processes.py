"""The worker processes of a server, below the guardian that is the parent of all ranks of a training job, too.

They are started before the server has imported what it needs for itself: a model loads meanwhile.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal and socket import enum and selectors: the workers come first
import _socket
import json
import os
import time

from launcher.record import Record, as_dict, replace
from launcher.supervisor.cgroup import MemoryCgroup
from launcher.supervisor.guardian import Guardian, spawn_fields

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from launcher.serving.handler import WorkerPlan
    from launcher.supervisor.guardian import Event

_QUIT_LIMIT_S = 5.0
_SHOWN = 3  # stdout and stderr
_BACKLOG = 128
# Read by the pools behind numpy, torch and their like when they are imported.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
# Above the server's: what a limit of memory ends should be a worker (proc(5), oom_score_adj).
_WORKER_OOM_SCORE = 500


class Death(Record):
    """How a worker process ended.

    Attributes:
        code: as a shell has it: 128 plus the signal.
        text: in words, with the last line that it wrote.
        out_of_memory: the kernel, or a container's limit, killed it for its memory.
    """

    pid: int
    code: int
    text: str
    out_of_memory: bool


class Processes:
    """Starts and ends worker processes. One thread owns it."""

    def __init__(self, environ: Mapping[str, str], python: str, threads: int) -> None:
        """``threads``: for each worker's pools of threads, unless the environment says otherwise."""
        self._environ = {
            **{name: str(threads) for name in THREAD_VARIABLES},
            "PYTHONUNBUFFERED": "1",
            **environ,
        }
        self._python = python
        self._token = os.urandom(16).hex()
        # An abstract name: there may be no place to write to. Who may connect is checked by the kernel's word and ours.
        self._name = "\0launcher-serve-" + os.urandom(16).hex()
        self.listener: Any = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_NONBLOCK)
        self.listener.bind(self._name)
        self.listener.listen(_BACKLOG)
        self._slots: set[int] = set()
        self._pids: dict[int, int] = {}
        self._cgroup = MemoryCgroup()
        self._oom_kills = self._cgroup.read().oom_kills
        self.on_death: Callable[[int, Death], None] = lambda slot, death: (
            None
        )  # its slot is not free yet: see release()
        self.guardian = Guardian(0, False)

    def spawn(self, plan: WorkerPlan, number: int, gpus: Sequence[str]) -> int:
        """Starts worker ``number`` of a model; returns its slot, the lowest that is free.

        Args:
            gpus: of which it sees one, as ``cuda:0``; none: the CPU is what there is.
        """
        slot = next(slot for slot in range(len(self._slots) + 1) if slot not in self._slots)
        self._slots.add(slot)
        told = {
            "plan": as_dict(replace(plan, gpu=0 if gpus else None)),
            "slot": slot,
            "socket": self._name,
            "token": self._token,
        }
        environ = {**self._environ, "LAUNCHER_SERVE_WORKER": json.dumps(told)}
        if gpus:
            environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
        self.guardian.send(
            *spawn_fields(
                "exec",
                slot,
                directory=os.getcwd(),
                out_path="",
                err_path="",
                console=_SHOWN,
                prefix=f"[{plan.model_name or 'worker'} {number}] ",
                cpus=(),
                argv=(self._python, "-c", "from launcher.serving.worker import main; main()"),
                environ=environ,
            )
        )
        return slot

    def is_worker(self, token: str, uid: int) -> bool:
        """Whether who has just connected is a worker of ours."""
        import hmac

        return uid == os.geteuid() and hmac.compare_digest(token.encode(), self._token.encode())

    def kill(self, slot: int, number: int = 9) -> None:
        """Sends a signal to a worker."""
        self.guardian.send("signal", slot, number)

    def memory_bytes(self, slot: int) -> int:
        """Resident memory of a worker; 0 when it has none."""
        try:
            with open(f"/proc/{self._pids[slot]}/statm", encoding="ascii") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (KeyError, OSError, IndexError):
            return 0

    def read(self) -> None:
        """Takes what the guardian has to tell: calls ``on_death``."""
        for event in self.guardian.read():
            if event.verb == "started":
                slot, pid = event.number(0), event.number(1)
                self._pids[slot] = pid
                _make_first_victim(pid)
            elif event.verb == "spawn_failed":
                self._over(event.number(0), Death(0, 126, f"cannot be started: {os.strerror(event.number(1))}", False))
            elif event.verb == "exited":
                self._over(event.number(0), self._death(event))

    def say(self, text: str) -> None:
        """Shows lines of the server's own, in order with the workers' output."""
        safe = text.replace("\0", "?").encode("utf-8", "backslashreplace")
        if lines := safe.splitlines():
            self.guardian.send("say", 2, b"\n".join(b"[launcher] " + line for line in lines))

    def close(self) -> None:
        """Kills what is left, shows what is still to be shown, and ends the guardian."""
        import select

        self.guardian.send("sweep", 0)
        self.guardian.send("quit")
        deadline = time.monotonic() + _QUIT_LIMIT_S
        poller = select.poll()
        poller.register(self.guardian, select.POLLIN)
        while not self.guardian.closed and time.monotonic() < deadline:
            poller.poll(max(0, int((deadline - time.monotonic()) * 1000)))
            self.guardian.read()
        if not self.guardian.closed:
            os.kill(self.guardian.pid, _signal.SIGKILL)
        self.guardian.close()
        self.guardian.status()

    def release(self, slot: int) -> None:
        """What there was to do after the death of the worker in ``slot`` is done: another may have it."""
        self._slots.discard(slot)

    def _over(self, slot: int, death: Death) -> None:
        self._pids.pop(slot, None)
        self.on_death(slot, death)

    def _death(self, event: Event) -> Death:
        pid, how, value = event.number(1), event.text(2), event.number(3)
        try:
            os.killpg(pid, _signal.SIGKILL)  # children that it left behind, in the session that it led
        except (ProcessLookupError, PermissionError):
            pass  # there are none
        tail = (event.text(10) or event.text(9)).strip().splitlines()
        last = f"; its last line: {tail[-1].strip()}" if tail else ""
        if how != "signal":
            return Death(pid, value, f"ended with code {value}{last}", False)
        memory = self._cgroup.read()
        killed = memory.oom_kills > self._oom_kills
        self._oom_kills = memory.oom_kills
        if value == _signal.SIGKILL and killed:
            limit = f" of {memory.limit >> 20} MiB" if memory.limit else ""
            text = f"was killed by the memory limit{limit} (peak {event.number(5) >> 10} MiB){last}"
            return Death(pid, 128 + value, text, True)
        import signal

        return Death(pid, 128 + value, f"was killed by {signal.Signals(value).name}{last}", False)


def _make_first_victim(pid: int) -> None:
    try:
        with open(f"/proc/{pid}/oom_score_adj", "w", encoding="ascii") as file:
            file.write(str(_WORKER_OOM_SCORE))
    except OSError:
        return  # it has ended, or this is not allowed here
