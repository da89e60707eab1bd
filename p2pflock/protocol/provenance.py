"""Five questions about a checkpoint, each answered PASS, FAIL or NOT CHECKED with a reason.

    integrity       do all blocks that the checkpoint names hash to their ids, and the weights to the model hash?
    authorship      did the named peers sign their contributions and scorecards?
    lineage         do the records lead to genesis, each with a quorum of the committee we trust, and are they
                    what is anchored on chain?
    participation   is every seat accounted for, and do judgements, trust and rewards follow from the scorecards?
    recomputed      does folding the payloads again give the same weights?  (node/verification.py runs the fold)

Law: pure.  Blocks, the anchors seen on chain and the committee to trust are handed in; nothing here fetches.
A block that is missing is NOT CHECKED, a block that is wrong is FAIL, a FAIL outranks whatever is missing beside
it, and what could not be looked at is never called PASS: so genesis, which nobody signs, never passes authorship
or lineage.  PASS of lineage needs a root of trust from outside the checkpoint: anybody can invent a committee.

Each question stands on its own: a damaged payload says nothing about signatures.  An attacker who holds the keys
of a quorum passes authorship and lineage by definition; participation and recomputed still bind it to the rules.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields

from p2pflock.errors import FlockError, InvalidMessageError
from p2pflock.primitives import bls, dagcbor
from p2pflock.primitives.cid import CID
from p2pflock.protocol import settlement
from p2pflock.protocol.attestation import verify_attestation
from p2pflock.protocol.committee import (
    Committee,
    compute_beacon,
    compute_cohort,
    compute_panels,
    compute_seed_root,
)
from p2pflock.protocol.lineage import (
    MAX_WEIGHTS_BYTES,
    Get,
    Link,
    Reader,
    Spine,
    compute_head,
    read_links,
    read_spine,
)
from p2pflock.protocol.messages import (
    MAX_PAYLOAD_BYTES,
    MAX_ROSTER,
    NIL,
    Attestation,
    ContributionHeader,
    Manifest,
    RoundRecord,
    Scorecard,
)


class Verdict(str, enum.Enum):
    PASS = "PASS"  # noqa: S105
    FAIL = "FAIL"
    NOT_CHECKED = "NOT CHECKED"


@dataclass(frozen=True, slots=True)
class Finding:
    verdict: Verdict
    reason: str


QUESTIONS = ("integrity", "authorship", "lineage", "participation", "recomputed")


@dataclass(frozen=True, slots=True)
class Trust:
    """What the verifier brings along.

    Args:
        committees: ids of committee blocks it trusts, e.g. read from the chain or configured; None when it has
            no root of trust, which is not the same as trusting nobody.
        anchors: round -> record digest as anchored on chain; None when no chain was asked.
        lack: why there is no root of trust, for the reader of the verdict.
    """

    committees: frozenset[CID] | None = None
    anchors: Mapping[int, bytes] | None = None
    lack: str = "name the committee or the chain to trust"


@dataclass
class Report:
    """What was found.

    Attributes:
        record: the checkpoint's own, where it could be read.
        spine: the records that lead to it.
        is_dense: payloads of the task are averaged, never stored, and nobody scores them.
        findings: by question; complete once `check` has returned.
    """

    checkpoint: CID
    manifest: Manifest | None = None
    record: RoundRecord | None = None
    spine: Spine = field(default_factory=lambda: Spine((), is_whole=False))
    is_dense: bool = False
    findings: dict[str, Finding] = field(default_factory=dict)

    def conclude(self, question: str, verdict: Verdict, reason: str) -> None:
        """A FAIL stands, whatever is found later."""
        known = self.findings.get(question)
        if known is None or known.verdict is not Verdict.FAIL:
            self.findings[question] = Finding(verdict, reason)

    def fail(self, question: str, reason: str) -> None:
        self.conclude(question, Verdict.FAIL, reason)

    @property
    def failed(self) -> tuple[str, ...]:
        """Questions whose answer is FAIL, in order."""
        return tuple(q for q in QUESTIONS if q in self.findings and self.findings[q].verdict is Verdict.FAIL)


class _Tally:
    """What speaks against a PASS, gathered over all rounds; the first reason of each sort is kept."""

    def __init__(self) -> None:
        self.wrong = ""
        self.open = ""
        self.count = 0

    def fail(self, reason: str) -> None:
        self.wrong = self.wrong or reason

    def leave_open(self, reason: str) -> None:
        self.open = self.open or reason

    def conclude(self, report: Report, question: str, passed: str) -> None:
        if self.wrong:
            report.fail(question, self.wrong)
        elif self.open:
            report.conclude(question, Verdict.NOT_CHECKED, self.open)
        else:
            report.conclude(question, Verdict.PASS, passed)


def check(
    checkpoint: CID,
    get: Get,
    attestation: Attestation | None,
    trust: Trust,
    *,
    with_snapshots: bool = True,
    tell: Callable[[str], None] = lambda _: None,
) -> Report:
    """Everything but `recomputed`, which is left NOT CHECKED.

    Args:
        checkpoint: CID of the manifest.
        get: blocks by id, unchecked: every block is hashed here.
        attestation: of the checkpoint's own record; those of the others stand in their children.
        trust: where trust comes from.
        with_snapshots: also re-hash weights of rounds between genesis and the checkpoint that are here.
        tell: progress, one line at a time.
    """
    report = Report(checkpoint)
    reader = Reader(get)
    report.manifest = manifest = reader.read(Manifest, checkpoint)
    if manifest is not None:
        report.is_dense = _is_dense(reader.block(manifest.spec))
        report.spine = read_spine(reader, manifest.record, tell)
    authorship, participation = _Tally(), _Tally()
    integrity = _Integrity(reader, report, with_snapshots=with_snapshots)
    lineage = _Lineage(trust, report.spine)
    last: Link | None = None
    tables: settlement.Tables | None = settlement.Tables()  # after the round taken last; None: a record is missing
    for link in read_links(reader, report.spine):
        tell(f"checking round {link.record.round}")
        if link.record.round != (last.record.round + 1 if last else 0):
            tables = None  # what the missing record changed is unknown from here on
        integrity.take(link)
        _check_authorship(link, authorship)
        _check_participation(link, last, tables, participation, is_dense=report.is_dense)
        lineage.take(link, last)
        last = link
        # Attack: records that name ever new peers, to have the tables copied for ever.
        if tables and max(len(tables.trust), len(tables.rewards)) > MAX_ROSTER:
            participation.fail(f"round {link.record.round}: more peers than any committee has")
        elif tables:
            tables = tables.after(link.record)
    if last is not None and last.cid == report.spine.records[-1]:
        report.record = last.record
        lineage.attest(last, attestation)
    if report.record is None or not report.spine.is_whole:
        for tally in (authorship, lineage, participation):
            tally.leave_open("the records down to genesis could not all be read")
    integrity.conclude_all()
    if authorship.count == 0:
        authorship.leave_open("genesis: nobody has signed anything yet")
    authorship.conclude(report, "authorship", f"{authorship.count} signatures of contributors and validators hold")
    lineage.conclude_all(report)
    if participation.count == 0:
        participation.leave_open("genesis: nobody has taken part yet")
    participation.conclude(
        report, "participation", f"{participation.count} seats accounted for, judgements and rewards follow"
    )
    report.conclude("recomputed", Verdict.NOT_CHECKED, "the fold was not run again")
    return report


def _is_dense(spec: bytes | None) -> bool:
    """Of the spec only this matters here; what it means otherwise is learning/spec.py's."""
    try:
        value = None if spec is None else dagcbor.decode(spec)
    except InvalidMessageError:
        return False
    return type(value) is dict and value.get("averaging") == "dense"


# --- integrity --------------------------------------------------------------------------------------------
class _Integrity(_Tally):
    def __init__(self, reader: Reader, report: Report, *, with_snapshots: bool) -> None:
        super().__init__()
        self._reader = reader
        self._report = report
        self._with_snapshots = with_snapshots
        self._payloads: dict[CID, int | None] = {}  # size; None when it is not whole
        self._weights: dict[CID, bytes | None] = {}  # sha256; same
        self._rounds = 0

    def take(self, link: Link) -> None:
        manifest, record = self._report.manifest, link.record
        assert manifest is not None
        self._rounds += record.round > 0
        if link.cid == manifest.record:
            self._compare_manifest(manifest, record)
            self._hash_weights(manifest.weights, manifest.model_hash, is_optional=False)
        elif self._with_snapshots or record.round == 0:
            self._hash_weights(record.weights, record.model_hash, is_optional=True)
        if self._report.is_dense:
            return
        for header in link.headers:
            if header is not None:
                self._hash_payload(header)

    def _compare_manifest(self, manifest: Manifest, record: RoundRecord) -> None:
        expected = (record.task, record.round, record.weights, record.model_hash)
        if (manifest.task, manifest.round, manifest.weights, manifest.model_hash) != expected:
            self.fail("manifest and record name different checkpoints")
        if manifest.spec.digest != manifest.task:
            self.fail("the manifest names the spec of another task")

    def _hash_weights(self, root: CID, model_hash: bytes, *, is_optional: bool) -> None:
        # Attack: every record names the same large file, to have it hashed again and again.
        if root not in self._weights or not is_optional:
            found = self._reader.hash_file(root, MAX_WEIGHTS_BYTES, is_optional=is_optional)
            self._weights[root] = None if found is None else found[0]
        if self._weights[root] not in {None, model_hash}:
            self.fail(f"weights {root} do not hash to the model hash")

    def _hash_payload(self, header: ContributionHeader) -> None:
        if header.payload not in self._payloads:
            found = self._reader.hash_file(header.payload, MAX_PAYLOAD_BYTES)
            self._payloads[header.payload] = None if found is None else found[1]
        if self._payloads[header.payload] not in {None, header.payload_bytes}:
            self.fail(f"payload {header.payload} is not as long as its header says")

    def conclude_all(self) -> None:
        if self._reader.wrong:
            self.fail(self._reader.wrong)
        if self._reader.missing:
            more = f" and {self._reader.missing - 1} more" if self._reader.missing > 1 else ""
            self.leave_open(self._reader.first_missing + more)
        what = "weights" if self._report.is_dense else f"weights and the payloads of {self._rounds} rounds"
        self.conclude(self._report, "integrity", f"{what} re-hash to their ids")


# --- authorship -------------------------------------------------------------------------------------------
def _check_authorship(link: Link, tally: _Tally) -> None:
    record, committee = link.record, link.committee
    if committee is None or None in link.headers or None in link.cards:
        tally.leave_open(f"round {record.round}: something that should be signed is missing")
    if committee is None:
        return
    for contribution, header in zip(record.contributions, link.headers, strict=True):
        if header is not None:
            flaw = _find_header_flaw(committee, record, contribution.seat, header)
            if flaw:
                tally.fail(f"round {record.round}, seat {contribution.seat}: {flaw}")
            tally.count += 1
    for card in link.cards:
        if card is not None:
            flaw = _find_card_flaw(committee, record, card)
            if flaw:
                tally.fail(f"round {record.round}: {flaw}")
            tally.count += 2


def _find_header_flaw(committee: Committee, record: RoundRecord, seat: int, header: ContributionHeader) -> str:
    if (header.task, header.round, header.parent) != (record.task, record.round, record.parent):
        return "the header belongs to another round"
    if committee.index_of(header.peer) != seat:
        return "the header is another peer's"
    if not bls.verify(committee.at(seat).bls_public_key, header.signing_root(), header.signature):
        return "the signature of the header does not hold"
    return ""


def _find_card_flaw(committee: Committee, record: RoundRecord, card: Scorecard) -> str:
    if (card.task, card.round, card.parent) != (record.task, record.round, record.parent):
        return "a scorecard belongs to another round"
    seat = committee.seat_of(card.validator)
    if seat is None:
        return "a scorecard is a stranger's"
    key = committee.seats[seat].bls_public_key
    if not bls.verify(key, card.signing_root(), card.signature):
        return f"the signature of validator {seat} does not hold"
    if not bls.verify(key, compute_seed_root(card.task, card.round, card.parent), card.seed_proof):
        return f"validator {seat} chose its own public batch"
    return ""


# --- lineage ----------------------------------------------------------------------------------------------
class _Lineage(_Tally):
    """Takes the rounds oldest first; a round is attested by the one after it, the last one from outside.

    Where the records do not lead to genesis the chained digests are unknown, so no quorum can be checked.
    """

    def __init__(self, trust: Trust, spine: Spine) -> None:
        super().__init__()
        self._trust = trust
        self._is_whole = spine.is_whole
        self._heads = (NIL, NIL)  # chained digest before and after the round taken last
        self._unanchored: int | None = None
        self.fail(spine.flaw)

    def take(self, link: Link, parent: Link | None) -> None:
        record, committee = link.record, link.committee
        if parent is not None:
            self.attest(parent, record.parent_attestation)
            if record.epoch < parent.record.epoch:
                self.fail(f"round {record.round} belongs to an earlier epoch than its parent")
            if record.epoch == parent.record.epoch and record.committee != parent.record.committee:
                self.fail(f"round {record.round}: another committee in the same epoch")
        elif record.round == 0 and record.parent_attestation is not None:
            self.fail("genesis claims a parent's quorum")
        if committee is None:
            self.leave_open(f"the committee of round {record.round} is missing")
        elif (committee.task, committee.epoch) != (record.task, record.epoch):
            self.fail(f"round {record.round} names the committee of another task or epoch")
        self._compare(link)
        self._heads = (self._heads[1], compute_head(record, link.cid.digest, self._heads[1]))

    def attest(self, link: Link, attestation: Attestation | None) -> None:
        """The quorum of the round taken last."""
        record = link.record
        if record.round == 0:
            if attestation is not None:
                self.fail("genesis claims a quorum")
            return
        self.count += 1
        if attestation is None:
            self.fail(f"round {record.round} carries no quorum")
        elif link.committee is not None and self._is_whole:
            try:
                verify_attestation(link.committee, attestation, record, self._heads[0])
            except FlockError as error:
                self.fail(f"round {record.round}: {error.message}")

    def _compare(self, link: Link) -> None:
        round_ = link.record.round
        if self._trust.committees is not None and link.record.committee not in self._trust.committees:
            self.fail(f"round {round_}: the committee is not the one you trust")
        if self._trust.anchors is not None and round_ > 0:
            anchored = self._trust.anchors.get(round_)
            if anchored is None:
                self._unanchored = round_ if self._unanchored is None else self._unanchored
            elif anchored != link.cid.digest:
                self.fail(f"round {round_}: another record is anchored on chain")

    def conclude_all(self, report: Report) -> None:
        if self.count == 0:
            self.leave_open("genesis: nobody has signed it yet")
        if self._trust.committees is None:
            self.leave_open(f"a quorum signed each round, but whose? {self._trust.lack}")
        if self._unanchored is not None:
            self.leave_open(f"round {self._unanchored} is not anchored yet")
        where = "not compared with a chain" if self._trust.anchors is None else "anchored on chain"
        self.conclude(report, "lineage", f"{self.count} rounds from genesis, each with a quorum, {where}")


# --- participation ----------------------------------------------------------------------------------------
def _check_participation(
    link: Link, parent: Link | None, tables: settlement.Tables | None, tally: _Tally, *, is_dense: bool
) -> None:
    record = link.record
    if record.round == 0:
        if record.contributions or record.absent or record.scorecards or record.trust or record.rewards:
            tally.fail("genesis names contributions or pays somebody")
        if record.rewards_root != NIL:
            tally.fail("genesis pays somebody")
        return
    whole = link.whole()
    if whole is None or parent is None or tables is None:
        tally.leave_open(f"round {record.round}: something that it names, or a record before it, is missing")
        return
    flaw = _find_participation_flaw(record, parent.record, tables, *whole, is_dense=is_dense)
    if flaw:
        tally.fail(f"round {record.round}: {flaw}")
    tally.count += len(record.contributions) + len(record.absent)


def _find_participation_flaw(
    record: RoundRecord,
    parent: RoundRecord,
    tables: settlement.Tables,
    committee: Committee,
    headers: Sequence[ContributionHeader],
    cards: Sequence[Scorecard],
    *,
    is_dense: bool,
) -> str:
    if record.parent is None:
        return "no parent"
    # Of the parent that it names: whether that is the one at hand is for integrity and lineage to say.
    beacon = compute_beacon(record.task, record.epoch, record.round, record.parent.digest)
    cohort = compute_cohort(committee, beacon)
    seats = [c.seat for c in record.contributions]
    if sorted(seats + [a.seat for a in record.absent]) != list(cohort.members):
        return "the members of the cohort are not each named once" if cohort.is_drawn else (
            "the seats are not each named once"
        )
    # Whether a drawn cohort really stayed away is for those to say who were there: they voted for the record.
    if not cohort.has_minimum(seats):
        return "contributions of less than a quorum"
    scorers = {committee.seat_of(card.validator) for card in cards}
    if not is_dense and not committee.has_quorum(seat for seat in scorers if seat is not None):
        return "scorecards of less than a quorum"
    for card in cards:
        if len({score.contribution for score in card.scores}) != len(card.scores):
            return "a scorecard scores a contribution twice"
    drawn = cohort.compute_shards(beacon)
    for seat, header in zip(seats, headers, strict=True):
        if header.shard != drawn[seat]:
            return f"seat {seat} trained on another shard than was drawn for it"
    try:
        panels = compute_panels(committee, cohort, beacon)
        settled = settlement.settle(committee, tables, headers, cards, panels=panels)
        rebuilt = settlement.compute_record(
            parent=parent,
            parent_attestation=record.parent_attestation,
            committee=committee,
            headers=headers,
            absent=record.absent,
            scorecards=cards,
            settled=settled,
            model_hash=record.model_hash,
            weights=record.weights,
        )
    except FlockError as error:
        return error.message
    wrong = [f.name for f in fields(RoundRecord) if getattr(rebuilt, f.name) != getattr(record, f.name)]
    return f"what does not follow from the scorecards: {', '.join(wrong)}" if wrong else ""
