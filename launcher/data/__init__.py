"""Records of the job's channels, each rank its share: shuffled, exactly once, and resumable at any world size.

``Loader(channel, batch_size)`` is what most scripts need. The names below are resolved on first use.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from launcher.data.fields import Field, Ragged, Sparse
    from launcher.data.loader import Loader
    from launcher.data.torch_data import sampler, torch_dataset
    from launcher.data.transforms import Cast, Normalise, OneHot
    from launcher.data.writers import FixedWriter, RecordIOWriter, RecordProtoWriter, TFRecordWriter
    from launcher.errors import DataError

__all__ = [
    "Cast",
    "DataError",
    "Field",
    "FixedWriter",
    "Loader",
    "Normalise",
    "OneHot",
    "Ragged",
    "RecordIOWriter",
    "RecordProtoWriter",
    "Sparse",
    "TFRecordWriter",
    "sampler",
    "torch_dataset",
]

_HOMES = {
    "Cast": "launcher.data.transforms",
    "DataError": "launcher.errors",
    "Field": "launcher.data.fields",
    "FixedWriter": "launcher.data.writers",
    "Loader": "launcher.data.loader",
    "Normalise": "launcher.data.transforms",
    "OneHot": "launcher.data.transforms",
    "Ragged": "launcher.data.fields",
    "RecordIOWriter": "launcher.data.writers",
    "RecordProtoWriter": "launcher.data.writers",
    "Sparse": "launcher.data.fields",
    "TFRecordWriter": "launcher.data.writers",
    "sampler": "launcher.data.torch_data",
    "torch_dataset": "launcher.data.torch_data",
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
