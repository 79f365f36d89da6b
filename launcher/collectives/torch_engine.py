"""The engines of torch that carry what the launcher's collectives do not: Gloo on CPUs, NCCL on GPUs."""

from __future__ import annotations

import os
import sys

import torch.distributed as dist

from launcher.errors import CollectiveError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta
    from typing import Any

_said: set[str] = set()


def say_once(key: str, text: str) -> None:
    """One line in the log per process and ``key``."""
    if key not in _said:
        _said.add(key)
        print(f"[launcher] {text}", file=sys.stderr, flush=True)


class Engines:
    """Torch's own back-ends for the ranks of one group.

    Gloo is made at once, without connecting: connections are made when they are first used, but for that every rank
    must have published its address, also a rank that itself never sends. NCCL is made at the first CUDA tensor.

    Args:
        store: of the group; each engine has a prefix of its own.
        ranks: the members as the job numbers them.
        one_host: all members are on this host.
    """

    def __init__(
        self, store: Any, rank: int, ranks: Sequence[int], timeout: timedelta, name: str, one_host: bool
    ) -> None:
        self._store = store
        self._rank = rank
        self._ranks = list(ranks)
        self._timeout = timeout
        self._name = name
        self._one_host = one_host
        self._nccl: Any = None
        self._no_nccl = False
        self._gloo: Any = None
        self._refused = ""
        try:
            self._gloo = self._make_gloo()
        except RuntimeError as error:  # told when it is needed: most jobs do without
            self._refused = str(error)

    def gloo(self, what: str) -> Any:
        """The Gloo back-end, for ``what`` (said once in the log).

        Raises:
            CollectiveError: there is none.
        """
        if self._gloo is None:
            raise CollectiveError(
                f"{what} needs torch's Gloo engine, which could not be made: {self._refused}; GLOO_SOCKET_IFNAME can "
                "name the network interface to use"
            )
        if self._rank == 0:
            say_once(f"gloo {what}", f'backend "launcher": torch\'s Gloo carries {what}')
        return self._gloo

    def cuda(self, what: str) -> Any:
        """The back-end for GPU memory: NCCL, or Gloo where there is none."""
        if self._no_nccl or not dist.is_nccl_available():
            return self.gloo(what)
        if self._nccl is None:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = self._timeout
            if hasattr(options, "global_ranks_in_group"):  # newer than torch 2.4; for NCCL's own log lines
                options.global_ranks_in_group = self._ranks
                options.group_name = self._name
            store = dist.PrefixStore("nccl", self._store)
            self._nccl = dist.ProcessGroupNCCL(store, self._rank, len(self._ranks), options)
            if self._rank == 0:
                say_once("nccl", 'backend "launcher": tensors in GPU memory are carried by NCCL')
        return self._nccl

    def refuse_nccl(self) -> None:
        """NCCL can not be used by these ranks; called on all of them."""
        self._no_nccl = True

    def of(self, tensor: Any, what: str) -> Any:
        """The back-end for ``tensor``."""
        return self.cuda("tensors in GPU memory") if tensor.is_cuda else self.gloo(what)

    def set_timeout(self, timeout: timedelta) -> None:
        """For operations that begin later."""
        self._timeout = timeout
        for engine in (self._gloo, self._nccl):
            if engine is not None:
                engine._set_default_timeout(timeout)

    def shutdown(self, abort: bool = False) -> None:
        """Ends the engines. Gloo's ends with its last reference."""
        nccl, self._nccl, self._gloo = self._nccl, None, None
        self._refused = "the process group was destroyed"
        if nccl is not None:
            end = getattr(nccl, "abort" if abort else "shutdown", None)
            if end is not None:  # torch 2.4 ends it with its last reference
                end()

    def _make_gloo(self) -> Any:
        if not dist.is_gloo_available():
            raise RuntimeError("this torch was built without Gloo")
        kind = dist.ProcessGroupGloo
        options = kind._Options()
        options._timeout = self._timeout
        interfaces = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
        where: list[dict[str, str]] = [{"interface": name} for name in interfaces]
        if not where and self._one_host:
            where = [{"hostname": "127.0.0.1"}]  # no look-up of this host's name, which can take its time
        try:
            options._devices = _devices(kind, where, lazy_init=True)
        except TypeError:  # an older torch, in which every rank connects to every other one here
            options._devices = _devices(kind, where)
        return kind(dist.PrefixStore("gloo", self._store), self._rank, len(self._ranks), options)


def _devices(kind: Any, where: list[dict[str, str]], **more: bool) -> list[Any]:
    if where:
        return [kind.create_device(**place, **more) for place in where]
    return [kind.create_default_device(**more)]
