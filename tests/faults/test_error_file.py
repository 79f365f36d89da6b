"""Fault table, row 32: an error file that is torn, huge, hostile, or not a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

# Statements that leave something at ``path``; then the rank exits with 3.
IGNORED = {
    "half JSON": 'Path(path).write_text(\'{"message": {"message": "Valu\')',
    "empty": "Path(path).write_bytes(b'')",
    "binary": "Path(path).write_bytes(bytes(range(256)))",
    "deeply nested": "Path(path).write_text('[' * 500_000)",
    "a list": "Path(path).write_text('[1, 2]')",
    "1 GB": "os.close(os.open(path, os.O_CREAT | os.O_WRONLY)); os.truncate(path, 1 << 30)",
    "link to a file of the system": "os.symlink('/etc/passwd', path)",
    "link to itself": "os.symlink(path, path)",
    "dangling link": "os.symlink('/no/such/file', path)",
    "FIFO": "os.mkfifo(path)",
    "directory": "os.mkdir(path)",
    "socket": "import socket; os.chdir(os.path.dirname(path)); socket.socket(socket.AF_UNIX).bind('error.json')",
}

SCRIPT = """
    import os, sys
    from pathlib import Path
    if os.environ["RANK"] != "0":
        import time
        time.sleep(600)
    path = os.environ["TORCHELASTIC_ERROR_FILE"]
    {statement}
    print("last words", file=sys.stderr, flush=True)
    os._exit(3)
"""


@pytest.mark.parametrize("kind", IGNORED)
def test_unusable_error_file_is_ignored_with_a_note(job, kind):
    """Row 32: what cannot be an error file is named and passed over; code and culprit come from the process itself."""
    job.script(SCRIPT.format(statement=IGNORED[kind]))
    assert job.run("-n", "2", "train.py") == 3, job.output()
    assert job.failure.startswith("rank 0 on algo-1 exited with code 3: last words")
    note = [line for line in job.stderr.splitlines() if "error.json ignored: " in line]
    assert len(note) == 1, job.stderr
    assert "Traceback" not in job.stderr
    assert "root:" not in job.failure + job.stderr + json.dumps(job.failure_json)


# Well-formed JSON with values that no rank of ours writes.
ODD = {
    "number as message": '{"message": 5}',
    "null as message": '{"message": null}',
    "list as message": '{"message": ["a", {"b": 1}]}',
    "wrong types inside": '{"message": {"message": null, "extraInfo": []}, "launcher": 7}',
    "lone surrogate": r'{"message": {"message": "\ud800 odd", "extraInfo": {"py_callstack": "\udfff"}}}',
    "NUL and escapes": r'{"message": {"message": "a\u0000b\u001b[31m", "extraInfo": {"py_callstack": "c\u0000d"}}}',
    "timestamp of the far future": '{"message": {"message": "odd", "extraInfo": {"timestamp": "%s"}}}' % ("9" * 30),
    "timestamp of many digits": '{"message": {"message": "odd", "extraInfo": {"timestamp": "%s"}}}' % ("9" * 9000),
    "timestamp of superscripts": r'{"message": {"message": "odd", "extraInfo": {"timestamp": "\u00b2"}}}',
    "number of many digits": '{"message": {"message": "odd"}, "n": %s}' % ("9" * 9000),
    "forged times": '{"message": {"message": "odd"}, "launcher": {"monotonic_ns": -5, "where": [1], "thread": {}}}',
    "future times": '{"message": {"message": "odd"}, "launcher": {"monotonic_ns": 1e300}}',
    "flat": '{"message": "odd", "timestamp": 17}',
    "long message": '{"message": {"message": "%s"}}' % ("x" * 1_000_000),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_values_in_an_error_file_do_no_harm(job, kind):
    """Row 32: every value of the file is the rank's to write; none of them ends the launcher or changes the code."""
    (job.directory / "body.json").write_text(ODD[kind], encoding="utf-8")
    job.script(SCRIPT.format(statement="import shutil; shutil.copy('body.json', path)"))
    assert job.run("-n", "2", "train.py") == 3, job.output()
    assert job.failure.startswith("rank 0 on algo-1 ")
    assert job.failure_json["detail"]["culprit"]["rank"] == 0
    assert job.failure_json["detail"]["culprit"]["value"] == 3
    assert "Traceback" not in job.stderr
    assert len(job.failure.splitlines()[0]) < 1024


def test_error_file_of_a_rank_that_ends_with_0_is_no_failure(job):
    """Row 32: a left-over error file beside exit code 0 does not make a failure."""
    job.script("""
        import os
        from pathlib import Path
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text('{"message": "handled"}')
    """)
    assert job.run("-n", "2", "train.py") == 0, job.output()
    assert job.failure == ""


def test_ranks_cannot_write_through_a_link_put_at_their_error_file(job):
    """Row 32: a rank that raises replaces what stands at its error file, and does not follow it."""
    target = Path(job.directory / "precious")
    target.write_text("precious")
    job.script("""
        import os
        os.symlink(os.path.abspath("precious"), os.environ["TORCHELASTIC_ERROR_FILE"])
        raise ValueError("the real failure")
    """)
    assert job.run("train.py") == 1, job.output()
    assert target.read_text() == "precious"
    assert "ValueError: the real failure" in job.failure
