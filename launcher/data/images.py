"""Folders of images: which files are records, their labels, and JPEG decoding while batches are filled."""

from __future__ import annotations

import operator
import os

from launcher.errors import DataError, UsageError
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from launcher._data import Source

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Of the files that are taken for images, in whatever case."""

_JPEG_SUFFIXES = (".jpeg", ".jpg")


class ImageFolder(Record):
    """The images of a folder, and what else lies in it.

    ``files``: path relative to the folder, bytes, time of change in ns. ``labels``: one for each file, the number of
    its class; empty when the images lie in no folders. ``classes``: names of the folders at the top, sorted by their
    bytes. ``others``: paths of files that are no images.
    """

    files: tuple[tuple[str, int, int], ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    others: tuple[str, ...]


def find_images(root: str, files: Iterable[tuple[str, int, int]]) -> ImageFolder:
    """Sorts ``files`` (as ``launcher._data.list_files`` gives them) into images, by suffix, and others.

    The class of an image is the first folder of its path, as torchvision's ImageFolder has it, at any depth below.

    Raises:
        DataError: some images lie in folders and some do not, so that there is a label for some only.
    """
    images: list[tuple[str, int, int]] = []
    others: list[tuple[str, int, int]] = []
    for entry in files:
        (images if entry[0].lower().endswith(SUFFIXES) else others).append(entry)
    inside = [name.partition("/")[0] if "/" in name else "" for name, _, _ in images]
    classes = sorted(set(inside), key=os.fsencode)
    if classes == [""] or not classes:
        return ImageFolder(tuple(images), (), (), tuple(name for name, _, _ in others))
    if "" in classes:
        path = os.path.join(root, images[inside.index("")][0])
        raise DataError(
            f"{path}: this image lies in no folder, and others do; a label is the folder's name: move it into one, or "
            "all images out of their folders",
            "mismatch",
            path,
        )
    number = {name: i for i, name in enumerate(classes)}
    return ImageFolder(
        tuple(images),
        tuple(number[name] for name in inside),
        tuple(classes),
        tuple(name for name, _, _ in others),
    )


def check_decodable(root: str, folder: ImageFolder) -> None:
    """Raises UsageError unless all images are JPEG by their suffixes: others would be an error at some step."""
    others = [name for name, _, _ in folder.files if not name.lower().endswith(_JPEG_SUFFIXES)]
    if others:
        raise UsageError(
            f"{os.path.join(root, others[0])}: no JPEG by its suffix, as {len(others)} of the {len(folder.files)} "
            "images are, and size= decodes JPEG only; convert them, or leave size out and decode the bytes in a "
            "transform"
        )


def make_source(root: str, folder: ImageFolder) -> Source:
    """The images as bytes in the field ``data`` (ragged uint8), with ``label`` (int64) where there are classes."""
    from launcher._data import files_source

    return files_source(root, folder.files, list(folder.labels))


def jpeg_libraries() -> list[str]:
    """Paths of libjpeg-turbo in places where the system's loader does not look: Pillow's wheel brings one."""
    from importlib.util import find_spec

    spec = find_spec("PIL")
    if spec is None or not spec.submodule_search_locations:
        return []
    found = []
    for place in spec.submodule_search_locations:
        folder = os.path.join(os.path.dirname(place), "pillow.libs")
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            continue  # not installed from a wheel: it uses the system's library
        found += [os.path.join(folder, name) for name in names if name.startswith("libjpeg")]
    return found


def decode_jpeg(
    source: Source,
    field: str,
    size: Sequence[int],
    *,
    name: str = "image",
    channels: int = 3,
    crop: bool = False,
) -> Source:
    """``source`` with the JPEG files of its ``field`` decoded while a batch is filled, straight into the batch.

    The field is called ``name`` then, of uint8 and shape ``(height, width, channels)``. An image is shrunk while it is
    decoded to the smallest eighth of its size that is not below ``size``, then resized between the four nearest pixels.
    EXIF's orientation is not applied. CMYK images become RGB, taken for inverted as Adobe writes them.

    Args:
        size: height and width, in pixels.
        channels: 3 (red, green, blue) or 1 (grey).
        crop: the middle part of the image with the proportions of ``size``; else all of it, stretched.

    Raises:
        UsageError: a bad argument, or no libjpeg-turbo is found.

    While batches are filled, an image that is damaged, cut or no JPEG is a DataError of its record.
    """
    from launcher._data import jpeg_library, jpeg_source

    if not hasattr(size, "__len__") or len(size) != 2 or not all(hasattr(one, "__index__") and one > 0 for one in size):
        raise UsageError(f"size is {size!r}; expected the height and the width in pixels, (224, 224) say")
    height, width = map(operator.index, size)
    libraries = jpeg_libraries()
    library, tried = jpeg_library(libraries)
    if not library:
        raise UsageError(
            f"decoding JPEG needs libjpeg-turbo ({tried}); install libturbojpeg0 (Debian, Ubuntu) or turbojpeg "
            "(Fedora, Amazon Linux), or leave the images as bytes and decode them in a transform"
        )
    try:
        return jpeg_source(source, field, name, height, width, channels, crop, libraries)
    except ValueError as error:
        raise UsageError(f"images can not be decoded: {error}") from error
