"""Augmented manifests: each line of the manifest becomes one RecordIO record for each of its attributes.

The job's configuration does not pass the attributes' names on, so the script repeats the ``AttributeNames`` of its
channel, in their order. An attribute whose name ends with ``-ref`` is the content of the object it names, any other the
attribute's JSON value as text. Source: the SageMaker developer guide, "Augmented Manifest Files for Training Jobs".
"""

from __future__ import annotations

from launcher.data.fields import DTYPES, KINDS, dtype_number
from launcher.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from launcher.data.channel import Place

_NUMBERS = ("float32", "float64", "int64")
BYTES = "bytes"


def attribute_fields(
    attributes: Sequence[str] | Mapping[str, object],
) -> list[tuple[str, int, int, tuple[int, ...]]]:
    """The field of each attribute: name, kind, dtype and shape by number.

    Args:
        attributes: names, in the order of the channel's ``AttributeNames``; or a dict from name to ``"bytes"`` (what
            comes is given as it is: ragged uint8), ``"int64"``, ``"float32"`` or ``"float64"`` (it is the text of a
            number: a scalar).

    Raises:
        UsageError: no names, one name twice, or another type.
    """
    types = dict(attributes) if hasattr(attributes, "keys") else dict.fromkeys(attributes, BYTES)
    if isinstance(attributes, str) or not types or len(types) != len(attributes):
        raise UsageError(f"attributes is {attributes!r}; expected the channel's AttributeNames, each once")
    fields: list[tuple[str, int, int, tuple[int, ...]]] = []
    for name, wanted in types.items():
        if not isinstance(name, str) or not name:
            raise UsageError(f"attributes has {name!r}; expected names")
        if wanted == BYTES:
            fields.append((name, KINDS.index("ragged"), DTYPES.index("uint8"), ()))
            continue
        dtype = dtype_number(wanted)
        if DTYPES[dtype] not in _NUMBERS:
            raise UsageError(
                f"attribute {name!r} is to be {wanted!r}; expected {BYTES!r}, {', '.join(map(repr, _NUMBERS))}"
            )
        fields.append((name, KINDS.index("fixed"), dtype, ()))
    return fields


def check_wrapped(place: Place) -> None:
    """That the attributes of a sample can be told apart.

    Raises:
        UsageError: the channel's records come without frames.
    """
    if place.name and place.record_wrapper != "RecordIO":
        raise UsageError(
            f"channel {place.name!r} has RecordWrapperType {place.record_wrapper}: the attributes of an augmented "
            "manifest then follow each other without anything between them, and no reader can tell where one ends; set "
            "RecordWrapperType to RecordIO"
        )
