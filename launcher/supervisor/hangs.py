"""A hang in words: who waits, in which collective, and for whom. Pure."""

from __future__ import annotations

from collections import Counter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.evidence import RankProgress

_SHOWN_RUNS = 16
_NAME_CHARACTERS = 31  # what a status page holds; another host may send more


def hang_text(ranks: Sequence[RankProgress], timeout_s: float) -> tuple[str, int | None]:
    """What a hang of ``ranks`` (in order, one at least) looks like, and the rank to blame, if one can be told."""
    suspect, found = _blame(ranks)
    if not found and len({rank.step for rank in ranks}) > 1:
        slowest = min(ranks, key=lambda rank: rank.step)
        suspect, found = slowest, f"{_place(slowest)} is behind, at step {slowest.step}"
    elif not found and not any(rank.step or rank.last for rank in ranks):
        found = "no rank has reported a step yet"
    text = f"hang: no log, no step and no I/O in any rank for {timeout_s:g} s"
    text = "; ".join(part for part in (text, found, "the stacks of all ranks are on their stderr") if part)
    return text, suspect.rank if suspect is not None else None


def number_runs(numbers: Sequence[int]) -> str:
    """Numbers in order, runs of them in short: ``0-2, 5, 7-9``; the first ones of many."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in runs[:_SHOWN_RUNS]]
    return ", ".join(shown) + (", ..." if len(runs) > _SHOWN_RUNS else "")


def _blame(ranks: Sequence[RankProgress]) -> tuple[RankProgress | None, str]:
    """The rank that the others wait for in a collective, and what is known of both; (None, "") if none do."""
    inside = [rank for rank in ranks if rank.inside is not None]
    if not inside:
        return None, ""
    by_rank = {rank.rank: rank for rank in ranks}
    waits_for = {rank.rank: rank.waiting_for for rank in inside if rank.waiting_for in by_rank}
    ends = _ends(waits_for)
    counts = Counter(end for end in ends.values() if end is not None)
    if counts:
        suspect = by_rank[min(counts, key=lambda number: (-counts[number], number))]
        waiting = [rank for rank in inside if ends.get(rank.rank) == suspect.rank]
        if suspect.inside is None:
            return suspect, _never_entered([suspect], waiting)
        return suspect, f"{_place(suspect)} is stuck in {_collective(suspect)}{_doing(suspect)}; {_wait_text(waiting)}"
    if waits_for:
        circle = [by_rank[number] for number in _circle(waits_for)]
        return None, "; ".join(
            f"{_place(rank)} is in {_collective(rank)} and waits for rank {rank.waiting_for}" for rank in circle[:4]
        )
    furthest = max(rank.last for rank in inside)
    waiting = [rank for rank in inside if rank.last == furthest]
    outside = [rank for rank in ranks if rank.inside is None]
    if outside:
        return outside[0], _never_entered(outside, waiting)
    first = min(inside, key=lambda rank: rank.last)
    if first.last == furthest:
        return None, _wait_text(inside)
    return first, f"{_place(first)} is still in {_collective(first)}{_doing(first)}; {_wait_text(waiting)}"


def _ends(waits_for: dict[int, int]) -> dict[int, int | None]:
    """Rank -> the one where its chain of waiting ends; None where that goes in a circle."""
    ends: dict[int, int | None] = {}
    for start in waits_for:
        path: dict[int, None] = {}
        at = start
        while at in waits_for and at not in ends and at not in path:
            path[at] = None
            at = waits_for[at]
        ends.update(dict.fromkeys(path, None if at in path else ends.get(at, at)))
    return ends


def _circle(waits_for: dict[int, int]) -> list[int]:
    """The ranks of a circle, where every chain goes in one."""
    at = next(iter(waits_for))
    path: list[int] = []
    seen: set[int] = set()
    while at not in seen:
        seen.add(at)
        path.append(at)
        at = waits_for[at]
    return path[path.index(at) :]


def _never_entered(missing: Sequence[RankProgress], waiting: Sequence[RankProgress]) -> str:
    first = missing[0]
    who = _place(first) if len(missing) == 1 else f"rank {number_runs([rank.rank for rank in missing])}"
    last = f" (last: {_collective(first)})" if len(missing) == 1 and first.last else ""
    return f"{who} never entered {_collective(waiting[0])}{last}; {_wait_text(waiting)}"


def _wait_text(waiting: Sequence[RankProgress]) -> str:
    one = waiting[0]
    who = f"rank {one.rank} waits" if len(waiting) == 1 else f"ranks {number_runs([r.rank for r in waiting])} wait"
    size = f" of {_size(one.bytes)}" if one.bytes else ""
    since_s = max(rank.inside_s for rank in waiting)
    return f"{who} in {_collective(one)}{size}" + (f" since {since_s:.0f} s" if since_s >= 1 else "")


def _place(rank: RankProgress) -> str:
    return f"rank {rank.rank}" + (f" on {rank.host}" if rank.host else "")


def _collective(rank: RankProgress) -> str:
    return f"{rank.operation[:_NAME_CHARACTERS] or 'collective'} #{rank.last or rank.inside}"


def _doing(rank: RankProgress) -> str:
    return f" ({rank.doing[:_NAME_CHARACTERS]})" if rank.doing else ""


def _size(count: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.4g} {name}"
    return f"{count} B"
