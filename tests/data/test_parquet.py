"""Parquet through pyarrow: types, nulls, what is refused, and the copy that ranks share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import _data
from launcher.data.catalogue import open_source
from launcher.data.parquet import make_source
from launcher.errors import DataError, UsageError

numpy = pytest.importorskip("numpy")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

Read = Callable[[_data.Source], dict[str, list[Any]]]


def table(rows: int) -> Any:
    numbers = numpy.random.default_rng(rows).random(3 * rows)
    return pa.table(
        {
            "float": pa.array(numbers[:rows], pa.float32()),
            "half": pa.array(numbers[:rows].astype(numpy.float16)),
            "flag": pa.array([i % 3 == 0 for i in range(rows)]),
            "small": pa.array([i % 200 for i in range(rows)], pa.uint8()),
            "large": pa.array([i << 40 for i in range(rows)]),
            "text": pa.array(["é" * (i % 5) for i in range(rows)]),
            "bytes": pa.array([bytes([i % 256]) * (i % 7) for i in range(rows)], pa.large_binary()),
            "digest": pa.array([b"%04d" % i for i in range(rows)], pa.binary(4)),
            "word": pa.array(["even" if i % 2 else "odd" for i in range(rows)]).dictionary_encode(),
            "triple": pa.FixedSizeListArray.from_arrays(pa.array(numbers), 3),
            "list": pa.array([list(range(i % 4)) for i in range(rows)], pa.list_(pa.int16())),
        }
    )


def write(path: Path, content: Any, rows: int = 50) -> str:
    pq.write_table(content, path, row_group_size=rows, write_page_checksum=True)
    return path.name


def plain(value: Any) -> Any:
    return value.encode() if isinstance(value, str) else value


def same(found: dict[str, list[Any]], wanted: Any) -> None:
    assert list(found) == wanted.column_names
    for name in wanted.column_names:
        for one, value in zip(found[name], wanted[name].to_pylist(), strict=True):
            if isinstance(value, (str, bytes)):
                assert one.dtype == numpy.uint8 and one.tobytes() == plain(value)
            else:
                assert numpy.array_equal(one, value), (name, one, value)


@pytest.mark.parametrize("cached", [False, True])
def test_each_type_in_several_files_and_row_groups(cached: bool, tmp_path: Path, read_all: Read) -> None:
    parts = [table(230), table(230).slice(0, 0), table(230).slice(17, 30)]
    names = [write(tmp_path / f"{number}.parquet", part) for number, part in enumerate(parts)]
    made = make_source(str(tmp_path), names, cache=str(tmp_path / "cache") if cached else None)
    assert made.records == (230, 0, 30)
    same(read_all(made.source), pa.concat_tables(parts))


def test_rows_in_more_parts_than_fit_the_cache_at_once(tmp_path: Path, read_all: Read) -> None:
    wide = pa.table(
        {"a": pa.FixedSizeListArray.from_arrays(pa.array(numpy.arange(3_000_000, dtype=numpy.int32)), 30_000)}
    )
    found = read_all(make_source(str(tmp_path), [write(tmp_path / "a.parquet", wide)]).source)
    assert [(row[0], row[-1]) for row in found["a"]] == [(30_000 * i, 30_000 * i + 29_999) for i in range(100)]


def test_columns_that_are_wanted(tmp_path: Path, read_all: Read) -> None:
    content = pa.table({"a": [1, 2], "a.b": [3, 4], "odd": [{"x": 1}, None]})
    write(tmp_path / "a.parquet", content)
    assert read_all(make_source(str(tmp_path), ["a.parquet"], fields=["a"]).source) == {"a": [1, 2]}
    assert read_all(make_source(str(tmp_path), ["a.parquet"], fields=["a.b", "a"]).source) == {
        "a": [1, 2],
        "a.b": [3, 4],
    }
    with pytest.raises(UsageError, match=r"no column 'q'; its columns are a, a\.b, odd"):
        make_source(str(tmp_path), ["a.parquet"], fields=["q"])


@pytest.mark.parametrize(
    "values",
    [
        pa.array([1, 2, 3, None, 5]),
        pa.array(["a", "", "b", None, "c"]),
        pa.array(["a", "", "b", None, "c"]).dictionary_encode(),
        pa.array([[1], [], [2], None, [3]]),
        pa.array([[1], [], [2], [4, None], [3]]),
        pa.array([[1, 2], [3, 4], [5, 6], [7, None], [8, 9]], pa.list_(pa.int64(), 2)),
        pa.array([[1, 2], [3, 4], [5, 6], None, [8, 9]], pa.list_(pa.int64(), 2)),
    ],
    ids=["number", "text", "dictionary", "list", "in list", "in array", "array"],
)
@pytest.mark.parametrize("rows", [2, 50])
def test_a_null_is_an_error_f25(values: Any, rows: int, tmp_path: Path) -> None:
    """F25: a null without a value for it is an error that names column and record, whatever row group it is in."""
    write(tmp_path / "a.parquet", pa.table({"b": [0, 1, 2, 3, 4], "a": values}), rows)
    with pytest.raises(DataError, match="record 3: column 'a' has a null here") as caught:
        make_source(str(tmp_path), ["a.parquet"])
    assert (caught.value.problem, caught.value.file) == ("mismatch", str(tmp_path / "a.parquet"))
    assert caught.value.record == 3


def test_a_value_that_stands_for_nulls_f25(tmp_path: Path, read_all: Read) -> None:
    """F25: the value stands where the null was, and no value moves."""
    content = pa.table(
        {
            "n": pa.array([1, None, 3, None]),
            "f": pa.array([None, 0.5, None, 1.0]),
            "t": pa.array(["x", None, "zz", ""]),
            "d": pa.array([None, "y", "y", None]).dictionary_encode(),
        }
    )
    write(tmp_path / "a.parquet", content, 3)
    fill = {"n": -1, "f": float("nan"), "t": "?", "d": ""}
    found = read_all(make_source(str(tmp_path), ["a.parquet"], fill=fill).source)
    assert found["n"] == [1, -1, 3, -1]
    assert numpy.array_equal(found["f"], [numpy.nan, 0.5, numpy.nan, 1.0], equal_nan=True)
    assert [value.tobytes() for value in found["t"]] == [b"x", b"?", b"zz", b""]
    assert [value.tobytes() for value in found["d"]] == [b"", b"y", b"y", b""]
    with pytest.raises(UsageError, match="fill: 'none' is no value for column 'n'"):
        make_source(str(tmp_path), ["a.parquet"], fill={**fill, "n": "none"})
    with pytest.raises(UsageError, match="fill: 'q' is no column that is read"):
        make_source(str(tmp_path), ["a.parquet"], fill={**fill, "q": 0})


@pytest.mark.parametrize(
    "values",
    [
        pa.array([{"x": 1}]),
        pa.array([[[1]]]),
        pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
        pa.array([0], pa.timestamp("us")),
        pa.array([["text"]]),
        pa.array([None], pa.null()),
    ],
    ids=["struct", "lists", "map", "time", "texts", "null"],
)
def test_types_that_no_field_has_f25(values: Any, tmp_path: Path) -> None:
    """F25: a nested column is an error that names it, and says what to do."""
    write(tmp_path / "a.parquet", pa.table({"b": [0], "a": values}))
    with pytest.raises(DataError, match=r"column 'a' is .*leave it out \(fields=") as caught:
        make_source(str(tmp_path), ["a.parquet"])
    assert caught.value.problem == "mismatch"
    assert make_source(str(tmp_path), ["a.parquet"], fields=["b"]).records == (1,)


def test_files_with_other_columns_f9(tmp_path: Path) -> None:
    """F9: files of a channel that differ are told apart before anything is read."""
    for number, content in enumerate(({"a": [1], "b": [2]}, {"b": [2], "a": [1]}, {"a": [1]}, {"a": [1.0], "b": [2]})):
        write(tmp_path / f"{number}.parquet", pa.table(content))
    for other in ("1.parquet", "2.parquet", "3.parquet"):
        with pytest.raises(DataError, match=r"all files of a channel must have the same") as caught:
            make_source(str(tmp_path), ["0.parquet", other])
        assert caught.value.file == str(tmp_path / other)


def test_damaged_files(tmp_path: Path) -> None:
    content = (tmp_path / write(tmp_path / "a.parquet", table(300), 100)).read_bytes()
    middle = len(content) // 3
    damaged = {
        "cut.parquet": content[:-20],
        "empty.parquet": b"",
        "text.parquet": b"a,b,c\n" * 20,
        "page.parquet": content[:middle] + bytes(255 - byte for byte in content[middle : middle + 900])
        + content[middle + 900 :],
    }  # fmt: skip
    for name, wrong in damaged.items():
        (tmp_path / name).write_bytes(wrong)
        with pytest.raises(DataError) as caught:
            make_source(str(tmp_path), ["a.parquet", name])
        assert (caught.value.problem, caught.value.file) == ("malformed", str(tmp_path / name))
    with pytest.raises(DataError) as caught:
        make_source(str(tmp_path), ["gone.parquet"])
    assert caught.value.file == str(tmp_path / "gone.parquet")


@pytest.mark.parametrize("cached", [False, True])
def test_a_damaged_row_group_is_named_and_may_be_left_out(cached: bool, tmp_path: Path, read_all: Read) -> None:
    rows, folder = table(300), tmp_path / "data"
    folder.mkdir()
    for name in ("a.parquet", "b.parquet"):
        write(folder / name, rows, 100)
    with pq.ParquetFile(folder / "a.parquet") as file:
        begin, end = (file.metadata.row_group(group).column(0).dictionary_page_offset for group in (1, 2))
    with (folder / "a.parquet").open("r+b") as changed:
        changed.seek(begin)
        changed.write(b"\xff" * 40)
    cache = {"cache": str(tmp_path / "cache")} if cached else {}
    with pytest.raises(DataError) as caught:
        open_source(folder / "a.parquet", **cache)
    assert str(caught.value).startswith(f"{folder}/a.parquet: byte {begin}: row group 1, which begins there, can not")
    assert "\n" not in str(caught.value) and caught.value.offset == begin
    opened = open_source(folder, on_bad="skip", quiet=True, **cache)
    assert [(name, records) for name, _, records in opened.files] == [("a.parquet", 200), ("b.parquet", 300)]
    assert [(one.file, one.offset, one.bytes) for one in opened.damage] == [("a.parquet", begin, end - begin)]
    same(read_all(opened.source), pa.concat_tables([rows.slice(0, 100), rows.slice(200), rows]))


SHARE = """
import sys
from launcher.data.parquet import make_source
print(make_source(sys.argv[1], ["a.parquet"], cache=sys.argv[2]).source.records)
"""


def test_ranks_share_what_one_decodes_f17(tmp_path: Path) -> None:
    """F17: no lock outlives its process, and what one left half made is no rank's data."""
    write(tmp_path / "a.parquet", table(300))
    cache = tmp_path / "cache"
    make_source(str(tmp_path), ["a.parquet"], cache=str(cache))
    (rows,) = cache.glob("*.rows")
    rows.with_name(rows.name + ".part").write_bytes(b"of one that was killed")
    rows.unlink()
    command = [sys.executable, "-c", SHARE, str(tmp_path), str(cache)]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [rank.communicate(timeout=60)[0] for rank in ranks] == ["300\n", "300\n"]
    made = os.stat(rows)
    make_source(str(tmp_path), ["a.parquet"], cache=str(cache))
    assert os.stat(rows).st_ino == made.st_ino and not list(cache.glob("*.part"))
    write(tmp_path / "a.parquet", table(301))
    assert make_source(str(tmp_path), ["a.parquet"], cache=str(cache)).records == (301,)


def test_a_shared_copy_that_is_cut_f20(tmp_path: Path, read_all: Read) -> None:
    """F20: pages that are gone are an error, not zeros."""
    write(tmp_path / "a.parquet", table(3000))
    source = make_source(str(tmp_path), ["a.parquet"], cache=str(tmp_path / "cache")).source
    (rows,) = (tmp_path / "cache").glob("*.rows")
    os.truncate(rows, 8192)
    with pytest.raises(DataError) as caught:
        read_all(source)
    assert (caught.value.problem, caught.value.file) == ("changed", str(rows))


def test_an_error_of_a_record_names_its_file(tmp_path: Path, read_all: Read) -> None:
    for name in ("a.parquet", "b.parquet"):
        write(tmp_path / name, table(10))
    source = make_source(str(tmp_path), ["a.parquet", "b.parquet"]).source
    bytes_of = _data.jpeg_library()[0]
    if not bytes_of:
        pytest.skip("no libjpeg-turbo")
    with pytest.raises(DataError) as caught:
        read_all(_data.jpeg_source(source, "bytes", "image", 4, 4))
    assert (caught.value.file, caught.value.record) == (str(tmp_path / "a.parquet"), 0)
