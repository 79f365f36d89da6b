"""CSV: what is in the records, and what is said about those that are none."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import pytest

from launcher.data import Loader
from launcher.data.catalogue import open_source
from launcher.data.channel import Place
from launcher.data.stream_format import decoder_of
from launcher.data.text import Csv
from launcher.errors import DataError, UsageError

from .text_reading import index_of, nearest_float32, read, read_source, texts

ACCESS = ("mapped", "read")
F24 = {
    "lf": b"1,2.5,-3\n4,5,6\n",
    "crlf": b"1,2.5,-3\r\n4,5,6\r\n",
    "no-last-newline": b"1,2.5,-3\n4,5,6",
    "crlf-no-last-newline": b"1,2.5,-3\r\n4,5,6",
    "blank-lines": b"\n1,2,3\n\r\n  \n4,5,6\n\n",
    "quoted": b'"1","2.5",-3\n4,"5",""\n',
    "nan-inf-empty": b"nan,inf,\n-inf,NaN,NA\n,,\n",
    "words": b"Infinity,-Infinity,NULL\n#N/A,<NA>,None\n",
    "smallest": b"1e-45,7.0064923216240854e-46,7.006492321624086e-46\n1.401298464324817e-45,0,-0\n",
    "17-digits": b"0.12345678901234567,12345678.901234567,1.0000000000000002\n9007199254740993,0.1,0.3\n",
    "beside-a-middle": b"16777217,16777219,16777217.000000001\n1.00000005960464477539,1.0000000596046448,33554434.5\n",
    "largest": b"3.4028235e38,3.4028236e38,-3.5e38\n1e400,-1e400,1e-400\n",
    "forms": b"+1,.5,5.\n1E5,1e+5,007\n",
    "blanks": b" 1 , 2\t,3 \n4,  5,6\n",
}


def values(content: bytes, path: Path, access: str = "mapped", **options: Any) -> Any:
    return read(Csv(**options), content, path, access=access)["values"]


@pytest.mark.parametrize("access", ACCESS)
@pytest.mark.parametrize("case", F24)
def test_f24_equal_to_pandas(tmp_path: Path, case: str, access: str) -> None:
    """F24: float64 is pandas' own, float32 the nearest to the text (not to pandas' float64)."""
    pandas = pytest.importorskip("pandas")
    content = F24[case]
    single = values(content, tmp_path / "a.csv", access)
    double = values(content, tmp_path / "a.csv", access, dtype="float64")
    table = pandas.read_csv(tmp_path / "a.csv", header=None, dtype=numpy.float64)
    assert numpy.array_equal(double, table.to_numpy(), equal_nan=True)
    words = pandas.read_csv(tmp_path / "a.csv", header=None, dtype=str).fillna("nan")
    nearest = words.map(nearest_float32).to_numpy(numpy.float32)
    assert single.dtype == numpy.float32 and numpy.array_equal(single, nearest, equal_nan=True)


@pytest.mark.parametrize(
    "content, offset, record, line, said",
    [
        (b"1,2\n3\n", 4, 1, 2, "1 columns; expected 2"),
        (b"1,2\n3,4,5\n", 4, 1, 2, "3 columns; expected 2"),
        (b"1,2\r\n\r\n3,4,\r\n", 7, 1, 3, "3 columns; expected 2"),
        (b'1,"2"\n"3\n"\n', 6, 1, 2, "1 columns; expected 2"),
        (b'"1",2\n\n\n3,4\n5', 12, 2, 5, "1 columns; expected 2"),
        (b"1,2\n" * 50 + b"1", 200, 50, 51, "1 columns; expected 2"),
        (b"1,2\n3,x\n", 6, 1, 2, "column 1 (counted from 0) is 'x'"),
        (b"1,2\n3,4 5\n", 6, 1, 2, "is '4 5'"),
        (b"1,2\n3,1e\n", 6, 1, 2, "is '1e'"),
        (b"1,2\n3,0x1p3\n", 6, 1, 2, "is '0x1p3'"),
        (b"1,2\n3,\xff\x00\n", 6, 1, 2, r"is '\xff\x00'"),
        (b'1,2\n"3","x"\n', 4, 1, 2, "is 'x'"),
    ],
)
@pytest.mark.parametrize("access", ACCESS)
def test_f24_bad_row_is_named(
    tmp_path: Path, content: bytes, offset: int, record: int, line: int, said: str, access: str
) -> None:
    """F24: a ragged row, or a number that is none: DataError with file, line and offset."""
    path = tmp_path / "bad.csv"
    with pytest.raises(DataError) as caught:
        values(content, path, access)
    error = caught.value
    assert (error.problem, error.file, error.offset, error.record) == ("mismatch", str(path), offset, record)
    assert said in str(error) and f"(line {line})" in str(error)


@pytest.mark.parametrize("access", ACCESS)
def test_open_quote_is_truncated(tmp_path: Path, access: str) -> None:
    """A quoted field without an end would swallow the rest of the file."""
    path, content = tmp_path / "a.csv", b'1,2\n3,"4\n5,6\n'
    with pytest.raises(DataError, match=r"byte 4: record 1: .*no closing quote \(line 2\)") as caught:
        values(content, path, access)
    assert caught.value.problem == "truncated"
    index = index_of(Csv(), path, access=access, skip=True)
    assert [(offset, size) for offset, size, _ in index.part(0).damage] == [(4, 9)]
    assert read_source(Csv().source(index))["values"].tolist() == [[1, 2]]
    plain = read(Csv(quote=""), b'a,"b\n', path, {"x": ("text", 0), "y": ("text", 1)}, access=access)
    assert texts(plain["y"]) == [b'"b']


@pytest.mark.parametrize("access", ACCESS)
def test_quotes(tmp_path: Path, access: str) -> None:
    """Delimiters, newlines and doubled quotes inside; a quote that does not begin a field is text."""
    content = b'a,"x,""y""\r\nz",1\n"",5" pipe,"2"\n"q"r,"""",3\n'
    fields = {"a": ("text", 0), "b": ("text", 1), "c": ("int64", 2)}
    batch = read(Csv(), content, tmp_path / "a.csv", fields, access=access)
    assert texts(batch["a"]) == [b"a", b"", b"qr"]
    assert texts(batch["b"]) == [b'x,"y"\r\nz', b'5" pipe', b'"']
    assert batch["c"].tolist() == [1, 2, 3] and batch["c"].dtype == numpy.int64


def test_labels_of_the_content_type(tmp_path: Path) -> None:
    """text/csv;label_size=1: options come as texts."""
    format = Csv.of({"label_size": "1"})
    batch = read(format, b"7,1,2\n8,3,4\n", tmp_path / "a.csv")
    assert list(batch) == ["label_values", "values"]
    assert batch["label_values"].tolist() == [[7], [8]] and batch["values"].tolist() == [[1, 2], [3, 4]]
    assert list(read(format, b"7,1,2\n", tmp_path / "a.csv", ["values"])) == ["values"]


def test_header_names_columns(tmp_path: Path) -> None:
    """By name, by number, several at once, with types; a byte order mark is no part of the first name."""
    content = '\ufeffid,"the ""x""",y,note\n1,0.5,2,héllo\n9007199254740993,-1,4,\n'.encode()
    fields = {
        "id": "int64",
        "x": ("float32", 'the "x"'),
        "both": ("float64", range(1, 3)),
        "note": "text",
        "small": ("int32", 2),
    }
    batch = read(Csv.of({"header": "present"}), content, tmp_path / "a.csv", fields)
    assert batch["id"].tolist() == [1, 9007199254740993]
    assert batch["x"].tolist() == [0.5, -1] and batch["x"].dtype == numpy.float32
    assert batch["both"].tolist() == [[0.5, 2], [-1, 4]] and batch["both"].dtype == numpy.float64
    assert texts(batch["note"]) == ["héllo".encode(), b""]
    assert batch["small"].tolist() == [2, 4] and batch["small"].dtype == numpy.int32
    batch = read(Csv(header=True), b"a,b,c\n1,2,3\n", tmp_path / "a.csv", ["c", "a"])
    assert list(batch) == ["c", "a"] and batch["c"].tolist() == [3]


def test_headers_have_to_be_the_same(tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_bytes(b"a,b\n1,2\n")
    (tmp_path / "2.csv").write_bytes(b"")
    (tmp_path / "3.csv").write_bytes(b"a,b\r\n3,4")
    format = Csv(header=True)
    paths = [tmp_path / name for name in ("1.csv", "2.csv", "3.csv")]
    batch = read_source(format.source(index_of(format, *paths)))
    assert batch["values"].tolist() == [[1, 2], [3, 4]]
    paths[2].write_bytes(b"b,a\n3,4\n")
    with pytest.raises(DataError, match=r"3\.csv.*'b,a'; expected 'a,b' as in .*1\.csv"):
        format.source(index_of(format, *paths))


def test_whole_numbers(tmp_path: Path) -> None:
    content = b"1,-9223372036854775808\n+12345678,9223372036854775807\n-123456789, 7 \n"
    assert values(content, tmp_path / "a.csv", dtype="int64").tolist() == [
        [1, -(2**63)],
        [12345678, 2**63 - 1],
        [-123456789, 7],
    ]
    for bad in (b"", b"1.0", b"nan", b"9223372036854775808", b"1e3", b"+-1"):
        with pytest.raises(DataError, match="a whole number that fits int64"):
            values(b"1,2\n3," + bad + b"\n", tmp_path / "a.csv", dtype="int64")
    assert values(b"2147483647\n", tmp_path / "a.csv", dtype="int32").tolist() == [[2147483647]]
    with pytest.raises(DataError, match="fits int32"):
        values(b"2147483648\n", tmp_path / "a.csv", dtype="int32")


@pytest.mark.parametrize("delimiter", ["\t", ";", "|", " "])
def test_delimiters(tmp_path: Path, delimiter: str) -> None:
    rows = ["1,2,3", ",,", "4,,-5"]
    content = "\n".join(rows).replace(",", delimiter).encode()
    nan = float("nan")
    wanted = [[1, 2, 3], [nan, nan, nan], [4, nan, -5]]
    assert numpy.array_equal(values(content, tmp_path / "a.csv", delimiter=delimiter), wanted, equal_nan=True)


def test_wide_rows_and_the_end_of_a_row(tmp_path: Path) -> None:
    """Numbers of all lengths, at all distances from the end of a record."""
    draw = random.Random(1)
    rows = [[f"{draw.uniform(-9, 9):.{draw.randint(0, 20)}f}" for _ in range(1001)] for _ in range(40)]
    content = "\n".join(",".join(row) for row in rows).encode()
    wanted = numpy.array([[nearest_float32(text) for text in row] for row in rows], numpy.float32)
    assert numpy.array_equal(values(content, tmp_path / "a.csv"), wanted)
    for length in range(1, 60):
        text = ("123.4567890123456789" * 3)[:length]
        text = text.replace(".", "", text.count(".") - 1) if text.count(".") > 1 else text
        assert values(text.encode(), tmp_path / "a.csv", dtype="float64").tolist() == [[float(text)]]


def test_files_that_are_read_in_pieces(tmp_path: Path) -> None:
    """Records, quotes and their newlines across the borders of the pieces that a file is read in."""
    draw = random.Random(2)
    line = ('"' + "a\n" * 70 + '""",' + "7\r\n\n").encode()
    content = b"".join(line + b"x" * draw.randint(0, 90) + b",8\n" for _ in range(50_000))
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    assert len(content) > 9 << 20
    mapped, pieces = index_of(Csv(), path), index_of(Csv(), path, access="read")
    assert mapped.records == pieces.records == 100_000
    for record in range(0, 100_000, 997):
        assert mapped.place(record) == pieces.place(record)
    batch = read_source(Csv().source(pieces, {"text": ("text", 0), "number": ("float32", 1)}))
    assert batch["number"].tolist() == [7.0, 8.0] * 50_000
    assert batch["text"][99_998].tobytes() == b"a\n" * 70 + b'"'


@pytest.mark.parametrize(
    "options, fields, said",
    [
        ({"label_size": 2}, None, "no values are left"),
        ({}, ["a"], "there is no 'a'"),
        ({}, {"a": "float32"}, "header=True"),
        ({}, {"a": ("float32", 2)}, "expected columns of 0 to 1"),
        ({}, {"a": ("float32", -1)}, "expected columns of 0 to 1"),
        ({}, {"a": ("float32", range(1, 3))}, "expected columns of 0 to 1"),
        ({}, {"a": ("float16", 0)}, "expected one of float32"),
        ({}, {"a": ("text", range(2))}, "several columns"),
        ({}, [], "expected names"),
    ],
)
def test_fields_that_make_no_sense(tmp_path: Path, options: dict[str, Any], fields: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read(Csv(**options), b"1,2\n", tmp_path / "a.csv", fields)


@pytest.mark.parametrize(
    "options",
    [
        {"delimiter": ""},
        {"delimiter": "ab"},
        {"delimiter": "e"},
        {"delimiter": "\n"},
        {"delimiter": "é"},
        {"quote": ","},
        {"label_size": -1},
        {"label_size": "x"},
        {"dtype": "float16"},
        {"header": "perhaps"},
        {"separator": ","},
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        Csv.of(options)


def test_no_records(tmp_path: Path) -> None:
    """F10: a file may be empty; of nothing at all no columns are known."""
    (tmp_path / "empty.csv").write_bytes(b"")
    (tmp_path / "full.csv").write_bytes(b"1,2\n")
    format = Csv()
    index = index_of(format, tmp_path / "empty.csv", tmp_path / "full.csv")
    assert read_source(format.source(index))["values"].tolist() == [[1, 2]]
    with pytest.raises(DataError, match="no records"):
        format.source(index_of(format, tmp_path / "empty.csv"))


HEADED = "age,size\n" + "".join(f"{number},{number}.5\n" for number in range(100))


@pytest.mark.parametrize("on_bad", ["raise", "substitute", "skip"])
def test_a_header_that_nobody_told_of_is_found_at_open(tmp_path: Path, on_bad: str) -> None:
    """Not at whatever step the first line comes."""
    path = tmp_path / "a.csv"
    path.write_text(HEADED)
    with pytest.raises(DataError, match=r"a\.csv: byte 0: record 0: column 0 .* is 'age'; .*\(line 1\)") as found:
        open_source(path, on_bad=on_bad)
    assert "; if this row is a header, pass header=True (--option header=true)" in str(found.value)
    assert (found.value.file, found.value.offset, found.value.record) == (str(path), 0, 0)
    assert open_source(path, on_bad=on_bad, header=True).records == 100
    texts_of = open_source(path, on_bad=on_bad, fields={"age": ("text", 0)})
    assert texts(read_source(texts_of.source)["age"])[:2] == [b"age", b"0"]


def test_a_header_in_a_stream_is_found_at_its_first_record() -> None:
    place = Place(name="train", path="train", mode="Pipe", content_type="text/csv")
    with pytest.raises(DataError, match=r"train_0: byte 0: .* is 'age'; .*pass header=True") as found:
        decoder_of("csv", place, None, {}, b"age,size\n", "train_0")
    assert (found.value.file, found.value.offset) == ("train_0", 0)


def test_a_first_row_that_is_damaged_is_no_header(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("1,x2\n" + "3,4\n" * 5)
    with pytest.raises(DataError, match=r"column 1 .* is 'x2'; expected a number \(line 1\); if this row is a header"):
        open_source(path)
    with Loader(path, 6, on_bad="substitute", shuffle="none") as loader:
        assert next(iter(loader))["mask"].tolist() == [False, True, True, True, True, True]
    path.write_text("a,b\nc,d\n")
    with pytest.raises(DataError, match=r"is 'a'; expected a number \(line 1\); say which columns are wanted, as what"):
        open_source(path)


def test_loader(tmp_path: Path) -> None:
    """A folder of CSV files, as a script reads it; a ragged row is named, or another record stands in for it."""
    (tmp_path / "a.csv").write_bytes(b"7,1,2\n8,3,4\n")
    (tmp_path / "b.csv").write_bytes(b"9,5,6\n1,2\n")
    options: dict[str, Any] = {"shuffle": "none", "label_size": 1, "rank": 0, "world_size": 1}
    with Loader(tmp_path, 2, on_bad="substitute", **options) as loader:
        batches = [{name: column.tolist() for name, column in batch.items()} for batch in loader]
    assert batches[0] == {"label_values": [[7], [8]], "values": [[1, 2], [3, 4]], "mask": [True, True]}
    assert batches[1]["values"][0] == [5, 6] and batches[1]["mask"] == [True, False]
    with Loader(tmp_path, 2, **options) as loader, pytest.raises(DataError, match=r"b\.csv: byte 6: .*\(line 2\)"):
        list(loader)


def test_f24_fuzz_against_pandas(tmp_path: Path) -> None:
    """F24: a short run of fuzz_csv.py."""
    pytest.importorskip("pandas")
    from . import fuzz_csv

    records, _ = fuzz_csv.run(2000, 24, tmp_path)
    assert records >= 2000
