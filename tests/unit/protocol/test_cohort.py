"""Who contributes in a round: drawn by the beacon, alike for everybody, evenly over time."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace

import pytest

from p2pflock.errors import InvalidMessageError
from p2pflock.primitives import bls
from p2pflock.primitives.cid import CID
from p2pflock.protocol import settlement, validation
from p2pflock.protocol.collection import Collection, Pacing, Waiting
from p2pflock.protocol.committee import Committee, compute_beacon, compute_cohort
from p2pflock.protocol.messages import (
    MAX_COHORT,
    MAX_MEMBERS,
    MAX_TRAINERS,
    Absence,
    Absentee,
    CommitteeBlock,
    Seat,
    Trainer,
)
from p2pflock.protocol.settlement import Tables
from p2pflock.protocol.validation import Decision


def beacon(number):
    return hashlib.sha256(b"beacon %d" % number).digest()


def make(seats, trainers, cohort, weight=10):
    """Keys are no curve points: nothing here looks at them."""
    names = [hashlib.sha512(b"%d" % n).digest() for n in range(seats + trainers)]
    rest = [Trainer(n[:38], n[:20], n[:48]) for n in names[seats:]]
    return Committee(
        b"t" * 32, 0, 0, bytes(20), tuple(Seat(n[:38], n[:20], n[:48], weight) for n in names[:seats]), 1000,
        tuple(rest), cohort,
    )


# --- the draw ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("seats", "trainers", "cohort"), [(4, 0, 4), (4, 0, 64), (4, 3, 7), (1, 0, 1)])
def test_everybody_contributes_where_there_are_no_more_than_a_cohort(seats, trainers, cohort):
    drawn = compute_cohort(make(seats, trainers, cohort), beacon(1))
    assert drawn.members == tuple(range(seats + trainers))
    assert drawn.is_drawn == bool(trainers)


def test_the_draw_is_a_function_of_the_beacon_and_without_replacement():
    committee = make(64, 936, 64)
    rounds = [compute_cohort(committee, beacon(n)).members for n in range(30)]
    assert rounds == [compute_cohort(make(64, 936, 64), beacon(n)).members for n in range(30)]
    assert len(set(rounds)) == 30
    for members in rounds:
        assert len(set(members)) == 64
        assert list(members) == sorted(members)
        assert 0 <= members[0]
        assert members[-1] < 1000


def test_everybody_is_drawn_equally_often_whatever_its_stake():
    """12 places, 5 a round: each in 5/12 of 2,400 rounds, give or take 4.5 standard deviations (24 each)."""
    committee = make(4, 8, 5, weight=10**24)
    counts = Counter(place for n in range(2400) for place in compute_cohort(committee, beacon(n)).members)
    assert sorted(counts) == list(range(12))
    assert all(abs(count - 1000) < 110 for count in counts.values())


def test_shards_are_shared_out_among_the_cohort():
    cohort = compute_cohort(make(64, 936, 64), beacon(3))
    shards = cohort.compute_shards(beacon(3))
    assert tuple(shards) == cohort.members
    assert sorted(shards.values()) == list(range(64))
    assert shards != cohort.compute_shards(beacon(4))


# --- the roster -------------------------------------------------------------------------------------------
def test_trainers_are_named_and_weigh_nothing():
    committee = make(4, 8, 5)
    peer = committee.trainers[2].peer
    assert committee.roster_size == 12
    assert (committee.index_of(peer), committee.seat_of(peer)) == (6, None)
    assert committee.seat_of_key(committee.trainers[2].bls_public_key) is None
    assert committee.at(6) == committee.trainers[2]
    assert committee.weight_of(range(12)) == committee.total_wei == 40
    assert not committee.has_quorum(range(2, 12))
    block = CommitteeBlock.decode(committee.encode())
    assert Committee.from_block(block) == committee
    assert block.cid() == committee.cid()


def test_a_roster_names_nobody_twice_and_is_bounded():
    committee = make(4, 2, 5)
    first = committee.seats[0]
    for trainers in (
        (Trainer(first.peer, bytes(20), b"k" * 48),),
        (Trainer(b"p" * 38, bytes(20), first.bls_public_key),),
        (committee.trainers[0], committee.trainers[0]),
    ):
        with pytest.raises(InvalidMessageError, match="twice"):
            replace(committee, trainers=trainers)
    for cohort in (0, MAX_COHORT + 1):
        with pytest.raises(InvalidMessageError, match="cohort"):
            replace(committee, cohort=cohort)


def test_the_largest_roster_fits_one_block():
    committee = make(MAX_MEMBERS, MAX_TRAINERS, MAX_COHORT, weight=10**30)
    assert len(committee.encode()) <= CommitteeBlock.MAX_BYTES
    with pytest.raises(InvalidMessageError, match="trainers"):
        replace(committee, trainers=(*committee.trainers, Trainer(b"p" * 38, bytes(20), b"k" * 48)))


# --- quorums ----------------------------------------------------------------------------------------------
def test_a_drawn_cohort_counts_heads_and_the_committee_stake():
    drawn = compute_cohort(make(4, 8, 5), beacon(1))
    members = drawn.members
    assert drawn.has_quorum(members[:4])
    assert not drawn.has_quorum(members[:3])
    outside = [place for place in range(12) if place not in members]
    assert not drawn.has_quorum([*members[:3], *outside])
    assert drawn.has_minimum(members[:1])
    assert not drawn.has_minimum(outside)
    whole = compute_cohort(make(4, 0, 64), beacon(1))
    assert whole.has_quorum(range(3))
    assert not whole.has_minimum(range(2))


def test_a_cohort_that_stays_away_does_not_stall_the_round():
    cohort = compute_cohort(make(4, 8, 5), beacon(1))
    waiting = Waiting(cohort, Pacing(0.5, 2.0, 60.0), 0.0)
    two, everyone = frozenset(cohort.members[:2]), frozenset(cohort.members)
    assert not waiting.is_over(frozenset(), everyone, 1e6)
    assert not waiting.is_over(two, everyone, 1e6 + 50)
    assert not waiting.is_over(two, two, 3e6)  # a third as fast as the first: waited for
    assert waiting.is_over(two, everyone, 1e6 + 50 + 2 * (1e6 + 50))
    assert waiting.is_short
    assert waiting.is_over(everyone, everyone, 4e6)
    assert not waiting.is_short


def test_only_who_waited_in_vain_lets_a_record_hold_less_than_a_quorum():
    committee = make(4, 8, 5)
    cohort = compute_cohort(committee, beacon(1))
    collection = Collection(committee, cohort)
    assert not collection.is_enough(cohort.members[:2])
    collection.is_short = True
    assert collection.is_enough(cohort.members[:2])
    assert not collection.is_enough(())
    named = [entry.seat for entry in collection.absentees(frozenset(cohort.members[:2]), frozenset())]
    assert named == list(cohort.members[2:])


# --- messages and records ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def drawn(swarm_of):
    """Two seats and four trainers with real keys, of whom three contribute."""
    swarm = swarm_of((10,) * 6)
    roster = swarm.committee.seats
    trainers = tuple(Trainer(s.peer, s.address, s.bls_public_key) for s in roster[2:])
    swarm.committee = replace(swarm.committee, seats=roster[:2], trainers=trainers, cohort=3)
    swarm.genesis = replace(swarm.genesis, committee=swarm.committee.cid())
    swarm.beacon = compute_beacon(swarm.committee.task, 1, 1, swarm.genesis.digest())
    swarm.facts = validation.facts_of(
        swarm.committee, swarm.genesis, swarm.committee.task, swarm.beacon, max_steps=1 << 20, batch_size=32
    )
    return swarm


def header_of(drawn, place, **changes):
    header = replace(
        drawn.header(place), parent=drawn.genesis.cid(), shard=drawn.facts.shards.get(place, 0), signature=b"", **changes
    )
    return replace(header, signature=bls.sign(drawn.keys[place].bls, header.signing_root()))


def test_only_the_cohort_may_contribute(drawn):
    cohort = compute_cohort(drawn.committee, drawn.beacon).members
    for place in range(6):
        ruling = validation.validate_header(drawn.facts, header_of(drawn, place))
        if place in cohort:
            assert ruling.is_accepted
        else:
            assert (ruling.decision, ruling.reason) == (Decision.REJECT, "not in the cohort of the round")
    first, other = cohort[:2]
    wrong = header_of(drawn, first)
    wrong = replace(wrong, shard=drawn.facts.shards[other], signature=b"")
    wrong = replace(wrong, signature=bls.sign(drawn.keys[first].bls, wrong.signing_root()))
    assert "shard" in validation.validate_header(drawn.facts, wrong).reason


def test_a_trainer_neither_votes_nor_scores_nor_proposes(drawn):
    for message, rule in (
        (drawn.vote(3), validation.validate_vote),
        (drawn.card(3, {}), validation.validate_scorecard),
        (drawn.proposal(seat=3), validation.validate_proposal),
    ):
        assert rule(drawn.facts, message).reason == "no seat in the committee"


def test_a_record_names_the_cohort_and_what_changed(drawn):
    cohort = compute_cohort(drawn.committee, drawn.beacon).members
    headers = [header_of(drawn, place) for place in cohort[:2]]
    cards = [
        replace(drawn.card(seat, dict.fromkeys(headers, 1000)), parent=drawn.genesis.cid()) for seat in range(2)
    ]
    before = Tables().after(settlement.settle(drawn.committee, Tables(), headers[:1], cards))
    settled = settlement.settle(drawn.committee, before, headers, cards)

    def build(absent):
        return settlement.compute_record(
            parent=drawn.genesis, parent_attestation=None, committee=drawn.committee, headers=headers,
            absent=[Absentee(place, Absence.SILENT) for place in absent], scorecards=cards, settled=settled,
            model_hash=bytes(32), weights=CID.of_raw(b""),
        )

    record = build(cohort[2:])
    assert [entry.seat for entry in record.contributions] == list(cohort[:2])
    assert [entry.seat for entry in record.absent] == [cohort[2]]
    after = before.after(record)
    paid = {entry.address for entry in record.rewards}
    assert drawn.committee.at(cohort[1]).address in paid
    assert drawn.committee.at(cohort[2]).address not in paid | {seat.address for seat in drawn.committee.seats}
    assert settlement.compute_rewards_root(record.task, after.rewards) == record.rewards_root
    stranger = next(place for place in range(6) if place not in cohort)
    for absent in ((), (stranger,), (*cohort[2:], stranger), tuple(p for p in range(6) if p not in cohort[:2])):
        with pytest.raises(InvalidMessageError, match="cohort"):
            build(absent)
