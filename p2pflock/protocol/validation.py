"""Whether a decoded message may be acted upon and forwarded: one check, one line, one labelled reason.

Law: pure; the facts to check against are passed in as a small frozen context.  IGNORE means nobody is to blame
(late, duplicate, not yet known), REJECT means its author, and whoever forwarded it, broke a rule.  Cheap checks
come first, signatures last: a BLS verification costs two milliseconds, and a flood must not buy them.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from p2pflock.errors import InvalidMessageError
from p2pflock.primitives import bls, peerid
from p2pflock.primitives.cid import CID
from p2pflock.protocol.committee import (
    Committee,
    Panels,
    compute_cohort,
    compute_panels,
    compute_proposer,
    compute_seed_root,
    compute_vote_root,
)
from p2pflock.protocol.messages import (
    NIL,
    ContributionHeader,
    PeerRecord,
    Proposal,
    RoundRecord,
    Scorecard,
    Vote,
)

MAX_VIEWS_AHEAD = 1 << 16  # no run gets there; bounds what a proposer order may be computed for
MAX_RECORD_LIFETIME_SECONDS = 3600


class Decision(enum.Enum):
    ACCEPT = "accept"
    IGNORE = "ignore"
    REJECT = "reject"


@dataclass(frozen=True, slots=True)
class Ruling:
    decision: Decision
    reason: str

    @property
    def is_accepted(self) -> bool:
        return self.decision is Decision.ACCEPT


ACCEPTED = Ruling(Decision.ACCEPT, "")


def _ignore(reason: str) -> Ruling:
    return Ruling(Decision.IGNORE, reason)


def _reject(reason: str) -> Ruling:
    return Ruling(Decision.REJECT, reason)


@dataclass(frozen=True, slots=True)
class RoundFacts:
    """What messages of the current round are checked against."""

    committee: Committee
    round: int
    parent: CID  # record of the round before
    previous_head: bytes  # 32 bytes, chained digest after it
    beacon: bytes  # 32 bytes, of the round
    shards: Mapping[int, int]  # place in the roster -> shard, of everyone who may contribute
    max_steps: int  # local steps that the task allows
    batch_size: int  # samples of each
    panels: Panels  # who scores whom


def _rule_slot(facts: RoundFacts, task: bytes, round_: int, author: bytes) -> Ruling:
    """What every message of a round has in common."""
    if task != facts.committee.task:
        return _reject("another task")
    if round_ != facts.round:
        return _ignore("another round")
    if facts.committee.index_of(author) is None:
        return _reject("not a member")
    return ACCEPTED


def _rule_vote(facts: RoundFacts, task: bytes, round_: int, author: bytes) -> Ruling:
    """The same for what only seats may say."""
    if not (slot := _rule_slot(facts, task, round_, author)).is_accepted:
        return slot
    if facts.committee.seat_of(author) is None:
        return _reject("no seat in the committee")
    return ACCEPTED


def _holds(facts: RoundFacts, author: bytes, root: bytes, signature: bytes) -> bool:
    index = facts.committee.index_of(author)
    assert index is not None
    return bls.verify(facts.committee.at(index).bls_public_key, root, signature)


def validate_header(facts: RoundFacts, header: ContributionHeader) -> Ruling:
    if not (slot := _rule_slot(facts, header.task, header.round, header.peer)).is_accepted:
        return slot
    if header.parent != facts.parent:
        return _reject("trained from another checkpoint")
    index = facts.committee.index_of(header.peer)
    # Attack: strangers to the round who contribute to it, to be in more rounds than they were drawn for.
    if index is None or index not in facts.shards:
        return _reject("not in the cohort of the round")
    if header.shard != facts.shards[index]:
        return _reject("not the shard that was drawn for it")
    # Attack: fold weights and rewards follow the samples, so a peer claims more of them than it could have seen.
    if header.steps > facts.max_steps:
        return _reject("more steps than the task allows")
    if header.samples != header.steps * facts.batch_size:
        return _reject("samples that are not those of its steps")
    if not _holds(facts, header.peer, header.signing_root(), header.signature):
        return _reject("bad signature")
    return ACCEPTED


def validate_scorecard(facts: RoundFacts, card: Scorecard) -> Ruling:
    if not (slot := _rule_vote(facts, card.task, card.round, card.validator)).is_accepted:
        return slot
    if card.parent != facts.parent:
        return _reject("scored at another checkpoint")
    seat = facts.committee.seat_of(card.validator)
    # Whose contributions they are shows when all headers are there: settlement refuses a card then.
    if seat is None or len(card.scores) > facts.panels.count(seat):
        return _reject("more scores than were drawn for it")
    if len({score.contribution for score in card.scores}) != len(card.scores):
        return _reject("scores a contribution twice")
    if not _holds(facts, card.validator, card.signing_root(), card.signature):
        return _reject("bad signature")
    # Attack: a validator that chooses its public batch; a BLS signature leaves it no choice.
    seed_root = compute_seed_root(card.task, card.round, card.parent)
    if not _holds(facts, card.validator, seed_root, card.seed_proof):
        return _reject("bad seed proof")
    return ACCEPTED


def validate_proposal(facts: RoundFacts, proposal: Proposal) -> Ruling:
    if not (slot := _rule_vote(facts, proposal.task, proposal.round, proposal.proposer)).is_accepted:
        return slot
    if proposal.view > MAX_VIEWS_AHEAD:
        return _reject("a view that no run reaches")
    if proposal.valid_view >= proposal.view:
        return _reject("a quorum from the future")
    if not _holds(facts, proposal.proposer, proposal.signing_root(), proposal.signature):
        return _reject("bad signature")
    # Dearer than a signature in a large committee, so only members can make us do it.
    turn = compute_proposer(facts.committee, facts.beacon, proposal.view)
    if turn != facts.committee.seat_of(proposal.proposer):
        return _reject("not its turn to propose")
    try:
        record = RoundRecord.decode(proposal.record)
    except InvalidMessageError:
        return _reject("not a record")
    if (record.task, record.round, record.parent) != (proposal.task, facts.round, facts.parent):
        return _reject("a record of another round")
    return ACCEPTED


def validate_vote(facts: RoundFacts, vote: Vote) -> Ruling:
    if not (slot := _rule_vote(facts, vote.task, vote.round, vote.validator)).is_accepted:
        return slot
    if vote.view > MAX_VIEWS_AHEAD:
        return _reject("a view that no run reaches")
    if vote.record_digest == NIL and vote.rewards_root != NIL:
        return _reject("a nil vote with rewards")
    root = compute_vote_root(facts.committee, vote, facts.previous_head)
    if not _holds(facts, vote.validator, root, vote.signature):
        return _reject("bad signature")
    return ACCEPTED


def validate_peer_record(record: PeerRecord, claimed: bytes, now_unix_seconds: int) -> Ruling:
    """All three keys must have signed the same record, or one key's owner could claim another's."""
    if record.peer != claimed:
        return _reject("published under another peer id")
    if record.expires_unix_seconds <= now_unix_seconds:
        return _ignore("expired")
    if record.expires_unix_seconds > now_unix_seconds + MAX_RECORD_LIFETIME_SECONDS:
        return _reject("lives too long")
    root = record.signing_root()
    if not peerid.verify_ed25519(record.peer, root, record.peer_signature):
        return _reject("bad peer signature")
    try:
        if peerid.recover_address(root, record.evm_signature) != record.address:
            return _reject("bad account signature")
    except InvalidMessageError:
        return _reject("bad account signature")
    if not bls.verify_possession(record.bls_public_key, root, record.bls_proof):
        return _reject("bad proof of possession")
    return ACCEPTED


def require(ruling: Ruling) -> None:
    """Raises InvalidMessageError unless accepted."""
    if not ruling.is_accepted:
        raise InvalidMessageError(ruling.reason)


def facts_of(
    committee: Committee,
    parent: RoundRecord,
    previous_head: bytes,
    beacon: bytes,
    *,
    max_steps: int,
    batch_size: int,
) -> RoundFacts:
    cohort = compute_cohort(committee, beacon)
    return RoundFacts(
        committee,
        parent.round + 1,
        parent.cid(),
        previous_head,
        beacon,
        cohort.compute_shards(beacon),
        max_steps,
        batch_size,
        compute_panels(committee, cohort, beacon),
    )
