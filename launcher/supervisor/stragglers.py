"""Stragglers: a rank that is always last costs all others their time, and waits least itself. Pure.

Each rank's status page counts the time that it has waited for others in collectives. Everybody waits a little, for
the wires say; what the others wait more than the rank that waits least, they wait for that one.
"""

from __future__ import annotations

from launcher.supervisor.hangs import number_runs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Of the time; less than this is the usual difference between ranks and hosts.
_LEAST_SHARE = 0.2
# Ranks that wait less than this part of what the others do are slow alike.
_ALIKE = 0.25
# With more than this part of the ranks slow, it is the way the work is divided, and no rank's fault.
_MOST_SLOW = 0.25


def slowest(shares: Mapping[int, float]) -> tuple[tuple[int, ...], float]:
    """The rank (or few ranks) that the others waited for, and the share of the time that this cost them.

    Args:
        shares: rank -> time that it waited for others, as a share (0 to 1) of the time looked at.

    Returns:
        ((), 0.0) when nobody stands out.
    """
    if len(shares) < 2:
        return (), 0.0
    order = sorted(shares, key=lambda rank: (shares[rank], rank))
    others = [shares[rank] for rank in order[1:]]
    middle = len(others) // 2
    median = others[middle] if len(others) % 2 else (others[middle - 1] + others[middle]) / 2
    lost = median - shares[order[0]]
    if lost < _LEAST_SHARE:
        return (), 0.0
    slow = tuple(sorted(rank for rank in order if shares[rank] - shares[order[0]] <= _ALIKE * lost))
    return (slow, lost) if len(slow) <= max(1, int(_MOST_SLOW * len(order))) else ((), 0.0)


def straggler_text(
    shares: Mapping[int, float], hosts: Mapping[int, str], span: str, over: bool = False
) -> tuple[str, tuple[int, ...]]:
    """The line on a straggler and its rank, ("", ()) for none.

    Args:
        span: the time looked at, in words.
        over: the job has ended.
    """
    slow, lost = slowest(shares)
    if not slow:
        return "", ()
    if len(slow) == 1:
        host = hosts.get(slow[0], "")
        place = f" on {host}" if host else ""
        who, them = f"rank {slow[0]}{place} {'was' if over else 'is'} the straggler", "it"
    else:
        who, them = f"ranks {number_runs(slow)} {'were' if over else 'are'} the stragglers", "them"
    return f"{who}: others waited {100 * min(lost, 1.0):.0f} % of {span} for {them}", slow


class Stragglers:
    """What to say of a job's stragglers: when there is a new one, and then at growing intervals while it stays."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._slow: tuple[int, ...] = ()
        self._windows = self._next = 0

    def take(self, shares: Mapping[int, float], hosts: Mapping[int, str]) -> str:
        """Takes one window of all ranks; returns the line to say, "" for nothing."""
        text, slow = straggler_text(shares, hosts, f"the last {self._window_s:g} s")
        if slow != self._slow:
            self._slow, self._windows, self._next = slow, 0, 1
        self._windows += 1
        if not slow or self._windows < self._next:
            return ""
        self._next = 2 * self._windows
        return text


class Waits:
    """One host's ranks: how long each has waited for others, window by window."""

    def __init__(self, window_s: float, now_s: float) -> None:
        self._window_s = window_s
        self._since_s = now_s
        self._before: dict[int, int] = {}
        self._now: dict[int, int] = {}

    def note(self, rank: int, waits_ns: int) -> None:
        """What the page of ``rank`` says; ranks that use none of our collectives are not noted."""
        self._now[rank] = waits_ns

    def window(self, now_s: float) -> dict[int, float] | None:
        """Rank -> share of the time that it waited, when a window is over; None until then, or with nothing to tell."""
        span_s = now_s - self._since_s
        if not self._window_s or span_s < self._window_s:
            return None
        # A wait is counted when it ends: one that is longer than the window began before it.
        shares = {
            rank: min(1.0, max(0, waits_ns - self._before.get(rank, 0)) / 1e9 / span_s)
            for rank, waits_ns in self._now.items()
        }
        self._before, self._now, self._since_s = self._now, {}, now_s
        return shares or None


def over_the_attempt(waited_ns: Sequence[tuple[int, str, int]], lasted_s: float, least_s: float) -> str:
    """The line for the final report, "" for none.

    Args:
        waited_ns: (rank, host, time it waited for others) of all ranks.
        least_s: of an attempt that was shorter nothing is said.
    """
    if not least_s or lasted_s < least_s:
        return ""
    shares = {rank: min(1.0, waited / 1e9 / lasted_s) for rank, _, waited in waited_ns}
    hosts = {rank: host for rank, host, _ in waited_ns}
    return straggler_text(shares, hosts, f"{lasted_s:.0f} s", over=True)[0]
