"""Checks of optimizers, batch normalization, elastic training, and the ends of a world."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import torch
from ranks_common import DIRECTORY, OURS, RANK, SIZE, check, close, equal, everybody, fails, ours
from torch import nn

# ---- models and optimizers


def make_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


def batches(steps: int, rows: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per step the batch of all ranks together; a rank takes its part of it."""
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(rows * SIZE, 6, generator=generator), torch.randint(3, (rows * SIZE,), generator=generator))
        for _ in range(steps)
    ]


def share(batch: torch.Tensor) -> torch.Tensor:
    return batch.chunk(SIZE)[RANK]


@check
def parameters_and_state_from_one_rank() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    for tensor in model.state_dict().values():
        tensor.fill_(RANK + 1)
    hvd.broadcast_parameters(model.state_dict(), root_rank=1)
    assert all(bool((tensor == 2).all()) for tensor in model.state_dict().values())
    for parameter in model.parameters():
        parameter.data.fill_(RANK)
    hvd.broadcast_parameters(list(model.named_parameters()), root_rank=0)
    assert all(bool((parameter == 0).all()) for parameter in model.parameters())
    for make in (
        lambda: torch.optim.SGD(model.parameters(), lr=0.1 * (RANK + 1), momentum=0.9),
        lambda: torch.optim.Adam(model.parameters(), lr=0.1 * (RANK + 1), betas=(0.5 + 0.1 * RANK, 0.9)),
    ):
        optimizer = make()
        for _ in range(RANK + 1):
            model(torch.randn(5, 3)).sum().backward()
            optimizer.step()
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
        assert optimizer.param_groups[0]["lr"] == 0.1
        first = optimizer.state_dict()
        for other in hvd.allgather_object(first):
            assert first["param_groups"] == other["param_groups"]
            for number, values in first["state"].items():
                for name, value in values.items():
                    assert torch.equal(torch.as_tensor(value), torch.as_tensor(other["state"][number][name]))


@ours
def state_that_only_the_root_has() -> None:
    model = make_model(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    if RANK == 0:
        model(torch.ones(1, 6)).sum().backward()
        optimizer.step()
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert all(optimizer.state[parameter]["step"] == 1 for parameter in model.parameters())


def train_alone(model: nn.Module, optimizer: torch.optim.Optimizer, data: Any) -> None:
    for images, labels in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


@check
def training_equals_that_of_one_process() -> None:
    """With the batches of all ranks together; each with other options that must not matter."""
    data = batches(5)
    options: list[dict[str, Any]] = [
        {},
        {"gradient_predivide_factor": 2.0},
        {"groups": 2},
        {"compression": hvd.Compression.fp16},
        {"op": hvd.Sum},
    ]
    for number, option in enumerate(options):
        for make in (
            lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
        ):
            reference = make_model(3)
            train_alone(reference, make(reference), data)
            model = make_model(3 if RANK == 0 else 4)
            hvd.broadcast_parameters(model.state_dict(), root_rank=0)
            optimizer = make(model)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100)
            optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(), **option)
            assert isinstance(optimizer, (torch.optim.SGD, torch.optim.Adam))
            for images, labels in data:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(share(images)), share(labels))
                (loss / SIZE if option.get("op") == hvd.Sum else loss).backward()
                optimizer.step()
                scheduler.step()
            tolerance = 5e-3 if "compression" in option else 1e-5
            for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
                close(mine, theirs, tolerance)
                for other in everybody(mine.detach()):
                    assert torch.equal(other, mine), f"ranks differ with {options[number]}"


@check
def several_backward_passes() -> None:
    (images, labels), *_ = batches(1)
    reference, model = make_model(3), make_model(3)
    (nn.functional.cross_entropy(reference(images), labels) * 2).backward()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), backward_passes_per_step=2
    )
    for _ in range(3):  # the first step is not like the others
        optimizer.zero_grad()
        for part in range(2):
            chosen = slice(part * 2, part * 2 + 2)
            nn.functional.cross_entropy(model(share(images)[chosen]), share(labels)[chosen]).backward()
        optimizer.synchronize()
        for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            close(mine.grad, theirs.grad, 1e-5)
    with optimizer.skip_synchronize():
        optimizer.step()
    for _ in range(2):
        model(share(images)).sum().backward()
    fails(AssertionError, lambda: model(share(images)).sum().backward(), "backward_passes_per_step")
    fails(AssertionError, lambda: optimizer.zero_grad(), "zero_grad()")
    optimizer.synchronize()
    optimizer.zero_grad()


class Branches(nn.Module):
    """Uses its layers in an order, and as many, as the caller says."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(5)])

    def forward(self, values: torch.Tensor, order: list[int]) -> torch.Tensor:
        for number in order:
            values = self.layers[number](values)
        return values


@check
def gradients_come_in_different_orders_or_not_at_all() -> None:
    torch.manual_seed(0)
    model = Branches()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    for step in range(4):
        orders = [random.Random(10 * step + rank).sample(range(5), 5 - (rank == 1)) for rank in range(SIZE)]
        expected = []
        for order in orders:
            twin = copy.deepcopy(model)
            twin.zero_grad()
            twin(torch.ones(1, 4), order).sum().backward()
            expected.append([torch.zeros_like(p) if p.grad is None else p.grad for p in twin.parameters()])
        optimizer.zero_grad()
        model(torch.ones(1, 4), orders[RANK]).sum().backward()
        optimizer.synchronize()
        for number, parameter in enumerate(model.parameters()):
            close(parameter.grad, sum(gradients[number] for gradients in expected) / SIZE, 1e-5)
        with optimizer.skip_synchronize():
            optimizer.step()


@check
def clipping_between_synchronize_and_step() -> None:
    model = nn.Linear(4, 1, bias=False)
    model.weight.data.fill_(1.0)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model.named_parameters())
    for step in range(2):
        model(torch.full((1, 4), RANK + 1.0)).sum().backward()
        optimizer.synchronize()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        close(norm, torch.tensor(SIZE + 1.0))  # twice the mean of 1 .. SIZE
        with optimizer.skip_synchronize():
            optimizer.step()
        close(model.weight.data, torch.full((1, 4), 1.0 - 0.5 * (step + 1)), 1e-4)
        optimizer.zero_grad()


@ours
def gradients_that_stay_in_place() -> None:
    """zero_grad(set_to_none=False) leaves gradients where they are reduced, and backward adds to them there."""
    model = make_model(1)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), model.named_parameters())
    addresses = []
    for step in range(3):
        optimizer.zero_grad(set_to_none=False)
        model(torch.full((1, 6), float(RANK + step))).sum().backward()
        optimizer.step()
        addresses.append([parameter.grad.data_ptr() for parameter in model.parameters()])
    assert addresses[0] == addresses[1] == addresses[2]
    expected = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for rank in range(SIZE):
        twin = make_model(1)
        twin(torch.full((1, 6), float(rank + 2))).sum().backward()
        for total, parameter in zip(expected, twin.parameters(), strict=True):
            total += parameter.grad / SIZE
    for parameter, total in zip(model.parameters(), expected, strict=True):
        close(parameter.grad, total, 1e-5)


@ours
def gradients_are_reduced_where_they_lie() -> None:
    from launcher.horovod.torch.basics import world

    before = world().channels[0].group.statistics()["bytes"]["shared"]
    model = nn.Linear(1000, 1000, bias=False)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    for _ in range(2):
        model(torch.ones(1, 1000)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert world().channels[0].group.statistics()["bytes"]["shared"] - before >= 8_000_000


@check
def closure() -> None:
    """LBFGS computes gradients inside of step()."""
    if not OURS:
        return
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    data, target = torch.randn(4 * SIZE, 3), torch.randn(4 * SIZE, 1)
    reference = copy.deepcopy(model)
    plain = torch.optim.LBFGS(reference.parameters(), max_iter=5)
    optimizer = hvd.DistributedOptimizer(torch.optim.LBFGS(model.parameters(), max_iter=5), model.named_parameters())

    def of(net: nn.Module, clear: Callable[[], None], inputs: Any, wanted: Any) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            clear()
            loss = nn.functional.mse_loss(net(inputs), wanted)
            loss.backward()
            return loss

        return run

    plain.step(of(reference, plain.zero_grad, data, target))
    # Ranks must agree on the loss too, for the line search; with equal shares it is the mean of theirs.
    optimizer.step(of(model, optimizer.zero_grad, data, target))
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        close(mine, theirs, 1e-4)


@ours
def sparse_gradients() -> None:
    """Also where a rank has none in the first step, or at all; and as dense ones."""
    for as_dense in (False, True):
        torch.manual_seed(0)
        table = nn.Embedding(10, 3, sparse=True)
        before = table.weight.detach().clone()
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(table.parameters(), lr=1.0), table.named_parameters(), sparse_as_dense=as_dense
        )
        for step in range(2):
            if not (step == 0 and RANK == 1):
                table(torch.tensor([RANK, 5])).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        counts = torch.zeros(10)
        for step in range(2):
            for rank in range(SIZE):
                if not (step == 0 and rank == 1):
                    counts[rank] += 1
                    counts[5] += 1
        close(table.weight.detach(), before - (counts / SIZE).unsqueeze(1))
    indices, values = torch.tensor([[RANK, 7]]), torch.full((2,), RANK + 1.0)
    handle = hvd.sparse_allreduce_async(
        torch.sparse_coo_tensor(indices, values, (9,), check_invariants=False), "a sparse one", hvd.Sum
    )
    expected = torch.zeros(9)
    for rank in range(SIZE):
        expected[rank] += rank + 1
        expected[7] += rank + 1
    close(hvd.synchronize(handle).to_dense(), expected)


@ours
def different_models() -> None:
    model = nn.Linear(2 + (RANK == 1), 1)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    model(torch.ones(1, 2 + (RANK == 1))).sum().backward()
    text = fails(hvd.HorovodInternalError, optimizer.step, "'weight'", "float32[1, 2]", "float32[1, 3]", "on rank 1")
    assert "train different models" in text


@check
def wrong_names() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    twice = [("x", parameter) for parameter in model.parameters()]
    fails(ValueError, lambda: hvd.DistributedOptimizer(optimizer, twice), "unique")
    fails(ValueError, lambda: hvd.DistributedOptimizer(optimizer, model.parameters()), "pairs")
    fails(ValueError, lambda: hvd.DistributedOptimizer(optimizer, [("weight", model.weight)]), "no name")
    fails(ValueError, lambda: hvd.DistributedOptimizer(optimizer, backward_passes_per_step=0), "1 or more")
    fails(ValueError, lambda: hvd.DistributedOptimizer(optimizer, op=hvd.Sum, gradient_predivide_factor=2.0), "Average")


@ours
def join_in_the_middle_of_an_epoch() -> None:
    """Ranks with less data: the others' gradients are averaged over all ranks, as Horovod does."""
    model = make_model(2)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    for step in range(2 + 2 * (RANK == 0)):
        optimizer.zero_grad()
        data = torch.full((1, 6), float(step))
        # Not clones of the gradients: those are being reduced in place while backward() runs.
        own = torch.autograd.grad(model(data).sum(), list(model.parameters()))
        model(data).sum().backward()
        optimizer.synchronize()
        divisor = 1 if step < 2 else SIZE
        for parameter, gradient in zip(model.parameters(), own, strict=True):
            close(parameter.grad, gradient / divisor, 1e-5)
        with optimizer.skip_synchronize():
            optimizer.step()
    assert hvd.join() == 0


@ours
def batch_norm_over_all_ranks() -> None:
    torch.manual_seed(5)
    rows = [3 + rank for rank in range(SIZE)]
    data = torch.randn(sum(rows), 4, 2, dtype=torch.float64)
    weight = torch.randn_like(data)
    plain = nn.BatchNorm1d(4).double()
    synced = hvd.SyncBatchNorm(4).double()
    for norm in (plain, synced):
        norm.weight.data.copy_(torch.arange(1.0, 5.0))
    whole = data.clone().requires_grad_()
    expected = plain(whole)
    (expected * weight).sum().backward()
    mine = data.split(rows)[RANK].clone().requires_grad_()
    found = synced(mine)
    (found * weight.split(rows)[RANK]).sum().backward()
    close(found, expected.split(rows)[RANK])
    close(mine.grad, whole.grad.split(rows)[RANK])
    close(hvd.allreduce(synced.weight.grad, op=hvd.Sum), plain.weight.grad)
    close(hvd.allreduce(synced.bias.grad, op=hvd.Sum), plain.bias.grad)
    close(synced.running_mean, plain.running_mean)
    close(synced.running_var, plain.running_var)
    synced.eval()
    close(synced(data), plain.eval()(data))


# ---- elastic


@check
def elastic_goes_back_to_the_last_commit() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = hvd.elastic.TorchState(model=model, optimizer=optimizer, step=0, note=[])
    resets = []
    state.register_reset_callbacks([lambda: resets.append(hvd.size())])
    seen = []

    @hvd.elastic.run
    def train(state: Any) -> str:
        while state.step < 6:
            seen.append(state.step)
            if len(seen) == 4:  # all ranks fail alike: the launcher would restart the job for less
                state.model.weight.data.fill_(99.0)
                rows = 1 + (RANK == 0)
                hvd.allreduce(torch.ones(rows), name="does not fit")
            state.step += 1
            state.model.weight.data.fill_(float(state.step))
            if state.step % 2 == 0:
                state.commit()
        return "done"

    if not OURS:
        return  # its reset asks a driver of Horovod's own for new ranks
    assert train(state) == "done"
    assert seen == [0, 1, 2, 3, 2, 3, 4, 5], seen
    assert resets == [SIZE]
    equal(model.weight.data, [[6.0, 6.0]])
    equal(hvd.allreduce(torch.ones(1), op=hvd.Sum), [float(SIZE)])


@ours
def elastic_gives_up_what_always_fails() -> None:
    tries = []

    @hvd.elastic.run
    def train(state: Any) -> None:
        tries.append(0)
        hvd.allreduce(torch.ones(1 + (RANK == 0)), name="never fits")

    fails(hvd.HorovodInternalError, lambda: train(hvd.elastic.TorchState(step=0)), "different shapes")
    assert len(tries) == 3


@ours
def elastic_when_hosts_change() -> None:
    state = hvd.elastic.TorchState(step=RANK)
    calls = []

    @hvd.elastic.run
    def train(state: Any) -> int:
        calls.append(state.step)
        if len(calls) == 1:
            if RANK == 0:
                state.on_hosts_updated(1.0, 1)
            state.step = 5
            state.commit()
            raise AssertionError("not interrupted")
        return state.step

    assert train(state) == 5
    assert calls == [0, 5]


@check
def sampler_shares_what_is_left() -> None:
    data = list(range(40))
    sampler = hvd.elastic.ElasticSampler(data, shuffle=True)
    first = list(sampler)[:4]
    sampler.record_batch(0, 4)
    seen = sorted(index for share in hvd.allgather_object(first) for index in share)
    kept = sampler.state_dict()
    other = hvd.elastic.ElasticSampler(data, shuffle=True)
    other.load_state_dict(kept)
    rest = sorted({index for share in hvd.allgather_object(list(other)) for index in share})
    assert sorted(seen + rest) == data
    assert len(other) == -(-(40 - 4 * SIZE) // SIZE)
    other.set_epoch(1)
    assert len({index for share in hvd.allgather_object(list(other)) for index in share}) == 40


# ---- the rest


@ours
def timeline() -> None:
    path = DIRECTORY / f"timeline{RANK}.json"
    hvd.start_timeline(str(path))
    hvd.allreduce(torch.ones(1000), name="traced")
    hvd.stop_timeline()
    hvd.allreduce(torch.ones(1000), name="not traced")
    events = json.loads(path.read_text())
    found = {event["name"]: event for event in events if event["ph"] == "X" and event["args"]["tensor"] == "traced"}
    assert set(found) == {"negotiate", "allreduce"}
    assert found["allreduce"]["args"]["bytes"] == 4000
    assert found["negotiate"]["ts"] + found["negotiate"]["dur"] <= found["allreduce"]["ts"] + 0.01
    assert not [event for event in events if event["args"].get("tensor") == "not traced"]


@ours
def another_world() -> None:
    """shutdown() and init() once more; gradients of before stay readable, and the optimizer goes on."""
    model = make_model(1)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())

    def step() -> None:
        optimizer.zero_grad()
        model(torch.ones(1, 6) * (RANK + 1)).sum().backward()
        optimizer.step()

    step()
    step()
    kept = [parameter.grad for parameter in model.parameters()]
    before = [gradient.clone() for gradient in kept]
    hvd.barrier()
    hvd.shutdown()
    assert not hvd.is_initialized()
    fails(ValueError, hvd.rank, "hvd.init()")
    fails(ValueError, lambda: hvd.allreduce(torch.ones(1)), "hvd.init()")
    for gradient, copied in zip(kept, before, strict=True):
        equal(gradient, copied)
    hvd.init()
    step()
    for parameter in model.parameters():
        for other in everybody(parameter.detach()):
            assert torch.equal(other, parameter)
