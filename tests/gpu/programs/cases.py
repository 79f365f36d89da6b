"""What the ranks of the tests do with IpcAllreduce; the CPU's group says what must come out, to the bit."""

from __future__ import annotations

from typing import Any

import torch

from launcher.collectives.cuda_ipc import ALGORITHMS, OPERATIONS, TYPES, IpcAllreduce
from launcher.collectives.elements import FLOATING, SIZES, DType, ReduceOp

COUNTS = (1, 7, 1024, 4099, 70_001)


def torch_type(dtype: DType) -> torch.dtype:
    found: torch.dtype = getattr(torch, dtype.name)
    return found


def values(rank: int, count: int, dtype: DType, seed: int) -> torch.Tensor:
    """This rank's input, on the CPU."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    if dtype in FLOATING:
        return torch.randn(count, generator=generator, dtype=torch.float32).mul_(3.0).to(torch_type(dtype))
    return torch.randint(-(2**31), 2**31 - 1, (count,), generator=generator).to(torch_type(dtype))


def expected(group: Any, source: torch.Tensor, dtype: DType, op: ReduceOp, scale: float) -> torch.Tensor:
    """The same on shared memory."""
    target = torch.empty_like(source)
    if op == ReduceOp.AVERAGE:
        op, scale = ReduceOp.SUM, scale / group.size
    group.allreduce(source.data_ptr(), target.data_ptr(), source.numel(), int(dtype), int(op), 1.0, scale)
    return target


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(first.cpu().view(torch.uint8), second.cpu().view(torch.uint8))


def run_matrix(group: Any, device: int, order: str) -> dict[str, Any]:
    """Types x operations x ways x counts, in changing order of sizes; returns how many, and what was wrong."""
    wrong = []
    done = 0
    torch.cuda.set_device(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        ipc = IpcAllreduce(group, device, staging_bytes=1 << 18, shared_bytes=1 << 21, timeout_s=20.0, order=order)
        shared = torch.as_tensor(ipc.allocate(1 << 20), device=f"cuda:{device}")
        for dtype in TYPES:
            for op in OPERATIONS:
                if op == ReduceOp.AVERAGE and dtype not in FLOATING:
                    continue
                for algorithm in ALGORITHMS:
                    for count in COUNTS:
                        scale = 0.5 if dtype in FLOATING and op == ReduceOp.SUM else 1.0
                        shift = done % 2
                        source = values(group.rank, count + shift, dtype, done)[shift:].clone()
                        target = expected(group, source, dtype, op, scale)
                        if algorithm == "in_place":
                            gpu = shared[256 : 256 + count * SIZES[dtype]].view(torch_type(dtype))
                            gpu.copy_(source)
                            ipc.allreduce(gpu, op=op, scale=scale)
                            result = gpu
                        else:
                            room = torch.empty(count + shift, dtype=source.dtype, device=f"cuda:{device}")
                            gpu = room[shift:]  # not at a multiple of 16 bytes, every other time
                            gpu.copy_(source)
                            result = gpu if done % 3 else torch.empty_like(gpu)
                            ipc.allreduce(gpu, result, op, scale=scale, algorithm=algorithm)
                        ipc.synchronize()
                        done += 1
                        if not same_bits(result, target):
                            wrong.append([dtype.name, op.name, algorithm, count])
        found = {"order": ipc.order, "done": done, "wrong": wrong, "per_device": ipc.ranks_per_device}
        ipc.close()
    return found
