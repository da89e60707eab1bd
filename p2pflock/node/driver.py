"""Drives one round: carries out what protocol/rounds.py asks for, and feeds it what happens.

Law: every slow thing (training, scoring, folding, fetching) is a task of its own that reports back into one
inbox, and one loop feeds the state machine, so the machine never runs twice at once and never waits.
What we sign is on disk before it is sent: contribution header, proposal and votes go through the journal first.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace

import trio

from p2pflock.errors import FlockError, LocalProtocolError, RemoteProtocolError, UnavailableError
from p2pflock.node.context import PeerContext
from p2pflock.node.ledger import Decision
from p2pflock.node.recordwork import RecordWork
from p2pflock.node.spreading import Spreading, Surroundings
from p2pflock.ports import PayloadScore, TrainResult
from p2pflock.primitives import unixfs
from p2pflock.primitives.cid import CID
from p2pflock.protocol import ballots, rounds
from p2pflock.protocol.attestation import build_attestation
from p2pflock.protocol.collection import Pacing
from p2pflock.protocol.committee import (
    compute_beacon,
    compute_cohort,
    compute_panels,
    compute_score_seed,
    compute_seed_root,
    compute_vote_root,
)
from p2pflock.protocol.consensus import Consensus
from p2pflock.protocol.messages import (
    ContributionHeader,
    Proposal,
    Score,
    Scorecard,
    Vote,
)
from p2pflock.protocol.pace import Pace
from p2pflock.protocol.timeouts import Timeouts

Message = ContributionHeader | Scorecard | Proposal | Vote

TICK_SECONDS = 0.25
RESEND_SECONDS = 2.0  # after a message was first sent; then thrice as long each time, up to ...
RARELY_SECONDS = 30.0
RESEND_GROWTH = 3.0
OTHERS_SECONDS = 8.0  # others' messages are sent again after this long: usually they arrived
AVERAGE_SECONDS = 20.0
RETRY_SECONDS = 0.4
INBOX = 4096
SMALL_COMMITTEE = 16  # seats up to which everything is said again as often as a small swarm may


class RoundDriver:
    """One round of one member.

    Args:
        context: the peer.
        publish: sends a signed message to everyone.
        live: places in the roster that were heard of lately.
        timeouts: what earlier rounds taught.
        pacing: grace windows.
        pace: H of this round, and where its times are noted.
    """

    def __init__(
        self,
        context: PeerContext,
        publish: Callable[[Message], Awaitable[None]],
        live: Callable[[], frozenset[int]],
        work: RecordWork,
        timeouts: Timeouts,
        pacing: Pacing,
        pace: Pace,
    ) -> None:
        if context.index is None:
            raise LocalProtocolError("an onlooker does not drive rounds")
        self._context = context
        self._seat = context.index  # place in the roster
        self._publish = publish
        self._live = live
        self._work = work
        parent = context.ledger.head
        self.round = parent.record.round + 1
        self._parent = parent
        self._key = context.round_key(self.round)
        self._beacon = compute_beacon(
            context.facts.task, context.committee.epoch, self.round, parent.cid.digest
        )
        self._cohort = compute_cohort(context.committee, self._beacon)
        self._shards = self._cohort.compute_shards(self._beacon)
        self._saved = [e for e in context.journal.replay() if e.round == self.round]
        self._machine = Consensus.restore(
            context.committee, self.round, context.seat, self._beacon, timeouts, self._saved_messages()
        )
        self._round = rounds.Round(
            context.committee,
            self._seat,
            self._machine,
            pacing,
            is_dense=context.facts.is_dense,
            cohort=self._cohort,
            panels=compute_panels(context.committee, self._cohort, self._beacon),
        )
        self._send, self._receive = trio.open_memory_channel[Callable[[float], Iterable[rounds.Effect]]](math.inf)
        self._pace = pace
        self._training = trio.CancelScope()
        self._scores: dict[CID, PayloadScore] = {}
        self._scoring = trio.Lock()
        self._scorable = trio.lowlevel.ParkingLot()  # while no payload is left to score
        # Nobody else can make it, so payloads cannot be fitted to what is drawn from it; it is out with our card.
        self._seed_proof = context.signer.sign_bls(
            compute_seed_root(context.facts.task, self.round, parent.cid)
        )
        self._is_finishing = False
        self._own_header: ContributionHeader | None = None
        self._own_card: Scorecard | None = None
        self._own_vector = b""
        self._decided: ballots.Decided | None = None
        self._started = self._header_at = self._payload_at = context.now
        self._collected_at = math.inf
        self._nursery: trio.Nursery | None = None
        self._spreading = Spreading(context.swarm, self._key, self._beacon, self._seat, self._look_around())
        self._wake = math.inf
        self._tick = 0.0  # when time is to be looked at, whatever comes in

    # --- inputs from the network ---
    @property
    def has_room(self) -> bool:
        """Whether another message from outside may be delivered; our own inputs are never refused."""
        return self._send.statistics().current_buffer_used < INBOX

    def deliver(self, message: Message) -> None:
        """A verified message of this round, while there is room."""
        machine = self._round
        match message:
            case ContributionHeader():
                self._feed(lambda now: self._on_header(message, now))
            case Scorecard():
                self._feed(lambda now: self._kept(message, machine.on_scorecard(message, now)))
            case Proposal():
                self._feed(lambda now: machine.on_proposal(message, now))
            case Vote():
                self._feed(lambda now: machine.on_vote(message, now))

    def _kept(
        self, message: ContributionHeader | Scorecard, effects: tuple[rounds.Effect, ...]
    ) -> tuple[rounds.Effect, ...]:
        """Attack: a member signs thousands of headers to fill our disk; only the first of a seat is stored."""
        if self._round.collection.holds(message):
            self._keep(message)
        return effects

    def _keep(self, message: ContributionHeader | Scorecard) -> None:
        """A record links to it, so whoever checks the record must be able to fetch it from us."""
        self._context.store.put(message.cid(), message.encode())

    def _on_header(self, header: ContributionHeader, now: float) -> tuple[rounds.Effect, ...]:
        effects = self._kept(header, self._round.on_header(header, now))
        if effects and self._collected_at == math.inf:  # a header that is sent again has none
            self._header_at = now  # somebody has just ended its training
        return effects

    def arrived(self, payload: CID) -> None:
        """The exchange holds a payload of this round."""
        if self._collected_at == math.inf:
            self._payload_at = self._context.now
        self._spreading.wake()
        self._feed(lambda now: self._round.on_payload(payload, now))

    @property
    def machine(self) -> Consensus:
        return self._machine

    @property
    def awaited(self) -> frozenset[int]:
        """Places in the roster that the round waits for: who votes, and who may contribute."""
        return frozenset({*range(len(self._context.committee.seats)), *self._cohort.members})

    @property
    def beacon(self) -> bytes:
        return self._beacon

    def _feed(self, step: Callable[[float], Iterable[rounds.Effect]]) -> None:
        """For what we did ourselves: must not get lost, and comes no faster than we act."""
        self._send.send_nowait(step)

    # --- the loop ---
    async def run(self) -> Decision:
        """Until the round is decided and its checkpoint adopted.  May be cancelled at any time.

        Raises RemoteProtocolError when a part of the decided round cannot be had from anybody."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._resend_loop)
            if not self._context.facts.is_dense:
                nursery.start_soon(self._spreading.run)
                if self._context.seat is not None:
                    nursery.start_soon(self._score_early)
            await self._begin()
            while self._decided is None:
                step = None
                with trio.move_on_after(min(TICK_SECONDS, max(0.01, self._wake - self._context.now))):
                    step = await self._receive.receive()
                now = self._context.now
                if step is not None:
                    await self._carry_out(step(now))
                    self._scorable.unpark_all()
                if step is not None and now < min(self._wake, self._tick):
                    continue  # a message comes far more often than time passes
                self._wake, self._tick = math.inf, now + TICK_SECONDS
                await self._carry_out(self._round.on_presence(self._live(), now))
                await self._carry_out(self._round.on_tick(now))
            nursery.cancel_scope.cancel()
        return await self._conclude(self._decided)

    async def _begin(self) -> None:
        header = next((ContributionHeader.decode(e.body) for e in self._saved if e.kind == "header"), None)
        now = self._context.now
        await self._carry_out(self._round.start(now, is_training=header is None))
        if header is not None and not self._context.facts.is_dense:
            # A second header for this slot would be an equivocation: send the saved one again.
            payload = b"".join(
                unixfs.assemble(header.payload, self._context.store.get, max_bytes=header.payload_bytes)
            )
            await self._contribute(header, payload)

    async def _carry_out(self, effects: Iterable[rounds.Effect]) -> None:
        assert self._nursery is not None
        for effect in effects:
            match effect:
                case rounds.Train():
                    self._nursery.start_soon(self._train)
                case rounds.FinishTraining():
                    self._is_finishing = True
                    self._nursery.start_soon(self._context.trainer.finish)
                case rounds.StopTraining():
                    self._training.cancel()
                case rounds.Fetch(_, header) if self._context.facts.is_dense:
                    self.arrived(header.payload)  # a dense vector is averaged, never sent around
                case rounds.Fetch(_, header):
                    await self._expect(header)
                case rounds.ScoreContributions(headers):
                    self._collected_at = min(self._collected_at, self._context.now)
                    self._context.events.emit("collected", round=self.round, contributions=len(headers))
                    work = self._average if self._context.facts.is_dense else self._score
                    self._nursery.start_soon(work, headers)
                case rounds.Probe(headers):
                    self._nursery.start_soon(self._probe, headers)
                case rounds.BuildCandidate():
                    self._nursery.start_soon(self._build, effect)
                case rounds.FoldAhead(headers, cards):
                    self._nursery.start_soon(self._fold_ahead, headers, cards)
                case rounds.HeaderEquivocation(first, second):
                    self._save_evidence(first, second)
                case ballots.Check() if self._context.seat is None:
                    pass  # a quorum of those who did check it decides
                case ballots.Check(proposal, digest):
                    self._nursery.start_soon(self._check, proposal, digest)
                case ballots.Save(messages):
                    for message in messages:
                        self._journal(message)
                case ballots.CastProposal():
                    await self._cast_proposal(effect)
                case ballots.CastVote():
                    await self._cast_vote(effect)
                case ballots.WakeAt(time):
                    self._wake = min(self._wake, time)
                case ballots.Equivocation(first, second):
                    self._save_evidence(first, second)
                case ballots.Decided():
                    self._decided = effect

    async def _expect(self, header: ContributionHeader) -> None:
        try:
            await self._context.swarm.expect(self._key, header.payload, header.payload_bytes)
            self._spreading.wake()
        except RemoteProtocolError as error:  # more than we have room for
            self._context.events.emit("dropped", what="contribution", reason=str(error))

    # --- training and scoring ---
    async def _train(self) -> None:
        context = self._context
        shard, shards = self._shards[self._seat], len(self._shards)
        with self._training:
            # Told to finish before it began: then one step is what there is time for.
            steps = 1 if self._is_finishing else self._pace.next_steps
            context.events.emit("training", round=self.round, steps=steps)
            begun = context.now
            result = await context.trainer.train(self.round, shard, shards, self._beacon, steps)
            self._pace.on_trained(result.steps, context.now - begun)
            header = self._build_header(result, shard)
            if not context.facts.is_dense:
                context.store_file(result.payload)
            context.journal.append("header", header.encode(), round_=self.round)
            context.events.emit(
                "contributed",
                round=self.round,
                payload_bytes=len(result.payload),
                steps=result.steps,
                samples=result.samples,
                loss_micro=result.loss_micro,
                train_seconds=result.step_micros / 1e6,
            )
            await self._contribute(header, result.payload)

    def _build_header(self, result: TrainResult, shard: int) -> ContributionHeader:
        bare = ContributionHeader(
            task=self._context.facts.task,
            round=self.round,
            parent=self._parent.cid,
            peer=self._context.signer.peer_id,
            payload=unixfs.compute_cid(result.payload),
            payload_bytes=len(result.payload),
            shard=shard,
            steps=result.steps,
            samples=result.samples,
            loss_micro=result.loss_micro,
            leaf_root=result.leaf_root,
            optimizer_hash=result.optimizer_hash,
            signature=b"",
        )
        return replace(bare, signature=self._context.signer.sign_bls(bare.signing_root()))

    async def _contribute(self, header: ContributionHeader, payload: bytes) -> None:
        if self._context.facts.is_dense:
            self._own_vector = payload
        else:
            await self._context.swarm.offer(self._key, header.payload, payload)
        self._keep(header)
        self._own_header = header
        self._header_at = max(self._header_at, min(self._context.now, self._collected_at))
        self._feed(lambda now: self._round.on_contribution(header, now))
        if not self._context.facts.is_dense and self._nursery is not None:
            self._nursery.start_soon(self._spreading.give, header.payload)
        await self._publish(header)

    async def _score_early(self) -> None:
        """Each payload as it arrives, while others still train: once the last is here, only that one is left."""
        seen = set[CID]()
        while True:
            ready = self._round.collection.ready()
            headers = [h for seat, h in self._round.collection.headers.items() if seat in ready]
            fresh = next((h for h in headers if h.payload not in seen and self._is_to_score(h)), None)
            if fresh is None or (self._own_header is None and self._seat in self._shards):
                await self._scorable.park()
            else:
                seen.add(fresh.payload)
                await self._measure((fresh,))

    def _is_to_score(self, header: ContributionHeader) -> bool:
        place = self._context.committee.index_of(header.peer)
        return place is not None and self._round.is_to_score(place)

    async def _score(self, headers: tuple[ContributionHeader, ...]) -> None:
        context = self._context
        scored = await self._measure([h for h in headers if self._is_to_score(h)])
        bare = Scorecard(
            task=context.facts.task,
            round=self.round,
            parent=self._parent.cid,
            validator=context.signer.peer_id,
            seed_proof=self._seed_proof,
            scores=tuple(
                Score(header.cid(), score.is_valid, score.cosine_micro, score.loss_delta_micro)
                for header, score in scored
            ),
            signature=b"",
        )
        card = replace(bare, signature=context.signer.sign_bls(bare.signing_root()))
        self._keep(card)
        self._own_card = card
        if invalid := self._seats_of(scored, is_valid=False):
            self._feed(lambda now: self._round.on_undecodable(invalid, now))
        self._feed(lambda now: self._round.on_scorecard(card, now))
        context.events.emit("scored", round=self.round, contributions=len(scored))
        await self._publish(card)

    async def _probe(self, headers: tuple[ContributionHeader, ...]) -> None:
        scored = await self._measure(headers)
        sound, invalid = self._seats_of(scored, is_valid=True), self._seats_of(scored, is_valid=False)
        self._feed(lambda now: self._round.on_probed(sound, invalid, now))

    async def _measure(
        self, headers: Sequence[ContributionHeader]
    ) -> list[tuple[ContributionHeader, PayloadScore]]:
        """Those whose payloads are here, with their scores."""
        async with self._scoring:
            payloads = await self._context.swarm.collect(self._key)
            held = [header for header in headers if header.payload in payloads]
            left = list({h.payload: None for h in held if h.payload not in self._scores})
            if left:
                seed = compute_score_seed(self._seed_proof)
                scores = await self._context.trainer.score(self.round, [payloads[cid] for cid in left], seed)
                self._scores.update(zip(left, scores, strict=True))
        # Attack: a header that lies about its payload's size.
        return [
            (h, self._scores[h.payload] if len(payloads[h.payload]) == h.payload_bytes else PayloadScore(False, 0, 0))
            for h in held
        ]

    def _seats_of(
        self, scored: Iterable[tuple[ContributionHeader, PayloadScore]], *, is_valid: bool
    ) -> frozenset[int]:
        seats = (
            self._context.committee.index_of(header.peer) for header, score in scored if score.is_valid == is_valid
        )
        return frozenset(seat for seat in seats if seat is not None)

    async def _average(self, headers: tuple[ContributionHeader, ...]) -> None:
        """Dense mode: the mean of everybody's pseudo-gradient, all or nothing; tried again with whoever lives.

        Members may see different groups for a while; who is dead stops being live for all of them in seconds.
        """
        context = self._context
        while self._own_vector:
            live = self._live()
            group = [h for h in self._round.collection.headers.values() if context.committee.index_of(h.peer) in live]
            try:
                mean = await context.swarm.average(
                    self._key,
                    self._own_vector,
                    [header.peer for header in group],
                    deadline_seconds=AVERAGE_SECONDS,
                )
                await self._work.take_mean(group, mean)
            except FlockError as error:
                context.events.emit("dropped", what="dense average", reason=str(error))
                await trio.sleep(RETRY_SECONDS)
                continue
            seats = {seat for h in group if (seat := context.committee.index_of(h.peer)) is not None}
            break
        else:
            return
        self._feed(lambda now: self._round.on_averaged(seats, now))

    # --- deciding ---
    async def _build(self, effect: rounds.BuildCandidate) -> None:
        try:
            record = await self._work.build(self._parent, effect.headers, effect.scorecards, effect.absent)
        except RemoteProtocolError as error:
            self._context.events.emit("dropped", what="own candidate", reason=str(error))
            self._round.on_candidate_failed()
            return
        self._feed(lambda now: self._round.on_candidate(record.encode(), now))

    async def _fold_ahead(
        self, headers: tuple[ContributionHeader, ...], cards: tuple[Scorecard, ...]
    ) -> None:
        with contextlib.suppress(RemoteProtocolError):  # then the proposal's check says what is wrong
            await self._work.fold_ahead(self._parent, headers, cards)

    async def _check(self, proposal: Proposal, digest: bytes) -> None:
        while True:  # an unanswered check times out in consensus; a wrong "no" would be a verdict
            try:
                reason = await self._work.check(self._parent, proposal, self._round.collection)
                break
            except UnavailableError as error:
                self._context.events.emit("dropped", what="part of a proposal", reason=str(error))
                await trio.sleep(RETRY_SECONDS)
        if reason:
            self._context.events.emit("dropped", what="proposal", reason=reason)
        self._feed(lambda now: self._round.on_checked(digest, not reason, now))

    async def _cast_proposal(self, effect: ballots.CastProposal) -> None:
        bare = Proposal(
            task=self._context.facts.task,
            round=self.round,
            view=effect.view,
            valid_view=effect.valid_view,
            proposer=self._context.signer.peer_id,
            record=effect.record,
            signature=b"",
        )
        proposal = replace(bare, signature=self._context.signer.sign_bls(bare.signing_root()))
        self._journal(proposal)
        self._feed(lambda now: self._round.on_proposal(proposal, now))
        await self._publish(proposal)

    async def _cast_vote(self, effect: ballots.CastVote) -> None:
        bare = Vote(
            task=self._context.facts.task,
            round=self.round,
            view=effect.view,
            step=int(effect.step),
            record_digest=effect.digest,
            rewards_root=effect.rewards_root,
            validator=self._context.signer.peer_id,
            signature=b"",
        )
        root = compute_vote_root(self._context.committee, bare, self._parent.head)
        vote = replace(bare, signature=self._context.signer.sign_bls(root))
        self._journal(vote)
        self._feed(lambda now: self._round.on_vote(vote, now))
        await self._publish(vote)

    def _journal(self, message: ballots.Message) -> None:
        kind = "proposal" if isinstance(message, Proposal) else "vote"
        self._context.journal.append(kind, message.encode(), round_=self.round)

    def _saved_messages(self) -> list[ballots.Message]:
        messages: list[ballots.Message] = []
        for entry in self._saved:
            if entry.kind == "proposal":
                messages.append(Proposal.decode(entry.body))
            elif entry.kind == "vote":
                messages.append(Vote.decode(entry.body))
        return messages

    def _save_evidence(self, first: Message, second: Message) -> None:
        for message in (first, second):
            self._context.journal.append("evidence", message.encode(), round_=self.round)
        self._context.events.emit("dropped", what="equivocation", reason=type(first).__name__)

    async def _conclude(self, decided: ballots.Decided) -> Decision:
        """Adopt the decided model, then append the round: what the ledger names, this peer can serve."""
        context = self._context
        if decided.own_check is False:
            raise LocalProtocolError(
                f"round {self.round}: a quorum decided a record that this peer computes otherwise",
                "stop and compare versions with other operators before going on",
            )
        decision = await self._work.conclude(
            self._parent,
            decided.record,
            build_attestation(
                context.committee, CID.of_dag_cbor(decided.record), decided.view, decided.precommits
            ),
            self._round.collection,
        )
        self._pace.on_decided(self._measure_overhead())
        record = decision.record
        context.events.emit(
            "decided",
            round=self.round,
            view=decided.view,
            model_hash=record.model_hash.hex(),
            record=str(decision.cid),
            contributors=[c.seat for c in record.contributions],
            absent=[[a.seat, a.reason] for a in record.absent],
            seconds=round(context.now - self._started, 3),
        )
        return decision

    def _measure_overhead(self) -> float:
        """Seconds of this round in which nobody needed to train: from the last header to the last payload, and from
        there on.  Not the grace for those who did not come, nor the training of those who did (protocol/pace.py)."""
        collected = min(self._collected_at, self._context.now)
        return max(0.0, self._payload_at - self._header_at) + self._context.now - collected

    # --- spreading ---
    def _look_around(self) -> Surroundings:
        """For spreading.py: the living of the committee and of the cohort swap; whoever is neither takes what its
        neighbours have."""
        context = self._context
        is_member = self._seat in self._shards or context.seat is not None
        return Surroundings(
            group=lambda: (self._live() & self.awaited) | {self._seat} if is_member else None,
            missing=lambda: {s: h.payload for s, h in self._round.collection.missing_payloads().items()},
            peer_of=context.peer_of,
            neighbours=context.host.connected_peers,
            may_hop=lambda: self._own_header is not None or self._cohort.is_drawn,
            now=lambda: context.now,
            on_failed=lambda reason: context.events.emit("dropped", what="swap", reason=reason),
            sources=frozenset(map(context.peer_of, self.awaited)),
            outsiders=context.committee.roster_size - len(self.awaited),
        )

    async def _resend_loop(self) -> None:
        """Each message again and again, at growing distances: gossip over TCP seldom loses one, and what it costs
        to repeat them grows with the square of the members.  What all resend at once must not outweigh what they
        had to say: a large committee starts later."""
        slack = max(1.0, len(self._context.committee.seats) / SMALL_COMMITTEE)
        due: dict[Message, tuple[float, float]] = {}  # message -> when next, and the pause after that
        while True:
            await trio.sleep(slack * RESEND_SECONDS / 4)
            now = self._context.now
            own: list[Message] = [m for m in (self._own_header, self._own_card) if m is not None]
            for message in (*own, *self._round.resend()):
                first = slack * (RESEND_SECONDS if self._is_own(message) else OTHERS_SECONDS)
                at, pause = due.setdefault(message, (now + first, RESEND_GROWTH * first))
                if now >= at:
                    due[message] = now + pause, min(RESEND_GROWTH * pause, slack * RARELY_SECONDS)
                    await self._publish(message)

    def _is_own(self, message: Message) -> bool:
        match message:
            case ContributionHeader():
                author = message.peer
            case Scorecard() | Vote():
                author = message.validator
            case Proposal():
                author = message.proposer
        return author == self._context.signer.peer_id
