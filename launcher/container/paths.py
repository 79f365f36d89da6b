"""The fixed places of a training container, as paths under one base directory.

Source of the layout: the "How Amazon SageMaker Provides Training Information" pages of the AWS developer guide,
and the two names that sagemaker-training adds (``code`` and ``output/intermediate``).
"""

from __future__ import annotations

import os

from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT_BASE = "/opt/ml"
BASE_VARIABLE = "SAGEMAKER_BASE_DIR"

HYPERPARAMETERS = "hyperparameters.json"
INPUT_DATA_CONFIG = "inputdataconfig.json"
# The platform writes the first; the second is the spelling of some documents and of hand-made trees.
RESOURCE_CONFIGS = ("resourceconfig.json", "resourceConfig.json")


class Paths(Record):
    """Absolute paths of one job tree. Nothing is created or looked at by constructing it."""

    base: str
    input_dir: str
    config_dir: str
    data_dir: str
    code_dir: str
    model_dir: str
    checkpoints_dir: str
    output_dir: str
    output_data_dir: str
    intermediate_dir: str
    failure_file: str
    failure_json: str
    success_file: str

    @classmethod
    def at(cls, base: str) -> Paths:
        """The tree under ``base``. A relative ``base`` is taken from the current directory."""
        base = os.path.abspath(base)
        join = os.path.join
        input_dir, output_dir = join(base, "input"), join(base, "output")
        return cls(
            base=base,
            input_dir=input_dir,
            config_dir=join(input_dir, "config"),
            data_dir=join(input_dir, "data"),
            code_dir=join(base, "code"),
            model_dir=join(base, "model"),
            checkpoints_dir=join(base, "checkpoints"),
            output_dir=output_dir,
            output_data_dir=join(output_dir, "data"),
            intermediate_dir=join(output_dir, "intermediate"),
            failure_file=join(output_dir, "failure"),
            failure_json=join(output_dir, "failure.json"),
            success_file=join(output_dir, "success"),
        )

    def config_file(self, name: str) -> str:
        """Path of one file of ``input/config``."""
        return os.path.join(self.config_dir, name)


def base_dir(environ: Mapping[str, str]) -> str:
    """``SAGEMAKER_BASE_DIR`` when set and not empty, else ``/opt/ml``."""
    return environ.get(BASE_VARIABLE) or DEFAULT_BASE
