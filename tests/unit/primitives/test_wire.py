from __future__ import annotations

import tracemalloc

import msgpack
import pytest

from p2pflock.errors import InvalidMessageError
from p2pflock.primitives import wire

VALUES = [
    *(sign * (1 << bits) + near for sign in (1, -1) for bits in (5, 7, 8, 15, 16, 31, 32, 62) for near in (-1, 0, 1)),
    2**64 - 1,
    -(2**63),
    0,
    None,
    True,
    False,
    1.5,
    -0.0,
    "",
    *("é" * n for n in (15, 16, 127, 128, 40_000)),
    *(b"x" * n for n in (0, 255, 256, 65_535, 65_536)),
    *([1] * n for n in (0, 15, 16, 65_535, 65_536)),
    {str(n).rjust(3, "0"): [n] for n in range(15)},
    {str(n).rjust(3, "0"): [n] for n in range(16)},
    {1: 2, "a": b"", b"q": [None], 300: {}},
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: f"{value!r:.20}")
def test_agrees_with_msgpack(value):
    packed = wire.pack(value)
    assert packed == msgpack.packb(value)  # its sizes are shortest; the maps above are in our order already
    assert wire.unpack(packed, max_bytes=len(packed)) == value


def test_one_encoding_whatever_the_order_or_kind_of_container():
    assert wire.pack({"b": 1, "a": (2,)}) == wire.pack({"a": [2], "b": 1})
    assert wire.pack(bytearray(b"ab")) == wire.pack(memoryview(b"ab")) == wire.pack(b"ab")


@pytest.mark.parametrize(
    "value", [2**64, -(2**63) - 1, float("nan"), float("inf"), "\ud800", {1.5: 1}, {None: 1}, {(1,): 1}, {1}, object()]
)
def test_values_without_an_encoding(value):
    with pytest.raises(InvalidMessageError):
        wire.pack(value)


@pytest.mark.parametrize(
    ("why", "packed"),
    [
        ("nothing", ""),
        ("trailing bytes", "0000"),
        ("127 in two bytes", "cc7f"),
        ("255 in three bytes", "cd00ff"),
        ("65535 in five bytes", "ce0000ffff"),
        ("2^32-1 in nine bytes", "cf00000000ffffffff"),
        ("positive in a signed form", "d001"),
        ("-32 in two bytes", "d0e0"),
        ("-128 in three bytes", "d1ff80"),
        ("-1 in nine bytes", "d3ffffffffffffffff"),
        ("str8 of 31", "d91f" + "61" * 31),
        ("str16 of 1", "da000161"),
        ("bin16 of 1", "c5000161"),
        ("bin32 of 1", "c60000000161"),
        ("array16 of 1", "dc000100"),
        ("map16 of 0", "de0000"),
        ("bad UTF-8", "a1ff"),
        ("truncated text", "a261"),
        ("short list", "9200"),
        ("keys out of order", "82a16200a16100"),
        ("repeated key", "82a16100a16100"),
        ("list as key", "819000"),
        ("nil as key", "81c000"),
        ("float as key", "81cb3ff800000000000000"),
        ("32-bit float", "ca3fc00000"),
        ("NaN", "cb7ff8000000000000"),
        ("infinity", "cb7ff0000000000000"),
        ("never used", "c1"),
        ("ext 8", "c7010100"),
        ("fixext (timestamp)", "d6ff00000000"),
    ],
)
def test_everything_else_is_refused(why, packed):
    with pytest.raises(InvalidMessageError):
        wire.unpack(bytes.fromhex(packed), max_bytes=100)


def test_bounds():
    with pytest.raises(InvalidMessageError, match="at most 4"):
        wire.unpack(wire.pack(b"xyz"), max_bytes=4)
    with pytest.raises(InvalidMessageError, match="deeply"):
        wire.unpack(b"\x91" * 100_000 + b"\x00", max_bytes=1 << 20)
    with pytest.raises(InvalidMessageError):
        wire.unpack(wire.pack([[0] * 10] * 3), max_bytes=100, max_items=33)
    nested: list = []
    for _ in range(15):
        nested = [nested]
    assert wire.unpack(wire.pack(nested), max_bytes=100) == nested
    with pytest.raises(InvalidMessageError, match="deeply"):
        wire.pack([nested])


@pytest.mark.parametrize("head", ["ddffffffff", "dfffffffff", "dcffff", "c6ffffffff", "dbffffffff"])
def test_a_claimed_size_allocates_nothing(head):
    data = bytes.fromhex(head) + bytes(1000)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidMessageError, match=r"claimed|truncated|No more data"):
            wire.unpack(data, max_bytes=1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [0, 255, 256, 65535, 65536])
def test_parts_join_to_the_same_bytes(size):
    value = ["name", 7, bytes(size), [1, None], b"end"]
    parts = wire.pack_in_parts(value)
    assert b"".join(parts) == wire.pack(value)
    assert any(part is value[2] for part in parts)


def test_parts_are_of_a_short_list():
    assert b"".join(wire.pack_in_parts([0] * 15)) == wire.pack([0] * 15)
    with pytest.raises(InvalidMessageError):
        wire.pack_in_parts([0] * 16)
