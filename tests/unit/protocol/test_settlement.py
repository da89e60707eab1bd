"""What a round's scores and samples turn into, case by case; properties in tests/property/test_settlement.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from p2pflock.errors import InvalidMessageError
from p2pflock.primitives import merkle
from p2pflock.primitives.cid import CID
from p2pflock.protocol import gate, settlement
from p2pflock.protocol.messages import NIL, Absence, Absentee, Judgement, Reward, Trust
from p2pflock.protocol.settlement import Tables, settle


@pytest.fixture(scope="module")
def equal(swarm_of):
    return swarm_of((10, 10, 10, 10))


def cards(swarm, headers, cosines, scorers=None):
    """Every scorer gives contribution i the cosine cosines[i]."""
    scored = dict(zip(headers, cosines, strict=True))
    return [swarm.card(seat, scored) for seat in (range(len(swarm.keys)) if scorers is None else scorers)]


def trust(result, swarm, seat):
    """(earned, usual, recent), or None."""
    entries = {t.peer: (t.earned_micro, t.usual_micro, t.recent_micro) for t in result.trust}
    return entries.get(swarm.keys[seat].peer)


def test_weighted_median() -> None:
    median = gate.compute_weighted_median
    assert median([(5, 1)]) == 5
    assert median([(1, 1), (9, 1)]) == 5
    assert median([(-2, 1), (1, 1)]) == -1  # rounded down
    assert median([(1, 2), (2, 1), (8, 1), (9, 2)]) == 5
    assert median([(1, 1), (2, 1), (9, 1)]) == 2
    assert median([(1, 1), (9, 3)]) == 9
    assert median([(-7, 2), (9, 1), (-8, 1)]) == -7
    with pytest.raises(InvalidMessageError):
        median([])


def test_all_accepted(equal) -> None:
    headers = [equal.header(seat, samples=900) for seat in range(4)]
    result = settle(equal.committee, equal.genesis, headers, cards(equal, headers, [100_000] * 4))
    assert set(result.judgements) == {Judgement.ACCEPTED}
    assert result.weights == (900,) * 4
    assert [trust(result, equal, seat) for seat in range(4)] == [(100_000, 100_000, 166_666)] * 4
    # 800 wei to four trainers, 200 to four validators
    assert {r.cumulative_wei for r in result.rewards} == {250}


def test_the_gate_remembers(equal) -> None:
    """One bad round of an honest peer does not drop it; a liar is out at once and slowly comes back."""
    headers = [equal.header(seat) for seat in range(4)]
    good = replace(
        equal.genesis, trust=tuple(Trust(p, 500_000, 500_000, 300_000) for p in sorted(k.peer for k in equal.keys))
    )
    unlucky = settle(equal.committee, good, headers, cards(equal, headers, [-100_000, 40_000, 60_000, 60_000]))
    assert unlucky.judgements[0] is Judgement.ACCEPTED
    # 500,000 less a fiftieth, and -100,000; half of 300,000 and of -100 / (3 * 60)
    assert trust(unlucky, equal, 0) == (390_000, 550_000, -127_778)
    liar = settle(equal.committee, equal.genesis, headers, cards(equal, headers, [-10, 40_000, 60_000, 60_000]))
    assert liar.judgements == (Judgement.GATED, *[Judgement.ACCEPTED] * 3)
    assert liar.weights[0] == 0
    assert trust(liar, equal, 0) == (-10, 50_000, -34)
    address = equal.committee.seats[0].address
    assert {r.address: r.cumulative_wei for r in liar.rewards}[address] == 50  # for its scorecard alone


def test_gate_of_two_drops_the_worse_and_never_all(swarm_of) -> None:
    pair = swarm_of((10, 10))
    headers = [pair.header(0), pair.header(1)]
    result = settle(pair.committee, pair.genesis, headers, cards(pair, headers, [-300_000, 100_000]))
    assert result.judgements == (Judgement.GATED, Judgement.ACCEPTED)
    same = settle(pair.committee, pair.genesis, headers, cards(pair, headers, [-300_000, -300_000]))
    assert set(same.judgements) == {Judgement.ACCEPTED}


def test_invalid_needs_more_than_half_of_the_scoring_stake(equal) -> None:
    headers = [equal.header(seat) for seat in range(3)]
    first = dict(zip(headers, [None, 1000, 1000], strict=True))
    second = dict(zip(headers, [1000, 1000, 1000], strict=True))
    half = settle(equal.committee, equal.genesis, headers, [equal.card(1, first), equal.card(2, second)])
    assert half.judgements[0] is Judgement.ACCEPTED
    most = settle(
        equal.committee, equal.genesis, headers, [equal.card(1, first), equal.card(2, second), equal.card(3, first)]
    )
    assert most.judgements[0] is Judgement.INVALID
    assert trust(most, equal, 0) is None  # says nothing about its cosines


def test_nobody_judges_itself(equal) -> None:
    headers = [equal.header(seat) for seat in range(3)]
    own = equal.card(0, dict(zip(headers, [-1_000_000, 1000, 1000], strict=True)))
    other = equal.card(1, dict(zip(headers, [-1000, 1000, 1000], strict=True)))
    result = settle(equal.committee, equal.genesis, headers, [own, other])
    assert trust(result, equal, 0)[:2] == (-1000, 1000)  # the other's, not its own


def test_an_empty_card_earns_nothing(equal) -> None:
    headers = [equal.header(seat) for seat in range(2)]
    working = equal.card(3, dict.fromkeys(headers, 1000))
    result = settle(equal.committee, equal.genesis, headers, [equal.card(2, {}), working])
    earned = {r.address: r.cumulative_wei for r in result.rewards}
    assert equal.committee.seats[2].address not in earned
    assert earned[equal.committee.seats[3].address] == 200


def test_a_missing_peer_keeps_trust_and_rewards(equal) -> None:
    keys, address = equal.keys[3], equal.committee.seats[3].address
    parent = replace(equal.genesis, trust=(Trust(keys.peer, -7, 9, -3),), rewards=(Reward(address, 123),))
    headers = [equal.header(seat) for seat in range(3)]
    result = settle(equal.committee, parent, headers, cards(equal, headers, [1000] * 3, range(3)))
    assert keys.peer not in {entry.peer for entry in result.trust}  # a record says what changed
    table = Tables(parent.trust, parent.rewards).after(result)
    assert trust(table, equal, 3) == (-7, 9, -3)
    assert Reward(address, 123) in table.rewards
    assert settlement.compute_rewards_root(equal.genesis.task, table.rewards) == result.rewards_root


def test_samples_are_capped_at_twice_the_median(equal) -> None:
    headers = [equal.header(seat, samples=n) for seat, n in enumerate((100, 100, 300, 1 << 40))]
    result = settle(equal.committee, equal.genesis, headers, cards(equal, headers, [1000] * 4))
    assert result.weights == (100, 100, 300, 400)


def test_the_same_payload_under_two_seats_is_folded_once(equal) -> None:
    """The victim of a copier that claims few samples keeps its say; who pays for it is not decided here."""
    headers = [equal.header(seat, samples=900) for seat in range(3)]
    copy = equal.header(3, samples=1, payload=headers[2].payload)
    result = settle(equal.committee, equal.genesis, [*headers, copy], cards(equal, [*headers, copy], [1000] * 4))
    assert set(result.judgements) == {Judgement.ACCEPTED}
    assert result.weights == (900, 900, 450, 450)
    few = [equal.header(seat, samples=1, payload=CID.of_raw(b"one")) for seat in range(4)]
    assert settle(equal.committee, equal.genesis, few, []).weights == (1, 1, 1, 1)


def test_strangers_and_duplicates_are_refused(equal) -> None:
    header = equal.header(0)
    for headers, scorecards in (
        ([header, replace(header, samples=1)], []),
        ([replace(header, peer=b"\0" * 38)], []),
        ([header], [equal.card(1, {}), equal.card(1, {header: 1})]),
    ):
        with pytest.raises(InvalidMessageError):
            settle(equal.committee, equal.genesis, headers, scorecards)


def test_an_empty_round_pays_nobody(equal) -> None:
    result = settle(equal.committee, equal.genesis, [], [equal.card(0, {})])
    assert (result.weights, result.rewards, result.rewards_root) == ((), (), NIL)


def test_rewards_root_proves_each_claim(equal) -> None:
    headers = [equal.header(seat, samples=100 + seat) for seat in range(4)]
    result = settle(equal.committee, equal.genesis, headers, cards(equal, headers, [1000] * 4))
    leaves = [merkle.leaf_hash(equal.genesis.task, r.address, r.cumulative_wei) for r in result.rewards]
    for index, leaf in enumerate(leaves):
        assert merkle.verify(result.rewards_root, leaf, merkle.proof(leaves, index))


def test_record_names_each_seat_once_in_order(equal) -> None:
    headers = [equal.header(2), equal.header(0), equal.header(3)]
    scorecards = cards(equal, headers, [1000] * 3, [3, 1])
    settled = settle(equal.committee, equal.genesis, headers, scorecards)

    def build(absent):
        return settlement.compute_record(
            parent=equal.genesis, parent_attestation=None, committee=equal.committee, headers=headers,
            absent=absent, scorecards=scorecards, settled=settled, model_hash=b"m" * 32,
            weights=CID.of_raw(b"new"),
        )

    record = build([Absentee(1, Absence.SILENT)])
    assert [entry.seat for entry in record.contributions] == [0, 2, 3]
    assert [entry.header for entry in record.contributions] == [equal.header(s).cid() for s in (0, 2, 3)]
    assert record.scorecards == tuple(card.cid() for card in reversed(scorecards))
    assert (record.round, record.parent) == (1, equal.genesis.cid())
    assert type(record).decode(record.encode()) == record
    for absent in ([], [Absentee(0, 0)], [Absentee(1, 0), Absentee(1, 0)], [Absentee(1, 0), Absentee(2, 0)]):
        with pytest.raises(InvalidMessageError):
            build(absent)
