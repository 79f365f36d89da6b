"""Augmented manifests: one RecordIO record for each attribute of a sample."""

from __future__ import annotations

import os
import struct
import threading
from pathlib import Path
from typing import Any

import pytest

from launcher.data.channel import Place
from launcher.data.pipe import StreamOptions, open_stream
from launcher.errors import DataError, UsageError

MAGIC = struct.pack("<I", 0xCED7230A)


def frame(payload: bytes, flag: int = 0) -> bytes:
    return MAGIC + struct.pack("<I", flag << 29 | len(payload)) + payload + b"\0" * (-len(payload) % 4)


def place_of(folder: Path, **changes: Any) -> Place:
    return Place(
        **{"name": "train", "path": str(folder / "train"), "mode": "Pipe", "record_wrapper": "RecordIO", **changes}
    )


def batches_of(folder: Path, content: bytes, **options: Any) -> list[dict[str, Any]]:
    """All batches of a channel whose first epoch is ``content``."""
    os.mkfifo(folder / "train_0")
    writer = threading.Thread(target=(folder / "train_0").write_bytes, args=(content,))
    writer.start()
    stream = open_stream(place_of(folder), StreamOptions(3, shuffle="none", tail="short", timeout_s=30, **options))
    try:
        stream.begin(0)
        found = []
        while (batch := stream.next_batch()) is not None:
            found.append({name: list(column) for name, column in batch.items()})
        return found
    finally:
        stream.close()
        writer.join(30)


def test_f23_the_attributes_of_a_sample_stay_together(tmp_path: Path) -> None:
    """F23: two attributes; an image of several parts among them, and one that is empty."""
    images = [b"image %d" % number * number for number in range(8)]
    content = b""
    for number, image in enumerate(images):
        parts = [frame(image[:4], 1), frame(image[4:], 3)] if number == 5 else [frame(image)]
        content += b"".join(parts) + frame(b"%d" % (number * 11))
    found = batches_of(tmp_path, content, attributes={"image-ref": "bytes", "label": "int64"})
    assert [len(batch["label"]) for batch in found] == [3, 3, 2]
    joined = images[5][:4] + MAGIC + images[5][4:]  # what dmlc's writer left out
    rows = [bytes(row) for batch in found for row in batch["image-ref"]]
    assert rows == [*images[:5], joined, *images[6:]]
    assert [int(row) for batch in found for row in batch["label"]] == [number * 11 for number in range(8)]


def test_f23_mixing_keeps_pairs(tmp_path: Path) -> None:
    """F23: in a window, too."""
    content = b"".join(frame(b"%d" % number) + frame(b"%d.5" % number) for number in range(200))
    os.mkfifo(tmp_path / "train_0")
    writer = threading.Thread(target=(tmp_path / "train_0").write_bytes, args=(content,))
    writer.start()
    options = StreamOptions(50, attributes={"a": "int64", "b": "float32"}, window=40, timeout_s=30)
    stream = open_stream(place_of(tmp_path), options)
    stream.begin(0)
    seen = []
    while (batch := stream.next_batch()) is not None:
        assert (batch["a"] + 0.5 == batch["b"]).all()
        seen += batch["a"].tolist()
    assert sorted(seen) == list(range(200)) and seen != sorted(seen)
    stream.close()
    writer.join(30)


def test_f23_a_stream_that_ends_inside_a_sample_is_an_error(tmp_path: Path) -> None:
    """F23: an odd number of records for two attributes."""
    content = frame(b"a") + frame(b"1") + frame(b"b")
    with pytest.raises(DataError, match=r"train_0: byte 24: record 1: .*after 1 of its 2 records") as caught:
        batches_of(tmp_path, content, attributes=["image-ref", "label"])
    assert caught.value.problem == "truncated" and caught.value.offset == 24


def test_f23_without_the_wrapper_it_is_refused(tmp_path: Path) -> None:
    """F23: RecordWrapperType None leaves nothing between the attributes."""
    with pytest.raises(UsageError, match=r"RecordWrapperType None: .* no reader can tell where one ends"):
        open_stream(place_of(tmp_path, record_wrapper="None"), StreamOptions(4, attributes=["image-ref", "label"]))


def test_text_that_is_no_number_is_an_error(tmp_path: Path) -> None:
    content = frame(b"a") + frame(b'"cat"')
    with pytest.raises(
        DataError, match=r"train_0: byte 12: record 0: attribute label is \"\"cat\"\", expected"
    ) as caught:
        batches_of(tmp_path, content, attributes={"image-ref": "bytes", "label": "int64"})
    assert caught.value.problem == "mismatch"


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        ([], "expected the channel's AttributeNames"),
        ("label", "expected the channel's AttributeNames"),
        (["a", "a"], "each once"),
        ({"a": "int8"}, "expected 'bytes', 'float32'"),
        ({"a": "what"}, "dtype 'what' is not known"),
    ],
)
def test_attributes_that_make_no_sense(attributes: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=text):
        open_stream(place_of(tmp_path), StreamOptions(4, attributes=attributes))
