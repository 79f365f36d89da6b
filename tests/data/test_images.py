"""Folders of images: labels, files that change, JPEG decoding."""

from __future__ import annotations

import base64
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import _data
from launcher.data.catalogue import open_source
from launcher.data.images import decode_jpeg, find_images, jpeg_libraries, make_source
from launcher.errors import DataError, UsageError

numpy = pytest.importorskip("numpy")

Read = Callable[[_data.Source], dict[str, list[Any]]]

HEIGHT, WIDTH = 32, 48
# Both show 5 * x, 7 * y, 128 at (x, y), made with Pillow at quality 92.
JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAMCAgICAgMCAgIDAwMDBAYEBAQEBAgGBgUGCQgKCgkICQkKDA8MCgsOCwkJDRENDg8QEBEQCgwS"
    "ExIQEw8QEBD/2wBDAQMDAwQDBAgEBAgQCwkLEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBD/wAAR"
    "CAAgADADAREAAhEBAxEB/8QAFwABAQEBAAAAAAAAAAAAAAAABgUHCP/EABkQAAIDAQAAAAAAAAAAAAAAAAAEBiMxof/EABcBAQEBAQAAAAAA"
    "AAAAAAAAAAYFCQj/xAAaEQACAgMAAAAAAAAAAAAAAAAABAMFITFh/9oADAMBAAIRAxEAPwDgVGNZXw6Nle6H0LLWRAjGsr4TZXujZCy1kQIx"
    "rK+E2V7o1QstZECMZyvhNle6NULLWS+jGsr4TZXujZCy1kQIxnKybK90aoWWsmcIxnK+CmV7plshZayX0Y1lfCbK90aoWWsiBGM5WTZXujVC"
    "y1kQIxrK+E2V7o2QstZECMZyvhNle6NULLWRAjGcr4TZXujVCy1kzdGNZXwUSvdMtkLLWRAjGcr4TZXujVCy1kQIxrK+E2V7o2QstZECMayv"
    "hNle6NULLWRAjGsr4TZXujZCy1kQIxrK+E2V7o1QstZM3RjWV8FMr3TLZCy1kQIxrK+E2V7o1QstZECMayvhNle6NULLWRAjGsr4TZXujZCy"
    "1kQIxrK+E2V7o1QstZL6MZyvhNle6NULLWT/2Q=="
)
CMYK = base64.b64decode(
    "/9j/7gAOQWRvYmUAZAAAAAAA/9sAQwADAgICAgIDAgICAwMDAwQGBAQEBAQIBgYFBgkICgoJCAkJCgwPDAoLDgsJCQ0RDQ4PEBAREAoMEhMS"
    "EBMPEBAQ/8AAFAgAIAAwBEMRAE0RAFkRAEsRAP/EABgAAQEAAwAAAAAAAAAAAAAAAAAHCAkK/8QAGRABAAIDAAAAAAAAAAAAAAAAAAYXQmOh"
    "/9oADgRDAE0AWQBLAAA/ANbERwa66/0cG1Na4jgV/o4C1xHAr/RwFqiOBX+jgLXEcCv9HAWuI4Ff6OA56YjgyVr/AEcBa4jgV/o4C1xHAr/R"
    "wFqiOBX+jgLXEcCv9HAWuI4Ff6OA56YjgyWr/RwFriOBX+jgLXEcCv8ARwFqiOBX+jgLXEcCv9HAWuI4Ff6OA56YjgyVr/RwFriOBX+jgLXE"
    "cCv9HAWqI4Ff6OAtcRwK/wBHAWuI4Ff6OA//2Q=="
)
SIZE_AT = JPEG.index(b"\xff\xc0") + 5  # height and width, two bytes each

needs_jpeg = pytest.mark.skipif(
    not _data.jpeg_library(jpeg_libraries())[0],
    reason=f"no libjpeg-turbo: {_data.jpeg_library(jpeg_libraries())[1]}",
)


def write(root: Path, name: str, content: bytes) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content)


def open_images(root: Path) -> _data.Source:
    return make_source(str(root), find_images(str(root), _data.list_files(root)))


def test_labels_are_the_folders(tmp_path: Path, read_all: Read) -> None:
    names = ["b/1.jpg", "b/deep/er/2.PNG", "é/3.webp", "a/4.jpeg", "A/5.tiff"]
    for name in names:
        write(tmp_path, name, name.encode())
    write(tmp_path, "b/notes.txt", b"no")
    write(tmp_path, "empty.csv", b"no")
    folder = find_images(str(tmp_path), _data.list_files(tmp_path))
    assert (folder.classes, folder.others) == (("A", "a", "b", "é"), ("b/notes.txt", "empty.csv"))
    found = read_all(make_source(str(tmp_path), folder))
    paths = [value.tobytes().decode() for value in found["data"]]
    assert paths == sorted(names, key=os.fsencode)
    assert found["label"] == [folder.classes.index(path.partition("/")[0]) for path in paths]


def test_images_in_no_folder_have_no_label(tmp_path: Path, read_all: Read) -> None:
    write(tmp_path, "1.png", b"")
    write(tmp_path, "2.png", b"two" * 10_000)
    assert [value.tobytes() for value in read_all(open_images(tmp_path))["data"]] == [b"", b"two" * 10_000]
    assert [field[0] for field in open_images(tmp_path).fields] == ["data"]
    write(tmp_path, "a/3.png", b"")
    with pytest.raises(DataError, match="this image lies in no folder, and others do") as caught:
        open_images(tmp_path)
    assert caught.value.file == str(tmp_path / "1.png")


def test_files_that_changed_f20(tmp_path: Path, read_all: Read) -> None:
    """F20: a file that is cut, longer, written to or gone is an error that names it, never other bytes."""
    changes: dict[str, Callable[[Path], object]] = {
        "the file ends here, and had 5 bytes": lambda path: os.truncate(path, 3),
        "the file has 6 bytes, and had 5": lambda path: path.write_bytes(b"123456"),
        "was written to after the channel was opened": lambda path: os.utime(path, ns=(0, 10**18)),
        "can not be opened: No such file": lambda path: path.unlink(),
    }
    for number, (message, change) in enumerate(changes.items()):
        root = tmp_path / str(number)
        write(root, "1.jpg", b"12345")
        source = open_images(root)
        change(root / "1.jpg")
        with pytest.raises(DataError, match=message) as caught:
            read_all(source)
        assert (caught.value.problem, caught.value.file) == ("changed", str(root / "1.jpg"))


def pixels(height: int, width: int, crop: bool = False) -> Any:
    """The picture of JPEG at another size."""
    tall = wide = 1.0
    if crop:
        scale = min(WIDTH / width, HEIGHT / height)
        wide, tall = scale * width / WIDTH, scale * height / HEIGHT
    x = WIDTH * (1 - wide) / 2 + (numpy.arange(width) + 0.5) * WIDTH * wide / width - 0.5
    y = HEIGHT * (1 - tall) / 2 + (numpy.arange(height) + 0.5) * HEIGHT * tall / height - 0.5
    xs, ys = numpy.meshgrid(numpy.clip(x, 0, WIDTH - 1), numpy.clip(y, 0, HEIGHT - 1))
    return numpy.stack([5 * xs, 7 * ys, numpy.full_like(xs, 128)], axis=2)


@needs_jpeg
@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("size", [(32, 48), (16, 24), (15, 15), (8, 40), (64, 64), (5, 3)])
def test_jpeg_is_decoded_to_the_size_that_is_wanted(
    size: tuple[int, int], crop: bool, tmp_path: Path, read_all: Read
) -> None:
    write(tmp_path, "a/1.jpg", JPEG)
    write(tmp_path, "b/2.jpg", CMYK)
    source = decode_jpeg(open_images(tmp_path), "data", size, crop=crop)
    assert [field[0] for field in source.fields] == ["image", "label"]
    found = read_all(source)
    assert found["label"] == [0, 1]
    for image in found["image"]:
        assert image.dtype == numpy.uint8 and image.shape == (*size, 3)
        away = numpy.abs(image.astype(float) - pixels(*size, crop))
        # Shrinking takes means of blocks, which at the border are none of the middle of a pixel's.
        assert away.mean() < 4 and away.max() < 20
        if size == (HEIGHT, WIDTH):
            assert away.max() <= 4


@needs_jpeg
def test_grey_images(tmp_path: Path, read_all: Read) -> None:
    write(tmp_path, "1.jpg", JPEG)
    write(tmp_path, "2.jpg", CMYK)
    found = read_all(decode_jpeg(open_images(tmp_path), "data", (HEIGHT, WIDTH), channels=1, name="grey"))
    want = pixels(HEIGHT, WIDTH) @ [0.299, 0.587, 0.114]
    for image in found["grey"]:
        assert image.shape == (HEIGHT, WIDTH, 1)
        assert numpy.abs(image[..., 0] - want).max() < 5


@needs_jpeg
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (JPEG[: len(JPEG) * 3 // 4], "[Pp]remature end"),
        (JPEG[:400], 'field "data": .'),
        (JPEG[:2], 'field "data": .'),
        (b"\x89PNG\r\n\x1a\n" + bytes(90), "it does not begin with ff d8"),
        (b"", "it does not begin with ff d8"),
        (JPEG[:SIZE_AT] + b"\x7f\xff\x7f\xff" + JPEG[SIZE_AT + 4 :], "32767 x 32767 pixels"),
    ],
    ids=["cut", "header", "start", "png", "empty", "huge"],
)
def test_images_that_are_damaged_f9(content: bytes, message: str, tmp_path: Path, read_all: Read) -> None:
    """F9: libjpeg would fill in grey and go on; here the record is an error."""
    for number in range(20):
        write(tmp_path, f"a/{number:02d}.jpg", content if number == 17 else JPEG)
    with pytest.raises(DataError, match=message) as caught:
        read_all(decode_jpeg(open_images(tmp_path), "data", (8, 8)))
    assert (caught.value.problem, caught.value.file) == ("malformed", str(tmp_path / "a" / "17.jpg"))


@needs_jpeg
def test_images_that_are_no_jpeg_are_told_at_open(tmp_path: Path) -> None:
    """Not at whatever step the first of them comes."""
    for name in ("a/1.jpg", "a/2.JPEG", "b/1.png", "b/2.webp"):
        write(tmp_path, name, JPEG)
    with pytest.raises(
        UsageError, match=r"b/1\.png: no JPEG by its suffix, as 2 of the 4 images are, and size= decodes"
    ):
        open_source(tmp_path, size=(8, 8))
    assert open_source(tmp_path).records == 4
    size = numpy.array([8, 8])
    assert open_source(tmp_path / "a", size=(size[0], size[1])).records == 2


@needs_jpeg
def test_bytes_before_a_marker_are_harmless(tmp_path: Path, read_all: Read) -> None:
    write(tmp_path, "1.jpg", JPEG)
    write(tmp_path, "2.jpg", JPEG[:-2] + bytes(3) + JPEG[-2:])
    first, second = read_all(decode_jpeg(open_images(tmp_path), "data", (HEIGHT, WIDTH)))["image"]
    assert numpy.array_equal(first, second)


@needs_jpeg
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (0, 5)}, "expected the height and the width"),
        ({"size": (5,)}, "expected the height and the width"),
        ({"size": 8}, "size is 8; expected the height and the width"),
        ({"size": ("8", "8")}, "expected the height and the width"),
        ({"size": (1 << 20, 1 << 20)}, "2.27 pixels at most"),
        ({"channels": 2}, "1 channel .grey. or 3"),
        ({"field": "jpg"}, '"jpg" is no field of bytes'),
        ({"field": "label"}, '"label" is no field of bytes'),
        ({"name": "label"}, 'there is a field "label" already'),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, "a/1.jpg", JPEG)
    with pytest.raises(UsageError, match=message):
        decode_jpeg(open_images(tmp_path), **({"field": "data", "size": (8, 8)} | changes))


@needs_jpeg
def test_images_in_other_formats(tmp_path: Path, read_all: Read) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in (("1.jpg", JPEG), ("1.cls", b"4"), ("2.jpg", CMYK), ("2.cls", b"5")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    opened = open_source(tmp_path, jpeg="jpg", size=(16, 24), fields=["cls", "jpg"], integers=["cls"])
    found = read_all(opened.source)
    assert found["cls"] == [4, 5]
    for image in found["image"]:
        assert numpy.abs(image.astype(float) - pixels(16, 24)).mean() < 4
    with pytest.raises(UsageError, match="say by jpeg= which field has them"):
        open_source(tmp_path, size=(16, 24))
