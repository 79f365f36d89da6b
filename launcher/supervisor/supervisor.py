"""The event loop of one host: guardian, signals and time in; a verdict out.

Ranks are started first; what is needed only to watch and judge them is imported while they start.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal itself imports enum, before the ranks start
import os
import select
import sys
import time

from launcher.supervisor.attempt import DONE, RUN, SIGKILL, SIGTERM, Attempt
from launcher.supervisor.guardian import ALL_RANKS, ZYGOTE, Guardian

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any

    from launcher.supervisor.guardian import Event
    from launcher.supervisor.options import HostPlan
    from launcher.supervisor.preflight import GpuHolders
    from launcher.verdict import Evidence, Verdict

_STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
_STOP_NUMBERS = tuple(getattr(_signal, name) for name in _STOP_SIGNALS)
_NAMES = {getattr(_signal, name): name for name in _STOP_SIGNALS}
_FORWARDED = ("SIGUSR1", "SIGUSR2")
_CRASH_LOOP_COUNT = 3
_QUIT_LIMIT_S = 10.0


class Supervisor:
    """Runs a host's plan to its verdict."""

    def __init__(self, plan: HostPlan) -> None:
        self.plan = plan
        self.guardian = Guardian(plan.cap_bytes, plan.raw)
        self._signals: list[int] = []
        self._stop_signal = 0
        self._forced = False
        self._zygote_lives = False
        self._shm = (0, 0)
        self._history: list[tuple[int, float]] = []
        self._old_handlers: dict[int, Any] = {}
        self._wake_read = self._wake_write = -1
        self._old_mask: Any = None
        self._gpu_holders: GpuHolders | None = None

    def say(self, text: str) -> None:
        """Shows a line of the launcher's own, in order with the ranks' output. Never waits for a reader."""
        for line in text.splitlines():
            # Text may come from a rank's error file: lone surrogates, NUL.
            safe = line.replace("\0", "?").encode("utf-8", "backslashreplace")
            self.guardian.send("say", 2, b"[launcher] " + safe)

    # ---- the job

    def run(self) -> Verdict:
        """Starts all ranks, restarts the group as often as allowed, and returns the verdict on the last attempt."""
        try:
            if self.plan.handle_signals:
                # A stop that comes before its handler is there would end us, and the ranks without their grace.
                self._old_mask = _signal.pthread_sigmask(_signal.SIG_BLOCK, _STOP_NUMBERS)
            attempt = self._start(0)
            self._prepare()
            while True:
                verdict = self._watch(attempt)
                again = self._restart_reason(attempt, verdict)
                if again is None:
                    return self._crash_loop(verdict, attempt)
                self.say(again)
                attempt = self._start(attempt.number + 1)
        finally:
            if self.plan.library:
                self._restore_signals()
            # On the command line our handlers stay: a stop that comes while the verdict is written changes nothing.

    def close(self) -> None:
        """Ends the guardian, after it has shown all output (or its reader has not taken it within two seconds)."""
        if self._gpu_holders is not None:
            self._gpu_holders.close()
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

    def _start(self, number: int) -> Attempt:
        attempt = Attempt(number, self.plan, self.guardian, self.say)
        self._shm = (0, 0)
        attempt.on_first_failure = self._note_shared_memory
        zygote: list[str] = []
        if self.plan.preload and not self._zygote_lives:
            booted = next((launch for launch in attempt.launches.values() if launch.booted), None)
            if booted is not None:
                python, unbuffered, boot = booted.argv[:3]
                zygote = [python, unbuffered, boot, "zygote", self.plan.preload]
                self._zygote_lives = True
        attempt.start(zygote)
        return attempt

    def _prepare(self) -> None:
        """What can wait until the ranks are starting: signals, an init process's duties, the evidence's first state."""
        if self.plan.handle_signals:
            self._handle_signals()
        from launcher import verdict
        from launcher.supervisor import records  # noqa: F401  # its first use must not wait for an import
        from launcher.supervisor.cgroup import MemoryCgroup
        from launcher.supervisor.preflight import GpuHolders, warnings
        from launcher.supervisor.watch import Watch

        self._gpu_holders = GpuHolders()
        for line in warnings(self.plan.written_directories):
            self.say(f"WARNING: {line}")
        self._judge = verdict.judge
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

    def _watch(self, attempt: Attempt) -> Verdict:
        """Serves events, signals and timers until the attempt is over."""
        watch = self._watching = self._new_watch(self.plan.hang_timeout_s)
        poller = select.poll()
        poller.register(self.guardian, select.POLLIN)
        if self._wake_read >= 0:
            poller.register(self._wake_read, select.POLLIN)
        if self._stop_signal:
            attempt.stop(self._stop_signal, self.plan.grace_stop_s)
        while attempt.stage != DONE:
            # Later nobody looks: the time of the next look would pass, and the loop spin.
            look = watch.next_time() if attempt.stage == RUN else None
            times = [moment for moment in (attempt.next_time(), look) if moment is not None]
            wait_ms = None if not times else max(0, int((min(times) - time.monotonic()) * 1000) + 1)
            for fd, _ in poller.poll(wait_ms):
                if fd == self._wake_read:
                    os.read(fd, 4096)
            self._take_signals(attempt)
            for event in self.guardian.read():
                self._take_event(attempt, event)
            if self.guardian.closed:
                self._guardian_lost(attempt)
                break
            for line in (self._gpu_holders.take() if self._gpu_holders is not None else None) or ():
                self.say(f"WARNING: {line}")
            now = time.monotonic()
            attempt.on_time(now)
            if attempt.stage == RUN and watch.on_time(now, attempt, self.guardian):
                self._note_shared_memory()
                attempt.stop(SIGTERM, self.plan.grace_failure_s)
        from launcher.record import replace

        verdict = self._judge(list(attempt.records.values()), self._evidence(attempt), self.plan.program)
        return replace(verdict, attempt=attempt.number)

    def _take_event(self, attempt: Attempt, event: Event) -> None:
        if event.verb == "note":
            self.say(event.text(0))
        elif event.verb == "stats":
            self._watching.on_stats(event)
        else:
            if event.verb == "exited" and event.number(0) == ZYGOTE:
                self._zygote_lives = False
            attempt.on_event(event)

    def _take_signals(self, attempt: Attempt) -> None:
        while self._signals:
            number = self._signals.pop(0)
            if number in self._forwarded:
                self.guardian.send("signal", ALL_RANKS, number)
            elif number == self._suspend:
                # Ctrl-Z: the ranks are in sessions of their own and would train on, unwatched.
                self.guardian.send("signal", ALL_RANKS, _signal.SIGSTOP)
                os.kill(os.getpid(), _signal.SIGSTOP)
                self.guardian.send("signal", ALL_RANKS, _signal.SIGCONT)
            elif self._stop_signal:
                self.say("second signal: killing all ranks now")
                self._forced = True
                attempt.sweep(0)
            else:
                self._stop_signal = number
                # Python ranks know SIGINT as KeyboardInterrupt; everything else means: end, you have some time.
                forward = number if number == 2 else SIGTERM
                grace = self.plan.grace_stop_s
                name = _NAMES.get(number, f"signal {number}")
                if attempt.stage == RUN:
                    self.say(f"{name}: stopping all ranks, {grace:g} s until they are killed; once more kills them now")
                else:
                    self.say(f"{name}: the ranks are being stopped already; once more kills them now")
                attempt.stop(forward, grace)

    # ---- evidence

    def _note_shared_memory(self) -> None:
        """Its state at the first failure: a killed rank's segments may be freed soon after."""
        if not self._shm[0]:
            try:
                info = os.statvfs("/dev/shm")
            except OSError:
                return  # no /dev/shm here
            self._shm = (info.f_blocks * info.f_frsize, info.f_bavail * info.f_frsize)

    def _evidence(self, attempt: Attempt) -> Evidence:
        from launcher.verdict import Evidence

        memory = self._cgroup.read()
        before, self._memory = self._memory, memory
        watch = self._watching
        return Evidence(
            stop_signal=self._stop_signal,
            forced=self._forced,
            hang=watch.hang,
            hang_rank=watch.hang_rank,
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
        )

    # ---- restarts

    def _restart_reason(self, attempt: Attempt, verdict: Verdict) -> str | None:
        """The line that announces a restart; None when there is to be none."""
        if verdict.ok or self._stop_signal or verdict.kind == "launcher" or attempt.stuck:
            return None
        steps = max((record.steps for record in verdict.records), default=0)
        lasted_s = time.monotonic() - attempt.started_s
        alike = lasted_s < self.plan.crash_loop_s and steps == 0
        self._history = [entry for entry in self._history if entry[0] == verdict.exit_code] if alike else []
        if alike:
            self._history.append((verdict.exit_code, attempt.started_s))
        if attempt.number >= self.plan.max_restarts:
            self._history.clear()  # not ended by the rule
            return None
        if len(self._history) >= _CRASH_LOOP_COUNT:
            return None
        return (
            f"attempt {attempt.number} failed: {verdict.headline}\n"
            f"restarting the group ({attempt.number + 1} of {self.plan.max_restarts})"
        )

    def _crash_loop(self, verdict: Verdict, attempt: Attempt) -> Verdict:
        """``verdict``, said to be a crash loop when that is why the restarts ended."""
        if len(self._history) < _CRASH_LOOP_COUNT:
            return verdict
        from launcher.record import replace

        since_s = time.monotonic() - self._history[0][1]
        line = f"crash loop: code {verdict.exit_code} x{len(self._history)} in {since_s:.0f} s; {verdict.headline}"
        return replace(verdict, headline=line, text=verdict.text.replace(verdict.headline, line, 1))

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

    def _guardian_lost(self, attempt: Attempt) -> None:
        status = self.guardian.status()
        how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"code {os.WEXITSTATUS(status)}"
        from launcher.supervisor.orphans import kill_descendants

        # A library's caller has children of its own, and is no subreaper for ours.
        killed = 0 if self.plan.library else kill_descendants(os.getpid())
        attempt.launcher_error = (
            f"the guardian process {self.guardian.pid} ended ({how}); every rank has ended with it"
            + (f", {killed} orphans were killed" if killed else "")
        )
        attempt.abandon()
        print(f"[launcher] {attempt.launcher_error}", file=sys.stderr)
