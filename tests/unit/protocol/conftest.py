"""Four members with real keys, and signed messages of round 1."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from eth_keys import keys

from p2pflock.primitives import bls, peerid
from p2pflock.primitives.cid import CID
from p2pflock.protocol import validation
from p2pflock.protocol.committee import (
    Committee,
    compute_beacon,
    compute_proposer,
    compute_seed_root,
    compute_shard,
    compute_vote_root,
)
from p2pflock.protocol.messages import (
    NIL,
    ContributionHeader,
    PeerRecord,
    Proposal,
    RoundRecord,
    Score,
    Scorecard,
    Seat,
    Vote,
)

TASK = bytes(range(32))


@dataclass(frozen=True)
class Keys:
    ed25519: Ed25519PrivateKey
    bls: bytes
    evm: keys.PrivateKey

    @classmethod
    def of(cls, number: int) -> Keys:
        seed = bytes([number + 1]) * 32
        return cls(Ed25519PrivateKey.from_private_bytes(seed), bls.keygen(seed), keys.PrivateKey(seed))

    @property
    def peer(self) -> bytes:
        raw = self.ed25519.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        return peerid.from_ed25519(raw)

    def seat(self, weight: int) -> Seat:
        address = self.evm.public_key.to_canonical_address()
        return Seat(self.peer, address, bls.secret_to_public(self.bls), weight)

    def sign_evm(self, digest: bytes) -> bytes:
        signature = self.evm.sign_msg_hash(digest)
        return signature.r.to_bytes(32, "big") + signature.s.to_bytes(32, "big") + bytes([27 + signature.v])


class Swarm:
    def __init__(self, weights: tuple[int, ...] = (10, 20, 30, 40), budget: int = 1000) -> None:
        self.keys = [Keys.of(i) for i in range(len(weights))]
        seats = tuple(k.seat(w) for k, w in zip(self.keys, weights, strict=True))
        self.committee = Committee(TASK, 1, 84532, b"a" * 20, seats, budget)
        self.genesis = RoundRecord(
            task=TASK, epoch=1, round=0, parent=None, parent_attestation=None, committee=self.committee.cid(),
            contributions=(), absent=(), scorecards=(), trust=(), model_hash=bytes(32),
            weights=CID.of_raw(b"w"), rewards=(), rewards_root=NIL,
        )
        self.beacon = compute_beacon(TASK, 1, 1, self.genesis.digest())
        self.facts = validation.facts_of(
            self.committee, self.genesis, TASK, self.beacon, max_steps=128, batch_size=32
        )

    def header(self, seat: int, **changes: object) -> ContributionHeader:
        n = len(self.keys)
        header = ContributionHeader(
            task=TASK, round=1, parent=self.genesis.cid(), peer=self.keys[seat].peer,
            payload=CID.of_raw(bytes([seat])), payload_bytes=100, shard=compute_shard(self.beacon, seat, n, n),
            steps=30, samples=960, loss_micro=1, leaf_root=bytes(32), optimizer_hash=bytes(32), signature=b"",
        )
        header = replace(header, **changes)
        return replace(header, signature=bls.sign(self.keys[seat].bls, header.signing_root()))

    def card(self, seat: int, cosines: dict[ContributionHeader, int | None], **changes: object) -> Scorecard:
        """None for an invalid payload."""
        root = compute_seed_root(TASK, 1, self.genesis.cid())
        scores = tuple(Score(h.cid(), c is not None, c or 0, 0) for h, c in cosines.items())
        card = Scorecard(
            task=TASK, round=1, parent=self.genesis.cid(), validator=self.keys[seat].peer,
            seed_proof=bls.sign(self.keys[seat].bls, root), scores=scores, signature=b"",
        )
        card = replace(card, **changes)
        return replace(card, signature=bls.sign(self.keys[seat].bls, card.signing_root()))

    def record(self, number: int = 0) -> RoundRecord:
        return replace(
            self.genesis, round=1, parent=self.genesis.cid(), model_hash=number.to_bytes(32, "big"),
            rewards_root=b"r" * 32,
        )

    def proposal(self, view: int = 0, seat: int | None = None, **changes: object) -> Proposal:
        seat = compute_proposer(self.committee, self.beacon, view) if seat is None else seat
        proposal = Proposal(TASK, 1, view, -1, self.keys[seat].peer, self.record().encode(), b"")
        proposal = replace(proposal, **changes)
        return replace(proposal, signature=bls.sign(self.keys[seat].bls, proposal.signing_root()))

    def vote(self, seat: int, view: int = 0, step: int = 1, **changes: object) -> Vote:
        record = self.record()
        vote = Vote(TASK, 1, view, step, record.digest(), record.rewards_root, self.keys[seat].peer, b"")
        vote = replace(vote, **changes)
        root = compute_vote_root(self.committee, vote, self.facts.previous_head)
        return replace(vote, signature=bls.sign(self.keys[seat].bls, root))

    def peer_record(self, seat: int, *, signer: int | None = None, **changes: object) -> PeerRecord:
        """`signer` makes the account and BLS signatures with another peer's keys."""
        own, other = self.keys[seat], self.keys[seat if signer is None else signer]
        seat_ = self.committee.seats[seat]
        record = PeerRecord(
            peer=own.peer, address=seat_.address, bls_public_key=seat_.bls_public_key, control_addresses=(),
            swarm_addresses=(), expires_unix_seconds=1300, bls_proof=b"", evm_signature=b"", peer_signature=b"",
        )
        record = replace(record, **changes)
        root = record.signing_root()
        return replace(
            record, bls_proof=bls.sign_possession(other.bls, root), evm_signature=other.sign_evm(root),
            peer_signature=own.ed25519.sign(root),
        )


@pytest.fixture(scope="session")
def swarm() -> Swarm:
    return Swarm()


@pytest.fixture(scope="session")
def swarm_of() -> type[Swarm]:
    return Swarm
