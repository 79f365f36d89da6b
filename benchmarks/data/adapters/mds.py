"""MosaicML streaming: a StreamingDataset over local MDS shards, and torch's DataLoader."""

from __future__ import annotations

import contextlib
import importlib.machinery
import os
import shutil
import sys
import types
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Set, memmap, once

from adapters.base import Base, announce, endless


def _without_torchvision() -> None:
    """Stands in for the two names that its image classes, which are not used here, take from torchvision.

    torchvision can be imported only beside the very torch that it was built with.
    """
    names = {"torchvision": {}, "torchvision.datasets": {"VisionDataset": object}, "torchvision.transforms": {}}
    names["torchvision.transforms.functional"] = {"to_tensor": None}
    for name, content in names.items():
        module = sys.modules[name] = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__dict__.update(content)


try:
    import torchvision  # noqa: F401
except (ImportError, RuntimeError):
    _without_torchvision()

import streaming  # noqa: E402
from streaming.base.util import clean_stale_shared_memory  # noqa: E402


class Adapter(Base):
    """options: ``workers``."""

    ends_itself = True  # its shared memory has names, and must be removed

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self.version = f"mosaicml-streaming {version('mosaicml-streaming')}"
        self._loader: Any = None

    def prepare(self, which: Set, data: Path) -> None:
        kind = {"<f4": "float32", "|u1": "uint8"}[which.dtype]
        columns = {"values": f"ndarray:{kind}:{which.width}", "label": "int"}

        clean_stale_shared_memory()  # of a run that was killed: it would refuse to start

        def make(target: Path) -> None:
            shutil.rmtree(target)  # the writer wants to make it
            records = memmap(data, which)
            with streaming.MDSWriter(out=str(target), columns=columns) as writer:
                for row in records:
                    record = row.view(which.layout)[0]
                    writer.write({"values": record["values"], "label": int(record["label"])})

        once(data / which.name / "mds", which.facts(), make)

    def open(self, which: Set, data: Path, rank: int, world: int, state: Mapping[str, Any] | None = None) -> None:
        announce(rank, world)
        # Two jobs may not have a folder of the same name.
        folder = Path(os.environ["TMPDIR"]) / f"mds-{which.name}"
        with contextlib.suppress(FileExistsError):
            folder.symlink_to(data / which.name / "mds")
        dataset = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=which.batch)
        if state is not None:
            dataset.load_state_dict(dict(state))
        workers = self.options["workers"]
        self._loader = streaming.StreamingDataLoader(
            dataset, batch_size=which.batch, num_workers=workers, drop_last=True, persistent_workers=workers > 0
        )

    def state(self, position: int) -> Mapping[str, Any]:
        """As saved after ``position`` samples."""
        next(iter(self._loader))
        found: Mapping[str, Any] = self._loader.dataset.state_dict(position, from_beginning=True)
        return found

    def batches(self) -> Iterator[Any]:
        return endless(self._loader)

    def arrays(self, batch: Any) -> tuple[Any, Any]:
        return batch["values"].numpy(), batch["label"].numpy()

    def close(self) -> None:
        self._loader = None
