"""Collecting: what counts, when waiting ends, who is absent and why."""

from __future__ import annotations

from dataclasses import replace

import pytest

from p2pflock.protocol.collection import Added, Collection, Pacing, Waiting
from p2pflock.protocol.committee import Committee
from p2pflock.protocol.messages import Absence


@pytest.fixture
def collection(members):
    return Collection(members.committee)


def test_ready_needs_header_and_payload_in_any_order(members, collection):
    first, second = members.header(0), members.header(1)
    collection.add_payload(first.payload)
    assert collection.add_header(first) is Added.NEW
    assert collection.add_header(first) is Added.DUPLICATE
    collection.add_header(second)
    assert collection.ready() == {0}
    assert collection.missing_payloads() == {1: second}
    collection.add_payload(second.payload)
    assert collection.ready() == {0, 1}


def test_an_equivocator_is_out_and_costs_one_piece_of_evidence(members, collection):
    versions = [members.header(2, loss_micro=n) for n in range(20)]
    found = [collection.add_header(version) for version in versions]
    assert found == [Added.NEW, Added.EQUIVOCATION] + [Added.DUPLICATE] * 18
    collection.add_payload(versions[0].payload)
    assert collection.evidence == ((versions[0], versions[1]),)
    assert collection.ready() == frozenset()
    assert 2 not in collection.headers
    assert collection.holds(versions[0])
    assert not collection.holds(versions[1])


def test_a_stranger_must_not_get_this_far(members, collection):
    with pytest.raises(ValueError, match="stranger"):
        collection.add_header(replace(members.header(0), peer=members.stranger.peer_id))


def test_the_first_scorecard_counts(members, collection):
    first, second = members.card(1), members.card(1, [members.header(0)])
    collection.add_scorecard(first)
    collection.add_scorecard(second)
    assert collection.scorecards == {1: first}
    assert collection.holds(first)
    assert not collection.holds(second)


def test_absentees_name_everyone_left_out_once(members, collection):
    collection.add_header(members.header(0))
    collection.add_header(members.header(1))
    collection.add_header(members.header(2))
    collection.add_header(members.header(2, loss_micro=2))
    absent = collection.absentees(frozenset(), frozenset({1}))
    assert {entry.seat: Absence(entry.reason) for entry in absent} == {
        0: Absence.UNDELIVERED,
        1: Absence.INVALID,
        2: Absence.EQUIVOCATED,
        3: Absence.SILENT,
    }
    assert [entry.seat for entry in collection.absentees(frozenset({0, 3}), frozenset())] == [1, 2]


def test_grace_is_a_share_of_the_time_it_took_within_bounds():
    pacing = Pacing(grace_share=0.5, minimum_grace_seconds=2, maximum_grace_seconds=60)
    assert [pacing.compute_grace_seconds(s) for s in (0, 4, 10, 1000)] == [2, 2, 5, 60]


def test_waiting_ends_at_once_when_nobody_alive_is_missing(members):
    waiting = Waiting(members.committee, Pacing(), 0.0)
    assert waiting.is_over(frozenset({0, 1, 2}), frozenset({0, 1, 2}), 1.0)


def test_waiting_never_ends_below_a_quorum(members):
    waiting = Waiting(members.committee, Pacing(), 0.0)
    assert not waiting.is_over(frozenset({0, 1}), frozenset({0, 1}), 1e9)


def test_grace_runs_from_the_quorum_and_begins_anew_when_it_is_lost(members):
    waiting = Waiting(members.committee, Pacing(0.5, 2.0, 60.0), 0.0)
    three, everyone = frozenset({0, 1, 2}), frozenset(range(4))
    assert not waiting.is_over(three, everyone, 10.0)
    assert waiting.deadline == 15.0
    assert not waiting.is_over(three, everyone, 14.9)
    assert not waiting.is_over(frozenset({0, 1}), everyone, 14.9)  # one of them equivocated
    assert not waiting.is_over(three, everyone, 20.0)
    assert waiting.is_over(three, everyone, 30.0)


def test_stake_counts_not_heads(members):
    seats = tuple(replace(seat, weight_wei=w) for seat, w in zip(members.committee.seats, (67, 11, 11, 11), strict=True))
    waiting = Waiting(Committee(members.task, 0, 0, bytes(20), seats), Pacing(), 0.0)
    assert waiting.is_over(frozenset({0}), frozenset({0}), 0.0)
    assert not waiting.is_over(frozenset({1, 2, 3}), frozenset({1, 2, 3}), 1e9)
