"""Whether a file is of a format, by its first bytes."""

from __future__ import annotations

import re

_RECORD_MAGIC = bytes((0x0A, 0x23, 0xD7, 0xCE))
_TAR_MAGIC = slice(257, 262)
_CRC32C = 0x82F63B78  # Castagnoli's polynomial, reflected
_NUMBER = rb"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?|[-+]?(?:nan|inf)"


def like_npy(start: bytes) -> bool:
    """NumPy's array files."""
    return start.startswith(b"\x93NUMPY")


def like_recordio(start: bytes) -> bool:
    """RecordIO, whatever the records are."""
    return start.startswith(_RECORD_MAGIC)


def like_record_proto(start: bytes) -> bool:
    """RecordIO whose first record begins as a ``Record`` does: with an entry of features or label that has a key."""
    if not like_recordio(start) or start[8:9] not in (b"\x0a", b"\x12"):
        return False
    try:
        length, at = _varint(start, 9)
        if length < 2 or start[at] != 0x0A:
            return False
        key, at = _varint(start, at + 1)
    except IndexError:
        return False
    name = start[at : at + key]
    return 0 < key < length and len(name) == key and name.isascii() and name.decode("ascii").isprintable()


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] & 0x80:
        value |= (data[at] & 0x7F) << shift
        shift += 7
        at += 1
    return value | data[at] << shift, at + 1


def like_tfrecord(start: bytes) -> bool:
    """TFRecord: the checksum after the first length is right."""
    return len(start) >= 12 and int.from_bytes(start[8:12], "little") == _masked_crc(start[:8])


def _masked_crc(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (_CRC32C if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF  # tensorflow/core/lib/hash/crc32c.h


def like_tar(start: bytes) -> bool:
    """A tar archive, POSIX or GNU."""
    return start[_TAR_MAGIC] == b"ustar"


def like_parquet(start: bytes) -> bool:
    """A Parquet table."""
    return start.startswith(b"PAR1")


def like_image(start: bytes) -> bool:
    """JPEG or PNG."""
    return start.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"))


def like_csv(start: bytes) -> bool:
    """A first line of numbers with commas between them."""
    return re.fullmatch(rb"\s*(?:%b)?(?:\s*,\s*(?:%b)?)+\s*" % (_NUMBER, _NUMBER), _first_line(start)) is not None


def like_libsvm(start: bytes) -> bool:
    """A first line of a number and index:value."""
    pattern = rb"\s*(?:%b)(?:\s+qid:\d+)?(?:\s+\d+:(?:%b))+\s*(?:#.*)?" % (_NUMBER, _NUMBER)
    return re.fullmatch(pattern, _first_line(start)) is not None


def like_json_lines(start: bytes) -> bool:
    """A first line that begins an object."""
    return _first_line(start).lstrip().startswith((b'{"', b"{ ", b"{}"))


def _first_line(start: bytes) -> bytes:
    """Without its end; of a line that is longer than ``start``, what is before the last separator in it."""
    line, newline, _ = start.partition(b"\n")
    if not newline and len(start) >= 4096:
        line = line[: max(line.rfind(b","), line.rfind(b" "))]
    return line.rstrip(b"\r")
