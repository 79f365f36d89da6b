"""What an application gets: steps of DistributedDataParallel or Horovod, and a single ``dist.all_reduce``."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matrix import Field
from processes import Contender
from rivals import GLOO, HOROVOD, UNPINNED, Absent, horovod_start, memory_limit, python_with

CALL = "dist.all_reduce of 1 KiB"
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "call": (CALL, "2,000 calls on the same tensor, with all of torch's own checks.", {"do": "call", "bytes": 1024}),
    "large": (
        "100 M parameters",
        "6 x Linear(4096, 4096), 403 MB of gradients, batch 4, SGD; DistributedDataParallel or Horovod.",
        {"do": "step", "layers": 6, "width": 4096, "warm": 3},
    ),
    "wide": (
        "25 M parameters",
        "6 x Linear(2048, 2048), 101 MB of gradients, batch 4, SGD.",
        {"do": "step", "layers": 6, "width": 2048, "warm": 5},
    ),
    "small": (
        "400 small tensors",
        "200 x Linear(64, 64), 3.3 MB of gradients, batch 4, SGD: what fusion is for.",
        {"do": "step", "layers": 200, "width": 64, "warm": 10},
    ),
}
STEPS = {"call": 2000, "large": 5, "wide": 15, "small": 40}
BARS = {CALL: 60.0, "100 M parameters": 1.5, "25 M parameters": 1.5, "400 small tensors": 2.0}  # against each peer
LIMITS_US = {CALL: 5.0}
ALONE, HOROVOD_OURS = "no communication", "launcher.horovod"
VIEWED = f"{GLOO}, bucket views"
SILENT = "DDP that sends nothing"  # what its own copying costs: no back-end can be faster


def contenders(environments: Sequence[Path], absent: dict[str, str]) -> list[Contender]:
    """Who carries the gradients; each peer in both settings."""
    own = sys.executable
    # As users start them: launcher.horovod learns from the launcher who the others are.
    start = (own, "-m", "launcher", "--nproc", "{n}", "--affinity", "none", "--no-python")
    found = memory_limit()
    free = {"pin": False}
    views = {"views": True}
    for label, peer, carrier, environ, options in (
        (ALONE, ALONE, "none", {}, {}),
        (SILENT, ALONE, "launcher", {}, {"silent": True}),
        ("launcher", "launcher", "launcher", {}, {}),
        # The same without memory that ranks share: each bucket is copied.
        ("launcher, copying", "launcher", "launcher", {"LAUNCHER_ZERO_COPY": "0"}, {}),
        ("launcher, bucket views", "launcher", "launcher", {}, views),
        (HOROVOD_OURS, "launcher", "launcher.horovod.torch", {}, {}),
    ):
        found.append(Contender(label, peer, "torch_steps", own, start, environ, {"carrier": carrier, **options}))
    try:
        python = python_with("torch numpy", environments)
        gloo = {"carrier": "gloo"}
        found.append(Contender(GLOO, GLOO, "torch_steps", python, options=gloo))
        found.append(Contender(GLOO + UNPINNED, GLOO, "torch_steps", python, options=gloo | free))
        found.append(Contender(VIEWED, VIEWED, "torch_steps", python, options=gloo | views))
    except Absent as error:
        absent[GLOO] = str(error)
    try:
        python, start = horovod_start(environments)
        horovod = {"carrier": "horovod.torch"}
        found.append(Contender(HOROVOD, HOROVOD, "torch_steps", python, start, options=horovod))
        found.append(Contender(HOROVOD + UNPINNED, HOROVOD, "torch_steps", python, start, options=horovod | free))
    except Absent as error:
        absent[HOROVOD] = str(error)
    return found


def train(
    names: Sequence[str],
    environments: Sequence[Path],
    scratch: Path,
    support: Path,
    cores: Sequence[int],
    rounds: int,
    result: dict[str, Any],
) -> list[dict[str, Any]]:
    """All cases with two ranks, all contenders in turn in each round."""
    samples = []
    able = contenders(environments, result["absent"])
    with Field(able, 2, cores, scratch, support, result["failures"], result["versions"]) as field:
        runners = [one for one in field.contenders if one.adapter == "torch_steps"]
        for number in range(rounds):
            began = time.monotonic()
            for name in names:
                title, about, order = CASES[name]
                dist_only = name == "call"
                before = field.ping()
                for contender in runners:
                    options = contender.options
                    steps_only = options.get("views") or options.get("silent")
                    if dist_only and (options["carrier"] not in ("gloo", "launcher") or steps_only):
                        continue
                    answers = field.order(contender, {**order, "steps": STEPS[name]}, 120)
                    after = field.ping()
                    if answers:
                        slowest = max(answer["median_us"] for answer in answers)
                        sample = {"case": title, "about": about, "round": number, "label": contender.label}
                        samples.append(
                            sample | {"peer": contender.peer, "ping_ns": [before, after], "median_us": slowest}
                        )
                    before = after
            spent = time.monotonic() - began
            print(f"  through torch: round {number + 1} of {rounds}, {spent:.0f} s", file=sys.stderr, flush=True)
    return samples
