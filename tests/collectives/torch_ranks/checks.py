"""What the rank programs of this folder share: checks by name, whose outcome goes to a file per rank."""

import faulthandler
import json
import os
import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist

CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def same(ours: object, theirs: object, what: str = "") -> None:
    """Bit for bit; tensors, or lists of them."""
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, f"{what}: {ours.shape} {theirs.shape}"
        assert torch.equal(ours, theirs), f"{what}: {ours.flatten()[:8]} and {theirs.flatten()[:8]}"
    else:
        assert len(ours) == len(theirs), what
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            same(*pair, f"{what}[{number}]")


def main(initialize: bool = True) -> None:
    """Runs the checks (those in CHECKS, separated by commas, or all), the same on every rank.

    Writes name -> error ("" for none) to outcome.RANK.
    """
    faulthandler.dump_traceback_later(float(os.environ.get("CHECKS_LIMIT_S", "90")), exit=True)
    torch.set_num_threads(1)
    if initialize:
        dist.init_process_group("launcher")
    outcome = {}
    for name in os.environ.get("CHECKS", ",".join(CHECKS)).split(","):
        print(name, flush=True)
        try:
            CHECKS[name]()
            outcome[name] = ""
        except BaseException:
            outcome[name] = traceback.format_exc()
            break  # the ranks no longer agree on what comes next
    with open(f"outcome.{os.environ['RANK']}", "w") as file:
        json.dump(outcome, file)
    if dist.is_initialized():
        dist.destroy_process_group()
