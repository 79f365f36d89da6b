"""Differential fuzz: CSV through our reader and through pandas must give the same records.

    python tests/data/fuzz_csv.py --cases 1000000 --seed 1

A case is a record: a line of a file whose delimiter, quoting, line ends and types of columns are drawn. float64, int64
and text columns are pandas' own (float_precision="round_trip", which rounds correctly), float32 columns those of the C
library's strtof. In some files a line has another number of columns, or a number that is none: we must refuse it and
name the line.
"""

from __future__ import annotations

import io
import math
import random
import struct
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy
import pandas

from launcher.data.text import Csv
from launcher.errors import DataError

if __package__:
    from .fuzzing import check_files, main
    from .text_reading import nearest_float32, read, texts
else:
    sys.path.insert(0, str(Path(__file__).parent))
    from fuzzing import check_files, main
    from text_reading import nearest_float32, read, texts

MISSING = (
    "",
    "NA",
    "N/A",
    "NaN",
    "nan",
    "NULL",
    "null",
    "None",
    "<NA>",
    "#N/A",
    "n/a",
    "#NA",
    "-nan",
    "-NaN",
    "1.#IND",
)
MISSING += ("-1.#IND", "1.#QNAN", "-1.#QNAN", "#N/A N/A")
EDGES = ("0", "-0", "1e-45", "1.4e-45", "7e-46", "4.9e-324", "2e-324", "3.4028235e38", "3.4028236e38", "1e39", "1e400")
INFINITE = ("inf", "-inf", "+inf", "Infinity", "-Infinity", "INF")
NOT_NUMBERS = ("x", "1x", "--1", "1e", "1.2.3", "0x10", "1_0", "e5", ".", "-", "1 2", "nanx")
LETTERS = "ab ,;|\t'\u00e9\u4e2d\U0001f600\\#0"


def digits(draw: random.Random, most: int) -> str:
    return "".join(draw.choices("0123456789", k=draw.randint(1, most)))


def between_floats(value: float) -> float:
    """The middle of a float32 and the next one, as a float64."""
    return (struct.unpack("<f", struct.pack("<I", struct.unpack("<I", struct.pack("<f", value))[0] ^ 1))[0] + value) / 2


def number(draw: random.Random) -> str:
    """A number as people, programs and enemies write it."""
    form = draw.random()
    if form < 0.35:
        text = f"{draw.gauss(0, 1):.{draw.randint(0, 9)}f}"
    elif form < 0.5:
        text = repr(draw.gauss(0, 1) * 10.0 ** draw.randint(-20, 20))
    elif form < 0.6:
        text = repr(struct.unpack("<d", draw.randbytes(8))[0])
        text = "0" if "n" in text else text
    elif form < 0.7:  # beside the middle of two floats
        (middle,) = struct.unpack("<f", draw.randbytes(4))
        text = f"{between_floats(middle):.{draw.randint(5, 60)}e}" if math.isfinite(middle) else "1"
    elif form < 0.9:
        text = digits(draw, 25) + draw.choice(["", ".", "." + digits(draw, 25)])
        exponents = ("", "", f"e{draw.randint(-60, 60)}", f"E+{draw.randint(0, 400)}", f"e-{draw.randint(0, 400)}")
        text += draw.choice(exponents)
    else:
        text = draw.choice(["." + digits(draw, 9), *EDGES])
    if not text.startswith("-") and draw.random() < 0.3:
        text = draw.choice("+-") + text
    return text


def float_text(draw: random.Random) -> str:
    form = draw.random()
    if form < 0.05:  # short, for pandas rounds others wrongly when there are blanks around them
        return f"{' ' * draw.randint(0, 2)}{draw.gauss(0, 1):.3f}{' ' * draw.randint(0, 2)}"
    if form < 0.9:
        return number(draw)
    return draw.choice(MISSING) if form < 0.97 else draw.choice(INFINITE)


def int_text(draw: random.Random) -> str:
    form = draw.random()
    if form < 0.6:
        return str(draw.randint(-1000, 1000))
    if form < 0.9:
        return str(draw.randint(-(2**63), 2**63 - 1))
    return draw.choice(["0", "-1", "9223372036854775807", "-9223372036854775808", "007", "+5", "12345678", "123456789"])


class File:
    """What is drawn for one file: its text, and what is in it."""

    def __init__(self, draw: random.Random, records: int) -> None:
        self.delimiter = draw.choice(",,,;\t|")
        self.quoting = draw.random() < 0.6
        self.header = draw.random() < 0.3
        self.end = draw.choice(["\n", "\n", "\r\n"])
        self.dtypes = [draw.choice(["float64", "float32", "int64", "text"]) for _ in range(draw.randint(1, 9))]
        self.rows = [[self.cell(draw, dtype) for dtype in self.dtypes] for _ in range(records)]
        self.names = [f"c{i}" for i in range(len(self.dtypes))]
        lines = [self.line(draw, row) for row in self.rows]
        self.lines = [self.delimiter.join(self.names), *lines] if self.header else lines

    def cell(self, draw: random.Random, dtype: str) -> str:
        if dtype == "text":
            allowed = [c for c in LETTERS if self.quoting or c != self.delimiter]
            allowed += ['"', "\n", "\r\n"] if self.quoting else []
            return "".join(draw.choices(allowed, k=draw.randint(0, 12)))
        return int_text(draw) if dtype == "int64" else float_text(draw)

    def line(self, draw: random.Random, row: list[str]) -> str:
        cells = []
        for cell in row:
            needs = any(c in cell for c in (self.delimiter, "\n", "\r")) or cell.startswith('"')
            if self.quoting and (needs or draw.random() < 0.15):
                cell = '"' + cell.replace('"', '""') + '"'
            cells.append(cell)
        return self.delimiter.join(cells)

    def content(self, draw: random.Random) -> bytes:
        """The file, with blank lines in it, and perhaps without an end of the last line."""
        lines = []
        for line in self.lines:
            while draw.random() < 0.03:
                lines.append(draw.choice(["", "  "]))
            lines.append(line)
        return (self.end.join(lines) + draw.choice([self.end, self.end, ""])).encode()


def theirs(file: File, content: bytes) -> dict[str, Any]:
    """The columns as pandas has them."""
    numbers = [i for i, dtype in enumerate(file.dtypes) if dtype == "float64"]
    as_text = {"float32": "str", "text": "str"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The 'float_precision' argument is deprecated")  # the default rounds wrongly
        table = pandas.read_csv(
            io.BytesIO(content),
            sep=file.delimiter,
            header=0 if file.header else None,
            names=file.names,
            quoting=0 if file.quoting else 3,
            dtype={name: as_text.get(dtype, dtype) for name, dtype in zip(file.names, file.dtypes, strict=True)},
            keep_default_na=False,
            na_values={file.names[i]: list(MISSING) for i in numbers},
            float_precision="round_trip",
            engine="c",
            index_col=False,
        )
    columns: dict[str, Any] = {}
    for name, dtype in zip(file.names, file.dtypes, strict=True):
        column = table[name]
        if dtype == "text":
            columns[name] = [text.encode() for text in column]
        elif dtype == "float32":
            texts_of = (text.strip() for text in column)
            rounded = [math.nan if text in MISSING else nearest_float32(text) for text in texts_of]
            columns[name] = numpy.array(rounded, numpy.float32)
        else:
            columns[name] = column.to_numpy()
    return columns


def check(draw: random.Random, file: File, path: Path) -> None:
    """One file, as it is."""
    content = file.content(draw)
    format = Csv(header=file.header, delimiter=file.delimiter, quote='"' if file.quoting else "")
    fields = {name: (dtype, number) for number, (name, dtype) in enumerate(zip(file.names, file.dtypes, strict=True))}
    try:
        wanted = theirs(file, content)
    except pandas.errors.EmptyDataError:
        wanted = {}
    if not wanted or not len(next(iter(wanted.values()))):
        return  # nothing but blank lines
    found = read(format, content, path, fields, access=draw.choice(["mapped", "read"]))
    for name, column in wanted.items():
        ours = texts(found[name]) if isinstance(column, list) else found[name].tolist()
        pairs = zip(ours, column, strict=True)
        unlike = [(row, a, b) for row, (a, b) in enumerate(pairs) if not same(a, b)]
        if unlike:
            row, a, b = unlike[0]
            raise AssertionError(f"column {name}, row {row}: {a!r} is not {b!r}\n{content!r}")


def same(a: Any, b: Any) -> bool:
    """Equal, zeros with their sign, and NaN like NaN."""
    if isinstance(a, float):
        return math.isnan(b) if math.isnan(a) else a == b and math.copysign(1, a) == math.copysign(1, b)
    return bool(a == b)


def check_damaged(draw: random.Random, file: File, path: Path) -> None:
    """The same file with one record that is not like the others."""
    if not file.lines[0].strip():
        return  # a blank line, so that the damaged one could be the first record
    row = draw.randrange(1, len(file.rows)) + file.header
    columns = [i for i, dtype in enumerate(file.dtypes) if dtype != "text"]
    if columns and draw.random() < 0.5:
        cells = ["1" if dtype != "text" else "t" for dtype in file.dtypes]
        cells[draw.choice(columns)] = draw.choice(NOT_NUMBERS)
        file.lines[row] = file.delimiter.join(cells)
    elif draw.random() < 0.5:
        file.lines[row] += file.delimiter + draw.choice(["", "1"])
    elif len(file.dtypes) > 1:
        file.lines[row] = "1"
    else:
        return
    content = file.end.join(file.lines).encode()
    fields = {name: (dtype, number) for number, (name, dtype) in enumerate(zip(file.names, file.dtypes, strict=True))}
    format = Csv(header=file.header, delimiter=file.delimiter, quote='"' if file.quoting else "")
    line = sum(text.count("\n") + 1 for text in file.lines[:row]) + 1
    try:
        read(format, content, path, fields)
    except DataError as error:
        if f"(line {line})" in str(error) and error.problem == "mismatch":
            return
        raise
    raise AssertionError(f"line {line} was taken: {file.lines[row]!r}\n{content!r}")


def run(cases: int, seed: int, folder: Path) -> tuple[int, int]:
    """Checks as many records at least. How many they were, and of how many files."""
    path = folder / "fuzz.csv"

    def check_one(draw: random.Random) -> int:
        file = File(draw, draw.randint(2, 60))
        check(draw, file, path)
        check_damaged(draw, file, path)
        return len(file.rows)

    return check_files(cases, seed, check_one)


if __name__ == "__main__":
    main(__doc__.splitlines()[0], run)
