"""The event loop of one host: guardian, signals, the job's other hosts and time in; a verdict out.

Ranks are started first; what is needed only to watch them is imported while they start.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal itself imports enum, before the ranks start
import os
import select
import sys
import time

from launcher.errors import InternalError, LauncherError, StoppedError, of_machine
from launcher.supervisor.attempt import DONE, RUN, SIGKILL, SIGTERM, Attempt
from launcher.supervisor.group import Finish, Relayed, Say, Start, Stop, Sweep
from launcher.supervisor.guardian import ALL_RANKS, ZYGOTE, Guardian

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType
    from typing import Any

    from launcher.evidence import Evidence, ExitRecord, HostReport, Verdict
    from launcher.supervisor.group import Group, Order
    from launcher.supervisor.guardian import Event
    from launcher.supervisor.options import HostPlan
    from launcher.supervisor.preflight import GpuHolders
    from launcher.supervisor.watch import Watch

_STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
_STOP_NUMBERS = tuple(getattr(_signal, name) for name in _STOP_SIGNALS)
_NAMES = {getattr(_signal, name): name for name in _STOP_SIGNALS}
_FORWARDED = ("SIGUSR1", "SIGUSR2")
_QUIT_LIMIT_S = 10.0


class Supervisor:
    """Runs a host's plan to the verdict of its group."""

    def __init__(self, plan: HostPlan, join: Callable[[Callable[[str], None]], Group]) -> None:
        """``join`` makes the group; it is given :meth:`say`."""
        self.plan = plan
        self.guardian = Guardian(plan.cap_bytes, plan.raw)
        self._attempt: Attempt | None = None
        self._watching: Watch | None = None
        self._reported = False  # the group has this attempt's report
        self._was_still = False
        self._verdict: Verdict | None = None
        self._prepared = False
        self._signals: list[int] = []
        self._stop_signal = 0
        self._forced = False
        self._zygote_lives = False
        self._shm = (0, 0)
        self._old_handlers: dict[int, Any] = {}
        self._wake_read = self._wake_write = -1
        self._old_mask: Any = None
        self._gpu_holders: GpuHolders | None = None
        try:
            self.group = join(self.say)
        except LauncherError:
            self.guardian.close()
            raise

    def say(self, text: str) -> None:
        """Shows lines of the launcher's own, in order with the ranks' output. Never waits for a reader."""
        # Text may come from a rank's error file: lone surrogates, NUL.
        safe = text.replace("\0", "?").encode("utf-8", "backslashreplace")
        # One piece: lines of other hosts that share this terminal do not come in between.
        if lines := safe.splitlines():
            self.guardian.send("say", 2, b"\n".join(b"[launcher] " + line for line in lines))

    # ---- the job

    def run(self) -> Verdict:
        """Starts and restarts the ranks as the group says, and returns the group's verdict.

        Raises:
            ClusterError, RefusedError: the hosts of the job did not come together.
            StoppedError: a signal came before that.
        """
        try:
            if self.plan.handle_signals:
                # A stop that comes before its handler is there would end us, and the ranks without their grace.
                self._old_mask = _signal.pthread_sigmask(_signal.SIG_BLOCK, _STOP_NUMBERS)
            self._obey(self.group.serve(time.monotonic()))
            if self._attempt is None and self.plan.handle_signals:
                self._handle_signals()  # the other hosts may take their time
            while self._verdict is None:
                if self._attempt is not None and not self._prepared:
                    self._prepare()
                self._turn()
            return self._verdict
        except LauncherError as error:
            self.group.failed(error)
            raise
        except OSError as error:  # the other hosts are to say so too, not that this one was lost
            limit = of_machine(error)
            self.group.failed(limit)
            raise limit from error
        finally:
            if self.plan.library:
                self._restore_signals()
            # On the command line our handlers stay: a stop that comes while the verdict is written changes nothing.

    def close(self) -> None:
        """Ends the guardian, after it has shown all output (or its reader has not taken it within two seconds)."""
        if self._gpu_holders is not None:
            self._gpu_holders.close()
        self.group.close()
        self.guardian.send("quit")
        deadline = time.monotonic() + _QUIT_LIMIT_S
        poller = select.poll()
        poller.register(self.guardian, select.POLLIN)
        while not self.guardian.closed and time.monotonic() < deadline:
            poller.poll(max(0, int((deadline - time.monotonic()) * 1000)))
            for event in self.guardian.read():
                if event.verb == "note":  # there is nobody left to show it but us
                    print(f"[launcher] {event.text(0)}", file=sys.stderr)
        if not self.guardian.closed:
            os.kill(self.guardian.pid, SIGKILL)
        self.guardian.close()
        self.guardian.status()

    def _start(self, start: Start) -> None:
        attempt = self._attempt = Attempt(start, self.plan, self.guardian, self.say)
        self._shm = (0, 0)
        self._reported = self._was_still = False
        self._watching = None
        attempt.on_record = self._take_record
        attempt.on_trouble = self.group.trouble
        if attempt.adoption is not None:
            attempt.adoption.relay = self.group.relay
        zygote: list[str] = []
        if self.plan.preload and not self._zygote_lives:
            booted = next((launch for launch in attempt.launches.values() if launch.booted), None)
            if booted is not None:
                python, unbuffered, boot = booted.argv[:3]
                zygote = [python, unbuffered, boot, "zygote", self.plan.preload]
                self._zygote_lives = True
        attempt.start(zygote)
        if self._stop_signal:
            attempt.stop(_for_ranks(self._stop_signal), self.plan.grace_stop_s)

    def _prepare(self) -> None:
        """What can wait until the ranks are starting: signals, an init process's duties, the evidence's first state."""
        self._prepared = True
        if self.plan.handle_signals and self._wake_read < 0:
            self._handle_signals()
        from launcher import verdict  # noqa: F401  # the first use of these must not wait for an import
        from launcher.supervisor import records  # noqa: F401
        from launcher.supervisor.cgroup import MemoryCgroup
        from launcher.supervisor.preflight import GpuHolders, warnings
        from launcher.supervisor.watch import Watch

        self._gpu_holders = GpuHolders()
        for line in warnings(self.plan.written_directories):
            self.say(f"WARNING: {line}")
        self._cgroup = MemoryCgroup()
        self._memory = self._cgroup.read()
        self._new_watch = Watch
        if not self.plan.library:
            from launcher._native import set_child_subreaper, set_parent_death_signal

            set_child_subreaper(True)  # should the guardian be killed, its orphans are ours
            if self.plan.follow_parent:
                set_parent_death_signal(SIGTERM)
                if os.getppid() != self.plan.parent_pid:  # it ended before we asked
                    self._signals.append(SIGTERM)

    def _turn(self) -> None:
        """Waits for something to happen, and takes all that has."""
        attempt = self._attempt
        watch = self._watching
        if attempt is not None and watch is None:
            watch = self._watching = self._new_watch(self.plan.hang_timeout_s, self.plan.straggler_window_s)
        poller = select.poll()
        guardian = -1 if self.guardian.closed else self.guardian.fileno()
        for fd in (guardian, self._wake_read, self.group.fileno()):
            if fd >= 0:
                poller.register(fd, select.POLLIN)
        running = attempt is not None and attempt.stage == RUN
        times = [
            self.group.next_time(),
            attempt.next_time() if attempt is not None and not self._reported else None,
            # Later nobody looks: the time of the next look would pass, and the loop spin.
            watch.next_time() if watch is not None and running else None,
        ]
        due = [moment for moment in times if moment is not None]
        for fd, _ in poller.poll(max(0, int((min(due) - time.monotonic()) * 1000) + 1) if due else None):
            if fd == self._wake_read:
                os.read(fd, 4096)
        self._take_signals()
        for event in self.guardian.read():
            self._take_event(event)
        if self.guardian.closed and not self._reported:
            self._guardian_lost()
        for line in (self._gpu_holders.take() if self._gpu_holders is not None else None) or ():
            self.say(f"WARNING: {line}")
        now = time.monotonic()
        if attempt is not None and not self._reported:
            attempt.on_time(now)
            if attempt.stage == RUN and watch is not None:
                self._look(now, attempt, watch)
            if attempt.stage == DONE:
                self._reported = True
                self.group.attempt_over(self._report(attempt))
        self._obey(self.group.serve(now))

    def _look(self, now_s: float, attempt: Attempt, watch: Watch) -> None:
        progress = watch.on_time(now_s, attempt, self.guardian)
        if progress is not None:
            self.group.stacked(progress)
        elif watch.still != self._was_still:
            self._was_still = watch.still
            self.group.quiet(watch.still)
        shares = watch.waits.window(now_s)
        if shares is not None:
            self.group.waited(shares)

    def _obey(self, orders: Sequence[Order]) -> None:
        for order in orders:
            attempt = self._attempt
            if isinstance(order, Start):
                if order.line:
                    self.say(order.line)
                self._start(order)
            elif isinstance(order, Finish):
                self._verdict = order.verdict
            elif attempt is None:
                continue
            elif isinstance(order, Stop):
                if attempt.stage == RUN:
                    self._note_shared_memory()
                    if order.line:
                        self.say(order.line)
                grace_s = self.plan.grace_failure_s if order.failure else self.plan.grace_stop_s
                attempt.stop(_for_ranks(order.number), grace_s)
            elif isinstance(order, Sweep):
                if not self._forced:
                    self._forced = True
                    self.say(order.line)
                    attempt.sweep(0)
            elif isinstance(order, Say):
                self.say(order.line)
            elif isinstance(order, Relayed):
                self._take_relayed(attempt, order)
            elif self._watching is not None:  # Stacks
                self._watching.ask_for_stacks(time.monotonic(), attempt, self.guardian)

    def _take_relayed(self, attempt: Attempt, order: Relayed) -> None:
        if attempt.adoption is None:
            return
        try:
            attempt.adoption.on_message(order.host, order.message)
        except (KeyError, TypeError, ValueError) as error:
            self.say(f"WARNING: a message of {order.host} is none: {type(error).__name__}: {error}")

    def _take_record(self, record: ExitRecord) -> None:
        if record.failed:
            self._note_shared_memory()
        self.group.rank_ended(record)

    def _take_event(self, event: Event) -> None:
        if event.verb == "note":
            self.say(event.text(0))
        elif event.verb == "stats":
            if self._watching is not None:
                self._watching.on_stats(event)
        else:
            if event.verb == "exited" and event.number(0) == ZYGOTE:
                self._zygote_lives = False
            if self._attempt is not None:
                self._attempt.on_event(event)

    def _take_signals(self) -> None:
        attempt = self._attempt
        while self._signals:
            number = self._signals.pop(0)
            if number in self._forwarded:
                self.guardian.send("signal", ALL_RANKS, number)
            elif number == self._suspend:
                # Ctrl-Z: the ranks are in sessions of their own and would train on, unwatched.
                self.guardian.send("signal", ALL_RANKS, _signal.SIGSTOP)
                os.kill(os.getpid(), _signal.SIGSTOP)
                self.guardian.send("signal", ALL_RANKS, _signal.SIGCONT)
            elif attempt is None:
                self.group.stopping(number, False)
                raise StoppedError(number)
            elif self._stop_signal:
                if not self._forced:
                    self.say("second signal: killing all ranks now")
                self._forced = True
                attempt.sweep(0)
                self.group.stopping(number, True)
            else:
                self._stop_signal = number
                grace = self.plan.grace_stop_s
                name = _NAMES.get(number, f"signal {number}")
                if attempt.stage == RUN:
                    self.say(f"{name}: stopping all ranks, {grace:g} s until they are killed; once more kills them now")
                else:
                    self.say(f"{name}: the ranks are being stopped already; once more kills them now")
                attempt.stop(_for_ranks(number), grace)
                self.group.stopping(number, False)

    # ---- evidence

    def _note_shared_memory(self) -> None:
        """Its state at the first failure: a killed rank's segments may be freed soon after."""
        if not self._shm[0]:
            try:
                info = os.statvfs("/dev/shm")
            except OSError:
                return  # no /dev/shm here
            self._shm = (info.f_blocks * info.f_frsize, info.f_bavail * info.f_frsize)

    def _report(self, attempt: Attempt) -> HostReport:
        from launcher.evidence import HostReport

        return HostReport(
            host=self.plan.host,
            attempt=attempt.number,
            records=_without_doubles(tuple(attempt.records.values())),
            evidence=self._evidence(attempt),
            lasted_s=time.monotonic() - attempt.started_s,
            stuck=bool(attempt.stuck),
        )

    def _evidence(self, attempt: Attempt) -> Evidence:
        from launcher.evidence import Evidence

        memory = self._cgroup.read()
        before, self._memory = self._memory, memory
        watch = self._watching
        assert watch is not None  # made with the attempt
        adoption = attempt.adoption
        aborted = adoption.aborted(list(attempt.records.values())) if adoption is not None else None
        return Evidence(
            stop_signal=self._stop_signal,
            forced=self._forced,
            oom_kills=max(0, memory.oom_kills - before.oom_kills),
            memory_limit=memory.limit,
            memory_peak=memory.peak,
            shm_total=self._shm[0],
            shm_free=self._shm[1],
            memory_trends={launch.rank: watch.memory_trend(launch.rank) for launch in attempt.launches.values()},
            lost_children=watch.lost_children() if memory.oom_kills > before.oom_kills else (),
            launcher_error=attempt.launcher_error,
            launcher_code=attempt.launcher_code,
            early_exit_ok=self.plan.early_exit == "ok",
            aborted_rank=aborted[0] if aborted else None,
            aborted_code=aborted[1] if aborted else 0,
            stop_reason=adoption.stop_reason if adoption is not None else "",
            stop_code=adoption.stop_code if adoption is not None else 0,
        )

    # ---- signals and orphans

    def _handle_signals(self) -> None:
        import signal

        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._old_wakeup = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self._forwarded = tuple(int(getattr(signal, name)) for name in _FORWARDED)
        self._suspend = int(signal.SIGTSTP)
        for name in (*_STOP_SIGNALS, *_FORWARDED, "SIGTSTP"):
            number = getattr(signal, name)
            # nohup: a hangup that is ignored stays ignored.
            if name in ("SIGHUP", "SIGTSTP") and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._old_handlers[number] = signal.signal(number, self._on_signal)
        if os.getpid() == 1 and not self.plan.library:
            self._old_handlers[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, self._on_child)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._old_mask)
        self._old_mask = None

    def _restore_signals(self) -> None:
        if self._old_mask is not None:  # the start failed half-way
            _signal.pthread_sigmask(_signal.SIG_SETMASK, self._old_mask)
        if self._wake_read < 0:
            return
        import signal

        for number, handler in self._old_handlers.items():
            if handler is not None:  # None: it was not set from Python, and cannot be put back from here
                signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        for fd in (self._wake_read, self._wake_write):
            os.close(fd)
        self._wake_read = self._wake_write = -1

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def _on_child(self, number: int, frame: FrameType | None) -> None:
        """As process 1, everybody's orphans are ours: reap them. The guardian's own end is read elsewhere."""
        try:
            while True:
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if info is None or info.si_pid == self.guardian.pid:
                    return
                os.waitpid(info.si_pid, os.WNOHANG)
        except ChildProcessError:
            return

    def _guardian_lost(self) -> None:
        status = self.guardian.status()
        how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"code {os.WEXITSTATUS(status)}"
        from launcher.supervisor.orphans import kill_descendants

        # A library's caller has children of its own, and is no subreaper for ours.
        killed = 0 if self.plan.library else kill_descendants(os.getpid())
        text = f"the guardian process {self.guardian.pid} ended ({how}); every rank has ended with it" + (
            f", {killed} orphans were killed" if killed else ""
        )
        print(f"[launcher] {text}", file=sys.stderr)
        if self._attempt is None:
            raise InternalError(text)
        self._attempt.launcher_error = text
        self._attempt.abandon()


def _for_ranks(number: int) -> int:
    """Python ranks know SIGINT as KeyboardInterrupt; everything else means: end, you have some time."""
    return number if number == _signal.SIGINT else SIGTERM


def _without_doubles(records: tuple[ExitRecord, ...]) -> tuple[ExitRecord, ...]:
    """``records`` less those of slots that mpirun never filled, where it had given their rank to another slot."""
    ran = {record.rank for record in records if record.pid}
    return tuple(record for record in records if record.pid or record.rank not in ran)
