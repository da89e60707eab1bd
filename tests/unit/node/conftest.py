"""Four members with real keys, and what they sign in round 1."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from p2pflock.primitives import unixfs
from p2pflock.primitives.cid import CID
from p2pflock.protocol.attestation import build_attestation
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
    Contribution,
    ContributionHeader,
    Proposal,
    RoundRecord,
    Score,
    Scorecard,
    Seat,
    Vote,
)
from p2pflock.storage.keystore import Identity
from p2pflock.testing.tiny_task import build_spec
from p2pflock.testing.trainer import FakeTrainer


class Members:
    """Seats 0..3 of equal weight, and one stranger."""

    def __init__(self) -> None:
        draw = random.Random(4)
        self.spec = build_spec(rounds=5)
        self.task = self.spec.task_id
        self.signers = [Identity.generate(draw.randbytes) for _ in range(5)]
        self.stranger = self.signers.pop()
        seats = tuple(Seat(s.peer_id, s.address, s.bls_public_key, 100) for s in self.signers)
        self.committee = Committee(self.task, 0, 0, bytes(20), seats, 1000)
        trainer = FakeTrainer(self.spec)._learner.open()
        self.genesis = RoundRecord(
            task=self.task, epoch=0, round=0, parent=None, parent_attestation=None, committee=self.committee.cid(),
            contributions=(), absent=(), scorecards=(), trust=(), model_hash=trainer.model_hash,
            weights=trainer.weights, rewards=(), rewards_root=NIL,
        )
        self.beacon = self.beacon_after(self.genesis)

    def beacon_after(self, parent):
        return compute_beacon(self.task, 0, parent.round + 1, parent.digest())

    def header(self, seat, *, parent=None, payload=b"payload", signer=None, **changes):
        parent = parent or self.genesis
        header = ContributionHeader(
            task=self.task, round=parent.round + 1, parent=parent.cid(), peer=self.signers[seat].peer_id,
            payload=unixfs.compute_cid(payload + bytes([seat])), payload_bytes=len(payload) + 1,
            shard=compute_shard(self.beacon_after(parent), seat, 4, 4), steps=5, samples=40, loss_micro=1,
            leaf_root=NIL, optimizer_hash=NIL, signature=b"",
        )
        header = replace(header, **changes)
        signer = signer or self.signers[seat]
        return replace(header, signature=signer.sign_bls(header.signing_root()))

    def card(self, seat, headers=(), *, parent=None, **changes):
        parent = parent or self.genesis
        signer = self.signers[seat]
        card = Scorecard(
            task=self.task, round=parent.round + 1, parent=parent.cid(), validator=signer.peer_id,
            seed_proof=signer.sign_bls(compute_seed_root(self.task, parent.round + 1, parent.cid())),
            scores=tuple(Score(h.cid(), True, 1000, 0) for h in headers), signature=b"",
        )
        card = replace(card, **changes)
        return replace(card, signature=signer.sign_bls(card.signing_root()))

    def record(self, parent=None, **changes):
        """A record of the next round; not a true one unless made so."""
        parent = parent or self.genesis
        headers = [self.header(seat, parent=parent) for seat in range(4)]
        record = replace(
            parent, round=parent.round + 1, parent=parent.cid(),
            contributions=tuple(Contribution(s, h.cid(), 0, 40) for s, h in enumerate(headers)),
        )
        return replace(record, **changes)

    def proposal(self, view=0, *, record=None, **changes):
        signer = self.signers[compute_proposer(self.committee, self.beacon, view)]
        record = record or self.record()
        bare = Proposal(self.task, record.round, view, -1, signer.peer_id, record.encode(), b"")
        bare = replace(bare, **changes)
        return replace(bare, signature=signer.sign_bls(bare.signing_root()))

    def vote(self, seat, record, *, view=0, step=1, head=None, **changes):
        vote = Vote(
            self.task, record.round, view, step, record.digest(), record.rewards_root,
            self.signers[seat].peer_id, b"",
        )
        vote = replace(vote, **changes)
        root = compute_vote_root(self.committee, vote, self.task if head is None else head)
        return replace(vote, signature=self.signers[seat].sign_bls(root))

    def attestation(self, record, head, *, seats=(0, 1, 3), view=0):
        votes = [self.vote(seat, record, view=view, head=head) for seat in seats]
        return build_attestation(self.committee, CID.of_dag_cbor(record.encode()), view, votes)


@pytest.fixture(scope="session")
def members():
    return Members()
