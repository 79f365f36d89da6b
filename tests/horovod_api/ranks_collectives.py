"""Checks of the collectives: what they compute, in which order they may be asked for, and how they fail."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import torch
from ranks_common import FLOATS, INTEGERS, OURS, RANK, SIZE, check, close, equal, fails, ours
from torch import nn


@check
def topology() -> None:
    assert hvd.is_initialized()
    assert (hvd.local_rank(), hvd.local_size()) == (RANK, SIZE)
    assert (hvd.cross_rank(), hvd.cross_size()) == (0, 1)
    assert hvd.gloo_built()
    assert not hvd.ddl_built()
    hvd.init()  # once more does nothing
    assert hvd.size() == SIZE


# ---- allreduce


@check
def allreduce_of_all_types() -> None:
    for dtype in FLOATS + INTEGERS:
        mine = torch.arange(6).to(dtype).view(2, 3) + RANK
        both = torch.stack([torch.arange(6).to(dtype).view(2, 3) + rank for rank in range(SIZE)])
        equal(hvd.allreduce(mine, op=hvd.Sum), both.sum(0))
        equal(hvd.allreduce(mine, op=hvd.Min), both.amin(0))
        equal(hvd.allreduce(mine, op=hvd.Max), both.amax(0))
        equal(hvd.allreduce(mine, op=hvd.Product), both.prod(0))
        average = both.double().mean(0)
        close(hvd.allreduce(mine).double(), average if dtype.is_floating_point else average.trunc(), 1e-2)
    for shape in ((), (0,), (1,), (5, 0), (1000, 257)):
        equal(hvd.allreduce(torch.full(shape, RANK + 1.0), op=hvd.Sum), torch.full(shape, SIZE * (SIZE + 1) / 2))
    equal(hvd.allreduce(torch.tensor([-7, 7, -8]), op=hvd.Average), [-7, 7, -8])


@check
def allreduce_in_place_and_not() -> None:
    mine = torch.ones(3)
    result = hvd.allreduce(mine, op=hvd.Sum)
    equal(mine, torch.ones(3))
    equal(result, torch.full((3,), float(SIZE)))
    assert hvd.allreduce_(mine, op=hvd.Sum) is mine
    equal(mine, torch.full((3,), float(SIZE)))
    parameter = nn.Parameter(torch.ones(2) * RANK)
    hvd.synchronize(hvd.allreduce_async_(parameter.data, op=hvd.Max))
    equal(parameter.data, torch.full((2,), SIZE - 1.0))


@check
def scale_factors() -> None:
    mine = torch.tensor([1.0, 3.0]) * (RANK + 1)
    total = torch.tensor([1.0, 3.0]) * (SIZE * (SIZE + 1) / 2)
    close(hvd.allreduce(mine, op=hvd.Sum, prescale_factor=0.5, postscale_factor=4), total * 2)
    close(hvd.allreduce(mine, prescale_factor=3.0), total / SIZE * 3)
    # Integers are multiplied in double precision and cut off, before as well as after.
    mine = torch.tensor([3, -4, 7]) + RANK
    halves = sum(((torch.tensor([3, -4, 7]) + rank) * 0.5).long() for rank in range(SIZE))
    equal(hvd.allreduce(mine, op=hvd.Sum, prescale_factor=0.5, postscale_factor=3.0), halves * 3)


@check
def old_argument_average() -> None:
    equal(hvd.allreduce(torch.ones(1), average=False), [float(SIZE)])
    equal(hvd.allreduce(torch.ones(1), average=True), [1.0])
    fails(ValueError, lambda: hvd.allreduce(torch.ones(1), average=True, op=hvd.Sum), "give op alone")


@check
def compressed() -> None:
    mine = torch.tensor([0.5, 1.0]) * (RANK + 1)
    found = hvd.allreduce(mine, compression=hvd.Compression.fp16, op=hvd.Sum)
    assert found.dtype == torch.float32
    close(found, torch.tensor([0.5, 1.0]) * (SIZE * (SIZE + 1) / 2))
    whole = torch.arange(3)
    equal(hvd.allreduce(whole, compression=hvd.Compression.fp16, op=hvd.Sum), whole * SIZE)


@check
def grouped() -> None:
    mine = [torch.full((3,), RANK + 1.0), torch.full((2, 2), RANK + 1, dtype=torch.float64), torch.ones(1)]
    total = SIZE * (SIZE + 1) / 2
    first, second, third = hvd.grouped_allreduce(mine, op=hvd.Sum)
    equal(first, torch.full((3,), total))
    equal(second, torch.full((2, 2), total))
    equal(third, [float(SIZE)])
    hvd.grouped_allreduce_(mine, op=hvd.Sum, name="a group")
    equal(mine[0], first)
    equal(mine[1], second)
    gathered = hvd.grouped_allgather([torch.full((RANK,), RANK), torch.ones(1, 2)])
    equal(gathered[0], [rank for rank in range(SIZE) for _ in range(rank)])
    equal(gathered[1], torch.ones(SIZE, 2))
    parts = hvd.grouped_reducescatter([torch.ones(SIZE), torch.ones(2 * SIZE, 3)], op=hvd.Sum)
    equal(parts[0], [float(SIZE)])
    equal(parts[1], torch.full((2, 3), float(SIZE)))


# ---- order


@check
def ranks_submit_in_different_orders() -> None:
    names = [f"tensor {number}" for number in range(60)]
    order = random.Random(RANK).sample(names, len(names))
    handles = {}
    for name in order:
        value = torch.full((int(name.split()[1]) % 7 + 1,), RANK + 1.0)
        handles[name] = hvd.allreduce_async(value, name=name, op=hvd.Sum)
    for name in random.Random(100 + RANK).sample(names, len(names)):
        equal(hvd.synchronize(handles[name]), torch.full((int(name.split()[1]) % 7 + 1,), SIZE * (SIZE + 1) / 2))


@check
def kinds_in_different_orders() -> None:
    def gather() -> Any:
        return hvd.allgather_async(torch.full((RANK + 1,), RANK), name="kinds gather")

    def reduce() -> Any:
        return hvd.allreduce_async(torch.ones(4), name="kinds reduce", op=hvd.Sum)

    def send() -> Any:
        return hvd.broadcast_async(torch.full((2,), float(RANK)), root_rank=SIZE - 1, name="kinds broadcast")

    calls = {"gather": gather, "reduce": reduce, "send": send}
    order = list(calls)[RANK % 3 :] + list(calls)[: RANK % 3]
    handles = {name: calls[name]() for name in order}
    equal(hvd.synchronize(handles["send"]), [SIZE - 1.0] * 2)
    equal(hvd.synchronize(handles["gather"]), [rank for rank in range(SIZE) for _ in range(rank + 1)])
    equal(hvd.synchronize(handles["reduce"]), [float(SIZE)] * 4)


@check
def a_rank_waits_while_others_do_other_things() -> None:
    """Rank 0 waits for what the others ask for last; they wait for what it has asked for before."""
    if RANK == 0:
        early = hvd.allreduce_async(torch.ones(1), name="asked early", op=hvd.Sum)
        equal(hvd.allreduce(torch.ones(2), name="asked late", op=hvd.Sum), [float(SIZE)] * 2)
        equal(hvd.synchronize(early), [float(SIZE)])
    else:
        equal(hvd.allreduce(torch.ones(1), name="asked early", op=hvd.Sum), [float(SIZE)])
        equal(hvd.allreduce(torch.ones(2), name="asked late", op=hvd.Sum), [float(SIZE)] * 2)


@check
def handles() -> None:
    handle = hvd.allreduce_async(torch.ones(1), name="polled")
    deadline = time.monotonic() + 20
    while not hvd.poll(handle):
        assert time.monotonic() < deadline, "never done"
    equal(hvd.synchronize(handle), [1.0])
    assert hvd.synchronize(handle) is None
    hvd.barrier()


# ---- the other collectives


@check
def allgather_with_different_rows() -> None:
    for dtype in FLOATS + INTEGERS:
        found = hvd.allgather(torch.full((2 * RANK, 3), RANK, dtype=dtype))
        equal(found, [[rank] * 3 for rank in range(SIZE) for _ in range(2 * rank)])
    equal(hvd.allgather(torch.zeros(0, 2)), torch.zeros(0, 2))
    large = hvd.allgather(torch.full((50_000 + RANK,), float(RANK)))
    equal(large, torch.cat([torch.full((50_000 + rank,), float(rank)) for rank in range(SIZE)]))


@check
def broadcasts() -> None:
    for root in range(SIZE):
        mine = torch.arange(4.0) + 10 * RANK
        equal(hvd.broadcast(mine, root_rank=root), torch.arange(4.0) + 10 * root)
        equal(mine, torch.arange(4.0) + 10 * RANK)
        assert hvd.broadcast_(mine, root_rank=root) is mine
        equal(mine, torch.arange(4.0) + 10 * root)
    fails(ValueError, lambda: hvd.broadcast(torch.ones(1), root_rank=SIZE), "expected a rank of")


@check
def alltoall() -> None:
    mine = torch.arange(2.0 * SIZE) + 100 * RANK
    expected = [100.0 * rank + 2 * RANK + at for rank in range(SIZE) for at in (0, 1)]
    equal(hvd.alltoall(mine), expected)
    splits = [rank + 1 for rank in range(SIZE)]
    mine = torch.full((sum(splits), 2), RANK)
    for given in (splits, torch.tensor(splits, dtype=torch.int32)):
        output, received = hvd.alltoall(mine, splits=given)
        equal(output, [[rank] * 2 for rank in range(SIZE) for _ in range(RANK + 1)])
        assert received.tolist() == [RANK + 1] * SIZE
    fails(ValueError, lambda: hvd.alltoall(torch.ones(1), splits=[1] * (SIZE + 1)), "splits for")
    fails(ValueError, lambda: hvd.alltoall(torch.ones(1), splits=[1] * SIZE), "may not be more")
    fails(ValueError, lambda: hvd.alltoall(torch.ones(SIZE + 1)), "cannot be split equally")


@check
def reducescatter() -> None:
    rows = 2 * SIZE + 1  # the first rank gets one more
    mine = torch.arange(rows * 2.0).view(rows, 2) + RANK
    total = sum(torch.arange(rows * 2.0).view(rows, 2) + rank for rank in range(SIZE))
    begin = 2 * RANK + min(RANK, 1)
    part = total[begin : begin + 2 + (RANK == 0)]
    equal(hvd.reducescatter(mine, op=hvd.Sum), part)
    close(hvd.reducescatter(mine), part / SIZE)
    close(hvd.reducescatter(mine, op=hvd.Sum, prescale_factor=2.0), part * 2)
    fails(ValueError, lambda: hvd.reducescatter(torch.tensor(1.0)), "has no rows")


@check
def objects() -> None:
    found = hvd.allgather_object({"rank": RANK, "more": "x" * 1000 * RANK})
    assert [item["rank"] for item in found] == list(range(SIZE))
    for root in range(SIZE):
        assert hvd.broadcast_object([RANK, "abc"], root_rank=root) == [root, "abc"]
    assert hvd.broadcast_object(None if RANK else {}, name="named") == {}


@check
def gradients() -> None:
    def of(call: Callable[[torch.Tensor], torch.Tensor], rows: int = 2) -> torch.Tensor:
        mine = torch.ones(rows, requires_grad=True)
        result = call(mine)
        (result * torch.arange(1.0, result.numel() + 1) * (RANK + 1)).sum().backward()
        return mine.grad

    total = SIZE * (SIZE + 1) / 2
    steps = torch.arange(1.0, 3.0)
    close(of(lambda mine: hvd.allreduce(mine, op=hvd.Sum)), steps * total)
    close(of(lambda mine: hvd.allreduce(mine)), steps * total / SIZE)
    close(of(lambda mine: hvd.grouped_allreduce([mine, mine], op=hvd.Sum)[0]), steps * total)
    close(of(lambda mine: hvd.allgather(mine)), (steps + 2 * RANK) * total / SIZE)
    close(of(lambda mine: hvd.broadcast(mine, root_rank=0)), steps * total / SIZE * (RANK == 0))
    close(of(lambda mine: hvd.alltoall(mine, splits=[1] * SIZE)[0], SIZE), grad_back())
    parts = torch.arange(1.0, SIZE + 1)
    close(of(lambda mine: hvd.reducescatter(mine, op=hvd.Sum), SIZE), SIZE * parts)


def grad_back() -> torch.Tensor:
    """Rank r multiplies what came from rank j by (j + 1) (r + 1); the piece for rank r came from this rank."""
    return torch.tensor([(RANK + 1.0) * (rank + 1) for rank in range(SIZE)])


@ours
def what_carries_tensors_of_gpus() -> None:
    """The calls that go to NCCL there, on torch's gloo and tensors of the CPU."""
    from launcher.horovod.negotiation import Signature
    from launcher.horovod.torch.carrier import Body
    from launcher.horovod.torch.device import DeviceGroup

    group = DeviceGroup("test", RANK, SIZE, 60.0, backend="gloo")

    def run(kind: str, mine: torch.Tensor, splits: list[int] | None = None, **fields: Any) -> Body:
        body = Body([mine], [None], splits)
        group.run(Signature("x", kind, **fields), [body])
        return body

    mine = torch.arange(4.0) + RANK
    both = torch.stack([torch.arange(4.0) + rank for rank in range(SIZE)])
    equal(run("allreduce", mine, op="Sum", prescale=2.0, postscale=0.5).targets[0], both.sum(0))
    close(run("allreduce", mine, op="Average").targets[0], both.mean(0))
    equal(run("allreduce", mine, op="Max").targets[0], both.amax(0))
    equal(mine, torch.arange(4.0) + RANK)
    rows = [[float(rank)] * 2 for rank in range(SIZE) for _ in range(rank)]
    equal(run("allgather", torch.full((RANK, 2), float(RANK))).targets[0], rows)
    equal(run("broadcast", mine, root=SIZE - 1).targets[0], both[SIZE - 1])
    rows_of = 2 * SIZE + 1
    total = sum(torch.arange(float(rows_of)) + rank for rank in range(SIZE))
    begin = 2 * RANK + min(RANK, 1)
    found = run("reducescatter", torch.arange(float(rows_of)) + RANK, op="Sum").targets[0]
    equal(found, total[begin : begin + 2 + (RANK == 0)])
    splits = [rank + 1 for rank in range(SIZE)]
    sent = run("alltoall", torch.full((sum(splits),), float(RANK)), splits)
    equal(sent.targets[0], [float(rank) for rank in range(SIZE) for _ in range(RANK + 1)])
    assert sent.received == [RANK + 1] * SIZE
    if SIZE == 2:
        equal(run("adasum", torch.tensor([RANK, 1.0 - RANK]), op="Adasum").targets[0], [1.0, 1.0])
    group.close()


# ---- errors


@check
def ranks_that_disagree() -> None:
    """All of them are told how, and go on."""
    last = RANK == SIZE - 1
    kind = hvd.HorovodInternalError
    shape = torch.ones(2 + last)
    fails(kind, lambda: hvd.allreduce(shape, name="shapes"), "different shapes", "rank 0 [2]", f"rank {SIZE - 1} [3]")
    dtype = torch.ones(2, dtype=torch.float64 if last else torch.float32)
    fails(kind, lambda: hvd.allreduce(dtype, name="types"), "different data types", "float32", "float64")
    op = hvd.Max if last else hvd.Sum
    fails(kind, lambda: hvd.allreduce(torch.ones(2), op=op, name="ops"), "different reductions", "Sum", "Max")
    factor = 2.0 if last else 1.0
    fails(kind, lambda: hvd.allreduce(torch.ones(2), prescale_factor=factor, name="factors"), "prescale factors")
    fails(kind, lambda: hvd.broadcast(torch.ones(2), root_rank=SIZE - 1 if last else 0, name="roots"), "root ranks")
    fails(kind, lambda: hvd.allgather(torch.ones(2, 2 + last), name="rows"), "different shapes", "[any, 2]", "[any, 3]")
    equal(hvd.allreduce(torch.ones(2), op=hvd.Sum, name="shapes"), [float(SIZE)] * 2)


@check
def arguments_that_do_not_fit() -> None:
    fails(ValueError, lambda: hvd.allreduce(torch.ones(1, dtype=torch.complex64)), "complex64", "float32")
    if OURS:
        fails(ValueError, lambda: hvd.allreduce([1.0]), "expected a tensor")
        fails(ValueError, lambda: hvd.allreduce(torch.ones(1), op=9), "expected one of Average, Sum")
        fails(ValueError, lambda: hvd.poll(10**9), "unknown")
    fails(ValueError, lambda: hvd.broadcast_parameters(3, 0), "expected a state dict")


@check
def one_name_twice() -> None:
    """While a rank waits for others under a name, it cannot ask for another thing under it."""
    if RANK == 0:
        handle = hvd.allreduce_async(torch.ones(1), name="twice", op=hvd.Sum)
        fails(ValueError, lambda: hvd.allreduce_async(torch.ones(1), name="twice", op=hvd.Sum), "still being worked on")
        hvd.allreduce(torch.ones(1), name="go on")
    else:
        hvd.allreduce(torch.ones(1), name="go on")
        handle = hvd.allreduce_async(torch.ones(1), name="twice", op=hvd.Sum)
    equal(hvd.synchronize(handle), [float(SIZE)])


# ---- join, process sets


@check
def join_with_uneven_data() -> None:
    for step in range(2 + 3 * (RANK == 0)):
        expected = float(SIZE) if step < 2 else 1.0
        equal(hvd.allreduce(torch.ones(2), name=f"uneven {step}", op=hvd.Sum), [expected] * 2)
    assert hvd.join() == 0
    equal(hvd.allreduce(torch.ones(2), op=hvd.Sum, name="after"), [float(SIZE)] * 2)
    if RANK == SIZE - 1:  # an average is over all ranks, with or without data
        equal(hvd.allreduce(torch.full((1,), float(SIZE)), name="average"), [1.0])
        fails(hvd.HorovodInternalError, lambda: hvd.broadcast(torch.ones(1), RANK, name="no broadcast"), "join()")
    assert hvd.join() == SIZE - 1


@ours
def join_and_allgather() -> None:
    if RANK == 0:
        equal(hvd.allgather(torch.ones(2, 1)), torch.ones(2, 1))
    hvd.join()


@check
def process_sets() -> None:
    ends = hvd.ProcessSet([0, SIZE - 1])
    assert ends.size() is None
    if SIZE == 2:
        fails(ValueError, lambda: hvd.add_process_set(ends), "already")
        return
    added = hvd.add_process_set(ends)
    assert added is ends
    assert (ends.size(), ends.ranks, ends.included()) == (2, [0, SIZE - 1], RANK in (0, SIZE - 1))
    alone = hvd.add_process_set([1])
    if RANK in (0, SIZE - 1):
        equal(hvd.allreduce(torch.full((2,), RANK + 1.0), op=hvd.Sum, process_set=ends), [SIZE + 1.0] * 2)
        equal(hvd.allgather(torch.tensor([RANK]), process_set=ends), [0, SIZE - 1])
        equal(hvd.broadcast(torch.tensor([RANK]), root_rank=SIZE - 1, process_set=ends), [SIZE - 1])
        assert ends.rank() == int(RANK > 0)
    else:
        assert alone.rank() == 0
        equal(hvd.allreduce(torch.ones(1), op=hvd.Sum, process_set=alone), [1.0])
    # Sets do not wait for each other: each rank asks in another order.
    everywhere = hvd.allreduce_async(torch.ones(1), op=hvd.Sum, name="all") if RANK == 0 else None
    if RANK != 1:
        hvd.barrier(process_set=ends)
    everywhere = everywhere if RANK == 0 else hvd.allreduce_async(torch.ones(1), op=hvd.Sum, name="all")
    equal(hvd.synchronize(everywhere), [float(SIZE)])
    if OURS and RANK == 1:
        fails(ValueError, lambda: hvd.allreduce(torch.ones(1), process_set=ends), "does not have rank 1")
    fails(ValueError, lambda: hvd.add_process_set([1]), "already" if OURS else "")
    assert hvd.remove_process_set(ends)
    assert not hvd.remove_process_set(ends)
    assert hvd.remove_process_set(alone)
    assert not hvd.remove_process_set(hvd.global_process_set)


# ---- Adasum


def adasum(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    dot = (first * second).sum()
    return (1 - dot / (2 * (first * first).sum())) * first + (1 - dot / (2 * (second * second).sum())) * second


@ours
def adaptive_sum() -> None:
    if SIZE & (SIZE - 1):
        fails(NotImplementedError, lambda: hvd.allreduce(torch.ones(2), op=hvd.Adasum), "power of two")
        return
    assert SIZE == 2
    values = [torch.tensor([1.0, 2.0, -3.0]), torch.tensor([0.5, -2.0, 1.0])]
    close(hvd.allreduce(values[RANK], op=hvd.Adasum), adasum(*values))
    equal(hvd.allreduce(torch.tensor([1.0, 2.0]), op=hvd.Adasum), [1.0, 2.0])  # alike: the average
    equal(hvd.allreduce(torch.tensor([RANK, 1.0 - RANK]), op=hvd.Adasum), [1.0, 1.0])  # orthogonal: the sum
    equal(hvd.allreduce(torch.tensor([3.0, 1.0]) * RANK, op=hvd.Adasum), [3.0, 1.0])  # nothing from rank 0
    model = nn.Linear(2, 1, bias=False)
    model.weight.data.fill_(1.0)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), op=hvd.Adasum)
    data = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    model(data[RANK : RANK + 1]).sum().backward()
    optimizer.step()
    close(model.weight.data, 1.0 - 0.5 * adasum(data[0], data[1]).unsqueeze(0))
