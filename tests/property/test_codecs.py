"""Round trips and strictness of every codec: what decodes re-encodes to exactly the bytes that came in.

That one law makes mutated, padded, reordered or otherwise respelled messages impossible to accept as a second
encoding of the same value.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pflock.errors import InvalidMessageError
from p2pflock.primitives import bls, car, dagcbor, merkle, peerid, schema, shuffle, unixfs, wire
from p2pflock.primitives.cid import CID, DAG_CBOR, DAG_PB, RAW

thorough = settings(deadline=None, max_examples=150, derandomize=True)
brief = settings(deadline=None, max_examples=50, derandomize=True)

cids = st.builds(CID, st.sampled_from([RAW, DAG_PB, DAG_CBOR]), st.binary(min_size=32, max_size=32))
integers = st.one_of(st.integers(-(2**63), 2**64 - 1), st.integers(-300, 300))
texts = st.text(max_size=40)
atoms = st.one_of(st.none(), st.booleans(), integers, texts, st.binary(max_size=300))


def containers(leaf, keys):
    return st.recursive(
        leaf,
        lambda inner: st.one_of(st.lists(inner, max_size=20), st.dictionaries(keys, inner, max_size=20)),
        max_leaves=40,
    )


cbor_values = containers(st.one_of(atoms, st.integers(-(2**64), -(2**63)), cids), texts)
wire_keys = st.one_of(texts, st.binary(max_size=20), integers)
wire_values = containers(st.one_of(atoms, st.floats(allow_nan=False, allow_infinity=False)), wire_keys)


def mutated(draw, data: bytes) -> bytes:
    """One edit: replace, insert or remove a byte, or cut or extend the end."""
    data = bytearray(data)
    at = draw(st.integers(0, max(len(data) - 1, 0)))
    byte = draw(st.integers(0, 255))
    edit = draw(st.sampled_from(["replace", "insert", "remove", "cut", "extend"]))
    if edit == "replace" and data:
        data[at] = byte
    elif edit == "insert":
        data.insert(at, byte)
    elif edit == "remove" and data:
        del data[at]
    elif edit == "cut":
        del data[at:]
    else:
        data.append(byte)
    return bytes(data)


def assert_strict(decode, encode, data):
    try:
        value = decode(data)
    except InvalidMessageError:
        return
    assert encode(value) == data


def unpack(data):
    return wire.unpack(data, max_bytes=1 << 20)


@thorough
@given(cbor_values)
def test_dagcbor_round_trip(value):
    assert dagcbor.decode(dagcbor.encode(value)) == value


@thorough
@given(st.data(), cbor_values)
def test_dagcbor_is_strict(data, value):
    assert_strict(dagcbor.decode, dagcbor.encode, mutated(data.draw, dagcbor.encode(value)))


@thorough
@given(st.binary(max_size=60))
def test_dagcbor_of_noise(data):
    assert_strict(dagcbor.decode, dagcbor.encode, data)


@thorough
@given(wire_values)
def test_wire_round_trip(value):
    assert unpack(wire.pack(value)) == value


@thorough
@given(st.data(), wire_values)
def test_wire_is_strict(data, value):
    assert_strict(unpack, wire.pack, mutated(data.draw, wire.pack(value)))


@thorough
@given(st.binary(max_size=60))
def test_wire_of_noise(data):
    assert_strict(unpack, wire.pack, data)


@thorough
@given(st.data(), cids)
def test_cid(data, cid):
    assert CID.parse(str(cid)) == cid == CID.from_bytes(cid.to_bytes())
    assert_strict(CID.from_bytes, CID.to_bytes, mutated(data.draw, cid.to_bytes()))
    text = mutated(data.draw, str(cid).encode()).decode("latin-1")
    assert_strict(CID.parse, str, text)


@dataclass(frozen=True, slots=True)
class Line(schema.Record):
    score: int = schema.integer(-(10**6), 10**6)
    of: CID = schema.link()


@dataclass(frozen=True, slots=True)
class Card(schema.Record):
    KIND: ClassVar[str] = "test/card/1"

    round: int = schema.uint(32)
    is_final: bool = schema.boolean()
    wei: int = schema.amount()
    note: str = schema.text(20)
    previous: CID | None = schema.optional(schema.link())
    lines: tuple[Line, ...] = schema.sequence(schema.nested(Line), 5)
    signature: bytes = schema.blob(96)


cards = st.builds(
    Card,
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.integers(0, 2**256 - 1),
    st.text(max_size=5),
    st.none() | cids,
    st.lists(st.builds(Line, st.integers(-(10**6), 10**6), cids), max_size=5).map(tuple),
    st.binary(max_size=96),
)


@thorough
@given(st.data(), cards)
def test_records(data, card):
    assert Card.decode(card.encode()) == card
    assert_strict(Card.decode, Card.encode, mutated(data.draw, card.encode()))


links = st.builds(unixfs.Link, cids, st.integers(0, 2**40), st.integers(0, 2**45))


@thorough
@given(st.data(), st.lists(links, min_size=1, max_size=20))
def test_unixfs_nodes(data, node):
    block = unixfs._encode_node(node)
    assert list(unixfs.parse_node(block)) == node
    assert_strict(unixfs.parse_node, unixfs._encode_node, mutated(data.draw, block))


@brief
@given(st.lists(st.binary(max_size=50), max_size=30))
def test_unixfs_content(pieces):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unixfs, "CHUNK_BYTES", 8)
        patch.setattr(unixfs, "MAX_LINKS", 3)
        data, blocks = b"".join(pieces), {}
        root = unixfs.build(pieces, blocks.__setitem__)
        assert root == unixfs.compute_cid(data)
        assert b"".join(unixfs.assemble(root, blocks.__getitem__, max_bytes=len(data))) == data


def _read_car(data):
    roots, blocks = car.read(io.BytesIO(data), max_block_bytes=1000)
    return roots, list(blocks)


def _write_car(value):
    out = io.BytesIO()
    car.write(out, *value)
    return out.getvalue()


@thorough
@given(st.data(), st.tuples(st.lists(cids, max_size=3).map(tuple), st.lists(st.tuples(cids, st.binary(max_size=50)), max_size=4)))
def test_car(data, value):
    assert _read_car(_write_car(value)) == value
    assert_strict(_read_car, _write_car, mutated(data.draw, _write_car(value)))


@thorough
@given(st.data(), st.binary(min_size=32, max_size=32))
def test_peer_ids(data, key):
    try:
        peer = peerid.from_ed25519(key)
    except InvalidMessageError:
        return
    assert peerid.from_text(peerid.to_text(peer)) == peer
    text = mutated(data.draw, peerid.to_text(peer).encode()).decode("latin-1")
    assert_strict(peerid.from_text, peerid.to_text, text)


@thorough
@given(st.binary(min_size=32, max_size=32), st.integers(1, 200), st.data())
def test_shuffle(seed, size, data):
    count = data.draw(st.integers(0, size))
    assert sorted(shuffle.shuffled(seed, size)) == list(range(size))
    assert shuffle.draw(seed, size, count) == shuffle.shuffled(seed, size)[:count]


@thorough
@given(st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=20), st.data())
def test_merkle_proofs(leaves, data):
    index = data.draw(st.integers(0, len(leaves) - 1))
    root, proof = merkle.root(leaves), merkle.proof(leaves, index)
    assert merkle.verify(root, leaves[index], proof)
    other = mutated(data.draw, leaves[index])
    assert other in leaves or not merkle.verify(root, other, proof)


@brief
@given(st.data(), st.binary(max_size=40))
def test_bls_signatures_have_one_encoding(data, message):
    secret = bls.keygen(b"property test key material, 32 B")
    signature = bls.sign(secret, message)
    other = mutated(data.draw, signature)
    assert bls.verify(bls.secret_to_public(secret), message, other) == (other == signature)
