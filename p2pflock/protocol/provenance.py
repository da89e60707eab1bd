"""Five questions about a checkpoint, each answered PASS, FAIL or NOT CHECKED with a reason.

    integrity       do all blocks that the checkpoint names hash to their ids, and the weights to the model hash?
    authorship      did the named peers sign their contributions and scorecards?
    lineage         do the records lead to genesis, each with a quorum of the committee we trust, and are they
                    what is anchored on chain?
    participation   is every seat accounted for, and do judgements, trust and rewards follow from the scorecards?
    recomputed      does folding the payloads again give the same weights?  (node/verification.py runs the fold)

Law: pure.  Blocks, the anchors seen on chain and the committee to trust are handed in; nothing here fetches.
A block that is missing is NOT CHECKED, a block that is wrong is FAIL, and what could not be looked at is never
called PASS.  PASS of lineage needs a root of trust from outside the checkpoint: anybody can invent a committee.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from p2pflock.errors import FlockError, InvalidMessageError, RemoteProtocolError, UnavailableError
from p2pflock.primitives import bls, dagcbor, signing, unixfs
from p2pflock.primitives.cid import CID
from p2pflock.protocol import settlement
from p2pflock.protocol.attestation import verify_attestation
from p2pflock.protocol.committee import Committee, compute_seed_root
from p2pflock.protocol.messages import (
    MAX_PAYLOAD_BYTES,
    Attestation,
    CommitteeBlock,
    ContributionHeader,
    Manifest,
    RoundRecord,
    Scorecard,
)

MAX_WEIGHTS_BYTES = 1 << 36


class Verdict(str, enum.Enum):
    PASS = "PASS"  # noqa: S105
    FAIL = "FAIL"
    NOT_CHECKED = "NOT CHECKED"


@dataclass(frozen=True, slots=True)
class Finding:
    verdict: Verdict
    reason: str


QUESTIONS = ("integrity", "authorship", "lineage", "participation", "recomputed")

Get = Callable[[CID], bytes]  # raises UnavailableError when the block is not to be had


@dataclass(frozen=True, slots=True)
class Trust:
    """What the verifier brings along.

    Args:
        committees: ids of committee blocks it trusts, e.g. read from the chain or configured.
        anchors: round -> record digest as anchored on chain; None when no chain was asked.
    """

    committees: frozenset[CID]
    anchors: Mapping[int, bytes] | None = None


@dataclass(frozen=True, slots=True)
class Link:
    """One round of the lineage, newest first."""

    cid: CID
    record: RoundRecord
    committee: Committee
    headers: tuple[ContributionHeader, ...]
    cards: tuple[Scorecard, ...]


@dataclass
class Report:
    """What was found.  `links` runs from the checkpoint's round down to the deepest one that was read."""

    checkpoint: CID
    manifest: Manifest | None = None
    links: list[Link] = field(default_factory=list)
    findings: dict[str, Finding] = field(default_factory=dict)

    def conclude(self, question: str, verdict: Verdict, reason: str) -> None:
        """A FAIL stands, whatever is found later."""
        known = self.findings.get(question)
        if known is None or known.verdict is not Verdict.FAIL:
            self.findings[question] = Finding(verdict, reason)

    def fail(self, question: str, reason: str) -> None:
        self.conclude(question, Verdict.FAIL, reason)

    def has_failed(self, question: str) -> bool:
        known = self.findings.get(question)
        return known is not None and known.verdict is Verdict.FAIL

    @property
    def is_reaching_genesis(self) -> bool:
        return bool(self.links) and self.links[-1].record.round == 0


def check(
    checkpoint: CID,
    get: Get,
    attestation: Attestation | None,
    trust: Trust,
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Everything but `recomputed`.

    Args:
        checkpoint: CID of the manifest.
        get: blocks by id, unchecked: every block is hashed here.
        attestation: of the checkpoint's own record; those of the others stand in their children.
        trust: where trust comes from.
    """
    report = Report(checkpoint)
    reader = _Reader(get, report)
    if not _read_lineage(reader, report, progress):
        for question in QUESTIONS:
            if question not in report.findings:
                report.conclude(question, Verdict.NOT_CHECKED, "the lineage could not be read")
        return report
    _check_integrity(reader, report)
    _check_authorship(report)
    _check_lineage(report, attestation, trust)
    _check_participation(report)
    report.conclude("recomputed", Verdict.NOT_CHECKED, "the fold was not run again")
    return report


class _Reader:
    """Blocks that hash to their ids; remembers what was missing and what was wrong."""

    def __init__(self, get: Get, report: Report) -> None:
        self._get = get
        self._report = report
        self.missing: list[CID] = []
        self.is_dense = False  # a dense vector is averaged, never stored

    def read_spec(self, cid: CID) -> None:
        """Of the spec only this matters here; what it means otherwise is learning/spec.py's."""
        spec = dagcbor.decode(self(cid))
        self.is_dense = isinstance(spec, dict) and spec.get("averaging") == "dense"

    def __call__(self, cid: CID) -> bytes:
        try:
            data = self._get(cid)
        except RemoteProtocolError:
            self.missing.append(cid)
            raise UnavailableError(f"block {cid} is missing") from None
        if not cid.matches(data):
            self._report.fail("integrity", f"block {cid} does not hash to its id")
            raise InvalidMessageError(f"block {cid} does not hash to its id")
        return data


def _read_lineage(reader: _Reader, report: Report, progress: Callable[[str], None]) -> bool:
    """Manifest, records, committees, headers and scorecards down to genesis; False when it breaks off."""
    try:
        report.manifest = manifest = Manifest.decode(reader(report.checkpoint))
        reader.read_spec(manifest.spec)
        cid: CID | None = manifest.record
        committees: dict[CID, Committee] = {}
        while cid is not None:
            record = RoundRecord.decode(reader(cid))
            if record.committee not in committees:
                block = CommitteeBlock.decode(reader(record.committee))
                committees[record.committee] = Committee.from_block(block)
            report.links.append(
                Link(
                    cid,
                    record,
                    committees[record.committee],
                    tuple(ContributionHeader.decode(reader(c.header)) for c in record.contributions),
                    tuple(Scorecard.decode(reader(card)) for card in record.scorecards),
                )
            )
            progress(f"read round {record.round}")
            cid = record.parent
    except UnavailableError as error:
        report.conclude("integrity", Verdict.NOT_CHECKED, str(error))
        return False
    except InvalidMessageError as error:
        report.fail("integrity", str(error))
        return False
    return True


def _check_integrity(reader: _Reader, report: Report) -> None:
    manifest, head = report.manifest, report.links[0].record
    assert manifest is not None
    expected = (head.task, head.round, head.weights, head.model_hash)
    if (manifest.task, manifest.round, manifest.weights, manifest.model_hash) != expected:
        report.fail("integrity", "manifest and record name different checkpoints")
        return
    if manifest.spec.digest != manifest.task:
        report.fail("integrity", "manifest names the spec of another task")
        return
    hasher = hashlib.sha256()
    blocks = 0
    try:
        for chunk in unixfs.assemble(manifest.weights, reader, max_bytes=MAX_WEIGHTS_BYTES):
            hasher.update(chunk)
            blocks += 1
        if hasher.digest() != manifest.model_hash:
            report.fail("integrity", "weights do not hash to the model hash")
            return
        for link in [] if reader.is_dense else report.links:
            for header in link.headers:
                size = 0
                for chunk in unixfs.assemble(header.payload, reader, max_bytes=MAX_PAYLOAD_BYTES):
                    size += len(chunk)
                    blocks += 1
                if size != header.payload_bytes:
                    report.fail("integrity", f"payload {header.payload} is not as long as its header says")
                    return
    except UnavailableError as error:
        report.conclude("integrity", Verdict.NOT_CHECKED, str(error))
        return
    except InvalidMessageError as error:
        report.fail("integrity", str(error))
        return
    what = "weights" if reader.is_dense else "weights and payloads"
    report.conclude("integrity", Verdict.PASS, f"{what} of {len(report.links) - 1} rounds re-hash")


def _check_authorship(report: Report) -> None:
    signatures = 0
    for link in report.links:
        record, committee = link.record, link.committee
        for contribution, header in zip(record.contributions, link.headers, strict=True):
            who = f"round {record.round}, seat {contribution.seat}"
            if (header.task, header.round, header.parent) != (record.task, record.round, record.parent):
                report.fail("authorship", f"{who}: the header belongs to another round")
                return
            seat = committee.seat_of(header.peer)
            if seat is None or seat != contribution.seat:
                report.fail("authorship", f"{who}: the header is another peer's")
                return
            if not bls.verify(committee.seats[seat].bls_public_key, header.signing_root(), header.signature):
                report.fail("authorship", f"{who}: the signature does not hold")
                return
            signatures += 1
        for card in link.cards:
            seat = committee.seat_of(card.validator)
            if seat is None or (card.task, card.round, card.parent) != (
                record.task,
                record.round,
                record.parent,
            ):
                report.fail("authorship", f"round {record.round}: a scorecard belongs elsewhere")
                return
            key = committee.seats[seat].bls_public_key
            seed_root = compute_seed_root(record.task, record.round, card.parent)
            if not bls.verify(key, card.signing_root(), card.signature) or not bls.verify(
                key, seed_root, card.seed_proof
            ):
                report.fail("authorship", f"round {record.round}, validator {seat}: the signature does not hold")
                return
            signatures += 2
    report.conclude("authorship", Verdict.PASS, f"{signatures} signatures of contributors and validators hold")


def compute_heads(links: Sequence[Link]) -> dict[int, bytes]:
    """Round -> chained digest after it.  `links` newest first, down to genesis."""
    heads: dict[int, bytes] = {}
    for link in reversed(links):
        record = link.record
        heads[record.round] = (
            record.task
            if record.round == 0
            else signing.compute_head(
                task=record.task,
                round_=record.round,
                record_digest=link.cid.digest,
                rewards_root=record.rewards_root,
                previous_head=heads[record.round - 1],
            )
        )
    return heads


def _check_lineage(report: Report, attestation: Attestation | None, trust: Trust) -> None:
    for child, parent in zip(report.links, report.links[1:], strict=False):
        if parent.record.round != child.record.round - 1 or parent.record.task != child.record.task:
            report.fail("lineage", f"round {child.record.round} does not follow its parent")
            return
    if report.links[-1].record.round != 0:
        report.fail("lineage", "the records do not lead to genesis")
        return
    heads = compute_heads(report.links)
    current = attestation
    for link in report.links[:-1]:
        record = link.record
        if current is None:
            report.fail("lineage", f"round {record.round} carries no quorum")
            return
        try:
            verify_attestation(link.committee, current, record, heads[record.round - 1])
        except FlockError as error:
            report.fail("lineage", f"round {record.round}: {error.message}")
            return
        current = record.parent_attestation
    if current is not None:
        report.fail("lineage", "genesis claims a quorum")
        return
    if trust.anchors is not None:
        for link in report.links[:-1]:
            anchored = trust.anchors.get(link.record.round)
            if anchored is None:
                report.conclude(
                    "lineage", Verdict.NOT_CHECKED, f"round {link.record.round} is not anchored yet"
                )
                return
            if anchored != link.cid.digest:
                report.fail("lineage", f"round {link.record.round}: another record is anchored on chain")
                return
    foreign = {link.record.committee for link in report.links} - trust.committees
    if foreign and trust.committees:
        report.fail("lineage", "a quorum signed, but of a committee that is not the one you trust")
    elif foreign:
        report.conclude(
            "lineage", Verdict.NOT_CHECKED, "a quorum signed; name the committee or the chain to trust"
        )
    else:
        where = "anchored on chain" if trust.anchors is not None else "not compared with a chain"
        report.conclude(
            "lineage", Verdict.PASS, f"{len(report.links) - 1} rounds to genesis, each with a quorum, {where}"
        )


def _check_participation(report: Report) -> None:
    counted = absent = 0
    for link, parent in zip(report.links, report.links[1:], strict=False):
        record, committee = link.record, link.committee
        seats = [c.seat for c in record.contributions] + [a.seat for a in record.absent]
        if sorted(seats) != list(range(len(committee.seats))):
            report.fail("participation", f"round {record.round}: the seats are not each named once")
            return
        counted += len(record.contributions)
        absent += len(record.absent)
        try:
            settled = settlement.settle(committee, parent.record, link.headers, link.cards)
            rebuilt = settlement.compute_record(
                parent=parent.record,
                parent_attestation=record.parent_attestation,
                committee=committee,
                headers=link.headers,
                absent=record.absent,
                scorecards=link.cards,
                settled=settled,
                model_hash=record.model_hash,
                weights=record.weights,
            )
        except FlockError as error:
            report.fail("participation", f"round {record.round}: {error.message}")
            return
        if rebuilt != record:
            report.fail("participation", f"round {record.round}: judgements or rewards do not follow from the scores")
            return
    report.conclude(
        "participation", Verdict.PASS, f"{counted} contributions counted, {absent} absences named, rewards follow"
    )
