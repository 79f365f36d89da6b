"""Who may import whom, and what is loaded before the ranks are started."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import launcher

PACKAGE = Path(launcher.__file__).parent
LARGE = {"torch", "numpy", "mpi4py", "horovod", "boto3", "botocore", "psutil", "sklearn", "scipy", "pyarrow"}

# Their faces are torch's: a script that imports one of them has imported torch.
OF_TORCH = {"launcher.horovod.torch"} | {
    f"launcher.collectives.torch_{part}"
    for part in ("arguments", "backend", "cuda", "engine", "group", "operations", "shared", "work")
}

# What each costs, or drags in, would show in every job's time to its script's first line.
DENIED = {
    "argparse",
    "asyncio",
    "concurrent",
    "dataclasses",
    "difflib",
    "email",
    "inspect",
    "logging",
    "multiprocessing",
    "pathlib",
    "pickle",
    "selectors",
    "shutil",
    "socket",
    "subprocess",
    "tempfile",
    "typing",
    "yaml",
    *LARGE,
}


def files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def walk(tree: ast.AST, top_only: bool) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker sees; ``top_only``: not the bodies of functions either."""
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node):
            continue
        if top_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        yield node
        yield from walk(node, top_only)


def imports(path: Path, top_only: bool = False) -> set[str]:
    """Dotted names of the modules that ``path`` imports (for ``from package import x``: ``package.x`` if a module)."""
    found = set()
    for node in walk(ast.parse(path.read_text()), top_only):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            for alias in node.names:
                inner = PACKAGE.parent.joinpath(*node.module.split("."), alias.name)
                is_module = inner.is_dir() or any(inner.with_suffix(end).exists() for end in (".py", ".pyi"))
                found.add(f"{node.module}.{alias.name}" if is_module else node.module)
    return found


def ours(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] == "launcher"}


def matches(name: str, allowed: set[str]) -> bool:
    return any(name == entry or name.startswith(entry + ".") for entry in allowed)


# Module or package -> the modules of ours that it may import, itself left out. "launcher" alone is the empty package.
ALLOWED: dict[str, set[str]] = {
    "launcher.record": set(),
    "launcher.errors": set(),
    "launcher.causes": set(),
    "launcher.evidence": {"launcher.errors", "launcher.record"},
    "launcher.ports": {"launcher.errors", "launcher.record"},
    "launcher.interfaces": set(),
    "launcher.hosts": {"launcher.errors", "launcher.interfaces", "launcher.record"},
    "launcher.topology": {"launcher.errors", "launcher.record"},
    "launcher.verdict": {"launcher.errors", "launcher.causes", "launcher.evidence", "launcher.record"},
    "launcher.report": {"launcher.errors", "launcher.record"},
    "launcher.machine": {"launcher.record"},
    "launcher.options": {"launcher.errors", "launcher.record"},
    "launcher.container": {"launcher.errors", "launcher.record"},
    "launcher.engines": {"launcher.record", "launcher.errors", "launcher.interfaces", "launcher.topology"},
    "launcher.supervisor": {
        "launcher.causes",
        "launcher.errors",
        "launcher.evidence",
        "launcher.record",
        "launcher.verdict",
        "launcher._native",
    },
    "launcher.cluster": {
        "launcher._version",
        "launcher.errors",
        "launcher.evidence",
        "launcher.record",
        "launcher.supervisor",
        "launcher.topology",
        "launcher.verdict",
    },
    "launcher.rank": {
        "launcher.collectives.torch_hook",
        "launcher.errors",
        "launcher.record",
        "launcher.machine",
        "launcher._native",
    },
    "launcher.collectives": {"launcher.errors", "launcher.record", "launcher.rank.status", "launcher._native"},
    "launcher.collectives.bench": {
        "launcher.api",
        "launcher.collectives",
        "launcher.container",
        "launcher.errors",
        "launcher.options",
        "launcher.record",
        "launcher._native",
    },
    "launcher.data": {
        "launcher.collectives.group",
        "launcher.collectives.place",
        "launcher.container",
        "launcher.errors",
        "launcher.rank.context",
        "launcher.rank.status",
        "launcher.record",
        "launcher._data",
        "launcher._native",
    },
    "launcher.data.command": {
        "launcher.data",
        "launcher.errors",
        "launcher.options",
        "launcher.record",
    },
    "launcher.serving": {"launcher.errors", "launcher.record"},
    "launcher.serving.settings": {"launcher.container.paths", "launcher.errors", "launcher.options", "launcher.record"},
    "launcher.serving.processes": {
        "launcher.record",
        "launcher.serving",
        "launcher.supervisor.cgroup",
        "launcher.supervisor.guardian",
    },
    "launcher.serving.array_codecs": {
        "launcher.data",
        "launcher.errors",
        "launcher.record",
        "launcher.serving",
        "launcher._data",
    },
    "launcher.serving.command": {
        "launcher._version",
        "launcher.container",
        "launcher.errors",
        "launcher.machine",
        "launcher.options",
        "launcher.serving",
    },
    "launcher.usage": {"launcher.options"},
    "launcher.horovod": {"launcher.collectives", "launcher.errors", "launcher.record"},
    "launcher.job": {
        "launcher.container",
        "launcher.errors",
        "launcher.hosts",
        "launcher.interfaces",
        "launcher.options",
        "launcher.record",
        "launcher.topology",
    },
    "launcher.mpi_plan": {
        "launcher.engines.mpi",
        "launcher.errors",
        "launcher.record",
        "launcher.supervisor.adoption",
        "launcher.supervisor.guardian",
    },
    "launcher.plan": {
        "launcher.assembly",
        "launcher.container",
        "launcher.hosts",
        "launcher.mpi_plan",
        "launcher.prepare",
        "launcher.record",
    },
}


@pytest.mark.parametrize("unit", ALLOWED)
def test_imports_point_one_way(unit: str) -> None:
    wrong = {}
    for path in files():
        name = module_name(path)
        if matches(name, {unit}) and (name == unit or name not in ALLOWED):  # a module may have a rule of its own
            extra = {other for other in ours(path) if not matches(other, ALLOWED[unit] | {unit})}
            if extra:
                wrong[name] = extra
    assert not wrong


@pytest.mark.parametrize(
    "unit",
    [
        "launcher.cli",
        "launcher.api",
        "launcher.run",
        "launcher.assembly",
        "launcher.plan",
        "launcher.prepare",
        "launcher.job",
    ],
)
def test_nothing_below_imports_what_is_on_top(unit: str) -> None:
    below = {"launcher.container", "launcher.engines", "launcher.supervisor", "launcher.rank", "launcher.topology"}
    below |= {"launcher.cluster", "launcher.hosts"}
    guilty = [module_name(path) for path in files() if matches(module_name(path), below) and unit in ours(path)]
    assert not guilty


@pytest.mark.parametrize("name", ["verdict", "evidence", "causes", "topology", "errors", "record"])
def test_pure_modules_touch_nothing(name: str) -> None:
    impure = {"os", "subprocess", "socket", "_socket", "select", "pathlib", "shutil", "tempfile", "time", "threading"}
    assert not imports(PACKAGE / f"{name}.py") & impure


@pytest.mark.parametrize("path", files(), ids=module_name)
def test_nothing_large_is_imported_with_a_module(path: Path) -> None:
    allowed = {"torch"} if matches(module_name(path), OF_TORCH) else set()
    assert not {name.split(".")[0] for name in imports(path, top_only=True)} & (LARGE - allowed)


def test_only_extras_are_imported_beside_the_standard_library() -> None:
    extras = LARGE | {
        "httptools",
        "safetensors",
        "uvicorn",
        "uvloop",
        "yaml",
        "cloudpickle",
        "launcher",
        "_launcher_shim",
    }
    foreign = {name.split(".")[0] for path in files() for name in imports(path)} - set(sys.stdlib_module_names)
    assert foreign <= extras


def loaded_before_start(arguments: list[str], directory: Path) -> set[str]:
    """Modules that are loaded when the first rank is about to be started.

    Without site packages: their start-up hooks import what they like.
    """
    program = f"""
import sys
sys.path.insert(0, {str(PACKAGE.parent)!r})
bare = set(sys.modules)
from launcher.supervisor.attempt import Attempt
def stop(self, zygote):
    print(*sorted(set(sys.modules) - bare), file=sys.__stdout__, flush=True)
    import os
    os._exit(0)
Attempt.start = stop
from launcher.cli import main
main({arguments!r})
"""
    environ = {
        name: value for name, value in os.environ.items() if not name.startswith(("LAUNCHER_", "PYTHON", "SAGE"))
    }
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        cwd=directory,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout, done.stderr
    return set(done.stdout.split())


def test_little_is_loaded_before_the_ranks_start(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    modules = loaded_before_start(["-n", "2", "--job-dir", str(tmp_path / "job"), "train.py"], tmp_path)
    assert {name.split(".")[0] for name in modules} & DENIED == set()
    late = {"launcher.verdict", "launcher.report", "launcher.plan", "launcher.api", "launcher._native"}
    assert modules & (late - {"launcher.verdict"}) == set()


def test_little_is_loaded_by_the_public_package() -> None:
    program = f"""
import sys
sys.path.insert(0, {str(PACKAGE.parent)!r})
bare = set(sys.modules)
import launcher
print(*sorted(set(sys.modules) - bare))
"""
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"launcher", "launcher._version", "__future__"}


def test_every_public_name_resolves() -> None:
    for name in launcher.__all__:
        assert getattr(launcher, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lunch'"):
        launcher.lunch  # type: ignore[attr-defined]  # noqa: B018
