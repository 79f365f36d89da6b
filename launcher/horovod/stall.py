"""Says which collective waits for which rank, when one waits long.

A rank that has nothing to do takes part in nothing, so those that wait cannot ask it. Ranks that wait leave word in the
job's run directory instead: who has not is who is waited for.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from launcher.horovod.channel import Channel

_LONGEST_PAUSE_S = 15.0


class StallInspector:
    """A thread that looks a few times in ``check_s`` whether something waits for longer than that.

    Args:
        channels: the process sets of this rank.
        rank, local: this rank, and all that share its host and so its run directory.
        directory: the run directory; "" for none: then only ranks that ask for other things are known.
        check_s: seconds until a line is printed, and between lines on the same request.
    """

    def __init__(
        self, channels: Callable[[], Iterable[Channel]], rank: int, local: Sequence[int], directory: str, check_s: float
    ) -> None:
        self._channels, self._rank, self._local, self._check_s = channels, rank, frozenset(local), check_s
        self._files = os.path.join(directory, "horovod-waits-") if directory else ""
        self._written = False
        self._said_s: dict[tuple[str, int], float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="launcher-horovod-stall", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._thread.join(1.0)
        self._leave_word({})

    def _watch(self) -> None:
        pause_s = min(self._check_s / 4, _LONGEST_PAUSE_S)
        while not self._stop.wait(pause_s):
            self._look()

    def _look(self) -> None:
        now_ns = time.monotonic_ns()
        waits: dict[str, dict[str, float]] = {}
        late = []
        for channel in self._channels():
            for request in channel.waiting():
                age_s = (now_ns - request.since_ns) / 1e9
                if age_s > self._check_s / 2:
                    waits.setdefault(channel.label, {})[f"{request.kind} {request.name}"] = age_s
                if age_s > self._check_s:
                    late.append((channel, request, age_s))
        self._leave_word(waits)
        others = self._words() if late else {}
        for channel, request, age_s in late:
            key = (channel.label, request.key)
            if now_ns / 1e9 - self._said_s.get(key, -1e9) < self._check_s:
                continue
            what = f"{request.kind} {request.name}"
            asked = {rank for rank, words in others.items() if what in words.get(channel.label, {})} | {self._rank}
            lacking = channel.lacking.get(request.key)
            unknown = lacking is None and not set(channel.ranks) <= self._local
            if lacking is None:
                lacking = sorted(self._local & set(channel.ranks) - asked)
            if min(asked) == self._rank:
                self._said_s[key] = now_ns / 1e9
                line = f"horovod: {what!r} has waited for {age_s:.0f} s. Asked for by {_ranks(sorted(asked))}"
                line += f", not by {_ranks(lacking)}." if lacking else "."
                line += " Of ranks on other hosts nothing is known here." if unknown else ""
                print(f"[launcher] {line} All ranks must ask for the same names.", file=sys.stderr, flush=True)

    def _leave_word(self, waits: dict[str, dict[str, float]]) -> None:
        if not self._files or not (waits or self._written):
            return
        path = f"{self._files}{self._rank}"
        try:
            if waits:
                with open(f"{path}.part", "w", encoding="utf-8") as file:
                    json.dump(waits, file)
                os.replace(f"{path}.part", path)
            else:
                os.unlink(path)
            self._written = bool(waits)
        except OSError as error:
            self._files = ""
            print(f"[launcher] horovod: stalls of single ranks cannot be told: {error}", file=sys.stderr)

    def _words(self) -> dict[int, dict[str, dict[str, float]]]:
        found = {}
        for rank in self._local if self._files else ():
            try:
                with open(f"{self._files}{rank}", encoding="utf-8") as file:
                    found[rank] = json.load(file)
            except (OSError, ValueError):
                continue  # it waits for nothing
        return found


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def check_seconds() -> float:
    """HOROVOD_STALL_CHECK_TIME_SECONDS, 60 by default; 0 with HOROVOD_STALL_CHECK_DISABLE."""
    if os.environ.get("HOROVOD_STALL_CHECK_DISABLE", "0") not in ("", "0"):
        return 0.0
    return seconds("HOROVOD_STALL_CHECK_TIME_SECONDS", 60.0)


def seconds(name: str, default: float) -> float:
    """A variable that holds seconds.

    Raises:
        ValueError: it holds something else.
    """
    text = os.environ.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        raise ValueError(f"environment variable {name} is {text!r}; expected a number of seconds") from None
    return max(value, 0.0)
