"""Forged histories, consistent in every id: who can forge what, and which of the five verdicts says so.

An outsider can make any block it likes and name it, but holds no member's key: the quorum signed the honest record.
A colluding quorum signs whatever it likes: then lineage passes by definition, and participation and recomputed are
what is left.  The last test shows the limit: what a quorum may decide by the rules, nobody can tell.
"""

from __future__ import annotations

import random
from dataclasses import fields, replace

import pytest

from p2pflock.primitives.cid import CID
from p2pflock.protocol import provenance
from p2pflock.protocol.messages import Absentee, Judgement, Reward, Score, Scorecard, Trust
from p2pflock.testing import history as histories
from p2pflock.testing.history import Forger, History, SeededSigner
from p2pflock.testing.tiny_task import build_spec
from tests.provenance_kit import FAIL, OPEN, PASS, BulkyTrainer, judge, verdicts

ROUNDS = 2
STRANGER = SeededSigner(77)


class Forging(Forger):
    """One change in one round, from a function for each hook."""

    def __init__(self, round_, *, quorum=False, headers=None, cards=None, record=None, attestation=None):
        self.round = round_
        self.has_quorum = quorum
        self._hooks = {"headers": headers, "cards": cards, "record": record, "attestation": attestation}

    def _ask(self, hook, round_, value, history=None):
        change = self._hooks[hook]
        return value if change is None or round_ != self.round else change(value, history)

    def on_headers(self, history, round_, headers):
        return self._ask("headers", round_, headers, history)

    def on_cards(self, history, round_, cards):
        return self._ask("cards", round_, cards, history)

    def on_record(self, history, record):
        return self._ask("record", record.round, record, history)

    def on_attestation(self, record, attestation):
        return self._ask("attestation", record.round, attestation)


def forge(round_=ROUNDS, **changes) -> tuple[History, set[str]]:
    history = histories.build_now(rounds=ROUNDS, forger=Forging(round_, **changes))
    return history, set(judge(history).failed)


# --- an outsider ------------------------------------------------------------------------------------------
def unsigned(headers, _):
    return [replace(headers[0], signature=b""), *headers[1:]]


def signatures_swapped(headers, _):
    a, b, *rest = headers
    return [replace(a, signature=b.signature), replace(b, signature=a.signature), *rest]


def signed_by_a_stranger(headers, _):
    header = replace(headers[0], signature=STRANGER.sign_bls(headers[0].signing_root()))
    return [header, *headers[1:]]


def claims_more_samples(headers, _):
    return [replace(headers[0], samples=headers[0].samples * 2), *headers[1:]]


@pytest.mark.parametrize("round_", [1, ROUNDS], ids=["below", "last"])
@pytest.mark.parametrize("change", [unsigned, signatures_swapped, signed_by_a_stranger, claims_more_samples])
def test_an_outsider_touches_a_contribution(change, round_: int) -> None:
    assert forge(round_, headers=change)[1] == {"authorship", "lineage"}


def test_an_outsider_touches_a_scorecard() -> None:
    def praise(cards, _):
        scores = tuple(replace(score, cosine_micro=1_000_000) for score in cards[0].scores)
        return [replace(cards[0], scores=scores), *cards[1:]]

    assert forge(cards=praise)[1] == {"authorship", "lineage"}


def order_swapped(record, _):
    a, b, *rest = record.contributions
    return replace(record, contributions=(b, a, *rest))


def headers_swapped(record, _):
    a, b, *rest = record.contributions
    return replace(record, contributions=(replace(a, header=b.header), replace(b, header=a.header), *rest))


@pytest.mark.parametrize("round_", [1, ROUNDS], ids=["below", "last"])
@pytest.mark.parametrize(
    ("change", "more"), [(order_swapped, set()), (headers_swapped, {"authorship"})], ids=["lines", "headers"]
)
def test_two_contributions_swapped(change, more: set[str], round_: int) -> None:
    failed = forge(round_, record=change)[1]
    # Folding in another order may give other bits; whether it does is not the point here.
    assert failed - {"recomputed"} == {"lineage", "participation"} | more


def edit(record, history, field):
    first = record.contributions[0] if record.contributions else None
    values = {
        "task": bytes(32),
        "epoch": record.epoch + 1,
        "round": record.round + 1,
        "parent": history.decisions[0].cid if record.round > 1 else None,
        "parent_attestation": None,
        "committee": record.parent,
        "contributions": (replace(first, weight=first.weight + 1), *record.contributions[1:]),
        "absent": (*record.absent, Absentee(3, 0)),
        "scorecards": record.scorecards[1:],
        "trust": (*record.trust[:-1], replace(record.trust[-1], earned_micro=1)),
        "model_hash": bytes(32),
        "weights": CID.of_raw(b"another"),
        "rewards": (replace(record.rewards[0], cumulative_wei=10**30), *record.rewards[1:]),
        "rewards_root": bytes(31) + b"\1",
    }
    return replace(record, **{field: values[field]})


FIELDS = tuple(field.name for field in fields(histories.RoundRecord))


@pytest.mark.parametrize("field", FIELDS)
def test_any_field_of_a_record_edited(field: str) -> None:
    """Lineage fails, unless the edit makes the history unreadable: then integrity does."""
    history, failed = forge(record=lambda record, history: edit(record, history, field))
    if field == "committee":  # names a record where a committee belongs: nothing left to check a quorum against
        assert "integrity" in failed
    else:
        assert "lineage" in failed
    found = verdicts(judge(history))
    assert found["lineage"] is not PASS
    if field in {"contributions", "absent", "scorecards", "trust", "rewards", "rewards_root"}:
        assert found["participation"] is FAIL


@pytest.mark.parametrize("field", [f for f in FIELDS if f != "parent_attestation"])
def test_any_field_edited_in_the_middle(field: str) -> None:
    """Later rounds go on from the edited record, signed by everybody."""
    _, failed = forge(1, record=lambda record, history: edit(record, history, field))
    assert failed & {"lineage", "integrity"}


def without(attestation, _):
    return None


def spoilt(attestation, _):
    return replace(attestation, signature=attestation.signature[:-1] + bytes([attestation.signature[-1] ^ 1]))


def fewer(attestation, _):
    return replace(attestation, signers=b"\x07")


@pytest.mark.parametrize("round_", [1, ROUNDS], ids=["below", "last"])
@pytest.mark.parametrize("change", [without, spoilt, fewer])
def test_an_attestation_is_touched(change, round_: int) -> None:
    assert forge(round_, attestation=change)[1] == {"lineage"}


def test_an_invented_committee_is_foreign() -> None:
    """Everything is consistent and signed, by keys that the attacker made up."""
    history = histories.build_now(rounds=ROUNDS, first_key=500)
    real = histories.build_now(rounds=ROUNDS)
    trust = provenance.Trust(frozenset({real.committee.cid()}))
    assert judge(history, trust=trust).failed == ("lineage",)
    # It cannot hide behind a chain that has not seen the round yet.
    assert judge(history, trust=provenance.Trust(trust.committees, {})).failed == ("lineage",)
    assert verdicts(judge(history, trust=provenance.Trust()))["lineage"] is OPEN


def test_a_poisoned_genesis_of_the_right_committee() -> None:
    """Nobody signs genesis, so anybody can write one for any committee."""

    def poison(record, history):
        return replace(record, model_hash=b"p" * 32, weights=history.put_file(b"poison"))

    history = histories.build_now(rounds=0, forger=Forging(0, record=poison))
    found = verdicts(judge(history))
    assert found["integrity"] is FAIL and found["recomputed"] is FAIL
    assert found["lineage"] is OPEN


# --- any bit, all ids redone ------------------------------------------------------------------------------
def relink(history: History, target: CID, data: bytes) -> tuple[dict[CID, bytes], CID]:
    """All blocks after `target` became `data` and everything above was made to name it; the new checkpoint."""
    known = {cid.to_bytes(): cid for cid in history.store.blocks()}
    renamed: dict[CID, CID] = {}
    blocks: dict[CID, bytes] = {}

    def redo(cid: CID) -> CID:
        if cid not in renamed:
            block = data if cid == target else history.store.get(cid)
            for name in [name for name in known if name in block]:
                block = block.replace(name, redo(known[name]).to_bytes())
            renamed[cid] = CID.of(cid.codec, block)
            blocks[renamed[cid]] = block
        return renamed[cid]

    return blocks, redo(history.checkpoint)


@pytest.mark.parametrize("trainer", [None, BulkyTrainer], ids=["plain", "trees"])
def test_any_bit_with_all_ids_redone(trainer) -> None:
    """Hashes hold again, signatures do not: no verdict on the quorum survives."""
    history = histories.build_now(
        rounds=2, peers=2, absent=[], trainer=trainer() if trainer else None, snapshots=()
    )
    rng = random.Random(7)
    targets = list(history.store.blocks())
    unreadable = 0
    for target in targets:
        data = bytearray(history.store.get(target))
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        blocks, checkpoint = relink(history, target, bytes(data))

        def get(cid: CID, blocks: dict[CID, bytes] = blocks) -> bytes:
            if cid not in blocks:
                raise provenance.InvalidMessageError("not here")
            return blocks[cid]

        report = judge(
            history, get=get, checkpoint=checkpoint, trainer=trainer() if trainer else None,
            attestation=replace(history.head.attestation, record=_record_of(get, checkpoint, history)),
        )
        if report.failed:
            assert {"lineage", "integrity"} & set(report.failed), target
        else:  # the bit was in a link, which now names a block that nobody has: nothing fails, and nothing passes
            unreadable += 1
            assert verdicts(report)["lineage"] is OPEN, target
    assert unreadable < len(targets) / 4


def _record_of(get, checkpoint: CID, history: History) -> CID:
    try:
        return provenance.Manifest.decode(get(checkpoint)).record
    except provenance.InvalidMessageError:
        return history.head.cid


# --- a quorum that colludes -------------------------------------------------------------------------------
def promote(record, _):
    first = record.contributions[0]
    changed = replace(first, judgement=int(Judgement.GATED), weight=0)
    return replace(record, contributions=(changed, *record.contributions[1:]))


def overweigh(record, _):
    first = record.contributions[0]
    return replace(record, contributions=(replace(first, weight=10**6), *record.contributions[1:]))


def pay_more(record, _):
    rewards = (replace(record.rewards[0], cumulative_wei=10**30), *record.rewards[1:])
    root = histories.settlement.compute_rewards_root(record.task, rewards)
    return replace(record, rewards=rewards, rewards_root=root)


def pay_a_stranger(record, _):
    rewards = tuple(sorted((*record.rewards, Reward(STRANGER.address, 1)), key=lambda r: r.address))
    return replace(record, rewards=rewards, rewards_root=histories.settlement.compute_rewards_root(record.task, rewards))


def trust_more(record, _):
    return replace(record, trust=tuple(replace(t, earned_micro=999) for t in record.trust))


def nobody(record, _):
    return replace(
        record, contributions=(), scorecards=(), absent=tuple(Absentee(seat, 0) for seat in range(4))
    )


def half(record, _):
    return replace(record, contributions=record.contributions[:2], absent=(Absentee(2, 0), Absentee(3, 0)))


def one_twice(record, _):
    a, _b, *rest = record.contributions
    return replace(record, contributions=(a, a, *rest))


def seat_beyond(record, _):
    return replace(record, absent=(*record.absent, Absentee(9, 0)))


def fewer_cards(record, _):
    return replace(record, scorecards=record.scorecards[:2])


def card_twice(record, _):
    return replace(record, scorecards=(*record.scorecards, record.scorecards[0]))


@pytest.mark.parametrize(
    ("change", "round_"),
    [(promote, 2), (overweigh, 2), (pay_more, 1), (pay_more, 2), (pay_a_stranger, 2), (trust_more, 1), (trust_more, 2),
     (nobody, 1), (nobody, 2), (half, 2), (one_twice, 2), (seat_beyond, 2), (fewer_cards, 2), (card_twice, 2)],
)  # fmt: skip
def test_a_quorum_bends_the_settlement(change, round_: int) -> None:
    failed = forge(round_, quorum=True, record=change)[1]
    assert "participation" in failed
    assert "lineage" not in failed
    assert "integrity" not in failed


def test_a_quorum_settles_by_the_rules_without_a_quorum_of_contributions() -> None:
    report = judge(histories.build_now(rounds=ROUNDS, absent=[(ROUNDS, 2), (ROUNDS, 3)]))
    assert report.failed == ("participation",)
    assert "contributions of less than a quorum" in report.findings["participation"].reason


def test_a_quorum_settles_by_the_rules_without_a_quorum_of_scorecards() -> None:
    assert forge(quorum=True, cards=lambda cards, _: cards[:2])[1] == {"participation"}


def test_a_quorum_takes_scorecards_of_another_round() -> None:
    kept = []

    def replay(cards, _):
        return kept[0]

    class Replaying(Forging):
        def on_cards(self, history, round_, cards):
            kept.append(cards)
            return super().on_cards(history, round_, cards)

    history = histories.build_now(rounds=ROUNDS, forger=Replaying(ROUNDS, quorum=True, cards=replay))
    assert judge(history).failed == ("authorship",)


def test_a_quorum_takes_headers_of_another_round() -> None:
    def replay(record, history):
        before = history.decisions[1].record.contributions
        return replace(record, contributions=before)

    failed = forge(quorum=True, record=replay)[1]
    assert {"authorship", "participation"} <= failed


def test_a_quorum_lets_a_stranger_in() -> None:
    def admit(record, history):
        header = histories.ContributionHeader.decode(history.store.get(record.contributions[0].header))
        bare = replace(header, peer=STRANGER.peer_id, signature=b"")
        forged = replace(bare, signature=STRANGER.sign_bls(bare.signing_root()))
        first = replace(record.contributions[0], header=history.put(forged.encode()))
        return replace(record, contributions=(first, *record.contributions[1:]))

    assert forge(quorum=True, record=admit)[1] == {"authorship", "participation"}


def test_a_quorum_lets_a_stranger_score() -> None:
    def admit(record, history):
        card = histories.Scorecard.decode(history.store.get(record.scorecards[0]))
        root = histories.compute_seed_root(card.task, card.round, card.parent)
        bare = replace(card, validator=STRANGER.peer_id, seed_proof=STRANGER.sign_bls(root), signature=b"")
        forged = replace(bare, signature=STRANGER.sign_bls(bare.signing_root()))
        return replace(record, scorecards=(*record.scorecards, history.put(forged.encode())))

    assert forge(quorum=True, record=admit)[1] == {"authorship", "participation"}


def test_a_quorum_lets_a_member_choose_its_shard() -> None:
    def choose(headers, history):
        return [history.sign_header(replace(headers[0], shard=headers[1].shard)), *headers[1:]]

    assert forge(quorum=True, headers=choose)[1] == {"participation"}


def test_a_member_lies_about_the_size_of_its_payload() -> None:
    def lie(headers, history):
        return [history.sign_header(replace(headers[0], payload_bytes=headers[0].payload_bytes + 1)), *headers[1:]]

    assert forge(quorum=True, headers=lie)[1] == {"integrity", "recomputed"}


def test_a_validator_chooses_its_public_batch() -> None:
    def grind(cards, history):
        return [history.sign_card(replace(cards[0], seed_proof=cards[1].seed_proof)), *cards[1:]]

    assert forge(quorum=True, cards=grind)[1] == {"authorship"}


def test_a_scorecard_says_two_things_about_one_contribution() -> None:
    def double(cards, history):
        first = cards[0].scores[0]
        scores = (*cards[0].scores, Score(first.contribution, False, -1, 0))
        return [history.sign_card(replace(cards[0], scores=scores)), *cards[1:]]

    assert forge(quorum=True, cards=double)[1] == {"participation"}


@pytest.mark.parametrize("round_", [1, ROUNDS], ids=["below", "last"])
def test_a_quorum_signs_a_model_that_is_not_the_fold(round_: int) -> None:
    """Every signature holds and every block is whole: only folding again tells."""

    def plant(record, history):
        data = b"a trojan horse"
        return replace(record, model_hash=BulkyTrainer._hash(data), weights=history.put_file(data))

    history = histories.build_now(rounds=ROUNDS, forger=Forging(round_, quorum=True, record=plant))
    history.put_file(b"a trojan horse")
    assert judge(history).failed == ("recomputed",)


def test_a_payload_replaced_by_a_quorum() -> None:
    """The header names another payload, signed again by its author, and the record keeps the old model."""

    class Replacing(Forging):
        def on_record(self, history, record):
            if record.round != ROUNDS:
                return record
            # Of the round before: one of this round would be a copy, which participation notices too.
            before = history.head.record.contributions[1].header
            one, other = (
                histories.ContributionHeader.decode(history.store.get(cid))
                for cid in (record.contributions[0].header, before)
            )
            forged = replace(one, payload=other.payload, payload_bytes=other.payload_bytes)
            forged = history.sign_header(forged)
            first = replace(record.contributions[0], header=history.put(forged.encode()))
            cards = []
            for cid in record.scorecards:
                card = histories.Scorecard.decode(history.store.get(cid))
                scores = tuple(
                    replace(s, contribution=forged.cid()) if s.contribution == one.cid() else s for s in card.scores
                )
                cards.append(history.put(history.sign_card(replace(card, scores=scores)).encode()))
            return replace(record, contributions=(first, *record.contributions[1:]), scorecards=tuple(cards))

    history = histories.build_now(rounds=ROUNDS, forger=Replacing(ROUNDS, quorum=True))
    assert judge(history).failed == ("recomputed",)


def test_a_quorum_starts_from_another_genesis() -> None:
    trojan = build_spec(rounds=ROUNDS, seed=2)  # same layout, other weights

    class Planting(Forger):
        has_quorum = True

    spec = build_spec(rounds=ROUNDS)
    history = histories.build_now(
        rounds=ROUNDS, spec=spec, trainer=histories.FakeTrainer(trojan), forger=Planting()
    )
    assert judge(history).failed == ("recomputed",)
    # A task whose genesis depends on the machine: no accusation, but no PASS.
    found = verdicts(judge(history, is_exact=False))
    assert found["recomputed"] is OPEN
    assert found["lineage"] is PASS


def test_genesis_pays_somebody() -> None:
    def pay(record, _):
        rewards = (Reward(STRANGER.address, 10**18),)
        root = histories.settlement.compute_rewards_root(record.task, rewards)
        return replace(record, rewards=rewards, rewards_root=root)

    def promise(record, _):
        return replace(pay(record, _), rewards=())

    def favour(record, history):
        return replace(record, trust=(Trust(history.committee.seats[0].peer, 1_000_000, 1_000_000, 1_000_000),))

    for change in (pay, promise, favour):
        assert forge(0, quorum=True, record=change)[1] == {"participation"}


def test_genesis_claims_a_quorum_of_a_parent() -> None:
    borrowed = histories.build_now(rounds=1).head.attestation

    def claim(record, _):
        return replace(record, parent_attestation=borrowed)

    assert forge(0, quorum=True, record=claim)[1] == {"lineage"}
    assert judge(histories.build_now(rounds=0), attestation=borrowed).failed == ("lineage",)


def test_genesis_names_the_committee_of_another_epoch() -> None:
    def leap(record, history):
        history.committee = replace(history.committee, epoch=5)
        history.put(history.committee.to_block().encode())
        return replace(record, committee=history.committee.cid())

    history = histories.build_now(rounds=ROUNDS, forger=Forging(0, quorum=True, record=leap))
    report = judge(history, trust=provenance.Trust(frozenset({history.committee.cid()})))
    assert report.findings["lineage"].reason == "round 0 names the committee of another task or epoch"
    assert report.failed == ("lineage",)


def test_the_committee_changes_within_an_epoch() -> None:
    """A quorum of the old one appoints itself with other stakes."""

    def appoint(record, history):
        seats = tuple(replace(seat, weight_wei=seat.weight_wei + i) for i, seat in enumerate(history.committee.seats))
        history.committee = replace(history.committee, seats=seats)
        history.put(history.committee.to_block().encode())
        return replace(record, committee=history.committee.cid())

    history = histories.build_now(rounds=ROUNDS, forger=Forging(1, quorum=True, record=appoint))
    old = histories.build_now(rounds=ROUNDS).committee
    both = provenance.Trust(frozenset({old.cid(), history.committee.cid()}))
    report = judge(history, trust=both)
    assert report.findings["lineage"].reason == "round 1: another committee in the same epoch"
    assert "lineage" in judge(history, trust=provenance.Trust(frozenset({old.cid()}))).failed


def test_epochs_do_not_go_back() -> None:
    def leap(record, history):
        history.committee = replace(history.committee, epoch=5)
        history.put(history.committee.to_block().encode())
        return replace(record, epoch=5, committee=history.committee.cid())

    def back(history, record):
        if record.round == 1:
            return leap(record, history)
        if record.round == 2:
            history.committee = replace(history.committee, epoch=3)
            history.put(history.committee.to_block().encode())
            return replace(record, epoch=3, committee=history.committee.cid())
        return record

    class Turning(Forger):
        has_quorum = True

        def on_record(self, history, record):
            return back(history, record)

    history = histories.build_now(rounds=2, forger=Turning())
    everyone = frozenset(d.record.committee for d in history.decisions)
    report = judge(history, trust=provenance.Trust(everyone))
    assert report.findings["lineage"].reason == "round 2 belongs to an earlier epoch than its parent"


def test_a_committee_that_is_none() -> None:
    """A committee block with a seat without weight, or one key twice, is no committee at all."""

    def hollow(record, history):
        block = history.committee.to_block()
        seats = (block.seats[0], block.seats[0])
        return replace(record, committee=history.put(replace(block, seats=seats).encode()))

    failed = forge(record=hollow)[1]
    assert "integrity" in failed


def test_what_a_quorum_may_decide() -> None:
    """The limit: a quorum that leaves a member out and calls it silent breaks no rule that anybody can check."""
    history = histories.build_now(rounds=ROUNDS, absent=[(ROUNDS, 3)])
    assert judge(history).failed == ()


# --- panels ---------------------------------------------------------------------------------------------------
LARGE = 27  # seats, the least of which not everybody scores everybody


class Talkative(Forger):
    """Every validator scores every contribution, and settlement counts all of it by stake."""

    has_quorum = True
    keeps_panels = False


def test_a_large_committee_keeps_to_the_panels_that_were_drawn() -> None:
    history = histories.build_now(rounds=1, peers=LARGE)
    cards = [Scorecard.decode(history.store.get(cid)) for cid in history.head.record.scorecards]
    assert {len(card.scores) for card in cards} < set(range(LARGE))
    assert verdicts(judge(history)) == dict.fromkeys(provenance.QUESTIONS, PASS)


def test_a_quorum_cannot_score_beyond_its_panels() -> None:
    report = judge(histories.build_now(rounds=1, peers=LARGE, forger=Talkative()))
    assert report.failed == ("participation",)
    assert "not drawn" in report.findings["participation"].reason
