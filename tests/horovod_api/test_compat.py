"""--horovod-compat: which package a script's ``import horovod`` gives."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="not installed: torch")

SCRIPT = """
import sys
import horovod
print("found", horovod.__version__, horovod.__name__)
"""


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """A package horovod that is not the launcher's, on the ranks' path."""
    package = tmp_path / "site" / "horovod"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = 'the real one'\n")
    return {"PYTHONPATH": str(package.parent)}


def test_without_the_option(job: Any) -> None:
    assert job.run("-n", "1", job.script("import horovod")) == 1
    assert "No module named 'horovod'" in job.stderr


@pytest.mark.parametrize(
    ("option", "variables", "found"),
    [
        ("--horovod-compat", {}, "the real one"),
        ("--horovod-compat=auto", {}, "the real one"),
        ("--horovod-compat=force", {}, "launcher.horovod"),
        ("--standalone", {"LAUNCHER_HOROVOD_COMPAT": "force"}, "launcher.horovod"),
        ("--horovod-compat=off", {"LAUNCHER_HOROVOD_COMPAT": "force"}, "the real one"),
    ],
)
def test_installed_package(
    job: Any, installed: dict[str, str], option: str, variables: dict[str, str], found: str
) -> None:
    assert job.run(option, "-n", "2", job.script(SCRIPT), env={**installed, **variables}) == 0, job.output()
    lines = [line for line in job.stdout.splitlines() if "found" in line]
    assert len(lines) == 2
    assert all(found in line for line in lines)
    said = [line for line in job.stderr.splitlines() if "horovod is" in line]
    if option == "--horovod-compat=off":
        assert not said
    else:
        assert len(said) == 1, job.stderr
        assert installed["PYTHONPATH"] in said[0]
        assert ("the launcher's own, not" in said[0]) == (found == "launcher.horovod")


def test_a_folder_is_no_package(job: Any) -> None:
    """Data of a script may lie in a folder of this name beside it."""
    (job.directory / "horovod").mkdir()
    assert job.run("--horovod-compat", "-n", "1", job.script(SCRIPT)) == 0, job.output()
    assert "launcher.horovod" in job.stdout
    assert "horovod is the launcher's own\n" in job.stderr


def test_what_there_is_not(job: Any) -> None:
    script = job.script(
        """
        import horovod
        try:
            import horovod.tensorflow
        except ModuleNotFoundError as error:
            print(error, error.name)
        """
    )
    assert job.run("--horovod-compat", "-n", "1", script) == 0, job.output()
    assert "has no horovod.tensorflow (--horovod-compat) horovod.tensorflow" in job.stdout


@pytest.mark.parametrize("kind", ["script", "module", "launch", "preload"])
@pytest.mark.torch
@needs_torch
def test_names_of_horovod(job: Any, kind: str) -> None:
    """The modules that scripts import from, whichever way the script is run; they are the launcher's very own."""
    text = """
        import horovod.torch as hvd
        import horovod.torch.elastic
        from horovod.common.exceptions import HorovodInternalError
        from horovod.torch.compression import Compression
        from horovod.torch.elastic.sampler import ElasticSampler
        from horovod.torch.functions import broadcast_object
        from horovod.torch.mpi_ops import Average, rank, size
        import launcher.horovod.torch

        def main():
            assert hvd is launcher.horovod.torch
            assert horovod.torch.elastic.ElasticSampler is ElasticSampler
            assert HorovodInternalError is hvd.HorovodInternalError and issubclass(HorovodInternalError, RuntimeError)
            assert Compression is hvd.Compression and rank is hvd.rank
            assert hvd.__spec__.name == "launcher.horovod.torch"
            hvd.init()
            return broadcast_object(rank() + size(), 0)

        if __name__ == "__main__":
            print("total", main())
        """
    script = job.script(text, "names.py")
    if kind == "launch":
        caller = job.script(
            """
            import launcher, names_of_ranks
            if __name__ == "__main__":
                result = launcher.launch(names_of_ranks.run, nproc=1, horovod_compat=True)
                print("total", *result.values)
            """
        )
        job.script("def run():\n    import names\n    return names.main()\n", "names_of_ranks.py")
        code = job.run(caller, command=(sys.executable,), own_tree=False)
    elif kind == "module":
        code = job.run("--horovod-compat", "-n", "1", "-m", "names")
    elif kind == "preload":
        code = job.run("--horovod-compat", "-n", "1", "--preload", "torch", script)
    else:
        code = job.run("--horovod-compat", "-n", "1", script)
    assert code == 0, job.output()
    assert "total 1" in job.stdout


def test_other_programs(job: Any) -> None:
    script = job.script("#!/bin/sh\nexit 0\n", "train.sh")
    assert job.run("--horovod-compat", "-n", "1", script) == 0, job.output()
    assert "--horovod-compat has no effect: the entry point is not run by Python" in job.stderr


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--horovod-compat=always",), "expected one of off, auto, force"),
        (("--horovod-compat", "--engine", "horovod"), "leave one out"),
    ],
)
def test_wrong_use(job: Any, options: tuple[str, ...], reason: str) -> None:
    assert job.run(*options, "-n", "1", job.script("")) == 64, job.output()
    assert reason in job.stderr


def test_plan_shows_it(job: Any) -> None:
    assert job.run("plan", "--json", "--horovod-compat", job.script("")) == 0, job.output()
    plan = json.loads(job.stdout)
    assert plan["settings"]["horovod_compat"] == {"value": "auto", "source": "command line"}
    assert plan["environment"]["LAUNCHER_HOROVOD_COMPAT"] == "auto"
