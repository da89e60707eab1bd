"""The gate over several rounds of given scores; what it does to real attacks is in tests/attacks/test_byzantine.py."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2pflock.primitives.cid import CID
from p2pflock.protocol import gate
from p2pflock.protocol.messages import MICRO, Score, Trust

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


def trust(outcome, seat):
    return {entry.peer: entry.ema_micro for entry in outcome.trust}[peer(seat)]


def test_scores_count_in_medians_of_their_round() -> None:
    """Early rounds, with cosines ten times as large, buy no more credit than late ones."""
    early, late = play([[100_000, 90_000, 110_000]]), play([[10_000, 9_000, 11_000]])
    assert early[0].trust == late[0].trust
    assert gate.normalise({b"a": 10**6, b"b": 1, b"c": -1}) == {b"a": MICRO, b"b": 333_333, b"c": -333_334}
    assert gate.normalise({b"a": 0, b"b": 0}) == {b"a": 0, b"b": 0}


def test_trust_is_lost_twice_as_fast_as_won() -> None:
    assert gate.compute_trust(0, 100) == 10
    assert gate.compute_trust(0, -100) == -20
    assert gate.compute_trust(MICRO, MICRO) == MICRO
    assert gate.compute_trust(-MICRO, -MICRO) == -MICRO


def test_who_works_for_five_rounds_and_then_attacks_is_out_in_three_and_stays_longer() -> None:
    on, off = [60_000, 50_000, 40_000, 50_000], [60_000, 50_000, 40_000, -50_000]
    outcomes = play([on] * 5 + [off] * 5 + [on] * 5)
    dropped = [3 in outcome.dropped for outcome in outcomes]
    assert dropped[:5] == [False] * 5
    assert dropped[7:10] == [True] * 3
    assert sum(dropped[10:]) >= 3
    assert all(seat not in outcome.dropped for outcome in outcomes for seat in range(3))


def test_one_bad_round_in_five_is_borne() -> None:
    rounds = [[40_000, 50_000, 60_000, -40_000 if number % 5 == 4 else 50_000] for number in range(15)]
    assert not any(outcome.dropped for outcome in play(rounds))


def test_who_was_not_scored_keeps_its_trust() -> None:
    before = (Trust(peer(0), -5), Trust(peer(7), 9))
    (outcome,) = play([[None, 50, 50]], before)
    assert (trust(outcome, 0), trust(outcome, 7)) == (-5, 9)
    assert outcome.dropped == {0}
    assert play([[]])[0] == gate.Outcome(frozenset(), ())


@given(st.lists(st.lists(st.integers(-MICRO, MICRO), min_size=5, max_size=5), min_size=1, max_size=8))
def test_bounds(rounds) -> None:
    for outcome in play(rounds):
        assert len(outcome.dropped) <= 2
        assert all(-MICRO <= entry.ema_micro <= MICRO for entry in outcome.trust)
        assert all(trust(outcome, seat) < 0 for seat in outcome.dropped)
