"""The rounds: each contender in turn, all others stopped."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Set
from processes import Contender, RankFailed, Ranks

LEAD_STEPS, LEAD = (
    12,
    0.1,
)  # steps before the clock, at least, and as a share of the window: what was made ahead is gone
FIRST_STEPS = 4  # of the first window, to see how long one takes
WORLDS = {"1c": 1, "2r": 2}  # one rank pinned to a core; two ranks, each pinned to a core of its own
UNCOUNTED = 1  # rounds after the first short look and before what counts: page tables are filled, epochs begun


def free_port() -> int:
    """A TCP port that nobody listens at just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found: int = probe.getsockname()[1]
        return found


_BEGAN = time.monotonic()


def say(text: str) -> None:
    """A line of progress, with the seconds since the start."""
    print(f"  {time.monotonic() - _BEGAN:4.0f} s: {text}", file=sys.stderr, flush=True)


class Field:
    """Contenders with their ranks running and stopped; a context manager.

    Args:
        failures: gets a line for each contender that could not start or was lost, and when.
    """

    def __init__(
        self,
        contenders: Sequence[Contender],
        cores: Sequence[int],
        scratch: Path,
        failures: list[str],
        versions: dict[str, str],
    ) -> None:
        self._failures = failures
        self._ranks: dict[str, Ranks] = {}
        self.contenders: list[Contender] = []
        started = []
        for number, contender in enumerate(contenders):
            settled = replace(contender, environ={**contender.environ, "MASTER_PORT": str(free_port())})
            started.append((contender, Ranks(settled, cores, scratch / f"{time.monotonic_ns()}.{number}")))
        for contender, ranks in started:
            self._ranks[contender.label] = ranks
            try:
                ranks.ready()
            except RankFailed as error:
                self.lost(contender, f"not started: {error}")
                continue
            self.contenders.append(contender)
            versions.setdefault(contender.peer, ranks.version)

    def lost(self, contender: Contender, why: str) -> None:
        """Reports and ends a contender."""
        self._failures.append(f"{contender.label}: {why}")
        say(self._failures[-1])
        self._ranks.pop(contender.label).close()

    def order(self, contender: Contender, world: int, order: Mapping[str, Any]) -> list[Any] | None:
        """An order to a contender that is still there; None when it is not, or is lost by it."""
        ranks = self._ranks.get(contender.label)
        if ranks is None:
            return None
        try:
            return ranks.order(world, order)
        except RankFailed as error:
            self.lost(contender, f"{order.get('task', order['do'])}: {error}")
            return None

    def __enter__(self) -> Field:
        return self

    def __exit__(self, *_: object) -> None:
        for ranks in self._ranks.values():
            ranks.close()


def prepare(contenders: Sequence[Contender], which: Set, data: Path, absent: dict[str, str]) -> list[Contender]:
    """Makes each contender's own format of a set, once for each kind; those that could."""
    able: list[Contender] = []
    outcome: dict[str, str] = {}
    for contender in contenders:
        if contender.adapter not in outcome:
            given = {"adapter": contender.adapter, "options": dict(contender.options)}
            given |= {"set": which.facts(), "data": str(data)}
            program = Path(__file__).with_name("worker.py")
            command = [contender.python, str(program), "prepare", json.dumps(given)]
            environ = {name: os.environ[name] for name in ("PATH", "LANG", "HOME") if name in os.environ}
            said = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
            lines = said.stderr.strip().splitlines()
            outcome[contender.adapter] = "" if said.returncode == 0 else lines[-1] if lines else "ended early"
        if why := outcome[contender.adapter]:
            absent[contender.label] = f"its data could not be made: {why}"
        else:
            able.append(contender)
    return able


def add(
    samples: list[dict[str, Any]], table: str, number: int, contender: Contender, value: float, label: str = ""
) -> None:
    """Notes a number, by another label than the contender's where one is given."""
    sample = {"table": table, "round": number, "label": label or contender.label, "peer": contender.peer}
    samples.append(sample | {"value": value})


def _opened(field: Field, contender: Contender, world: int, order: Mapping[str, Any]) -> bool:
    """Opens a loader on all ranks; False when it failed, or when two ranks have a record in common."""
    answers = field.order(contender, world, {"do": "open", **order})
    if answers is None:
        return False
    labels = [label for answer in answers for label in answer["labels"]]
    if order["shuffled"] and len(set(labels)) != len(labels):
        field.lost(contender, "two ranks got the same record")
        return False
    return True


def throughput(
    field: Field,
    which: Set,
    data: Path,
    arrangement: str,
    shuffled: bool,
    rounds: int,
    seconds: float,
    samples: list[dict[str, Any]],
    each: Callable[[Contender], None] | None = None,
) -> None:
    """Records a second of all contenders, round after round; each round begins with another one.

    ``samples`` gets one a contender and round. ``each`` is called once for each contender while its loader is open.
    """
    world = WORLDS[arrangement]
    order = {"set": which.facts(), "data": str(data), "shuffled": shuffled}
    able = [contender for contender in field.contenders if _opened(field, contender, world, order)]
    steps = dict.fromkeys((contender.label for contender in able), FIRST_STEPS)
    for number in range(-1 - UNCOUNTED, rounds):
        turn = number % max(len(able), 1)
        for contender in (*able[turn:], *able[:turn]):
            count = steps[contender.label]
            lead = max(LEAD_STEPS, int(LEAD * count))
            answers = field.order(contender, world, {"do": "window", "lead": lead, "count": count})
            if answers is None:
                continue
            spent = max(answer["seconds"] for answer in answers)
            steps[contender.label] = max(FIRST_STEPS, int(count * seconds / spent))
            if number < 0:
                continue
            rate = sum(answer["records"] / answer["seconds"] for answer in answers)
            add(samples, f"{which.name}, {arrangement}", number, contender, round(rate))
    for contender in able:
        if each is not None:
            each(contender)
        field.order(contender, world, {"do": "close"})
    say(f"{which.name}, {arrangement}: {rounds} rounds")
