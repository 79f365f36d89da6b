"""The matrix: each contender in turn at each size, round after round, with the cores' ping-pong around each."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from processes import Contender, RankFailed, Ranks
from rivals import LIMIT

FAR_NS = 100.0  # one-way; a flag between cores that share a cache takes 20 to 75 ns, else 125 to 280
LARGE = 16 << 20  # from here on a call takes milliseconds: fewer of them


def state(pings: Sequence[float]) -> str:
    """``near``, ``far``, or ``mixed`` when it changed in between."""
    far = [ping >= FAR_NS for ping in pings]
    return "far" if all(far) else "mixed" if any(far) else "near"


class Field:
    """All contenders with their ranks running and stopped; a context manager.

    Args:
        failures: gets a line for each contender that could not start or was lost, and when.
    """

    def __init__(
        self,
        contenders: Sequence[Contender],
        size: int,
        cores: Sequence[int],
        scratch: Path,
        support: Path,
        failures: list[str],
        versions: dict[str, str],
        enter: Mapping[str, Sequence[Sequence[str]]] | None = None,
    ) -> None:
        self.failures = failures
        self.size = size
        self._ranks: dict[str, Ranks] = {}
        self.contenders: list[Contender] = []
        for number, contender in enumerate(contenders):
            try:
                before = (enter or {}).get(contender.label, ())
                ranks = Ranks(contender, size, cores, scratch / f"{size}.{number}", support, before)
            except RankFailed as error:
                self._lost(contender.label, f"not started with {size} ranks: {error}")
                continue
            self._ranks[contender.label] = ranks
            self.contenders.append(contender)
            versions[contender.label] = ranks.version

    def _lost(self, label: str, why: str) -> None:
        self.failures.append(f"{label}: {why}")
        print(f"  {self.failures[-1]}", file=sys.stderr, flush=True)

    def ping(self) -> float:
        """One-way time between the first two cores, ns; by the ranks of the memory's limit."""
        found: float = max(value for value in self._ranks[LIMIT].order({"do": "ping"}) if value is not None)
        return round(found, 1)

    def order(self, contender: Contender, order: Mapping[str, Any], limit_s: float = 60.0) -> list[Any] | None:
        """An order to a contender that is still there; None when it is not, or is lost by it."""
        ranks = self._ranks.get(contender.label)
        if ranks is None:
            return None
        try:
            return ranks.order(order, limit_s)
        except (RankFailed, OSError) as error:
            self._lost(contender.label, f"{order}: {error}")
            del self._ranks[contender.label]
            ranks.close()
            return None

    def __enter__(self) -> Field:
        return self

    def __exit__(self, *_: object) -> None:
        for ranks in self._ranks.values():
            ranks.close()


def measure(
    field: Field,
    phase: str,
    sizes: Sequence[int],
    dtypes: Sequence[str],
    modes: Sequence[str],
    rounds: int,
    seconds: float,
    samples: list[dict[str, Any]],
    rest_ns: Callable[[int], int] = lambda nbytes: 0,
) -> None:
    """Measures all cells; each round begins with another contender.

    ``samples`` gets one a contender, cell and round: the larger of the ranks' medians, in us. ``rest_ns``: how long
    nothing is sent before a call with a message of so many bytes.
    """
    for number in range(rounds):
        began = time.monotonic()
        for dtype in dtypes:
            able = [contender for contender in field.contenders if dtype in contender.dtypes]
            turn = number % max(len(able), 1)
            for size in sizes:
                least = 4 if size >= LARGE else 10
                order = {"do": "cell", "bytes": size, "dtype": dtype, "modes": list(modes)}
                order |= {"seconds": seconds, "least": least, "most": 5000, "rest_ns": rest_ns(size)}
                before = field.ping()
                for contender in (*able[turn:], *able[:turn]):
                    answers = field.order(contender, order)
                    after = field.ping()
                    for mode in modes if answers else ():
                        assert answers is not None
                        found = max((answer[mode] for answer in answers), key=lambda one: one["median_us"])
                        sample = {"phase": phase, "round": number, "dtype": dtype, "bytes": size, "mode": mode}
                        sample |= {"label": contender.label, "peer": contender.peer, "ping_ns": [before, after]}
                        samples.append(sample | {"state": state((before, after))} | found)
                    before = after
        spent = time.monotonic() - began
        print(f"  {phase}: round {number + 1} of {rounds}, {spent:.0f} s", file=sys.stderr, flush=True)
