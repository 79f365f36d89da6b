"""RecordIO-protobuf as today's Python readers take it apart, written after what they do.

``framing``: the generator of sagemaker-training's recordio.py, frames only. ``upb``: its frames, each parsed with the
``protobuf`` package, its values made an array. ``container``: what the XGBoost container has read it with since 2026:
slices of a buffer, each parsed, every field of a tensor looked at, rows stacked at the end.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import google.protobuf
import numpy as np
from datasets import MAGIC, Set, record_template, recordio_path
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from adapters.base import Base, open_fifo

_TENSORS = (
    ("Float32Tensor", "float32_tensor", 2),
    ("Float64Tensor", "float64_tensor", 3),
    ("Int32Tensor", "int32_tensor", 7),
)


def record_class() -> Any:
    """The class of ``aialgs.data.Record``, from a description made here: as record.proto, of which it is a part."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="record.proto", package="aialgs.data", syntax="proto2")
    value = descriptor_pb2.DescriptorProto(name="Value")
    value.oneof_decl.add(name="value")
    for (name, field, number), kind in zip(
        _TENSORS, (kinds.TYPE_FLOAT, kinds.TYPE_DOUBLE, kinds.TYPE_INT32), strict=True
    ):
        tensor = file.message_type.add(name=name)
        for at, (part, its_kind) in enumerate(
            (("values", kind), ("keys", kinds.TYPE_UINT64), ("shape", kinds.TYPE_UINT64)), start=1
        ):
            added = tensor.field.add(name=part, number=at, type=its_kind, label=kinds.LABEL_REPEATED)
            added.options.packed = True
        value.field.add(
            name=field,
            number=number,
            type=kinds.TYPE_MESSAGE,
            type_name=f".aialgs.data.{name}",
            label=kinds.LABEL_OPTIONAL,
            oneof_index=0,
        )
    file.message_type.append(value)
    record = file.message_type.add(name="Record")
    for number, (name, entry) in enumerate((("features", "FeaturesEntry"), ("label", "LabelEntry")), start=1):
        nested = record.nested_type.add(name=entry)
        nested.options.map_entry = True
        nested.field.add(name="key", number=1, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
        nested.field.add(
            name="value",
            number=2,
            type=kinds.TYPE_MESSAGE,
            type_name=".aialgs.data.Value",
            label=kinds.LABEL_OPTIONAL,
        )
        record.field.add(
            name=name,
            number=number,
            type=kinds.TYPE_MESSAGE,
            type_name=f".aialgs.data.Record.{entry}",
            label=kinds.LABEL_REPEATED,
        )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("aialgs.data.Record"))


def frames(file: BinaryIO) -> Iterator[bytes]:
    """Payloads of a stream: two reads of four bytes and one of the payload each."""
    while head := file.read(4):
        (magic,) = struct.unpack("I", head)
        assert magic == MAGIC
        (length,) = struct.unpack("I", file.read(4))
        yield file.read(length)
        if pad := -length % 4:
            file.read(pad)


def slices(buffer: bytes) -> Iterator[bytes]:
    """Payloads of a buffer."""
    at = 0
    while at + 8 <= len(buffer):
        magic, length = struct.unpack_from("<II", buffer, at)
        if magic != MAGIC:
            raise ValueError(f"no frame at {at}")
        at += 8
        yield buffer[at : at + length]
        at += -(-length // 4) * 4


def tensor(value: Any) -> tuple[Any, Any, Any]:
    """Values, keys and shape of a ``Value``, whatever its type."""
    for (_, name, _), kind in zip(_TENSORS, (np.float32, np.float64, np.int32), strict=True):
        if value.HasField(name):
            found = getattr(value, name)
            keys = np.array(found.keys, dtype=np.uint64) if found.keys else None
            return np.array(found.values, dtype=kind), keys, list(found.shape) if found.shape else None
    return None, None, None


class Adapter(Base):
    """options: ``way``: framing, upb or container."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self.version = f"protobuf {google.protobuf.__version__}"
        self.checked = options["way"] != "framing"
        self._record = record_class()

    def open(self, which: Set, data: Path, rank: int, world: int) -> None:
        self.set, self._path = which, recordio_path(data)

    def batches(self) -> Iterator[Any]:
        while True:
            yield from getattr(self, f"_{self.options['way']}")()

    def _framing(self) -> Iterator[Any]:
        with self._path.open("rb") as file:
            batch = []
            for payload in frames(file):
                batch.append(payload)
                if len(batch) == self.set.batch:
                    yield batch
                    batch = []

    def _upb(self) -> Iterator[Any]:
        with self._path.open("rb") as file:
            values, labels = [], []
            for payload in frames(file):
                record = self._record.FromString(payload)
                values.append(np.array(record.features["values"].float32_tensor.values, np.float32))
                labels.append(record.label["values"].float32_tensor.values[0])
                if len(values) == self.set.batch:
                    yield np.stack(values), np.array(labels, np.float32)
                    values, labels = [], []

    def _container(self) -> Iterator[Any]:
        size = len(record_template()[0]) * self.set.batch
        with self._path.open("rb") as file:
            while len(buffer := file.read(size)) == size:
                rows, labels = [], []
                for payload in slices(buffer):
                    record = self._record()
                    record.ParseFromString(payload)
                    if "values" not in record.features:
                        continue
                    values, _, _ = tensor(record.features["values"])
                    rows.append(values.reshape(1, -1))
                    if "values" in record.label:
                        labels.append(tensor(record.label["values"])[0])
                yield np.vstack(rows), np.concatenate(labels, axis=None)

    def pipe(self, order: Mapping[str, Any], rank: int) -> dict[str, Any]:
        """Frames what comes through a FIFO: seconds and bytes."""
        with open_fifo(order) as file:
            begin, count = time.perf_counter(), 0
            for payload in frames(file):
                count += 8 + -(-len(payload) // 4) * 4
            return {"seconds": time.perf_counter() - begin, "bytes": count}

    def arrays(self, batch: Any) -> tuple[Any, Any]:
        return batch[0], batch[1].astype(np.int64)
