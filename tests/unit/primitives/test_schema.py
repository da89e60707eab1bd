from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from p2pflock.errors import InvalidMessageError
from p2pflock.primitives import dagcbor, schema
from p2pflock.primitives.cid import CID


class Colour(enum.IntEnum):
    RED = 0
    BLUE = 1


@dataclass(frozen=True, slots=True)
class Inner(schema.Record):
    number: int = schema.integer(-5, 5)


@dataclass(frozen=True, slots=True)
class Twin(schema.Record):
    number: int = schema.integer(-5, 5)


@dataclass(frozen=True, slots=True)
class Everything(schema.Record):
    KIND: ClassVar[str] = "test/everything/1"
    MAX_BYTES: ClassVar[int] = 1024

    count: int = schema.uint(8)
    flag: bool = schema.boolean()
    key: bytes = schema.fixed_bytes(4)
    body: bytes = schema.blob(6, 1)
    wei: int = schema.amount()
    name: str = schema.text(4)
    parent: CID = schema.link()
    inner: Inner = schema.nested(Inner)
    maybe: Inner | None = schema.optional(schema.nested(Inner))
    many: tuple[Inner, ...] = schema.sequence(schema.nested(Inner), 2)


@dataclass(frozen=True, slots=True)
class Other(schema.Record):
    KIND: ClassVar[str] = "test/other/1"

    data: bytes = schema.blob(1 << 20)


GOOD = Everything(
    count=255,
    flag=True,
    key=b"abcd",
    body=b"x",
    wei=2**256 - 1,
    name="é€"[:1] + "ab",
    parent=CID.of_raw(b""),
    inner=Inner(-5),
    maybe=None,
    many=(Inner(1), Inner(2)),
)


@pytest.mark.parametrize("record", [GOOD, replace(GOOD, maybe=Inner(0), many=(), wei=0, name="")])
def test_round_trip(record):
    assert Everything.decode(record.encode()) == record
    assert record.cid() == CID.of_dag_cbor(record.encode())


def test_the_kind_is_inside_the_encoding():
    assert dagcbor.decode(GOOD.encode())["kind"] == "test/everything/1"
    assert GOOD.encode() != Other(b"").encode()
    with pytest.raises(InvalidMessageError, match="not a test/other/1"):
        Other.decode(GOOD.encode())


BAD = [
    ("count", 256),
    ("count", -1),
    ("count", True),
    ("count", 1.0),
    ("count", "1"),
    ("count", None),
    ("flag", 1),
    ("flag", None),
    ("key", b"abc"),
    ("key", b"abcde"),
    ("key", "abcd"),
    ("key", bytearray(b"abcd")),
    ("body", b""),
    ("body", b"1234567"),
    ("wei", -1),
    ("wei", 2**256),
    ("wei", True),
    ("name", "abcde"),
    ("name", "€€"),
    ("name", "\ud800"),
    ("name", b"ab"),
    ("parent", b"x"),
    ("parent", None),
    ("inner", None),
    ("inner", Twin(1)),
    ("inner", Inner(6)),
    ("maybe", Twin(1)),
    ("maybe", 0),
    ("many", [Inner(1)]),
    ("many", (Inner(1),) * 3),
    ("many", (Inner(1), None)),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_values_do_not_encode(name, value):
    with pytest.raises(InvalidMessageError):
        replace(GOOD, **{name: value}).encode()


BAD_WIRE = [
    ("count", 256),
    ("count", -1),
    ("count", True),
    ("count", b"\1"),
    ("flag", 0),
    ("key", b"abc"),
    ("key", "abcd"),
    ("body", b""),
    ("wei", 1),
    ("wei", bytes(31)),
    ("wei", bytes(33)),
    ("name", "abcde"),
    ("parent", CID.of_raw(b"").to_bytes()),
    ("inner", None),
    ("inner", [1]),
    ("inner", {}),
    ("inner", {"number": 1, "extra": 1}),
    ("inner", {"numbre": 1}),
    ("inner", {"number": 6}),
    ("maybe", 0),
    ("many", {}),
    ("many", [{"number": 1}] * 3),
    ("many", [1]),
    ("kind", "test/everything/2"),
    ("kind", 1),
    ("extra", 1),
]


@pytest.mark.parametrize(("name", "value"), BAD_WIRE)
def test_bad_fields_do_not_decode(name, value):
    wire = dagcbor.decode(GOOD.encode())
    with pytest.raises(InvalidMessageError):
        Everything.decode(dagcbor.encode({**wire, name: value}))


def test_missing_fields_do_not_decode():
    wire = dagcbor.decode(GOOD.encode())
    for name in wire:
        with pytest.raises(InvalidMessageError):
            Everything.decode(dagcbor.encode({key: item for key, item in wire.items() if key != name}))
    for other in ([], None, 1, b"", "test/everything/1"):
        with pytest.raises(InvalidMessageError):
            Everything.decode(dagcbor.encode(other))


def test_size_is_bounded_both_ways():
    assert len(Other(bytes((1 << 20) - 100)).encode()) <= Other.MAX_BYTES
    with pytest.raises(InvalidMessageError, match="at most"):
        Other(bytes(1 << 20)).encode()  # fits its field, not the record: decode would refuse it
    with pytest.raises(InvalidMessageError, match="at most"):
        Everything.decode(bytes(1025))


def test_enum_members_are_integers_on_the_wire():
    record = replace(GOOD, count=Colour.BLUE)
    assert record.encode() == replace(GOOD, count=1).encode()
    assert Everything.decode(record.encode()) == record
    with pytest.raises(InvalidMessageError):
        replace(GOOD, inner=Inner(Colour.BLUE), count=enum.IntEnum("Big", {"A": 256}).A).encode()


def test_a_field_can_not_shadow_the_kind():
    @dataclass(frozen=True, slots=True)
    class Shadow(schema.Record):
        KIND: ClassVar[str] = "test/shadow/1"

        kind: str = schema.text(100)

    with pytest.raises(TypeError, match="kind"):
        Shadow("test/other/1").encode()
