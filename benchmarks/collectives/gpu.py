"""What this machine's GPU gives: packing of gradients as a share of its copy rate, and allreduce by CUDA IPC.

    python benchmarks/collectives/gpu.py [--quick] [--out FILE.json]

Says so, and ends with code 0, where there is no GPU. Times are of work on the GPU, between CUDA events around replays
of a CUDA graph: the host's time to launch is not in them. One GPU can show this much:

- packing and unpacking: bytes read and written per second, against a copy of float32 of this GPU in the same run, and
  against torch's own way (``_foreach_mul`` and ``_foreach_copy_``);
- kernels of the allreduce: ranks as threads of one process, a stream each, so that they run beside each other;
- NCCL: ranks as processes, which NCCL 2.30 and newer lets share a GPU (NCCL_MULTI_RANK_GPU_ENABLE=1); without the MPS
  daemon they take turns by time slices, so that its times there say little. Ours are shown in the same setting too.
- ``dist.all_reduce`` of a script: backend "launcher" on one GPU, and where there are several, with a GPU for each rank,
  against backend "nccl". Up to which size ours took the call is shown with it.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # ranks as threads: a queue for each stream

MEBI = 1 << 20
SIZES = [1 << 10, 8 << 10, 64 << 10, 256 << 10, MEBI, 4 * MEBI, 25 * MEBI, 100 * MEBI]
STAGED = 8 * MEBI  # the largest message of the ways that copy first
CALLS = 20  # in a graph
CAPTURE = threading.Lock()  # one capture at a time


def resnet50() -> list[int]:
    """Elements of the 161 parameters of ResNet-50: convolutions, batch norms, and the layer at the end."""
    sizes = [64 * 3 * 49, 64, 64]
    inside = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            out = 4 * width
            sizes += [width * inside, width, width, width * width * 9, width, width, out * width, out, out]
            if block == 0:
                sizes += [out * inside, out, out]
            inside = out
    return [*sizes, 1000 * 2048, 1000]


def bert_large() -> list[int]:
    """Elements of the parameters of BERT-large's embeddings and 24 layers."""
    hidden, inner = 1024, 4096
    layer = [hidden * hidden, hidden] * 4 + [
        hidden,
        hidden,
        inner * hidden,
        inner,
        hidden * inner,
        hidden,
        hidden,
        hidden,
    ]
    return [30522 * hidden, 512 * hidden, 2 * hidden, hidden, hidden, *(layer * 24)]


LISTS = {"25 x 1 Mi": lambda: [MEBI] * 25, "ResNet-50": resnet50, "BERT-large": bert_large}


def microseconds(torch: Any, work: Callable[[], object], repeats: int, calls: int = CALLS) -> float:
    """Of one call of ``work``: the median over replays of a graph of ``calls`` of them, on the current stream."""
    work()  # what is loaded or allocated once
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            work()
    times = []
    for number in range(repeats + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if number:
            times.append(1e3 * begin.elapsed_time(end) / calls)
    return statistics.median(times)


def measure_copy(torch: Any, repeats: int) -> float:
    """GB/s, read and written, of a copy of 256 MiB between different memory: what a streaming kernel can reach."""
    source = torch.randn(64 * MEBI, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / microseconds(torch, lambda: target.copy_(source), repeats) / 1e3


def measure_packing(torch: Any, copy: float, repeats: int) -> list[dict[str, Any]]:
    """Each list of tensors, packed to float32 and bfloat16 and back."""
    from launcher.collectives.cuda import Compressor, GradientBucket
    from launcher.collectives.elements import DType

    rows = []
    for name, sizes in LISTS.items():
        tensors = [torch.randn(size, device="cuda") for size in sizes()]
        count = sum(tensor.numel() for tensor in tensors)
        for dtype, element in ((DType.float32, 4), (DType.bfloat16, 2)):
            kind = getattr(torch, dtype.name)
            best: dict[str, float] = {}
            for chunk in (8192, 16384, 32768, 65536):
                bucket = GradientBucket(tensors, dtype, chunk=chunk)
                packed = torch.zeros(bucket.count, dtype=kind, device="cuda")
                pack = functools.partial(bucket.pack, tensors, packed, 0.5)
                unpack = functools.partial(bucket.unpack, packed, tensors, 0.5)
                for way, work in (("pack", pack), ("unpack", unpack)):
                    time = microseconds(torch, work, repeats)
                    if time < best.get(way, float("inf")):
                        best[way], best[way + " chunk"] = time, chunk
            views = [
                packed[offset : offset + tensor.numel()] for offset, tensor in zip(bucket.offsets, tensors, strict=True)
            ]

            def of_torch(views: Sequence[Any] = views, tensors: Sequence[Any] = tensors) -> None:
                torch._foreach_copy_(views, torch._foreach_mul(tensors, 0.5))

            torchs = microseconds(torch, of_torch, repeats, 2)
            moved = count * (4 + element)
            for way in ("pack", "unpack"):
                rate = moved / best[way] / 1e3
                rows.append(
                    {
                        "what": f"{way} {name}, {len(tensors)} tensors of float32, {dtype.name} bucket",
                        "us": best[way],
                        "gb_s": rate,
                        "share_of_copy": rate / copy,
                        "chunk": best[way + " chunk"],
                        "torch_us": torchs if way == "pack" else None,
                    }
                )
            del packed, views
        del tensors
        torch.cuda.empty_cache()
    count = 25 * MEBI
    source, error = torch.randn(count, device="cuda"), torch.zeros(count, device="cuda")
    wire = torch.empty(count, dtype=torch.bfloat16, device="cuda")
    kept = Compressor(DType.bfloat16, error)
    for what, moved, work in (
        ("compress to bfloat16, error kept", 14 * count, lambda: kept.compress(source, wire)),
        ("decompress", 6 * count, lambda: kept.decompress(wire, source)),
    ):
        time = microseconds(torch, work, repeats)
        rate = moved / time / 1e3
        rows.append({"what": f"{what}, 100 MiB of float32", "us": time, "gb_s": rate, "share_of_copy": rate / copy})
    return rows


def time_graph(torch: Any, group: Any, ipc: Any, work: Callable[[], object], repeats: int) -> float:
    """As :func:`microseconds`, for ranks that wait for each other: all capture, then all replay."""
    graph = torch.cuda.CUDAGraph()
    with CAPTURE:
        torch.cuda.current_stream().synchronize()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
            for _ in range(CALLS):
                work()
    group.barrier()
    times = []
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for number in range(repeats + 1):
        group.barrier()
        begin.record()
        graph.replay()
        end.record()
        ipc.synchronize()
        if number:
            times.append(1e3 * begin.elapsed_time(end) / CALLS)
    return statistics.median(times)


def thread_rank(torch: Any, directory: str, rank: int, size: int, repeats: int, rows: list[dict[str, Any]]) -> None:
    """One rank of the measurement by flags; rank 0 fills ``rows``."""
    from launcher._native import LocalGroup
    from launcher.collectives.cuda_ipc import IpcAllreduce
    from launcher.collectives.elements import DType, ReduceOp

    group = LocalGroup(directory, f"gpu-{size}", rank, size, timeout_s=120.0)
    with torch.cuda.stream(torch.cuda.Stream()):
        ipc = IpcAllreduce(group, 0, staging_bytes=STAGED, shared_bytes=max(SIZES), timeout_s=20.0)
        shared = torch.as_tensor(ipc.allocate(max(SIZES)), device="cuda:0")
        shared.view(torch.float32).normal_()
        private = torch.randn(STAGED // 4, device="cuda")
        average = ReduceOp.AVERAGE  # call after call, the values stay in range
        group.barrier()
        for nbytes in SIZES:
            row: dict[str, Any] = {"ranks": size, "bytes": nbytes}
            inside = shared[:nbytes].view(torch.float32)
            ways: dict[str, Callable[[], object]] = {"in_place": functools.partial(ipc.allreduce, inside, op=average)}
            if nbytes <= STAGED:
                tensor = private[: nbytes // 4]
                for way in ("one_shot", "two_shot"):
                    ways[way] = functools.partial(ipc.allreduce, tensor, op=average, algorithm=way)
            for way, work in ways.items():
                row[way] = time_graph(torch, group, ipc, work, repeats)
            if rank == 0:
                # Both ranks' reads and writes of a message in place: 2 N each way for two ranks, and so on.
                row["in_place_gb_s"] = 2 * size * nbytes / row["in_place"] / 1e3
                rows.append(row)
        crossover = ipc.tune(DType.float32, sizes=[nbytes for nbytes in SIZES if nbytes <= STAGED])
        if rank == 0:
            print(f"{size} ranks: one_shot up to {crossover.one_shot_bytes} bytes, as launched from Python")
        ipc.close()
    group.close()


def measure_threads(torch: Any, size: int, repeats: int) -> list[dict[str, Any]]:
    """The kernels of ``size`` ranks beside each other on one GPU."""
    rows: list[dict[str, Any]] = []
    errors: list[BaseException] = []

    def run(directory: str, rank: int) -> None:
        try:
            thread_rank(torch, directory, rank, size, repeats, rows)
        except BaseException as error:  # shown by the thread that waits
            errors.append(error)

    with tempfile.TemporaryDirectory() as directory:
        threads = [threading.Thread(target=run, args=(directory, rank)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return rows


def process_rank(engine: str, directory: str, rank: int, size: int, port: int, repeats: int, own: bool) -> None:
    """One rank, a process, of a measurement by host calls; rank 0 prints its rows.

    Engines: nccl and launcher by ``dist.all_reduce``, ipc by our kernels alone. ``own``: a GPU for each rank.
    """
    import torch
    import torch.distributed as dist

    from launcher._native import LocalGroup
    from launcher.collectives.cuda_ipc import IpcAllreduce

    device = rank if own else 0
    torch.cuda.set_device(device)
    group = LocalGroup(directory, engine, rank, size, timeout_s=120.0)
    ipc = None
    if engine == "ipc":
        ipc = IpcAllreduce(group, device, staging_bytes=STAGED)
    else:
        if engine == "nccl" and not own:
            os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
        if engine == "launcher":
            import launcher.collectives.torch_backend  # noqa: F401
        dist.init_process_group(engine, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    rows = []
    for nbytes in [size_ for size_ in SIZES if size_ <= STAGED or own]:
        tensor = torch.zeros(nbytes // 4, device=f"cuda:{device}")

        def work(tensor: Any = tensor) -> None:
            if ipc is None:
                dist.all_reduce(tensor)
            else:
                ipc.allreduce(tensor, algorithm="one_shot" if tensor.nbytes <= STAGED else "two_shot")

        work()  # what is made or measured once
        times = []
        for number in range(repeats + 1):
            torch.cuda.synchronize()
            group.barrier()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(CALLS):
                work()
            end.record()
            end.synchronize()
            if number:
                times.append(1e3 * begin.elapsed_time(end) / CALLS)
        rows.append({"bytes": nbytes, "us": statistics.median(times)})
    if engine == "launcher":
        told = dist.distributed_c10d._get_default_group().statistics()["gpu"]
        rows.append({"ours up to": told["bytes_up_to"].get("float32", {}).get("two_shot", 0), "calls": told["calls"]})
    group.barrier()
    if rank == 0:
        print(json.dumps(rows), flush=True)
    if ipc is None:
        dist.destroy_process_group()
    else:
        ipc.close()
    group.close()


def measure_processes(engine: str, size: int, repeats: int, own: bool) -> tuple[list[dict[str, Any]], str]:
    """Rows of rank 0, or none and the last line of what a rank said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, __file__, "--rank-of", engine, "--directory", directory, "--port", str(port)]
        command += ["--size", str(size), "--repeats", str(repeats), *(["--own"] if own else [])]
        ranks = [
            subprocess.Popen([*command, "--rank", str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for rank in range(size)
        ]
        said = []
        try:
            for process in ranks:
                said.append(process.communicate(timeout=240))
        except subprocess.TimeoutExpired:
            return [], "no answer in 240 s"
        finally:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
                    process.communicate()
        for process, (_, err) in zip(ranks, said, strict=True):
            if process.returncode != 0:
                lines = [line for line in err.splitlines() if line.strip()]
                return [], lines[-1] if lines else f"exit code {process.returncode}"
        return json.loads(said[0][0].splitlines()[-1]), ""


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """A table on stdout."""
    print(f"\n## {title}\n")
    if not rows:
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    print("| " + " | ".join(names) + " |")
    print("|" + "---|" * len(names))
    for row in rows:
        cells = [row.get(name) for name in names]
        print("| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell or "") for cell in cells) + " |")


def main() -> int:
    """Run everything that this machine allows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repeats: to see that it works, not to publish")
    parser.add_argument("--out", type=Path, help="writes all rows as JSON")
    for name in ("--rank-of", "--directory"):
        parser.add_argument(name, default="", help=argparse.SUPPRESS)
    for name in ("--rank", "--size", "--port", "--repeats"):
        parser.add_argument(name, type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--own", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        process_rank(args.rank_of, args.directory, args.rank, args.size, args.port, args.repeats, args.own)
        return 0

    from launcher.collectives.cuda import find_devices

    devices, reason = find_devices()
    if not devices:
        print(f"no GPU on this machine: {reason}; nothing was measured")
        return 0
    try:
        import torch
    except ImportError:
        print("torch is not installed: it holds the arrays of this benchmark; nothing was measured")
        return 0
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} does not see the GPU; nothing was measured")
        return 0
    repeats = 3 if args.quick else 15
    found: dict[str, Any] = {
        "device": devices[0]["name"],
        "torch": torch.__version__,
        "nccl": torch.cuda.nccl.version(),
    }
    print(f"{found['device']}, torch {found['torch']}, NCCL {'.'.join(map(str, found['nccl']))}")
    # Processes first: this one then has no kernels of its own on the GPU beside them.
    layouts = [(2, False)] + [(size, True) for size in (2, 4, 8) if size <= len(devices)]
    for size, own in layouts:
        where = "a GPU each" if own else "on one GPU"
        for engine in ("nccl", "ipc", "launcher"):
            rows, why = measure_processes(engine, size, repeats, own)
            found[f"processes_{engine}_{size}{'_own' if own else ''}"] = rows or why
            show(f"{engine}, {size} processes {where}, us" + (f": not measured: {why}" if why else ""), rows)
    if len(devices) < 2:
        print("\nbackend launcher against NCCL, a GPU for each rank: not measured, it takes two GPUs")
    found["copy_gb_s"] = measure_copy(torch, repeats)
    print(f"\ncopy of float32: {found['copy_gb_s']:.0f} GB/s, read and written")
    found["packing"] = measure_packing(torch, found["copy_gb_s"], repeats)
    show("Packing and compression", found["packing"])
    found["threads"] = [row for size in (2, 4) for row in measure_threads(torch, size, repeats)]
    show("Allreduce of float32 by CUDA IPC's kernels, ranks as threads on one GPU, us", found["threads"])
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
