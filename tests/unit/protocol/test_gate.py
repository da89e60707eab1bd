"""The gate over several rounds of given scores; what it does to real attacks is in tests/attacks/test_byzantine.py."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pflock.primitives.cid import CID
from p2pflock.protocol import gate
from p2pflock.protocol.messages import MAX_MEMORY_MICRO, MICRO, Score, Trust

CONTRIBUTION = CID.of_raw(b"x")


def peer(seat: int) -> bytes:
    return bytes([0, 36]) + bytes([seat]) * 36


def play(rounds, before=()):
    """Each round is one score a seat, or None where nobody scored; returns the outcome of each."""
    outcomes = []
    for scores in rounds:
        candidates = [
            gate.Candidate(seat, peer(seat), [] if score is None else [(Score(CONTRIBUTION, True, score, 0), 1)])
            for seat, score in enumerate(scores)
        ]
        outcomes.append(gate.judge(candidates, before))
        before = outcomes[-1].trust
    return outcomes


def dropped(outcomes, seat):
    return [seat in outcome.dropped for outcome in outcomes]


GOOD = [60_000, 50_000, 40_000]


@pytest.mark.parametrize("score", [-50_000, -1, 0, 5_000])
def test_who_never_helps_is_out_from_the_first_round(score) -> None:
    """Flipped signs, and what has next to no cosine: noise, random directions, flipped labels."""
    outcomes = play([[*GOOD, score]] * 10)
    assert dropped(outcomes, 3) == [True] * 10
    assert not any(seat in outcome.dropped for outcome in outcomes for seat in range(3))


def test_half_of_what_is_usual_is_enough() -> None:
    assert not any(outcome.dropped for outcome in play([[*GOOD, 25_000]] * 10))


def test_one_bad_round_in_three_is_borne() -> None:
    rounds = [[*GOOD, -40_000 if number % 3 == 2 else 50_000] for number in range(30)]
    assert not any(outcome.dropped for outcome in play(rounds))


def test_rounds_weigh_by_what_was_usual_in_them() -> None:
    """Cosines shrink as training goes on, and then say less."""
    early, late = [100 * score for score in (6, 5, 4, 5)], [6, 5, 4, -5]
    last = play([early] * 4 + [late] * 2)[-1]
    kept = {entry.peer: gate.compute_ratio(entry) for entry in last.trust}
    assert kept[peer(3)] > 950_000
    assert 3 not in play([early] * 4 + [late])[-1].dropped


def test_who_works_and_then_attacks_is_out_by_the_third_round_whatever_its_past() -> None:
    rounds = [[*GOOD, 50_000]] * 40 + [[*GOOD, -50_000]] * 10
    assert dropped(play(rounds), 3) == [False] * 40 + [False] * 2 + [True] * 8


def test_a_late_comer_is_measured_by_the_rounds_it_was_in() -> None:
    before = play([[600_000, 500_000, 400_000]] * 20)[-1].trust
    assert not play([[6_000, 5_000, 4_000, 4_000]], before)[0].dropped


def test_a_bad_round_of_everybody_drops_nobody_for_its_short_memory() -> None:
    before = play([GOOD] * 20)[-1].trust
    assert not any(outcome.dropped for outcome in play([[-score for score in GOOD]] * 3, before))


def test_who_was_not_scored_keeps_its_trust_and_without_any_passes() -> None:
    before = (Trust(peer(0), -5, 100, 0), Trust(peer(7), 9, 9, 9))
    (outcome,) = play([[None, 50, 50, None]], before)
    assert set(before) <= set(outcome.trust)
    assert outcome.dropped == {0}
    assert play([[]])[0] == gate.Outcome(frozenset(), ())
    assert play([[None, None]])[0] == gate.Outcome(frozenset(), ())


def test_no_more_than_half_and_the_worst() -> None:
    good, slumped = Trust(peer(0), 90, 100, MICRO), Trust(peer(0), 90, 100, -900_000)
    known = {0: Trust(peer(0), 10, 100, 0), 1: Trust(peer(1), 5, 100, 0), 2: slumped, 3: good, 4: good}
    assert gate.drop(known, 5) == {0, 1}
    assert gate.drop(known, 6) == {0, 1, 2}


scores = st.lists(st.integers(-MICRO, MICRO) | st.none(), min_size=5, max_size=5)


@settings(max_examples=100, deadline=None)
@given(st.lists(scores, min_size=1, max_size=8), st.integers(1, 100))
def test_bounds(rounds, repeats) -> None:
    for outcome in play(rounds * repeats):
        assert len(outcome.dropped) <= 2
        for entry in outcome.trust:
            assert abs(entry.earned_micro) <= MAX_MEMORY_MICRO
            assert 0 <= entry.usual_micro <= MAX_MEMORY_MICRO
            assert abs(entry.recent_micro) <= MICRO
