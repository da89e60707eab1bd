"""Settlement for any contributions and any scores: sums, order, integers, bounds."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pflock.primitives.cid import CID
from p2pflock.protocol.committee import Committee
from p2pflock.protocol.messages import (
    MAX_MEMORY_MICRO,
    MICRO,
    ContributionHeader,
    Judgement,
    Reward,
    RoundRecord,
    Score,
    Scorecard,
    Seat,
    Trust,
)
from p2pflock.protocol.settlement import Tables, compute_rewards_root, settle

TASK = b"t" * 32
PARENT = CID.of_dag_cbor(b"parent")
micro = st.integers(-MICRO, MICRO)
memory = st.integers(-50 * MICRO, 50 * MICRO)


def peer(seat: int) -> bytes:
    return bytes([0, 36]) + bytes([seat]) * 36


def build_header(seat: int, samples: int) -> ContributionHeader:
    return ContributionHeader(
        TASK, 1, PARENT, peer(seat), CID.of_raw(bytes([seat])), 1, seat, 1, samples, 0, bytes(32), bytes(32), b""
    )


@st.composite
def rounds(draw):
    n = draw(st.integers(1, 8))
    seats = tuple(
        # Some operators hold several seats.
        Seat(peer(i), bytes([draw(st.integers(0, 3))]) * 20, bytes([i]) * 48, draw(st.integers(1, 10**27)))
        for i in range(n)
    )
    budget = draw(st.sampled_from([0, 1, 7, 10**18, 10**27]))
    committee = Committee(TASK, 1, 1, bytes(20), seats, budget)
    headers = [
        build_header(i, draw(st.integers(1, 1 << 40))) for i in range(n) if draw(st.booleans())
    ]
    cards = [
        Scorecard(
            TASK, 1, PARENT, peer(i), bytes(96),
            tuple(
                Score(header.cid(), draw(st.integers(0, 4)) > 0, draw(micro), 0)
                for header in headers if draw(st.integers(0, 3)) > 0
            ),
            b"",
        )
        for i in range(n) if draw(st.booleans())
    ]
    parent = RoundRecord(
        task=TASK, epoch=1, round=0, parent=None, parent_attestation=None, committee=committee.cid(),
        contributions=(), absent=(), scorecards=(),
        trust=tuple(
            Trust(peer(i), draw(memory), draw(memory.map(abs)), draw(micro)) for i in range(n) if draw(st.booleans())
        ),
        model_hash=bytes(32), weights=CID.of_raw(b""),
        rewards=tuple(Reward(bytes([a]) * 20, draw(st.integers(1, 10**30))) for a in range(3)),
        rewards_root=bytes(32),
    )
    return committee, parent, headers, cards


@settings(max_examples=200, deadline=None)
@given(rounds(), st.randoms(use_true_random=False))
def test_settlement(round_, random) -> None:
    committee, parent, headers, cards = round_
    result = settle(committee, parent, headers, cards)

    # Whatever order the messages came in, everybody settles alike.
    mixed_headers, mixed_cards = headers[:], cards[:]
    random.shuffle(mixed_headers)
    random.shuffle(mixed_cards)
    assert settle(committee, parent, mixed_headers, mixed_cards) == result

    # Money: never more than the budget, never taken away, whole wei.
    before = {r.address: r.cumulative_wei for r in parent.rewards}
    table = Tables(parent.trust, parent.rewards).after(result)
    assert compute_rewards_root(TASK, table.rewards) == result.rewards_root
    after = {r.address: r.cumulative_wei for r in table.rewards}
    assert sum(after.values()) - sum(before.values()) <= committee.round_budget_wei
    assert all(after[address] >= wei for address, wei in before.items())
    assert all(type(wei) is int for wei in after.values())
    assert list(after) == sorted(after)

    # The fold: positive weights for exactly the accepted, the largest at most twice their median.
    assert [w > 0 for w in result.weights] == [j is Judgement.ACCEPTED for j in result.judgements]
    weights = sorted(w for w in result.weights if w)
    if weights:
        samples = sorted(
            h.samples for h, j in zip(headers, result.judgements, strict=True) if j is Judgement.ACCEPTED
        )
        middle = Fraction(samples[(len(samples) - 1) // 2] + samples[len(samples) // 2], 2)
        assert weights[-1] <= 2 * middle

    # The gate: at most half of the valid ones, and only whom some scorecard speaks against, now or before.
    gated = [h for h, j in zip(headers, result.judgements, strict=True) if j is Judgement.GATED]
    assert len(gated) <= len([j for j in result.judgements if j is not Judgement.INVALID]) / 2
    assert {h.peer for h in gated} <= {entry.peer for entry in table.trust}

    # Trust: within what a record can hold, and untouched for who is not there.
    present = {h.peer for h in headers}
    for entry in table.trust:
        assert abs(entry.earned_micro) <= MAX_MEMORY_MICRO
        assert 0 <= entry.usual_micro <= MAX_MEMORY_MICRO
        assert abs(entry.recent_micro) <= MICRO
    assert {entry for entry in parent.trust if entry.peer not in present} <= set(table.trust)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(micro, st.integers(1, 100)), min_size=1, max_size=9), micro)
def test_less_than_half_of_the_stake_cannot_move_a_score_beyond_the_honest(honest, lie) -> None:
    from p2pflock.protocol.gate import compute_weighted_median

    liars = (lie, sum(weight for _, weight in honest) - 1)
    if liars[1] > 0:
        values = [value for value, _ in honest]
        assert min(values) <= compute_weighted_median([*honest, liars]) <= max(values)
