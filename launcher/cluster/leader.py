"""The first host's end of the group: lets the others in, decides for all (with the coordinator), and tells them."""

from __future__ import annotations

import time

from launcher.cluster import messages, wire
from launcher.cluster.clock import ClockEstimate
from launcher.cluster.connections import Connections, allow_connections
from launcher.cluster.facts import HostFacts, differences
from launcher.cluster.guests import Guests
from launcher.cluster.options import FIRST_LINE_S, HEARTBEAT_S, LATE_S, LINE_S, NOT_LISTED, SLEPT_S
from launcher.cluster.probe import probed_port
from launcher.errors import ClusterError, LauncherError, RefusedError, StoppedError, UsageError
from launcher.evidence import ClockOffset, Evidence, HostReport, LostHost, whole_number
from launcher.supervisor.coordinator import Coordinator
from launcher.supervisor.group import Finish, Relayed, Say, Stacks, Start, Stop, Sweep
from launcher.topology import limit_slots

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from launcher.cluster.options import ClusterPlan
    from launcher.cluster.wire import Channel
    from launcher.evidence import ExitRecord, RankProgress, Verdict
    from launcher.supervisor.group import Order

_CLOSE_S = 5.0
# In jobs of this size at most, all pairs of hosts are asked whether they reach each other.
_PROBED_HOSTS = 32
_FIRST_PINGS = 4
# Of one thing that another host has sent.
_SHOWN_CHARACTERS = 300


class _Member:
    """A host that has joined."""

    def __init__(self, channel: Channel, slots: int) -> None:
        self.channel, self.slots = channel, slots
        self.clock = ClockEstimate()
        self.pings = 0
        self.late = False
        self.silent = False  # given up since nothing was heard of it
        self.cut: tuple[str, ...] = ()


class Leader:
    """The group as the first host's supervisor sees it."""

    def __init__(self, plan: ClusterPlan, port: int, say: Callable[[str], None], attempt: int = 0) -> None:
        """``port``: MASTER_PORT, reserved on this host; ``attempt``: the number of the first one.

        Raises:
            ClusterError: no port to listen on.
        """
        self.plan = plan
        self._port = port
        self._say = say
        self._names = frozenset(plan.hosts)
        self._first_attempt = attempt
        self._stopped: StoppedError | None = None
        self._members: dict[str, _Member] = {}
        self._guests = Guests(plan, allow_connections(len(plan.hosts)), say)
        self._connections = Connections(plan, self, self._guests)
        self._guests.open()
        self._closing = False
        self._hosts: tuple[str, ...] = ()  # of the current attempt; empty while hosts are missing
        self._failed = False
        self._orders: list[Order] = []
        self._coordinator = Coordinator(plan.policy, plan.program, self)
        now = time.monotonic()
        self._served_s = self._beat_s = now
        self._line_s = now + FIRST_LINE_S
        self._join_by_s = now + plan.join_timeout_s

    # ---- as the supervisor's group

    def fileno(self) -> int:
        return self._connections.fileno()

    def next_time(self) -> float | None:
        if self._orders:
            return 0.0
        times = [self._beat_s, self._line_s]
        if not self._hosts:
            times.append(self._join_by_s)
        return min(times)

    def serve(self, now_s: float) -> Sequence[Order]:
        self._connections.serve(now_s)
        self._guests.serve(now_s, () if self._hosts else self._missing())
        if now_s - self._served_s > SLEPT_S:
            for member in self._members.values():
                member.channel.heard_s = max(member.channel.heard_s, now_s)
        self._served_s = now_s
        if now_s >= self._beat_s:
            self._beat_s = now_s + HEARTBEAT_S
            self._beat(now_s)
        if self._stopped is not None:
            raise self._stopped
        if not self._hosts:
            self._form(now_s)
        elif now_s >= self._line_s:
            self._line_s = now_s + LINE_S
            self._tell_waiting()
        orders, self._orders = self._orders, []
        return orders

    def rank_ended(self, record: ExitRecord) -> None:
        self._coordinator.rank_ended(self.plan.host, record)

    def stopping(self, number: int, forced: bool) -> None:
        if not self._hosts:
            self._stopped = StoppedError(number)
            self.failed(self._stopped)
        else:
            self._coordinator.stopping(self.plan.host, number, forced)

    def quiet(self, still: bool) -> None:
        self._coordinator.quiet(self.plan.host, still)

    def stacked(self, progress: tuple[RankProgress, ...]) -> None:
        self._coordinator.stacked(self.plan.host, progress)

    def waited(self, shares: dict[int, float]) -> None:
        self._coordinator.waited(self.plan.host, shares)

    def attempt_over(self, report: HostReport) -> None:
        self._over(report)

    def failed(self, error: LauncherError) -> None:
        """This host cannot go on, for a reason that is no rank's: nobody can."""
        if not self._failed:
            self._failed = True
            self._broadcast(messages.abort_message(error))

    def close(self) -> None:
        """Waits, within a bound, until every member has what it was sent."""
        self._closing = True
        self._connections.close_door()
        self._guests.close()
        deadline_s = time.monotonic() + _CLOSE_S
        # A member that has its verdict closes the connection.
        while self._members and time.monotonic() < deadline_s:
            self._connections.drain(deadline_s)
        self._connections.close()
        self._guests.tell_counts()

    def trouble(self, reason: str) -> None:
        self._coordinator.trouble(self.plan.host, reason)

    def relay(self, host: str, message: dict[str, Any]) -> bool:
        member = self._members.get(host)
        if member is not None:
            self._connections.send(member.channel, {"kind": "relay", "message": message})
        return member is not None

    # ---- as the coordinator's hosts

    def stop(self, number: int, failure: bool, line: str) -> None:
        lost = list(self._coordinator.lost)
        self._broadcast({"kind": "stop", "number": number, "failure": failure, "line": line, "lost": lost})
        self._orders.append(Stop(number, failure, line))

    def sweep(self, line: str) -> None:
        self._broadcast({"kind": "sweep", "line": line})
        self._orders.append(Sweep(line))

    def say(self, line: str) -> None:
        self._orders.append(Say(line))

    def stacks(self) -> None:
        self._broadcast({"kind": "stacks"})
        self._orders.append(Stacks())

    def restart(self, attempt: int, hosts: tuple[str, ...], line: str) -> None:
        self._start(attempt, hosts, line)

    def finish(self, verdict: Verdict) -> None:
        verdict = messages.bounded(verdict)
        self._broadcast(messages.verdict_message(verdict))
        self._orders.append(Finish(verdict))

    # ---- as the owner of the connections

    def admit(self, host: str) -> str:
        if host not in self._names:
            return f"{host} {NOT_LISTED} of {self.plan.host}"
        if host == self.plan.host or host in self._members:
            return f"{host} is here already"
        if self._hosts:
            return "the job runs already"
        return ""

    def ended(self, channel: Channel) -> None:
        member = self._members.get(channel.host)
        if member is None or member.channel is not channel:
            self._guests.left(channel)
            return
        del self._members[channel.host]
        if self._closing:
            return
        if channel.cause in ("replay", "oversized", "garbage"):
            self._guests.count(channel.cause, channel.closed)
        if not self._hosts:
            self._say(f"{channel.host} has left: {channel.closed}")
            return
        gone = channel.cause in ("eof", "reset")
        silent = member.silent or channel.cause == "unreachable"
        why = f"is {'unreachable' if silent else 'given up'}: {channel.closed}"
        self._lose(channel, "is lost: its launcher ended without a word" if gone else why, silent)

    def _lose(self, channel: Channel, how: str, silent: bool) -> None:
        heard_ns = int(channel.heard_s * 1e9) if silent else time.monotonic_ns()
        ranks = tuple(self._ranks(channel.host))
        self._coordinator.host_lost(LostHost(channel.host, how, heard_ns, silent, ranks))

    def _ranks(self, host: str) -> range:
        """Those of a host in the current attempt."""
        if host not in self._hosts:
            return range(0)
        place = self._hosts.index(host)
        first = sum(self._slots[:place])
        return range(first, first + self._slots[place])

    def _broadcast(self, message: dict[str, Any]) -> None:
        encoded = wire.encode(message)
        for member in list(self._members.values()):
            self._connections.send(member.channel, encoded)

    # ---- what members say

    def take(self, channel: Channel, message: dict[str, Any]) -> None:
        member = self._members.get(channel.host)
        try:
            if member is None or member.channel is not channel:
                act = self._understand_hello(channel, message)
            else:
                act = self._understand(channel.host, member, message)
        except (KeyError, TypeError, ValueError) as error:
            channel.close(f"{channel.host} sent a message that is none: {str(error)[:_SHOWN_CHARACTERS]}")
        else:
            act()  # outside: a fault of ours is not the member's

    def _understand_hello(self, channel: Channel, message: dict[str, Any]) -> Callable[[], None]:
        if message["kind"] != "hello":
            raise ValueError(f"hello expected, not {messages.shown(message['kind'])}")
        slots = whole_number(message["slots"])
        if not 0 < slots < 1 << 16:
            raise ValueError(f"{slots} slots")
        facts = HostFacts.from_message(message["facts"], channel.host)
        return lambda: self._take_hello(channel, slots, facts)

    def _take_hello(self, channel: Channel, slots: int, facts: HostFacts) -> None:
        host = channel.host
        unknown = self._guests.unknown(channel)
        if unknown or self.admit(host):
            self._connections.send(channel, {"kind": "wait", "text": unknown or self.admit(host)})
            channel.close(unknown or self.admit(host))
            return
        found = [line[:_SHOWN_CHARACTERS] for line in differences(self.plan.facts, facts)]
        if found and self.plan.peer_check != "off":
            text = f"{host} is not like {self.plan.host}: " + "; ".join(found)
            if self.plan.peer_check == "refuse":
                advice = "make the hosts alike, or use --peer-check warn"
                error = RefusedError(f"{text}; {advice}")
                self._connections.send(channel, messages.abort_message(error))
                self.failed(error)
                raise error
            self._say(f"WARNING: {text}")
            self._connections.send(channel, {"kind": "say", "line": f"WARNING: {text}"})
        member = self._members[host] = _Member(channel, slots)
        self._guests.joined(channel)
        self._ping(member)

    def _understand(self, host: str, member: _Member, message: dict[str, Any]) -> Callable[[], None]:
        """What a member's message asks for; nothing is done yet.

        Raises:
            KeyError, TypeError, ValueError: it is no message that this member may send now.
        """
        kind, coordinator = message["kind"], self._coordinator
        if kind == "pong":
            sent, member_ns = whole_number(message["sent"]), whole_number(message["member_ns"])
            return lambda: self._take_pong(host, member, sent, member_ns)
        if kind == "stopping":
            number, forced = messages.read_stop(message)
            return lambda: self._take_stop(host, number, forced)
        if kind == "failed":
            error = messages.read_abort(message)
            return lambda: self._take_failure(host, error)
        if kind not in ("ended", "quiet", "waited", "stacked", "over", "trouble", "relay"):
            raise ValueError(f"unknown kind {messages.shown(kind)}")
        if not self._hosts:
            raise ValueError(f"{kind} before the start")
        if kind == "trouble":
            reason = str(message["reason"])[:_SHOWN_CHARACTERS]
            return lambda: coordinator.trouble(host, reason)
        if kind == "relay":
            relayed = Relayed(host, dict(message["message"]))
            return lambda: self._orders.append(relayed)
        ranks = range(sum(self._slots)) if self.plan.free_layout else self._ranks(host)
        if kind == "ended":
            record = messages.read_record(message, host, ranks)
            return lambda: coordinator.rank_ended(host, record)
        if kind == "quiet":
            still = message["still"]
            if type(still) is not bool:
                raise TypeError(f"still is {messages.shown(still)}")
            return lambda: coordinator.quiet(host, still)
        if kind == "waited":
            shares = messages.read_waited(message, ranks)
            return lambda: coordinator.waited(host, shares)
        cut = messages.read_cut(message)
        if kind == "stacked":
            progress = messages.read_progress(message, ranks)

            def take_stacks() -> None:
                self._note_cut(host, cut)
                coordinator.stacked(host, progress)

            return take_stacks
        report = messages.read_report(message, host, coordinator.attempt, ranks)

        def take_report() -> None:
            self._note_cut(host, cut)
            self._over(report)

        return take_report

    def _take_pong(self, host: str, member: _Member, sent_ns: int, member_ns: int) -> None:
        clock = member.clock
        before = clock.offset_ns, clock.uncertainty_ns
        clock.add(sent_ns, member_ns, time.monotonic_ns())
        if (clock.offset_ns, clock.uncertainty_ns) != before:
            self._coordinator.clocks[host] = ClockOffset(host, clock.offset_ns, clock.uncertainty_ns)
        if member.pings < _FIRST_PINGS:
            self._ping(member)

    def _take_stop(self, host: str, number: int, forced: bool) -> None:
        if not self._hosts:
            stopped = StoppedError(number)
            self.failed(stopped)
            raise stopped
        self._coordinator.stopping(host, number, forced)

    def _over(self, report: HostReport) -> None:
        self._coordinator.attempt_over(report)
        if len(self._coordinator.reports) == 1:
            self._line_s = min(self._line_s, time.monotonic() + FIRST_LINE_S)

    def _take_failure(self, host: str, error: LauncherError) -> None:
        """A member's launcher cannot go on."""
        if not self._hosts:
            self.failed(error)
            raise error
        evidence = Evidence(launcher_error=str(error), launcher_code=error.exit_code)
        self._coordinator.attempt_over(HostReport(host, self._coordinator.attempt, (), evidence, 0.0, False))

    # ---- forming

    def _form(self, now_s: float) -> None:
        here = (self.plan.host, *self._members)
        missing = self._missing()
        if missing and now_s >= self._join_by_s:
            enough = self.plan.enough
            if not 0 < enough <= len(here):
                reasons = self._guests.why_missing(missing)
                waited = "" if self.plan.because else f" after {self.plan.join_timeout_s:g} s (--join-timeout)"
                why = f"{self.plan.because}; " if self.plan.because else ""
                total = len(self.plan.hosts)
                error = ClusterError(f"{why}{len(missing)} of {total} hosts did not come{waited}: {reasons}")
                self.failed(error)
                raise error
            self._say(f"going on without {', '.join(missing)} (--min-hosts {enough})")
            missing = []
        if missing:
            if now_s >= self._line_s:
                self._line_s = now_s + LINE_S
                reasons = self._guests.why_missing(missing)
                line = f"{len(here)} of {len(self.plan.hosts)} hosts are here; missing: {reasons}"
                self._say(line)
                self._broadcast({"kind": "say", "line": line})
            return
        self._line_s = now_s + LINE_S
        self._start(self._first_attempt, tuple(host for host in self.plan.hosts if host in here), "")

    def _missing(self) -> list[str]:
        return [host for host in self.plan.hosts if host != self.plan.host and host not in self._members]

    def _start(self, attempt: int, hosts: tuple[str, ...], line: str) -> None:
        self._hosts = hosts
        slots = {host: member.slots for host, member in self._members.items()}
        slots[self.plan.host] = self.plan.slots
        try:
            self._slots = self._limited(tuple(slots[host] for host in hosts), attempt)
        except UsageError as error:
            self.failed(error)
            raise
        without = [host for host in self.plan.hosts if host not in hosts]
        self._coordinator.begin(attempt, hosts)
        for member in self._members.values():
            member.cut = ()
        peers = {host: member.channel.address for host, member in self._members.items()}
        own = next((member.channel.local_address for member in self._members.values()), "127.0.0.1")
        try:
            store_port = self.plan.open_store(own, peers.values())
        except ClusterError as error:
            self.failed(error)
            raise
        # Hosts that share an address (simulated ones, or behind one gateway) have no links of their own.
        asked = 2 < len(hosts) <= _PROBED_HOSTS and len(set(peers.values())) == len(peers)
        self._broadcast(
            {
                "kind": "start",
                "attempt": attempt,
                "without": without,
                "slots": messages.pack_slots(self._slots),
                "address": self.plan.master_address,
                "port": self._port,
                "store": store_port,
                "line": line,
                "peers": peers if asked else {},
                "peer_port": probed_port(self.plan.leader_port),
            }
        )
        address = self.plan.master_address or own
        self._orders.append(Start(attempt, hosts, self._slots, address, self._port, own, line, own, store_port))

    def _limited(self, slots: tuple[int, ...], attempt: int) -> tuple[int, ...]:
        """The slots that are used. After a host was lost there may be fewer than were asked for."""
        wanted = self.plan.processes
        return limit_slots(slots, min(wanted, sum(slots)) if attempt > self._first_attempt else wanted)

    @property
    def leader_port(self) -> int:
        """Where it listens."""
        return self._connections.port

    # ---- time

    def _ping(self, member: _Member) -> None:
        member.pings += 1
        self._connections.send(member.channel, {"kind": "ping", "sent": time.monotonic_ns()})

    def _beat(self, now_s: float) -> None:
        self._connections.on_beat(now_s)
        encoded = wire.encode({"kind": "ping", "sent": time.monotonic_ns()})
        for host, member in list(self._members.items()):
            silent_s = now_s - member.channel.heard_s
            if silent_s >= self.plan.host_timeout_s:
                member.silent = True
                self._connections.drop(member.channel, f"nothing was heard of it for {silent_s:.1f} s")
                continue
            if member.late != (silent_s > LATE_S):
                member.late = not member.late
                self._say(
                    f"WARNING: {host} has been silent for {silent_s:.1f} s; it is given up after "
                    f"{self.plan.host_timeout_s:g} s"
                    if member.late
                    else f"{host} is back"
                )
            self._connections.send(member.channel, encoded)

    def _tell_waiting(self) -> None:
        reports = self._coordinator.reports
        waiting = [host for host in self._hosts if host not in reports and host not in self._coordinator.lost]
        if not reports or not waiting:
            return
        names = ", ".join(waiting[:8]) + (f" and {len(waiting) - 8} more" if len(waiting) > 8 else "")
        line = f"{len(reports)} of {len(self._hosts)} hosts are done; waiting for {names}"
        if self.plan.host in reports:
            self._say(line)
        for host in reports:
            if host in self._members:
                self._connections.send(self._members[host].channel, {"kind": "say", "line": line})

    # ---- which hosts reach each other

    def _note_cut(self, host: str, cut: tuple[str, ...]) -> None:
        member = self._members[host]
        if cut == member.cut:
            return
        member.cut = cut
        pairs = {
            tuple(sorted((one, other), key=self._hosts.index))
            for one, member in self._members.items()
            for other in member.cut
            if other in self._hosts and one in self._hosts
        }
        self._coordinator.cut_links = tuple((one, other) for one, other in sorted(pairs))
