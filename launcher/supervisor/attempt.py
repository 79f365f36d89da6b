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
    from launcher.supervisor.adoption import Adoption
    from launcher.supervisor.group import Start
    from launcher.supervisor.options import HostPlan

RUN, STOP, SWEEP, DONE = "run", "stop", "sweep", "done"
SIGTERM, SIGKILL = 15, 9
# What is left of a job that succeeded (an upload in the background) gets this long after SIGTERM.
_LEFTOVER_GRACE_MS = 2000
_WAITING_LINE_S = 10.0
_PF_EXITING = 0x4  # include/linux/sched.h; field 9 of /proc/pid/stat


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
        self.adoption: Adoption | None = None
        if plan.mpi is not None:
            from launcher.supervisor.adoption import Adoption

            self.adoption = Adoption(plan.mpi(start), self)
        self.on_trouble: Callable[[str], None] = lambda reason: None
        self._leaving: set[int] = set()
        self._told_ns = 0
        self.swept_ns = 0  # when what was left began to be ended; 0: not yet
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
        if self.adoption is not None:
            self.adoption.start()
            self._end_if_over()  # there may be no rank for this host
            return
        for slot, launch in self.launches.items():
            kind = "fork" if self.plan.preload and launch.booted else "exec"
            self._spawn(kind, slot, list(launch.argv), launch.environ, launch.directory, launch.cpus)

    def start_rank(self, launch: RankLaunch, connection: int) -> None:
        """Starts a rank that mpirun has asked for; ``connection`` is that of the agent it stands for."""
        if launch.rank != self.launches[launch.local_rank].rank:
            os.unlink(launch.status_page)
            make_status_page(launch.status_page, launch.rank)
        self.launches[launch.local_rank] = launch
        slot, argv = launch.local_rank, list(launch.argv)
        self._spawn("exec", slot, argv, launch.environ, launch.directory, launch.cpus, connection)

    def _spawn(
        self,
        kind: str,
        slot: int,
        argv: list[str],
        environ: dict[str, str],
        directory: str,
        cpus: tuple[int, ...],
        connection: int = 0,
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
                connection=connection,
            )
        )

    # ---- inputs

    def on_event(self, event: Event) -> None:
        """Takes one event of the guardian."""
        if self.adoption is not None and self.adoption.takes(event):
            self.adoption.on_event(event)
            self._end_if_over()
        elif event.verb == "started":
            self.pids[event.number(0)] = event.number(1)
        elif event.verb == "exited":
            self._on_exit(event)
        elif event.verb == "spawn_failed":
            self._on_spawn_failed(event)
        elif event.verb in ("empty", "stuck"):
            self._on_swept(event)

    def on_time(self, now_s: float) -> None:
        """Takes the time (``time.monotonic()``)."""
        if self.adoption is not None:
            self.adoption.on_time(now_s)
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
        others = self.adoption.next_time() if self.adoption is not None else None
        times = [moment for moment in (self._line_at_s, others) if moment]
        return min(times) if times else None

    @property
    def running(self) -> bool:
        """Whether nothing has ended the attempt yet."""
        return self.stage == RUN

    def all_ended(self) -> bool:
        """Whether all ranks of this host have ended."""
        return not self._alive()

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
        # What others see of a rank's end (a closed connection) may come before the process has quite ended.
        self._leaving = {slot for slot in self._alive() if slot in self.pids and _is_exiting(self.pids[slot])}
        self.guardian.send("signal", ALL_RANKS, number)
        if self.adoption is not None:
            for slot in [slot for slot in self._alive() if self.adoption.unborn(slot)]:
                record = self._never_started(slot, 1, "stopped before it was started")
                self.records[slot] = replace(record, told_ns=self._told_ns)
        unborn = self.plan.preload and not any(slot in self.pids for slot in self._alive())
        if unborn or not self._alive():  # a preload may take for ever, and its process gets no grace
            self.sweep(0)

    def sweep(self, term_ms: int) -> None:
        """Ends whatever is left: SIGTERM, after ``term_ms`` SIGKILL, until nothing is left."""
        if self.stage in (SWEEP, DONE) and term_ms:
            return
        self.stage = SWEEP
        self.swept_ns = self.swept_ns or time.monotonic_ns()
        self._line_at_s = 0.0
        self._told_ns = self._told_ns or time.monotonic_ns()
        self.guardian.send("sweep", term_ms)

    def fail(self, reason: str, code: int = EXIT_INTERNAL) -> None:
        """Ends the attempt for a reason that is no rank's."""
        if not self.launcher_error:
            self.launcher_error, self.launcher_code = reason, code
            self.on_trouble(reason)
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
            told_ns = self._told_ns if slot not in self._leaving and 0 < self._told_ns <= event.number(4) else 0
            record = make_record(event, self.launches[slot], self.plan.host, told_ns, slot in self.replaced)
            if self.adoption is not None:
                record = self.adoption.corrected(record)
            self.records[slot] = record
            if record.note:
                self.say(record.note)
            self.on_record(record)
            if self.stage == RUN:
                self._judge_end(record)
        self._end_if_over()

    def _end_if_over(self) -> None:
        if self._alive() or self.stage not in (RUN, STOP):
            return
        clean = self.stage == RUN and not any(record.failed for record in self.records.values())
        if clean and self.adoption is not None and not self.adoption.over:
            self.adoption.ranks_over()
            return
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


def _is_exiting(pid: int) -> bool:
    """Whether a process is on its way out of the kernel, or gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            flags = int(file.read().rpartition(")")[2].split()[6])
    except (OSError, ValueError, IndexError):
        return True
    return bool(flags & _PF_EXITING)
