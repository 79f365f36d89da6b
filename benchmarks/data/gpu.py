"""What a loader gives on this machine's GPU, as a share of what the hardware does in the same run.

    python benchmarks/data/gpu.py [--quick] [--data DIR] [--out FILE.json]

Says so, and ends with code 0, where there is no GPU.

- *copied* (``device="cuda"``): bytes of batches that arrive on the device per second, by the host's clock around whole
  batches with the GPU idle at both ends, against the fastest copy of pinned memory of 1 to 256 MiB over the same way
  (PCIe). Files are in the page cache. ``torch``: the same batches by DataLoader with ``pin_memory`` and ``.to()``.
- *cached* (``device_cache=True``): bytes that the gather kernel reads and writes per second, between CUDA events around
  replays of a CUDA graph, against a copy of 256 MiB of this GPU by torch; and ``torch.index_select`` on the same rows.
  The numbers of the rows are read too, and not counted. What a batch costs with the host's part is shown with it.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

MEBI = 1 << 20
CALLS = 20  # in a graph
# Bytes of a record, records of a batch.
BATCHES = [(1024, 256), (1024, 8192), (3072, 512), (102_400, 64), (602_112, 64)]
# Bytes of a row: a label, short rows, MNIST, what goes by 8, 16, 2 and 1 bytes, and long ones.
ROWS = [8, 64, 256, 784, 1016, 1024, 1026, 1027, 4096, 102_400, 602_112]


def microseconds(torch: Any, work: Callable[[], object], repeats: int) -> float:
    """Of one call of ``work``: the median over replays of a graph of CALLS of them."""
    work()  # what is loaded or allocated once
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            work()
    times = []
    for number in range(repeats + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if number:
            times.append(1e3 * begin.elapsed_time(end) / CALLS)
    return statistics.median(times)


def measure_pcie(torch: Any, repeats: int) -> float:
    """GB/s of the fastest copy from pinned memory to the GPU."""
    best = 0.0
    for nbytes in (MEBI, 4 * MEBI, 16 * MEBI, 64 * MEBI, 256 * MEBI):
        source = torch.ones(nbytes, dtype=torch.uint8).pin_memory()
        target = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        calls = max(1, 256 * MEBI // nbytes)
        times = []
        for number in range(repeats + 1):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(calls):
                target.copy_(source, non_blocking=True)
            end.record()
            end.synchronize()
            if number:
                times.append(begin.elapsed_time(end) / 1e3)
        best = max(best, calls * nbytes / statistics.median(times) / 1e9)
    return best


def measure_copy(torch: Any, repeats: int) -> float:
    """GB/s, read and written, of a copy of 256 MiB inside the GPU's memory."""
    source = torch.ones(256 * MEBI, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / microseconds(torch, lambda: target.copy_(source), repeats) / 1e3


def make_data(folder: Path, record_bytes: int, total: int) -> Path:
    """A folder with one .npy of records of float32, written once, and read to have it in the page cache."""
    import numpy

    path = folder / f"records-{record_bytes}-{total}"
    if not path.exists():
        path.mkdir(parents=True)
        records = total // record_bytes
        array: Any = numpy.lib.format.open_memmap(
            path / "records.npy", "w+", numpy.float32, (records, record_bytes // 4)
        )
        array[...] = numpy.arange(records, dtype=numpy.float32)[:, None]
        array.flush()
    with (path / "records.npy").open("rb") as stream:
        while stream.read(16 * MEBI):
            pass
    return path


def rate_of(
    torch: Any, epoch: Callable[[], Iterator[dict[str, Any]]], seconds: float, repeats: int
) -> tuple[float, float]:
    """GB/s and microseconds of a batch: the median of ``repeats`` windows of about ``seconds``, epoch after epoch."""
    batches = epoch()

    def run(limit_s: float) -> tuple[float, float]:
        nonlocal batches
        torch.cuda.synchronize()
        begin = time.perf_counter()
        nbytes = count = 0
        while time.perf_counter() - begin < limit_s:
            batch = next(batches, None)
            if batch is None:
                batches = epoch()
                continue
            nbytes += sum(column.nbytes for column in batch.values())
            count += 1
        torch.cuda.synchronize()
        spent = time.perf_counter() - begin
        return nbytes / spent / 1e9, 1e6 * spent / max(1, count)

    run(seconds / 2)
    windows = [run(seconds) for _ in range(repeats)]
    return statistics.median(rate for rate, _ in windows), statistics.median(time_us for _, time_us in windows)


def measure_loaders(torch: Any, folder: Path, pcie: float, total: int, repeats: int) -> list[dict[str, Any]]:
    """Both ways of the loader, and torch's DataLoader, over sets of records of several lengths."""
    import numpy

    from launcher.data import Loader

    rows = []
    for record_bytes, batch in BATCHES:
        path = make_data(folder, record_bytes, total)
        row: dict[str, Any] = {"record bytes": record_bytes, "batch": batch, "batch MB": record_bytes * batch / 1e6}
        for name, given in (
            ("copied", {}),
            ("copied, 2 threads", {"threads": 2}),
            ("cached", {"device_cache": True}),
        ):
            with Loader(path, batch, device="cuda", progress=False, **given) as loader:
                rate, time_us = rate_of(torch, functools.partial(iter, loader), 1.0, repeats)
            row[f"{name} GB/s"], row[f"{name} us"] = rate, time_us
            if name != "cached":
                row[f"{name} share of PCIe"] = rate / pcie
        array = numpy.load(path / "records.npy", mmap_mode="c")
        dataset = torch.utils.data.TensorDataset(torch.from_numpy(array))
        sampler = torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(dataset), batch, True)
        peer = torch.utils.data.DataLoader(dataset, sampler=sampler, batch_size=None, pin_memory=True)

        def epoch(peer: Any = peer) -> Iterator[dict[str, Any]]:
            return ({"values": values.to("cuda", non_blocking=True)} for (values,) in peer)

        row["torch GB/s"], row["torch us"] = rate_of(torch, epoch, 1.0, repeats)
        rows.append(row)
    return rows


def measure_gather(torch: Any, copy: float, repeats: int, total: int) -> list[dict[str, Any]]:
    """The two kernels of a batch, over rows of several lengths: in large batches, and in one of 256."""
    from launcher._data import Order
    from launcher._native import CudaGather

    found = []
    for row_bytes in ROWS:
        records = total // row_bytes
        source = torch.zeros((records, row_bytes), dtype=torch.uint8, device="cuda")
        gather = CudaGather(records, [source.data_ptr()], [row_bytes], torch.cuda.current_device())
        order = Order(1, 1, 0, records)
        table = torch.frombuffer(bytearray(order.table or b"\0\0"), dtype=torch.int16).cuda()
        gather.set_order(order.network, table.data_ptr() if order.table else 0)
        for rows in sorted({min(256, records), max(1, min(records, 256 * MEBI // row_bytes))}):
            numbers = torch.empty(rows, dtype=torch.int64, device="cuda")
            target = torch.empty((rows, row_bytes), dtype=torch.uint8, device="cuda")

            def number(gather: Any = gather, numbers: Any = numbers, rows: int = rows) -> None:
                gather.number(numbers.data_ptr(), 0, 0, rows, rows, torch.cuda.current_stream().cuda_stream)

            def copy_rows(gather: Any = gather, numbers: Any = numbers, target: Any = target) -> None:
                stream = torch.cuda.current_stream().cuda_stream
                gather.gather([target.data_ptr()], numbers.data_ptr(), len(numbers), stream)

            def of_torch(source: Any = source, numbers: Any = numbers, target: Any = target) -> None:
                torch.index_select(source, 0, numbers, out=target)

            number_us = microseconds(torch, number, repeats)
            gather_us = microseconds(torch, copy_rows, repeats)
            rate = 2 * rows * row_bytes / gather_us / 1e3
            found.append(
                {
                    "row bytes": row_bytes,
                    "rows": rows,
                    "order us": number_us,
                    "order ns a row": 1e3 * number_us / rows,
                    "gather us": gather_us,
                    "gather GB/s": rate,
                    "share of copy": rate / copy,
                    "index_select us": microseconds(torch, of_torch, repeats),
                }
            )
        del source
        torch.cuda.empty_cache()
    return found


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """A table on stdout."""
    print(f"\n## {title}\n")
    names = list(dict.fromkeys(name for row in rows for name in row))
    print("| " + " | ".join(names) + " |")
    print("|" + "---|" * len(names))
    for row in rows:
        cells = [row.get(name) for name in names]
        print("| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |")


def main() -> int:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="little data, few repeats: to see that it works")
    parser.add_argument("--data", type=Path, help="where the records are made and kept (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="writes all rows as JSON")
    args = parser.parse_args()

    from launcher._native import cuda_devices

    devices, reason = cuda_devices()
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
    repeats, total = (3, 256 * MEBI) if args.quick else (9, 1024 * MEBI)
    found: dict[str, Any] = {"device": devices[0]["name"], "torch": torch.__version__}
    found["pcie_gb_s"], found["copy_gb_s"] = measure_pcie(torch, repeats), measure_copy(torch, repeats)
    print(f"{found['device']}, torch {found['torch']}")
    print(f"pinned memory to the GPU: {found['pcie_gb_s']:.1f} GB/s")
    print(f"copy inside the GPU: {found['copy_gb_s']:.0f} GB/s, read and written")
    found["gather"] = measure_gather(torch, found["copy_gb_s"], repeats, 4 * total)
    show("Kernels of device_cache", found["gather"])
    with tempfile.TemporaryDirectory() as folder:
        found["loaders"] = measure_loaders(torch, args.data or Path(folder), found["pcie_gb_s"], total, repeats)
    show("Batches on the GPU", found["loaders"])
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
