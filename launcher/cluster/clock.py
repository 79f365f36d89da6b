"""How another host's clock stands to ours. Pure: times in, estimate out.

A request that left at ``sent`` and whose answer, made at ``remote``, arrived at ``received`` bounds the offset: the
answer was made at some time in between, so the middle is wrong by half of the round trip at most. The shortest
round trip of the last samples is the best one, and since old samples leave, the estimate follows a clock that drifts.
"""

from __future__ import annotations

WINDOW = 16  # samples; at one a second, clocks that drift apart by 100 ppm move 1.6 ms in it
UNKNOWN_NS = 1 << 62


class ClockEstimate:
    """The offset between two clocks, which may have different origins; all times are ns."""

    def __init__(self) -> None:
        self._samples: list[tuple[int, int]] = []  # (round trip, offset), oldest first
        self._best = (2 * UNKNOWN_NS, 0)

    def add(self, sent_ns: int, remote_ns: int, received_ns: int) -> None:
        """One exchange: ``sent_ns`` and ``received_ns`` on our clock, ``remote_ns`` on the other host's in between.

        An answer that came before its question is no sample, and is left out.
        """
        if received_ns < sent_ns:
            return
        self._samples.append((received_ns - sent_ns, remote_ns - (sent_ns + received_ns) // 2))
        del self._samples[:-WINDOW]
        # Of equal round trips the newest: less drift.
        self._best = min(reversed(self._samples), key=lambda sample: sample[0])

    @property
    def offset_ns(self) -> int:
        """The other host's clock minus ours; 0 before the first sample."""
        return self._best[1]

    @property
    def uncertainty_ns(self) -> int:
        """By how much ``offset_ns`` may be wrong at most; ``UNKNOWN_NS`` before the first sample."""
        return (self._best[0] + 1) // 2
