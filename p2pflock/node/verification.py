"""`verify`: brings blocks, trust and a trainer to protocol/provenance.py.

Law: this file fetches and recomputes, provenance.py judges.  Blocks come from a peer's home or from a CAR file;
what to trust comes from the chain, from a committee file, or from nowhere, and then lineage is NOT CHECKED.
A CAR file is a stranger's: it is indexed, not loaded, and each of its blocks must hash to its id, named or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import trio

from p2pflock.errors import (
    ChainUnavailableError,
    FlockError,
    InvalidMessageError,
    RemoteProtocolError,
    UnavailableError,
    UserError,
)
from p2pflock.learning.spec import TaskSpec
from p2pflock.node.anchoring import read_attestation
from p2pflock.node.assembly import EPOCH, build_committee, open_chain, read_run_file
from p2pflock.node.ledger import Ledger
from p2pflock.params import LOCAL, NetworkParams
from p2pflock.ports import Chain, FoldInput, Trainer
from p2pflock.primitives import car, unixfs
from p2pflock.primitives.cid import CID
from p2pflock.protocol import provenance
from p2pflock.protocol.lineage import Get
from p2pflock.protocol.messages import (
    DEFAULT_COHORT,
    MAX_PAYLOAD_BYTES,
    Attestation,
    CommitteeBlock,
    ContributionHeader,
    Manifest,
    RoundRecord,
)
from p2pflock.protocol.provenance import Report, Trust, Verdict
from p2pflock.storage.blocks import DiskStore
from p2pflock.storage.journal import VoteJournal

MAX_CAR_BLOCK_BYTES = 2 << 20
MAX_CAR_BLOCKS = 1 << 20
MAX_FRAME_BYTES = 192 << 20  # what fits one frame to the trainer: weights, or the payloads of a round


@dataclass(frozen=True, slots=True)
class Source:
    """Where blocks come from.

    Attributes:
        name: for messages.
        get: blocks by id, not to be believed.
        attestation: that of a record, where it is known.
        damage: what is wrong with the source as a whole, whatever is asked of it; empty when nothing is.
    """

    name: str
    get: Get
    attestation: Callable[[CID], Attestation | None]
    damage: str = ""


def open_home(home: Path) -> Source:
    """Blocks and ledger of a peer's home; safe beside the running peer.

    A damaged block is handed out as nothing, which hashes to no id, so that it FAILs instead of missing.
    Raises EnvironmentError_ when there is no block store.
    """
    store = DiskStore.open_readonly(home / "blocks")

    def get(cid: CID) -> bytes:
        try:
            return store.get(cid)
        except UnavailableError:
            if store.has(cid):
                return b""
            raise

    attestations: dict[CID, CID | None] = {}
    for path in sorted(home.glob("ledger-*.journal")):
        attestations.update(Ledger.read_index(VoteJournal.read(path)))

    def find(record: CID) -> Attestation | None:
        cid = attestations.get(record)
        try:
            return None if cid is None else Attestation.decode(get(cid))
        except RemoteProtocolError:
            return None

    return Source(str(home), get, find)


def open_car(path: Path) -> tuple[CID, Source]:
    """The checkpoint that a CAR file carries as its first root, and its blocks.

    Raises UserError when it cannot be read, is no CAR file, or does not hold the checkpoint it names.
    """
    blocks: dict[CID, tuple[int, int]] = {}
    damage = ""
    try:
        file = path.open("rb")
        roots, stream = car.read(file, max_block_bytes=MAX_CAR_BLOCK_BYTES)
        for cid, data in stream:
            if len(blocks) >= MAX_CAR_BLOCKS:
                raise UserError(f"{path} holds more than {MAX_CAR_BLOCKS} blocks", "verify from a home instead")
            if not cid.matches(data):
                damage = damage or f"block {cid} does not hash to its id"
            blocks.setdefault(cid, (file.tell() - len(data), len(data)))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "give a CAR file or a checkpoint id") from error
    except InvalidMessageError as error:
        raise UserError(f"{path} is no whole CAR file: {error.message}", "get it again, or export it again") from error
    if not roots or roots[0] not in blocks:
        raise UserError(f"{path} does not hold the checkpoint that it names", "get it again, or export it again")

    def get(cid: CID) -> bytes:
        if cid not in blocks:
            raise UnavailableError(f"block {cid} is not in the file")
        offset, size = blocks[cid]
        try:
            file.seek(offset)
            return file.read(size)
        except OSError as error:
            raise UnavailableError(f"cannot read block {cid}: {error.strerror}") from error

    def find(record: CID) -> Attestation | None:
        for root in roots[1:]:
            try:
                found = Attestation.decode(get(root))
            except RemoteProtocolError:
                continue
            if found.record == record:
                return found
        return None

    return roots[0], Source(str(path), get, find, damage)


def export_car(source: Source, checkpoint: CID, path: Path) -> int:
    """Everything that `verify` needs, as one file; returns the number of blocks.

    Weights of rounds between genesis and the checkpoint stay out: the payloads give them.
    Raises UserError when the source does not hold everything.
    """
    manifest = _read_manifest(source, checkpoint)
    attestation = source.attestation(manifest.record)
    kept: dict[CID, None] = {}

    def keep(cid: CID) -> bytes:
        data = source.get(cid)
        kept.setdefault(cid)
        return data

    report = provenance.check(checkpoint, keep, attestation, Trust(), with_snapshots=False)
    integrity = report.findings["integrity"]
    if integrity.verdict is not Verdict.PASS:
        raise UserError(f"cannot export: integrity is {integrity.verdict.value}: {integrity.reason}",
                        "export from a home that holds the whole checkpoint")  # fmt: skip

    def blocks() -> Iterator[tuple[CID, bytes]]:
        for cid in kept:
            yield cid, source.get(cid)
        if attestation is not None and attestation.cid() not in kept:
            yield attestation.cid(), attestation.encode()

    roots = [checkpoint] if attestation is None else [checkpoint, attestation.cid()]
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as out:
            car.write(out, roots, blocks())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}", "choose another file") from error
    finally:
        temporary.unlink(missing_ok=True)
    return len(kept) + (attestation is not None)


# --- trust ------------------------------------------------------------------------------------------------
def build_trust(
    manifest: Manifest | None, chain: Chain | None, committee_file: Path | None, *, cohort: int = DEFAULT_COHORT
) -> Trust:
    """Raises NetworkError when the chain does not answer, UserError for a file that is no committee."""
    if chain is not None:
        if manifest is None:
            return Trust()
        if not chain.committee(manifest.task, EPOCH):
            return Trust(committees=frozenset(), anchors={})  # asked, and the chain knows nobody for this task
        committee = build_committee(manifest.task, EPOCH, chain, cohort=cohort)
        anchors: dict[int, bytes] = {}
        # The round is a stranger's number; anchors are chained, so the first gap is the end.
        for round_ in range(1, manifest.round + 1):
            call = chain.anchored_call(manifest.task, round_)
            if call is None:
                break
            anchors[round_] = call.record_digest
        return Trust(frozenset({committee.cid()}), anchors)
    if committee_file is not None:
        try:
            block = CommitteeBlock.decode(committee_file.read_bytes())
        except OSError as error:
            raise UserError(f"cannot read {committee_file}: {error.strerror}", "pass --committee FILE") from error
        except InvalidMessageError as error:
            raise UserError(f"{committee_file} is no committee file: {error.message}",
                            "pass the committee.cbor of the swarm")  from error  # fmt: skip
        return Trust(frozenset({block.cid()}))
    return Trust()


def verify(
    checkpoint: CID,
    source: Source,
    *,
    chain: Chain | None = None,
    is_chain_required: bool = True,
    committee_file: Path | None = None,
    recompute: bool = True,
    trusted_modules: tuple[str, ...] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """All five questions.  Blocking; starts a trainer process for the fold.

    Args:
        is_chain_required: False when nobody asked for this chain: should it be away, lineage is NOT CHECKED.

    Raises UserError when the source does not hold the checkpoint, ChainUnavailableError.
    """
    try:
        manifest: Manifest | None = _read_manifest(source, checkpoint)
    except InvalidMessageError:
        manifest = None
    attestation = source.attestation(manifest.record) if manifest else None
    progress("reading the chain" if chain else "reading blocks")
    try:
        trust = build_trust(manifest, chain, committee_file, cohort=_read_cohort(source, manifest))
        if attestation is None and chain is not None and manifest is not None:
            attestation = read_attestation(chain, manifest.task, manifest.round)
    except ChainUnavailableError as error:
        if is_chain_required:
            raise
        trust = Trust(lack=f"{error.message}; name a committee or another chain to trust")
    report = provenance.check(checkpoint, source.get, attestation, trust, tell=progress)
    if source.damage:
        report.fail("integrity", source.damage)
    if recompute and report.is_dense:
        report.conclude("recomputed", Verdict.NOT_CHECKED, "a dense average leaves no payloads to fold again")
    elif recompute and report.spine.is_whole:
        trio.run(_recompute, report, source.get, trusted_modules, progress)
    elif recompute:
        report.conclude("recomputed", Verdict.NOT_CHECKED, "the records down to genesis could not all be read")
    return report


def verify_home(
    home: Path, checkpoint: str, network: NetworkParams = LOCAL, trusted_modules: tuple[str, ...] = ()
) -> Report:
    """Verify from a peer's home, with the chain or committee that the peer itself was started with."""
    facts = read_run_file(home)
    book = Path(facts["address_book"]) if facts["address_book"] else None
    chain = open_chain(facts["rpc"], book, network) if facts["rpc"] else None
    committee = Path(facts["committee"]) if facts["committee"] else None
    return verify(
        CID.parse(checkpoint),
        open_home(home),
        chain=chain,
        committee_file=committee,
        trusted_modules=trusted_modules,
    )


def _read_manifest(source: Source, checkpoint: CID) -> Manifest:
    """Raises UserError when it is not there, InvalidMessageError when it is damaged or no manifest."""
    try:
        data = source.get(checkpoint)
    except UnavailableError as error:
        raise UserError(
            f"{source.name} does not hold checkpoint {checkpoint}", "p2pflock status shows the newest one"
        ) from error
    if not checkpoint.matches(data):
        raise InvalidMessageError(f"block {checkpoint} does not hash to its id")
    return Manifest.decode(data)


def _read_cohort(source: Source, manifest: Manifest | None) -> int:
    """As the spec says; where it cannot be read, integrity says so."""
    try:
        return DEFAULT_COHORT if manifest is None else TaskSpec.decode(source.get(manifest.spec)).committee.cohort
    except FlockError:
        return DEFAULT_COHORT


# --- the fold, again --------------------------------------------------------------------------------------
async def _recompute(
    report: Report, get: Get, trusted_modules: tuple[str, ...], progress: Callable[[str], None]
) -> None:
    """Folds in a learning process of its own; every failure becomes a verdict."""
    from p2pflock.learning.client import TrainerProcess

    assert report.manifest is not None
    async with trio.open_nursery() as nursery:
        trainer: TrainerProcess | None = None
        try:
            spec = TaskSpec.decode(_checked(get, report.manifest.spec))
            progress("starting the trainer")
            trainer = await TrainerProcess.start(nursery, spec, trusted_modules=trusted_modules, device="cpu")
            is_exact = not spec.foreign_modules()
            await refold(report, get, trainer, is_genesis_exact=is_exact, progress=progress)
        except InvalidMessageError as error:
            report.fail("recomputed", error.message)
        except FlockError as error:  # no payload, no data set, code that is not trusted here: not the model's fault
            report.conclude("recomputed", Verdict.NOT_CHECKED, str(error))
        finally:
            if trainer is not None:
                await trainer.aclose()
        nursery.cancel_scope.cancel()


async def refold(
    report: Report,
    get: Get,
    trainer: Trainer,
    *,
    is_genesis_exact: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Fold every round again from the genesis weights and compare each model.

    Args:
        report: with a whole spine.
        is_genesis_exact: the task builds the same genesis on every machine; shipped ones do.  If it need not,
            another genesis is no FAIL, but no PASS either.

    Raises UnavailableError when a block is missing, InvalidMessageError when one is wrong.
    """
    own = await trainer.open()
    doubt = ""
    for cid in report.spine.records:
        record = RoundRecord.decode(_checked(get, cid))
        if record.round > 0:
            progress(f"folding round {record.round}")
            folded = await trainer.fold(record.round, _fold_inputs(record, get))
            if (folded.model_hash, folded.weights) != (record.model_hash, record.weights):
                report.fail("recomputed", f"round {record.round}: the fold gives another model")
                return
            await trainer.adopt(folded.model_hash)
        elif (own.model_hash, own.weights) != (record.model_hash, record.weights):
            doubt = "the task builds another genesis model than the recorded one"
            if is_genesis_exact:
                report.fail("recomputed", doubt)
                return
            if await trainer.load(_file(get, record.weights, MAX_FRAME_BYTES)) != record.model_hash:
                report.fail("recomputed", "the genesis weights are not the recorded ones")
                return
    rounds = len(report.spine.records) - 1
    if doubt:
        report.conclude("recomputed", Verdict.NOT_CHECKED, f"{rounds} rounds fold bit for bit, but {doubt}")
    else:
        what = f"{rounds} rounds folded again from genesis" if rounds else "genesis built again from the task"
        report.conclude("recomputed", Verdict.PASS, f"{what}, bit for bit the same")


def _fold_inputs(record: RoundRecord, get: Get) -> list[FoldInput]:
    """Payloads with a weight, in the record's order, as every peer folded them."""
    inputs, size = [], 0
    for contribution in record.contributions:
        if contribution.weight == 0:
            continue
        header = ContributionHeader.decode(_checked(get, contribution.header))
        size += header.payload_bytes
        if size > MAX_FRAME_BYTES:
            raise UnavailableError(f"round {record.round}: more payloads than can be folded here")
        payload = _file(get, header.payload, MAX_PAYLOAD_BYTES)
        if len(payload) != header.payload_bytes:
            raise InvalidMessageError(f"payload {header.payload} is not as long as its header says")
        inputs.append(FoldInput(payload, contribution.weight))
    return inputs


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
