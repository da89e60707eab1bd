"""Merkle trees: rewards that a contract checks (keccak) and training leaf hashes that auditors check (sha256).

Law: the rewards tree equals @openzeppelin/merkle-tree's StandardMerkleTree over (bytes32, address, uint256) and
verifies with MerkleProof.sol: leaves are hashed twice (a 64-byte inner node can not pose as a leaf), sorted,
laid out as a complete binary tree, and pairs are hashed in sorted order, so a proof needs no positions.
The sha256 tree is that of RFC 6962, section 2.1: order matters, leaf and node are told apart by a byte.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence

from p2pflock.errors import InvalidMessageError
from p2pflock.primitives.keccak import keccak256

EMPTY_ROOT = bytes(32)
MAX_PROOF = 64


# --- rewards --------------------------------------------------------------------------------------------
def leaf_hash(task: bytes, address: bytes, cumulative_wei: int) -> bytes:
    """32 bytes: keccak256(keccak256(abi.encode(bytes32 task, address account, uint256 cumulative)))."""
    if len(task) != 32 or len(address) != 20 or not 0 <= cumulative_wei < 1 << 256:
        raise InvalidMessageError("expected a 32-byte task, a 20-byte address and a uint256")
    words = task + bytes(12) + address + cumulative_wei.to_bytes(32, "big")
    return keccak256(keccak256(words))


def _hash_pair(a: bytes, b: bytes) -> bytes:
    return keccak256(a + b if a < b else b + a)


def _tree(leaves: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
    """(sorted leaves, the 2n-1 nodes); node i has children 2i+1 and 2i+2, sorted leaf i is node 2n-2-i."""
    if any(len(leaf) != 32 for leaf in leaves):
        raise InvalidMessageError("a leaf is 32 bytes")
    ordered = sorted(leaves)
    nodes = [b""] * (len(ordered) - 1) + ordered[::-1]
    for i in range(len(ordered) - 2, -1, -1):
        nodes[i] = _hash_pair(nodes[2 * i + 1], nodes[2 * i + 2])
    return ordered, nodes


def root(leaves: Sequence[bytes]) -> bytes:
    """32-byte root over leaf hashes in any order; zeros for none."""
    return _tree(leaves)[1][0] if leaves else EMPTY_ROOT


def proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """Sibling hashes from leaves[index] (index in the order given) up to the root.  IndexError."""
    if not 0 <= index < len(leaves):
        raise IndexError("no such leaf")
    ordered, nodes = _tree(leaves)
    node = len(nodes) - 1 - bisect.bisect_left(ordered, leaves[index])
    path = []
    while node > 0:
        path.append(nodes[node + 1 if node % 2 else node - 1])
        node = (node - 1) // 2
    return path


def verify(root: bytes, leaf: bytes, proof: Sequence[bytes]) -> bool:
    """MerkleProof.verify of OpenZeppelin."""
    if len(leaf) != 32 or len(root) != 32 or len(proof) > MAX_PROOF or any(len(p) != 32 for p in proof):
        return False
    node = leaf
    for sibling in proof:
        node = _hash_pair(node, sibling)
    return node == root


# --- training leaves ------------------------------------------------------------------------------------
def sha256_root(leaves: Sequence[bytes]) -> bytes:
    """32-byte RFC 6962 tree hash of byte strings in this order; sha256 of nothing for none."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    # Equal to the recursive definition: merge neighbours level by level, carry a lone last node up.
    level = [hashlib.sha256(b"\0" + leaf).digest() for leaf in leaves]
    while len(level) > 1:
        pairs = zip(level[::2], level[1::2], strict=False)
        merged = [hashlib.sha256(b"\1" + a + b).digest() for a, b in pairs]
        level = merged + ([level[-1]] if len(level) % 2 else [])
    return level[0]
