"""One rank of test_torch.py: tensors in GPU memory through backend="launcher". Shows what was wrong, and who carried.

Arguments: folder, rank, size, number of its GPU or "own", then which check.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import launcher.collectives.torch_backend  # noqa: F401  # torch 2.4 does not find it by itself

directory, rank_text, size_text, number, check = sys.argv[1:]
rank, size = int(rank_text), int(size_text)
device = torch.device("cuda", rank if number == "own" else int(number))
wrong: list[str] = []


def expect(what: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    found = found.cpu()
    if found.dtype != wanted.dtype or not torch.equal(found.view(torch.uint8), wanted.contiguous().view(torch.uint8)):
        wrong.append(f"{what}: {found.flatten()[:4].tolist()}, not {wanted.flatten()[:4].tolist()}")


def values(count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * seed + rank)
    return torch.randn(count, generator=generator).mul_(50.0).to(dtype)


def operations() -> None:
    """Against the same call on CPU memory, which folds in the same order."""
    seed = 0
    ops = (dist.ReduceOp.SUM, dist.ReduceOp.MIN, dist.ReduceOp.MAX, dist.ReduceOp.AVG)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64):
        for op in ops[: 4 if dtype.is_floating_point and size == 2 else 3]:
            for count in (1, 1023, 70_001):
                seed += 1
                wanted = values(count, dtype, seed)
                found = wanted.to(device)
                dist.all_reduce(found, op)
                dist.all_reduce(wanted, op)
                expect(f"{dtype} {op} {count}", found, wanted)
    wanted = values(3_000_000, torch.float32, 1)  # in pieces, where NCCL does not take it
    found = wanted.to(device)
    dist.all_reduce(found)
    dist.all_reduce(wanted)
    if number == "own":
        assert torch.allclose(found.cpu(), wanted, atol=1e-3)
    else:
        expect("3,000,000", found, wanted)
    with_gaps = values(300, torch.float32, 2).to(device).view(20, 15).t()
    wanted = with_gaps.cpu().clone()
    dist.all_reduce(with_gaps)
    dist.all_reduce(wanted)
    expect("gaps", with_gaps.contiguous(), wanted)
    pieces = [values(count, torch.float32, 3).to(device) for count in (5, 1000, 33)]
    alike = [piece.cpu() for piece in pieces]
    group = dist.distributed_c10d._get_default_group()
    opts = dist.AllreduceCoalescedOptions()
    group.allreduce_coalesced(pieces, opts).wait()
    group.allreduce_coalesced(alike, opts).wait()
    for found, wanted in zip(pieces, alike, strict=True):
        expect("pieces", found, wanted)
    product = torch.full((5,), 2.0, device=device)  # not one of our kernels'
    dist.all_reduce(product, dist.ReduceOp.PRODUCT)
    expect("product", product, torch.full((5,), 2.0**size))


def streams() -> None:
    """Results are in the order of the streams; works of CPU and GPU memory follow each other."""
    stream = torch.cuda.Stream(device)
    total = float(sum(range(1, size + 1)))
    with torch.cuda.stream(stream):
        tensor = torch.ones(200_000, device=device)
        for _ in range(10):
            tensor.mul_(2.0)
        tensor.mul_((rank + 1) / 1024.0)
        work = dist.all_reduce(tensor, async_op=True)
        work.wait()
        doubled = tensor * 2
    torch.cuda.synchronize(device)
    expect("doubled", doubled, torch.full((200_000,), 2 * total))
    works, tensors = [], []
    for index in range(12):
        place = device if index % 3 else torch.device("cpu")
        tensors.append(torch.full((1000 + index,), float(rank + 1), device=place))
        works.append(dist.all_reduce(tensors[-1], async_op=True))
    del tensors[1]  # memory of a work that nobody else knows
    torch.full((1001,), -1.0, device=device)
    for work in works:
        assert work.wait(timedelta(seconds=60))
        assert work.is_completed() and work.is_success() and work.exception() is None
    for tensor in tensors:
        expect("works", tensor, torch.full((tensor.numel(),), total))
    tensor = torch.full((100,), float(rank + 1), device=device)
    future = dist.all_reduce(tensor, async_op=True).get_future()
    expect("future", future.then(lambda done: done.value()[0] * 3).wait(), torch.full((100,), 3 * total))
    expect("result of the future", future.wait()[0], torch.full((100,), total))


def training() -> None:
    torch.manual_seed(1)
    layers = [layer for _ in range(3) for layer in (torch.nn.Linear(64, 64), torch.nn.ReLU())]
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(*layers).to(device), bucket_cap_mb=0.01)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(5):
        batch = values(64 * 8, torch.float32, step).view(8, 64).to(device)
        model(batch / 50.0).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = torch.cat([parameter.detach().flatten().cpu() for parameter in model.parameters()])
    theirs = weights.clone()
    dist.broadcast(theirs, 0)
    assert weights.isfinite().all()
    expect("weights of rank 0", weights, theirs)


def life() -> None:
    """Groups come and go; a part of the ranks; the end of one does not end the other."""
    for _ in range(3):
        group = dist.new_group()
        tensor = torch.ones(1000, device=device)
        dist.all_reduce(tensor, group=group)
        expect("group", tensor, torch.full((1000,), float(size)))
        dist.destroy_process_group(group)
    alone = [dist.new_group([member]) for member in range(size)][rank]
    tensor = torch.ones(10, device=device)
    dist.all_reduce(tensor)
    if number == "own":  # of one rank: the engine's
        dist.all_reduce(tensor, group=alone)
    expect("after", tensor, torch.full((10,), float(size)))


def graphs() -> None:
    tensor = torch.ones(1000, device=device)
    other = torch.ones(2000, device=device)
    large = torch.ones(8_000_000, device=device)
    dist.all_reduce(tensor)  # connects, and measures this type
    dist.all_reduce(large)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        dist.all_reduce(tensor)
        dist.all_reduce(other, async_op=True).wait()
        dist.all_reduce(large)
    for step in range(3):
        beside = torch.ones(500, device=device)
        work = dist.all_reduce(beside, async_op=True)
        graph.replay()
        work.wait()
        expect(f"beside replay {step}", beside, torch.full((500,), float(size)))
    for what, found, count in (("first", tensor, 4), ("second", other, 3), ("large", large, 4)):
        expect(what, found, torch.full((found.numel(),), float(size**count)))


def killed() -> None:
    """The last rank ends; the others show what they are told."""
    tensor = torch.ones(1000, device=device)
    dist.all_reduce(tensor)
    torch.cuda.synchronize(device)
    if rank == size - 1:
        print(json.dumps("gone"), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    told: Any = None
    try:
        for _ in range(100):
            dist.all_reduce(tensor)
            torch.cuda.synchronize(device)
    except dist.DistBackendError as error:
        told = [error.reason, error.rank]
    print(json.dumps(told), flush=True)
    os._exit(0)


CHECKS: dict[str, Callable[[], None]] = {
    name: found
    for name, found in list(globals().items())
    if name in ("operations", "streams", "training", "life", "graphs", "killed")
}
if check == "off":
    os.environ["LAUNCHER_CUDA_IPC"] = "0" if rank == 0 else "1"
    check = "streams"
torch.cuda.set_device(device)
store = dist.FileStore(f"{directory}/store", size)
dist.init_process_group("launcher", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
CHECKS[check]()
shown = dist.distributed_c10d._get_default_group().statistics()["gpu"]
dist.destroy_process_group()
print(json.dumps({"wrong": wrong, **shown}))
