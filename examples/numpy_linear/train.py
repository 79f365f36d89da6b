"""Linear regression on real data with numpy alone: each rank reads its share, the ranks add up what they found.

    python -m launcher --nproc-per-node 2 examples/numpy_linear/train.py

Least squares needs only X'X and X'y, and those of the whole data are the sums of those of the shares. So every
rank sends its own to rank 0 over TCP, gets the sum back, and solves; the result is that of one process reading it all.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import time
from pathlib import Path

import numpy as np

import launcher

JOIN_LIMIT_S = 30.0


def receive(connection: socket.socket, length: int) -> np.ndarray:
    """Read exactly ``length`` float64 values."""
    with connection.makefile("rb") as stream:
        data = stream.read(8 * length)
    if len(data) != 8 * length:
        raise ConnectionError(f"a peer left after {len(data)} of {8 * length} bytes")
    return np.frombuffer(data)


def connect(address: tuple[str, int]) -> socket.socket:
    """Connect to rank 0, which may have started a moment later than this rank."""
    deadline = time.monotonic() + JOIN_LIMIT_S
    while True:
        try:
            return socket.create_connection(address, timeout=JOIN_LIMIT_S)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.005)


def sum_over_ranks(values: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """Return the sum of ``values`` over all ranks, on every rank; rank 0 listens at MASTER_ADDR:MASTER_PORT."""
    if world_size == 1:
        return values
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if rank > 0:
        with connect(address) as connection:
            connection.sendall(values.tobytes())
            return receive(connection, values.size)
    with socket.create_server(address, backlog=world_size) as server:
        server.settimeout(JOIN_LIMIT_S)
        peers = [server.accept()[0] for _ in range(world_size - 1)]
    total = values + sum(receive(peer, values.size) for peer in peers)
    for peer in peers:
        peer.sendall(total.tobytes())
        peer.close()
    return total


def main() -> None:
    """Fit, measure on the rows left out, and save (rank 0)."""
    ctx = launcher.init()
    parser = argparse.ArgumentParser(description="Linear regression over all ranks.")
    parser.add_argument("--ridge", type=float, default=0.1, help="weight of the squared coefficients")
    args = parser.parse_args()

    folder = Path(ctx.channels.get("training", Path(__file__).parent / "data"))
    table = np.loadtxt(folder / "diabetes.csv", delimiter=",", skiprows=1)
    held_out = np.arange(len(table)) % 5 == 0
    train, test = table[~held_out], table[held_out]
    mean, spread = train.mean(axis=0), train.std(axis=0)

    mine = (train[ctx.rank :: ctx.world_size] - mean) / spread
    x, y = mine[:, :-1], mine[:, -1]
    width = x.shape[1]
    found = sum_over_ranks(np.append(x.T @ x, x.T @ y), ctx.rank, ctx.world_size)
    ctx.step(samples=len(mine))
    print(f"rank {ctx.rank} of {ctx.world_size}: fitted {len(mine)} of {len(train)} rows", flush=True)

    gram, moment = found[:-width].reshape(width, width), found[-width:]
    weights = np.linalg.solve(gram + args.ridge * np.eye(width), moment)
    predicted = ((test[:, :-1] - mean[:-1]) / spread[:-1]) @ weights * spread[-1] + mean[-1]
    residual = ((test[:, -1] - predicted) ** 2).sum()
    r2 = float(1 - residual / ((test[:, -1] - test[:, -1].mean()) ** 2).sum())

    if ctx.rank == 0:
        model_dir = Path(ctx.model_dir)
        model_dir.mkdir(parents=True, exist_ok=True)
        np.savez(model_dir / "model.npz", weights=weights, mean=mean, spread=spread)
        metrics = {"r2": r2, "rows": len(train), "ridge": args.ridge, "data": str(folder), "world_size": ctx.world_size}
        (model_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        print(f"R2 on {len(test)} held-out rows: {r2:.3f}; model in {model_dir}", flush=True)


if __name__ == "__main__":
    main()
