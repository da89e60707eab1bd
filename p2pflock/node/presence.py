"""Who is there: announces this peer, finds the others, keeps connections, and hears who is alive.

Law: a peer is known by a PeerRecord that all three of its keys signed, found in the DHT under the task; it is
*live* while its status messages arrive.  Nothing else decides whom a round waits for.

One bootstrap address is enough to join, and any live peer can be one; after that the DHT carries on alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import trio

from p2pflock.errors import FlockError, InvalidMessageError
from p2pflock.node.context import PeerContext
from p2pflock.ports import Verdict
from p2pflock.primitives import wire
from p2pflock.protocol import validation
from p2pflock.protocol.messages import PeerRecord

STATUS_SECONDS = 1.0
LIVE_SECONDS = 6.0  # six lost status messages in a row
ANNOUNCE_SHARE = 3.0  # announcements per lifetime
LOOKUP_SECONDS = 3.0
MAX_KNOWN = 1024
DISCREDIT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Status:
    """A peer's word on where it is; authenticated by the gossip layer, trusted for nothing but a hint."""

    round: int  # last decided round
    heard: float


def build_peer_record(context: PeerContext, lifetime_seconds: float) -> PeerRecord:
    """Our record, signed by all three keys."""
    signer = context.signer
    bare = PeerRecord(
        peer=signer.peer_id,
        address=signer.address,
        bls_public_key=signer.bls_public_key,
        control_addresses=tuple(context.host.addresses)[:8],
        swarm_addresses=tuple(context.swarm.bootstrap_addresses)[:8],
        expires_unix_seconds=int(context.clock.unix_seconds() + lifetime_seconds),
        bls_proof=b"",
        evm_signature=b"",
        peer_signature=b"",
    )
    root = bare.signing_root()
    return replace(
        bare,
        bls_proof=signer.prove_possession(root),
        evm_signature=signer.sign_evm(root),
        peer_signature=signer.sign_ed25519(root),
    )


class Presence:
    """The peers of one task as this peer sees them."""

    def __init__(self, context: PeerContext) -> None:
        self._context = context
        self._key = f"p2pflock/1/{context.facts.task.hex()}/peers"
        self._topic = f"/p2pflock/1/{context.facts.task.hex()}/status"
        self._records: dict[bytes, PeerRecord] = {}
        self._raw: dict[bytes, bytes] = {}
        self._status: dict[bytes, Status] = {}
        self._discredited: dict[bytes, float] = {}  # peer -> until when its claims are not followed

    # --- questions ---
    def live_peers(self) -> list[bytes]:
        """Peers heard of lately, ourselves excluded."""
        now = self._context.now
        return [peer for peer, status in self._status.items() if now - status.heard < LIVE_SECONDS]

    def live_seats(self) -> frozenset[int]:
        """Seats that are worth waiting for: heard of lately and no more than one round behind."""
        head = self._context.ledger.head.record.round
        seats = {
            seat
            for peer in self.live_peers()
            if self._status[peer].round >= head - 1
            and (seat := self._context.committee.seat_of(peer)) is not None
        }
        if self._context.seat is not None:
            seats.add(self._context.seat)
        return frozenset(seats)

    def ahead(self) -> list[bytes]:
        """Live peers that have decided rounds we have not, furthest first."""
        head = self._context.ledger.head.record.round
        now = self._context.now
        found = [
            peer
            for peer in self.live_peers()
            if self._status[peer].round > head and self._discredited.get(peer, 0.0) <= now
        ]
        return sorted(found, key=lambda peer: (-self._status[peer].round, peer))

    def discredit(self, peer: bytes) -> None:
        """It claimed to be ahead and could not show it: do not ask again for a while.

        Attack: a stranger that claims round one million would keep us asking instead of training.
        """
        if len(self._discredited) >= MAX_KNOWN:
            self._discredited.clear()
        self._discredited[peer] = self._context.now + DISCREDIT_SECONDS

    def lead_of(self, peer: bytes) -> int:
        """Rounds that a peer says it has decided and we have not."""
        status = self._status.get(peer)
        return max(0, status.round - self._context.ledger.head.record.round) if status else 0

    # --- loops ---
    async def run(self, *, started: Callable[[], None] = lambda: None) -> None:
        async with trio.open_nursery() as nursery:
            messages = await self._context.host.subscribe(self._topic, self._judge_status)
            nursery.start_soon(self._drain, messages)
            nursery.start_soon(self._announce)
            nursery.start_soon(self._find)
            nursery.start_soon(self._speak)
            started()

    async def _drain(self, messages: object) -> None:
        async for _ in messages:  # type: ignore[attr-defined]
            pass  # everything is done in the validator, which sees each message exactly once

    def _judge_status(self, author: bytes, data: bytes) -> Verdict:
        try:
            value = wire.unpack(data, max_bytes=64)
        except InvalidMessageError:
            return Verdict.REJECT
        # [last decided round, count of statuses sent: makes each message distinct]
        if type(value) is not list or len(value) != 2 or any(type(v) is not int or v < 0 for v in value):
            return Verdict.REJECT
        if author not in self._status and len(self._status) >= MAX_KNOWN:
            self._forget_oldest()
        self._status[author] = Status(value[0], self._context.now)
        return Verdict.ACCEPT

    def _forget_oldest(self) -> None:
        oldest = min(self._status, key=lambda peer: self._status[peer].heard)
        del self._status[oldest]

    async def speak_once(self, count: int) -> None:
        await self._context.host.publish(
            self._topic, wire.pack([self._context.ledger.head.record.round, count])
        )

    async def _speak(self) -> None:
        # The wall clock, not a counter: after a restart the first message must differ from earlier ones.
        count = self._context.clock.unix_seconds() << 20
        while True:
            count += 1
            await self.speak_once(count)
            await trio.sleep(STATUS_SECONDS)

    async def _announce(self) -> None:
        lifetime = self._context.params.swarm.record_ttl_seconds
        while True:
            record = build_peer_record(self._context, lifetime)
            try:
                await self._context.swarm.announce(self._key, record.encode(), ttl_seconds=lifetime)
                pause = lifetime / ANNOUNCE_SHARE
            except FlockError as error:
                self._context.events.emit("dropped", what="own announcement", reason=str(error))
                pause = LOOKUP_SECONDS
            await trio.sleep(pause)

    async def _find(self) -> None:
        while True:
            try:
                found = await self._context.swarm.lookup(self._key)
            except FlockError as error:
                self._context.events.emit("dropped", what="lookup", reason=str(error))
                found = {}
            for peer, value in found.items():
                await self._meet(peer, value)
            await trio.sleep(LOOKUP_SECONDS)

    async def _meet(self, peer: bytes, value: bytes) -> None:
        context = self._context
        if peer == context.signer.peer_id:
            return
        if self._raw.get(peer) != value:
            try:
                record = PeerRecord.decode(value)
                validation.require(
                    validation.validate_peer_record(record, peer, context.clock.unix_seconds())
                )
            except InvalidMessageError as error:
                context.events.emit("dropped", what="peer record", reason=str(error))
                return
            if len(self._records) >= MAX_KNOWN and peer not in self._records:
                return
            self._records[peer], self._raw[peer] = record, value
            context.swarm.add_addresses(peer, record.swarm_addresses)
        if peer not in context.host.connected_peers():
            await self._dial(self._records[peer].control_addresses)

    async def _dial(self, addresses: Sequence[str]) -> None:
        try:
            await self._context.host.connect(addresses)
        except FlockError:
            return  # gone, or not reachable from here: the next lookup tries again
        self._context.events.emit("connected", peers=len(self._context.host.connected_peers()))
