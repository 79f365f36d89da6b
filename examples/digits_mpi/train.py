"""Handwritten digits with numpy and mpi4py: each rank works on its share of a batch, MPI adds up the gradients.

    python -m launcher --engine mpi --nproc-per-node 2 examples/digits_mpi/train.py

A network of one hidden layer, trained by momentum. The sum of the ranks' gradients is that of the whole batch, so
the number of ranks, and of hosts, changes the weights by rounding errors only. Rank 0 writes ``model.npz`` and
``metrics.json`` into the model directory. The images are those of the channel ``training``, else scikit-learn's own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from mpi4py import MPI

import launcher

HIDDEN = 64
CLASSES = 10


def load(channel: str | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return train images (n x 64, 0..1) and labels (n), then those of the test; the same on all ranks."""
    if channel is not None:
        parts = []
        for name in ("train", "test"):
            records = np.load(Path(channel) / f"{name}.npy")
            parts += [records["image"].reshape(-1, 64) / 16, records["label"]]
        return parts[0], parts[1], parts[2], parts[3]
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, labels = digits.data[order] / 16, digits.target[order]
    return images[360:], labels[360:], images[:360], labels[:360]


class Network:
    """64 -> HIDDEN (tanh) -> CLASSES (softmax). All parameters lie in one flat vector, so one Allreduce sums them."""

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.shapes = [(64, HIDDEN), (HIDDEN,), (HIDDEN, CLASSES), (CLASSES,)]
        sizes = [int(np.prod(shape)) for shape in self.shapes]
        self.cuts = np.cumsum(sizes)[:-1]
        self.flat = np.concatenate([random.normal(0, 0.1, size) for size in sizes])

    def parts(self, flat: np.ndarray) -> list[np.ndarray]:
        """Views of ``flat`` in the shapes of the parameters."""
        return [part.reshape(shape) for part, shape in zip(np.split(flat, self.cuts), self.shapes, strict=True)]

    def forward(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the hidden layer and the probabilities (n x CLASSES)."""
        w1, b1, w2, b2 = self.parts(self.flat)
        hidden = np.tanh(images @ w1 + b1)
        scores = hidden @ w2 + b2
        exponents = np.exp(scores - scores.max(axis=1, keepdims=True))
        return hidden, exponents / exponents.sum(axis=1, keepdims=True)

    def gradient(self, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return the gradient of the summed cross-entropy, flat."""
        w2 = self.parts(self.flat)[2]
        hidden, wrong = self.forward(images)
        wrong[np.arange(len(labels)), labels] -= 1
        back = wrong @ w2.T * (1 - hidden**2)
        found = [images.T @ back, back.sum(axis=0), hidden.T @ wrong, wrong.sum(axis=0)]
        return np.concatenate([part.ravel() for part in found])


def main() -> None:
    """Train, and save on rank 0."""
    ctx = launcher.init()
    world = MPI.COMM_WORLD
    rank, size = world.Get_rank(), world.Get_size()
    parser = argparse.ArgumentParser(description="Train on handwritten digits over MPI.")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--batch-size", type=int, default=96, help="images per step, over all ranks together")
    args = parser.parse_args()

    images, labels, test_images, test_labels = load(ctx.channels.get("training"))
    network = Network(seed=0)
    speed = np.zeros_like(network.flat)
    total = np.empty_like(network.flat)
    for epoch in range(args.epochs):
        order = np.random.default_rng(epoch).permutation(len(labels))
        for start in range(0, len(order) - args.batch_size + 1, args.batch_size):
            mine = order[start + rank : start + args.batch_size : size]
            world.Allreduce(network.gradient(images[mine], labels[mine]), total, op=MPI.SUM)
            speed = 0.9 * speed - args.lr / args.batch_size * total
            network.flat += speed
            ctx.step(samples=len(mine))

    if rank == 0:
        accuracy = float((network.forward(test_images)[1].argmax(axis=1) == test_labels).mean())
        model_dir = Path(ctx.model_dir)
        model_dir.mkdir(parents=True, exist_ok=True)
        np.savez(model_dir / "model.npz", weights=network.flat)
        library = MPI.Get_library_version().partition(",")[0].partition("\n")[0].strip()
        metrics = {"test_accuracy": accuracy, "world_size": size, "mpi": library}
        (model_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        print(f"test accuracy {accuracy:.4f} with {size} ranks over {library}; model in {model_dir}", flush=True)


if __name__ == "__main__":
    main()
