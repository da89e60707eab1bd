from __future__ import annotations

import tracemalloc

import cbor2
import pytest

from p2pflock.errors import InvalidMessageError
from p2pflock.primitives import dagcbor
from p2pflock.primitives.cid import CID

LINK = CID.of_raw(b"x")


@pytest.mark.parametrize(
    ("value", "encoded"),
    [  # RFC 8949, appendix A
        (0, "00"),
        (23, "17"),
        (24, "1818"),
        (255, "18ff"),
        (256, "190100"),
        (65535, "19ffff"),
        (65536, "1a00010000"),
        (2**32, "1b0000000100000000"),
        (2**64 - 1, "1bffffffffffffffff"),
        (-1, "20"),
        (-(2**64), "3bffffffffffffffff"),
        (-1000, "3903e7"),
        (False, "f4"),
        (True, "f5"),
        (None, "f6"),
        (b"\1\2\3\4", "4401020304"),
        ("", "60"),
        ("ü", "62c3bc"),
        ([1, [2, 3]], "8201820203"),
        ({}, "a0"),
        ({"a": 1, "b": [2, 3]}, "a26161016162820203"),
        ({"bb": 1, "a": 2, "c": 3}, "a36161026163036262" + "6201"),  # length first
        (LINK, "d82a582500" + LINK.to_bytes().hex()),
    ],
)
def test_known_encodings(value, encoded):
    assert dagcbor.encode(value).hex() == encoded
    decoded = dagcbor.decode(bytes.fromhex(encoded))
    assert decoded == value
    assert type(decoded) is type(value)


def test_agrees_with_cbor2():
    value = {"z": [1, -1, 10**18, None, True, b"\0" * 300], "yy": {"k" * 30: "é" * 300}, "": -(2**63)}
    assert dagcbor.encode(value) == cbor2.dumps(dict(sorted(value.items(), key=lambda i: (len(i[0]), i[0]))))
    assert cbor2.loads(dagcbor.encode(value)) == value


def test_tuples_encode_as_lists():
    assert dagcbor.encode((1, (2,))) == dagcbor.encode([1, [2]])


@pytest.mark.parametrize(
    "value",
    [1.0, 2**64, -(2**64) - 1, {1: 2}, {"a": {2: 3}}, "\ud800", {"\ud800": 1}, {1, 2}, object(), bytearray(b"a")],
)
def test_values_without_an_encoding(value):
    with pytest.raises(InvalidMessageError):
        dagcbor.encode(value)


@pytest.mark.parametrize(
    ("why", "encoded"),
    [
        ("nothing", ""),
        ("trailing bytes", "0000"),
        ("23 in two bytes", "1817"),
        ("255 in three bytes", "1900ff"),
        ("65535 in five bytes", "1a0000ffff"),
        ("2^32-1 in nine bytes", "1b00000000ffffffff"),
        ("-24 in two bytes", "3817"),
        ("reserved head 28", "1c"),
        ("reserved head 30", "1e"),
        ("truncated integer", "19ff"),
        ("long form of a length", "580101"),
        ("truncated bytes", "4401"),
        ("truncated text", "62c3"),
        ("bad UTF-8", "61ff"),
        ("overlong UTF-8", "62c080"),
        ("surrogate in UTF-8", "63eda080"),
        ("indefinite bytes", "5f4101ff"),
        ("indefinite text", "7f6161ff"),
        ("indefinite list", "9f01ff"),
        ("indefinite map", "bf616101ff"),
        ("break alone", "ff"),
        ("list shorter than it says", "8201"),
        ("keys out of order", "a2616201616101"),
        ("bytewise before length", "a2626161016162" + "01"),
        ("repeated key", "a2616101616101"),
        ("repeated empty key", "a260016001"),
        ("integer key", "a10102"),
        ("bytes key", "a1416101"),
        ("map without its value", "a16161"),
        ("half float", "f93c00"),
        ("single float", "fa3f800000"),
        ("double float", "fb3ff0000000000000"),
        ("undefined", "f7"),
        ("simple value", "f0"),
        ("long false", "f814"),
        ("date tag", "c000"),
        ("bignum", "c249010000000000000000"),
        ("tag 42 in long form", "d9002a582500" + LINK.to_bytes().hex()),
        ("tag 42 around text", "d82a6161"),
        ("link without its prefix", "d82a5824" + LINK.to_bytes().hex()),
        ("link with another prefix", "d82a582501" + LINK.to_bytes().hex()),
        ("CIDv0 link", "d82a5823001220" + LINK.digest.hex()),
        ("truncated link", "d82a582500" + LINK.to_bytes().hex()[:-2]),
    ],
)
def test_everything_else_is_refused(why, encoded):
    with pytest.raises(InvalidMessageError):
        dagcbor.decode(bytes.fromhex(encoded))


def test_depth_is_bounded_both_ways():
    nested: list = []
    for _ in range(15):
        nested = [nested]
    assert dagcbor.decode(dagcbor.encode(nested)) == nested
    with pytest.raises(InvalidMessageError):
        dagcbor.encode([nested])
    with pytest.raises(InvalidMessageError):
        dagcbor.decode(b"\x81" + dagcbor.encode(nested))
    with pytest.raises(InvalidMessageError):
        dagcbor.decode(b"\x81" * 100_000 + b"\x00")
    with pytest.raises(InvalidMessageError):
        dagcbor.decode(b"\xa1\x60" * 100_000 + b"\x00")


def test_items_are_bounded_over_the_whole_message():
    assert dagcbor.decode(dagcbor.encode([[0] * 10] * 3), max_items=34) == [[0] * 10] * 3
    with pytest.raises(InvalidMessageError):
        dagcbor.decode(dagcbor.encode([[0] * 10] * 3), max_items=33)
    pairs = {str(i): i for i in range(10)}
    assert dagcbor.decode(dagcbor.encode(pairs), max_items=21) == pairs
    with pytest.raises(InvalidMessageError):
        dagcbor.decode(dagcbor.encode(pairs), max_items=20)
    maps = [{"a": 1}] * 3  # keys count, also where no single map is over the budget
    assert dagcbor.decode(dagcbor.encode(maps), max_items=10) == maps
    with pytest.raises(InvalidMessageError):
        dagcbor.decode(dagcbor.encode(maps), max_items=9)


@pytest.mark.parametrize("head", ["9bffffffffffffffff", "9affffffff", "bb00ffffffffffffff", "5bffffffffffffffff"])
def test_a_claimed_size_allocates_nothing(head):
    data = bytes.fromhex(head) + bytes(1000)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidMessageError, match=r"claimed|truncated"):
            dagcbor.decode(data)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
