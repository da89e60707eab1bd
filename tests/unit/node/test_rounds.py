"""The phases of a round: a table of inputs and what they must ask for."""

from __future__ import annotations

import pytest

from p2pflock.protocol import consensus, rounds
from p2pflock.protocol.collection import Pacing
from p2pflock.protocol.committee import Panels, compute_cohort, compute_proposer
from p2pflock.protocol.messages import NIL, Absence
from p2pflock.protocol.rounds import Phase
from p2pflock.protocol.timeouts import Timeouts

EVERYONE = range(4)


def kinds(effects):
    return [type(effect).__name__ for effect in effects]


@pytest.fixture
def proposer(members):
    return compute_proposer(members.committee, members.beacon, 0)


def build(members, seat, **options):
    machine = consensus.Consensus(members.committee, 1, seat, members.beacon, Timeouts.create())
    return rounds.Round(members.committee, seat, machine, Pacing(0.5, 2.0, 60.0), **options)


def contribute(members, round_, seats, now, me):
    """Header and payload of each seat; returns all effects."""
    effects = []
    for seat in seats:
        header = members.header(seat)
        if seat == me:
            effects += round_.on_contribution(header, now)
        else:
            effects += round_.on_header(header, now)
            effects += round_.on_payload(header.payload, now)
    return effects


def scored(members, proposer, **options):
    """A round in which everybody's payload and our card are here; others' cards are not."""
    round_ = build(members, proposer, **options)
    round_.start(0.0, is_training=True)
    round_.on_presence(EVERYONE, 0.0)
    contribute(members, round_, EVERYONE, 4.0, proposer)
    return round_


def test_starts_training_unless_its_contribution_was_saved(members):
    assert kinds(build(members, 0).start(0.0, is_training=True)) == ["Train"]
    assert build(members, 0).start(0.0, is_training=False) == ()


def test_each_new_header_asks_for_its_payload_once(members):
    round_ = build(members, 0)
    round_.start(0.0, is_training=True)
    header = members.header(1)
    assert round_.on_header(header, 1.0) == (rounds.Fetch(1, header),)
    assert round_.on_header(header, 1.0) == ()


def test_scores_as_soon_as_everybody_alive_has_delivered(members):
    round_ = build(members, 0)
    round_.start(0.0, is_training=True)
    round_.on_presence({1, 2}, 0.0)  # seat 3 is not there: nobody waits for it
    effects = contribute(members, round_, (0, 1, 2), 4.0, 0)
    assert kinds(effects)[-1] == "ScoreContributions"
    assert [header.peer for header in effects[-1].headers] == [s.peer_id for s in members.signers[:3]]
    assert round_.phase is Phase.SCORING


def test_who_is_alive_and_slow_is_waited_for_only_through_the_grace(members):
    round_ = build(members, 0)
    round_.start(0.0, is_training=True)
    round_.on_presence(EVERYONE, 0.0)
    assert "ScoreContributions" not in kinds(contribute(members, round_, (0, 1, 2), 10.0, 0))
    assert round_.on_tick(14.9) == ()
    assert kinds(round_.on_tick(15.0)) == ["ScoreContributions"]


def test_a_slow_member_stops_training_and_scores_what_is_there(members):
    round_ = build(members, 3)
    round_.start(0.0, is_training=True)
    round_.on_presence(EVERYONE, 0.0)
    effects = contribute(members, round_, (0, 1, 2), 4.0, 3)
    assert kinds(effects).count("FinishTraining") == 1
    assert kinds(effects)[-1] == "FinishTraining"  # with the payload that makes a quorum
    assert round_.on_tick(5.9) == ()
    assert kinds(round_.on_tick(6.0)) == ["StopTraining", "ScoreContributions"]


def test_a_slow_member_that_finishes_within_the_grace_is_counted(members):
    round_ = build(members, 3)
    round_.start(0.0, is_training=True)
    round_.on_presence(EVERYONE, 0.0)
    contribute(members, round_, (0, 1, 2), 4.0, 3)
    effects = contribute(members, round_, (3,), 5.0, 3)
    assert kinds(effects) == ["ScoreContributions"]
    assert len(effects[0].headers) == 4


def test_less_than_a_quorum_hurries_nobody(members):
    round_ = build(members, 3)
    round_.start(0.0, is_training=True)
    round_.on_presence(EVERYONE, 0.0)
    assert "FinishTraining" not in kinds(contribute(members, round_, (0, 1), 4.0, 3))
    header = members.header(2)
    assert kinds(round_.on_header(header, 4.0)) == ["Fetch"]  # a header without its payload is no contribution
    assert kinds(round_.on_payload(header.payload, 5.0)) == ["FinishTraining"]


def test_nothing_closes_below_a_quorum(members):
    round_ = build(members, 0)
    round_.start(0.0, is_training=True)
    round_.on_presence({1}, 0.0)
    contribute(members, round_, (0, 1), 4.0, 0)
    assert round_.on_tick(1e6) == ()
    assert round_.phase is Phase.COLLECTING


def test_decides_when_the_cards_of_the_collected_are_here(members, proposer):
    round_ = scored(members, proposer)
    others = [seat for seat in EVERYONE if seat != proposer]
    assert round_.on_scorecard(members.card(proposer), 5.0) == ()
    for seat in others[:-1]:
        round_.on_scorecard(members.card(seat), 5.0)
    assert round_.phase is Phase.SCORING
    effects = round_.on_scorecard(members.card(others[-1]), 5.0)
    assert round_.phase is Phase.DECIDING
    candidate = next(effect for effect in effects if isinstance(effect, rounds.BuildCandidate))
    assert len(candidate.headers) == len(candidate.scorecards) == 4
    assert candidate.absent == ()
    assert "FoldAhead" not in kinds(effects)


def test_who_does_not_propose_folds_beside_the_proposer(members, proposer):
    me = next(seat for seat in EVERYONE if seat != proposer)
    round_ = build(members, me)
    round_.start(0.0, is_training=True)
    round_.on_presence(EVERYONE, 0.0)
    contribute(members, round_, EVERYONE, 4.0, me)
    effects = [effect for seat in EVERYONE for effect in round_.on_scorecard(members.card(seat), 5.0)]
    assert kinds(effects).count("FoldAhead") == 1
    assert "BuildCandidate" not in kinds(effects)
    ahead = next(effect for effect in effects if isinstance(effect, rounds.FoldAhead))
    assert len(ahead.headers) == len(ahead.scorecards) == 4


def test_a_missing_card_is_waited_for_only_through_the_grace(members, proposer):
    round_ = scored(members, proposer)
    for seat in [proposer, *(s for s in EVERYONE if s != proposer)][:3]:
        round_.on_scorecard(members.card(seat), 5.0)
    assert round_.phase is Phase.SCORING
    assert round_.on_tick(6.9) == ()
    assert "BuildCandidate" in kinds(round_.on_tick(7.1))


@pytest.fixture
def panels(members):
    """Two opinions on each contribution: those of the next two seats."""
    drawn = {place: {(place + 1) % 4: 1, (place + 2) % 4: 1} for place in EVERYONE}
    return Panels(members.committee, compute_cohort(members.committee, members.beacon), drawn)


def test_the_proposer_looks_at_what_others_score_while_it_waits(members, proposer, panels):
    round_ = scored(members, proposer, panels=panels)
    assert [place for place in EVERYONE if round_.is_to_score(place)] == sorted([(proposer - 1) % 4, (proposer - 2) % 4])
    (probe,) = round_.on_scorecard(members.card(proposer), 5.0)
    others = sorted([proposer, (proposer + 1) % 4])
    assert [header.peer for header in probe.headers] == [members.signers[place].peer_id for place in others]
    for seat in EVERYONE:
        assert "BuildCandidate" not in kinds(round_.on_scorecard(members.card(seat), 5.0))
    effects = round_.on_probed({others[0]}, {others[1]}, 6.0)
    candidate = next(effect for effect in effects if isinstance(effect, rounds.BuildCandidate))
    assert [(entry.seat, entry.reason) for entry in candidate.absent] == [(others[1], Absence.INVALID)]
    other = scored(members, (proposer + 1) % 4, panels=panels)
    assert other.on_scorecard(members.card((proposer + 1) % 4), 5.0) == ()


def test_a_card_that_scores_beyond_its_panels_is_left_out(members, proposer, panels):
    """Attack: with it the record would be refused, and whoever proposes would lose its turn."""
    round_ = scored(members, proposer, panels=panels)
    round_.on_scorecard(members.card(proposer), 5.0)
    round_.on_probed(EVERYONE, (), 5.0)
    liar = (proposer + 1) % 4
    effects = []
    for seat in EVERYONE:
        if seat != proposer:
            drawn = [(seat - 1) % 4, (seat - 2) % 4 if seat != liar else (seat + 1) % 4]
            effects += round_.on_scorecard(members.card(seat, [members.header(place) for place in drawn]), 5.0)
    candidate = next(effect for effect in effects if isinstance(effect, rounds.BuildCandidate))
    assert len(candidate.headers) == 4
    scorers = {card.validator for card in candidate.scorecards}
    assert scorers == {members.signers[seat].peer_id for seat in EVERYONE if seat != liar}


def test_others_cards_do_not_replace_our_own(members, proposer):
    round_ = scored(members, proposer)
    for seat in EVERYONE:
        if seat != proposer:
            round_.on_scorecard(members.card(seat), 5.0)
    round_.on_tick(1e3)
    assert round_.phase is Phase.SCORING


def test_only_the_proposer_builds(members, proposer):
    other = (proposer + 1) % 4
    round_ = scored(members, other)
    effects = [e for seat in EVERYONE for e in round_.on_scorecard(members.card(seat), 5.0)]
    assert round_.phase is Phase.DECIDING
    assert "BuildCandidate" not in kinds(effects)


def test_the_same_content_is_built_once_and_a_late_card_again(members, proposer):
    round_ = scored(members, proposer)
    last = (proposer + 1) % 4
    for seat in EVERYONE:
        if seat != last:
            round_.on_scorecard(members.card(seat), 5.0)
    assert "BuildCandidate" in kinds(round_.on_tick(8.0))
    assert "BuildCandidate" not in kinds(round_.on_tick(8.1))
    again = [e for e in round_.on_scorecard(members.card(last), 8.2) if isinstance(e, rounds.BuildCandidate)]
    assert [len(effect.scorecards) for effect in again] == [4]


def test_undecodable_payloads_are_left_out_with_their_reason(members, proposer):
    round_ = scored(members, proposer)
    bad = (proposer + 1) % 4
    round_.on_undecodable({bad}, 5.0)
    effects = [e for seat in EVERYONE for e in round_.on_scorecard(members.card(seat), 5.0)]
    candidate = next(effect for effect in effects if isinstance(effect, rounds.BuildCandidate))
    assert members.signers[bad].peer_id not in {header.peer for header in candidate.headers}
    assert [(entry.seat, entry.reason) for entry in candidate.absent] == [(bad, Absence.INVALID)]


def test_one_proposer_alone_stops_nobodys_training(members, proposer):
    """Attack: it proposes anything at the start of the round.  Votes of a third and more are another matter."""
    round_ = build(members, (proposer + 1) % 4)
    round_.start(0.0, is_training=True)
    others = [seat for seat in EVERYONE if seat != (proposer + 1) % 4]
    assert round_.on_proposal(members.proposal(), 3.0) == ()
    assert round_.on_vote(members.vote(others[0], members.record(), step=0), 3.0) == ()
    assert round_.phase is Phase.COLLECTING
    effects = kinds(round_.on_vote(members.vote(others[1], members.record(), step=0), 3.0))
    assert effects[0] == "StopTraining"
    assert "Check" in effects
    assert round_.phase is Phase.DECIDING


def test_who_decided_early_scores_later_all_the_same(members, proposer):
    me = (proposer + 1) % 4
    round_ = build(members, me)
    round_.start(0.0, is_training=True)
    round_.on_presence(EVERYONE, 0.0)
    others = [seat for seat in EVERYONE if seat != me]
    for seat in others[:2]:
        round_.on_vote(members.vote(seat, members.record(), step=0), 3.0)
    effects = contribute(members, round_, others, 4.0, me) + list(round_.on_tick(6.0))
    assert kinds(effects).count("ScoreContributions") == 1
    assert round_.phase is Phase.DECIDING
    assert "ScoreContributions" not in kinds(round_.on_tick(60.0))


def test_garbage_in_the_first_quorum_makes_room_for_late_contributions(members, proposer):
    """Attack: of the first three contributions one is no payload.  Two are no quorum; the fourth, late, is
    looked at before it is proposed."""
    round_ = build(members, proposer)
    round_.start(0.0, is_training=True)
    round_.on_presence(EVERYONE, 0.0)
    bad, late = [seat for seat in EVERYONE if seat != proposer][:2]
    first = [seat for seat in EVERYONE if seat != late]
    contribute(members, round_, first, 4.0, proposer)
    round_.on_tick(10.0)
    round_.on_undecodable({bad}, 10.0)
    for seat in EVERYONE:
        round_.on_scorecard(members.card(seat), 10.0)
    assert "BuildCandidate" not in kinds(round_.on_tick(11.0))
    probes = [e for e in contribute(members, round_, [late], 12.0, proposer) if isinstance(e, rounds.Probe)]
    assert [header.peer for header in probes[0].headers] == [members.signers[late].peer_id]
    assert len(probes) == 1
    effects = round_.on_probed({late}, set(), 13.0)
    candidate = next(effect for effect in effects if isinstance(effect, rounds.BuildCandidate))
    assert {members.committee.seat_of(header.peer) for header in candidate.headers} == set(EVERYONE) - {bad}


def test_a_second_header_of_one_seat_is_evidence_and_nobody_waits_for_it(members):
    round_ = build(members, 0)
    round_.start(0.0, is_training=True)
    round_.on_presence(EVERYONE, 0.0)
    first, second = members.header(3), members.header(3, loss_micro=9)
    round_.on_header(first, 1.0)
    assert kinds(round_.on_header(second, 1.0)) == ["HeaderEquivocation"]
    assert round_.on_header(members.header(3, loss_micro=10), 1.0) == ()
    assert kinds(contribute(members, round_, (0, 1, 2), 4.0, 0))[-1] == "ScoreContributions"


def test_votes_that_come_while_collecting_decide_the_round(members, proposer):
    """We may be the last to know: a quorum of precommits needs nothing from us."""
    me = (proposer + 1) % 4
    round_ = build(members, me)
    round_.start(0.0, is_training=True)
    record = members.record()
    effects = list(round_.on_proposal(members.proposal(), 1.0))
    for seat in EVERYONE:
        if seat != me:
            effects += round_.on_vote(members.vote(seat, record), 1.0)
    decided = [effect for effect in effects if isinstance(effect, consensus.Decided)]
    assert [effect.record for effect in decided] == [record.encode()]
    assert round_.phase is Phase.DECIDED


def test_resends_only_once_deciding(members, proposer):
    round_ = scored(members, proposer)
    assert round_.resend() == ()
    round_.on_proposal(members.proposal(), 5.0)
    assert round_.resend() == ()
    for seat in EVERYONE:
        round_.on_scorecard(members.card(seat), 5.0)
    round_.on_vote(members.vote((proposer + 1) % 4, members.record(), step=0, record_digest=NIL, rewards_root=NIL), 5.0)
    assert len(round_.resend()) == 2


def test_dense_needs_no_scorecards(members, proposer):
    round_ = build(members, proposer, is_dense=True)
    round_.start(0.0, is_training=True)
    round_.on_presence(EVERYONE, 0.0)
    assert kinds(contribute(members, round_, EVERYONE, 4.0, proposer))[-1] == "ScoreContributions"
    effects = round_.on_averaged({0, 1, 2, 3}, 5.0)
    candidate = next(effect for effect in effects if isinstance(effect, rounds.BuildCandidate))
    assert candidate.scorecards == ()
