"""A checkpoint's history read block by block: the records down to genesis, then what each of them names.

Law: this file reads and remembers what was missing or wrong; what that means is judged in provenance.py.
Blocks come from anybody, so every one is re-hashed, decoded strictly, and dropped again: besides the ids of the
records, never more than two rounds are in memory, however long or absurd the history.

Attack: a small file that makes the verifier work without end.  A record can only name a block by its hash, so
histories have no cycles and are no longer than the data that was brought; one object is decoded once a record,
one payload re-hashed once, whoever and however often names it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from p2pflock.errors import InvalidMessageError, RemoteProtocolError, UnavailableError
from p2pflock.primitives import schema, signing, unixfs
from p2pflock.primitives.cid import CID, DAG_CBOR
from p2pflock.protocol.committee import Committee
from p2pflock.protocol.messages import CommitteeBlock, ContributionHeader, RoundRecord, Scorecard

MAX_WEIGHTS_BYTES = 1 << 36
_COMMITTEES_KEPT = 4

Get = Callable[[CID], bytes]  # raises UnavailableError when the block is not to be had
M = TypeVar("M", bound=schema.Record)


class Reader:
    """Blocks that hash to their ids.

    Attributes:
        missing: how many reads found no block; `first_missing` names one.
        wrong: the first block that is not what its id or its place says; empty when there is none.
    """

    def __init__(self, get: Get) -> None:
        self._get = get
        self.missing = 0
        self.first_missing = ""
        self.wrong = ""

    def _note(self, error: RemoteProtocolError) -> None:
        if isinstance(error, InvalidMessageError):
            self.wrong = self.wrong or error.message
        else:
            self.first_missing = self.first_missing or error.message
            self.missing += 1

    def fetch(self, cid: CID) -> bytes:
        """Raises UnavailableError, or InvalidMessageError when the block does not hash to its id."""
        try:
            data = self._get(cid)
        except RemoteProtocolError:
            raise UnavailableError(f"block {cid} is missing") from None
        if not cid.matches(data):
            raise InvalidMessageError(f"block {cid} does not hash to its id")
        return data

    def block(self, cid: CID) -> bytes | None:
        """A DAG-CBOR block, not yet decoded; None, and noted, when there is none."""
        try:
            # Attack: the same bytes under a raw id would be another checkpoint id for the same checkpoint.
            if cid.codec != DAG_CBOR:
                raise InvalidMessageError(f"{cid} names no DAG-CBOR block")
            return self.fetch(cid)
        except RemoteProtocolError as error:
            self._note(error)
            return None

    def read(self, kind: type[M], cid: CID) -> M | None:
        """An object by its id; None, and noted, when it is missing or not one."""
        data = self.block(cid)
        if data is None:
            return None
        try:
            return kind.decode(data)
        except InvalidMessageError as error:
            self._note(InvalidMessageError(f"block {cid}: {error.message}"))
            return None

    def hash_file(self, root: CID, max_bytes: int, *, is_optional: bool = False) -> tuple[bytes, int] | None:
        """(sha256, size) of a file, streamed; None, and noted, when it is not whole.

        An optional file that is missing is not noted; one that is wrong always is.
        """
        hasher, size = hashlib.sha256(), 0
        try:
            for chunk in unixfs.assemble(root, self.fetch, max_bytes=max_bytes):
                hasher.update(chunk)
                size += len(chunk)
        except RemoteProtocolError as error:
            if not is_optional or isinstance(error, InvalidMessageError):
                self._note(error)
            return None
        return hasher.digest(), size


@dataclass(frozen=True, slots=True)
class Link:
    """One round of a history.  None stands for what is missing or wrong, and noted in the reader."""

    cid: CID
    record: RoundRecord
    committee: Committee | None
    headers: tuple[ContributionHeader | None, ...]  # aligned with record.contributions
    cards: tuple[Scorecard | None, ...]  # aligned with record.scorecards

    def whole(self) -> tuple[Committee, Sequence[ContributionHeader], Sequence[Scorecard]] | None:
        """Everything the record names, or None when something is missing."""
        headers = [header for header in self.headers if header is not None]
        cards = [card for card in self.cards if card is not None]
        if self.committee is None or len(headers) < len(self.headers) or len(cards) < len(self.cards):
            return None
        return self.committee, headers, cards


@dataclass(frozen=True, slots=True)
class Spine:
    """Ids of the records, oldest first, as far as they could be followed.

    Attributes:
        records: ends with the checkpoint's own record; starts with genesis only when `is_whole`.
        flaw: why the records are no history; empty when they are, or when they merely break off.
    """

    records: tuple[CID, ...]
    is_whole: bool
    flaw: str = ""


def read_spine(reader: Reader, head: CID, tell: Callable[[str], None]) -> Spine:
    """Follow the parents from a record down to genesis."""
    found: list[CID] = []
    child: RoundRecord | None = None
    cid: CID | None = head
    while cid is not None:
        record = reader.read(RoundRecord, cid)
        if record is None:
            return Spine(tuple(reversed(found)), is_whole=False)
        found.append(cid)
        flaw = _find_flaw(record, child)
        if flaw:
            return Spine(tuple(reversed(found)), is_whole=False, flaw=flaw)
        tell(f"read round {record.round}")
        child, cid = record, record.parent
    return Spine(tuple(reversed(found)), is_whole=True)


def _find_flaw(record: RoundRecord, child: RoundRecord | None) -> str:
    if child is not None and (record.round + 1, record.task) != (child.round, child.task):
        return f"round {child.round} does not follow its parent"
    if record.round == 0 and record.parent is not None:
        return "round 0 claims a parent"
    if record.round > 0 and record.parent is None:
        return "the records do not lead to genesis"
    return ""


def read_links(reader: Reader, spine: Spine) -> Iterator[Link]:
    """The rounds of a spine, oldest first, one at a time."""
    committees: dict[CID, Committee | None] = {}
    for cid in spine.records:
        record = reader.read(RoundRecord, cid)
        if record is None:  # gone since the spine was read
            return
        if record.committee not in committees:
            if len(committees) >= _COMMITTEES_KEPT:
                committees.clear()
            committees[record.committee] = _read_committee(reader, record.committee)
        headers = _read_all(reader, ContributionHeader, [c.header for c in record.contributions])
        cards = _read_all(reader, Scorecard, record.scorecards)
        yield Link(cid, record, committees[record.committee], headers, cards)


def _read_committee(reader: Reader, cid: CID) -> Committee | None:
    block = reader.read(CommitteeBlock, cid)
    if block is None:
        return None
    try:
        return Committee.from_block(block)
    except InvalidMessageError as error:
        reader.wrong = reader.wrong or f"block {cid}: {error.message}"
        return None


def _read_all(reader: Reader, kind: type[M], cids: Sequence[CID]) -> tuple[M | None, ...]:
    known: Mapping[CID, M | None] = {cid: reader.read(kind, cid) for cid in dict.fromkeys(cids)}
    return tuple(known[cid] for cid in cids)


def compute_head(record: RoundRecord, digest: bytes, previous_head: bytes) -> bytes:
    """32-byte chained digest after a round; the task id for genesis."""
    if record.round == 0:
        return record.task
    return signing.compute_head(
        task=record.task,
        round_=record.round,
        record_digest=digest,
        rewards_root=record.rewards_root,
        previous_head=previous_head,
    )
