"""One test a label: what is refused, and why; the untouched message passes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from p2pflock.errors import InvalidMessageError
from p2pflock.primitives.cid import CID
from p2pflock.protocol import validation
from p2pflock.protocol.committee import compute_proposer
from p2pflock.protocol.messages import NIL
from p2pflock.protocol.validation import ACCEPTED, Decision

OTHER = b"x" * 32
STRANGER = bytes.fromhex("002408011220") + b"\x07" * 32


def refused(ruling: validation.Ruling, reason: str, decision: Decision = Decision.REJECT) -> None:
    assert (ruling.decision, ruling.reason) == (decision, reason)
    with pytest.raises(InvalidMessageError, match=reason):
        validation.require(ruling)


def test_honest_messages_are_accepted(swarm) -> None:
    facts, header = swarm.facts, swarm.header(0)
    assert validation.validate_header(facts, header) == ACCEPTED
    assert validation.validate_scorecard(facts, swarm.card(1, {header: 5})) == ACCEPTED
    assert validation.validate_proposal(facts, swarm.proposal(view=3, valid_view=2)) == ACCEPTED
    assert validation.validate_vote(facts, swarm.vote(2)) == ACCEPTED
    nil = swarm.vote(2, step=0, record_digest=NIL, rewards_root=NIL)
    assert validation.validate_vote(facts, nil) == ACCEPTED
    assert validation.validate_peer_record(swarm.peer_record(0), swarm.keys[0].peer, 1000) == ACCEPTED


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"task": OTHER}, "another task"),
        ({"peer": STRANGER}, "not a member"),
        ({"parent": CID.of_dag_cbor(b"")}, "trained from another checkpoint"),
        ({"shard": 99}, "not the shard that was drawn for it"),
        ({"steps": 129, "samples": 129 * 32}, "more steps than the task allows"),
        ({"samples": 961}, "samples that are not those of its steps"),
        ({"steps": 1}, "samples that are not those of its steps"),
    ],
)
def test_header(swarm, changes, reason) -> None:
    refused(validation.validate_header(swarm.facts, swarm.header(0, **changes)), reason)


@pytest.mark.parametrize("round_", [0, 2])
def test_other_rounds_are_nobodys_fault(swarm, round_) -> None:
    late = swarm.header(0, round=round_)
    refused(validation.validate_header(swarm.facts, late), "another round", Decision.IGNORE)
    late = swarm.vote(0, round=round_)
    refused(validation.validate_vote(swarm.facts, late), "another round", Decision.IGNORE)


def test_signatures_cover_every_field_and_name_their_author(swarm) -> None:
    facts, header = swarm.facts, swarm.header(0)
    refused(validation.validate_header(facts, replace(header, steps=31, samples=992)), "bad signature")
    refused(validation.validate_header(facts, replace(header, signature=b"")), "bad signature")
    card = swarm.card(1, {header: 5})
    refused(validation.validate_scorecard(facts, replace(card, scores=())), "bad signature")
    vote = swarm.vote(1)
    for forged in (
        replace(vote, view=1),
        replace(vote, step=0),
        replace(vote, record_digest=OTHER),
        replace(vote, rewards_root=OTHER),
        replace(vote, validator=swarm.keys[2].peer),
    ):
        refused(validation.validate_vote(facts, forged), "bad signature")
    foreign = replace(facts, previous_head=OTHER)  # a vote on another history
    refused(validation.validate_vote(foreign, vote), "bad signature")
    proposal = swarm.proposal()
    refused(validation.validate_proposal(facts, replace(proposal, view=4)), "bad signature")


def test_scorecard(swarm) -> None:
    header = swarm.header(0)
    card = swarm.card(1, {header: 5}, parent=CID.of_dag_cbor(b""))
    refused(validation.validate_scorecard(swarm.facts, card), "scored at another checkpoint")
    twice = swarm.card(1, {}, scores=swarm.card(1, {header: 5}).scores * 2)
    refused(validation.validate_scorecard(swarm.facts, twice), "scores a contribution twice")
    chosen = swarm.card(1, {header: 5}, seed_proof=swarm.card(2, {}).seed_proof)
    refused(validation.validate_scorecard(swarm.facts, chosen), "bad seed proof")


def test_proposal(swarm) -> None:
    facts = swarm.facts
    wrong = (compute_proposer(swarm.committee, swarm.beacon, 0) + 1) % 4
    refused(validation.validate_proposal(facts, swarm.proposal(seat=wrong)), "not its turn to propose")
    future = swarm.proposal(view=2, valid_view=2)
    refused(validation.validate_proposal(facts, future), "a quorum from the future")
    far = swarm.proposal(view=validation.MAX_VIEWS_AHEAD + 1, seat=0)
    refused(validation.validate_proposal(facts, far), "a view that no run reaches")
    refused(validation.validate_proposal(facts, swarm.proposal(record=b"\xa0")), "not a record")
    stale = swarm.proposal(record=swarm.genesis.encode())
    refused(validation.validate_proposal(facts, stale), "a record of another round")


def test_vote(swarm) -> None:
    facts = swarm.facts
    far = swarm.vote(0, view=validation.MAX_VIEWS_AHEAD + 1)
    refused(validation.validate_vote(facts, far), "a view that no run reaches")
    # Attack: a nil quorum that carries a rewards root of the attacker's choice.
    refused(validation.validate_vote(facts, swarm.vote(0, record_digest=NIL)), "a nil vote with rewards")


def test_peer_record(swarm) -> None:
    peer = swarm.keys[0].peer

    def rule(record, now=1000, claimed=peer):
        return validation.validate_peer_record(record, claimed, now)

    refused(rule(swarm.peer_record(0), claimed=STRANGER), "published under another peer id")
    refused(rule(swarm.peer_record(0), now=1300), "expired", Decision.IGNORE)
    refused(rule(swarm.peer_record(0, expires_unix_seconds=10**9)), "lives too long")
    refused(rule(replace(swarm.peer_record(0), expires_unix_seconds=1301)), "bad peer signature")
    # Attacks: claim an operator's account, or a member's BLS key, without holding it.
    refused(rule(swarm.peer_record(0, signer=1)), "bad account signature")
    refused(rule(replace(swarm.peer_record(0), evm_signature=b"")), "bad account signature")
    stolen = swarm.peer_record(0, bls_public_key=swarm.committee.seats[1].bls_public_key)
    refused(rule(stolen), "bad proof of possession")
    proof = swarm.peer_record(1).bls_proof
    refused(rule(replace(swarm.peer_record(0), bls_proof=proof)), "bad proof of possession")
