"""Who scores whom in a large cohort: drawn by stake, the same number of opinions for each, and binding."""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from p2pflock.errors import InvalidMessageError
from p2pflock.primitives.cid import CID
from p2pflock.protocol import validation
from p2pflock.protocol.committee import (
    OPINIONS,
    SMALL_COHORT,
    Committee,
    Panels,
    compute_beacon,
    compute_cohort,
    compute_panels,
)
from p2pflock.protocol.messages import MICRO, ContributionHeader, Judgement, Score, Scorecard, Seat, Trainer
from p2pflock.protocol.settlement import Tables, settle

TASK = b"t" * 32
PARENT = CID.of_dag_cbor(b"parent")
FLOCK = 10**18
SIZES = [(27, 0, 64), (64, 0, 64), (64, 936, 64), (100, 50, 40), (218, 800, 512)]


def beacon(number):
    return hashlib.sha256(b"beacon %d" % number).digest()


def make(stakes, trainers=0, cohort=64, budget=1000):
    """Keys are no curve points: nothing here looks at them."""
    names = [hashlib.sha512(b"%d" % n).digest() for n in range(len(stakes) + trainers)]
    seats = tuple(Seat(n[:38], n[:20], n[:48], w) for n, w in zip(names, stakes, strict=False))
    rest = tuple(Trainer(n[:38], n[:20], n[:48]) for n in names[len(stakes) :])
    return Committee(TASK, 0, 0, bytes(20), seats, budget, rest, cohort)


def draw(committee, number=1):
    return compute_panels(committee, compute_cohort(committee, beacon(number)), beacon(number))


def uneven(seats, number=0):
    rng = random.Random(number)
    return [rng.choice((1, 1, 1, 5, 20, 60)) * rng.randint(500, 1500) * FLOCK for _ in range(seats)]


# --- the draw ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("seats", "trainers", "cohort"), [(SMALL_COHORT, 0, 64), (64, 936, SMALL_COHORT), (OPINIONS + 1, 900, 64)]
)
def test_in_a_small_round_everybody_scores_everybody_by_stake(seats, trainers, cohort):
    committee = make(range(1, seats + 1), trainers, cohort)
    panels = draw(committee)
    for place in panels.cohort.members:
        assert [panels.weight_of(seat, place) for seat in range(seats)] == list(range(1, seats + 1))
    assert {panels.count(seat) for seat in range(seats)} == {len(panels.cohort.members)}


@pytest.mark.parametrize("stakes", [lambda seats: [1000 * FLOCK] * seats, uneven], ids=["equal", "uneven"])
@pytest.mark.parametrize(("seats", "trainers", "cohort"), SIZES)
def test_every_contribution_has_as_many_opinions_and_none_is_its_authors(seats, trainers, cohort, stakes):
    committee = make(stakes(seats), trainers, cohort)
    for number in range(2):
        panels = draw(committee, number)
        assert panels.drawn is not None
        assert tuple(panels.drawn) == panels.cohort.members == compute_cohort(committee, beacon(number)).members
        for place, panel in panels.drawn.items():
            assert sum(panel.values()) == OPINIONS
            assert place not in panel
            line_wei = committee.total_wei - (committee.seats[place].weight_wei if place < seats else 0)
            for seat, opinions in panel.items():
                assert panels.weight_of(seat, place) == opinions
                assert abs(opinions - OPINIONS * committee.seats[seat].weight_wei / line_wei) < 1


@pytest.mark.parametrize(("seats", "trainers", "cohort"), SIZES)
def test_with_equal_stakes_as_many_validators_look_at_each_and_none_has_all_the_work(seats, trainers, cohort):
    panels = draw(make([1000 * FLOCK] * seats, trainers, cohort))
    assert {len(panel) for panel in panels.drawn.values()} == {OPINIONS}
    work = [panels.count(seat) for seat in range(seats)]
    fair = OPINIONS * len(panels.cohort.members) / seats
    assert sum(work) == OPINIONS * len(panels.cohort.members)
    assert max(work) < fair + 4.5 * fair**0.5


def test_panels_follow_from_the_beacon_alone_and_differ():
    committee = make([1000 * FLOCK] * 64, 936)
    panels = draw(committee)
    assert panels == draw(make([1000 * FLOCK] * 64, 936))
    assert len({frozenset(panel) for panel in panels.drawn.values()}) == 64
    cohort = compute_cohort(committee, beacon(1))
    assert compute_panels(committee, cohort, beacon(2)).drawn != panels.drawn


def test_nobody_owns_a_panel_with_a_third_of_the_stake():
    """Heads drawn alike and counted by stake would give every panel it is on to the one heavy seat."""
    committee = make([31 * 1000 * FLOCK, *[1000 * FLOCK] * 63])
    for number in range(20):
        for place, panel in draw(committee, number).drawn.items():
            assert panel.get(0, 0) <= -(-OPINIONS // 3) or place == 0


# --- what a card may say -----------------------------------------------------------------------------------
def header_of(committee, place, round_=1):
    return ContributionHeader(
        TASK, round_, PARENT, committee.at(place).peer, CID.of_raw(b"%d" % place), 1, 0, 30, 960, 0,
        bytes(32), bytes(32), b"",
    )


def card_of(committee, seat, lines):
    scores = tuple(Score(header.cid(), cosine is not None, cosine or 0, 0) for header, cosine in lines.items())
    return Scorecard(TASK, 1, PARENT, committee.seats[seat].peer, bytes(96), scores, b"")


def play(committee, panels, opinion, seats=None):
    """Headers of the cohort, and cards of its validators: opinion(seat, place) -> cosine."""
    headers = {place: header_of(committee, place) for place in panels.cohort.members}
    cards = {
        seat: card_of(
            committee,
            seat,
            {h: opinion(seat, place) for place, h in headers.items() if panels.weight_of(seat, place)},
        )
        for seat in (range(len(committee.seats)) if seats is None else seats)
    }
    return headers, cards


def test_a_card_that_scores_what_was_not_drawn_for_it_is_refused():
    committee = make([1000 * FLOCK] * 40)
    panels = draw(committee)
    headers, cards = play(committee, panels, lambda seat, place: 1000)
    settle(committee, Tables(), list(headers.values()), list(cards.values()), panels=panels)
    drawn = [place for place in headers if panels.weight_of(7, place)]
    other = next(place for place in headers if place != 7 and not panels.weight_of(7, place))
    for stranger in (other, 7):  # 7: its own contribution
        lines = dict.fromkeys([*(headers[place] for place in drawn[1:]), headers[stranger]], 1000)
        forged = {**cards, 7: card_of(committee, 7, lines)}
        with pytest.raises(InvalidMessageError, match="not drawn"):
            settle(committee, Tables(), list(headers.values()), list(forged.values()), panels=panels)


def test_gossip_refuses_a_card_of_more_scores_than_were_drawn(swarm_of):
    swarm = swarm_of((10,) * 30)
    panels = swarm.facts.panels
    headers = {place: swarm.header(place) for place in range(30)}
    drawn = [place for place in headers if panels.weight_of(3, place)]
    assert len(drawn) == panels.count(3) < 29
    good = swarm.card(3, dict.fromkeys((headers[place] for place in drawn), 1000))
    assert validation.validate_scorecard(swarm.facts, good).is_accepted
    assert validation.validate_scorecard(swarm.facts, swarm.card(3, {headers[drawn[0]]: 1000})).is_accepted
    more = next(place for place in headers if place not in drawn)
    bad = swarm.card(3, dict.fromkeys((headers[place] for place in [*drawn, more]), 1000))
    assert validation.validate_scorecard(swarm.facts, bad).reason == "more scores than were drawn for it"


# --- what follows ------------------------------------------------------------------------------------------
def test_an_honest_majority_of_its_scorers_keeps_an_attacker_out():
    """64 of 64, a fifth of them attackers who praise one another and condemn the rest; five rounds."""
    committee = make([1000 * FLOCK] * 64)
    bad, tables, rng = frozenset(range(51, 64)), Tables(), random.Random(3)

    def opinion(seat, place):
        if seat in bad:
            return MICRO if place in bad else -MICRO
        return round(rng.gauss(-40_000 if place in bad else 40_000, 20_000))

    for number in range(5):
        panels = draw(committee, number)
        for place in bad:
            assert 2 * sum(panels.drawn[place].get(seat, 0) for seat in bad) < OPINIONS
        headers, cards = play(committee, panels, opinion)
        settled = settle(committee, tables, list(headers.values()), list(cards.values()), panels=panels)
        judged = dict(zip(sorted(headers), settled.judgements, strict=True))
        gated = {place for place, judgement in judged.items() if judgement is Judgement.GATED}
        assert gated >= bad
        assert len(gated - bad) <= 2  # whose panel had more than its share of them
        tables = tables.after(settled)


def test_too_few_of_a_panel_make_no_score():
    """Attack: a proposer leaves out the cards of most of one panel, and its accomplices among it decide."""
    committee = make([1000 * FLOCK] * 64)
    panels = draw(committee)
    victim = 20
    panel = sorted(panels.drawn[victim])
    for kept, is_scored in ((OPINIONS // 2, False), (OPINIONS // 2 + 1, True)):
        away = set(panel[kept:])
        headers, cards = play(
            committee, panels, lambda seat, place: -MICRO if place == victim else 1000,
            [seat for seat in range(64) if seat not in away],
        )  # fmt: skip
        assert committee.has_quorum(cards)
        settled = settle(committee, Tables(), list(headers.values()), list(cards.values()), panels=panels)
        judged = dict(zip(sorted(headers), settled.judgements, strict=True))
        assert judged[victim] is (Judgement.GATED if is_scored else Judgement.ACCEPTED)
        assert any(entry.peer == committee.seats[victim].peer for entry in settled.trust) is is_scored


def test_validators_are_paid_for_the_opinions_that_they_gave():
    committee = make(uneven(40), budget=10**24)
    panels = draw(committee)
    headers, cards = play(committee, panels, lambda seat, place: 1000)
    lazy = max(panels.cohort.members[:40], key=panels.count)
    cards[lazy] = replace(cards[lazy], scores=cards[lazy].scores[:1])
    settled = settle(committee, Tables(), list(headers.values()), list(cards.values()), panels=panels)
    places = {header.cid(): place for place, header in headers.items()}
    work = {
        seat: sum(panels.weight_of(seat, places[line.contribution]) for line in card.scores)
        for seat, card in cards.items()
    }
    trainers_wei = {place: 8 * 10**23 // len(headers) for place in headers}
    paid = Counter({reward.address: reward.cumulative_wei for reward in settled.rewards})
    for seat in range(40):
        expected = trainers_wei.get(seat, 0) + 2 * 10**23 * work[seat] // sum(work.values())
        assert abs(paid[committee.seats[seat].address] - expected) <= 1


def test_by_default_a_settlement_counts_everybody_by_stake():
    committee = make([10, 20, 30, 40])
    cohort = compute_cohort(committee, compute_beacon(TASK, 0, 1, PARENT.digest))
    headers, cards = play(committee, Panels(committee, cohort, None), lambda seat, place: 1000 * seat)
    plain = settle(committee, Tables(), list(headers.values()), list(cards.values()))
    named = settle(
        committee, Tables(), list(headers.values()), list(cards.values()),
        panels=compute_panels(committee, cohort, beacon(1)),
    )  # fmt: skip
    assert plain == named


DESIGN = Path(__file__).resolve().parents[3] / "docs" / "design.md"


@pytest.mark.parametrize(
    ("size", "liars"), [(64, 12), (64, 16), (64, 19), (64, 21), (218, 43), (218, 54), (218, 65), (218, 72)]
)
def test_the_documented_chance_that_liars_are_most_of_a_panel(size, liars):
    """Of an honest author's panel: drawn from all seats but its own."""
    captured = range(OPINIONS // 2 + 1, min(liars, OPINIONS) + 1)
    ways = sum(math.comb(liars, k) * math.comb(size - 1 - liars, OPINIONS - k) for k in captured)
    percent = f"{100 * ways / math.comb(size - 1, OPINIONS):.2f} %"
    assert f"| {liars} of {size} | {percent} |" in DESIGN.read_text(encoding="utf-8")
