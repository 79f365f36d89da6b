"""Job trees on disk for the tests of the container contract."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

Tree = Callable[..., pathlib.Path]

RESOURCES: dict[str, Any] = {"current_host": "algo-1", "hosts": ["algo-1", "algo-2"]}


@pytest.fixture
def tree(tmp_path: pathlib.Path) -> Tree:
    """Write a job tree. Each argument is an object (written as JSON), a text or bytes (written as they are), or
    None (no file)."""

    def write(
        resources: Any = RESOURCES, hyperparameters: Any = None, channels: Any = None, **more: Any
    ) -> pathlib.Path:
        base = tmp_path / "ml"
        config = base / "input" / "config"
        config.mkdir(parents=True, exist_ok=True)
        files = {
            "resourceconfig.json": resources,
            "hyperparameters.json": hyperparameters,
            "inputdataconfig.json": channels,
            **{f"{name}.json": content for name, content in more.items()},
        }
        for name, content in files.items():
            if isinstance(content, bytes):
                (config / name).write_bytes(content)
            elif content is not None:
                text = content if isinstance(content, str) else json.dumps(content)
                (config / name).write_text(text, encoding="utf-8")
        return base

    return write
