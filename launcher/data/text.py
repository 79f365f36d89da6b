"""Records that are lines of text: CSV, libsvm, JSON Lines, and lines as they are.

Each format is a record of its options, made by ``of(options)``, with three things to ask of it: ``key()`` (what the
index of a file depends on), ``scan(file, skip)`` (the index of a file) and ``source(index, fields)``.
"""

from __future__ import annotations

from launcher import _data
from launcher.data.fields import DTYPES, KINDS, dtype_number
from launcher.errors import DataError, UsageError
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from typing_extensions import Self

    FieldTuple = tuple[str, int, int, Sequence[int]]
    Columns = tuple[FieldTuple, int, int]

_FIXED, _RAGGED = KINDS.index("fixed"), KINDS.index("ragged")
_TEXT = DTYPES.index("uint8")
_FLOATS = ("float32", "float64")
_NUMBERS = (*_FLOATS, "int32", "int64")
_JSON_NUMBERS = (*_NUMBERS, "bool")
_SWITCHES = {"true": True, "present": True, "1": True, "false": False, "absent": False, "0": False}


class Csv(Record):
    """Comma-separated values (RFC 4180; numbers and missing values as pandas' ``read_csv`` has them).

    Attributes:
        header: whether the first line of each file holds the names of its columns.
        delimiter, quote: one character each. Without a quote (``""``) quotes are text, and a newline ends a record
            wherever it is.
        label_size: so many of the first columns are the field "label_values", the others "values".
        dtype: of both: float32, float64, int32 or int64.
    """

    header: bool = False
    delimiter: str = ","
    quote: str = '"'
    label_size: int = 0
    dtype: str = "float32"

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Csv:
        """From options, which may be texts: parameters of a content type such as ``text/csv;label_size=1``.

        Raises:
            UsageError: there is no such option, or its value makes no sense.
        """
        given = _known(cls, options)
        made = cls(
            _switch("header", given["header"]),
            _character("delimiter", given["delimiter"]),
            _character("quote", given["quote"]) if given["quote"] else "",
            _count("label_size", given["label_size"]),
            _dtype("dtype", given["dtype"], _NUMBERS),
        )
        if made.delimiter == made.quote:
            raise UsageError(f"delimiter and quote are both {made.quote!r}; expected two characters")
        return made

    def key(self) -> str:
        """What the index of a file depends on."""
        return f"header={self.header} delimiter={self.delimiter!r} quote={self.quote!r}"

    def scan(self, file: _data.File, skip: bool = False) -> _data.FileIndex:
        """The records of a file. ``skip``: what is damaged is left out and noted.

        Raises:
            DataError: a quoted field has no end; the file can not be read.
        """
        return _data.scan_csv(file, self.delimiter, self.quote, self.header, skip)

    def source(self, index: _data.Index, fields: Any = None) -> _data.Source:
        """What reads the records.

        Args:
            index: of files that :meth:`scan` has scanned.
            fields: None: "values", and "label_values" with ``label_size``. Names: these of the two, or with a header
                columns, each a number of ``dtype``. A mapping: name -> dtype, or (dtype, column). The column is its
                name in the header (which the field's own is where none is given), its number from 0 on, or a range
                of numbers. A dtype is float32, float64, int32, int64 or "text" (ragged uint8, one column).

        Raises:
            DataError: there are no records, or the headers of two files are not the same.
            UsageError: a field is not understood, or has columns that are not there.
        """
        names = self._names(index)
        columns = len(names) if self.header else self._columns(index)
        wanted = self._both(columns) if fields is None else self._chosen(fields, names, columns)
        return _data.csv_source(index, columns, wanted, self.delimiter, self.quote)

    def check_first(self, source: _data.Source, index: _data.Index, *, lenient: bool) -> None:
        """Looks whether the first record can be read: a header that nobody has told of would be found at some step.

        Args:
            source: of ``index``.
            lenient: only what has no number at all is an error: of other rows, the reading of the record tells.

        Raises:
            DataError: it can not.
        """
        errors = [] if self.header else _data.check_records(source, 0, 1, 1)[1]
        cells = (_data.csv_first(index, self.delimiter, self.quote) or []) if errors else []
        words = not any(map(_is_number, cells))
        if not errors or (lenient and not words):
            return
        text, problem, file, offset, record = errors[0]
        if source.records == 1 or _data.check_records(source, 1, 2, 1)[0] == 0:
            text += "; if this row is a header, pass header=True (--option header=true)"
        elif words:
            text += "; say which columns are wanted, as what: fields={'age': ('float32', 0), 'note': ('text', 1)}"
        raise DataError(text, problem, file, offset, record)

    def _columns(self, index: _data.Index) -> int:
        first = _data.csv_first(index, self.delimiter, self.quote)
        if first is None:
            raise DataError("the files have no records: how many columns they would have is not known")
        return len(first)

    def _names(self, index: _data.Index) -> list[str]:
        return _data.csv_names(index, self.delimiter, self.quote) if self.header else []

    def _both(self, columns: int) -> list[Columns]:
        if self.label_size >= columns:
            raise UsageError(
                f"label_size is {self.label_size}, but the rows have {columns} columns: no values are left"
            )
        dtype, rest = DTYPES.index(self.dtype), columns - self.label_size
        both: list[Columns] = [(("values", _FIXED, dtype, (rest,)), self.label_size, rest)]
        if self.label_size:
            both.insert(0, (("label_values", _FIXED, dtype, (self.label_size,)), 0, self.label_size))
        return both

    def _chosen(self, fields: Any, names: Sequence[str], columns: int) -> list[Columns]:
        if not _is_mapping(fields):
            wanted = _name_list(fields)
            if not set(wanted) <= set(names):
                both = {field[0][0]: field for field in self._both(columns)}
                return [both[_one_of(name, (*both, *names))] for name in wanted]
            fields = dict.fromkeys(wanted, self.dtype)
        return [self._column(name, given, names, columns) for name, given in fields.items()]

    def _column(self, name: str, given: Any, names: Sequence[str], columns: int) -> Columns:
        dtype, column = given if isinstance(given, tuple) and len(given) == 2 else (given, name)
        first, count, shape = _columns_of(name, column, names)
        if first < 0 or not 0 < count <= columns - first:
            raise UsageError(f"field {name!r} is column {column!r}; expected columns of 0 to {columns - 1}")
        if dtype == "text":
            if shape:
                raise UsageError(f"field {name!r} is the text of several columns; expected one column")
            return ((name, _RAGGED, _TEXT, ()), first, 1)
        return ((name, _FIXED, dtype_number(_dtype(f"field {name!r}", dtype, _NUMBERS)), shape), first, count)


class Libsvm(Record):
    """Lines of ``label [qid:number] index:value ... [# comment]``: fields "label_values" and sparse "values".

    Attributes:
        base: the index of the first column, 0 or 1. ``auto``: 1 unless an index 0 is in the data, which is what
            scikit-learn's ``load_svmlight_file`` does.
        columns: of the matrix; 0: up to the largest index in the data. Where hosts have different files
            (``ShardedByS3Key``), both have to be given.
        dtype: of labels and values: float32 or float64.
        qid: whether there is a field "qid" (int64); otherwise qids are passed over.
    """

    base: int | str = "auto"
    columns: int = 0
    dtype: str = "float32"
    qid: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Libsvm:
        """From options.

        Raises:
            UsageError: there is no such option, or its value makes no sense.
        """
        given = _known(cls, options)
        base = given["base"] if given["base"] == "auto" else _count("base", given["base"])
        if base not in ("auto", 0, 1):
            raise UsageError(f"base is {base!r}; expected auto, 0 or 1")
        return cls(
            base,
            _count("columns", given["columns"]),
            _dtype("dtype", given["dtype"], _FLOATS),
            _switch("qid", given["qid"]),
        )

    def key(self) -> str:
        """What the index of a file depends on."""
        return ""

    def scan(self, file: _data.File, skip: bool = False) -> _data.FileIndex:
        """The records of a file: lines that are not blank, and not all comment.

        Raises:
            DataError: the file can not be read.
        """
        return _data.scan_libsvm(file, skip)

    def source(self, index: _data.Index, fields: Any = None) -> _data.Source:
        """What reads the records. ``fields``: None, or the names of all fields; "qid" among them asks for it.

        Raises:
            DataError: there are no records with an index, and ``columns`` is not given.
            UsageError: ``fields`` are others; ``columns`` are fewer than the data have.
        """
        qid = self.qid
        if fields is not None:
            wanted = _name_list(fields)
            if not {"label_values", "values"} <= set(wanted) <= {"label_values", "values", "qid"}:
                raise UsageError(f"fields are {', '.join(wanted)}; expected label_values, values and perhaps qid")
            qid = "qid" in wanted
        smallest, largest, found, _ = _data.libsvm_facts(index)
        base = self.base if isinstance(self.base, int) else int(not found or smallest > 0)
        if self.columns == 0 and not found:
            raise DataError("the records have no index:value: say the number of columns by columns=")
        needed = largest + 1 - base if found else 0
        if 0 < self.columns < needed:
            raise UsageError(f"columns is {self.columns}, but the largest index, {largest}, is that of column {needed}")
        return _data.libsvm_source(index, self.columns or needed, base == 0, DTYPES.index(self.dtype), qid)


class _WithoutOptions(Record):
    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """From options, of which there are none.

        Raises:
            UsageError: an option was given.
        """
        _known(cls, options)
        return cls()

    def key(self) -> str:
        """What the index of a file depends on."""
        return ""


class JsonLines(_WithoutOptions):
    """A JSON object a line. Numbers, booleans and strings become fields, and arrays of numbers or booleans."""

    def scan(self, file: _data.File, skip: bool = False) -> _data.FileIndex:
        """The records of a file: lines that are not blank.

        Raises:
            DataError: the file can not be read.
        """
        return _data.scan_lines(file, False, skip)

    def source(self, index: _data.Index, fields: Any = None) -> _data.Source:
        """What reads the records.

        Args:
            index: of files that :meth:`scan` has scanned.
            fields: None: all keys of the first record. Names: these keys, typed as the first record has them: a whole
                number is int64, another float32, a string ragged uint8, an array has its length, and is float32 if
                one of its numbers is. A mapping: name -> dtype, with the shape of the first record, or
                (dtype, shape). A dtype is float32, float64, int32, int64, bool or "text"; a shape of None is an array
                of any length (ragged).

        Raises:
            DataError: there are no records, or the first one's value at a key makes no field.
            UsageError: a field is not understood.
        """
        if not _is_mapping(fields):
            return _data.json_source(index, self._inferred(index, [] if fields is None else _name_list(fields)))
        asked = [name for name, given in fields.items() if not isinstance(given, tuple) and given != "text"]
        shapes = {name: (kind, shape) for name, kind, _, shape in (self._inferred(index, asked) if asked else ())}
        return _data.json_source(index, [_json_field(name, given, shapes) for name, given in fields.items()])

    @staticmethod
    def _inferred(index: _data.Index, names: list[str]) -> list[FieldTuple]:
        if index.records == 0:
            raise DataError("the files have no records: say the fields and their types by fields=")
        found = _data.json_fields(index, names)
        missing = set(names).difference(field[0] for field in found)
        if missing:
            raise UsageError(f"the first record has no {', '.join(sorted(missing))}; expected the keys of a record")
        return sorted(found, key=lambda field: names.index(field[0])) if names else list(found)


class Lines(_WithoutOptions):
    """Lines as they are, blank ones too: the field "data", ragged uint8, without line ends."""

    def scan(self, file: _data.File, skip: bool = False) -> _data.FileIndex:
        """The records of a file.

        Raises:
            DataError: the file can not be read.
        """
        return _data.scan_lines(file, True, skip)

    def source(self, index: _data.Index, fields: Any = None) -> _data.Source:
        """What reads the records. ``fields``: None or ["data"].

        Raises:
            UsageError: ``fields`` is something else.
        """
        if fields is not None and _name_list(fields) != ["data"]:
            raise UsageError(f"fields is {fields!r}; the one field of lines is data")
        return _data.lines_source(index)


def _json_field(name: str, given: Any, inferred: Mapping[str, tuple[int, Sequence[int]]]) -> FieldTuple:
    if given == "text":
        return (name, _RAGGED, _TEXT, ())
    if not isinstance(given, tuple):
        kind, shape = inferred[name]
        if kind != _FIXED:
            raise UsageError(f"field {name!r} is {given!r}, but the first record has a string; expected 'text'")
        return (name, _FIXED, dtype_number(_dtype(f"field {name!r}", given, _JSON_NUMBERS)), shape)
    if len(given) != 2:
        raise UsageError(f"field {name!r} is {given!r}; expected a dtype or (dtype, shape)")
    dtype, extent = given
    if extent is None:
        return (name, _RAGGED, dtype_number(_dtype(f"field {name!r}", dtype, _NUMBERS)), ())
    sizes = (extent,) if isinstance(extent, int) else tuple(extent)
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise UsageError(f"field {name!r} has shape {extent!r}; expected whole numbers from 0 on, or None")
    return (name, _FIXED, dtype_number(_dtype(f"field {name!r}", dtype, _JSON_NUMBERS)), sizes)


def _columns_of(name: str, column: Any, names: Sequence[str]) -> tuple[int, int, tuple[int, ...]]:
    """The first column, how many, and the shape of the field."""
    if isinstance(column, range) and column.step == 1:
        return column.start, len(column), (len(column),)
    if isinstance(column, int):
        return column, 1, ()
    if not names:
        raise UsageError(f"field {name!r} has no column: say its number, (dtype, column), or read with header=True")
    if names.count(column) > 1:
        raise UsageError(f"field {name!r}: the header has several columns {column!r}; say its number, from 0 on")
    return names.index(_one_of(column, names)), 1, ()


def _one_of(name: Any, names: Sequence[str]) -> str:
    for known in names:
        if known == name:
            return known
    raise UsageError(f"there is no {name!r}; expected one of {', '.join(names)}")


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _is_mapping(fields: Any) -> bool:
    return hasattr(fields, "items")


def _name_list(fields: Any) -> list[str]:
    names = [fields] if isinstance(fields, str) else list(fields)
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise UsageError(f"fields is {fields!r}; expected names, each of them once")
    return names


def _known(options_of: type[Record], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with their defaults."""
    allowed = options_of._fields
    for name in options:
        if name not in allowed:
            what = f"expected one of {', '.join(allowed)}" if allowed else "the format has none"
            raise UsageError(f"there is no option {name!r}; {what}")
    return {**options_of._defaults, **options}


def _switch(name: str, given: Any) -> bool:
    found = _SWITCHES.get(str(given).lower())
    if found is None:
        raise UsageError(f"{name} is {given!r}; expected true or false")
    return found


def _count(name: str, given: Any) -> int:
    if isinstance(given, str) and given.isdecimal():
        given = int(given)
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        raise UsageError(f"{name} is {given!r}; expected a whole number from 0 on")
    return given


def _character(name: str, given: Any) -> str:
    # A backslash is left to be: r"\t" is how a content type would have it.
    text = "\t" if given in ("\\t", "tab") else given
    if not isinstance(text, str) or len(text) != 1 or not text.isascii() or text in "+-.0123456789eE\r\n\0":
        raise UsageError(f"{name} is {given!r}; expected one ASCII character, which no number and no line end has")
    return text


def _dtype(name: str, given: Any, allowed: Sequence[str]) -> str:
    found = DTYPES[dtype_number(given)] if given != "text" else "text"
    if found not in allowed:
        raise UsageError(f"{name} is {given!r}; expected one of {', '.join(allowed)}")
    return found
