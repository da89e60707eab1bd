"""Five verdicts: PASS where all was looked at, NOT CHECKED where something is missing, FAIL on any flipped bit."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest

from p2pflock.errors import UnavailableError
from p2pflock.primitives.cid import CID
from p2pflock.protocol import provenance
from p2pflock.protocol.messages import RoundRecord
from p2pflock.protocol.provenance import Trust
from p2pflock.testing import history as histories
from p2pflock.testing.history import History
from p2pflock.testing.tiny_task import build_spec
from tests.provenance_kit import FAIL, OPEN, PASS, BulkyTrainer, judge, trust_of, verdicts

ALL_PASS = dict.fromkeys(provenance.QUESTIONS, PASS)


@pytest.fixture(scope="module")
def plain() -> History:
    return histories.build_now(rounds=3, with_chain=True, absent=[(2, 1)], snapshots=(0, 1))


@pytest.fixture(scope="module")
def short() -> History:
    """With a block of every kind, and few of them."""
    return histories.build_now(rounds=2, absent=[(2, 1)], snapshots=(0, 1))


@pytest.fixture(scope="module")
def bulky() -> History:
    """Weights and payloads are trees of several blocks."""
    return histories.build_now(rounds=2, trainer=BulkyTrainer(), peers=2, snapshots=(0, 1))


def judge_bulky(history: History, get=None) -> provenance.Report:
    return judge(history, get=get, trainer=BulkyTrainer())


# --- no false alarm ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments",
    [
        {"rounds": 1},
        {"rounds": 1, "peers": 1},
        {"rounds": 2, "peers": 2, "with_chain": True},
        {"rounds": 3, "with_chain": True},
        {"rounds": 4, "absent": [(1, 0), (2, 3), (4, 2)]},
        {"rounds": 2, "peers": 7, "absent": [(1, 0), (1, 6), (2, 3)], "first_key": 90},
        {"rounds": 2, "snapshots": ()},
        {"rounds": 3, "snapshots": (0, 1, 2), "spec": build_spec(rounds=9, seed=4)},
        {"rounds": 12, "peers": 3},
    ],
    ids=str,
)
def test_an_honest_history_passes(arguments) -> None:
    history = histories.build_now(**arguments)
    report = judge(history)
    assert verdicts(report) == ALL_PASS
    assert report.record == history.head.record
    assert report.failed == ()


def test_files_that_are_trees_pass(bulky: History) -> None:
    assert verdicts(judge_bulky(bulky)) == ALL_PASS


def test_histories_are_deterministic() -> None:
    assert histories.build_now(rounds=2).checkpoint == histories.build_now(rounds=2).checkpoint


# --- roots of trust ---------------------------------------------------------------------------------------
def test_without_a_root_of_trust_lineage_is_not_checked(plain: History) -> None:
    report = judge(plain, trust=Trust())
    assert verdicts(report) == ALL_PASS | {"lineage": OPEN}
    assert "name the committee or the chain" in report.findings["lineage"].reason


def test_a_round_that_is_not_anchored_is_not_checked(plain: History) -> None:
    for gone in plain.anchors:
        anchors = {k: v for k, v in plain.anchors.items() if k != gone}
        report = judge(plain, trust=Trust(frozenset({plain.committee.cid()}), anchors))
        assert verdicts(report) == ALL_PASS | {"lineage": OPEN}
        assert report.findings["lineage"].reason == f"round {gone} is not anchored yet"


def test_another_record_on_chain_fails_even_below_one_that_is_not_anchored(plain: History) -> None:
    for round_ in plain.anchors:
        anchors = {round_: hashlib.sha256(b"another").digest()}
        report = judge(plain, trust=Trust(frozenset({plain.committee.cid()}), anchors))
        assert report.failed == ("lineage",)


@pytest.mark.parametrize("anchors", [None, {}], ids=["file", "chain"])
@pytest.mark.parametrize("trusted", [frozenset(), frozenset({CID.of_dag_cbor(b"another")})], ids=["nobody", "another"])
def test_a_committee_that_is_not_trusted_fails(plain: History, trusted, anchors) -> None:
    assert judge(plain, trust=Trust(trusted, anchors)).failed == ("lineage",)


def test_genesis_alone_passes_nothing_that_nobody_signed() -> None:
    history = histories.build_now(rounds=0)
    assert verdicts(judge(history)) == {
        "integrity": PASS, "authorship": OPEN, "lineage": OPEN, "participation": OPEN, "recomputed": PASS,
    }


# --- the attestation --------------------------------------------------------------------------------------
def test_the_quorum_of_the_checkpoint_itself(plain: History) -> None:
    good = plain.head.attestation
    assert good is not None
    flipped = bytes([good.signature[0] ^ 1]) + good.signature[1:]
    wrong = {
        "removed": None,
        "signature": replace(good, signature=flipped),
        "another signature": replace(good, signature=plain.decisions[1].attestation.signature),
        "fewer signers": replace(good, signers=b"\x07"),
        "nobody": replace(good, signers=b""),
        "a seat too many": replace(good, signers=b"\x1f"),
        "longer bitmap": replace(good, signers=good.signers + b"\0"),
        "another view": replace(good, view=1),
        "of the round before": plain.decisions[2].attestation,
        "infinity": replace(good, signature=b"\xc0" + bytes(95)),
    }
    for name, attestation in wrong.items():
        assert judge(plain, attestation=attestation).failed == ("lineage",), name


@pytest.mark.parametrize(("seats", "verdict"), [((0, 1, 2), PASS), ((1, 3), FAIL)])
def test_a_quorum_is_more_than_two_thirds(plain: History, seats, verdict) -> None:
    head = plain.decisions[-2].head
    attestation = plain.head.attestation
    bitmap = attestation.bitmap(frozenset(seats))
    if verdict is PASS:
        attestation = histories.attest(plain, plain.head.record, head, seats)
        assert attestation.signers == bitmap
    else:
        attestation = replace(attestation, signers=bitmap)
    assert judge(plain, attestation=attestation).findings["lineage"].verdict is verdict


# --- every block ------------------------------------------------------------------------------------------
def reaching(history: History) -> list[CID]:
    return list(history.store.blocks())


def flipping(history: History, target: CID):
    """The store with one bit of one block flipped, at a place that follows from its id."""
    data = bytearray(history.store.get(target))
    data[int.from_bytes(target.digest[:4], "big") % len(data)] ^= 1 << target.digest[4] % 8
    return lambda cid: bytes(data) if cid == target else history.store.get(cid)


@pytest.mark.parametrize("which", ["short", "bulky"])
def test_a_flipped_bit_in_any_block_fails_integrity(which: str, request: pytest.FixtureRequest) -> None:
    history = request.getfixturevalue(which)
    judged = judge if which == "short" else judge_bulky
    blocks = reaching(history)
    assert len(blocks) >= 25
    for target in blocks:
        report = judged(history, get=flipping(history, target))
        found = verdicts(report)
        assert found["integrity"] is FAIL, target
        assert str(target) in report.findings["integrity"].reason
        # One bad block is no forged signature: only the fold may fail along with it.
        assert set(report.failed) <= {"integrity", "recomputed"}, target


def kinds(history: History) -> dict[CID, str]:
    """What each block is, by the object that names it."""
    found = {history.checkpoint: "manifest", history.spec.cid(): "spec", history.committee.cid(): "committee"}
    for decision in history.decisions:
        found[decision.cid] = "record"
        found.update(dict.fromkeys((c.header for c in decision.record.contributions), "header"))
        found.update(dict.fromkeys(decision.record.scorecards, "card"))
        found[decision.record.weights] = "snapshot"
    found[history.head.record.weights] = "weights"
    return found


MISSING = {
    "spec": {"integrity"},  # the fold in this process needs none
    "committee": {"integrity", "authorship", "lineage", "participation"},
    "record": {"integrity", "authorship", "lineage", "participation", "recomputed"},
    "header": {"integrity", "authorship", "participation", "recomputed"},
    "card": {"integrity", "authorship", "participation"},
    "weights": {"integrity"},
    "payload": {"integrity", "recomputed"},
    "snapshot": set(),  # the payloads give it
}


def test_a_missing_block_is_never_a_pass_and_never_a_fail(short: History) -> None:
    known = kinds(short)
    seen = set()
    for target in reaching(short):
        kind = known.get(target, "payload")
        seen.add(kind)

        def get(cid: CID, target: CID = target) -> bytes:
            if cid == target:
                raise UnavailableError("gone")
            return short.store.get(cid)

        report = judge(short, get=get)
        assert report.failed == (), kind
        found = {name for name, verdict in verdicts(report).items() if verdict is OPEN}
        assert found == (set(provenance.QUESTIONS) if kind == "manifest" else MISSING[kind]), kind
        if found:
            assert str(target) in report.findings["integrity"].reason
    assert seen == {*MISSING, "manifest"}


def test_wrong_outranks_missing(short: History) -> None:
    blocks = reaching(short)
    known = kinds(short)
    payloads = [cid for cid in blocks if cid not in known]
    gone, bad = payloads[0], payloads[-1]
    flipped = flipping(short, bad)

    def get(cid: CID) -> bytes:
        if cid == gone:
            raise UnavailableError("gone")
        return flipped(cid)

    assert judge(short, get=get).failed[0] == "integrity"
    assert judge(short, get=get).findings["integrity"].reason == f"block {bad} does not hash to its id"


# --- the manifest -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "edit",
    [
        {"model_hash": bytes(32)},
        {"round": 9},
        {"task": bytes(32)},
        {"weights": CID.of_raw(b"")},
        {"spec": CID.of_dag_cbor(b"another")},
    ],
    ids=lambda edit: next(iter(edit)),
)
def test_a_manifest_that_names_another_checkpoint(plain: History, edit) -> None:
    class Forger(histories.Forger):
        def on_manifest(self, manifest):
            return replace(manifest, **edit)

    history = histories.build_now(rounds=2, forger=Forger())
    assert "integrity" in judge(history).failed


@pytest.mark.parametrize("field", ["record", "spec"])
def test_one_checkpoint_has_one_id(field: str) -> None:
    """The same block under another codec would give the same checkpoint another id."""

    class Forger(histories.Forger):
        def on_manifest(self, manifest):
            cid = getattr(manifest, field)
            return replace(manifest, **{field: CID(0x55, cid.digest)})

    history = histories.build_now(rounds=1, forger=Forger())

    def get(cid: CID) -> bytes:
        return history.store.get(CID(0x71, cid.digest) if history.store.has(CID(0x71, cid.digest)) else cid)

    assert judge(history, get=get).failed == ("integrity",)


def test_what_is_no_checkpoint(plain: History) -> None:
    for cid in (plain.head.cid, plain.committee.cid(), plain.head.record.weights):
        report = judge(plain, checkpoint=cid)
        assert report.failed == ("integrity",)
        assert set(verdicts(report).values()) == {FAIL, OPEN}


# --- absurd sizes -----------------------------------------------------------------------------------------
def test_a_very_long_history_of_nothing_passes_nothing() -> None:
    """Thousands of records that name nobody: no recursion, and two rounds in memory."""
    history = histories.build_now(rounds=0)
    record = history.head.record
    for _ in range(3000):
        record = replace(record, round=record.round + 1, parent=record.cid())
        history.put(record.encode())
    manifest = provenance.Manifest(
        record.task, history.spec.cid(), record.round, record.cid(), record.weights, record.model_hash
    )
    report = provenance.check(history.put(manifest.encode()), history.store.get, None, trust_of(history))
    assert report.failed == ("lineage", "participation")
    assert report.findings["authorship"].verdict is OPEN


@pytest.mark.parametrize("round_", [1, 3, 9])
def test_rounds_are_counted_from_genesis(round_: int) -> None:
    """A child of round 1 that claims to be any round but 2."""
    history = histories.build_now(rounds=2)
    head = history.decisions[1].record
    record = replace(head, round=round_, parent=head.cid())
    history.put(record.encode())
    manifest = provenance.Manifest(
        record.task, history.spec.cid(), record.round, record.cid(), record.weights, record.model_hash
    )
    report = provenance.check(
        history.put(manifest.encode()), history.store.get, history.decisions[1].attestation, trust_of(history)
    )
    assert "lineage" in report.failed
    assert report.findings["lineage"].reason == f"round {record.round} does not follow its parent"


def test_genesis_has_no_parent() -> None:
    history = histories.build_now(rounds=0)
    record = replace(history.head.record, parent=CID.of_dag_cbor(b"nobody has it"))
    history.put(record.encode())
    manifest = provenance.Manifest(
        record.task, history.spec.cid(), 0, record.cid(), record.weights, record.model_hash
    )
    report = provenance.check(history.put(manifest.encode()), history.store.get, None, trust_of(history))
    assert report.failed == ("lineage",)


def test_an_orphan_does_not_lead_to_genesis() -> None:
    history = histories.build_now(rounds=1)
    orphan = replace(history.head.record, parent=None)
    history.put(orphan.encode())
    manifest = provenance.Manifest(
        orphan.task, history.spec.cid(), 1, orphan.cid(), orphan.weights, orphan.model_hash
    )
    report = provenance.check(
        history.put(manifest.encode()), history.store.get, history.head.attestation, trust_of(history)
    )
    assert report.findings["lineage"].reason == "the records do not lead to genesis"
    assert "lineage" in report.failed


def test_one_large_file_is_hashed_once_however_often_it_is_named() -> None:
    """Attack: every record names the same weights, to have them hashed again and again."""
    history = histories.build_now(rounds=0)
    first = record = history.head.record
    for _ in range(20):
        record = replace(record, round=record.round + 1, parent=record.cid())
        history.put(record.encode())
    manifest = provenance.Manifest(
        record.task, history.spec.cid(), record.round, record.cid(), record.weights, record.model_hash
    )
    reads: list[CID] = []

    def get(cid: CID) -> bytes:
        reads.append(cid)
        return history.store.get(cid)

    provenance.check(history.put(manifest.encode()), get, None, trust_of(history))
    assert isinstance(first, RoundRecord)
    assert reads.count(first.weights) <= 2  # as a snapshot and as the checkpoint's own
