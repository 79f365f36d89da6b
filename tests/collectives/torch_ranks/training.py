"""Models trained on backend="launcher" and on Gloo, in the same processes, from the same start; two ranks or three.

With two ranks a sum has one order, and the weights must be the same bits; with more they agree within bounds.
"""

import contextlib
import copy
import functools
import io
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from checks import check, main, same
from torch.nn.parallel import DistributedDataParallel as DDP

STEPS = int(os.environ.get("STEPS", "50"))


@functools.lru_cache(1)
def gloo() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo")


def statistics() -> dict[str, dict[str, int]]:
    return dist.distributed_c10d._get_default_group().statistics()


class Model(torch.nn.Module):
    """Three layers, and one that can be left out."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.first = torch.nn.Linear(32, 160)
        self.norm = torch.nn.BatchNorm1d(160) if norm else torch.nn.Identity()
        self.second = torch.nn.Linear(160, 160)
        self.third = torch.nn.Linear(160, 8)
        self.sometimes = torch.nn.Linear(160, 8)

    def forward(self, batch: torch.Tensor, extra: bool = True) -> torch.Tensor:
        hidden = torch.relu(self.second(torch.relu(self.norm(self.first(batch)))))
        return self.third(hidden) + (self.sometimes(hidden) if extra else 0)


def fresh(norm: bool = False) -> Model:
    torch.manual_seed(5)
    return Model(norm)


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    numbers = torch.Generator().manual_seed(100 + dist.get_rank())
    return [(torch.randn(16, 32, generator=numbers), torch.randn(16, 8, generator=numbers)) for _ in range(count)]


def agree(ours: torch.nn.Module, theirs: torch.nn.Module, loose: float = 1e-4) -> None:
    for (name, own), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        if dist.get_world_size() == 2:
            same(own, other, name)
        else:
            assert torch.allclose(own.double(), other.double(), rtol=loose, atol=loose), name


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int = STEPS,
    extra: Callable[[int], bool] | None = None,
    accumulate: int = 1,
    clip: float = 0.0,
) -> None:
    for step, (batch, target) in enumerate(batches(steps)):
        last = (step + 1) % accumulate == 0
        with contextlib.nullcontext() if last else model.no_sync():
            arguments = (batch, extra(step)) if extra else (batch,)
            torch.nn.functional.mse_loss(model(*arguments), target).backward()
        if last:
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()


def both(run: Callable[[torch.nn.Module, dist.ProcessGroup | None], None], norm: bool = False) -> None:
    ours, theirs = fresh(norm), fresh(norm)
    run(ours, None)
    run(theirs, gloo())
    agree(ours, theirs)


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


@check
def ddp() -> None:
    def run(model: torch.nn.Module, group: dist.ProcessGroup | None) -> None:
        wrapped = DDP(model, process_group=group)
        train(wrapped, torch.optim.AdamW(model.parameters()))

    before = statistics()["calls"]["shared"]
    both(run)
    shared = statistics()["calls"]["shared"] - before
    if os.environ.get("LAUNCHER_ZERO_COPY") == "0":
        assert shared == 0
    else:  # not in the first iteration, nor in the first with the final buckets
        assert shared >= STEPS - 5, f"{shared} calls on registered buckets in {STEPS} steps"


@check
def ddp_with_gradients_as_views() -> None:
    both(lambda model, group: train(DDP(model, process_group=group, gradient_as_bucket_view=True), sgd(model)))


@check
def ddp_with_small_buckets_and_static_graph() -> None:
    def run(model: torch.nn.Module, group: dist.ProcessGroup | None) -> None:
        wrapped = DDP(model, process_group=group, bucket_cap_mb=0.05, static_graph=True, find_unused_parameters=False)
        train(wrapped, sgd(model))

    both(run)


@check
def ddp_that_finds_unused_parameters() -> None:
    def run(model: torch.nn.Module, group: dist.ProcessGroup | None) -> None:
        wrapped = DDP(model, process_group=group, find_unused_parameters=True)
        train(wrapped, sgd(model), extra=lambda step: (step + dist.get_rank()) % 3 == 0)

    both(run)


@check
def ddp_that_accumulates_gradients() -> None:
    both(lambda model, group: train(DDP(model, process_group=group), sgd(model), accumulate=3, clip=0.5))


@check
def ddp_with_buffers() -> None:
    both(lambda model, group: train(DDP(model, process_group=group), sgd(model)), norm=True)


@check
def ddp_with_communication_hooks() -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    for hook in (default_hooks.allreduce_hook, default_hooks.fp16_compress_hook):

        def run(model: torch.nn.Module, group: dist.ProcessGroup | None, hook: object = hook) -> None:
            wrapped = DDP(model, process_group=group)
            wrapped.register_comm_hook(group, hook)
            train(wrapped, sgd(model), steps=15)

        ours, theirs = fresh(), fresh()
        run(ours, None)
        run(theirs, gloo())
        agree(ours, theirs, 2e-2)

    def compressed(model: torch.nn.Module, group: dist.ProcessGroup | None) -> None:
        wrapped = DDP(model, process_group=group)
        state = powerSGD_hook.PowerSGDState(group, matrix_approximation_rank=2, start_powerSGD_iter=3, random_seed=1)
        wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        train(wrapped, sgd(model), steps=10)

    if dist.get_world_size() == 2:
        both(compressed)


@check
def fsdp2() -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for policy in (MixedPrecisionPolicy(), MixedPrecisionPolicy(torch.bfloat16, torch.float32)):

        def run(model: torch.nn.Module, backend: str, policy: MixedPrecisionPolicy = policy) -> dict[str, torch.Tensor]:
            mesh = dist.device_mesh.DeviceMesh.from_group(dist.group.WORLD if backend == "launcher" else gloo(), "cpu")
            for layer in (model.first, model.second):
                fully_shard(layer, mesh=mesh, mp_policy=policy)
            fully_shard(model, mesh=mesh, mp_policy=policy)
            train(model, torch.optim.AdamW(model.parameters()), clip=1.0)
            return {name: value.full_tensor() for name, value in model.state_dict().items()}

        before = statistics()["calls"]["shared"]
        ours, theirs = run(fresh(), "launcher"), run(fresh(), "gloo")
        for name, value in ours.items():
            if dist.get_world_size() == 2:
                same(value, theirs[name], name)
            else:
                assert torch.allclose(value, theirs[name], rtol=1e-2, atol=1e-2), name
        if os.environ.get("LAUNCHER_ZERO_COPY") != "0" and allocates():
            assert statistics()["calls"]["shared"] - before > STEPS, "buffers of FSDP2 were copied"


def allocates() -> bool:
    from torch.distributed.fsdp import FSDPModule

    return hasattr(FSDPModule, "set_custom_all_gather")


@check
def fsdp2_asked_to_allocate_from_the_process_group() -> None:
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not hasattr(FSDPModule, "set_allocate_memory_from_process_group_for_comm"):
        return
    from launcher.collectives.torch_backend import optimize_fsdp

    ours, theirs = fresh(), fresh()
    for model in (ours, theirs):
        fully_shard(model)
    ours.set_allocate_memory_from_process_group_for_comm(True)
    assert optimize_fsdp(theirs) == 1
    for model in (ours, theirs):
        train(model, torch.optim.AdamW(model.parameters()), steps=5)
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        same(own.full_tensor(), other.full_tensor())


@check
def hybrid_sharding() -> None:
    """Sharded in one dimension of a mesh, replicated in the other."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("replicate", "shard"))
    ours, theirs = fresh(), fresh()
    fully_shard(ours, mesh=mesh)
    train(ours, sgd(ours), steps=10)
    train(DDP(theirs, process_group=gloo()), sgd(theirs), steps=10)
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(own.full_tensor(), other, rtol=1e-4, atol=1e-5)


@check
def zero_redundancy_optimizer() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def run(model: torch.nn.Module, group: dist.ProcessGroup | None) -> None:
        optimizer = ZeroRedundancyOptimizer(
            model.parameters(), torch.optim.Adam, process_group=group, parameters_as_bucket_view=True, lr=0.01
        )
        train(DDP(model, process_group=group), optimizer)

    both(run)


@check
def local_sgd() -> None:
    from torch.distributed.algorithms.model_averaging import averagers

    def run(model: torch.nn.Module, group: dist.ProcessGroup | None) -> None:
        averager = averagers.PeriodicModelAverager(period=4, process_group=group)
        optimizer = sgd(model)
        for batch, target in batches(12):
            torch.nn.functional.mse_loss(model(batch), target).backward()
            optimizer.step()
            averager.average_parameters(model.parameters())
            optimizer.zero_grad()

    both(run)


@check
def joins_with_uneven_inputs() -> None:
    def run(model: torch.nn.Module, group: dist.ProcessGroup | None) -> None:
        wrapped, optimizer = DDP(model, process_group=group), sgd(model)
        with wrapped.join():
            for batch, target in batches(4 + dist.get_rank()):
                torch.nn.functional.mse_loss(wrapped(batch), target).backward()
                optimizer.step()
                optimizer.zero_grad()

    both(run)


@check
def checkpoints_and_copies() -> None:
    """Weights that were reduced in shared memory are saved, copied and loaded as any others."""
    model = fresh()
    wrapped = DDP(model, gradient_as_bucket_view=True)
    optimizer = sgd(model)
    train(wrapped, optimizer, steps=5)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    other = fresh()
    other.load_state_dict(torch.load(buffer)["model"])
    agree(model, other)
    copy.deepcopy(model)


@check
def compiled_ddp() -> None:
    if dist.get_world_size() > 2 or os.environ.get("COMPILE") != "1":
        return

    def run(model: torch.nn.Module, group: dist.ProcessGroup | None) -> None:
        train(torch.compile(DDP(model, process_group=group)), sgd(model), steps=20)

    both(run)

    @torch.compile
    def reduced(tensor: torch.Tensor) -> torch.Tensor:
        doubled = tensor * 2
        dist.all_reduce(doubled)
        return doubled + 1

    assert reduced(torch.ones(4)).eq(2 * dist.get_world_size() + 1).all()


if __name__ == "__main__":
    main()
