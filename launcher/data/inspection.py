"""What ``python -m launcher data`` does: looks at a channel, indexes it, reads it all, writes it in another format."""

from __future__ import annotations

import os
import time

from launcher import _data
from launcher.data.catalogue import Opened, describe, open_source
from launcher.data.fields import source_fields
from launcher.data.indexing import sidecar_paths
from launcher.errors import EXIT_CONTRACT, DataError, UsageError
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    Log = Callable[[str], None]

_SHOWN_FILES = 20
_STEP_RECORDS = 1 << 20
_CONVERTED_BYTES = 4 << 20


class Answer(Record):
    """The answer for people and for programs (JSON), and the exit code of the command."""

    text: str
    facts: dict[str, Any]
    exit_code: int = 0


def inspect_channel(where: str, opening: Mapping[str, Any], options: Mapping[str, Any], log: Log) -> Answer:
    """Format, files, records, fields, damage that is left out."""
    opened = open_source(where, on_bad=options["on_bad"], quiet=True, **opening)
    facts = _facts(opened)
    lines = [_headline(opened), "", "fields:"]
    for field in source_fields(opened.fields):
        shape = f" {list(field.shape)}" if field.shape else ""
        lines.append(f"  {field.name:<24} {field.dtype}{shape}{'' if field.kind == 'fixed' else ' ' + field.kind}")
    lines += ["", "files:" if len(opened.files) <= _SHOWN_FILES else f"files (the first {_SHOWN_FILES}):"]
    lines += [f"  {path:<40} {size:>15,} bytes {records:>12,} records" for path, size, records in opened.files[:20]]
    lines += _damage_lines(opened)
    return Answer("\n".join(lines), facts)


def index_channel(where: str, opening: Mapping[str, Any], options: Mapping[str, Any], log: Log) -> Answer:
    """Finds the records, and keeps where they are in a sidecar: beside the data, or in ``--output``."""
    begin = time.monotonic()
    output = options["output"]
    opened = open_source(where, on_bad=options["on_bad"], index="off" if output else "keep", quiet=True, **opening)
    index = opened.index
    place = ""
    if index is not None:
        place = output
        if output:
            parts = [index.part(number) for number in range(len(opened.files))]
            _data.save_index(output, opened.index_key, _entries(opened), parts)
        else:
            place = next((path for path in sidecar_paths(opened.path, opened.index_key) if os.path.exists(path)), "")
    elapsed = time.monotonic() - begin
    kept = f"kept in {place}" if place else "not kept" if index is not None else "this format needs no index"
    text = "\n".join([_headline(opened), f"indexed in {elapsed:.2f} s, {kept}", *_damage_lines(opened)])
    return Answer(text, {**_facts(opened), "index": place, "seconds": round(elapsed, 3)})


def verify_channel(where: str, opening: Mapping[str, Any], options: Mapping[str, Any], log: Log) -> Answer:
    """Reads every record of every file, and names what is damaged."""
    begin = time.monotonic()
    most = options["most"]
    try:
        opened = open_source(where, on_bad="skip", index="off", quiet=True, **opening)
    except DataError as error:  # what stands in the way of all records
        return _verdict([str(error)], 1, {"path": error.file or where, "records": 0}, f"{where}: can not be opened")
    root = _root(opened)
    texts = [describe(damage, root) for damage in opened.damage]
    bad = 0
    for first in range(0, opened.records, _STEP_RECORDS):
        count, errors = _data.check_records(opened.source, first, first + _STEP_RECORDS, most)
        bad += count
        texts += [text for text, *_ in errors]
    if opened.format == "mds":
        from launcher.data.mds import find_shards, verify

        present = [entry[0] for entry in _data.list_files(opened.path)]
        wrong, notes = verify(root, find_shards(root, present, sharded=opened.distribution == "ShardedByS3Key"))
        texts += [str(error) for error in wrong]
        for note in notes:
            log(note)
    lost = sum(damage.bytes for damage in opened.damage)
    facts = {**_facts(opened), "damaged_records": bad, "lost_bytes": lost, "seconds": time.monotonic() - begin}
    return _verdict(texts[:most], len(texts) + max(0, bad - most), facts, _headline(opened))


def _verdict(texts: list[str], count: int, facts: dict[str, Any], headline: str) -> Answer:
    facts = {**facts, "whole": not texts, "damaged_places": count, "errors": texts}
    if not texts:
        return Answer(f"{headline}\nevery record was read: the data is whole", facts)
    more = [f"... and {count - len(texts)} more"] if count > len(texts) else []
    lines = [headline, *texts, *more, f"the data is damaged at {count} place{'s' * (count > 1)}"]
    return Answer("\n".join(lines), facts, EXIT_CONTRACT)


def convert_channel(where: str, opening: Mapping[str, Any], options: Mapping[str, Any], log: Log) -> Answer:
    """Writes all records, in their order, into one file of another format."""
    from launcher.data.loader import Loader

    target, output = options["to"], options["output"]
    if not target or not output:
        raise UsageError("data convert needs --to FORMAT and --output FILE")
    opened = open_source(where, on_bad=options["on_bad"], quiet=True, **opening)
    names = [field.name for field in source_fields(opened.fields)]
    if target in ("recordio", "tfrecord") and names != ["data"]:
        raise UsageError(
            f"--to {target} writes records of bytes, but these have the fields {', '.join(names)}; "
            "take recordio-protobuf or npy"
        )
    mean = max(1, opened.source.bytes // max(1, opened.records))
    batch = max(1, min(opened.records, _CONVERTED_BYTES // mean))
    arguments: dict[str, Any] = {"shuffle": "none", "tail": "short", "rank": 0, "world_size": 1, "reuse": True}
    with (
        Loader(opened, batch, **arguments) as loader,
        _writer(target, output) as writer,
    ):
        for columns in loader:
            if target in ("recordio", "tfrecord"):
                for record in columns["data"]:
                    writer.write(record.tobytes())
            else:
                writer.write(columns)
    text = f"{_headline(opened)}\nwritten to {output}: {target}, {writer.records:,} records"
    return Answer(text, {**_facts(opened), "output": output, "written": writer.records})


def _writer(target: str, output: str) -> Any:
    from launcher.data.writers import FixedWriter, RecordIOWriter, RecordProtoWriter, TFRecordWriter

    kinds: dict[str, Any] = {
        "recordio": RecordIOWriter,
        "recordio-protobuf": RecordProtoWriter,
        "tfrecord": TFRecordWriter,
        "npy": FixedWriter,
    }
    return kinds[target](output)


def _root(opened: Opened) -> str:
    return opened.path if os.path.isdir(opened.path) else os.path.dirname(opened.path)


def _entries(opened: Opened) -> list[tuple[str, int, int]]:
    root = _root(opened)
    return [(path, size, os.stat(os.path.join(root, path)).st_mtime_ns) for path, size, _ in opened.files]


def _facts(opened: Opened) -> dict[str, Any]:
    return {
        "path": opened.path,
        "format": opened.format,
        "access": opened.access,
        "distribution": opened.distribution,
        "records": opened.records,
        "bytes": sum(size for _, size, _ in opened.files),
        "fingerprint": f"{opened.fingerprint:016x}",
        "fields": [
            {"name": field.name, "kind": field.kind, "dtype": field.dtype, "shape": list(field.shape)}
            for field in source_fields(opened.fields)
        ],
        "files": [{"path": path, "bytes": size, "records": records} for path, size, records in opened.files],
        "damage": [
            {"file": one.file, "offset": one.offset, "bytes": one.bytes, "text": one.text} for one in opened.damage
        ],
    }


def _headline(opened: Opened) -> str:
    size = sum(size for _, size, _ in opened.files)
    how = "read through FUSE" if opened.access == "remote" else "mapped"
    return (
        f"{opened.path}: {opened.format}, {opened.records:,} records in {len(opened.files):,} "
        f"file{'s' * (len(opened.files) != 1)}, {size:,} bytes, {how}, fingerprint {opened.fingerprint:016x}"
    )


def _damage_lines(opened: Opened) -> list[str]:
    if not opened.damage:
        return []
    root = _root(opened)
    lost = sum(damage.bytes for damage in opened.damage)
    return ["", f"left out, {lost:,} bytes:", *(f"  {describe(damage, root)}" for damage in opened.damage)]
