"""An MPI job on this host: mpirun or its daemon beside the ranks, and ranks that are started when these ask for them.

mpirun starts an agent wherever it means to start a rank or ssh; the guardian tells of it, and what is started in its
place is a child of the guardian. So the ends of ranks are seen as in any other job, and mpirun's own view of things is
only a hint: it reports success when a daemon is killed, and does not notice every rank that fails.
"""

from __future__ import annotations

import re
import time

from launcher.record import Record, replace
from launcher.supervisor.guardian import FIRST_HELPER, spawn_fields

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, Protocol

    from launcher.engines.torch import RankLaunch
    from launcher.evidence import ExitRecord
    from launcher.supervisor.attempt import Attempt
    from launcher.supervisor.guardian import Event

    class Daemon(Protocol):
        """A daemon's command, see launcher.engines.mpi."""

        @property
        def argv(self) -> tuple[str, ...]: ...

        @property
        def environ(self) -> dict[str, str]: ...

        @property
        def name(self) -> str: ...

    class Identity(Protocol):
        """What mpirun says a rank is."""

        @property
        def local_rank(self) -> int: ...


_MPIRUN = FIRST_HELPER
_STOP = "stop"  # the stage of an attempt, see attempt.py (which imports this module)
_SIGTERM = 15
_FORWARDED = (10, 12)  # SIGUSR1, SIGUSR2
_ALREADY = 114  # EALREADY: the guardian listens since the attempt before
# mpirun has this long to notice that all of its ranks have ended with 0.
_LINGER_S = 10.0
# What mpirun does for no visible reason often has one that another host is about to tell.
_REASON_S = 0.5
# mpirun has no limit of its own for daemons that cannot call back.
_START_LIMIT_S = 300.0
_START_LINE_S = 10.0
_TAIL_LINES = 6

# "Abort(7) on node 1 (rank 1 in comm 0): application called MPI_Abort(MPI_COMM_WORLD, 7) - process 1"
_MPICH_ABORT = re.compile(r"^Abort\((-?\d+)\) on node \d+ \(rank -?\d+ in comm \S+\): (.*)", re.MULTILINE)
# "MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD\n  Proc: [[21959,1],1]\n  Errorcode: 7", from 5.0 on;
# "... with errorcode 7." before.
_OPEN_MPI_ABORT = re.compile(
    r"MPI_ABORT was invoked on rank (\d+) in communicator MPI_COMM_WORLD\s+"
    r"(?:Proc: \[\[\d+,\d+\],\d+\]\s+Errorcode: |with errorcode )(-?\d+)"
)


class MpiPlan(Record):
    """What is settled for the MPI job before an attempt.

    Attributes:
        agent_socket: where the guardian listens for agents.
        command: of mpirun; () on the hosts that only have daemons.
        program: of mpirun, for people.
        environ: for mpirun and daemons.
        directory: theirs; one that every host has.
        identify: from an agent's environment to the rank that it stands for, None for no rank.
        launch_for: a rank's launch as the MPI job wants it: from the launch, the rank's identity, the agent's
            environment, that of the daemon that started it, and the daemon's program.
        daemon: from the arguments for ssh, and this host's environment, to the daemon's command (ValueError: refused).
        host_of: from the arguments for ssh to the host (ValueError: none).
        hosts: those that have ranks; the first one runs mpirun.
    """

    agent_socket: str
    command: tuple[str, ...]
    program: str
    environ: dict[str, str]
    directory: str
    identify: Callable[[Mapping[str, str]], Identity | None]
    launch_for: Callable[[RankLaunch, Any, Mapping[str, str], Mapping[str, str], str], RankLaunch]
    daemon: Callable[[Sequence[str], Mapping[str, str]], Daemon]
    host_of: Callable[[Sequence[str]], str]
    hosts: tuple[str, ...]


class Adoption:
    """The MPI side of one attempt. Inputs are events of the guardian, time, and messages of the other hosts'.

    What these say to each other is ``{"do": "daemon", "connection", "words"}`` (the first host to another: start one),
    ``{"do": "ended", "connection", "code", "text"}`` (back: it has ended) and ``{"do": "over"}`` (back: all ranks here
    have ended with 0), each with the attempt's number.

    Attributes:
        relay: sends a message to a host (to the first one: ""); false when there is no such host.
        stop_reason, stop_code: why mpirun's doings ended the attempt, where no rank's end says more; "" for nothing.
    """

    def __init__(self, plan: MpiPlan, attempt: Attempt) -> None:
        self.plan = plan
        self.attempt = attempt
        self.relay: Callable[[str, dict[str, Any]], bool] = lambda host, message: False
        self.stop_reason = ""
        self.stop_code = 0
        self._over: set[str] = set()  # hosts whose ranks have all ended with 0
        self._helpers: dict[int, _Running] = {}
        self._last_slot = _MPIRUN
        self._rank_of: dict[int, int] = {}  # connection -> slot
        self._daemons_asked: set[int] = set()  # connections of agents that stand for a daemon somewhere
        self._asked: set[int] = set()  # slots that mpirun has asked for
        self._program = plan.command[0] if plan.command else ""
        self._environ: Mapping[str, str] = plan.environ  # of mpirun, or the daemon
        self._aborted: tuple[int, int] | None = None  # rank and code, by mpirun's words
        self._pending: tuple[float, str, int] | None = None
        self._linger_at_s = 0.0
        self._mpirun_ended = not plan.command
        self._started_s = self._line_s = time.monotonic()

    def start(self) -> None:
        """Opens the socket for agents; mpirun is started when it is open."""
        self.attempt.guardian.send("listen", self.plan.agent_socket)

    # ---- what the attempt asks

    @property
    def over(self) -> bool:
        """Whether mpirun and the daemons of this host have ended (or have never been there)."""
        return self._mpirun_ended and not self._helpers

    def unborn(self, slot: int) -> bool:
        """Whether mpirun has not asked for this rank."""
        return slot not in self._asked

    def ranks_over(self) -> None:
        """All ranks of this host have ended with 0: when this is so on all hosts, mpirun should follow."""
        here = self.attempt.plan.host
        if here in self._over:
            return
        self._over.add(here)
        if self.plan.command:
            self._expect_end()
        else:
            self._tell("", {"do": "over"})

    def _expect_end(self) -> None:
        if self._over.issuperset(self.plan.hosts) and not self._mpirun_ended:
            self._linger_at_s = time.monotonic() + _LINGER_S

    def next_time(self) -> float | None:
        """When :meth:`on_time` has something to do."""
        times = [moment for moment in (self._linger_at_s, self._pending[0] if self._pending else 0.0) if moment]
        if self._waiting():
            times.append(self._line_s + _START_LINE_S)
        return min(times) if times else None

    def on_time(self, now_s: float) -> None:
        """Takes the time."""
        if self._pending and now_s >= self._pending[0]:
            _, reason, code = self._pending
            self._pending = None
            self._stop(reason, code)
        if now_s >= self._line_s + _START_LINE_S and self._waiting():
            self._line_s = now_s
            self._tell_waiting(now_s)
        if self._linger_at_s and now_s >= self._linger_at_s:
            self._linger_at_s = 0.0
            if not self.over:
                self.attempt.say(f"all ranks have ended, {self.plan.program} has not for {_LINGER_S:g} s: ending it")
                self.attempt.sweep(0)

    def corrected(self, record: ExitRecord) -> ExitRecord:
        """``record`` with what MPI says of an error of its own."""
        found = _MPICH_ABORT.search(record.stderr_tail) if record.failed and not record.message else None
        if found and not found[2].startswith("application called"):
            record = replace(record, message=f"MPI: {found[2]}")
        return record

    def aborted(self, records: Sequence[ExitRecord]) -> tuple[int, int] | None:
        """The rank that called MPI_Abort (or for which MPI did, after an error), and its code, as MPI has said."""
        for record in records:
            found = _MPICH_ABORT.search(record.stderr_tail) if record.failed else None
            if found:
                return record.rank, exit_code(int(found[1]))
            if record.failed:
                self._note_abort(record.stderr_tail)
        return self._aborted

    # ---- events of the guardian

    def takes(self, event: Event) -> bool:
        """Whether this event is for :meth:`on_event` instead of the attempt."""
        if event.verb in ("listening", "request", "hangup", "agent_signal"):
            return True
        return event.verb in ("started", "exited", "spawn_failed") and event.number(0) <= FIRST_HELPER

    def on_event(self, event: Event) -> None:
        """Takes one event."""
        if event.verb == "started":
            self._helpers[event.number(0)].pid = event.number(1)
        elif event.verb == "exited":
            self._on_helper_exit(event)
        elif event.verb == "spawn_failed":
            self._on_spawn_failed(event)
        elif event.verb == "listening":
            self._on_listening(event)
        elif event.verb == "request":
            self._on_request(event)
        elif event.verb == "hangup":
            self._on_hangup(event.number(0), event.text(1))
        else:
            self._on_agent_signal(event.number(0), event.number(1))

    def _on_listening(self, event: Event) -> None:
        import os

        number = event.number(0)
        if number not in (0, _ALREADY):
            self.attempt.fail(f"cannot listen at {self.plan.agent_socket}: {event.text(1)}: {os.strerror(number)}")
        elif self.plan.command and self.attempt.running:
            self._spawn(_MPIRUN, self.plan.program, self.plan.command, self.plan.environ, 0)
        else:
            self._mpirun_ended = True

    def _on_request(self, event: Event) -> None:
        connection, kind = event.number(0), event.text(4)
        words, index = event.strings(6)
        given, _ = event.strings(index)
        environ = dict(entry.split("=", 1) for entry in given if "=" in entry)
        if not self.attempt.running:
            self._reply(connection, 128 + _SIGTERM, "")
        elif kind == "rsh":
            self._ask_for_daemon(connection, words)
        else:
            self._start_rank(connection, environ, f"pid {event.text(1)}, started by {event.text(3)}")

    def _start_rank(self, connection: int, environ: dict[str, str], agent: str) -> None:
        who = self.plan.identify(environ)
        launch = self.attempt.launches.get(who.local_rank) if who is not None else None
        if who is None or launch is None or who.local_rank in self._asked:
            place = "none" if who is None else f"local rank {who.local_rank}"
            why = f"{self.plan.program or 'the MPI daemon'} asks for a rank that has no place here ({place}; {agent})"
            self._reply(connection, 1, why)
            self.attempt.fail(why)
            return
        self._asked.add(who.local_rank)
        self._rank_of[connection] = who.local_rank
        self.attempt.start_rank(self.plan.launch_for(launch, who, environ, self._environ, self._program), connection)

    def _ask_for_daemon(self, connection: int, words: list[str]) -> None:
        self._daemons_asked.add(connection)
        try:
            host = self.plan.host_of(words)
            if host == self.attempt.plan.host:
                self.run_daemon(words, connection)
            elif not self._tell(host, {"do": "daemon", "connection": connection, "words": words}):
                raise ValueError(f"{host} is not a host of this job")
        except ValueError as error:
            self.daemon_ended(connection, 1, f"refused to start a daemon: {error}")

    def _on_hangup(self, connection: int, cause: str) -> None:
        slot = self._rank_of.get(connection)
        if connection in self._daemons_asked:
            self._daemons_asked.discard(connection)
            if self.attempt.running and not self.attempt.all_ended():
                self._suspect(f"{self.plan.program} has given up a daemon while ranks are at work", 1)
        elif slot is not None and slot not in self.attempt.records and self.attempt.running:
            rank = self.attempt.launches[slot].rank
            if cause == "orphaned":
                self._suspect(f"the MPI daemon of rank {rank} has ended while the rank is at work", 1)
            else:
                self._stop(f"MPI has ended the job while rank {rank} is at work", 1)

    def _on_agent_signal(self, connection: int, number: int) -> None:
        slot = self._rank_of.get(connection)
        if slot is None or not self.attempt.running:
            return
        if number in _FORWARDED:
            self.attempt.guardian.send("signal", slot, number)
        elif slot not in self.attempt.records:
            self._stop(f"MPI stops rank {self.attempt.launches[slot].rank} (signal {number})", 1)

    def _on_helper_exit(self, event: Event) -> None:
        slot, killed, value = event.number(0), event.text(2) == "signal", event.number(3)
        helper = self._helpers.pop(slot)
        code = 128 + value if killed else value
        tail = event.text(10)
        self._note_abort(tail)
        how = f"was killed by {_signal_name(value)}" if killed else f"ended with code {value}"
        where = f"{helper.name} (pid {helper.pid}) on {self.attempt.plan.host}"
        if helper.connection:
            self._tell_end(helper.connection, code, "" if not code else f"the MPI daemon {where} {how}")
        if slot == _MPIRUN:
            self._mpirun_ended = True
            self._judge_mpirun(f"{where} {how}", killed, code, tail, event.number(4))
        else:
            self._judge_daemon(f"the MPI daemon {where} {how}", killed, code, event.number(4))

    def _judge_mpirun(self, text: str, killed: bool, code: int, tail: str, ended_ns: int) -> None:
        if killed:
            self._on_kill(f"{text} while ranks were at work" if self._asked else text, code, ended_ns)
        elif not self.attempt.running:
            return
        elif code and not self._asked:
            self.attempt.fail(f"{text} before it had started a rank{_last_lines(tail)}", code)
        elif not self.attempt.all_ended():
            self._suspect(f"{text} while ranks are at work", code or 1)
        elif code:
            self.attempt.say(f"WARNING: {text}, although all ranks here have ended with 0")

    def _judge_daemon(self, text: str, killed: bool, code: int, ended_ns: int) -> None:
        if killed:
            self._on_kill(text, code, ended_ns)
        elif self.attempt.running and (code or not self.attempt.all_ended()):
            self._suspect(f"{text} while ranks are at work", code or 1)

    def _on_kill(self, text: str, code: int, ended_ns: int) -> None:
        """mpirun or a daemon was killed. Stand-ins, here or on another host, may have seen first what follows.

        Its end is told once its output has been read, which may be when the ranks have ended of it, too.
        """
        if self.attempt.running:
            self.attempt.fail(text, code)
        elif self.attempt.stage == _STOP or 0 < ended_ns < self.attempt.swept_ns:  # else it was us
            self.stop_reason, self.stop_code = text, code

    def _on_spawn_failed(self, event: Event) -> None:
        import os

        slot, number = event.number(0), event.number(1)
        helper = self._helpers.pop(slot)
        text = f"{helper.argv[0]} cannot be started: {event.text(2)}: {os.strerror(number)}"
        if helper.connection:
            self._tell_end(helper.connection, 127, f"{self.attempt.plan.host}: {text}")
        if slot == _MPIRUN:
            self._mpirun_ended = True
        if self.attempt.running:  # else something before this has ended the attempt
            self.attempt.fail(text)

    # ---- daemons

    def run_daemon(self, words: Sequence[str], connection: int) -> None:
        """Starts a daemon on this host for an agent on the first one. Its end is told, also when it never starts."""
        try:
            host = self.plan.host_of(words)
            if host != self.attempt.plan.host:
                raise ValueError(f"it is for {host}")
            command = self.plan.daemon(words, self.plan.environ)
        except ValueError as error:
            self._tell_end(connection, 1, f"{self.attempt.plan.host} refuses to start a daemon: {error}")
            return
        if not self.attempt.running:
            self._tell_end(connection, 128 + _SIGTERM, "")
            return
        self._program, self._environ = command.argv[0], command.environ
        self._last_slot -= 1
        self._spawn(self._last_slot, command.name, command.argv, command.environ, connection)

    def daemon_ended(self, connection: int, code: int, text: str) -> None:
        """A daemon that was asked for has ended, or was never started."""
        if connection not in self._daemons_asked:
            return
        self._daemons_asked.discard(connection)
        self._reply(connection, code, text)
        if code and text and self.attempt.running:
            self._suspect(text, code)

    def on_message(self, host: str, message: Mapping[str, Any]) -> None:
        """Takes a message of another host's.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        if message["attempt"] != self.attempt.number:
            return
        what = message["do"]
        if what == "daemon" and not self.plan.command:
            self.run_daemon([str(word) for word in message["words"]], int(message["connection"]))
        elif what == "ended":
            self.daemon_ended(int(message["connection"]), int(message["code"]), str(message["text"]))
        elif what == "over":
            self._over.add(host)
            self._expect_end()
        else:
            raise ValueError(f"unknown message {what!r}")

    # ---- details

    def _waiting(self) -> list[int]:
        """The ranks here that mpirun has not asked for."""
        if not self.attempt.running:
            return []
        return [launch.rank for slot, launch in self.attempt.launches.items() if slot not in self._asked]

    def _tell_waiting(self, now_s: float) -> None:
        waited_s = now_s - self._started_s
        waiting = self._waiting()
        ranks = ", ".join(map(str, waiting[:16])) + (", ..." if len(waiting) > 16 else "")
        text = f"MPI has not asked for rank {ranks} of {self.attempt.plan.host} after {waited_s:.0f} s"
        if len(self.plan.hosts) > 1:
            text += f"; its daemons call {self.plan.hosts[0]} on a port of the kernel's choice: is that let through?"
        if waited_s >= _START_LIMIT_S:
            self.attempt.fail(text)
        else:
            self.attempt.say(text)

    def _tell(self, host: str, message: dict[str, Any]) -> bool:
        return self.relay(host, {**message, "attempt": self.attempt.number})

    def _tell_end(self, connection: int, code: int, text: str) -> None:
        if self.plan.command:  # a daemon of mpirun's own host
            self.daemon_ended(connection, code, text)
        else:
            self._tell("", {"do": "ended", "connection": connection, "code": code, "text": text})

    def _spawn(self, slot: int, name: str, argv: Sequence[str], environ: Mapping[str, str], connection: int) -> None:
        self._helpers[slot] = _Running(name, tuple(argv), connection)
        self.attempt.guardian.send(
            *spawn_fields(
                "exec",
                slot,
                directory=self.plan.directory,
                out_path="",
                err_path="",
                console=3,
                prefix=f"[{name}] ",
                cpus=(),
                argv=argv,
                environ={**environ, "LAUNCHER_AGENT_SOCKET": self.plan.agent_socket},
            )
        )

    def _reply(self, connection: int, code: int, text: str) -> None:
        self.attempt.guardian.send("reply", connection, code, text)

    def _suspect(self, reason: str, code: int) -> None:
        """Stops for ``reason``, unless a better one comes up shortly."""
        if self._pending is None:
            self._pending = (time.monotonic() + _REASON_S, reason, code)

    def _stop(self, reason: str, code: int) -> None:
        if self.attempt.running:
            self.stop_reason, self.stop_code = reason, code
            self.attempt.on_trouble(reason)
            self.attempt.stop(_SIGTERM, self.attempt.plan.grace_failure_s)

    def _note_abort(self, text: str) -> None:
        found = _OPEN_MPI_ABORT.search(text)
        if found and self._aborted is None:
            self._aborted = int(found[1]), exit_code(int(found[2]))


class _Running:
    """A helper: mpirun, or a daemon that stands for an agent of the first host (its connection there; else 0)."""

    __slots__ = ("argv", "connection", "name", "pid")

    def __init__(self, name: str, argv: tuple[str, ...], connection: int) -> None:
        self.name = name
        self.argv = argv
        self.connection = connection
        self.pid = 0


def exit_code(code: int) -> int:
    """What a process can end with for a code given to MPI_Abort; never 0."""
    return code & 0xFF or 1


def _signal_name(number: int) -> str:
    import signal

    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_lines(text: str) -> str:
    """The last lines of what mpirun said, to follow a sentence; "" for nothing."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and set(line.strip()) != {"-"}]
    return ": " + " | ".join(lines[-_TAIL_LINES:])[:600] if lines else ""
