"""Gossip that comes in: judged once, counted by reason, early messages bounded."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from p2pflock.node import intake as intake_module
from p2pflock.node.context import TaskFacts
from p2pflock.node.intake import Intake
from p2pflock.node.ledger import Decision
from p2pflock.ports import Verdict
from p2pflock.primitives import bls
from p2pflock.protocol.messages import NIL, ContributionHeader, Proposal, Scorecard, Vote


class Round:
    """What Intake knows of a driver."""

    def __init__(self, beacon):
        self.beacon = beacon
        self.got = []
        self.has_room = True
        self.supported = set()
        self.machine = SimpleNamespace(is_wanted=lambda message: message in self.supported)

    def deliver(self, message):
        self.got.append(message)


@pytest.fixture
def intake(members):
    head = Decision(members.genesis, members.genesis.cid(), None, members.task)
    ledger = SimpleNamespace(head=head)
    facts = TaskFacts.of(members.spec, snapshot_every_rounds=1)
    return Intake(SimpleNamespace(committee=members.committee, ledger=ledger, facts=facts))


@pytest.fixture
def entered(members, intake):
    driver = Round(members.beacon)
    intake.enter(driver)
    return intake, driver


def judge(intake, message, author=b"somebody"):
    return intake._judge(type(message), author, message.encode())


def test_good_messages_of_each_kind_are_delivered_once(members, entered):
    intake, driver = entered
    header = members.header(1)
    messages = [header, members.card(2, [header]), members.proposal(), members.vote(3, members.record())]
    assert [judge(intake, message) for message in messages] == [Verdict.ACCEPT] * 4
    assert driver.got == messages
    assert judge(intake, header, b"another forwarder") is Verdict.IGNORE
    assert len(driver.got) == 4
    assert not intake.refused


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda m: m.header(0, task=NIL), "another task"),
        (lambda m: m.header(0, parent=m.record(), round=1), "trained from another checkpoint"),
        (lambda m: m.header(0, shard=9), "not the shard"),
        (lambda m: m.header(0, signer=m.signers[1]), "bad signature"),
        (lambda m: m.header(0, peer=m.stranger.peer_id, signer=m.stranger), "not a member"),
        (lambda m: m.card(0, parent=m.record(), round=1), "scored at another checkpoint"),
        (lambda m: m.card(0, seed_proof=bytes(96)), "bad seed proof"),
        (lambda m: replace(m.proposal(), view=1), "bad signature"),
        (lambda m: m.proposal(record=replace(m.record(), parent=None)), "a record of another round"),
        (lambda m: m.vote(0, m.record(), rewards_root=b"r" * 32, record_digest=NIL), "a nil vote with rewards"),
        (lambda m: m.vote(0, m.record(), head=b"h" * 32), "bad signature"),
    ],
)
def test_refusals_name_their_reason(members, entered, make, reason):
    intake, driver = entered
    assert judge(intake, make(members)) is Verdict.REJECT
    assert driver.got == []
    (counted,) = intake.refused
    assert reason in counted


@pytest.mark.parametrize("kind", [ContributionHeader, Scorecard, Proposal, Vote])
@pytest.mark.parametrize("data", [b"", b"junk", b"\xa0", bytes(1 << 20)])
def test_what_does_not_decode_is_its_forwarders_fault(entered, kind, data):
    intake, _ = entered
    assert intake._judge(kind, b"somebody", data) is Verdict.REJECT


def test_reasons_are_counted_in_bounded_memory(intake):
    for number in range(500):
        intake._refuse(Verdict.REJECT, f"reason {number}")
    assert len(intake.refused) <= 65
    assert sum(intake.refused.values()) == 500


def test_late_messages_are_nobodys_fault(members, entered):
    intake, driver = entered
    assert judge(intake, members.header(0, round=0)) is Verdict.IGNORE
    assert (driver.got, dict(intake.refused)) == ([], {})


def test_early_messages_wait_for_their_round(members, intake):
    header = members.header(1)
    assert judge(intake, header, members.signers[2].peer_id) is Verdict.IGNORE  # round 1 has not begun
    driver = Round(members.beacon)
    intake.enter(driver)
    assert driver.got == [header]
    assert intake.early_bytes == 0


def test_a_round_later_than_the_next_is_not_kept(members, entered):
    intake, _ = entered
    judge(intake, members.header(1, round=3), members.signers[1].peer_id)
    assert intake.early_bytes == 0
    judge(intake, members.header(1, round=2), members.signers[1].peer_id)
    assert intake.early_bytes > 0


def test_strangers_have_nothing_kept(members, entered):
    """Attack: a thousand keys cost nothing; each would own a share of our memory."""
    intake, _ = entered
    for number in range(100):
        judge(intake, members.header(1, round=2), number.to_bytes(38, "big"))
    assert intake.early_bytes == 0


def test_what_a_member_may_have_kept_is_bounded_in_number_and_bytes(members, entered):
    intake, _ = entered
    author = members.signers[1].peer_id
    unsigned = replace(members.header(1), round=2)
    for number in range(intake_module.EARLY_AN_AUTHOR + 20):
        judge(intake, replace(unsigned, loss_micro=number), author)
    assert len(intake._early[author]) == intake_module.EARLY_AN_AUTHOR
    large = members.proposal()
    for number in range(8):
        judge(intake, replace(large, round=2, view=number, record=bytes(200 << 10)), author)
    assert 0 < intake.early_bytes <= intake_module.EARLY_BYTES_AN_AUTHOR


def test_early_messages_do_not_buy_signature_checks(members, entered, monkeypatch):
    intake, _ = entered
    monkeypatch.setattr(bls, "verify", lambda *_: pytest.fail("verified"))
    judge(intake, members.header(1, round=2), members.signers[1].peer_id)
    judge(intake, members.header(1, round=0), members.signers[1].peer_id)


@pytest.mark.parametrize("make", [lambda m, n: m.header(1, loss_micro=n), lambda m, n: m.card(1, [m.header(n % 4)]) if n < 4 else m.card(1, [m.header(0, loss_micro=n)])])
def test_a_slot_takes_no_more_versions_than_prove_the_fault(members, entered, make):
    intake, driver = entered
    for number in range(10):
        judge(intake, make(members, number))
    assert len(driver.got) == intake_module.VERSIONS_A_SLOT
    assert any("too many" in reason for reason in intake.refused)


def test_between_rounds_messages_of_the_next_wait(members, entered):
    intake, driver = entered
    intake.leave()
    assert judge(intake, members.header(0), members.signers[0].peer_id) is Verdict.IGNORE
    again = Round(members.beacon)
    intake.enter(again)
    assert (driver.got, again.got) == ([], [members.header(0)])


def test_what_finds_a_full_inbox_may_come_again(members, entered):
    intake, driver = entered
    header = members.header(1)
    driver.has_room = False
    assert judge(intake, header) is Verdict.IGNORE
    assert driver.got == []
    driver.has_room = True
    assert judge(intake, header) is Verdict.ACCEPT
    assert driver.got == [header]


def test_the_second_vote_of_a_liar_is_taken_again_once_others_stand_behind_it(members, entered):
    """Heard before it counts, it must not pass for known when it is sent again: a quorum may hang on it."""
    intake, driver = entered
    nil = members.vote(3, members.record(), record_digest=NIL, rewards_root=NIL)
    vote = members.vote(3, members.record())
    for message in (nil, vote, vote):
        assert judge(intake, message) is Verdict.ACCEPT
    assert judge(intake, vote) is Verdict.IGNORE  # nobody stands behind it, and it was delivered often enough
    assert judge(intake, nil) is Verdict.IGNORE
    driver.supported.add(vote)
    assert judge(intake, vote) is Verdict.ACCEPT
    assert driver.got == [nil, vote, vote, vote]
    assert judge(intake, vote) is Verdict.IGNORE  # now it counts
    assert driver.got == [nil, vote, vote, vote]
