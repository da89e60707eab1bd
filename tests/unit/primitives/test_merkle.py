"""Against vectors of @openzeppelin/merkle-tree (tests/vectors/merkle_oracle.mjs) and of RFC 6962."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest

from p2pflock.errors import InvalidMessageError
from p2pflock.primitives import merkle
from p2pflock.primitives.keccak import keccak256

TREES = json.loads((Path(__file__).parents[2] / "vectors" / "merkle.json").read_text())["trees"]


def raw(text: str) -> bytes:
    return bytes.fromhex(text[2:])


def leaves_of(tree):
    return [
        merkle.leaf_hash(raw(leaf["task"]), raw(leaf["account"]), int(leaf["cumulative"], 16))
        for leaf in tree["leaves"]
    ]


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: f"{len(tree['leaves'])} leaves")
def test_equals_openzeppelin(tree):
    leaves = leaves_of(tree)
    assert leaves == [raw(leaf["leaf"]) for leaf in tree["leaves"]]
    assert merkle.root(leaves) == merkle.root(leaves[::-1]) == raw(tree["root"])
    for index, leaf in enumerate(tree["leaves"]):
        proof = merkle.proof(leaves, index)
        assert proof == [raw(item) for item in leaf["proof"]]
        assert merkle.verify(raw(tree["root"]), leaves[index], proof)


def test_wrong_proofs_do_not_verify():
    leaves = leaves_of(TREES[5])
    root, proof = merkle.root(leaves), merkle.proof(leaves, 2)
    assert merkle.verify(root, leaves[2], proof)
    assert not merkle.verify(root, leaves[1], proof)
    assert not merkle.verify(root, leaves[2], proof[:-1])
    assert not merkle.verify(root, leaves[2], [*proof, bytes(32)])
    assert not merkle.verify(root, leaves[2], [proof[0][:-1], *proof[1:]])
    assert not merkle.verify(root, leaves[2][:-1], proof)
    assert not merkle.verify(bytes(32), leaves[2], proof)
    assert not merkle.verify(root, leaves[2], proof * 40)


def test_an_inner_node_can_not_pose_as_a_leaf():
    """Second preimage: a claim whose encoding is two child hashes.  Leaves are 96 bytes and hashed twice."""
    leaves = leaves_of(TREES[1])
    a, b = sorted(leaves)
    assert merkle.root(leaves) == keccak256(a + b)
    assert merkle.leaf_hash(a, b[:20], 0) != merkle.root(leaves)


def test_edges():
    assert merkle.root([]) == bytes(32)
    one = merkle.leaf_hash(bytes(32), bytes(20), 1)
    assert merkle.root([one]) == one
    assert merkle.proof([one], 0) == []
    twice = [one, one, merkle.leaf_hash(bytes(32), bytes(20), 2)]
    assert all(merkle.verify(merkle.root(twice), leaf, merkle.proof(twice, i)) for i, leaf in enumerate(twice))
    for index in (-1, 1):
        with pytest.raises(IndexError):
            merkle.proof([one], index)
    with pytest.raises(InvalidMessageError):
        merkle.root([one, b""])


@pytest.mark.parametrize(
    "arguments",
    [(bytes(31), bytes(20), 0), (bytes(32), bytes(32), 0), (bytes(32), bytes(20), -1), (bytes(32), bytes(20), 1 << 256)],
)
def test_leaf_bounds(arguments):
    with pytest.raises(InvalidMessageError):
        merkle.leaf_hash(*arguments)


def rfc6962(leaves):
    """The recursive definition of section 2.1."""
    if not leaves:
        return sha256(b"").digest()
    if len(leaves) == 1:
        return sha256(b"\0" + leaves[0]).digest()
    split = 1 << (len(leaves) - 1).bit_length() - 1
    return sha256(b"\1" + rfc6962(leaves[:split]) + rfc6962(leaves[split:])).digest()


def test_sha256_root_is_rfc6962():
    leaves = [bytes((i,)) * (i % 40) for i in range(70)]
    for count in range(len(leaves) + 1):
        assert merkle.sha256_root(leaves[:count]) == rfc6962(leaves[:count])
    # certificate-transparency-go testdata: the root of its eight reference inputs
    inputs = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
    assert (
        merkle.sha256_root([bytes.fromhex(text) for text in inputs]).hex()
        == "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"
    )


def test_sha256_root_depends_on_order_and_count():
    a, b = b"a" * 32, b"b" * 32
    assert len({merkle.sha256_root(case) for case in ([], [a], [b], [a, b], [b, a], [a, a], [a, a, a])}) == 7
