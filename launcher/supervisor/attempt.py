"""One attempt: all ranks of this host, from their start until nothing of them is left.

The stages are run -> stop (SIGTERM sent, grace running) -> sweep (whatever is left is being ended) -> done. Any stage
may go forward, none goes back. ``on_event`` and ``on_time`` are the only inputs; neither waits for anything.
"""

from __future__ import annotations

import os
import time

from launcher.errors import EXIT_INTERNAL, OutputError
from launcher.record import replace
from launcher.supervisor.guardian import ALL_RANKS, ZYGOTE, Event, Guardian, spawn_fields
from launcher.supervisor.pages import make_status_page

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.engines.torch import RankLaunch
    from launcher.evidence import ExitRecord
    from launcher.supervisor.group import Start
    from launcher.supervisor.options import HostPlan

RUN, STOP, SWEEP, DONE = "run", "stop", "sweep", "done"
SIGTERM, SIGKILL = 15, 9
# What is left of a job that succeeded (an upload in the background) gets this long after SIGTERM.
_LEFTOVER_GRACE_MS = 2000
_WAITING_LINE_S = 10.0


class Attempt:
    """The state machine. ``records`` holds the ends seen so far, by local rank."""

    def __init__(self, start: Start, plan: HostPlan, guardian: Guardian, say: Callable[[str], None]) -> None:
        self.number = start.attempt
        self.plan = plan
        self.guardian = guardian
        self.say = say
        self.stage = RUN
        self.launches: dict[int, RankLaunch] = {launch.local_rank: launch for launch in plan.launches(start, say)}
        self.records: dict[int, ExitRecord] = {}
        self.pids: dict[int, int] = {}
        self.replaced: set[int] = set()  # local ranks that have become another program
        self.started_s = time.monotonic()
        self.stop_signal = 0
        self.launcher_error = ""
        self.launcher_code = EXIT_INTERNAL
        self.stuck: list[str] = []
        self.on_record: Callable[[ExitRecord], None] = lambda record: None
        self._told_ns = 0
        self._deadline_s = 0.0
        self._line_at_s = 0.0

    def start(self, zygote: list[str]) -> None:
        """Makes the log tree and starts the ranks, forked by the zygote if its command is given."""
        if os.path.exists(self.plan.deadline_file):
            os.unlink(self.plan.deadline_file)  # of the attempt before
        for launch in self.launches.values():
            try:
                os.makedirs(os.path.dirname(launch.status_page), mode=0o700, exist_ok=True)
                make_status_page(launch.status_page, launch.rank)
            except OSError as error:
                raise OutputError(
                    f"cannot write in the run directory {self.plan.run_dir}: {error.strerror}; give another --log-dir"
                ) from error
        if zygote:
            # CUDA cannot be used after fork(): ranks see GPUs, the process that imports for them does not need to.
            environ = next(iter(self.launches.values())).environ
            self._spawn("zygote", ZYGOTE, zygote, environ, "", ())
        for slot, launch in self.launches.items():
            kind = "fork" if self.plan.preload and launch.booted else "exec"
            self._spawn(kind, slot, list(launch.argv), launch.environ, launch.directory, launch.cpus)

    def _spawn(
        self, kind: str, slot: int, argv: list[str], environ: dict[str, str], directory: str, cpus: tuple[int, ...]
    ) -> None:
        launch = self.launches.get(slot)
        self.guardian.send(
            *spawn_fields(
                kind,
                slot,
                directory=directory,
                out_path=launch.stdout_path if launch else "",
                err_path=launch.stderr_path if launch else "",
                console=launch.console if launch else 3,
                prefix=launch.prefix if launch else "[preload] ",
                cpus=cpus,
                argv=argv,
                environ=environ,
            )
        )

    # ---- inputs

    def on_event(self, event: Event) -> None:
        """Takes one event of the guardian."""
        if event.verb == "started":
            self.pids[event.number(0)] = event.number(1)
        elif event.verb == "exited":
            self._on_exit(event)
        elif event.verb == "spawn_failed":
            self._on_spawn_failed(event)
        elif event.verb in ("empty", "stuck"):
            self._on_swept(event)

    def on_time(self, now_s: float) -> None:
        """Takes the time (``time.monotonic()``)."""
        if self.stage == STOP and now_s >= self._deadline_s:
            alive = ", ".join(str(self.launches[slot].rank) for slot in self._alive())
            self.say(f"grace period over: killing rank {alive}" if alive else "grace period over: killing what is left")
            self.sweep(0)
        elif self._line_at_s and now_s >= self._line_at_s:
            self._line_at_s = 0.0
            done = sorted(record.rank for record in self.records.values())
            waiting = ", ".join(str(self.launches[slot].rank) for slot in self._alive())
            self.say(f"rank {', '.join(map(str, done))} ended with 0; waiting for rank {waiting}")

    def next_time(self) -> float | None:
        """When ``on_time`` has something to do, if nothing happens before."""
        if self.stage == STOP:
            return self._deadline_s
        return self._line_at_s or None

    # ---- transitions

    def stop(self, number: int, grace_s: float) -> None:
        """Asks the ranks' leaders to end, once; after ``grace_s`` the whole tree is killed."""
        if self.stage != RUN:
            return
        self.stage = STOP
        self._line_at_s = 0.0
        self._told_ns = time.monotonic_ns()
        self._deadline_s = time.monotonic() + grace_s
        self._tell_deadline()
        self.guardian.send("signal", ALL_RANKS, number)
        unborn = self.plan.preload and not any(slot in self.pids for slot in self._alive())
        if unborn or not self._alive():  # a preload may take for ever, and its process gets no grace
            self.sweep(0)

    def sweep(self, term_ms: int) -> None:
        """Ends whatever is left: SIGTERM, after ``term_ms`` SIGKILL, until nothing is left."""
        if self.stage in (SWEEP, DONE) and term_ms:
            return
        self.stage = SWEEP
        self._told_ns = self._told_ns or time.monotonic_ns()
        self.guardian.send("sweep", term_ms)

    def fail(self, reason: str, code: int = EXIT_INTERNAL) -> None:
        """Ends the attempt for a reason that is no rank's."""
        if not self.launcher_error:
            self.launcher_error, self.launcher_code = reason, code
        self.stop(SIGTERM, self.plan.grace_failure_s)

    def abandon(self) -> None:
        """The guardian is gone, and every rank with it."""
        self.stage = DONE

    # ---- details

    def _alive(self) -> list[int]:
        return [slot for slot in self.launches if slot not in self.records]

    def _tell_deadline(self) -> None:
        path = self.plan.deadline_file
        try:
            # In the run directory (mode 0700); O_EXCL follows no link that a rank may have put there.
            fd = os.open(path + ".part", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "w", encoding="ascii") as file:
                file.write(str(int(self._deadline_s * 1e9)))
            os.replace(path + ".part", path)
        except OSError as error:
            self.say(f"cannot tell the ranks their deadline: {path}: {error.strerror}")

    def _on_exit(self, event: Event) -> None:
        slot = event.number(0)
        if slot == ZYGOTE:
            self._on_zygote_exit(event)
        else:
            from launcher.supervisor.records import make_record  # loaded while the ranks were starting

            # A rank that was signalled has this attempt's time; one that ended before has none.
            told_ns = self._told_ns if 0 < self._told_ns <= event.number(4) else 0
            record = make_record(event, self.launches[slot], self.plan.host, told_ns, slot in self.replaced)
            self.records[slot] = record
            if record.note:
                self.say(record.note)
            self.on_record(record)
            if self.stage == RUN:
                self._judge_end(record)
        if not self._alive() and self.stage in (RUN, STOP):
            clean = self.stage == RUN and not any(record.failed for record in self.records.values())
            self.sweep(_LEFTOVER_GRACE_MS if clean else 0)

    def _on_zygote_exit(self, event: Event) -> None:
        """Ranks that it has forked do not need it any more; the others will never be."""
        waiting = [slot for slot in self._alive() if slot not in self.pids]
        if waiting and not self._told_ns:
            tail = event.text(10).strip().splitlines()
            code = event.number(3) + (128 if event.text(2) == "signal" else 0)
            how = f"{event.text(2)} {event.text(3)}"
            self.fail(f"preload of {self.plan.preload} failed ({how}): {tail[-1] if tail else ''}", code or 1)
        for slot in waiting:
            record = self._never_started(slot, 1, "its preload process ended")
            self.records[slot] = replace(record, told_ns=self._told_ns)

    def _judge_end(self, record: ExitRecord) -> None:
        if record.failed:
            self.stop(SIGTERM, self.plan.grace_failure_s)
        elif record.left_early and self._alive():
            if self.plan.early_exit == "abort":
                self.stop(SIGTERM, self.plan.grace_failure_s)
            elif self.plan.early_exit == "wait":
                self.say(f"rank {record.rank} ended early with 0 (os._exit?) while other ranks are at work")
        elif self._alive() and not self._line_at_s:
            self._line_at_s = time.monotonic() + _WAITING_LINE_S

    def _on_spawn_failed(self, event: Event) -> None:
        slot, number, step = event.number(0), event.number(1), event.text(2)
        reason = f"cannot be started: {step}: {os.strerror(number)}"
        if slot == ZYGOTE:
            self.fail(f"the preload process {reason}")
            return
        launch = self.launches[slot]
        if step == "execve":
            reason = f"cannot be started: {launch.argv[0]}: {os.strerror(number)}"
        elif step == "chdir":
            reason = f"cannot be started in {launch.directory}: {os.strerror(number)}"
        elif number == 11:  # EAGAIN
            reason += " (the limit of processes is reached: ulimit -u, or the pids cgroup)"
        elif number == 24:  # EMFILE
            reason += " (the limit of open files is reached: ulimit -n)"
        self.records[slot] = self._never_started(slot, 127 if number == 2 else 126, reason)
        self.on_record(self.records[slot])
        self.stop(SIGTERM, self.plan.grace_failure_s)
        if not self._alive() and self.stage == STOP:
            self.sweep(0)

    def _never_started(self, slot: int, code: int, reason: str) -> ExitRecord:
        from launcher.supervisor.records import failed_start

        return failed_start(self.launches[slot], self.plan.host, code, reason, time.monotonic_ns())

    def _on_swept(self, event: Event) -> None:
        names = event.items()
        reason = "stopped before it was started"
        if event.verb == "stuck":
            self.stuck = names
            reason = "did not end on SIGKILL: " + "; ".join(names)
            for line in names:
                pid, state, channel, command = line.split(" ", 3)
                self.say(f"unkillable: pid {pid} ({command}) is in state {state}, wchan {channel}; it is left behind")
        elif names:
            self.say(f"ended {len(names)} process(es) that the ranks left behind: pid {', '.join(names)}")
        for slot in self._alive():
            self.records[slot] = replace(self._never_started(slot, 1, reason), told_ns=self._told_ns)
        self.stage = DONE
