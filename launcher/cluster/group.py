"""This host's place in the group: the leader's end or a member's, and the change when the leader is lost.

The hosts that are left may go on without their leader (``min_hosts``): the next host in the list leads then. A cut
network must not leave two groups at work on one job, each believing the other lost. So members go on only with more
than half of the hosts that were together, and the leader (see the coordinator) with no less than half.
"""

from __future__ import annotations

from launcher.cluster.leader import Leader
from launcher.cluster.member import Member
from launcher.record import replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from launcher.cluster.options import ClusterPlan
    from launcher.errors import LauncherError
    from launcher.evidence import ExitRecord, HostReport, RankProgress
    from launcher.supervisor.group import Order


class Cluster:
    """The group as any host's supervisor sees it."""

    def __init__(self, plan: ClusterPlan, reserve: Callable[[], int], say: Callable[[str], None]) -> None:
        """``reserve`` gives a MASTER_PORT that is free on this host, should it lead.

        Raises:
            ClusterError: no port to listen on.
        """
        self._reserve, self._say = reserve, say
        self._end = self._take_place(plan, 0)

    def fileno(self) -> int:
        return self._end.fileno()

    def next_time(self) -> float | None:
        return self._end.next_time()

    def serve(self, now_s: float) -> Sequence[Order]:
        orders = self._end.serve(now_s)
        if isinstance(self._end, Member) and self._end.orphaned:
            self._succeed(self._end)
            orders = [*orders, *self._end.serve(now_s)]
        return orders

    def rank_ended(self, record: ExitRecord) -> None:
        self._end.rank_ended(record)

    def stopping(self, number: int, forced: bool) -> None:
        self._end.stopping(number, forced)

    def quiet(self, still: bool) -> None:
        self._end.quiet(still)

    def stacked(self, progress: tuple[RankProgress, ...]) -> None:
        self._end.stacked(progress)

    def waited(self, shares: dict[int, float]) -> None:
        self._end.waited(shares)

    def attempt_over(self, report: HostReport) -> None:
        self._end.attempt_over(report)

    def trouble(self, reason: str) -> None:
        self._end.trouble(reason)

    def relay(self, host: str, message: dict[str, Any]) -> bool:
        return self._end.relay(host, message)

    def failed(self, error: LauncherError) -> None:
        self._end.failed(error)

    def close(self) -> None:
        self._end.close()

    def _take_place(self, plan: ClusterPlan, attempt: int) -> Leader | Member:
        if plan.host == plan.hosts[0]:
            return Leader(plan, self._reserve(), self._say, attempt)
        return Member(plan, self._say, attempt)

    def _succeed(self, member: Member) -> None:
        left, why = member.left, member.loss
        self._say(f"{why}; going on with {len(left)} hosts: {left[0]} leads")
        plan = replace(
            member.plan,
            hosts=left,
            enough=member.enough,
            join_timeout_s=member.plan.meet_again_s,
            because=why,
        )
        member.close()
        self._end = self._take_place(plan, member.attempt + 1)
