from __future__ import annotations

import io

import pytest

from p2pflock.errors import InvalidMessageError
from p2pflock.primitives import car, dagcbor
from p2pflock.primitives.cid import CID

BLOCKS = [(CID.of_raw(data), data) for data in (b"", b"a", b"b" * 200, b"c" * 70_000)]
ROOTS = (BLOCKS[1][0], CID.of_dag_cbor(b"\xa0"))


def written(roots=ROOTS, blocks=BLOCKS):
    out = io.BytesIO()
    car.write(out, roots, blocks)
    return out.getvalue()


def read(data, max_block_bytes=100_000):
    roots, blocks = car.read(io.BytesIO(data), max_block_bytes=max_block_bytes)
    return roots, list(blocks)


def test_round_trip():
    assert read(written()) == (ROOTS, BLOCKS)
    assert read(written([], [])) == ((), [])


def test_layout_of_the_specification():
    cid = CID.of_raw(b"a")
    header = bytes.fromhex("a265726f6f747381d82a582500") + cid.to_bytes() + bytes.fromhex("6776657273696f6e01")
    assert written([cid], [(cid, b"a")]) == bytes((len(header),)) + header + b"\x25" + cid.to_bytes() + b"a"


def test_blocks_are_read_one_at_a_time():
    source = io.BytesIO(written())
    _, blocks = car.read(source, max_block_bytes=100_000)
    next(blocks)
    assert source.tell() < 300


def test_a_source_that_gives_little_at_a_time():
    class Trickle(io.BytesIO):
        def read(self, size=-1):
            return super().read(min(size, 7))

    roots, blocks = car.read(Trickle(written()), max_block_bytes=100_000)
    assert (roots, list(blocks)) == (ROOTS, BLOCKS)


def test_the_caller_checks_hashes():
    cid = CID.of_raw(b"a")
    (block,) = read(written([cid], [(cid, b"b")]))[1]
    assert not block[0].matches(block[1])


def test_truncation_is_seen_except_between_blocks():
    data = written(ROOTS, BLOCKS[:3])
    whole = {len(written(ROOTS, BLOCKS[:n])) for n in range(4)}
    for size in range(len(data)):
        if size in whole:
            assert len(read(data[:size])[1]) < 3
        else:
            with pytest.raises(InvalidMessageError):
                read(data[:size])


def framed(header):
    encoded = dagcbor.encode(header)
    return bytes((len(encoded),)) + encoded


@pytest.mark.parametrize(
    ("why", "data"),
    [
        ("nothing", b""),
        ("empty header", b"\x00"),
        ("other version", framed({"roots": [], "version": 2})),
        ("version as bool", framed({"roots": [], "version": True})),
        ("no roots", framed({"version": 1})),
        ("roots that are no list", framed({"roots": {}, "version": 1})),
        ("roots that are no links", framed({"roots": [b"x"], "version": 1})),
        ("extra field", framed({"roots": [], "version": 1, "x": 0})),
        ("list as header", framed([])),
        ("CARv2 pragma", bytes.fromhex("0aa16776657273696f6e02")),
        ("header of 2^40 bytes", bytes.fromhex("808080808020") + b"\xa0"),
        ("endless varint", b"\xff" * 20),
        ("padded varint", b"\x80\x00"),
    ],
)
def test_bad_headers(why, data):
    with pytest.raises(InvalidMessageError):
        car.read(io.BytesIO(data), max_block_bytes=100)


@pytest.mark.parametrize(
    ("why", "section"),
    [
        ("too short for an id", b"\x05hello"),
        ("empty section", b"\x00"),
        ("foreign id", b"\x24" + b"\x12\x20" + bytes(34)),
        ("claims 2^62 bytes", b"\xff" * 8 + b"\x3f"),
        ("padded varint", b"\xa5\x80\x00" + CID.of_raw(b"a").to_bytes() + b"a"),
    ],
)
def test_bad_sections(why, section):
    with pytest.raises(InvalidMessageError):
        read(written([], []) + section)


def test_blocks_are_bounded():
    assert read(written([], BLOCKS[2:3]), max_block_bytes=200)
    with pytest.raises(InvalidMessageError, match="section"):
        read(written([], BLOCKS[2:3]), max_block_bytes=199)
    with pytest.raises(InvalidMessageError, match="roots"):
        written([BLOCKS[0][0]] * 1025, [])
