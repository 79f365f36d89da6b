"""A host's end of the group: finds the leader, does what it says, tells it what happens here."""

from __future__ import annotations

import select
import socket
import time

from launcher.cluster import messages
from launcher.cluster.options import FIRST_LINE_S, LATE_S, LINE_S, NOT_LISTED, PORTS, SLEPT_S
from launcher.cluster.probe import Probe
from launcher.cluster.resolve import Resolver
from launcher.cluster.sockets import begin_connect, connect_error
from launcher.cluster.wire import WRONG_SECRET, Channel
from launcher.errors import ClusterError, LauncherError, RefusedError, StoppedError
from launcher.evidence import HostReport, LostHost
from launcher.record import as_dict, replace
from launcher.supervisor.group import Finish, Relayed, Stacks, Start, Stop, Sweep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from launcher.cluster.options import ClusterPlan
    from launcher.evidence import ExitRecord, RankProgress
    from launcher.supervisor.group import Order

_SIGTERM = 15
# Between two tries to reach the leader: short at first, when all hosts start at once.
_FIRST_RETRY_S, _LAST_RETRY_S = 0.02, 1.0
_CONNECT_S = 2.0
_CLOSE_S = 2.0


class Member:
    """The group as the supervisor of any host but the first sees it."""

    def __init__(self, plan: ClusterPlan, say: Callable[[str], None], attempt: int = 0) -> None:
        """``attempt``: the number of the first one."""
        self.plan = plan
        self.orphaned = False  # the leader is lost, this host's part is over, and the group may go on
        self._say = say
        self._leader = plan.hosts[0]
        self._epoll = select.epoll()
        self._resolver = Resolver([self._leader], plan.addresses)
        self._epoll.register(self._resolver.fileno(), select.EPOLLIN)
        self._addresses: tuple[str, ...] = ()
        own = plan.addresses.get(plan.host, plan.host)
        # Of several addresses, the leader expects the one that the host list has.
        self._source = own if own.replace(".", "").isdigit() or ":" in own else ""
        self._connecting: socket.socket | None = None
        self._channel: Channel | None = None
        self._ready = False  # the handshake is done, and hello is sent
        self._writing = False
        self._warned = ""
        self._told = ""  # why the leader does not let this host in yet
        self._try = 0
        self._ports = min(PORTS, (1 << 16) - plan.leader_port)
        self._trying = ""  # address and port of the last try
        self._retry_wait_s = _FIRST_RETRY_S
        self._why = "its name is being resolved"
        self._heard_why = False  # in this round over the ports: from a leader, not from the kernel
        self._hosts: tuple[str, ...] = ()  # of the current attempt; empty before the first
        self._slots: tuple[int, ...] = ()
        self.attempt = attempt
        self._orders: list[Order] = []
        self._report: HostReport | None = None
        self._lost: LostHost | None = None  # the leader
        self._abort: LauncherError | None = None
        self._over = False
        self._late = False
        self._probe: Probe | None = None
        self._peers: dict[str, str] = {}
        self._peer_port = 0
        self._reachable: set[str] | None = None  # peers that answered when the attempt began
        self._cut: tuple[str, ...] = ()
        self._held: list[Callable[[], None]] = []  # what waits for the probe
        now = time.monotonic()
        self._served_s = now
        self._next_try_s = now
        self._give_up_s = float("inf")  # of the connection that is being made
        self._line_s = now + FIRST_LINE_S
        self._join_by_s = now + plan.join_timeout_s

    # ---- as the supervisor's group

    def fileno(self) -> int:
        return self._epoll.fileno()

    def next_time(self) -> float | None:
        if self._orders:
            return 0.0
        if not self._hosts and self._ready and self._channel is not None:
            return self._channel.heard_s + self.plan.host_timeout_s
        if not self._hosts:
            return min(self._line_s, self._join_by_s, self._give_up_s if self._busy() else self._next_try_s)
        times = []
        if self._channel is not None:
            limit_s = self.plan.host_timeout_s if self._late else min(LATE_S, self.plan.host_timeout_s)
            times.append(self._channel.heard_s + limit_s)
        if self._probe is not None:
            times.append(self._probe.deadline_s)
        return min(times) if times else None

    def serve(self, now_s: float) -> Sequence[Order]:
        for fd, events in self._epoll.poll(0):
            if fd == self._resolver.fileno():
                self._resolved()
            elif self._connecting is not None and fd == self._connecting.fileno():
                self._connected(now_s)
            elif self._channel is not None and fd == self._channel.fileno():
                self._serve_channel(events, now_s)
        slept, self._served_s = now_s - self._served_s > SLEPT_S, now_s
        if self._channel is not None and slept:
            self._channel.heard_s = max(self._channel.heard_s, now_s)
        if self._probe is not None and self._probe.done(now_s):
            self._end_probe(self._probe)
        if self._hosts:
            self._check_leader(now_s)
        elif self._abort is None:
            self._form(now_s)
        if self._abort is not None and not self._hosts:
            raise self._abort
        orders, self._orders = self._orders, []
        return orders

    def rank_ended(self, record: ExitRecord) -> None:
        if record.failed or record.left_early:
            self._send(messages.record_message(record))

    def stopping(self, number: int, forced: bool) -> None:
        self._send({"kind": "stopping", "number": number, "forced": forced})
        if not self._hosts:
            self._abort = StoppedError(number)

    def quiet(self, still: bool) -> None:
        self._send({"kind": "quiet", "still": still})

    def stacked(self, progress: tuple[RankProgress, ...]) -> None:
        self._after_probe(
            lambda: self._send(
                {"kind": "stacked", "progress": [as_dict(rank) for rank in progress], "cut": list(self._cut)}
            )
        )

    def waited(self, shares: dict[int, float]) -> None:
        self._send({"kind": "waited", "shares": [[rank, share] for rank, share in shares.items()]})

    def attempt_over(self, report: HostReport) -> None:
        self._report = report
        if self._lost is not None or self._abort is not None:
            self._conclude_alone()
            return
        if not any(record.failed for record in report.records) and not report.evidence.launcher_error:
            self._say("all ranks of this host have ended with 0; waiting for the other hosts")
        self._after_probe(lambda: self._send(messages.report_message(report, self._cut)))

    def trouble(self, reason: str) -> None:
        self._send({"kind": "trouble", "reason": reason})

    def relay(self, host: str, message: dict[str, Any]) -> bool:
        self._send({"kind": "relay", "message": message})
        return not host

    def failed(self, error: LauncherError) -> None:
        if self._abort is None:
            self._send({**messages.abort_message(error), "kind": "failed"})

    def close(self) -> None:
        deadline_s = time.monotonic() + _CLOSE_S
        if self._channel is not None and self._channel.fileno() >= 0:
            poller = select.poll()  # for writing alone: what comes in is not read any more
            poller.register(self._channel.fileno(), select.POLLOUT)
            while self._channel.wants_write() and (left_s := deadline_s - time.monotonic()) > 0:
                poller.poll(left_s * 1000)
                self._channel.flush()
        if self._channel is not None:
            self._channel.close("the job is over here")
        if self._connecting is not None:
            self._connecting.close()
        if self._probe is not None:
            self._probe.close()
        self._resolver.close()
        self._epoll.close()

    # ---- for the group's next life

    @property
    def hosts(self) -> tuple[str, ...]:
        """Those that were together."""
        return self._hosts

    @property
    def left(self) -> tuple[str, ...]:
        """Those of them that may still be there."""
        return tuple(host for host in self._hosts if host != self._leader)

    @property
    def enough(self) -> int:
        """With how many hosts they may go on: more than half, lest a cut network leaves two groups at work."""
        return max(self.plan.policy.min_hosts, len(self._hosts) // 2 + 1)

    @property
    def loss(self) -> str:
        """What happened to the leader, in words."""
        return f"{self._leader} {self._lost.how}" if self._lost is not None else ""

    # ---- finding the leader

    def _busy(self) -> bool:
        return self._connecting is not None or self._channel is not None

    def _resolved(self) -> None:
        for result in self._resolver.take():
            self._addresses = result.addresses
            if result.error:
                self._why = f"its name does not resolve: {result.error}"

    def _form(self, now_s: float) -> None:
        if self._channel is not None:
            self._channel.on_time(now_s)
            self._settle(now_s)
        if now_s >= self._give_up_s and self._connecting is not None:
            self._failed_try(now_s, f"{self._trying} does not answer")
        if not self._busy() and now_s >= self._next_try_s:
            self._begin(now_s)
        if self._ready:
            self._check_joined(now_s)  # from now on the leader says how long it waits for others
        elif now_s >= self._join_by_s:
            waited = f"for {self.plan.join_timeout_s:g} s (--join-timeout)"
            why = f"{self.plan.because}; " if self.plan.because else ""
            raise ClusterError(f"{why}the leader {self._leader} could not be reached {waited}: {self._why}")
        elif now_s >= self._line_s:
            self._line_s = now_s + LINE_S
            self._say(f"waiting for the leader {self._leader}: {self._why}")

    def _check_joined(self, now_s: float) -> None:
        channel = self._channel
        if channel is not None and now_s - channel.heard_s >= self.plan.host_timeout_s:
            channel.close(f"nothing was heard of it for {now_s - channel.heard_s:.1f} s")
            self._settle(now_s)

    def _begin(self, now_s: float) -> None:
        if not self._addresses:
            self._resolver.ask([self._leader])
            self._next_try_s = now_s + self._wait_longer()
            return
        # Every address, and for each the ports that the leader may have taken.
        turn, number = divmod(self._try, self._ports)
        self._try += 1
        address, port = self._addresses[turn % len(self._addresses)], self.plan.leader_port + number
        self._trying = f"{address} port {port}"  # the addresses may be others by the time that it fails
        try:
            self._connecting = begin_connect(address, port, self._source)
        except ClusterError as error:
            self._failed_try(now_s, str(error))
            return
        self._give_up_s = now_s + _CONNECT_S
        self._epoll.register(self._connecting.fileno(), select.EPOLLOUT)

    def _connected(self, now_s: float) -> None:
        sock = self._connecting
        assert sock is not None
        problem = connect_error(sock)
        if problem:
            why = f"{self._trying}: {problem} (its launcher is not up yet, or another port is its own)"
            self._failed_try(now_s, why)
            return
        self._epoll.unregister(sock.fileno())
        self._connecting = None
        self._channel = Channel.connecting(sock, key=self.plan.key, job=self.plan.job, host=self.plan.host, now_s=now_s)
        # A leader answers at once; what does not may be another program that holds this port.
        self._channel.deadline_s = self._give_up_s = now_s + _CONNECT_S
        self._epoll.register(self._channel.fileno(), select.EPOLLIN)
        self._writing = False
        self._settle(now_s)

    def _failed_try(self, now_s: float, why: str, heard: bool = False) -> None:
        """``heard``: something answered, which tells more than a port where nothing listens."""
        if self._connecting is not None:
            self._epoll.unregister(self._connecting.fileno())
            self._connecting.close()
            self._connecting = None
        if heard or not self._heard_why:
            self._why, self._heard_why = why, heard
        self._give_up_s = float("inf")
        # The next port at once; a pause after all of them, and the name once more: it may have changed.
        self._next_try_s = now_s
        if self._try % self._ports == 0:
            self._heard_why = False
            self._resolver.ask([self._leader])
            self._next_try_s = now_s + self._wait_longer()

    def _wait_longer(self) -> float:
        wait_s, self._retry_wait_s = self._retry_wait_s, min(_LAST_RETRY_S, 2 * self._retry_wait_s)
        return wait_s

    # ---- the connection

    def _serve_channel(self, events: int, now_s: float) -> None:
        channel = self._channel
        assert channel is not None
        if events & select.EPOLLOUT:
            channel.flush()
        if events & ~select.EPOLLOUT:
            found = channel.read(now_s)
            if channel.open and not self._ready:
                self._greet(channel)
            try:
                for message in found:
                    self._take(channel, message)
            except (KeyError, TypeError, ValueError, IndexError) as error:
                channel.close(f"the leader sent a message that is none: {type(error).__name__}: {error}")
        self._settle(now_s)

    def _greet(self, channel: Channel) -> None:
        self._ready = True
        self._give_up_s = float("inf")
        channel.send({"kind": "hello", "facts": self.plan.facts.as_message(), "slots": self.plan.slots})

    def _settle(self, now_s: float) -> None:
        channel = self._channel
        if channel is None:
            return
        if not channel.closed:
            if channel.wants_write() != self._writing:
                self._writing = channel.wants_write()
                self._epoll.modify(channel.fileno(), select.EPOLLIN | (select.EPOLLOUT if self._writing else 0))
            return
        self._channel = None  # the kernel has taken the closed descriptor out of the epoll set
        if self._over or self._abort is not None:
            return
        if self._hosts:
            gone = channel.cause in ("eof", "reset")
            how = "is lost: its launcher ended without a word" if gone else f"is unreachable: {channel.closed}"
            self._lose_leader(how, silent=channel.cause == "unreachable", heard_s=channel.heard_s)
            return
        self._ready = False
        # Without a secret, it may be another job's leader that knows what anybody knows.
        if channel.refusal_proven and self.plan.secret and NOT_LISTED in channel.refusal:
            self._abort = RefusedError(f"{channel.closed}; the hosts must have the same host list")
            return
        if (channel.cause == "bad-proof" or channel.refusal == WRONG_SECRET) and channel.closed != self._warned:
            self._warned = channel.closed  # said once, tried on
            self._say(f"WARNING: {channel.closed}")
        self._failed_try(now_s, self._told or channel.closed, heard=True)
        self._told = ""

    def _send(self, message: dict[str, Any]) -> None:
        if self._channel is not None:
            self._channel.send(message)
            self._settle(time.monotonic())

    # ---- what the leader says

    def _take(self, channel: Channel, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "ping":
            # Not _send(): when the connection has ended after this, what was said before that comes first.
            channel.send({"kind": "pong", "sent": int(message["sent"]), "member_ns": time.monotonic_ns()})
        elif kind == "start":
            self._take_start(message)
        elif kind == "stop":
            self._orders.append(Stop(int(message["number"]), bool(message["failure"]), str(message["line"])))
            for host in message["lost"]:  # nobody waits for an answer of theirs
                self._peers.pop(str(host), None)
            if message["failure"]:
                self._ask_peers()
        elif kind == "sweep":
            self._orders.append(Sweep(str(message["line"])))
        elif kind == "stacks":
            self._orders.append(Stacks())
            self._ask_peers()
        elif kind == "relay":
            self._orders.append(Relayed(self._leader, dict(message["message"])))
        elif kind == "say":
            self._say(str(message["line"]))
        elif kind == "wait":
            self._told = f"it does not let this host in: {message['text']}"
        elif kind == "verdict":
            self._take_verdict(message)
        elif kind == "abort":
            self._take_abort(messages.read_abort(message))
        else:
            raise ValueError(f"unknown kind {kind!r}")

    def _take_start(self, message: dict[str, Any]) -> None:
        assert self._channel is not None
        without = {str(host) for host in message["without"]}
        hosts = tuple(host for host in self.plan.hosts if host not in without)
        if self.plan.host not in hosts:
            raise ValueError("this host was left out")
        slots = messages.unpack_slots(message["slots"], len(hosts))
        self._hosts, self._slots, self.attempt = hosts, slots, int(message["attempt"])
        self._report, self._cut, self._reachable = None, (), None
        address = str(message["address"]) or self._channel.address
        line = str(message["line"])
        port = int(message["port"])
        local = self._channel.local_address
        store = self._channel.address, int(message["store"])
        self._orders.append(Start(self.attempt, hosts, slots, address, port, local, line, *store))
        self._peers = {str(host): str(peer) for host, peer in message["peers"].items() if host != self.plan.host}
        self._peer_port = int(message["peer_port"])
        self._ask_peers()

    def _take_verdict(self, message: dict[str, Any]) -> None:
        verdict = messages.read_verdict(message)
        self._over = True
        # What this host knows of its own ranks is more than what it was sent.
        records = self._report.records if self._report is not None else ()
        self._orders.append(Finish(replace(verdict, records=records)))
        if self._channel is not None:
            self._channel.close("the verdict is here")

    def _take_abort(self, error: LauncherError) -> None:
        self._abort = error
        if self._hosts:
            self._orders.append(Stop(_SIGTERM, True, f"{self._leader}: {error}: stopping all ranks"))
            if self._report is not None:
                self._conclude_alone()

    # ---- without the leader

    def _check_leader(self, now_s: float) -> None:
        channel = self._channel
        if channel is None or self._over:
            return
        silent_s = now_s - channel.heard_s
        if silent_s >= self.plan.host_timeout_s:
            channel.close(f"nothing was heard of it for {silent_s:.1f} s")
            self._channel = None
            self._lose_leader(f"is unreachable: {channel.closed}", silent=True, heard_s=channel.heard_s)
        elif self._late != (silent_s > LATE_S):
            self._late = not self._late
            limit = f"it is given up after {self.plan.host_timeout_s:g} s"
            silence = f"WARNING: the leader {self._leader} has been silent for {silent_s:.1f} s; {limit}"
            self._say(silence if self._late else f"the leader {self._leader} is back")

    def _lose_leader(self, how: str, silent: bool, heard_s: float) -> None:
        ranks = tuple(range(self._slots[0])) if self._hosts[0] == self._leader else ()
        heard_ns = int(heard_s * 1e9) if silent else time.monotonic_ns()
        self._lost = LostHost(self._leader, how, heard_ns, silent, ranks)
        self._orders.append(Stop(_SIGTERM, True, f"{self._leader} {how}: stopping all ranks"))
        if self._report is not None:
            self._conclude_alone()

    def _conclude_alone(self) -> None:
        from launcher.verdict import judge

        report = self._report
        assert report is not None
        may_go_on = self.plan.policy.min_hosts > 0 and len(self.left) >= self.enough and not report.stuck
        if self._lost is not None and may_go_on and not report.evidence.stop_signal:
            self.orphaned = True
            return
        evidence = report.evidence
        if self._lost is not None:
            evidence = replace(evidence, lost_hosts=(self._lost,))
        elif self._abort is not None and not evidence.launcher_error:
            evidence = replace(evidence, launcher_error=str(self._abort), launcher_code=self._abort.exit_code)
        self._over = True
        verdict = judge(report.records, evidence, self.plan.program)
        self._orders.append(Finish(replace(verdict, attempt=report.attempt)))

    # ---- which hosts can be reached

    def _ask_peers(self) -> None:
        # Who never answered may sit behind a firewall: asking again would only hold the report back.
        reachable = self._peers if self._reachable is None else self._reachable
        asked = {host: address for host, address in self._peers.items() if host in reachable}
        if self._probe is None and asked:
            self._probe = Probe(asked, self._peer_port, time.monotonic())
            self._epoll.register(self._probe.fileno(), select.EPOLLIN)

    def _end_probe(self, probe: Probe) -> None:
        self._probe = None
        answered = set(self._peers) - probe.silent
        if self._reachable is None:
            self._reachable = answered
        # Who has stopped to answer is cut off.
        self._cut = tuple(sorted((self._reachable & self._peers.keys()) - answered))
        held, self._held = self._held, []
        for act in held:
            act()

    def _after_probe(self, act: Callable[[], None]) -> None:
        if self._probe is not None:
            self._held.append(act)
        else:
            act()
