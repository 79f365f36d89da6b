"""Environment and arguments against what sagemaker-training 5.1.4 answered for the same job trees."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

from launcher.container import read, sm_environment, to_args

GOLDEN = pathlib.Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.json") if path.stem != "entry_points")

# Variables of ours that the reference does not have, whatever the job.
ADDED = {
    "SM_MASTER_ADDR",
    "SM_HOST_COUNT",
    "SM_CURRENT_HOST_RANK",
    "SM_INPUT_DATA_DIR",
    "SM_OUTPUT_FAILURE",
    "SM_SOURCE_DIR",
    "SM_ENTRY_SCRIPT",
}
# Aliases with underscores, by case.
ALIASES = {
    "hyphens": {"SM_HP_BATCH_SIZE": "64", "SM_HP_WEIGHT_DECAY": "0.0001", "SM_HP_A_B": "1"},
    "hyphen_channels": {
        "SM_CHANNEL_MY_DATA": "{BASE}/input/data/my-data",
        "SM_CHANNEL_V1_2": "{BASE}/input/data/v1.2",
    },
    "odd_values": {"SM_HP__DASH": "1", "SM_HP_TAB_NAME": "1"},
    "unicode": {"SM_HP_GR_SSE": "ß"},
}
# On purpose not what the reference answers, by case: a flag that Python spelled "False" is off.
DEVIATIONS = {
    "python_spelled_false": {
        "SM_DISTRIBUTION_INSTANCE_GROUPS": "[]",
        "SM_TRAINING_ENV": {"distribution_instance_groups": [], "distribution_hosts": []},
    }
}


def load(case: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((GOLDEN / f"{case}.json").read_text(encoding="utf-8"))
    return loaded


@pytest.mark.parametrize("case", CASES)
def test_environment_is_the_references_byte_for_byte(case: str, tree: Any) -> None:
    golden = load(case)
    base = tree(None, **{name.removesuffix(".json"): text for name, text in golden["files"].items()})
    container = read(str(base), golden["environ"])
    found = {
        name: value.replace(str(base), "{BASE}")
        for name, value in sm_environment(container, **golden["probes"]).items()
    }
    expected = {**golden["variables"], **golden["side_effects"]}
    for name, value in DEVIATIONS.get(case, {}).items():
        if isinstance(value, dict):
            merged = {**json.loads(expected[name]), **value}
            expected[name] = json.dumps(merged, sort_keys=True, separators=(",", ":"))
        else:
            assert expected[name] != value
            expected[name] = value
    assert {name: found.get(name) for name in expected} == expected
    added = {name: value for name, value in found.items() if name not in expected}
    aliases = ALIASES.get(case, {})
    assert {name: value for name, value in added.items() if name not in ADDED} == aliases
    assert "PYTHONPATH" not in found


@pytest.mark.parametrize("case", CASES)
def test_arguments_are_the_references(case: str, tree: Any) -> None:
    golden = load(case)
    base = tree(None, **{name.removesuffix(".json"): text for name, text in golden["files"].items()})
    assert to_args(read(str(base), golden["environ"]).user) == golden["args"]


def test_training_env_has_all_37_properties() -> None:
    assert {len(json.loads(load(case)["variables"]["SM_TRAINING_ENV"])) for case in CASES} == {37}
