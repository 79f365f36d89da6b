"""What the server counts, as Prometheus reads it (text exposition format 0.0.4)."""

from __future__ import annotations

import bisect

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from launcher.serving.pool import Pool

# Upper bounds in seconds: from an answer out of memory to the platform's own limit.
BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

_OF_POOLS = (
    ("launcher_workers_ready", "gauge", "Workers that have loaded the model.", "ready"),
    ("launcher_requests_waiting", "gauge", "Requests that wait for a worker.", "waiting"),
    ("launcher_requests_in_hand", "gauge", "Requests that workers have.", "in_hand"),
    ("launcher_worker_deaths_total", "counter", "Workers that died.", "deaths"),
)


class Metrics:
    """Counts of one server."""

    def __init__(self) -> None:
        self._requests: dict[tuple[str, int], int] = {}
        self._seconds: dict[str, list[float]] = {}  # a count for each bucket and beyond, then the sum
        self._in_bytes = 0
        self._out_bytes = 0

    def answered(self, model: str, status: int, seconds: float | None, in_bytes: int, out_bytes: int) -> None:
        """An invocation has been answered; ``seconds``: None for one whose time is the client's."""
        key = (model, status)
        self._requests[key] = self._requests.get(key, 0) + 1
        self._in_bytes += in_bytes
        self._out_bytes += out_bytes
        if seconds is None:
            return
        counts = self._seconds.get(model)
        if counts is None:
            counts = self._seconds[model] = [0.0] * (len(BUCKETS_S) + 2)
        counts[bisect.bisect_left(BUCKETS_S, seconds)] += 1
        counts[-1] += seconds

    def text(self, pools: Iterable[Pool]) -> bytes:
        """All of it, and what ``pools`` do now."""
        lines: list[str] = []

        def family(name: str, kind: str, help_text: str, samples: Iterable[tuple[str, float]]) -> None:
            lines.extend((f"# HELP {name} {help_text}", f"# TYPE {name} {kind}"))
            lines.extend(f"{name}{labels} {value:g}" for labels, value in samples)

        family(
            "launcher_invocations_total",
            "counter",
            "Invocations, by status.",
            ((_labels(model=model, status=str(status)), count) for (model, status), count in self._requests.items()),
        )
        name = "launcher_invocation_seconds"
        lines.extend((f"# HELP {name} From the whole request to the answer.", f"# TYPE {name} histogram"))
        for model, counts in self._seconds.items():
            so_far = 0.0
            for bound, count in zip((*(f"{bound:g}" for bound in BUCKETS_S), "+Inf"), counts[:-1], strict=True):
                so_far += count
                lines.append(f"{name}_bucket{_labels(model=model, le=bound)} {so_far:g}")
            lines.append(f"{name}_sum{_labels(model=model)} {counts[-1]:.6f}")
            lines.append(f"{name}_count{_labels(model=model)} {so_far:g}")
        family("launcher_request_bytes_total", "counter", "Bytes of bodies.", [("", self._in_bytes)])
        family("launcher_answer_bytes_total", "counter", "Bytes of answers.", [("", self._out_bytes)])
        all_pools = list(pools)
        for name, kind, help_text, attribute in _OF_POOLS:
            values = [(_labels(model=pool.plan.model_name), getattr(pool, attribute)) for pool in all_pools]
            family(name, kind, help_text, values)
        own_counts = [
            (_labels(model=pool.plan.model_name, name=own), count)
            for pool in all_pools
            for own, count in pool.counts.items()
        ]
        if own_counts:
            family("launcher_user_total", "counter", "What handlers count (context.metrics.add_counter).", own_counts)
        return ("\n".join(lines) + "\n").encode()


def _labels(**labels: str) -> str:
    quoted = {
        name: value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for name, value in labels.items()
    }
    return "{" + ",".join(f'{name}="{value}"' for name, value in quoted.items()) + "}"
