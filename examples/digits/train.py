"""Train a small convolutional network on handwritten digits, data-parallel over all ranks of the job.

    python -m launcher --nproc-per-node 2 examples/digits/train.py --epochs 12

The images come from the channel ``training`` (``train.npy`` and ``test.npy``, see ``prepare.py``); when the job has no
such channel, one rank of each host makes the files in the place where the channel would be. ``launcher.data.Loader``
gives each rank its share of every batch. Rank 0 writes ``model.pt``, ``metrics.json`` and the code that serves it all
into the model directory, and a checkpoint after every epoch. When the job is asked to stop, all ranks agree on the step
to stop at, the checkpoint is written, and every rank ends with 0; the next run goes on from there, with any number of
ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from network import DigitNet
from prepare import write_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import launcher
from launcher.data import Loader


def parse_arguments(ctx: launcher.Context) -> argparse.Namespace:
    """Read the hyperparameters; directories default to those of the job."""
    parser = argparse.ArgumentParser(description="Train on handwritten digits.")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--batch-size", type=int, default=64, help="images per step, over all ranks together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model-dir", type=Path, default=Path(ctx.model_dir))
    parser.add_argument("--data", type=Path, default=ctx.channels.get("training"), help="instead of channel 'training'")
    return parser.parse_args()


def find_data(ctx: launcher.Context, given: Path | None, model_dir: Path) -> Path:
    """Return the directory of the images; one rank of each host makes it when the job brought none."""
    if given is not None:
        return given
    place = model_dir.absolute().parent / "input" / "data" / "training"
    if ctx.local_rank == 0 and not (place / "train.npy").exists():
        print(f"no channel 'training' in this job: writing the digits of scikit-learn to {place}", flush=True)
        write_digits(place)
    if ctx.world_size > 1:
        dist.barrier()
    return place


def to_tensors(records: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (n, 1, 8, 8) float32 images in 0..1, and their labels."""
    images = torch.as_tensor(records["image"]).to(device, torch.float32).unsqueeze(1) / 16
    return images, torch.as_tensor(records["label"]).to(device)


def any_rank(flag: bool, world_size: int) -> bool:
    """Tell whether ``flag`` is true on any rank. All ranks get the same answer, so all leave the same step."""
    if world_size == 1:
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())


def save_atomically(state: object, path: Path) -> None:
    """Save ``state`` such that ``path`` holds either the old or the new content, whenever the job is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    torch.save(state, partial)
    os.replace(partial, path)


class Trainer:
    """One rank's share of the training, and the checkpoint that all ranks share."""

    def __init__(self, ctx: launcher.Context, args: argparse.Namespace) -> None:
        self.ctx, self.args = ctx, args
        self.device = torch.device(ctx.device)
        self.data = find_data(ctx, args.data, args.model_dir)
        per_rank = max(1, args.batch_size // ctx.world_size)
        self.loader = Loader(self.data / "train.npy", per_rank, seed=args.seed, output="torch")
        self.test_images, self.test_labels = to_tensors(np.load(self.data / "test.npy"), self.device)
        torch.manual_seed(args.seed)  # equal first weights on all ranks
        self.net = DigitNet().to(self.device)
        self.model: nn.Module = DistributedDataParallel(self.net) if ctx.world_size > 1 else self.net
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=args.lr)
        self.history: list[dict[str, float]] = []
        self.checkpoint = Path(ctx.checkpoint_dir) / "digits.pt"

    def resume(self) -> None:
        """Take up the checkpoint of an earlier run, if there is one: rank 0 reads it, other hosts may not have it."""
        state = None
        if self.ctx.rank == 0 and self.checkpoint.exists():
            state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        if self.ctx.world_size > 1:
            shared = [state]
            dist.broadcast_object_list(shared, src=0)
            state = shared[0]
        if state is None:
            return
        self.net.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.loader.load_state_dict(state["loader"])
        self.history = state["history"]
        if self.ctx.rank == 0:
            print(f"resumed at {self.place()}", flush=True)

    def place(self) -> str:
        """Say where training stands: the epoch, and how many samples of it all ranks together have seen."""
        return f"epoch {len(self.history) + 1}, sample {self.loader.state_dict()['position']}"

    def save_checkpoint(self) -> None:
        """Write the checkpoint (rank 0; the other ranks hold the same weights)."""
        if self.ctx.rank == 0:
            state = {"model": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}
            save_atomically({**state, "loader": self.loader.state_dict(), "history": self.history}, self.checkpoint)

    def run_epoch(self) -> float | None:
        """Finish the current epoch. Return this rank's mean loss, or None when the job was asked to stop.

        Every epoch has an order of its own, equal on all ranks, and each step is the next ``batch_size`` samples of it,
        so that the loader's position means the same whatever the number of ranks.
        """
        losses: list[float] = []
        batches = iter(self.loader)
        for _ in range(len(self.loader)):
            if any_rank(self.ctx.stop_requested, self.ctx.world_size):
                return None  # before the next batch is taken: the loader stands where training does
            images, labels = to_tensors(next(batches), self.device)
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(images), labels)
            loss.backward()  # DistributedDataParallel averages the gradients here
            self.optimizer.step()
            losses.append(loss.item())
        return sum(losses) / max(1, len(losses))

    @torch.no_grad()
    def accuracy(self) -> float:
        """Return the share of test images that the network reads correctly."""
        self.net.eval()
        right = (self.net(self.test_images).argmax(dim=1) == self.test_labels).float().mean().item()
        self.net.train()
        return right

    def train(self) -> bool:
        """Train to the last epoch. Return False when the job was asked to stop before."""
        while len(self.history) < self.args.epochs:
            began = time.monotonic()
            loss = self.run_epoch()
            if loss is None:
                self.save_checkpoint()
                return False
            entry = {"epoch": len(self.history) + 1, "loss": loss, "accuracy": self.accuracy()}
            self.history.append(entry)
            self.save_checkpoint()
            if self.ctx.rank == 0:
                took = time.monotonic() - began
                print(
                    f"epoch {entry['epoch']}/{self.args.epochs} loss={loss:.4f} "
                    f"test_accuracy={entry['accuracy']:.4f} ({took:.2f} s)",
                    flush=True,
                )
        return True

    def save_model(self) -> None:
        """Write ``model.pt`` (a state dict of ``DigitNet``), ``metrics.json``, and the code that serves the model."""
        code = self.args.model_dir / "code"
        code.mkdir(parents=True, exist_ok=True)
        for name in ("inference.py", "network.py"):
            shutil.copy2(Path(__file__).with_name(name), code / name)
        save_atomically(
            {name: value.cpu() for name, value in self.net.state_dict().items()}, self.args.model_dir / "model.pt"
        )
        metrics = {
            "test_accuracy": self.accuracy(),
            "history": self.history,
            "data": str(self.data),
            "world_size": self.ctx.world_size,
            "hyperparameters": {name: getattr(self.args, name) for name in ("epochs", "lr", "batch_size", "seed")},
        }
        (self.args.model_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        print(f"test accuracy {metrics['test_accuracy']:.4f}; model in {self.args.model_dir}", flush=True)


def main() -> None:
    """Join the other ranks, train, and save."""
    ctx = launcher.init()
    args = parse_arguments(ctx)
    if ctx.world_size > 1:
        dist.init_process_group("gloo", rank=ctx.rank, world_size=ctx.world_size)
    trainer = Trainer(ctx, args)
    trainer.resume()
    finished = trainer.train()
    if ctx.rank == 0:
        if finished:
            trainer.save_model()
        else:
            print(f"stopped in {trainer.place()}: {trainer.checkpoint}", flush=True)
    if ctx.world_size > 1:
        dist.barrier()  # no rank leaves while another still writes
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
