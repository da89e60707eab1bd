"""`verify`: brings blocks, trust and a trainer to protocol/provenance.py.

Law: this file fetches and recomputes, provenance.py judges.  Blocks come from a peer's home or from a CAR file;
what to trust comes from the chain, from a committee file, or from nowhere, and then lineage is NOT CHECKED.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import trio

from p2pflock.errors import FlockError, InvalidMessageError, RemoteProtocolError, UnavailableError, UserError
from p2pflock.learning.spec import TaskSpec
from p2pflock.node.anchoring import read_attestation
from p2pflock.node.assembly import EPOCH, build_committee, open_chain, read_run_file
from p2pflock.node.ledger import Ledger
from p2pflock.params import LOCAL, NetworkParams
from p2pflock.ports import Chain, FoldInput, Trainer
from p2pflock.primitives import car, unixfs
from p2pflock.primitives.cid import CID
from p2pflock.protocol import provenance
from p2pflock.protocol.messages import (
    MAX_PAYLOAD_BYTES,
    Attestation,
    CommitteeBlock,
    Judgement,
    Manifest,
)
from p2pflock.protocol.provenance import Get, Report, Trust, Verdict
from p2pflock.storage.blocks import DiskStore
from p2pflock.storage.journal import VoteJournal

MAX_CAR_BLOCK_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class Source:
    """Where blocks come from, and the attestation of the newest record where it is known."""

    get: Get
    attestation: Callable[[CID], Attestation | None]


def open_home(home: Path) -> Source:
    """Blocks and ledger of a peer's home; safe beside the running peer.

    A damaged block is handed out as nothing, which hashes to no id, so that it FAILs instead of missing.
    """
    store = DiskStore.open_readonly(home / "blocks")

    def get(cid: CID) -> bytes:
        try:
            return store.get(cid)
        except UnavailableError:
            if store.has(cid):
                return b""
            raise

    attestations: dict[CID, Attestation] = {}
    for path in home.glob("ledger-*.journal"):
        for record, attestation in Ledger.read_index(VoteJournal.read(path)):
            if attestation is not None:
                try:
                    attestations[record] = Attestation.decode(get(attestation))
                except FlockError:
                    continue
    return Source(get, attestations.get)


def open_car(path: Path) -> tuple[CID, Source]:
    """The checkpoint that a CAR file carries as its first root, and its blocks."""
    blocks: dict[CID, bytes] = {}
    try:
        with path.open("rb") as file:
            roots, stream = car.read(file, max_block_bytes=MAX_CAR_BLOCK_BYTES)
            blocks.update(stream)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "give a CAR file or a checkpoint id") from error
    except InvalidMessageError as error:
        raise UserError(f"{path} is no CAR file: {error.message}", "export it again") from error
    if not roots:
        raise UserError(f"{path} names no checkpoint", "export it again")

    def get(cid: CID) -> bytes:
        if cid not in blocks:
            raise UnavailableError(f"block {cid} is not in the file")
        return blocks[cid]

    def attestation(record: CID) -> Attestation | None:
        for root in roots[1:]:
            try:
                found = Attestation.decode(get(root))
            except RemoteProtocolError:
                continue
            if found.record == record:
                return found
        return None

    return roots[0], Source(get, attestation)


def export_car(home: Path, checkpoint: CID, path: Path) -> int:
    """Everything that `verify` needs, as one file; returns the number of blocks."""
    source = open_home(home)
    manifest = Manifest.decode(source.get(checkpoint))
    attestation = source.attestation(manifest.record)
    blocks: dict[CID, bytes] = {}

    def keep(cid: CID) -> bytes:
        blocks[cid] = source.get(cid)
        return blocks[cid]

    roots = [checkpoint]
    if attestation is not None:
        roots.append(attestation.cid())
        blocks[attestation.cid()] = attestation.encode()
    report = provenance.check(checkpoint, keep, attestation, Trust(frozenset()))
    if report.links:
        genesis = report.links[-1].record
        try:
            for _ in unixfs.assemble(genesis.weights, keep, max_bytes=provenance.MAX_WEIGHTS_BYTES):
                pass
        except UnavailableError:
            pass  # recomputing then starts from the task's own genesis model
    with path.open("wb") as out:
        car.write(out, roots, blocks.items())
    return len(blocks)


# --- trust ------------------------------------------------------------------------------------------------
def build_trust(task: bytes, chain: Chain | None, committee_file: Path | None, rounds: int) -> Trust:
    """Raises NetworkError when the chain does not answer."""
    if chain is not None:
        committee = build_committee(task, EPOCH, chain)
        anchors: dict[int, bytes] = {}
        for round_ in range(1, rounds + 1):
            call = chain.anchored_call(task, round_)
            if call is not None:
                anchors[round_] = call.record_digest
        return Trust(frozenset({committee.cid()}), anchors)
    if committee_file is not None:
        block = CommitteeBlock.decode(committee_file.read_bytes())
        return Trust(frozenset({block.cid()}))
    return Trust(frozenset())


def verify(
    checkpoint: CID,
    source: Source,
    *,
    chain: Chain | None = None,
    committee_file: Path | None = None,
    recompute: bool = True,
    trusted_modules: tuple[str, ...] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """All five questions.  Blocking; starts a trainer process for the fold.  Raises NetworkError."""
    try:
        manifest = Manifest.decode(source.get(checkpoint))
    except RemoteProtocolError:
        return provenance.check(checkpoint, source.get, None, Trust(frozenset()))
    progress("reading the chain" if chain else "reading blocks")
    attestation = source.attestation(manifest.record)
    if attestation is None and chain is not None:
        attestation = read_attestation(chain, manifest.task, manifest.round)
    report = provenance.check(
        checkpoint,
        source.get,
        attestation,
        build_trust(manifest.task, chain, committee_file, manifest.round),
        progress=progress,
    )
    if recompute and report.is_reaching_genesis:
        trio.run(_recompute, report, source.get, trusted_modules, progress)
    return report


def verify_home(home: Path, checkpoint: str, network: NetworkParams = LOCAL) -> Report:
    """Verify from a peer's home, with the chain or committee that the peer itself was started with."""
    facts = read_run_file(home)
    book = Path(facts["address_book"]) if facts["address_book"] else None
    chain = open_chain(facts["rpc"], book, network) if facts["rpc"] else None
    committee = Path(facts["committee"]) if facts["committee"] else None
    return verify(CID.parse(checkpoint), open_home(home), chain=chain, committee_file=committee)


# --- the fold, again --------------------------------------------------------------------------------------
async def _recompute(
    report: Report, get: Get, trusted_modules: tuple[str, ...], progress: Callable[[str], None]
) -> None:
    from p2pflock.learning.client import TrainerProcess

    assert report.manifest is not None
    spec = TaskSpec.decode(_checked(get, report.manifest.spec))
    if spec.averaging == "dense":
        report.conclude("recomputed", Verdict.NOT_CHECKED, "a dense average cannot be computed again")
        return
    async with trio.open_nursery() as nursery:
        trainer = await TrainerProcess.start(nursery, spec, trusted_modules=trusted_modules)
        try:
            await refold(report, get, trainer, progress)
        except UnavailableError as error:
            report.conclude("recomputed", Verdict.NOT_CHECKED, error.message)
        except InvalidMessageError as error:
            report.fail("recomputed", error.message)
        finally:
            await trainer.aclose()
        nursery.cancel_scope.cancel()


async def refold(
    report: Report, get: Get, trainer: Trainer, progress: Callable[[str], None] = lambda _: None
) -> None:
    """Fold every round again from the genesis weights and compare each model hash.

    Raises UnavailableError when a payload is missing, InvalidMessageError when one is no payload."""
    links = list(reversed(report.links))
    genesis = (await trainer.open()).model_hash
    if genesis != links[0].record.model_hash:
        weights = _file(get, links[0].record.weights, provenance.MAX_WEIGHTS_BYTES)
        genesis = await trainer.load(weights)
    if genesis != links[0].record.model_hash:
        report.fail("recomputed", "the genesis weights are not the recorded ones")
        return
    for link in links[1:]:
        progress(f"folding round {link.record.round}")
        inputs = [
            FoldInput(_file(get, header.payload, MAX_PAYLOAD_BYTES), contribution.weight)
            for contribution, header in zip(link.record.contributions, link.headers, strict=True)
            if contribution.judgement == Judgement.ACCEPTED
        ]
        folded = await trainer.fold(link.record.round, inputs)
        if folded.model_hash != link.record.model_hash:
            report.fail("recomputed", f"round {link.record.round}: the fold gives another model")
            return
        await trainer.adopt(folded.model_hash)
    report.conclude(
        "recomputed", Verdict.PASS, f"{len(links) - 1} rounds folded again from genesis, bit for bit the same"
    )


def _checked(get: Get, cid: CID) -> bytes:
    data = get(cid)
    if not cid.matches(data):
        raise InvalidMessageError(f"block {cid} does not hash to its id")
    return data


def _file(get: Get, root: CID, max_bytes: int) -> bytes:
    return b"".join(unixfs.assemble(root, lambda cid: _checked(get, cid), max_bytes=max_bytes))


def describe(report: Report) -> Mapping[str, Mapping[str, str]]:
    """The findings in the order of the questions, for tables and JSON."""
    return {
        name: {"verdict": report.findings[name].verdict.value, "reason": report.findings[name].reason}
        for name in provenance.QUESTIONS
    }
