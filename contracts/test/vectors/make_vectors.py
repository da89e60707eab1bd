"""Writes chain.json: digests and BLS points as p2pflock.primitives computes them, for forge to compare.

Run from the repository root: python contracts/test/vectors/make_vectors.py [--check]
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from p2pflock.primitives import bls, merkle, signing
from p2pflock.primitives.keccak import keccak256

TARGET = Path(__file__).with_name("chain.json")
CHAIN_ID = 84532


def digest(label: str) -> bytes:
    return hashlib.sha256(label.encode()).digest()


def build() -> dict[str, object]:
    anchor, registry = digest("anchor")[:20], digest("registry")[:20]
    operators = [digest(f"operator {i}")[:20] for i in range(4)]
    peer_ids = [bytes.fromhex("002408011220") + digest(f"peer {i}") for i in range(4)]
    secrets = [bls.keygen(digest(f"secret {i}")) for i in range(4)]
    keys = [bls.secret_to_public(secret) for secret in secrets]
    roots = [
        signing.compute_possession_root(
            chain_id=CHAIN_ID,
            registry=registry,
            operator=operator,
            peer_id_hash=keccak256(peer_id),
            bls_public_key=key,
        )
        for operator, peer_id, key in zip(operators, peer_ids, keys, strict=True)
    ]
    proofs = [bls.sign_possession(secret, root) for secret, root in zip(secrets, roots, strict=True)]

    task, record = digest("task"), digest("record")
    leaves = [merkle.leaf_hash(task, operator, 10**18 * (i + 1)) for i, operator in enumerate(operators)]
    rewards_root = merkle.root(leaves)
    vote = signing.compute_vote_digest(
        chain_id=CHAIN_ID,
        anchor=anchor,
        task=task,
        epoch=0,
        round_=1,
        view=2,
        step=1,
        record_digest=record,
        rewards_root=rewards_root,
        previous_head=task,
    )
    signers = [0, 1, 3]
    aggregate = bls.aggregate([bls.sign(secrets[i], vote) for i in signers])
    head = signing.compute_head(
        task=task, round_=1, record_digest=record, rewards_root=rewards_root, previous_head=task
    )
    return {
        "chainId": CHAIN_ID,
        "anchor": "0x" + anchor.hex(),
        "registry": "0x" + registry.hex(),
        "operators": ["0x" + operator.hex() for operator in operators],
        "peerIds": ["0x" + peer_id.hex() for peer_id in peer_ids],
        "keys": ["0x" + bls.g1_to_eip2537(key).hex() for key in keys],
        "possessionRoots": ["0x" + root.hex() for root in roots],
        "proofs": ["0x" + bls.g2_to_eip2537(proof).hex() for proof in proofs],
        "task": "0x" + task.hex(),
        "round": 1,
        "view": 2,
        "recordDigest": "0x" + record.hex(),
        "rewardsRoot": "0x" + rewards_root.hex(),
        "vote": "0x" + vote.hex(),
        "head": "0x" + head.hex(),
        "signers": sum(1 << i for i in signers),
        "signature": "0x" + bls.g2_to_eip2537(aggregate).hex(),
        "leafIndex": 2,
        "leafAmount": str(3 * 10**18),
        "leafProof": ["0x" + node.hex() for node in merkle.proof(leaves, 2)],
    }


if __name__ == "__main__":
    text = json.dumps(build(), indent=2) + "\n"
    if "--check" in sys.argv:
        sys.exit(0 if TARGET.read_text() == text else "chain.json differs: run make_vectors.py")
    TARGET.write_text(text)
