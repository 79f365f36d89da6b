"""Decides for all hosts of a job: when everybody stops, what the verdict is, whether there is another attempt.

Pure logic: inputs are method calls that name a host, outputs are calls of :class:`Hosts`. A job on one host is the
same with one host.
"""

from __future__ import annotations

from launcher.record import Record, replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from launcher.evidence import ClockOffset, ExitRecord, HostReport, LostHost, RankProgress, Verdict
    from launcher.supervisor.stragglers import Stragglers

    class Hosts(Protocol):
        """What the coordinator asks of all hosts alike; a line of :meth:`say` is shown once. ``line``: "" for none."""

        def stop(self, number: int, failure: bool, line: str) -> None: ...

        def sweep(self, line: str) -> None: ...

        def say(self, line: str) -> None: ...

        def stacks(self) -> None: ...

        def restart(self, attempt: int, hosts: tuple[str, ...], line: str) -> None: ...

        def finish(self, verdict: Verdict) -> None: ...


_CRASH_LOOP_COUNT = 3
_SIGTERM = 15


class Policy(Record):
    """What is settled for the whole job. Times are seconds.

    Attributes:
        straggler_window_s: how often to look for a rank that the others wait for; 0: never.
        crash_loop_s: three failures alike, each without a step and sooner than this, end the restarts.
        early_exit: what to do about a rank that left in the middle of its script: wait, abort or ok.
        min_hosts: go on with as few when others are lost; 0: all are needed.
    """

    max_restarts: int
    crash_loop_s: float
    early_exit: str
    hang_timeout_s: float
    min_hosts: int = 0
    straggler_window_s: float = 0.0


class Coordinator:
    """One attempt after the other, from :meth:`begin` to ``finish``."""

    def __init__(self, policy: Policy, program: str, hosts: Hosts) -> None:
        self.policy = policy
        self.program = program
        self.attempt = -1
        self.clocks: dict[str, ClockOffset] = {}  # of hosts whose clock is not the coordinator's own
        self.cut_links: tuple[tuple[str, str], ...] = ()
        self._all = hosts
        self._history: list[tuple[int, float]] = []
        self._stop_signal = 0
        self._finished = False
        self._restarts = 0
        self._forced = False

    def begin(self, attempt: int, hosts: tuple[str, ...]) -> None:
        """The ranks of ``attempt`` are being started on ``hosts``."""
        self.attempt = attempt
        self.hosts = hosts
        self.reports: dict[str, HostReport] = {}
        self.lost: dict[str, LostHost] = {}
        self._left: dict[str, LostHost] = {}  # after their report
        self._at_work = set(hosts)  # neither reported nor lost
        self.ended: dict[int, ExitRecord] = {}
        self.cut_links = ()
        self._stopping = False
        self._quiet: set[str] = set()
        self._progress: dict[str, tuple[RankProgress, ...]] | None = None
        self._hang = ""
        self._hang_rank: int | None = None
        self._shares: dict[str, dict[int, float]] = {}
        self._stragglers: Stragglers | None = None

    # ---- inputs

    def rank_ended(self, host: str, record: ExitRecord) -> None:
        """The first failure stops all. Local ranks have been stopped by their own supervisor already."""
        self.ended[record.rank] = record
        if record.failed:
            self._stop(_SIGTERM, f"rank {record.rank} on {host} failed: stopping all ranks" if self._several else "")
        elif record.left_early and self._several and self.policy.early_exit == "abort":
            self._stop(_SIGTERM, f"rank {record.rank} on {host} ended early with 0: stopping all ranks")

    def stopping(self, host: str, number: int, forced: bool) -> None:
        """A host was asked to stop: so are all."""
        if self._finished:
            return
        if forced:
            if not self._forced:
                self._forced = True
                self._all.sweep(f"second signal on {host}: killing all ranks now")
            return
        self._stop_signal = self._stop_signal or number
        self._stop(number, f"signal {number} on {host}: stopping all ranks", failure=False)

    def quiet(self, host: str, still: bool) -> None:
        """When all hosts are quiet, the job hangs: one host that works is reason enough for the others to wait."""
        (self._quiet.add if still else self._quiet.discard)(host)
        self._suspect_hang()

    def stacked(self, host: str, progress: tuple[RankProgress, ...]) -> None:
        """A host's ranks have written their stacks."""
        if self._progress is not None:
            self._progress[host] = tuple(replace(rank, host=host) for rank in progress)
            self._conclude_hang()

    def waited(self, host: str, shares: dict[int, float]) -> None:
        """The share of its last window that each rank of a host waited for others. Judged when all hosts have told."""
        self._shares[host] = shares
        if self._finished or self._stopping or not self._at_work <= self._shares.keys():
            return
        if self._stragglers is None:
            from launcher.supervisor.stragglers import Stragglers

            self._stragglers = Stragglers(self.policy.straggler_window_s)
        told, self._shares = self._shares, {}
        hosts = {rank: name for name, ranks in told.items() for rank in ranks}
        line = self._stragglers.take({rank: share for ranks in told.values() for rank, share in ranks.items()}, hosts)
        if line:
            self._all.say(line)

    def trouble(self, host: str, reason: str) -> None:
        """A host stops its ranks for a reason that is no rank's: so do all. Its report tells more."""
        self._stop(_SIGTERM, f"{host}: {reason}: stopping all ranks" if self._several else "")

    def attempt_over(self, report: HostReport) -> None:
        """Nothing of the attempt is left on a host."""
        if report.attempt != self.attempt or self._finished:
            return
        self.reports[report.host] = report
        self._at_work.discard(report.host)
        if report.evidence.launcher_error:
            self._stop(_SIGTERM, f"{report.host}: {report.evidence.launcher_error}: stopping all ranks")
        self._suspect_hang()  # it may have been the last one at work
        self._conclude_hang()
        self._conclude()

    def host_lost(self, lost: LostHost) -> None:
        """A host is not there any more."""
        if self._finished or lost.host in self.lost or lost.host not in self.hosts:
            return
        if lost.host in self.reports:
            self._left[lost.host] = lost  # its part was over, and told; but for another attempt it is missing
            return
        self.lost[lost.host] = lost
        self._at_work.discard(lost.host)
        self._stop(_SIGTERM, f"{lost.host} {lost.how}: stopping all ranks")
        self._conclude_hang()
        self._conclude()

    # ---- decisions

    @property
    def _several(self) -> bool:
        return len(self.hosts) > 1

    def _stop(self, number: int, line: str, failure: bool = True) -> None:
        if not self._stopping and not self._finished:
            self._stopping = True
            self._all.stop(number, failure, line)

    def _suspect_hang(self) -> None:
        """When no host that is left is at work, all are asked where their ranks stand."""
        if self._progress is None and not self._stopping and self._at_work and self._quiet >= self._at_work:
            self._progress = {}
            self._all.stacks()

    def _conclude_hang(self) -> None:
        if self._progress is None or self._hang or any(name not in self._progress for name in self._at_work):
            return
        ranks = sorted((rank for host in self._progress.values() for rank in host), key=lambda rank: rank.rank)
        if ranks:
            from launcher.supervisor.hangs import hang_text

            self._hang, self._hang_rank = hang_text(ranks, self.policy.hang_timeout_s)
            self._stop(_SIGTERM, self._hang if self._several else "")

    def _conclude(self) -> None:
        if self._at_work:
            return
        verdict = self._judge()
        self.lost.update(self._left)
        line = self._restart_line(verdict)
        if line is None:
            self._finished = True
            self._all.finish(self._crash_loop(verdict))
            return
        left = tuple(name for name in self.hosts if name not in self.lost)
        self._all.restart(self.attempt + 1, left, line)

    def _judge(self) -> Verdict:
        from launcher.evidence import on_one_clock, together
        from launcher.supervisor.stragglers import over_the_attempt
        from launcher.verdict import judge

        reports = list(self.reports.values())
        offsets = {name: clock.offset_ns for name, clock in self.clocks.items()}
        records = [
            on_one_clock(record, offsets[report.host]) if report.host in offsets else record
            for report in reports
            for record in report.records
        ]
        if not reports:
            raise AssertionError("an attempt cannot end without the report of the coordinator's own host")
        known = together(reports)
        evidence = replace(
            known,
            # A host that was done already when it was told has it in no report.
            stop_signal=known.stop_signal or self._stop_signal,
            forced=known.forced or self._forced,
            hang=self._hang,
            hang_rank=self._hang_rank,
            lost_hosts=tuple(self.lost.values()),
            clocks=tuple(self.clocks.values()),
            cut_links=self.cut_links,
            straggler=over_the_attempt(
                [(record.rank, record.host, record.waited_ns) for record in records if record.sequence],
                max(report.lasted_s for report in reports),
                self.policy.straggler_window_s,
            ),
        )
        by_host = {report.host: report.evidence for report in reports} if self._several else None
        return replace(judge(records, evidence, self.program, by_host), attempt=self.attempt)

    # ---- restarts

    def _restart_line(self, verdict: Verdict) -> str | None:
        """The line that announces a restart; None when there is to be none."""
        if verdict.ok or self._stop_signal or any(report.stuck for report in self.reports.values()):
            return None
        failed = f"attempt {self.attempt} failed: {verdict.headline}\n"
        if self.lost:
            # Fewer hosts are another job size, not another try: the count of restarts stays as it is.
            left = len(self.hosts) - len(self.lost)
            # With less than half, the others may have met again without this host.
            if not 0 < self.policy.min_hosts <= left or 2 * left < len(self.hosts):
                return None
            return f"{failed}restarting the group with the {left} hosts that are left"
        if verdict.kind == "launcher":
            return None
        steps = max((record.steps for record in verdict.records), default=0)
        lasted_s = max((report.lasted_s for report in self.reports.values()), default=0.0)
        alike = lasted_s < self.policy.crash_loop_s and steps == 0
        self._history = [entry for entry in self._history if entry[0] == verdict.exit_code] if alike else []
        if alike:
            self._history.append((verdict.exit_code, lasted_s))
        if self._restarts >= self.policy.max_restarts:
            self._history.clear()  # not ended by the rule
            return None
        if len(self._history) >= _CRASH_LOOP_COUNT:
            return None
        self._restarts += 1
        return f"{failed}restarting the group ({self._restarts} of {self.policy.max_restarts})"

    def _crash_loop(self, verdict: Verdict) -> Verdict:
        """``verdict``, said to be a crash loop when that is why the restarts ended."""
        if len(self._history) < _CRASH_LOOP_COUNT:
            return verdict
        spent_s = sum(lasted_s for _, lasted_s in self._history)
        line = f"crash loop: code {verdict.exit_code} x{len(self._history)} in {spent_s:.0f} s; {verdict.headline}"
        return replace(verdict, headline=line, text=verdict.text.replace(verdict.headline, line, 1))
