"""The decided rounds of one task, as this peer keeps them: blocks in the store, an index in a journal.

Law: append-only and in order; what is appended was decided or verified before.  Blocks are written before
the index entry that names them, so a crash between the two loses an entry, never a block that is named.
The head chain (signing.compute_head) is recomputed on open, so the index cannot disagree with the records.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from p2pflock.errors import InvalidMessageError, LocalProtocolError
from p2pflock.ports import BlobStore
from p2pflock.primitives import signing, wire
from p2pflock.primitives.cid import CID
from p2pflock.protocol.messages import Attestation, Manifest, RoundRecord
from p2pflock.protocol.settlement import Tables


class Entry(Protocol):
    @property
    def round(self) -> int: ...

    @property
    def kind(self) -> str: ...

    @property
    def body(self) -> bytes: ...


class Journal(Protocol):
    """Durable append: on disk before it returns (storage/journal.py)."""

    def append(self, kind: str, body: bytes, *, round_: int) -> None: ...

    def replay(self) -> Iterable[Entry]: ...


@dataclass(frozen=True, slots=True)
class Decision:
    """A decided round: its record and the attestation this peer knows for it (None for genesis)."""

    record: RoundRecord
    cid: CID
    attestation: Attestation | None
    head: bytes  # chained digest after this round; the task id for genesis


def build_manifest(record: RoundRecord, spec: CID) -> Manifest:
    return Manifest(
        task=record.task,
        spec=spec,
        round=record.round,
        record=record.cid(),
        weights=record.weights,
        model_hash=record.model_hash,
    )


def compute_head(record: RoundRecord, previous_head: bytes) -> bytes:
    """32-byte chained digest after `record`; the anchor contract keeps the same chain."""
    return signing.compute_head(
        task=record.task,
        round_=record.round,
        record_digest=record.digest(),
        rewards_root=record.rewards_root,
        previous_head=previous_head,
    )


class Ledger:
    """Decisions 0..head of one task."""

    def __init__(self, store: BlobStore, journal: Journal, spec: CID) -> None:
        self._store = store
        self._journal = journal
        self.spec = spec
        self._decisions: list[Decision] = []
        self._tables = Tables()
        for record_cid, attestation_cid in self.read_index(journal.replay()):
            attestation = Attestation.decode(store.get(attestation_cid)) if attestation_cid else None
            self._push(RoundRecord.decode(store.get(record_cid)), attestation)

    @staticmethod
    def read_index(entries: Iterable[Entry]) -> Iterator[tuple[CID, CID | None]]:
        """Record and attestation of each round, oldest first, from the entries of an index journal."""
        for entry in entries:
            if entry.kind == "decided":
                record, attestation = wire.unpack(entry.body, max_bytes=256)
                yield CID.from_bytes(record), CID.from_bytes(attestation) if attestation else None

    @property
    def head(self) -> Decision:
        return self._decisions[-1]

    @property
    def is_empty(self) -> bool:
        return not self._decisions

    @property
    def tables(self) -> Tables:
        """Trust and rewards after the last decided round."""
        return self._tables

    def at(self, round_: int) -> Decision | None:
        return self._decisions[round_] if 0 <= round_ < len(self._decisions) else None

    def append(
        self, record: RoundRecord, attestation: Attestation | None, blocks: Iterable[bytes]
    ) -> Decision:
        """`blocks`: the encoded DAG-CBOR objects the record links to (headers, scorecards, committee).

        Raises LocalProtocolError out of order."""
        for block in blocks:
            self._store.put(CID.of_dag_cbor(block), block)
        encoded = record.encode()
        self._store.put(CID.of_dag_cbor(encoded), encoded)
        manifest = build_manifest(record, self.spec)
        self._store.put(manifest.cid(), manifest.encode())
        attestation_cid = b""
        if attestation is not None:
            self._store.put(attestation.cid(), attestation.encode())
            self._store.pin(attestation.cid())
            attestation_cid = attestation.cid().to_bytes()
        # A manifest reaches its whole history, so the newest one is all that has to be pinned.
        self._store.pin(manifest.cid())
        if not self.is_empty:
            self._store.unpin(build_manifest(self.head.record, self.spec).cid())
        decision = self._push(record, attestation)
        entry = wire.pack([decision.cid.to_bytes(), attestation_cid])
        self._journal.append("decided", entry, round_=record.round)
        return decision

    def _push(self, record: RoundRecord, attestation: Attestation | None) -> Decision:
        if record.round != len(self._decisions):
            raise LocalProtocolError(f"round {record.round} appended after {len(self._decisions) - 1}")
        cid = record.cid()
        if record.round == 0:
            head = record.task
        else:
            previous = self.head
            if record.parent != previous.cid:
                raise InvalidMessageError(f"round {record.round} does not follow the one known before it")
            head = compute_head(record, previous.head)
        decision = Decision(record, cid, attestation, head)
        self._decisions.append(decision)
        self._tables = self._tables.after(record)
        return decision
