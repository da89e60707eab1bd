"""A peer's life: open the task, join, train round after round, catch up when behind, serve throughout.

Law: this file orders the parts and decides nothing that another peer could see.  Losing a race is normal: if
the others decide a round while we are still in it, the round is abandoned and the decided one is fetched,
verified and folded instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from p2pflock.errors import LocalProtocolError, RemoteProtocolError, UnavailableError
from p2pflock.node.anchoring import Anchoring
from p2pflock.node.context import PeerContext
from p2pflock.node.driver import RoundDriver
from p2pflock.node.intake import Intake
from p2pflock.node.ledger import Decision, build_manifest
from p2pflock.node.presence import Presence
from p2pflock.node.recordwork import RecordWork
from p2pflock.node.sync import BlockExchange, RoundSync
from p2pflock.ports import Genesis
from p2pflock.protocol.collection import Pacing
from p2pflock.protocol.messages import Attestation, RoundRecord
from p2pflock.protocol.pace import Pace
from p2pflock.protocol.settlement import compute_genesis
from p2pflock.protocol.timeouts import Timeouts

WATCH_SECONDS = 0.5
ASK_AT_ONCE = 8
LATE_SECONDS = 10.0  # how long nobody asks again who did not answer
DOUBT_SECONDS = 60.0  # the same for who had nothing to show, or a lie
LAG_SECONDS = 2.0  # how long others may be ahead before we give up deciding by ourselves
START_SECONDS = 120.0
SAMPLE_LENGTH = 400  # of what the finished model makes, in the task's own units
KEPT_ROUNDS = 2  # whose payloads the exchange still holds; older ones are served from the block store


@dataclass(frozen=True, slots=True)
class _Found:
    """Rounds after our head with their quorums, and who served them."""

    peer: bytes
    decisions: Sequence[tuple[RoundRecord, Attestation]]


class Peer:
    """One peer of one task.  All parts exist once `run` begins.

    Args:
        context: keys, ports and facts.
        pacing: how long a quorum waits for the rest.
        timeouts: where consensus time-outs start.
    """

    def __init__(self, context: PeerContext, *, pacing: Pacing, timeouts: Timeouts) -> None:
        self._context = context
        self._pacing = pacing
        self._timeouts = timeouts
        self._pace = Pace(context.facts.pace)
        self.presence = Presence(context)
        self._blocks = BlockExchange(context.host, context.store)
        self._work = RecordWork(context, self._blocks)
        self.intake = Intake(context)
        self.anchoring = Anchoring(context)
        self._sync: RoundSync | None = None
        self._driver: RoundDriver | None = None
        self._doubted: dict[bytes, float] = {}  # peer -> until when its claims are not looked at

    async def run(self, *, finished: Callable[[], None] = lambda: None) -> None:
        """Until cancelled; calls `finished` once the last round is decided and, with a chain, anchored."""
        context = self._context
        genesis = await context.trainer.open()
        await self._open_ledger(genesis)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.presence.run)
            nursery.start_soon(self.intake.run)
            nursery.start_soon(self._route_arrivals)
            await self._wait_for_company()
            async with trio.open_nursery() as rounds:
                if context.chain is not None:
                    rounds.start_soon(self.anchoring.run)
                rounds.start_soon(self._live_through_rounds)
            head = context.ledger.head
            manifest = build_manifest(head.record, context.facts.spec).cid()
            evaluation = await context.trainer.evaluate()
            if text := await context.trainer.sample(SAMPLE_LENGTH):  # empty where the task has no sample
                context.events.emit("sample", text=text)
            context.events.emit(
                "finished",
                round=head.record.round,
                checkpoint=str(manifest),
                model_hash=head.record.model_hash.hex(),
                loss_micro=evaluation.loss_micro,
                accuracy_micro=evaluation.accuracy_micro,
            )
            finished()

    async def _open_ledger(self, genesis: Genesis) -> None:
        context = self._context
        record = compute_genesis(context.committee, genesis.model_hash, genesis.weights)
        if context.ledger.is_empty:
            context.ledger.append(record, None, [context.committee.encode()])
            context.store_file(await context.trainer.export())
        else:
            known = context.ledger.at(0)
            if known is None or known.record != record:
                raise LocalProtocolError(
                    "the stored run began from another model or committee",
                    "use another --home for this task, or remove the old one",
                )
        self._sync = RoundSync(
            context.host,
            self._blocks,
            context.store,
            context.ledger,
            context.trainer,
            context.committee,
            is_dense=context.facts.is_dense,
        )
        await self._sync.restore()

    async def _wait_for_company(self) -> None:
        """A quorum must be heard before the first local step, else its grace windows mean nothing."""
        with trio.move_on_after(START_SECONDS):
            while not self._context.committee.has_quorum(self.presence.live_seats()):  # noqa: ASYNC110
                await trio.sleep(WATCH_SECONDS)

    async def _route_arrivals(self) -> None:
        async for key, payload in await self._context.swarm.arrivals():
            if self._driver is not None and key == self._context.round_key(self._driver.round):
                self._driver.arrived(payload)

    # --- rounds ---
    async def _live_through_rounds(self) -> None:
        context = self._context
        while context.ledger.head.record.round < context.facts.rounds:
            found = await (self._follow() if context.index is None else self._play_round())
            if found is not None:
                await self._catch_up(found)

    async def _follow(self) -> _Found:
        """An onlooker's round: whatever others decide."""
        found: list[_Found] = []
        async with trio.open_nursery() as nursery:
            await self._watch_others(0.0, nursery.cancel_scope, found)
        return found[0]

    async def _play_round(self) -> _Found | None:
        """One round, unless others prove to have finished it without us: then what they decided."""
        context = self._context
        self._driver = driver = RoundDriver(
            context,
            self.intake.publish,
            self.presence.live_seats,
            self._work,
            self._timeouts,
            self._pacing,
            self._pace,
        )
        decided: list[Decision] = []
        found: list[_Found] = []
        self.presence.begin_round(driver.awaited)
        self.intake.enter(driver)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_others, LAG_SECONDS, nursery.cancel_scope, found)
                try:
                    decided.append(await driver.run())
                except RemoteProtocolError as error:
                    # Decided, but a part of it was not to be had: the others serve it with its round.
                    context.events.emit("dropped", what="decided round", reason=str(error))
                    await trio.sleep(WATCH_SECONDS)
                nursery.cancel_scope.cancel()
        finally:
            self.intake.leave()
            self._driver = None
        if not decided:
            return found[0] if found else None
        decision = decided[0]
        self._timeouts = driver.machine.timeouts
        if driver.round > KEPT_ROUNDS:
            await context.swarm.forget(context.round_key(driver.round - KEPT_ROUNDS))
        self._report_traffic(decision.record.round)
        await self._evaluate(decision)
        return None

    # --- when others are ahead ---
    async def _watch_others(self, patience_seconds: float, scope: trio.CancelScope, found: list[_Found]) -> None:
        """Cancels `scope` once somebody has proved rounds that we lack.

        Attack: a member says that it is far ahead.  Saying so costs it a request; what we do goes on until a
        quorum's signatures are here.  Nobody waits for one round: being a moment behind is no reason to ask.
        """
        since = self._context.now
        while not found:
            claims = self._claims()
            if not claims:
                since = self._context.now
            elif self._context.now - since >= patience_seconds or self._is_far_behind(claims):
                await self._ask(claims, found)
                if found:
                    break
            await trio.sleep(WATCH_SECONDS)
        scope.cancel()

    def _claims(self) -> list[bytes]:
        """Whom to ask: those who say that they are ahead and have not been found out lately; members first."""
        now = self._context.now
        self._doubted = {peer: until for peer, until in self._doubted.items() if until > now}
        ahead = [peer for peer in self.presence.ahead() if peer not in self._doubted]
        return sorted(ahead, key=lambda peer: self._context.committee.seat_of(peer) is None)

    def _is_far_behind(self, claims: Sequence[bytes]) -> bool:
        """Two rounds or more: then nobody will vote with us in ours."""
        return any(self.presence.lead_of(peer) > 1 for peer in claims)

    async def _ask(self, claims: Sequence[bytes], found: list[_Found]) -> None:
        """The first proof wins; who has none, or a false one, is not asked again for a while."""
        context = self._context
        assert self._sync is not None
        sync = self._sync

        async def ask(peer: bytes, scope: trio.CancelScope) -> None:
            try:
                await self.presence.reach(peer)
                decisions = await sync.fetch_decisions(peer)
            except RemoteProtocolError as error:
                is_late = isinstance(error, UnavailableError)
                self._doubted[peer] = context.now + (LATE_SECONDS if is_late else DOUBT_SECONDS)
                context.events.emit("dropped", what="rounds of a peer", reason=str(error))
                return
            if decisions and not found:
                found.append(_Found(peer, decisions))
                scope.cancel()
            elif not decisions:
                self._doubted[peer] = context.now + DOUBT_SECONDS

        async with trio.open_nursery() as nursery:
            for peer in claims[:ASK_AT_ONCE]:
                nursery.start_soon(ask, peer, nursery.cancel_scope)

    async def _catch_up(self, found: _Found) -> None:
        context = self._context
        assert self._sync is not None
        begun, start = context.now, context.ledger.head.record.round
        sources = [*self._claims(), *self.presence.live_peers()]
        try:
            await self._sync.catch_up(found.peer, list(dict.fromkeys(sources)), found.decisions)
        except RemoteProtocolError as error:
            self._doubted[found.peer] = context.now + LATE_SECONDS
            context.events.emit("dropped", what="rounds of a peer", reason=str(error))
        head = context.ledger.head.record
        if head.round > start:
            context.events.emit(
                "caught_up",
                from_round=start,
                to_round=head.round,
                model_hash=head.model_hash.hex(),
                seconds=round(context.now - begun, 3),
            )

    def _report_traffic(self, round_: int) -> None:
        control, swarm = self._context.host.traffic(), self._context.swarm.traffic()
        self._context.events.emit(
            "traffic",
            round=round_,
            sent_bytes=control.sent_bytes + swarm.sent_bytes,
            received_bytes=control.received_bytes + swarm.received_bytes,
        )

    async def _evaluate(self, decision: Decision) -> None:
        """Contributors take turns: everybody holds the same bits, so one measurement is enough.  Only of checkpoints
        that are stored in full: the round waits for whoever measures instead of training."""
        context = self._context
        if decision.record.round % context.facts.snapshot_every_rounds:
            return
        contributors = [c.seat for c in decision.record.contributions]
        if not contributors or contributors[decision.record.round % len(contributors)] != context.index:
            return
        evaluation = await context.trainer.evaluate()
        context.events.emit(
            "evaluated",
            round=decision.record.round,
            loss_micro=evaluation.loss_micro,
            accuracy_micro=evaluation.accuracy_micro,
        )
