"""Whole histories of a task, built fast: what honest peers would have decided, or what a forger made of it.

Law: what comes out of `build` without a forger is valid in every respect and deterministic: real BLS keys and
signatures, real scores and folds of the given trainers, every block in a store.  A `Forger` changes one thing on
the way, and everything after it (ids, signatures of whose keys it holds, folds) is made consistent again, as an
attacker would.  `Forger.has_quorum` decides whether the quorum signs the change or only the honest record.

One trainer may stand for all peers: from one state it makes an own payload for each shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from eth_keys.datatypes import PrivateKey

from p2pflock.learning.spec import TaskSpec
from p2pflock.node.anchoring import build_anchor_call
from p2pflock.node.assembly import COMMITTEE_FILE, PeerConfig, write_run_file
from p2pflock.node.ledger import Decision, Ledger, build_manifest, compute_head
from p2pflock.params import FLOCK_WEI, LOCAL
from p2pflock.ports import FoldInput, FoldResult, Trainer
from p2pflock.primitives import bls, peerid, unixfs
from p2pflock.primitives.cid import CID
from p2pflock.protocol import settlement
from p2pflock.protocol.attestation import build_attestation
from p2pflock.protocol.committee import (
    Committee,
    Panels,
    compute_beacon,
    compute_cohort,
    compute_panels,
    compute_score_seed,
    compute_seed_root,
    compute_shards,
    compute_vote_root,
)
from p2pflock.protocol.messages import (
    Absence,
    Absentee,
    Attestation,
    ContributionHeader,
    Manifest,
    RoundRecord,
    Score,
    Scorecard,
    Seat,
    Step,
    Vote,
)
from p2pflock.storage.blocks import DiskStore
from p2pflock.storage.journal import VoteJournal
from p2pflock.testing.chain import FakeChain
from p2pflock.testing.storage import MemoryStore
from p2pflock.testing.tiny_task import build_spec
from p2pflock.testing.trainer import FakeTrainer

STAKE_WEI = 1_000 * FLOCK_WEI
BUDGET_WEI = 10 * FLOCK_WEI


class SeededSigner:
    """The Signer port over keys that follow from a number."""

    def __init__(self, number: int) -> None:
        seed = number.to_bytes(32, "big")
        self._ed25519 = Ed25519PrivateKey.from_private_bytes(seed)
        self._bls = bls.keygen(seed)
        self._evm = PrivateKey(seed)

    @property
    def peer_id(self) -> bytes:
        raw = self._ed25519.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        return peerid.from_ed25519(raw)

    @property
    def address(self) -> bytes:
        address: bytes = self._evm.public_key.to_canonical_address()
        return address

    @property
    def bls_public_key(self) -> bytes:
        return bls.secret_to_public(self._bls)

    def sign_bls(self, root: bytes) -> bytes:
        return bls.sign(self._bls, root)

    def prove_possession(self, root: bytes) -> bytes:
        return bls.sign_possession(self._bls, root)

    def sign_ed25519(self, root: bytes) -> bytes:
        return self._ed25519.sign(root)

    def sign_evm(self, digest: bytes) -> bytes:
        signature = self._evm.sign_msg_hash(digest)
        return bytes(signature.to_bytes()[:64]) + bytes([27 + signature.v])

    def ed25519_seed(self) -> bytes:
        return self._ed25519.private_bytes_raw()

    def evm_private_key(self) -> bytes:
        return self._evm.to_bytes()


class Forger:
    """Does nothing; override what to change.  Each hook is asked in every round.

    Attributes:
        has_quorum: the quorum signs what the forger made; otherwise it signed the honest record, and the forger
            can only put its own record in its place.
        keeps_panels: validators score those whom they were drawn for.  Otherwise everybody scores everybody.
    """

    has_quorum = False
    keeps_panels = True

    def on_headers(
        self, history: History, round_: int, headers: list[ContributionHeader]
    ) -> list[ContributionHeader]:
        return headers

    def on_cards(self, history: History, round_: int, cards: list[Scorecard]) -> list[Scorecard]:
        return cards

    def on_record(self, history: History, record: RoundRecord) -> RoundRecord:
        return record

    def on_attestation(self, record: RoundRecord, attestation: Attestation) -> Attestation | None:
        return attestation

    def on_manifest(self, manifest: Manifest) -> Manifest:
        return manifest


@dataclass
class History:
    """What was decided, oldest first, and the store that holds all of it."""

    spec: TaskSpec
    signers: Sequence[SeededSigner]
    committee: Committee
    store: MemoryStore
    chain: FakeChain | None = None
    decisions: list[Decision] = field(default_factory=list)
    checkpoint: CID = field(default_factory=lambda: CID.of_raw(b""))

    @property
    def head(self) -> Decision:
        return self.decisions[-1]

    @property
    def tables(self) -> settlement.Tables:
        return reduce(settlement.Tables.after, (d.record for d in self.decisions), settlement.Tables())

    @property
    def anchors(self) -> dict[int, bytes]:
        return {d.record.round: d.cid.digest for d in self.decisions[1:]}

    def sign_header(self, header: ContributionHeader) -> ContributionHeader:
        """With the key of the peer it names."""
        bare = replace(header, signature=b"")
        return replace(bare, signature=self._signer_of(header.peer).sign_bls(bare.signing_root()))

    def sign_card(self, card: Scorecard) -> Scorecard:
        bare = replace(card, signature=b"")
        return replace(bare, signature=self._signer_of(card.validator).sign_bls(bare.signing_root()))

    def _signer_of(self, peer: bytes) -> SeededSigner:
        return next(signer for signer in self.signers if signer.peer_id == peer)

    def put(self, block: bytes) -> CID:
        cid = CID.of_dag_cbor(block)
        self.store.put(cid, block)
        return cid

    def put_file(self, data: bytes) -> CID:
        return unixfs.build(unixfs.chunked(data), self.store.put)

    def get_file(self, root: CID) -> bytes:
        return b"".join(unixfs.assemble(root, self.store.get, max_bytes=1 << 26))


async def build(
    *,
    rounds: int = 3,
    peers: int = 4,
    spec: TaskSpec | None = None,
    trainer: Trainer | None = None,
    with_chain: bool = False,
    absent: Sequence[tuple[int, int]] = (),
    snapshots: Sequence[int] = (0,),
    forger: Forger | None = None,
    first_key: int = 1,
) -> History:
    """A history of `rounds` rounds.

    Args:
        trainer: a fresh one, of `spec`; by default a FakeTrainer.
        with_chain: take the committee from a FakeChain and anchor every round there.
        absent: (round, seat) pairs that stayed silent.
        snapshots: rounds besides the last whose weights are stored.
        first_key: another number, other keys.
    """
    spec = spec or build_spec(rounds=max(1, rounds))
    trainer = trainer or FakeTrainer(spec)
    signers = [SeededSigner(first_key + number) for number in range(peers)]
    chain = _open_chain(spec, signers) if with_chain else None
    committee = _build_committee(spec, signers, chain)
    history = History(spec, signers, committee, MemoryStore(), chain)
    forger = forger or Forger()
    history.put(spec.encode())
    history.put(committee.to_block().encode())
    await _open(history, trainer, forger)
    if 0 in snapshots:
        history.put_file(await trainer.export())
    for round_ in range(1, rounds + 1):
        silent = {seat for number, seat in absent if number == round_}
        await _play(history, trainer, forger, silent)
        if round_ in snapshots or round_ == rounds:
            history.put_file(await trainer.export())
        if chain is not None and history.head.attestation is not None:
            chain.anchor(signers[0], build_anchor_call(history.head))
    manifest = forger.on_manifest(build_manifest(history.head.record, spec.cid()))
    history.checkpoint = history.put(manifest.encode())
    return history


def build_now(**arguments: object) -> History:
    """`build` outside an event loop."""

    async def main() -> History:
        return await build(**arguments)  # type: ignore[arg-type]

    return trio.run(main)


def _build_committee(spec: TaskSpec, signers: Sequence[SeededSigner], chain: FakeChain | None) -> Committee:
    seats = tuple(Seat(s.peer_id, s.address, s.bls_public_key, STAKE_WEI) for s in signers)
    if chain is None:
        return Committee(spec.task_id, 0, 0, bytes(20), seats, BUDGET_WEI)
    return Committee(spec.task_id, 0, chain.chain_id, chain.anchor_address, seats, BUDGET_WEI)


def _open_chain(spec: TaskSpec, signers: Sequence[SeededSigner]) -> FakeChain:
    chain = FakeChain()
    for signer in signers:
        chain.mint(signer.address)
        chain.register(signer)
        chain.stake(signer, STAKE_WEI)
    chain.create_task(signers[0], spec.task_id, spec.task.rounds, BUDGET_WEI * spec.task.rounds)
    chain.open_epoch(signers[0], spec.task_id, 0)
    return chain


async def _open(history: History, trainer: Trainer, forger: Forger) -> None:
    genesis = await trainer.open()
    record = settlement.compute_genesis(history.committee, genesis.model_hash, genesis.weights)
    record = forger.on_record(history, record)
    history.decisions.append(Decision(record, history.put(record.encode()), None, record.task))


async def _play(history: History, trainer: Trainer, forger: Forger, silent: set[int]) -> None:
    parent = history.head
    round_ = parent.record.round + 1
    made = await _contribute(history, trainer, silent)
    panels = _draw_panels(history)
    scored = await _score(history, trainer, made, silent, panels)
    honest = await _settle(history, trainer, made, scored, silent, panels)
    headers = forger.on_headers(history, round_, made)
    if not forger.keeps_panels:
        panels = Panels(history.committee, panels.cohort, None)
    if (forger.has_quorum and headers != made) or not forger.keeps_panels:
        scored = await _score(history, trainer, headers, silent, panels)
    cards = forger.on_cards(history, round_, scored)
    for message in (*headers, *cards):
        history.put(message.encode())
    record = forger.on_record(history, await _settle(history, trainer, headers, cards, silent, panels))
    attestation = attest(history, record if forger.has_quorum else honest, parent.head)
    history.decisions.append(
        Decision(
            record,
            history.put(record.encode()),
            forger.on_attestation(record, replace(attestation, record=record.cid())),
            compute_head(record, parent.head),
        )
    )
    # The model goes on as the fold of what the record names, whatever the record says of it.
    folded = await _fold(history, trainer, replace(record, round=round_))
    await trainer.adopt(folded.model_hash)


def _draw_panels(history: History) -> Panels:
    parent, committee = history.head, history.committee
    beacon = compute_beacon(committee.task, committee.epoch, parent.record.round + 1, parent.cid.digest)
    return compute_panels(committee, compute_cohort(committee, beacon), beacon)


async def _settle(
    history: History,
    trainer: Trainer,
    headers: Sequence[ContributionHeader],
    cards: Sequence[Scorecard],
    silent: set[int],
    panels: Panels,
) -> RoundRecord:
    parent, committee = history.head, history.committee
    settled = settlement.settle(committee, history.tables, headers, cards, panels=panels)
    for header in headers:
        history.put(header.encode())
    record = settlement.compute_record(
        parent=parent.record,
        parent_attestation=parent.attestation,
        committee=committee,
        headers=headers,
        absent=[Absentee(seat, int(Absence.SILENT)) for seat in sorted(silent)],
        scorecards=cards,
        settled=settled,
        model_hash=bytes(32),
        weights=CID.of_raw(b""),
    )
    folded = await _fold(history, trainer, record)
    return replace(record, model_hash=folded.model_hash, weights=folded.weights)


async def _fold(history: History, trainer: Trainer, record: RoundRecord) -> FoldResult:
    inputs = []
    for contribution in record.contributions:
        header = ContributionHeader.decode(history.store.get(contribution.header))
        if contribution.weight:
            inputs.append(FoldInput(history.get_file(header.payload), contribution.weight))
    return await trainer.fold(record.round, inputs)


async def _contribute(history: History, trainer: Trainer, silent: set[int]) -> list[ContributionHeader]:
    parent, count = history.head, len(history.signers)
    round_ = parent.record.round + 1
    beacon = compute_beacon(parent.record.task, history.committee.epoch, round_, parent.cid.digest)
    shards = compute_shards(beacon, count, count)
    headers = []
    for seat, signer in enumerate(history.signers):
        if seat in silent:
            continue
        result = await trainer.train(round_, shards[seat], count, beacon)
        header = ContributionHeader(
            task=parent.record.task,
            round=round_,
            parent=parent.cid,
            peer=signer.peer_id,
            payload=history.put_file(result.payload),
            payload_bytes=len(result.payload),
            shard=shards[seat],
            steps=result.steps,
            samples=result.samples,
            loss_micro=result.loss_micro,
            leaf_root=result.leaf_root,
            optimizer_hash=result.optimizer_hash,
            signature=b"",
        )
        headers.append(history.sign_header(header))
    return headers


async def _score(
    history: History, trainer: Trainer, headers: Sequence[ContributionHeader], silent: set[int], panels: Panels
) -> list[Scorecard]:
    parent = history.head
    round_ = parent.record.round + 1
    payloads = {header: history.get_file(header.payload) for header in headers}
    cards = []
    for seat, signer in enumerate(history.signers):
        if seat in silent:
            continue
        proof = signer.sign_bls(compute_seed_root(parent.record.task, round_, parent.cid))
        drawn = [h for h in headers if panels.weight_of(seat, history.committee.index_of(h.peer) or 0)]
        scores = await trainer.score(round_, [payloads[h] for h in drawn], compute_score_seed(proof))
        lines = tuple(
            Score(header.cid(), score.is_valid, score.cosine_micro, score.loss_delta_micro)
            for header, score in zip(drawn, scores, strict=True)
        )
        card = Scorecard(parent.record.task, round_, parent.cid, signer.peer_id, proof, lines, b"")
        cards.append(history.sign_card(card))
    return cards


def attest(
    history: History, record: RoundRecord, previous_head: bytes, seats: Sequence[int] | None = None
) -> Attestation:
    """A quorum of precommits for a record; by default of everybody."""
    votes = []
    for seat in range(len(history.signers)) if seats is None else seats:
        signer = history.signers[seat]
        vote = Vote(
            record.task, record.round, 0, int(Step.PRECOMMIT), record.digest(), record.rewards_root,
            signer.peer_id, b"",
        )  # fmt: skip
        root = compute_vote_root(history.committee, vote, previous_head)
        votes.append(replace(vote, signature=signer.sign_bls(root)))
    return build_attestation(history.committee, record.cid(), 0, votes)


def write_home(history: History, home: Path) -> None:
    """Lay a history out as the home of a peer that ran: blocks, index of decisions, run file, committee."""
    home.mkdir(parents=True, exist_ok=True)
    committee_file = home / COMMITTEE_FILE
    committee_file.write_bytes(history.committee.to_block().encode())
    write_run_file(PeerConfig(home=home, spec=history.spec, network=LOCAL, committee_file=committee_file))
    with (
        DiskStore.open(home / "blocks", quota_bytes=1 << 30) as store,
        VoteJournal.open(home / f"ledger-{history.spec.task_id.hex()[:16]}.journal") as index,
    ):
        with store.batch() as put:
            for cid in history.store.blocks():
                put(cid, history.store.get(cid))
        ledger = Ledger(store, index, history.spec.cid())
        for decision in history.decisions:
            ledger.append(decision.record, decision.attestation, ())
