"""Equality with npm ipfs-unixfs-importer (tests/vectors/unixfs_oracle.mjs), streaming, and hostile DAGs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from p2pflock.errors import InvalidMessageError, UnavailableError
from p2pflock.primitives import unixfs
from p2pflock.primitives.cid import CID, DAG_PB, RAW

FILES = json.loads((Path(__file__).parents[2] / "vectors" / "unixfs.json").read_text())["files"]


def content(size):
    """Byte i of chunk c is sha256(uint64_be(c))[i % 32]; the twin of content() in unixfs_oracle.mjs."""
    for c in range(-(-size // unixfs.CHUNK_BYTES)):
        yield (hashlib.sha256(c.to_bytes(8, "big")).digest() * 8192)[: size - c * unixfs.CHUNK_BYTES]


def ignore(cid, block):
    pass


@pytest.fixture
def small(monkeypatch):
    """Four-byte chunks and three links, so that a few hundred bytes make a deep tree."""
    monkeypatch.setattr(unixfs, "CHUNK_BYTES", 4)
    monkeypatch.setattr(unixfs, "MAX_LINKS", 3)


def stored(data):
    blocks: dict[CID, bytes] = {}
    return unixfs.build([data], blocks.__setitem__), blocks


# --- the same ids as IPFS ---
@pytest.mark.parametrize("file", FILES, ids=lambda file: file["name"])
def test_equals_ipfs(file):
    assert str(unixfs.build(content(file["bytes"]), ignore)) == file["cid"]


def test_the_vectors_cover_what_was_promised():
    sizes = {file["bytes"] for file in FILES}
    assert {0, 1, 262_144, 262_145, 10_000_000} <= sizes
    assert any(174 * 262_144 < size < 46_000_000 for size in sizes)
    assert any(size >= 91_000_000 for size in sizes)


@pytest.mark.parametrize("file", FILES[:5], ids=lambda file: file["name"])
def test_of_bytes_and_in_pieces_of_any_size(file):
    data = b"".join(content(file["bytes"]))
    assert str(unixfs.compute_cid(data)) == file["cid"]
    pieces = [data[i : i + 100_003] for i in range(0, len(data), 100_003)]
    assert str(unixfs.build([b"", *pieces, b""], ignore)) == file["cid"]
    assert b"".join(unixfs.chunked(data)) == data


# --- building and reading ---
def test_round_trip_of_every_small_shape(small):
    for size in range(200):
        data = bytes(i * 7 & 255 for i in range(size))
        root, blocks = stored(data)
        pieces = list(unixfs.assemble(root, blocks.__getitem__, max_bytes=size))
        assert b"".join(pieces) == data
        assert all(len(piece) <= 4 for piece in pieces)
        if size <= 4:
            assert root == CID.of_raw(data)
        assert all(cid.matches(block) for cid, block in blocks.items())


def test_blocks_are_put_children_first_and_as_they_come(small):
    order: list[CID] = []
    pulled: list[int] = []

    def chunks():
        for i in range(100):
            assert len(order) >= i  # every earlier chunk has left memory
            pulled.append(i)
            yield i.to_bytes(4, "big")

    known: set[CID] = set()

    def put(cid, block):
        order.append(cid)
        if cid.codec == DAG_PB:
            assert set(unixfs.iter_links(block)) <= known
        known.add(cid)

    assert unixfs.build(chunks(), put) == order[-1]
    assert len(pulled) == 100


def test_reading_streams(small):
    root, blocks = stored(bytes(range(100)))
    fetched: list[CID] = []
    reader = unixfs.assemble(root, lambda cid: (fetched.append(cid), blocks[cid])[1], max_bytes=100)
    assert fetched == []
    assert next(reader) == bytes(range(4))
    assert len(fetched) == 4  # root, two inner nodes, one leaf


def test_links_walk_the_whole_dag(small):
    root, blocks = stored(bytes(range(100)))
    seen, queue = set(), [root]
    while queue:
        cid = queue.pop()
        seen.add(cid)
        if cid.codec == DAG_PB:
            queue.extend(unixfs.iter_links(blocks[cid]))
    assert seen == set(blocks)


# --- hostile peers ---
def read(root, get, max_bytes=1 << 20):
    return b"".join(unixfs.assemble(root, get, max_bytes=max_bytes))


def node(links, blocks):
    block = unixfs._encode_node(links)
    cid = CID.of(DAG_PB, block)
    blocks[cid] = block
    total = len(block) + sum(link.dag_bytes for link in links)
    return unixfs.Link(cid, sum(link.file_bytes for link in links), total)


def leaf(data, blocks):
    cid = CID.of_raw(data)
    blocks[cid] = data
    return unixfs.Link(cid, len(data), len(data))


def test_one_flipped_bit_in_any_block(small):
    root, blocks = stored(bytes(range(60)))
    for cid, block in blocks.items():
        damaged = {**blocks, cid: block[:-1] + bytes((block[-1] ^ 1,))}
        with pytest.raises(InvalidMessageError, match="hash"):
            read(root, damaged.__getitem__)


def test_errors_of_the_store_pass_through(small):
    root, blocks = stored(bytes(range(60)))

    def get(cid):
        if cid.codec == RAW:
            raise UnavailableError("gone")
        return blocks[cid]

    with pytest.raises(UnavailableError):
        read(root, get)


def test_size_is_refused_before_a_second_block_is_fetched():
    """Attack: 174^3 links to one leaf claim 1.3 TB out of four blocks."""
    blocks: dict[CID, bytes] = {}
    link = leaf(bytes(unixfs.CHUNK_BYTES), blocks)
    for _ in range(3):
        link = node([link] * 174, blocks)
    fetched = []
    with pytest.raises(InvalidMessageError, match="at most"):
        read(link.cid, lambda cid: (fetched.append(cid), blocks[cid])[1], max_bytes=1 << 30)
    assert len(fetched) == 1
    root, blocks = stored(b"x" * 300_000)
    with pytest.raises(InvalidMessageError, match="at most"):
        read(root, blocks.__getitem__, max_bytes=299_999)
    root, blocks = stored(b"x" * 300)
    with pytest.raises(InvalidMessageError, match="larger"):
        read(root, blocks.__getitem__, max_bytes=299)


def test_a_raw_block_larger_than_a_chunk(small):
    with pytest.raises(InvalidMessageError, match="larger"):
        read(CID.of_raw(b"12345"), lambda cid: b"12345")


def test_other_shapes_of_the_same_content_are_refused(small):
    """One content, one id: else a payload could be delivered under many names."""
    blocks: dict[CID, bytes] = {}
    a, b, c, d = (leaf(bytes((i,)) * 4, blocks) for i in range(4))
    tail = leaf(b"zz", blocks)
    lying = unixfs.Link(a.cid, 4, 5)
    shapes = [
        [a],  # a wrapped single leaf
        [leaf(b"12", blocks), tail],  # a short leaf that is not last
        [a, b, leaf(b"", blocks)],  # an empty leaf
        [lying, b],  # wrong total size of a leaf
        [unixfs.Link(a.cid, 3, 3), tail],  # a first leaf said to be shorter than it is
        [a, unixfs.Link(tail.cid, 3, 3)],  # a last leaf said to be longer than it is
        [node([a, b, c], blocks), d],  # a leaf among nodes
        [node([a, b], blocks), node([c, d], blocks)],  # not filled from the left
        [node([node([a, b, c], blocks)], blocks), node([node([d], blocks)], blocks)],  # too deep
        [unixfs.Link(a.cid, 4, 4), unixfs.Link(CID(DAG_PB, b.cid.digest), 4, 4)],  # a leaf as a node
        [node([a, b, c], blocks), unixfs.Link(CID(RAW, node([d], blocks).cid.digest), 4, 4)],
    ]
    for links in shapes:
        root = node(links, blocks)
        with pytest.raises(InvalidMessageError):
            read(root.cid, blocks.__getitem__)
    assert read(node([node([a, b, c], blocks), node([d], blocks)], blocks).cid, blocks.__getitem__)


def test_sizes_that_children_contradict_are_refused(small):
    blocks: dict[CID, bytes] = {}
    a, b, c, d = (leaf(bytes((i,)) * 4, blocks) for i in range(4))
    full, last = node([a, b, c], blocks), node([d], blocks)
    wrong_total = unixfs.Link(full.cid, full.file_bytes, full.dag_bytes + 1)
    wrong_size = unixfs.Link(last.cid, 3, last.dag_bytes)
    for links in ([wrong_total, last], [full, wrong_size]):
        with pytest.raises(InvalidMessageError, match="another size"):
            read(node(links, blocks).cid, blocks.__getitem__)


def test_a_cycle_can_not_loop(small):
    """No sha256 cycle is known; a store that lies about it is caught by the hash, depth by the size."""
    root, blocks = stored(bytes(range(60)))
    with pytest.raises(InvalidMessageError):
        read(root, lambda cid: blocks[root])
    chain: dict[CID, bytes] = {}
    link = leaf(b"1234", chain)
    for _ in range(5000):
        link = node([link], chain)
    with pytest.raises(InvalidMessageError):
        read(link.cid, chain.__getitem__)


def test_a_large_node_is_not_even_parsed():
    with pytest.raises(InvalidMessageError, match="too large"):
        unixfs.parse_node(bytes(unixfs.MAX_NODE_BYTES + 1))


def test_foreign_codecs_are_refused():
    with pytest.raises(InvalidMessageError, match="UnixFS"):
        read(CID.of_dag_cbor(b"\xa0"), lambda cid: b"\xa0")


LINK = b"\x0a\x24" + CID.of_raw(b"1234").to_bytes()
DATA = b"\x0a\x06\x08\x02\x18\x04\x20\x04"


@pytest.mark.parametrize(
    ("why", "block"),
    [
        ("empty", b""),
        ("empty directory", b"\x0a\x02\x08\x01"),
        ("inline data", b"\x0a\x08\x08\x02\x12\x02hi\x18\x02"),
        ("symlink", b"\x0a\x07\x08\x04\x12\x03a/b"),
        ("no links", b"\x0a\x04\x08\x02\x18\x00"),
        ("named link", b"\x12\x2b" + LINK + b"\x12\x01a\x18\x04" + DATA),
        ("link without a size", b"\x12\x28" + LINK + b"\x12\x00" + DATA),
        ("padded varint", b"\x12\x2b" + LINK + b"\x12\x00\x18\x84\x00" + DATA),
        ("wrong length", b"\x12\x2b" + LINK + b"\x12\x00\x18\x04" + DATA),
        ("wrong file size", b"\x12\x2a" + LINK + b"\x12\x00\x18\x04" + b"\x0a\x06\x08\x02\x18\x05\x20\x04"),
        ("block size missing", b"\x12\x2a" + LINK + b"\x12\x00\x18\x04" + b"\x0a\x04\x08\x02\x18\x04"),
        ("more block sizes than links", b"\x12\x2a" + LINK + b"\x12\x00\x18\x04" + DATA + b"\x20\x00"),
        ("unknown field", b"\x12\x2a" + LINK + b"\x12\x00\x18\x04" + DATA + b"\x1a\x00"),
        ("CIDv0", b"\x12\x28" + b"\x0a\x22\x12\x20" + bytes(32) + b"\x12\x00\x18\x04" + DATA),
        ("175 links", (b"\x12\x2a" + LINK + b"\x12\x00\x18\x04") * 175 + DATA),
        ("endless varint", b"\x12" + b"\xff" * 100),
    ],
)
def test_other_nodes_are_refused(why, block):
    good = b"\x12\x2a" + LINK + b"\x12\x00\x18\x04" + DATA
    assert unixfs.parse_node(good)[0].file_bytes == 4
    with pytest.raises(InvalidMessageError):
        unixfs.parse_node(block)
    with pytest.raises(InvalidMessageError):
        list(unixfs.iter_links(block))
