"""Differential fuzz: Record and Example messages through our decoder and libprotobuf must give the same tensors.

    python tests/data/fuzz_record_proto.py --cases 1000000 --seed 1

A case is a message in one of the many forms a serializer may give it (packed or not, in chunks, in any order, with
unknown fields, with keys and members that are overridden), then perhaps damaged. Where libprotobuf refuses a message,
so must we; where it takes one, we take it with the same values, or refuse it for what the schema rules say.
"""

from __future__ import annotations

import argparse
import random
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

from launcher import _data
from launcher.errors import DataError

# Members of Value and of Feature: dtype, and struct's letter for it.
NUMBERS = {
    "float32_tensor": (0, "f"),
    "float64_tensor": (1, "d"),
    "int32_tensor": (7, "i"),
    "float_list": (0, "f"),
    "int64_list": (8, "q"),
}
BYTES = ("bytes", "bytes_list")


def message_classes() -> tuple[Any, Any]:
    """Record and Example, from descriptors that are built here.

    Sources of names and numbers: the SageMaker developer guide, "Common data formats for training", aialgs.data;
    TensorFlow's guide, "TFRecord and tf.train.Example", tensorflow/core/example.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    types = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="under_test.proto", package="t", syntax="proto2")

    def message(name: str, parent: Any = None) -> Any:
        made = parent.nested_type.add() if parent is not None else file.message_type.add()
        made.name = name
        return made

    def field(owner: Any, name: str, number: int, kind: int, type_name: str = "", repeated: bool = False) -> Any:
        label = types.LABEL_REPEATED if repeated else types.LABEL_OPTIONAL
        made = owner.field.add(name=name, number=number, type=kind, label=label)
        if type_name:
            made.type_name = f".t.{type_name}"
        if repeated and kind not in (types.TYPE_BYTES, types.TYPE_MESSAGE):
            made.options.packed = True
        return made

    def one_of(name: str, members: dict[int, tuple[str, str]]) -> None:
        owner = message(name)
        owner.oneof_decl.add(name="kind")
        for number, (member, type_name) in members.items():
            field(owner, member, number, types.TYPE_MESSAGE, type_name).oneof_index = 0

    def map_of(owner: Any, name: str, number: int, value: str) -> None:
        entry = message(f"{name.capitalize()}Entry", owner)
        entry.options.map_entry = True
        field(entry, "key", 1, types.TYPE_STRING)
        field(entry, "value", 2, types.TYPE_MESSAGE, value)
        field(owner, name, number, types.TYPE_MESSAGE, f"{owner.name}.{entry.name}", repeated=True)

    tensors = {"Float32Tensor": types.TYPE_FLOAT, "Float64Tensor": types.TYPE_DOUBLE, "Int32Tensor": types.TYPE_INT32}
    for name, kind in tensors.items():
        tensor = message(name)
        field(tensor, "values", 1, kind, repeated=True)
        field(tensor, "keys", 2, types.TYPE_UINT64, repeated=True)
        field(tensor, "shape", 3, types.TYPE_UINT64, repeated=True)
    content = message("Bytes")
    field(content, "value", 1, types.TYPE_BYTES, repeated=True)
    field(content, "content_type", 2, types.TYPE_STRING)
    members = {2: ("float32_tensor", "Float32Tensor"), 3: ("float64_tensor", "Float64Tensor")}
    one_of("Value", {**members, 7: ("int32_tensor", "Int32Tensor"), 9: ("bytes", "Bytes")})
    record = message("Record")
    map_of(record, "features", 1, "Value")
    map_of(record, "label", 2, "Value")
    for number, name in ((3, "uid"), (4, "metadata"), (5, "configuration")):
        field(record, name, number, types.TYPE_STRING)

    lists = {"BytesList": types.TYPE_BYTES, "FloatList": types.TYPE_FLOAT, "Int64List": types.TYPE_INT64}
    for name, kind in lists.items():
        field(message(name), "value", 1, kind, repeated=True)
    one_of("Feature", {1: ("bytes_list", "BytesList"), 2: ("float_list", "FloatList"), 3: ("int64_list", "Int64List")})
    map_of(message("Features"), "feature", 1, "Feature")
    field(message("Example"), "features", 1, types.TYPE_MESSAGE, "Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    record_type, example_type = (pool.FindMessageTypeByName(f"t.{name}") for name in ("Record", "Example"))
    return message_factory.GetMessageClass(record_type), message_factory.GetMessageClass(example_type)


def varint(number: int, longer: int = 0) -> bytes:
    """``longer``: so many bytes more than it needs, which every parser takes."""
    number &= (1 << 64) - 1
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    for _ in range(min(longer, 10 - len(out))):
        out[-1] |= 0x80
        out.append(0)
    return bytes(out)


def tagged(field: int, wire_type: int, body: bytes) -> bytes:
    return varint(field << 3 | wire_type) + body


def delimited(field: int, body: bytes) -> bytes:
    return tagged(field, 2, varint(len(body)) + body)


class Messages:
    """Makes messages, with the luck of ``random``."""

    def __init__(self, luck: random.Random) -> None:
        self.luck = luck

    def chance(self, of: float) -> bool:
        return self.luck.random() < of

    def unknown(self) -> bytes:
        """A field that none of the messages has."""
        field, kind = self.luck.choice((11, 16, 1000, 1 << 20)), self.luck.randrange(5)
        if kind == 0:
            return tagged(field, 0, varint(self.luck.getrandbits(64), self.luck.randrange(3)))
        if kind == 1:
            return tagged(field, 1, self.luck.randbytes(8))
        if kind == 2:
            return delimited(field, self.luck.randbytes(self.luck.randrange(20)))
        if kind == 3:
            return tagged(field, 5, self.luck.randbytes(4))
        inner = b"".join(self.unknown() for _ in range(self.luck.randrange(3)))
        return tagged(field, 3, inner) + tagged(field, 4, b"")

    def mixed(self, pieces: list[bytes], ordered: bool = False) -> bytes:
        if not ordered and self.chance(0.3):
            self.luck.shuffle(pieces)
        while self.chance(0.1):
            pieces.insert(self.luck.randint(0, len(pieces)), self.unknown())
        return b"".join(pieces)

    def numbers(self, field: int, each: list[bytes], wire_type: int) -> list[bytes]:
        """A repeated number: in one packed chunk, in several, or each for itself."""
        if self.chance(0.6):
            return [delimited(field, b"".join(each))] if each or self.chance(0.3) else []
        pieces = []
        while each:
            count = self.luck.randint(1, len(each))
            chunk, each = each[:count], each[count:]
            if self.chance(0.5):
                pieces.append(delimited(field, b"".join(chunk)))
            else:
                pieces += [tagged(field, wire_type, one) for one in chunk]
            if self.chance(0.05):
                pieces.append(delimited(field, b""))
        return pieces

    def int32(self) -> int:
        return self.luck.choice((0, 1, -1, 127, 128, 300, -(2**31), 2**31 - 1, self.luck.getrandbits(31)))

    def tensor(self, kind: int) -> bytes:
        count = self.luck.choice((0, 1, 1, 2, 3, 5, 8, 40))
        sparse, wide = self.chance(0.4), 2 if self.chance(0.05) else 0
        if kind == 7:
            values = self.numbers(1, [varint(self.int32(), self.luck.randint(0, wide)) for _ in range(count)], 0)
        else:
            size, wire_type = (4, 5) if kind == 2 else (8, 1)
            values = self.numbers(1, [self.luck.randbytes(size) for _ in range(count)], wire_type)
        shape = self.luck.choice(([], [count], [count]))
        keys: list[int] = []
        if sparse:
            shape = self.luck.choice(([1000], [10, 100], [2**40, 2**20]))
            keys = [self.luck.randrange(1000) for _ in range(count if self.chance(0.97) else count + 1)]
        elif count % 2 == 0 and self.chance(0.2):
            shape = [2, count // 2]
        elif self.chance(0.02):
            shape = [self.luck.getrandbits(64), self.luck.getrandbits(64)]
        pieces = [values]
        pieces.append(self.numbers(2, [varint(key, self.luck.randint(0, wide)) for key in keys], 0))
        pieces.append(self.numbers(3, [varint(size) for size in shape], 0))
        if self.chance(0.3):
            self.luck.shuffle(pieces)
        # The chunks of one field must stay in their order; those of different fields may be mixed.
        if self.chance(0.2):
            order = [which for which, of in enumerate(pieces) for _ in of]
            self.luck.shuffle(order)
            return self.mixed([pieces[which].pop(0) for which in order], ordered=True)
        return self.mixed([piece for of in pieces for piece in of], ordered=True)

    def value(self) -> bytes:
        pieces = []
        for _ in range(2 if self.chance(0.06) else 0 if self.chance(0.01) else 1):
            kind = self.luck.choice((2, 2, 3, 7, 7, 9))
            if kind == 9:
                inner = self.texts()
                if self.chance(0.3):
                    inner.append(delimited(2, b"image/jpeg"))
                pieces.append(delimited(9, self.mixed(inner)))
            else:
                pieces.append(delimited(kind, self.tensor(kind)))
        return self.mixed(pieces, ordered=True)

    def feature(self) -> bytes:
        pieces = []
        for _ in range(2 if self.chance(0.06) else 0 if self.chance(0.01) else 1):
            kind, count = self.luck.randint(1, 3), self.luck.choice((0, 1, 1, 2, 3, 40))
            if kind == 1:
                inner = self.texts()
            elif kind == 2:
                inner = self.numbers(1, [self.luck.randbytes(4) for _ in range(count)], 5)
            else:
                large = self.luck.getrandbits(64)
                inner = self.numbers(1, [varint(self.luck.choice((self.int32(), large))) for _ in range(count)], 0)
            pieces.append(delimited(kind, self.mixed(inner, ordered=True)))
        return self.mixed(pieces, ordered=True)

    def texts(self) -> list[bytes]:
        return [delimited(1, self.luck.randbytes(self.luck.randrange(30)))] * self.luck.choice((1, 1, 1, 1, 0, 2))

    def entry(self, make: Callable[[], bytes]) -> bytes:
        key = self.luck.choice((b"values", b"values", b"a", b"ids"))
        pieces = [] if self.chance(0.01) else [delimited(1, key)]
        pieces += [delimited(2, make()) for _ in range(2 if self.chance(0.03) else 0 if self.chance(0.01) else 1)]
        if self.chance(0.3):
            self.luck.shuffle(pieces)
        return b"".join(pieces)

    def record(self) -> bytes:
        pieces = []
        for number, most in ((1, 3), (2, 2)):
            for _ in range(self.luck.randint(1 if number == 1 else 0, most)):
                pieces.append(delimited(number, self.entry(self.value)))
        if self.chance(0.2):
            pieces.append(delimited(self.luck.randint(3, 5), b"text"))
        return self.perhaps_damaged(self.mixed(pieces))

    def example(self) -> bytes:
        pieces = []
        for _ in range(2 if self.chance(0.05) else 1):
            features = [delimited(1, self.entry(self.feature)) for _ in range(self.luck.randint(0, 4))]
            pieces.append(delimited(1, self.mixed(features)))
        return self.perhaps_damaged(self.mixed(pieces))

    def perhaps_damaged(self, message: bytes) -> bytes:
        return self.damaged(message) if message and self.chance(0.15) else message

    def damaged(self, message: bytes) -> bytes:
        at = self.luck.randrange(len(message))
        kind = self.luck.randrange(4)
        if kind == 0:
            return message[:at]
        if kind == 1:
            return message[:at] + bytes([self.luck.randrange(256)]) + message[at + 1 :]
        if kind == 2:
            return message[:at] + self.luck.randbytes(self.luck.randint(1, 3)) + message[at:]
        return message[:at] + message[at + 1 :]


def maps_of(message: Any) -> list[tuple[str, Any]]:
    """The maps of a message, with what stands in front of their keys."""
    if hasattr(message, "label"):
        return [("", message.features), ("label_", message.label)]
    return [("", message.features.feature)]


def expected(message: Any) -> list[tuple[Any, ...]] | None:
    """What our decoder must make of libprotobuf's message: its fields; None: the schema rules refuse it."""
    fields = []
    for prefix, entries in maps_of(message):
        if any(isinstance(key, bytes) for key in entries):
            return None  # no UTF-8
        for key in sorted(entries, key=str.encode):
            field = expected_field(entries[key])
            if field is None:
                return None
            fields.append((prefix + key, *field))
    names = [field[0] for field in fields]
    return fields if fields and len(names) == len(set(names)) else None


def expected_field(value: Any) -> tuple[Any, ...] | None:
    """Kind, dtype, shape, values and keys of one Value or Feature; None: it is refused."""
    member = value.WhichOneof("kind")
    if member is None:
        return None
    content = getattr(value, member)
    if member in BYTES:
        return (1, 5, [], b"".join(content.value), []) if len(content.value) < 2 else None
    dtype, code = NUMBERS[member]
    values = list(content.values if hasattr(content, "values") else content.value)
    packed = struct.pack(f"<{len(values)}{code}", *values)
    if not hasattr(content, "values"):
        return (0, dtype, [len(values)], packed, []) if values else (1, dtype, [], b"", [])
    keys, shape, product = list(content.keys), list(content.shape), 1
    for size in shape:
        product *= size
        if product > 2**63 - 1:
            return None
    if keys or (not values and shape):
        if not shape or len(keys) != len(values) or any(one >= product for one in keys):
            return None
        return 2, dtype, shape, packed, keys
    if shape and product != len(values):
        return None
    return 0, dtype, shape or [len(values)], packed, []


def ours(message: bytes, decode: Any) -> tuple[str, list[tuple[Any, ...]] | None]:
    """What ours makes of it: "malformed", or "refused" by the schema rules, or "fine" with the fields."""
    try:
        decoded = decode(message)
    except DataError as error:
        return ("malformed" if error.problem == "malformed" else "refused"), None
    except ValueError:
        return "refused", None
    return "fine", [(*field, values, keys) for field, values, keys in decoded]


def same(left: list[tuple[Any, ...]], right: list[tuple[Any, ...]]) -> bool:
    """Equal, where a NaN's payload may have been quieted on its way through Python's floats."""
    if [(*one[:4], one[5]) for one in left] != [(*one[:4], one[5]) for one in right]:
        return False
    for one, other in zip(left, right, strict=True):
        if one[4] == other[4]:
            continue
        code = {0: "f", 1: "d"}.get(one[2])
        if code is None or len(one[4]) != len(other[4]):
            return False
        pairs = zip(struct.iter_unpack(f"<{code}", one[4]), struct.iter_unpack(f"<{code}", other[4]), strict=True)
        if any(a != b and (a[0] == a[0] or b[0] == b[0]) for a, b in pairs):
            return False
    return True


def keeps_entries_apart(message: Any) -> bool:
    """Whether a map's entry had a field that is neither key nor value.

    The C library behind Python's protobuf then puts the whole entry among the message's unknown fields; the one in C++,
    as ours, skips the field. There is nothing to compare then.
    """
    from google.protobuf.unknown_fields import UnknownFieldSet

    owner = message if hasattr(message, "label") else message.features
    return any(field.field_number in (1, 2) and field.wire_type == 2 for field in UnknownFieldSet(owner))


def check(message: bytes, reference: Any, decode: Any) -> str:
    """How the case went: "fine", "refused", "malformed", "apart". Raises AssertionError: not as libprotobuf has it."""
    from google.protobuf.message import DecodeError

    verdict, fields = ours(message, decode)
    try:
        reference.ParseFromString(message)
        if keeps_entries_apart(reference):
            return "apart"
        wanted = expected(reference)
        theirs = "refused" if wanted is None else "fine"
    except (DecodeError, UnicodeDecodeError):
        wanted, theirs = None, "malformed"
    # What is wrong in two ways may be refused for either.
    agreed = verdict == theirs or (verdict, theirs) == ("refused", "malformed")
    assert agreed, f"ours: {verdict}, libprotobuf: {theirs}: {message.hex()}"
    if wanted is not None:
        assert fields is not None and same(fields, wanted), f"ours {fields}, libprotobuf {wanted}: {message.hex()}"
    return verdict


def run(cases: int, seed: int) -> dict[str, int]:
    """Checks so many cases, three of four Records; gives how many went how."""
    record_type, example_type = message_classes()
    messages = Messages(random.Random(seed))
    counts = {"fine": 0, "refused": 0, "malformed": 0, "apart": 0}
    for case in range(cases):
        if case % 4:
            counts[check(messages.record(), record_type(), _data.decode_record_proto)] += 1
        else:
            counts[check(messages.example(), example_type(), _data.decode_example)] += 1
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    began = time.monotonic()
    counts = run(arguments.cases, arguments.seed)
    print(f"seed {arguments.seed}: {arguments.cases} cases in {time.monotonic() - began:.0f} s: {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
