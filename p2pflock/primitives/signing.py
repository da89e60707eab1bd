"""What exactly is signed: domains, typed digests, and the words the contracts recompute.

Law: no two kinds of object, tasks, chains or contracts share a signing root, so a signature made for one is
worthless for another.  Off-chain objects use `compute_root` (sha256).  What a contract checks is keccak256
over abi.encode of static 32-byte words and must equal contracts/src; tests/vectors/signing.json pins both.
This module signs and verifies nothing: see bls.py and peerid.py.
"""

from __future__ import annotations

import enum
import hashlib

from p2pflock.errors import InvalidMessageError
from p2pflock.primitives import bls
from p2pflock.primitives.keccak import keccak256

VOTE_TYPE = (
    "Vote(uint256 chainId,address anchor,bytes32 task,uint64 epoch,uint64 round,uint64 view,uint8 step,"
    "bytes32 recordDigest,bytes32 rewardsRoot,bytes32 previousHead)"
)
HEAD_TYPE = "Head(bytes32 task,uint64 round,bytes32 recordDigest,bytes32 rewardsRoot,bytes32 previousHead)"
POSSESSION_TYPE = (
    "Possession(uint256 chainId,address registry,address operator,bytes32 peerIdHash,bytes32 keyHash)"
)
VOTE_TYPEHASH = keccak256(VOTE_TYPE.encode())
HEAD_TYPEHASH = keccak256(HEAD_TYPE.encode())
POSSESSION_TYPEHASH = keccak256(POSSESSION_TYPE.encode())


class Domain(str, enum.Enum):
    """What a root is the root of.  The value is part of the signed bytes: never change or reuse one."""

    PEER_RECORD = "peer-record"
    CONTRIBUTION = "contribution"
    SCORECARD = "scorecard"
    SCORE_SEED = "score-seed"
    PROPOSAL = "proposal"
    REQUEST = "request"
    RECEIPT = "receipt"
    EVIDENCE = "evidence"


def compute_root(domain: Domain, task: bytes, body: bytes) -> bytes:
    """32-byte signing root of an off-chain object.

    Args:
        domain: the kind of object.
        task: 32-byte task id, zeros where the object belongs to no task.
        body: the encoded object with its signature fields empty.
    """
    prefix = b"p2pflock/1/" + Domain(domain).value.encode("ascii") + b"\0"
    return hashlib.sha256(prefix + _bytes32(task) + hashlib.sha256(body).digest()).digest()


# --- abi.encode of static words -------------------------------------------------------------------------
def _bytes32(value: bytes) -> bytes:
    if len(value) != 32:
        raise InvalidMessageError(f"expected 32 bytes, got {len(value)}")
    return bytes(value)


def _address(value: bytes) -> bytes:
    if len(value) != 20:
        raise InvalidMessageError(f"expected a 20-byte address, got {len(value)} bytes")
    return bytes(12) + value


def _uint(value: int, bits: int) -> bytes:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << bits:
        raise InvalidMessageError(f"expected a uint{bits}")
    return int(value).to_bytes(32, "big")


# --- chain-facing digests -------------------------------------------------------------------------------
def compute_vote_digest(
    *,
    chain_id: int,
    anchor: bytes,
    task: bytes,
    epoch: int,
    round_: int,
    view: int,
    step: int,
    record_digest: bytes,
    rewards_root: bytes,
    previous_head: bytes,
) -> bytes:
    """32 bytes that a member's BLS vote signs; step 0 prevote, 1 precommit.

    `chain_id` and `anchor` keep a vote from being replayed on another chain or contract, `previous_head` on
    another history.  Raises InvalidMessageError for a value outside its Solidity type.
    """
    return keccak256(
        VOTE_TYPEHASH
        + _uint(chain_id, 256)
        + _address(anchor)
        + _bytes32(task)
        + _uint(epoch, 64)
        + _uint(round_, 64)
        + _uint(view, 64)
        + _uint(step, 8)
        + _bytes32(record_digest)
        + _bytes32(rewards_root)
        + _bytes32(previous_head)
    )


def compute_head(
    *, task: bytes, round_: int, record_digest: bytes, rewards_root: bytes, previous_head: bytes
) -> bytes:
    """The anchor's chained digest after `round_`; the head before round 1 is the task id itself."""
    return keccak256(
        HEAD_TYPEHASH
        + _bytes32(task)
        + _uint(round_, 64)
        + _bytes32(record_digest)
        + _bytes32(rewards_root)
        + _bytes32(previous_head)
    )


def compute_possession_root(
    *, chain_id: int, registry: bytes, operator: bytes, peer_id_hash: bytes, bls_public_key: bytes
) -> bytes:
    """What a BLS key signs (under the proof-of-possession DST) to be registered for an operator and a peer.

    Naming operator and peer keeps a seen proof from registering the key for somebody else.

    Args:
        chain_id: EIP-155 id of the chain the registry lives on.
        registry: 20-byte contract address.
        operator: 20-byte account that registers.
        peer_id_hash: keccak256 of the 38-byte peer id.
        bls_public_key: 48-byte compressed G1 point; hashed in its EIP-2537 form (128 bytes), which is how
            the contract sees it.

    Raises InvalidMessageError for an invalid key or a value outside its Solidity type.
    """
    return keccak256(
        POSSESSION_TYPEHASH
        + _uint(chain_id, 256)
        + _address(registry)
        + _address(operator)
        + _bytes32(peer_id_hash)
        + keccak256(bls.g1_to_eip2537(bls_public_key))
    )
