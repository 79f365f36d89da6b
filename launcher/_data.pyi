"""Types of the extension module (native/python/data)."""

import builtins
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# --- order.cpp: the order of an epoch, and the shares of its ranks ----------------------------------------------------
ORDER_VERSION: int

class Order:
    """The record at each position of an epoch; native/data/order.h says what the parameters are.

    ``shuffle``: 0 none, 1 full, 2 blocks. ``extent`` and ``window`` in records and extents.
    Raises ValueError: an unknown shuffle, or an extent, window or lanes of 0.
    """

    def __init__(
        self,
        shuffle: int,
        seed: int,
        epoch: int,
        records: int,
        extent: int = 1,
        window: int = 1,
        lanes: int = 1,
    ) -> None: ...
    @property
    def records(self) -> int: ...
    @property
    def table(self) -> bytes:
        """Shuffle ``full`` of few records: of each position (uint16, little-endian) its record. Else empty."""

    @property
    def network(self) -> list[int]:
        """Shuffle ``full`` of many records: n, low_bits, low_mask, high_mask and two numbers for each round of
        native/data/feistel.h. Else empty."""

    def at(self, position: int) -> int:
        """Raises IndexError: there is no such position."""

    def fill(self, begin: int, count: int) -> list[int]:
        """The records of the positions begin .. begin + count. Raises IndexError: they are not all there."""

def steps(records: int, base: int, world: int, batch: int, tail: int) -> int:
    """Steps from position ``base`` to the end of an epoch, the same for all ranks. ``tail``: 0 drop, 1 pad, 2 short."""

def rows_of(
    order: Order, step: int, base: int, world: int, rank: int, batch: int, tail: int, agreed_steps: int = -1
) -> tuple[list[int], int]:
    """The records that a rank reads at a step, and how many of them, from the first on, are no padding.

    ``agreed_steps``: in place of what steps() says (-1), where ranks have different records.
    Raises IndexError: there is no such step. ValueError: numbers that make no sense.
    """

def span_of(
    records: int, step: int, base: int, world: int, rank: int, batch: int, tail: int, agreed_steps: int = -1
) -> tuple[int, int, int, int]:
    """Where the rows of rows_of() are in an order of one lane: begin, padding, rows, valid. Row r < valid is at the
    position begin + r, one after it at (padding + r - valid) % records. Errors: as rows_of()."""

# --- files.cpp: files, and where their records are --------------------------------------------------------------------

def list_files(
    root: str | bytes | os.PathLike[str], hidden: bool = False, links: bool = False
) -> list[tuple[str, int, int]]: ...
def list_with_links(
    root: str | bytes | os.PathLike[str], hidden: bool = False, links: bool = False
) -> tuple[list[tuple[str, int, int]], int]:
    """The files, and how many symbolic links were left out."""

def served_by_fuse(path: str | bytes | os.PathLike[str]) -> bool: ...
def file_faults() -> int: ...
def reserve_extents(bytes: int) -> None:
    """Keep at least so many bytes of what is read of files that are not mapped: what the order's windows need."""

def save_index(path: str, key: str, files: list[tuple[str, int, int]], parts: list[FileIndex]) -> None: ...
def check_records(source: Source, begin: int, end: int, most: int) -> tuple[int, list[tuple[str, int, str, int, int]]]:
    """Reads each: how many can not be read, and of the first ones text, problem, file, offset, record."""

def load_index(
    path: str, key: str, files: list[tuple[str, int, int]], any_time: bool = False
) -> list[FileIndex | None]: ...

class File:
    def __init__(self, path: str | bytes | os.PathLike[str], access: str = "automatic") -> None: ...
    @property
    def path(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def modified_ns(self) -> int: ...
    @property
    def mapped(self) -> bool: ...
    def read(self, offset: int, bytes: int) -> builtins.bytes: ...
    def check_faults(self) -> None: ...
    def check_unchanged(self) -> None: ...

class FileIndex:
    note: str
    def __init__(self, records: Sequence[tuple[int, int]] = ...) -> None: ...
    @property
    def records(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def damage(self) -> list[tuple[int, int, str]]: ...
    def at(self, number: int) -> tuple[int, int]: ...

class Index:
    def __init__(self, files: Sequence[File], parts: Sequence[FileIndex]) -> None: ...
    @property
    def records(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def first(self) -> list[int]: ...
    def part(self, file: int) -> FileIndex: ...
    def place(self, record: int) -> tuple[int, int, int, int]: ...

# --- archives.cpp: tar, MDS, files that are a record each -------------------------------------------------------------
def scan_tar(file: File, skip: bool = False) -> FileIndex:
    """The WebDataset samples of an archive: consecutive members whose names are equal up to the first dot.

    ``skip``: damaged samples are left out and noted. Raises DataError.
    """

def tar_extensions(index: Index) -> list[str]:
    """The extensions of the first sample, in lower case, in the archive's order. Raises DataError."""

def tar_source(index: Index, fields: list[tuple[str, bool]], exact: bool = True) -> Source:
    """Samples with these fields: an extension (or "key") and whether its decimal text becomes an int64.

    Fields are ragged uint8 otherwise. ``exact``: a sample with an extension more is an error (DataError, mismatch).
    Raises ValueError: two fields of the same name.
    """

def scan_mds(file: File, skip: bool = False) -> FileIndex:
    """The samples of an MDS shard. ``skip``: those that a cut file lost are left out and noted. Raises DataError."""

def mds_header(file: File) -> bytes:
    """The JSON in the header of an MDS shard. Raises DataError."""

def mds_source(index: Index, columns: Sequence[tuple[str, int, list[int] | None, int, bool, bool]]) -> Source:
    """Samples of MDS shards with these columns, in the order of the header.

    A column is its name, dtype, shape (None: ragged), bytes of a value (0: the sample says),
    whether the shape is stored before the values, and whether it becomes a field.
    """

def files_source(root: str, files: Sequence[tuple[str, int, int]], labels: list[int] = ...) -> Source:
    """Files that are a record each: fields "data" (ragged uint8) and, with ``labels``, "label" (int64).

    ``files``: path relative to ``root``, bytes, time of change in ns, as list_files() gives them.
    Raises ValueError: not one label for each file.
    """

def decoded_source(
    file: File,
    records: int,
    stride: int,
    fields: Sequence[tuple[str, int, list[int] | None, int]],
    origins: Sequence[tuple[str, int]],
    named: bool = False,
) -> Source:
    """Records that were decoded into rows of ``stride`` bytes; native/data/decoded_source.h says how.

    A field is its name, dtype, shape (None: ragged) and offset in the row; an origin a file's path and first record.
    ``named``: the file has a path that others know, so it may change.
    Raises ValueError: what does not fit together.
    """

def jpeg_library(libraries: Sequence[str] = ...) -> tuple[str, str]:
    """The libjpeg-turbo that is found, in the system or at these paths; else "" and what was tried."""

def jpeg_source(
    source: Source,
    field: str,
    name: str,
    height: int,
    width: int,
    channels: int = 3,
    crop: bool = False,
    libraries: Sequence[str] = ...,
) -> Source:
    """``source`` with the JPEG files of ``field`` as pixels: uint8, height x width x channels, called ``name``.

    Raises ValueError: no such field, or a bad size. RuntimeError: no library is found.
    """

# --- engine.cpp: sources, and the engine that fills batches from them -------------------------------------------------
class Source:
    """What a channel's records are read through, whatever their format. Made by the functions that say so."""

    @property
    def records(self) -> int: ...
    @property
    def bytes(self) -> int:
        """Bytes of the files that hold the records."""
    @property
    def fields(self) -> list[tuple[str, int, int, tuple[int, ...]]]:
        """Name, kind, dtype and shape of each; launcher.data.fields.source_fields() has them in words."""

def fixed_source(
    files: Sequence[File], headers: Sequence[int], stride: int, fields: Sequence[tuple[str, int, Sequence[int], int]]
) -> Source:
    """Records of ``stride`` bytes after a header of so many bytes in each file.

    A field is its name, dtype, shape and offset in the record. Raises DataError: a file ends inside a record.
    """

def changed_source(
    source: Source, changes: Sequence[tuple[int, str, int, Sequence[float], Sequence[float], int]]
) -> Source:
    """``source`` with changed fields: kind, field, dtype, scale, shift, classes; launcher.data.transforms.

    Raises ValueError: a field is not there, or can not be changed so.
    """

class Engine:
    """Fills batches ahead and lends them; native/data/engine.h. launcher.data.loader says what the parameters are.

    ``epoch``: shuffle, seed, epoch, records, extent, window, lanes, base, world, rank, batch, tail, agreed_steps.
    ``makers``: for each field, then for the mask and the record numbers, what makes the column of NumPy arrays: of one
    (None: it is the column); of values and offsets; of values, offsets and keys.
    ``ring_wait``: seconds, without limit unless given. ``blocked`` and ``grown`` are told how many batches are held.
    ``fence``: makes an object whose ``query()`` says whether what was begun with a batch's memory is done, and whose
    ``synchronize()`` waits for it: what close() does.
    """

    def __init__(
        self,
        source: Source,
        epoch: dict[str, int],
        makers: Sequence[Callable[..., Any] | None],
        *,
        ring: int = 4,
        ring_limit: int = 64,
        threads: int = 0,
        substitute: bool = False,
        bad_limit: int = 0,
        mask: bool = False,
        numbers: bool = False,
        reuse: bool = False,
        ring_wait: float = ...,
        blocked: Callable[[int], None] | None = None,
        grown: Callable[[int], None] | None = None,
        register_memory: Callable[[int, int], None] | None = None,
        unregister_memory: Callable[[int, int], None] | None = None,
        fence: Callable[[], Any] | None = None,
    ) -> None: ...
    def next(self) -> dict[str, Any] | None: ...
    def __iter__(self) -> Iterator[dict[str, Any]]: ...
    def __next__(self) -> dict[str, Any]: ...
    def restart(self, epoch: dict[str, int]) -> None: ...
    def close(self) -> None: ...
    def statistics(self) -> dict[str, Any]: ...
    @property
    def steps(self) -> int: ...
    @property
    def step(self) -> int: ...

# --- recordio.cpp: RecordIO, Record messages, TFRecord, and their encoders --------------------------------------------

def scan_recordio(file: File, dialect: str = "auto", skip: bool = False) -> FileIndex:
    """Finds the records.

    ``dialect`` of records of several parts: ``dmlc`` (the reader puts the frames' magic back between parts), ``plain``
    (parts are concatenated), ``auto`` (plain where the file proves it, else dmlc). ``skip``: damaged places are left
    out and noted as damage. Raises DataError: truncated, malformed.
    """

def recordio_source(index: Index, dialect: str = "auto", image_header: bool = False) -> Source:
    """Records as bytes: field data (ragged uint8). ``image_header``: MXNet's image records; fields label (float32), id
    (uint64), data. Raises DataError: the first record has no such header."""

def record_proto_schema(index: Index, dialect: str = "auto") -> list[tuple[str, int, int, list[int]]]:
    """Name, kind, dtype and shape of the fields that the first record has; those of the map label have the prefix
    ``label_``. Raises DataError: there is no record, or it is no Record message."""

def record_proto_source(
    index: Index,
    dialect: str = "auto",
    schema: Sequence[tuple[str, int, int, Sequence[int]]] | None = None,
    fields: Sequence[str] | None = None,
) -> Source:
    """Records as the columns of their fields.

    ``schema``: as record_proto_schema(), in place of the first record's; other keys of a record are then left out, else
    refused. Dense fields may be declared ragged. ``fields``: those to give. Raises DataError, ValueError: a schema that
    a Record can not have, or a name that is none of its fields.
    """

def decode_record_proto(
    message: builtins.bytes, schema: Sequence[tuple[str, int, int, Sequence[int]]] | None = None
) -> list[tuple[tuple[str, int, int, list[int]], builtins.bytes, list[int]]]:
    """The fields of one message with their values as bytes and, of sparse ones, keys. Raises DataError, ValueError."""

def scan_tfrecord(file: File, skip: bool = False) -> FileIndex:
    """Finds the records, and checks the sums of their lengths. Raises DataError: truncated, malformed."""

def tfrecord_source(index: Index, check_sums: bool = True) -> Source:
    """Records as bytes: field data (ragged uint8). ``check_sums``: those of the data, whenever a record is read."""

def example_schema(index: Index) -> list[tuple[str, int, int, list[int]]]:
    """As record_proto_schema(), of TensorFlow's Example messages in TFRecord files. Lists of numbers are fixed, lists
    of bytes ragged (one in each record); what the first record has empty is ragged."""

def example_source(
    index: Index,
    check_sums: bool = True,
    schema: Sequence[tuple[str, int, int, Sequence[int]]] | None = None,
    fields: Sequence[str] | None = None,
) -> Source:
    """As record_proto_source(), of Example messages: float32, int64 (both fixed or ragged), and ragged uint8."""

def decode_example(
    message: builtins.bytes, schema: Sequence[tuple[str, int, int, Sequence[int]]] | None = None
) -> list[tuple[tuple[str, int, int, list[int]], builtins.bytes, list[int]]]:
    """As decode_record_proto(), of one Example message."""

def encode_recordio(payload: builtins.bytes, escape: bool = True) -> builtins.bytes:
    """Raises ValueError: a part is of 512 MiB or more."""

def encode_tfrecord(data: builtins.bytes) -> builtins.bytes: ...
def encode_record_proto(
    columns: Sequence[tuple[tuple[str, int, int, Sequence[int]], object, object, object]],
    begin: int,
    end: int,
    escape: bool = False,
) -> builtins.bytes:
    """Framed messages of the rows begin .. end. A column: its field, and arrays of values, offsets (int64) and keys
    (uint64); None where its kind has none. Raises ValueError: arrays that do not fit their field."""

# --- text.cpp: lines, CSV, libsvm, JSON Lines -------------------------------------------------------------------------

def scan_lines(file: File, keep_blank: bool = True, skip: bool = False) -> FileIndex:
    """Finds the lines; with ``keep_blank`` those of nothing but blanks, too. Raises DataError: unreadable."""

def lines_source(index: Index) -> Source:
    """Lines without their ends: the field data, ragged uint8."""

def scan_csv(file: File, delimiter: str = ",", quote: str = '"', header: bool = False, skip: bool = False) -> FileIndex:
    """Finds the records, after the header if there is one. ``quote``: "" for none. ``skip``: what is damaged is noted.

    Raises DataError: truncated (a quoted field without an end). ValueError: a delimiter or quote that can not be one.
    """

def csv_first(index: Index, delimiter: str = ",", quote: str = '"') -> list[str] | None:
    """The columns of the first record, None if there is no record. Raises DataError, ValueError."""

def csv_names(index: Index, delimiter: str = ",", quote: str = '"') -> list[str]:
    """The columns of the header that all files have. Raises DataError: they have different ones, or all are empty."""

def csv_source(
    index: Index,
    columns: int,
    fields: Sequence[tuple[tuple[str, int, int, Sequence[int]], int, int]],
    delimiter: str = ",",
    quote: str = '"',
) -> Source:
    """Records of so many columns. A field is name, kind, dtype and shape; its first column; how many columns it has.

    Fixed fields are float32, float64, int32 or int64; ragged uint8 is the text of one column. Raises ValueError.
    """

def scan_libsvm(file: File, skip: bool = False) -> FileIndex:
    """Finds the records, and notes what libsvm_facts() tells. Raises DataError: unreadable."""

def libsvm_facts(index: Index) -> tuple[int, int, bool, bool]:
    """The smallest and the largest index in all records, whether there is any, and whether there is a qid.

    Raises ValueError: the index is none of scan_libsvm().
    """

def libsvm_source(
    index: Index, features: int, zero_based: bool = False, dtype: int = 0, queries: bool = False
) -> Source:
    """Rows of a sparse matrix with ``features`` columns: fields label_values, values, and with ``queries`` qid.

    Raises ValueError: a dtype that is neither float32 nor float64.
    """

def json_fields(index: Index, names: Sequence[str] = ()) -> list[tuple[str, int, int, list[int]]]:
    """Name, kind, dtype and shape of the fields that the first record's keys make; of these keys, if any are named.

    Raises DataError: malformed, or mismatch: a value that makes no field.
    """

def json_source(index: Index, fields: Sequence[tuple[str, int, int, Sequence[int]]]) -> Source:
    """Records with these keys. Raises ValueError: a field that JSON can not be."""

# --- pipe.cpp: streams that one rank of a host reads for all of them --------------------------------------------------
def make_ring(bytes: int) -> int:
    """A file descriptor of the shared memory of a ring. Raises OSError."""

class StreamDecoder:
    """Takes the records of a stream apart. Made by the functions that say so."""

    @property
    def fields(self) -> list[tuple[str, int, int, tuple[int, ...]]]: ...

def stream_decoder(source: Source) -> StreamDecoder:
    """For records like those of ``source``. Raises ValueError: they can not come through a pipe."""

def attributes_decoder(fields: Sequence[tuple[str, int, int, Sequence[int]]], dialect: str = "auto") -> StreamDecoder:
    """A RecordIO record for each field: its bytes (ragged uint8), or the text of a number (a scalar)."""

def fixed_decoder(
    fields: Sequence[tuple[str, int, int, Sequence[int]]], offsets: Sequence[int], stride: int
) -> StreamDecoder:
    """Fields at fixed offsets of records of ``stride`` bytes. Raises ValueError."""

def stream_cursor(decoder: StreamDecoder) -> Source:
    """The record that is looked at, as a source of one record, to be changed by changed_source()."""

def cursor_decoder(cursor: Source, source: Source) -> StreamDecoder:
    """Takes fields from ``source``, which was made of ``cursor``. Raises ValueError: ``cursor`` is none."""

class StreamDealer:
    """Reads streams and deals their records to the ranks of a host; native/data/dealer.h.

    ``framing``: recordio, tfrecord, fixed or lines. ``unit``: records of a sample, or bytes of a record. ``text``:
    quote, delimiter, comment ("": none), whether blank lines are kept, whether there is a header.
    ``tail``: 0 drop, 1 pad, 2 short. ``agree``: called with a step and whether there are records for it, by another
    thread. Takes copies of the descriptors.
    """

    def __init__(
        self,
        rings: Sequence[int],
        sockets: Sequence[int],
        framing: str,
        unit: int,
        text: tuple[str, str, str, bool, bool],
        batch: int,
        world: int,
        first: int,
        tail: int,
        window: int,
        window_bytes: int,
        seed: int,
        agree: Callable[[int, bool], bool] | None = None,
    ) -> None: ...
    def start(self, path: str, channel: str, epoch: int, timeout_s: float, skip: int, gzip: bool) -> None: ...
    def refuse(self, file: str, text: str) -> None: ...
    def stop(self) -> None: ...
    def close(self) -> None: ...
    def statistics(self) -> dict[str, Any]: ...

class StreamReceiver:
    """A rank's end of a stream; native/data/receiver.h. Raises DataError, CollectiveError.

    ``makers``: as of Engine.
    """

    def __init__(
        self, ring: int, socket: int, batch: int, dealer: str, substitute: bool = False, bad_limit: int = 0
    ) -> None: ...
    def begin(self, epoch: int, file: str) -> bytes: ...
    def set_decoder(
        self,
        decoder: StreamDecoder,
        makers: Sequence[Callable[..., Any] | None],
        mask: bool,
        numbers: bool = False,
        reuse: bool = False,
    ) -> None: ...
    def next(self) -> dict[str, Any] | None: ...
    @property
    def ended(self) -> bool: ...
    @property
    def steps(self) -> int: ...
    def statistics(self) -> dict[str, Any]: ...
