"""Peers serve each other blocks and decided rounds; a late peer catches up by verifying and folding.

Law: nothing fetched is believed.  A block must hash to its id, a record must follow the head we hold and
carry a quorum of its committee, and the fold of its payloads must give the model hash the quorum signed.
Attack: a poisoned state download (stock hivemind believes whoever claims the highest priority); here a
snapshot is only taken when its hash is the one a quorum attested.

Trust decisions are in protocol/; this file fetches.  Requests and answers are canonical msgpack, bounded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from p2pflock.errors import InvalidMessageError, RemoteProtocolError, UnavailableError
from p2pflock.node.ledger import Ledger, compute_head
from p2pflock.ports import BlobStore, FoldInput, Requests, Trainer
from p2pflock.primitives import unixfs, wire
from p2pflock.primitives.cid import CID, RAW
from p2pflock.protocol.attestation import verify_attestation
from p2pflock.protocol.committee import Committee
from p2pflock.protocol.messages import (
    MAX_PAYLOAD_BYTES,
    Attestation,
    ContributionHeader,
    Judgement,
    RoundRecord,
    Scorecard,
)

BLOCK_PROTOCOL = "/p2pflock/block/1"
ROUNDS_PROTOCOL = "/p2pflock/rounds/1"
MAX_BLOCK_BYTES = 1 << 20
MAX_ANSWER_BYTES = 1 << 20
MAX_WEIGHTS_BYTES = 1 << 34
ROUNDS_A_REQUEST = 16
REQUEST_SECONDS = 8.0  # for a block of 256 KiB that is 0.3 Mb/s; who is lost or frozen must not hold up a catch-up
MAX_FAILURES = 1024


class BlockExchange:
    """Serves the local store over the requests port and fetches from peers, most recently useful first."""

    def __init__(self, requests: Requests, store: BlobStore) -> None:
        self._requests = requests
        self._store = store
        self._failures: dict[bytes, int] = {}  # peer -> requests in a row that gave nothing
        requests.serve(BLOCK_PROTOCOL, self._serve_block, max_request_bytes=64)

    async def _serve_block(self, peer: bytes, request: bytes) -> bytes:
        try:
            return self._store.get(CID.from_bytes(request))
        except UnavailableError:
            return b""

    async def get(self, cid: CID, peers: Sequence[bytes]) -> bytes:
        """The block from here or from any of `peers`; stored on the way.  Raises UnavailableError."""
        if self._store.has(cid):
            try:
                return self._store.get(cid)
            except UnavailableError:
                pass  # damaged on disk: heal it from a peer
        # Attack: a peer that keeps every request waiting until its deadline; who failed is asked last.
        for peer in sorted(peers, key=lambda peer: self._failures.get(peer, 0)):
            try:
                data = await self._requests.request(
                    peer,
                    BLOCK_PROTOCOL,
                    cid.to_bytes(),
                    max_response_bytes=MAX_BLOCK_BYTES,
                    deadline_seconds=REQUEST_SECONDS,
                )
            except RemoteProtocolError:
                self._note_failure(peer)
                continue
            if (data or cid == CID.of(RAW, b"")) and cid.matches(data):
                self._failures.pop(peer, None)
                self._store.put(cid, data)
                return data
            self._note_failure(peer)
        raise UnavailableError(f"no peer has block {cid}")

    def _note_failure(self, peer: bytes) -> None:
        if peer in self._failures or len(self._failures) < MAX_FAILURES:
            self._failures[peer] = self._failures.get(peer, 0) + 1

    async def get_file(self, root: CID, peers: Sequence[bytes], *, max_bytes: int) -> bytes:
        """A whole UnixFS file, every block checked; raises UnavailableError or InvalidMessageError."""
        await self._fetch_tree(root, peers, depth=4)
        return b"".join(unixfs.assemble(root, self._store.get, max_bytes=max_bytes))

    async def _fetch_tree(self, root: CID, peers: Sequence[bytes], depth: int) -> None:
        if depth < 0:
            raise InvalidMessageError("file tree too deep")
        block = await self.get(root, peers)
        if root.codec != RAW:
            for child in unixfs.iter_links(block):
                await self._fetch_tree(child, peers, depth - 1)


@dataclass(frozen=True, slots=True)
class CaughtUp:
    from_round: int
    to_round: int


async def adopt_weights(
    trainer: Trainer, blocks: BlockExchange, record: RoundRecord, sources: Sequence[bytes]
) -> None:
    """Load the weights of an attested record.  Raises UnavailableError, InvalidMessageError."""
    weights = await blocks.get_file(record.weights, sources, max_bytes=MAX_WEIGHTS_BYTES)
    if hashlib.sha256(weights).digest() != record.model_hash:
        raise InvalidMessageError(f"the weights of round {record.round} are not the attested model")
    await trainer.load(weights)


class RoundSync:
    """Serves decided rounds and follows those of others."""

    def __init__(
        self,
        requests: Requests,
        blocks: BlockExchange,
        store: BlobStore,
        ledger: Ledger,
        trainer: Trainer,
        committee: Committee,
        *,
        is_dense: bool = False,
    ) -> None:
        self._requests = requests
        self._blocks = blocks
        self._store = store
        self._ledger = ledger
        self._trainer = trainer
        self._committee = committee
        self._is_dense = is_dense
        requests.serve(ROUNDS_PROTOCOL, self._serve_rounds, max_request_bytes=128)

    async def _serve_rounds(self, peer: bytes, request: bytes) -> bytes:
        asked = wire.unpack(request, max_bytes=128)
        if type(asked) is not list or len(asked) != 2:
            raise InvalidMessageError("rounds request: not a task and a round")
        task, first = asked
        answer: list[list[bytes]] = []
        size = 0
        if task == self._ledger.head.record.task and type(first) is int and first > 0:
            while len(answer) < ROUNDS_A_REQUEST and (decision := self._ledger.at(first + len(answer))):
                assert decision.attestation is not None
                entry = [decision.record.encode(), decision.attestation.encode()]
                size += sum(map(len, entry)) + 16
                if size > MAX_ANSWER_BYTES:
                    break
                answer.append(entry)
        return wire.pack(answer)

    async def fetch_decisions(self, peer: bytes) -> list[tuple[RoundRecord, Attestation]]:
        """The rounds after our head that `peer` holds, each verified to follow and to carry a quorum.

        Raises RemoteProtocolError when the peer's answer is late or false."""
        head = self._ledger.head
        data = await self._requests.request(
            peer,
            ROUNDS_PROTOCOL,
            wire.pack([head.record.task, head.record.round + 1]),
            max_response_bytes=MAX_ANSWER_BYTES + 4096,
            deadline_seconds=REQUEST_SECONDS,
        )
        answer = wire.unpack(data, max_bytes=MAX_ANSWER_BYTES + 4096)
        if type(answer) is not list or len(answer) > ROUNDS_A_REQUEST:
            raise InvalidMessageError("rounds answer: not a short list")
        decisions: list[tuple[RoundRecord, Attestation]] = []
        parent_cid, previous_head, expected = head.cid, head.head, head.record.round + 1
        for entry in answer:
            if type(entry) is not list or len(entry) != 2 or not all(type(e) is bytes for e in entry):
                raise InvalidMessageError("rounds answer: malformed entry")
            record, attestation = RoundRecord.decode(entry[0]), Attestation.decode(entry[1])
            if record.round != expected or record.parent != parent_cid:
                raise InvalidMessageError("rounds answer: does not follow our head")
            verify_attestation(self._committee, attestation, record, previous_head)
            decisions.append((record, attestation))
            parent_cid, expected = record.cid(), expected + 1
            previous_head = compute_head(record, previous_head)
        return decisions

    async def catch_up(
        self,
        peer: bytes,
        others: Sequence[bytes],
        fetched: Sequence[tuple[RoundRecord, Attestation]] = (),
    ) -> CaughtUp:
        """Fetch, verify and fold every decided round that `peer` is ahead of us.

        Args:
            peer: whom to ask for rounds.
            others: who may have the blocks too.
            fetched: what fetch_decisions(peer) gave just now.
        """
        start = self._ledger.head.record.round
        sources = [peer, *(p for p in others if p != peer)]
        if not fetched or fetched[0][0].parent != self._ledger.head.cid:
            fetched = await self.fetch_decisions(peer)
        decisions = fetched
        while decisions:
            for record, attestation in decisions:
                linked = await self._fetch_linked(record, sources)
                await self._fold(record, linked, sources)
                self._ledger.append(record, attestation, [m.encode() for m in linked])
            decisions = await self.fetch_decisions(peer)
        return CaughtUp(start, self._ledger.head.record.round)

    async def restore(self) -> int:
        """After a restart: the trainer holds the genesis model; bring it to the ledger's head from the
        newest snapshot in the store and the payloads since.  Returns the number of folds."""
        head = self._ledger.head.record.round
        base = head
        while base > 0 and not self._has_weights(base):
            base -= 1
        if base > 0:
            decision = self._ledger.at(base)
            assert decision is not None
            weights = b"".join(
                unixfs.assemble(decision.record.weights, self._store.get, max_bytes=MAX_WEIGHTS_BYTES)
            )
            if await self._trainer.load(weights) != decision.record.model_hash:
                raise InvalidMessageError(f"stored snapshot of round {base} is not the attested model")
        for round_ in range(base + 1, head + 1):
            decision = self._ledger.at(round_)
            assert decision is not None
            await self._fold(decision.record, await self._fetch_linked(decision.record, ()), ())
        return head - base

    def _has_weights(self, round_: int) -> bool:
        decision = self._ledger.at(round_)
        return decision is not None and self._store.has(decision.record.weights)

    async def _fetch_linked(
        self, record: RoundRecord, sources: Sequence[bytes]
    ) -> list[ContributionHeader | Scorecard]:
        headers = [
            ContributionHeader.decode(await self._blocks.get(contribution.header, sources))
            for contribution in record.contributions
        ]
        cards = [Scorecard.decode(await self._blocks.get(card, sources)) for card in record.scorecards]
        return [*headers, *cards]

    async def _fold(
        self, record: RoundRecord, linked: Sequence[ContributionHeader | Scorecard], sources: Sequence[bytes]
    ) -> None:
        if self._is_dense:  # a mean cannot be computed again: what a quorum attested has to do
            await adopt_weights(self._trainer, self._blocks, record, sources)
            return
        headers = {h.cid(): h for h in linked if isinstance(h, ContributionHeader)}
        inputs = []
        for contribution in record.contributions:
            header = headers[contribution.header]
            payload = await self._blocks.get_file(header.payload, sources, max_bytes=MAX_PAYLOAD_BYTES)
            if contribution.judgement == Judgement.ACCEPTED:
                inputs.append(FoldInput(payload, contribution.weight))
        result = await self._trainer.fold(record.round, inputs)
        if result.model_hash != record.model_hash:
            raise InvalidMessageError(f"round {record.round}: the fold does not give the attested model")
        await self._trainer.adopt(result.model_hash)
