"""``python -m launcher data``: what it says, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.data.catalogue import open_source
from launcher.data.command import run_command
from launcher.errors import DataError, UsageError

from .record_files import frame, numbered, write_recordio

numpy = pytest.importorskip("numpy")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def answer(*words: object) -> tuple[str, int]:
    return run_command([str(word) for word in words], pytest.fail)


def facts(*words: object) -> tuple[dict, int]:
    text, code = answer(*words, "--json")
    return json.loads(text), code


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_recordio(tmp_path / "data/a.rec", numbered(100))
    write_recordio(tmp_path / "data/b.rec", numbered(50))
    return tmp_path / "data"


def test_inspect_says_what_is_there(folder: Path) -> None:
    text, code = answer("inspect", folder)
    assert code == 0
    for part in (
        "recordio, 150 records in 2 files, 3,000 bytes, mapped",
        "data  ",
        "uint8 ragged",
        "a.rec",
        "100 records",
    ):
        assert part in text
    found, code = facts("inspect", folder)
    assert (code, found["records"], found["bytes"]) == (0, 150, 3000)
    assert found["fields"] == [{"name": "data", "kind": "ragged", "dtype": "uint8", "shape": []}]
    assert found["files"][1] == {"path": "b.rec", "bytes": 1000, "records": 50}
    assert found["fingerprint"] == f"{open_source(folder).fingerprint:016x}"


def test_options_of_formats_and_fields(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("y;x\n1;2\n3;4\n")
    found, _ = facts("inspect", tmp_path, "--option", "header=true", "--option=delimiter=;", "--fields", "x,y")
    assert [field["name"] for field in found["fields"]] == ["x", "y"]
    (tmp_path / "raw").write_bytes(bytes(48))
    found, _ = facts(
        "inspect", tmp_path / "raw", "--format=fixed", "--fields", '{"v": ["float32", [2, 1]], "n": "int64"}'
    )
    assert (found["records"], found["fields"][0]["shape"]) == (3, [2, 1])


def test_index_keeps_where_the_records_are(folder: Path, tmp_path: Path) -> None:
    found, code = facts("index", folder)
    assert code == 0
    assert Path(found["index"]).parent == folder
    output = tmp_path / "the.index"
    assert answer("index", folder, "--output", output)[1] == 0
    assert open_source(folder, index=str(output)).records == 150
    numpy.save(tmp_path / "a.npy", numpy.zeros((3, 2)))
    assert "this format needs no index" in answer("index", tmp_path / "a.npy")[0]


def test_verify_names_every_damaged_place(folder: Path) -> None:
    assert answer("verify", folder) == (answer("verify", folder)[0], 0)
    content = bytearray((folder / "a.rec").read_bytes())
    content[400] ^= 1
    content[1000:1008] = frame(b"", 7)
    (folder / "a.rec").write_bytes(content)
    (folder / "b.rec").write_bytes((folder / "b.rec").read_bytes()[:-5])
    text, code = answer("verify", folder)
    assert code == 65
    for place in (f"{folder}/a.rec: byte 400: ", f"{folder}/a.rec: byte 1000: ", f"{folder}/b.rec: byte 980: "):
        assert place in text
    assert "the data is damaged at 3 places" in text
    found, code = facts("verify", folder, "--most", 2)
    assert (code, found["whole"], found["damaged_places"], len(found["errors"])) == (65, False, 3, 2)
    assert found["records"] == 147


def test_verify_reads_what_only_decoding_shows(tmp_path: Path) -> None:
    lines = [f"{number},{number}" for number in range(500)]
    lines[7], lines[300] = "7,seven", "300"
    (tmp_path / "a.csv").write_text("\n".join(lines))
    found, code = facts("verify", tmp_path)
    assert (code, found["damaged_records"], found["damaged_places"]) == (65, 2, 2)
    assert "a.csv: byte 30: record 7: " in found["errors"][0]
    assert ": record 300: " in found["errors"][1]
    numpy.save(tmp_path / "a.npy", numpy.zeros((100, 4)))
    with (tmp_path / "a.npy").open("r+b") as file:
        file.truncate(1000)
    text, code = answer("verify", tmp_path / "a.npy")
    assert code == 65
    assert "a.npy: byte 992: record 27: the header says 100 records" in text


def test_a_header_that_was_not_said_is_told_by_each_action(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("age,size\n1,2\n3,4\n")
    for words in (["inspect", path], ["convert", path, "--to", "npy", "--output", tmp_path / "a.npy"]):
        with pytest.raises(DataError, match=r"a\.csv: byte 0: .*'age'.*pass header=True \(--option header=true\)"):
            answer(*words)
    text, code = answer("verify", path)
    assert code == 65 and "pass header=True (--option header=true)" in text
    assert answer("verify", path, "--option", "header=true")[1] == 0


def test_verify_reads_the_row_groups_beside_a_damaged_one(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"x": numpy.arange(1000)}), tmp_path / "a.parquet", row_group_size=100)
    with pq.ParquetFile(tmp_path / "a.parquet") as file:
        places = [file.metadata.row_group(group).column(0).dictionary_page_offset for group in (2, 7)]
    with (tmp_path / "a.parquet").open("r+b") as changed:
        for place in places:
            changed.seek(place)
            changed.write(b"\xff" * 20)
    found, code = facts("verify", tmp_path)
    assert (code, found["records"], found["damaged_places"]) == (65, 800, 2)
    for place, text in zip(places, found["errors"], strict=True):
        assert text.startswith(f"{tmp_path}/a.parquet: byte {place}: row group ")


def test_convert_of_what_has_no_fixed_size(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.libsvm").write_text("1 1:2\n0 7:1\n")
    for source in (folder, tmp_path / "a.libsvm"):
        with pytest.raises(
            UsageError, match=r"x\.npy: field '(data|values)' has no rows of fixed size; write it as Rec"
        ):
            answer("convert", source, "--to", "npy", "--output", tmp_path / "x.npy")
    assert not (tmp_path / "x.npy").exists()


@pytest.mark.parametrize("target", ["recordio-protobuf", "npy"])
def test_convert_writes_all_records_in_order(tmp_path: Path, target: str) -> None:
    (tmp_path / "a.csv").write_text("".join(f"{number},{number / 4},-1\n" for number in range(1000)))
    output = tmp_path / f"out.{'npy' if target == 'npy' else 'rec'}"
    text, code = answer("convert", tmp_path / "a.csv", "--option", "label_size=1", "--to", target, "--output", output)
    assert (code, text.splitlines()[1]) == (0, f"written to {output}: {target}, 1,000 records")
    opened = open_source(output)
    assert {field[0]: field[3] for field in opened.fields} == {"label_values": (1,), "values": (2,)}
    if target == "npy":
        array = numpy.load(output)
        assert array["label_values"][:, 0].tolist() == list(range(1000))
        assert array["values"][999].tolist() == [249.75, -1]
    assert facts("verify", output)[0]["records"] == 1000


def test_convert_of_bytes(folder: Path, tmp_path: Path) -> None:
    for target in ("tfrecord", "recordio"):
        output = tmp_path / f"out.{target}"
        assert answer("convert", folder, "--to", target, "--output", output)[1] == 0
        assert open_source(output, format=target).records == 150
    assert (tmp_path / "out.recordio").read_bytes() == (folder / "a.rec").read_bytes() + (folder / "b.rec").read_bytes()
    numpy.save(tmp_path / "a.npy", numpy.zeros((3, 2)))
    with pytest.raises(UsageError, match="--to recordio writes records of bytes, but these have the fields values"):
        answer("convert", tmp_path / "a.npy", "--to", "recordio", "--output", tmp_path / "x")
    with pytest.raises(UsageError, match="data convert needs --to FORMAT and --output FILE"):
        answer("convert", folder)


def test_what_is_left_out_is_said(folder: Path) -> None:
    with (folder / "b.rec").open("ab") as file:
        file.write(b"\0" * 7)
    with pytest.raises(DataError, match=r"b.rec: byte 1000: "):
        answer("inspect", folder)
    assert f"left out, 7 bytes:\n  {folder}/b.rec: byte 1000: " in answer("inspect", folder, "--on-bad", "skip")[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspct", "."], "data 'inspct': expected inspect, index, verify, convert; did you mean inspect?"),
        (["inspect"], "data inspect: expected one channel or path, found 0"),
        (["inspect", "a", "b"], "expected one channel or path, found 2: a b"),
        (["inspect", ".", "--fromat", "x"], "data inspect: unknown option --fromat; did you mean --format?"),
        (["verify", ".", "--to", "npy"], "data verify: unknown option --to"),
        (["inspect", ".", "--format"], "option --format needs a value"),
        (["convert", ".", "--to", "zip"], "data convert: to is 'zip'; expected one of recordio"),
        (["inspect", "no/such/path"], "no channel and no path 'no/such/path'"),
        (["inspect", ""], "channel is ''; expected the name of a channel"),
        (["inspect", "/dev/null"], "/dev/null: neither a file nor a folder"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        answer(*words)
    assert message in str(raised.value)


def test_the_command_line(folder: Path) -> None:
    def run(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "launcher", "data", *map(str, words)], capture_output=True, text=True, check=False
        )

    assert "verify       read every record" in run("--help").stdout
    assert run("inspect", folder).returncode == 0
    with (folder / "b.rec").open("ab") as file:
        file.write(b"\0" * 7)
    done = run("inspect", folder)
    assert (done.returncode, done.stdout) == (65, "")
    assert f"[launcher] error: {folder}/b.rec: byte 1000: record 50: " in done.stderr
    assert run("verify", folder).returncode == 65
    assert run("verify", folder / "c.rec").returncode == 64
