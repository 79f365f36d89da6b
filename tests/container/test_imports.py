"""What ``import launcher.container`` costs: nothing that a rank's start would wait for."""

from __future__ import annotations

import os
import subprocess
import sys

# Each of these takes longer to import than the whole package does, or brings one that does.
HEAVY = {
    "argparse",
    "asyncio",
    "boto3",
    "collections.abc",
    "dataclasses",
    "inspect",
    "logging",
    "pathlib",
    "shutil",
    "socket",
    "subprocess",
    "tarfile",
    "tempfile",
    "typing",
}


def imported(program: str) -> set[str]:
    """Names of the modules that ``program`` adds to what a bare interpreter with os and json holds."""
    command = f"import sys, os, json; before = set(sys.modules)\n{program}\nprint(*sorted(set(sys.modules) - before))"
    environ = {"PATH": os.defpath, "PYTHONPATH": os.pathsep.join(sys.path)}
    # -S: site packages may have start-up hooks of their own, which import what they like.
    done = subprocess.run(
        [sys.executable, "-S", "-c", command], env=environ, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_import_is_light() -> None:
    modules = imported("import launcher.container")
    assert modules & HEAVY == set()
    assert {name for name in modules if not name.startswith("launcher")} <= {"__future__"}


def test_what_is_used_late_is_imported_late() -> None:
    modules = imported("import launcher.container")
    late = {f"launcher.container.{name}" for name in ("code", "job_tree", "masking", "requirements")}
    assert modules & late == set()
    assert late <= imported("from launcher.container import *")
