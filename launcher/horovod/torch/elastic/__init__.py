"""Elastic training: see launcher.horovod.common.elastic for what a restart keeps."""

from __future__ import annotations

from launcher.horovod.common.elastic import ObjectState, State, run_fn
from launcher.horovod.torch.basics import init, shutdown
from launcher.horovod.torch.elastic.sampler import ElasticSampler
from launcher.horovod.torch.elastic.state import TorchState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["ElasticSampler", "ObjectState", "State", "TorchState", "run"]


def run(func: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a training function ``func(state, ...)``.

    The state is sent around before it begins. When a collective fails in it, the state goes back to its last commit,
    the ranks meet anew and it is called again.
    """
    return run_fn(func, _reset)


def _reset() -> None:
    shutdown()
    init()
