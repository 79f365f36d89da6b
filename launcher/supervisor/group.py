"""A supervisor and the rest of its job: what it is told to do, and what it tells.

A supervisor runs one host. Who decides over all hosts is behind :class:`Group`: the :class:`Alone` of this module for
one host; for several, the two ends of a connection in :mod:`launcher.cluster`.
"""

from __future__ import annotations

from launcher.record import Record
from launcher.supervisor.coordinator import Coordinator

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Protocol

    from launcher.errors import LauncherError
    from launcher.evidence import ExitRecord, HostReport, RankProgress, Verdict
    from launcher.supervisor.coordinator import Policy

    class Group(Protocol):
        """What a supervisor needs of its group. Nothing here waits."""

        def fileno(self) -> int:
            """Readable when :meth:`serve` has something to do; -1: never."""

        def next_time(self) -> float | None:
            """When :meth:`serve` has something to do in any case (``time.monotonic()``)."""

        def serve(self, now_s: float) -> Sequence[Order]:
            """Takes what has come, and the time; returns what this host is to do."""

        def rank_ended(self, record: ExitRecord) -> None:
            """A rank of this host has ended."""

        def stopping(self, number: int, forced: bool) -> None:
            """This host was asked to stop by a signal; ``forced``: for the second time."""

        def quiet(self, still: bool) -> None:
            """Nothing has moved on this host for the time that makes a hang; or (False) it moves again."""

        def stacked(self, progress: tuple[RankProgress, ...]) -> None:
            """The stacks that were asked for are written; this is where this host's ranks stand."""

        def waited(self, shares: dict[int, float]) -> None:
            """The share of the last window's time that each rank of this host has waited for others."""

        def attempt_over(self, report: HostReport) -> None:
            """Nothing of the attempt is left on this host."""

        def failed(self, error: LauncherError) -> None:
            """This host cannot go on, for a reason that is no rank's."""

        def trouble(self, reason: str) -> None:
            """This host stops its ranks for a reason that is no rank's; its report will say so too."""

        def relay(self, host: str, message: dict[str, Any]) -> bool:
            """Sends a message to the supervisor of a host, where it comes as :class:`Relayed`.

            Args:
                host: only the leader can name one; "" is the leader itself.

            Returns:
                Whether there is such a host.
            """

        def close(self) -> None:
            """Sends what is still to be sent, within a bound, and lets go of the other hosts."""


class Start(Record):
    """Start the ranks of an attempt.

    Attributes:
        slots: ranks of each of ``hosts``.
        address, port: where rank 0 listens for the others.
        local_address: of this host, as the others see it; "" for one host.
        store_address, store_port: where Horovod's key-value store listens, on the first host; port 0: there is none.
        line: said before; "" for nothing.
    """

    attempt: int
    hosts: tuple[str, ...]
    slots: tuple[int, ...]
    address: str
    port: int
    local_address: str = ""
    line: str = ""
    store_address: str = ""
    store_port: int = 0


class Stop(Record):
    """Stop the ranks: signal ``number``, and the grace of a failure or of a stop of the platform."""

    number: int
    failure: bool
    line: str


class Sweep(Record):
    """Kill whatever is left, now."""

    line: str


class Say(Record):
    """Show a line."""

    line: str


class Stacks(Record):
    """Let all ranks write their stacks: the job hangs."""


class Relayed(Record):
    """Not an order: what another host's supervisor has to say to this one."""

    host: str
    message: dict[str, Any]


class Finish(Record):
    """The job is over."""

    verdict: Verdict


Order = Start | Stop | Sweep | Say | Stacks | Relayed | Finish


class Alone:
    """The group of a job on one host."""

    def __init__(self, policy: Policy, program: str, start: Callable[[int], Start]) -> None:
        self._make = start
        self._orders: list[Order] = []
        self._host = ""
        self._coordinator = Coordinator(policy, program, self)

    # ---- as the supervisor's group

    def fileno(self) -> int:
        return -1

    def next_time(self) -> float | None:
        return 0.0 if self._orders else None

    def serve(self, now_s: float) -> Sequence[Order]:
        if not self._host:
            start = self._make(0)
            self._host = start.hosts[0]
            self._coordinator.begin(0, (self._host,))
            return [start]
        orders, self._orders = self._orders, []
        return orders

    def rank_ended(self, record: ExitRecord) -> None:
        self._coordinator.rank_ended(self._host, record)

    def stopping(self, number: int, forced: bool) -> None:
        self._coordinator.stopping(self._host, number, forced)

    def quiet(self, still: bool) -> None:
        self._coordinator.quiet(self._host, still)

    def stacked(self, progress: tuple[RankProgress, ...]) -> None:
        self._coordinator.stacked(self._host, progress)

    def waited(self, shares: dict[int, float]) -> None:
        self._coordinator.waited(self._host, shares)

    def attempt_over(self, report: HostReport) -> None:
        self._coordinator.attempt_over(report)

    def failed(self, error: LauncherError) -> None:
        return  # there is nobody to tell

    def close(self) -> None:
        return

    def trouble(self, reason: str) -> None:
        self._coordinator.trouble(self._host, reason)

    def relay(self, host: str, message: dict[str, Any]) -> bool:
        return False

    # ---- as the coordinator's hosts

    def stop(self, number: int, failure: bool, line: str) -> None:
        self._orders.append(Stop(number, failure, line))

    def sweep(self, line: str) -> None:
        self._orders.append(Sweep(line))

    def say(self, line: str) -> None:
        self._orders.append(Say(line))

    def stacks(self) -> None:
        self._orders.append(Stacks())

    def restart(self, attempt: int, hosts: tuple[str, ...], line: str) -> None:
        from launcher.record import replace

        self._orders.append(replace(self._make(attempt), line=line))
        self._coordinator.begin(attempt, hosts)

    def finish(self, verdict: Verdict) -> None:
        self._orders.append(Finish(verdict))
