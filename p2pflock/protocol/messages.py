"""Every object that peers sign, gossip, store or attest, as frozen values with one encoding.

Law: this file decides shape and bounds only.  Whether a message may be acted upon is decided in
validation.py, what a round does with it in rounds.py.  Signing roots are in signing.py of primitives; an
object's signature covers its encoding with the signature field empty, under a domain and the task.

Glossary: docs/glossary.md.  Units: `_wei` integers of 1e-18 FLOCK, `_micro` millionths.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import ClassVar

from p2pflock.primitives import schema, signing
from p2pflock.primitives.cid import CID

MAX_MEMBERS = 218  # seats that fit one on-chain snapshot: 1 + 144 + 112 n <= 24,576 bytes of code
MAX_TRAINERS = 4096  # registered beside the seats: a committee block stays below 1 MiB
MAX_ROSTER = MAX_MEMBERS + MAX_TRAINERS
MAX_COHORT = 512  # contributors of one round: their scorecards stay below 64 KiB
DEFAULT_COHORT = 64
MAX_PAYLOAD_BYTES = 64 << 20
MICRO = 1_000_000
MAX_MEMORY_MICRO = 64 * MICRO  # above what the gate's decaying sums can reach


class Absence(enum.IntEnum):
    """Why a seat is missing from a record, as its proposer saw it."""

    SILENT = 0  # no header arrived before the grace window closed
    UNDELIVERED = 1  # header arrived, payload did not
    INVALID = 2  # payload arrived and does not decode
    EQUIVOCATED = 3  # two different headers for one slot


class Judgement(enum.IntEnum):
    """What settlement decided about one contribution."""

    ACCEPTED = 0
    INVALID = 1  # a quorum of scorecards says it does not decode
    GATED = 2  # trust below the gate


class Step(enum.IntEnum):
    PREVOTE = 0
    PRECOMMIT = 1


NIL = bytes(32)  # the vote for no record


@dataclass(frozen=True, slots=True)
class PeerRecord(schema.Record):
    """Binds one peer's three keys and says where it listens.  Each key signs the same root."""

    KIND: ClassVar[str] = "p2pflock/peer/1"
    MAX_BYTES: ClassVar[int] = 4096

    peer: bytes = schema.fixed_bytes(38)
    address: bytes = schema.fixed_bytes(20)
    bls_public_key: bytes = schema.fixed_bytes(48)
    control_addresses: tuple[str, ...] = schema.sequence(schema.text(256), 8)  # libp2p
    swarm_addresses: tuple[str, ...] = schema.sequence(schema.text(256), 8)  # hivemind
    expires_unix_seconds: int = schema.uint()
    bls_proof: bytes = schema.blob(96)  # under the proof-of-possession DST
    evm_signature: bytes = schema.blob(65)
    peer_signature: bytes = schema.blob(64)  # Ed25519

    def signing_root(self) -> bytes:
        bare = replace(self, bls_proof=b"", evm_signature=b"", peer_signature=b"")
        return signing.compute_root(signing.Domain.PEER_RECORD, bytes(32), bare.encode())


@dataclass(frozen=True, slots=True)
class ContributionHeader(schema.Record):
    """One trainer's signed claim: from `parent` I made `steps` steps on `shard`, and this is the result."""

    KIND: ClassVar[str] = "p2pflock/contribution/1"
    MAX_BYTES: ClassVar[int] = 2048

    task: bytes = schema.fixed_bytes(32)
    round: int = schema.uint(32)
    parent: CID = schema.link()  # record whose checkpoint was trained on
    peer: bytes = schema.fixed_bytes(38)
    payload: CID = schema.link()  # UnixFS CID of the payload bytes
    payload_bytes: int = schema.integer(1, MAX_PAYLOAD_BYTES)
    shard: int = schema.uint(32)
    steps: int = schema.integer(1, 1 << 20)
    samples: int = schema.integer(1, 1 << 40)
    loss_micro: int = schema.integer(-(1 << 53), 1 << 53)
    leaf_root: bytes = schema.fixed_bytes(32)
    optimizer_hash: bytes = schema.fixed_bytes(32)
    signature: bytes = schema.blob(96)  # BLS

    def signing_root(self) -> bytes:
        bare = replace(self, signature=b"")
        return signing.compute_root(signing.Domain.CONTRIBUTION, self.task, bare.encode())


@dataclass(frozen=True, slots=True)
class Score(schema.Record):
    """One line of a scorecard."""

    contribution: CID = schema.link()
    is_valid: bool = schema.boolean()
    cosine_micro: int = schema.integer(-MICRO, MICRO)
    loss_delta_micro: int = schema.integer(-(1 << 53), 1 << 53)


@dataclass(frozen=True, slots=True)
class Scorecard(schema.Record):
    """A validator's signed scores.  `seed_proof` is its BLS signature over the round: unique, so it can
    neither be ground nor foreseen by the scored, and it seeds the public batch (compute_score_seed)."""

    KIND: ClassVar[str] = "p2pflock/scorecard/1"
    MAX_BYTES: ClassVar[int] = 64 << 10

    task: bytes = schema.fixed_bytes(32)
    round: int = schema.uint(32)
    parent: CID = schema.link()
    validator: bytes = schema.fixed_bytes(38)
    seed_proof: bytes = schema.fixed_bytes(96)
    scores: tuple[Score, ...] = schema.sequence(schema.nested(Score), MAX_COHORT)
    signature: bytes = schema.blob(96)  # BLS

    def signing_root(self) -> bytes:
        bare = replace(self, signature=b"")
        return signing.compute_root(signing.Domain.SCORECARD, self.task, bare.encode())


@dataclass(frozen=True, slots=True)
class Attestation(schema.Record):
    """A quorum of precommits for one record, aggregated."""

    KIND: ClassVar[str] = "p2pflock/attestation/1"
    MAX_BYTES: ClassVar[int] = 1024

    record: CID = schema.link()
    view: int = schema.uint(32)
    signers: bytes = schema.blob(28)  # bitmap, little endian, bit i = seat i, no trailing zero byte
    signature: bytes = schema.fixed_bytes(96)

    def seats(self) -> frozenset[int]:
        bits = int.from_bytes(self.signers, "little")
        return frozenset(i for i in range(bits.bit_length()) if bits >> i & 1)

    @staticmethod
    def bitmap(seats: frozenset[int]) -> bytes:
        bits = sum(1 << seat for seat in seats)
        return bits.to_bytes((bits.bit_length() + 7) // 8, "little")


@dataclass(frozen=True, slots=True)
class Absentee(schema.Record):
    seat: int = schema.integer(0, MAX_ROSTER - 1)
    reason: int = schema.integer(0, max(Absence))


@dataclass(frozen=True, slots=True)
class Contribution(schema.Record):
    """One line of a record: whose header, and what settlement made of it."""

    seat: int = schema.integer(0, MAX_ROSTER - 1)  # in the committee's roster: a seat, or behind them a trainer
    header: CID = schema.link()
    judgement: int = schema.integer(0, max(Judgement))
    weight: int = schema.uint(48)  # in the fold; 0 unless accepted


@dataclass(frozen=True, slots=True)
class Trust(schema.Record):
    """What the gate remembers of one peer, carried from round to round (gate.py)."""

    peer: bytes = schema.fixed_bytes(38)
    earned_micro: int = schema.integer(-MAX_MEMORY_MICRO, MAX_MEMORY_MICRO)  # decaying sum of its scores
    usual_micro: int = schema.integer(0, MAX_MEMORY_MICRO)  # and of what was usual in the same rounds
    recent_micro: int = schema.integer(-MICRO, MICRO)  # running mean of the last few, in usual scores / 3


@dataclass(frozen=True, slots=True)
class Reward(schema.Record):
    """Everything an account has earned in this task so far."""

    address: bytes = schema.fixed_bytes(20)
    cumulative_wei: int = schema.amount()


@dataclass(frozen=True, slots=True)
class RoundRecord(schema.Record):
    """What is attested: who did what in a round, and the model and rewards that follow from it.

    Everything below `scorecards` is a pure function of what stands above it and of the records before, so
    every member recomputes it before it votes, and anyone can later.

    `trust` and `rewards` hold the entries that this round changed, with their new values: the tables are what the
    records since genesis say last of each peer and account (settlement.Tables).  So a record grows with those
    who took part in its round, not with all who ever did.  `rewards_root` is that of the whole table.
    """

    KIND: ClassVar[str] = "p2pflock/record/1"
    MAX_BYTES: ClassVar[int] = 256 << 10

    task: bytes = schema.fixed_bytes(32)
    epoch: int = schema.uint(32)
    round: int = schema.uint(32)  # 0 is genesis
    parent: CID | None = schema.optional(schema.link())
    parent_attestation: Attestation | None = schema.optional(schema.nested(Attestation))
    committee: CID = schema.link()
    contributions: tuple[Contribution, ...] = schema.sequence(schema.nested(Contribution), MAX_COHORT)
    absent: tuple[Absentee, ...] = schema.sequence(schema.nested(Absentee), MAX_COHORT)
    scorecards: tuple[CID, ...] = schema.sequence(schema.link(), MAX_MEMBERS)  # by seat
    trust: tuple[Trust, ...] = schema.sequence(schema.nested(Trust), MAX_COHORT)  # by peer id
    model_hash: bytes = schema.fixed_bytes(32)
    weights: CID = schema.link()
    rewards: tuple[Reward, ...] = schema.sequence(
        schema.nested(Reward), MAX_COHORT + MAX_MEMBERS
    )  # by address
    rewards_root: bytes = schema.fixed_bytes(32)

    def digest(self) -> bytes:
        """32 bytes: the record's content id without its prefix; what votes and the chain name it by."""
        return self.cid().digest


@dataclass(frozen=True, slots=True)
class Seat(schema.Record):
    peer: bytes = schema.fixed_bytes(38)
    address: bytes = schema.fixed_bytes(20)
    bls_public_key: bytes = schema.fixed_bytes(48)
    weight_wei: int = schema.amount()


@dataclass(frozen=True, slots=True)
class Trainer(schema.Record):
    """A registered peer without a seat: it contributes when it is drawn, and has no vote."""

    peer: bytes = schema.fixed_bytes(38)
    address: bytes = schema.fixed_bytes(20)
    bls_public_key: bytes = schema.fixed_bytes(48)


@dataclass(frozen=True, slots=True)
class CommitteeBlock(schema.Record):
    """The stake-weighted seats of one epoch, in snapshot order, and the trainers beside them, as a block that
    lineage can cite."""

    KIND: ClassVar[str] = "p2pflock/committee/1"
    MAX_BYTES: ClassVar[int] = 1 << 20

    task: bytes = schema.fixed_bytes(32)
    epoch: int = schema.uint(32)
    chain_id: int = schema.uint(63)  # 0: no chain, a static committee
    anchor: bytes = schema.fixed_bytes(20)  # anchor contract, zero without a chain
    round_budget_wei: int = schema.amount()  # reward of one round: the task's escrow over its rounds
    seats: tuple[Seat, ...] = schema.sequence(schema.nested(Seat), MAX_MEMBERS)
    trainers: tuple[Trainer, ...] = schema.sequence(schema.nested(Trainer), MAX_TRAINERS)
    cohort: int = schema.integer(1, MAX_COHORT)  # contributors of one round, drawn when there are more


@dataclass(frozen=True, slots=True)
class Proposal(schema.Record):
    """A proposer's record for a view; `valid_view` is the view it was first seen to gain a prevote quorum
    in, or -1 (Tendermint's validRound)."""

    KIND: ClassVar[str] = "p2pflock/proposal/1"
    MAX_BYTES: ClassVar[int] = 300 << 10

    task: bytes = schema.fixed_bytes(32)
    round: int = schema.uint(32)
    view: int = schema.uint(32)
    valid_view: int = schema.integer(-1, (1 << 32) - 1)
    proposer: bytes = schema.fixed_bytes(38)
    record: bytes = schema.blob(256 << 10, 1)  # an encoded RoundRecord
    signature: bytes = schema.blob(96)  # BLS

    def signing_root(self) -> bytes:
        bare = replace(self, signature=b"")
        return signing.compute_root(signing.Domain.PROPOSAL, self.task, bare.encode())


@dataclass(frozen=True, slots=True)
class Vote(schema.Record):
    """A prevote or precommit.  The signature covers signing.compute_vote_digest, which the anchor contract
    recomputes; two different votes of one member for one (round, view, step) are slashable evidence."""

    KIND: ClassVar[str] = "p2pflock/vote/1"
    MAX_BYTES: ClassVar[int] = 512

    task: bytes = schema.fixed_bytes(32)
    round: int = schema.uint(32)
    view: int = schema.uint(32)
    step: int = schema.integer(0, max(Step))
    record_digest: bytes = schema.fixed_bytes(32)  # NIL for none
    rewards_root: bytes = schema.fixed_bytes(32)  # zero with NIL
    validator: bytes = schema.fixed_bytes(38)
    signature: bytes = schema.blob(96)  # BLS


@dataclass(frozen=True, slots=True)
class Manifest(schema.Record):
    """Names a checkpoint: its CID is the checkpoint CID.  A function of the record alone, so every honest
    peer publishes the same one; the record's attestation travels beside it."""

    KIND: ClassVar[str] = "p2pflock/checkpoint/1"
    MAX_BYTES: ClassVar[int] = 1024

    task: bytes = schema.fixed_bytes(32)
    spec: CID = schema.link()
    round: int = schema.uint(32)
    record: CID = schema.link()
    weights: CID = schema.link()
    model_hash: bytes = schema.fixed_bytes(32)
