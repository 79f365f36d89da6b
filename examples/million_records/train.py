"""Read digits off a million noisy images with numpy: each rank trains on its share of every batch, once an epoch.

    python -m launcher --nproc-per-node 2 examples/million_records/train.py

A network of one hidden layer, trained by momentum. ``launcher.data.Loader`` reads the records of the channel
``training`` (see ``prepare.py``; without one, a rank of each host makes the files), and ``launcher.Communicator`` adds
up the gradients. Rank 0 saves a checkpoint every ``--save-every`` steps: killed at any moment, the job goes on from the
last one, with any number of ranks, and no record is left out or comes twice.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from prepare import RECORD, RECORDS, write_records

import launcher
from launcher.data import Loader

HIDDEN = 64
CLASSES = 10
SHAPES = ((64, HIDDEN), (HIDDEN,), (HIDDEN, CLASSES), (CLASSES,))
MOMENTUM = 0.9


def parse_arguments(ctx: launcher.Context) -> argparse.Namespace:
    """Read the hyperparameters; directories default to those of the job."""
    parser = argparse.ArgumentParser(description="Train on a million noisy digits.")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--batch-size", type=int, default=512, help="images per step, over all ranks together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--records", type=int, default=RECORDS, help="when they are made here")
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--log-records", type=Path, help="a folder: each rank writes down which record came when")
    parser.add_argument("--data", type=Path, default=ctx.channels.get("training"), help="instead of channel 'training'")
    return parser.parse_args()


def find_data(ctx: launcher.Context, comm: launcher.Communicator, args: argparse.Namespace) -> Path:
    """Return the directory of the records; one rank of each host makes it when the job brought none."""
    if args.data is not None:
        return Path(args.data)
    place = Path(ctx.model_dir).absolute().parent / "input" / "data" / "training"
    if ctx.local_rank == 0 and not list(place.glob("*.rec")):
        print(f"no channel 'training' in this job: writing {args.records} records to {place}", flush=True)
        write_records(place, args.records)
    comm.barrier()
    return place


class Network:
    """64 -> HIDDEN (tanh) -> CLASSES (softmax); all parameters in one flat float32 vector."""

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.cuts = np.cumsum([int(np.prod(shape)) for shape in SHAPES])
        self.flat = random.normal(0, 0.1, self.cuts[-1]).astype(np.float32)

    def parts(self, flat: np.ndarray) -> list[np.ndarray]:
        """Views of ``flat`` in the shapes of the parameters."""
        return [part.reshape(shape) for part, shape in zip(np.split(flat, self.cuts[:-1]), SHAPES, strict=True)]

    def learn(self, images: np.ndarray, labels: np.ndarray, gradient: np.ndarray) -> float:
        """Put the mean gradient of a batch into ``gradient``; return the share of images that were read correctly."""
        w1, b1, w2, b2 = self.parts(self.flat)
        hidden = np.tanh(images @ w1 + b1)
        scores = hidden @ w2 + b2
        right = float((scores.argmax(axis=1) == labels).mean())
        error = np.exp(scores - scores.max(axis=1, keepdims=True))
        error /= error.sum(axis=1, keepdims=True)
        error[np.arange(len(labels)), labels] -= 1
        error /= len(labels)
        back = error @ w2.T * (1 - hidden**2)
        for target, part in zip(
            self.parts(gradient), (images.T @ back, back.sum(axis=0), hidden.T @ error, error.sum(axis=0)), strict=True
        ):
            target[...] = part
        return right


class Checkpoint:
    """Parameters, momentum, and where the loader stands, in one file."""

    def __init__(self, directory: str) -> None:
        self.path = Path(directory) / "digits.npz"

    def save(self, network: Network, speed: np.ndarray, loader: dict[str, Any]) -> None:
        """Write it such that the file is either the old or the new one, whenever the job is killed."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.partial.npz")
        np.savez(partial, flat=network.flat, speed=speed, loader=json.dumps(loader))
        os.replace(partial, self.path)

    def load(self, network: Network, speed: np.ndarray) -> dict[str, Any] | None:
        """Take it up, if there is one; return the loader's state."""
        if not self.path.exists():
            return None
        with np.load(self.path) as saved:
            network.flat[:], speed[:] = saved["flat"], saved["speed"]
            state: dict[str, Any] = json.loads(str(saved["loader"]))
            return state


def main() -> None:
    """Train to the last epoch, and save."""
    ctx = launcher.init()
    args = parse_arguments(ctx)
    with launcher.Communicator() as comm:
        folder = find_data(ctx, comm, args)
        loader = Loader(
            folder,
            max(1, args.batch_size // ctx.world_size),
            format="recordio",
            seed=args.seed,
            record_numbers=args.log_records is not None,
        )
        train(ctx, args, comm, loader)


def unpack(batch: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return images (0..1) and labels of a batch."""
    records = batch["data"].values.view(RECORD)
    return records["image"].astype(np.float32) / 16, records["label"]


def train(ctx: launcher.Context, args: argparse.Namespace, comm: launcher.Communicator, loader: Loader) -> None:
    """Train from the checkpoint on, if there is one."""
    network = Network(args.seed)
    speed = np.zeros_like(network.flat)
    gradient = comm.empty(network.flat.shape)
    checkpoint = Checkpoint(ctx.checkpoint_dir)
    state = checkpoint.load(network, speed)
    if state is not None:
        loader.load_state_dict(state)
        if ctx.rank == 0:
            print(f"resumed in epoch {loader.epoch + 1}, record {state['position']}", flush=True)
    log = None
    if args.log_records is not None:
        log = (args.log_records / f"{os.getpid()}").open("w", buffering=1)
    accuracy = 0.0
    while loader.epoch < args.epochs:
        began, right, steps = time.monotonic(), 0.0, 0
        for batch in loader:
            images, labels = unpack(batch)
            right += network.learn(images, labels, gradient)
            comm.allreduce(gradient, "average")
            speed *= MOMENTUM
            speed -= args.lr * gradient
            network.flat += speed
            steps += 1
            state = loader.state_dict()
            if log is not None:
                log.write(json.dumps([state["epoch"], state["position"], batch["record"].tolist()]) + "\n")
            if ctx.rank == 0 and steps % args.save_every == 0:
                checkpoint.save(network, speed, state)
        accuracy = right / max(1, steps)
        if ctx.rank == 0:
            checkpoint.save(network, speed, loader.state_dict())
            rate = steps * loader.batch_size * ctx.world_size / (time.monotonic() - began)
            print(f"epoch {loader.epoch}/{args.epochs} accuracy={accuracy:.4f} ({rate:.0f} images/s)", flush=True)
    if ctx.rank == 0:
        model_dir = Path(ctx.model_dir)
        model_dir.mkdir(parents=True, exist_ok=True)
        w1, b1, w2, b2 = network.parts(network.flat)
        np.savez(model_dir / "model.npz", w1=w1, b1=b1, w2=w2, b2=b2)
        metrics = {"accuracy": accuracy, "records": loader.records, "world_size": ctx.world_size}
        (model_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")


if __name__ == "__main__":
    main()
