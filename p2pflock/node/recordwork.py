"""Making and checking round records: fetch what a record names, settle, fold, compare.

Law: one function, `_rebuild`, turns contributions, scorecards and absences into a record; a proposer calls it
to make one and everybody else calls it to check one, so the two can never drift apart.  A proposal is right
when the rebuilt record has the same bytes.

Attack: a proposer names contributions or scorecards that nobody else has, or that are forged.  Each is
fetched by its content id, validated like gossip, and missing ones make the check fail within its deadline.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import trio

from p2pflock.errors import InvalidMessageError, UnavailableError
from p2pflock.node.context import PeerContext
from p2pflock.node.ledger import Decision
from p2pflock.node.sync import BlockExchange, adopt_weights
from p2pflock.ports import FoldInput, FoldResult
from p2pflock.primitives import shuffle
from p2pflock.primitives.cid import CID
from p2pflock.protocol import settlement, validation
from p2pflock.protocol.attestation import verify_attestation
from p2pflock.protocol.collection import Collection
from p2pflock.protocol.committee import compute_beacon
from p2pflock.protocol.messages import (
    Absentee,
    Attestation,
    ContributionHeader,
    Proposal,
    RoundRecord,
    Scorecard,
)

PAYLOAD_SECONDS = 20.0
NEAR = 8  # neighbours that are asked for a block beside those who must have it


class RecordWork:
    """Builds, checks and concludes the records of this peer's rounds."""

    def __init__(self, context: PeerContext, blocks: BlockExchange) -> None:
        self._context = context
        self._blocks = blocks
        self._headers: dict[CID, ContributionHeader] = {}
        self._cards: dict[CID, Scorecard] = {}
        self._folds: dict[tuple[tuple[CID, int], ...], FoldResult] = {}
        self._folding = trio.Lock()
        self._mean: tuple[frozenset[CID], FoldResult] | None = None
        self._facts: validation.RoundFacts | None = None  # of the round after the parent asked for last

    async def take_mean(self, headers: Sequence[ContributionHeader], mean: bytes) -> None:
        """Dense mode: the mean over exactly these contributions.  Raises InvalidMessageError."""
        async with self._folding:
            result = await self._context.trainer.set_dense(mean)
            self._mean = frozenset(header.cid() for header in headers), result

    async def build(
        self,
        parent: Decision,
        headers: Sequence[ContributionHeader],
        cards: Sequence[Scorecard],
        absent: Sequence[Absentee],
    ) -> RoundRecord:
        """Our own candidate.  Raises RemoteProtocolError when a payload is gone."""
        return await self._rebuild(parent, headers, cards, absent, parent.attestation)

    async def fold_ahead(
        self, parent: Decision, headers: Sequence[ContributionHeader], cards: Sequence[Scorecard]
    ) -> None:
        """What a proposal over these would make us fold; kept for when it comes."""
        context = self._context
        held = await context.swarm.collect(context.round_key(parent.record.round + 1))
        if all(header.payload in held for header in headers):
            panels = self._facts_after(parent).panels
            settled = settlement.settle(context.committee, context.ledger.tables, headers, cards, panels=panels)
            await self._fold_settled(parent.record.round + 1, headers, settled.weights, held)

    async def check(self, parent: Decision, proposal: Proposal, collection: Collection) -> str:
        """Why the proposal is wrong, or an empty string when it is right.

        Raises UnavailableError while something it names is not here: that is no verdict.
        """
        try:
            record = RoundRecord.decode(proposal.record)
            await self._check_record(parent, record, proposal.proposer, collection)
        except InvalidMessageError as error:
            return str(error)
        return ""

    async def conclude(
        self, parent: Decision, encoded: bytes, attestation: Attestation, collection: Collection
    ) -> Decision:
        """Make a decided record's checkpoint the current one, store its blocks, append it to the ledger.

        The model is adopted before the ledger names it: a crash in between repeats the fold (sync.restore).
        May be cancelled while it fetches; from then on it finishes, because a ledger behind its trainer would
        make every later fold wrong.  Raises RemoteProtocolError when a part cannot be had.
        """
        context = self._context
        record = RoundRecord.decode(encoded)
        authors = [seat.peer for seat in context.committee.seats if seat.peer != context.signer.peer_id]
        # Whom we are connected with is likelier to answer than any author, in a swarm where that is not everybody.
        near = sorted(context.host.connected_peers())[:NEAR]
        headers, cards = await self._gather(record, collection, [*authors, *near])
        # Who precommitted had checked the record, so it holds the payloads.
        signers = [context.peer_of(seat) for seat in sorted(attestation.seats()) if seat != context.seat]
        if context.seat is None:  # else everybody without a vote would ask the same few
            order = shuffle.shuffled(shuffle.derive(parent.cid.digest, "ask", context.index or 0), len(signers))
            signers = [*near, *(signers[place] for place in order)]
        payloads = {} if context.facts.is_dense else await self._payloads(headers, signers)
        with trio.CancelScope(shield=True):
            if context.facts.is_dense:
                await self._adopt_mean(record, authors)
            else:
                await self._adopt_fold(record, headers, payloads)
            if self._is_snapshot(record.round):
                context.store_file(await context.trainer.export())
            blocks = [message.encode() for message in (*headers, *cards)]
            decision = context.ledger.append(
                record, attestation, [context.committee.encode(), *blocks]
            )
        self._mean = None
        self._headers.clear()
        self._cards.clear()
        self._folds.clear()
        return decision

    async def _adopt_fold(
        self,
        record: RoundRecord,
        headers: Sequence[ContributionHeader],
        payloads: Mapping[CID, bytes],
    ) -> None:
        context = self._context
        fold = await self._fold(record, headers, payloads)
        if fold.model_hash != record.model_hash:
            raise InvalidMessageError(f"round {record.round}: the fold does not give the decided model")
        await context.trainer.adopt(record.model_hash)
        for header in headers:
            context.store_file(payloads[header.payload])

    async def _adopt_mean(self, record: RoundRecord, authors: Sequence[bytes]) -> None:
        """Our own mean, or, if we had no part in it, the attested weights themselves."""
        if self._mean is not None and self._mean[1].model_hash == record.model_hash:
            await self._context.trainer.adopt(record.model_hash)
        else:
            await adopt_weights(self._context.trainer, self._blocks, record, authors)

    def _is_snapshot(self, round_: int) -> bool:
        facts = self._context.facts
        return facts.is_dense or round_ % facts.snapshot_every_rounds == 0 or round_ == facts.rounds

    # --- checking ---
    async def _check_record(
        self, parent: Decision, record: RoundRecord, proposer: bytes, collection: Collection
    ) -> None:
        committee = self._context.committee
        if record.round != parent.record.round + 1 or record.parent != parent.cid:
            raise InvalidMessageError("record does not follow our head")
        before = self._context.ledger.at(parent.record.round - 1)
        if (record.parent_attestation is None) != (before is None):
            raise InvalidMessageError("every parent but genesis carries an attestation, and genesis none")
        if record.parent_attestation is not None and before is not None:
            verify_attestation(committee, record.parent_attestation, parent.record, before.head)
        included = {contribution.seat for contribution in record.contributions}
        if not collection.cohort.has_minimum(included):
            raise InvalidMessageError("record holds contributions of less than a quorum")
        # Attack: a proposer leaves out most of a drawn cohort.  It may only once we too have waited in vain.
        if not collection.is_enough(included):
            raise UnavailableError("record holds contributions of less than a quorum, and we still wait for more")
        near = sorted(self._context.host.connected_peers())[:NEAR]
        headers, cards = await self._gather(record, collection, [proposer, *near])
        scorers = {committee.seat_of(card.validator) or 0 for card in cards}
        if not self._context.facts.is_dense and not committee.has_quorum(scorers):
            raise InvalidMessageError("record holds scorecards of less than a quorum")
        rebuilt = await self._rebuild(
            parent, headers, cards, record.absent, record.parent_attestation, [proposer]
        )
        if rebuilt != record:
            raise InvalidMessageError(f"record differs from ours in {_describe_difference(rebuilt, record)}")

    # --- gathering ---
    def _facts_after(self, parent: Decision) -> validation.RoundFacts:
        if self._facts is None or self._facts.parent != parent.cid:
            committee, facts = self._context.committee, self._context.facts
            round_ = parent.record.round + 1
            self._facts = validation.facts_of(
                committee,
                parent.record,
                parent.head,
                compute_beacon(committee.task, committee.epoch, round_, parent.cid.digest),
                max_steps=facts.max_steps,
                batch_size=facts.batch_size,
            )
        return self._facts

    async def _gather(
        self, record: RoundRecord, collection: Collection, sources: Sequence[bytes]
    ) -> tuple[list[ContributionHeader], list[Scorecard]]:
        """The headers and cards a record names, validated, in the record's order."""
        known_headers = {h.cid(): h for h in collection.headers.values()} | self._headers
        known_cards = {c.cid(): c for c in collection.scorecards.values()} | self._cards
        context = self._context
        parent = context.ledger.at(record.round - 1)
        assert parent is not None
        headers, cards = [], []
        for contribution in record.contributions:
            header = known_headers.get(contribution.header)
            if header is None:
                header = ContributionHeader.decode(await self._blocks.get(contribution.header, sources))
                validation.require(validation.validate_header(self._facts_after(parent), header))
                self._headers[contribution.header] = header
            if context.committee.index_of(header.peer) != contribution.seat:
                raise InvalidMessageError("contribution names the wrong seat")
            headers.append(header)
        for cid in record.scorecards:
            card = known_cards.get(cid)
            if card is None:
                card = Scorecard.decode(await self._blocks.get(cid, sources))
                validation.require(validation.validate_scorecard(self._facts_after(parent), card))
                self._cards[cid] = card
            cards.append(card)
        return headers, cards

    async def _payloads(
        self, headers: Sequence[ContributionHeader], sources: Sequence[bytes]
    ) -> Mapping[CID, bytes]:
        """Payloads of these headers from the exchange; what is missing from `sources`, then from the authors:
        an author may have died after it gave its payload to others."""
        context = self._context
        if not headers:
            return {}
        key = context.round_key(headers[0].round)
        held = await context.swarm.collect(key)
        missing = [header for header in headers if header.payload not in held]
        for header in missing:
            try:
                await context.swarm.expect(key, header.payload, header.payload_bytes)
            except InvalidMessageError as error:  # no room here: says nothing about the record
                raise UnavailableError(error.message) from error
        for source in (*sources, *(header.peer for header in missing)):
            if not missing:
                break
            if source == context.signer.peer_id:
                continue
            with contextlib.suppress(UnavailableError):  # what it gave before it fell silent counts
                await context.swarm.swap(key, source, deadline_seconds=PAYLOAD_SECONDS)
            held = await context.swarm.collect(key)
            missing = [header for header in missing if header.payload not in held]
        if missing:
            raise UnavailableError(f"payload of {missing[0].peer.hex()[-8:]} did not arrive")
        return held

    # --- the one function ---
    async def _rebuild(
        self,
        parent: Decision,
        headers: Sequence[ContributionHeader],
        cards: Sequence[Scorecard],
        absent: Sequence[Absentee],
        parent_attestation: Attestation | None,
        sources: Sequence[bytes] = (),
    ) -> RoundRecord:
        context = self._context
        headers = sorted(headers, key=lambda header: context.committee.index_of(header.peer) or 0)
        payloads = {} if context.facts.is_dense else await self._payloads(headers, sources)
        settled = settlement.settle(
            context.committee, context.ledger.tables, headers, cards, panels=self._facts_after(parent).panels
        )
        if context.facts.is_dense:
            fold = self._get_mean(headers)
        else:
            fold = await self._fold_settled(parent.record.round + 1, headers, settled.weights, payloads)
        return settlement.compute_record(
            parent=parent.record,
            parent_attestation=parent_attestation,
            committee=context.committee,
            headers=headers,
            absent=absent,
            scorecards=cards,
            settled=settled,
            model_hash=fold.model_hash,
            weights=fold.weights,
        )

    def _get_mean(self, headers: Sequence[ContributionHeader]) -> FoldResult:
        if self._mean is None or self._mean[0] != frozenset(header.cid() for header in headers):
            raise UnavailableError("we averaged with another group")
        return self._mean[1]

    async def _fold(
        self, record: RoundRecord, headers: Sequence[ContributionHeader], payloads: Mapping[CID, bytes]
    ) -> FoldResult:
        weights = [contribution.weight for contribution in record.contributions]
        return await self._fold_settled(record.round, headers, weights, payloads, must_be_last=True)

    async def _fold_settled(
        self,
        round_: int,
        headers: Sequence[ContributionHeader],
        weights: Sequence[int],
        payloads: Mapping[CID, bytes],
        *,
        must_be_last: bool = False,
    ) -> FoldResult:
        """Fold the accepted payloads in seat order, once for each set."""
        accepted = [(h.payload, w) for h, w in zip(headers, weights, strict=True) if w > 0]
        key = tuple(accepted)
        async with self._folding:
            last = next(reversed(self._folds), None)
            if key in self._folds and (not must_be_last or last == key):
                return self._folds[key]
            inputs = [FoldInput(payloads[cid], weight) for cid, weight in accepted]
            self._folds.pop(key, None)
            self._folds[key] = await self._context.trainer.fold(round_, inputs)
            return self._folds[key]


def _describe_difference(ours: RoundRecord, theirs: RoundRecord) -> str:
    return ", ".join(
        name for name in RoundRecord.__dataclass_fields__ if getattr(ours, name) != getattr(theirs, name)
    )

