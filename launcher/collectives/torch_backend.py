"""``backend="launcher"`` for torch.distributed: ``dist.init_process_group("launcher")`` and nothing else changes.

Importing this module registers it, and so do ``launcher.init()`` and, from torch 2.5 on, ``import torch`` itself.
DDP, FSDP2, DTensor and functional collectives work on it as on Gloo; see docs/collectives.md.
"""

from __future__ import annotations

import re

import torch.distributed as dist

from launcher.collectives import torch_fsdp, torch_hook
from launcher.collectives.torch_engine import say_once
from launcher.collectives.torch_fsdp import optimize_fsdp
from launcher.collectives.torch_group import LauncherProcessGroup
from launcher.collectives.torch_shared import switched_on
from launcher.collectives.torch_work import CollectiveBackendError, CollectiveWork, translate
from launcher.errors import CollectiveError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta
    from types import ModuleType
    from typing import Any

__all__ = ["CollectiveBackendError", "CollectiveWork", "LauncherProcessGroup", "create", "make", "optimize_fsdp"]

_made: dict[str, int] = {}


def create(options: Any, backend_options: Any) -> LauncherProcessGroup:
    """Called by ``init_process_group`` and ``new_group`` on every member of a group.

    Args:
        options: torch's DistributedBackendOptions.
        backend_options: ``pg_options`` of the call; there are none for this back-end.
    """
    del backend_options
    ranks = list(options.global_ranks_in_group) or list(range(options.group_size))
    return make(options.store, options.group_rank, ranks, options.timeout, options.group_id)


def make(store: Any, rank: int, ranks: Sequence[int], timeout: timedelta, name: str) -> LauncherProcessGroup:
    """A process group of ``ranks`` (as the job numbers them), of which this process is number ``rank``.

    Raises:
        CollectiveBackendError: a rank did not come in time, or ended.
    """
    from launcher.collectives.group import join

    # After destroy_process_group() torch begins to count its groups again.
    count = _made[name] = _made.get(name, 0) + 1
    unique = f"torch-{re.sub('[^A-Za-z0-9_-]', '_', name)[:48]}-{count}"
    store = dist.PrefixStore(f"launcher/{count}", store)
    try:
        group = join(unique, rank, len(ranks), ranks=list(ranks), store=store, timeout_s=timeout.total_seconds())
    except CollectiveError as error:
        raise translate(error) from None
    if switched_on():
        torch_fsdp.install()
    if dist.get_debug_level() == dist.DebugLevel.DETAIL:
        # DDP's logger in C++ then takes any process group for the wrapper that torch puts around its own, and crashes.
        dist.set_debug_level(dist.DebugLevel.INFO)
        say_once(
            "debug", "TORCH_DISTRIBUTED_DEBUG=DETAIL is for torch's own back-ends only; this job goes on as with INFO"
        )
    return LauncherProcessGroup(group, store, timeout, name, ranks)


def _keep_out_of_graphs(trace_rules: ModuleType) -> None:
    """torch.compile compiles Python code that its C++ code calls, DDP's reducer for one; not ours, please."""
    if hasattr(trace_rules, "add"):
        trace_rules.add("launcher.collectives")


torch_hook.register()
torch_hook.when_imported("torch._dynamo.trace_rules", _keep_out_of_graphs)
