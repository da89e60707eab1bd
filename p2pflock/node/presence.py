"""Who is there: announces this peer, finds the others, keeps connections, and hears who is alive.

Law: a peer is known by a PeerRecord that all three of its keys signed, found in the DHT under the task; it is
*live* while its status messages arrive.  Nothing else decides whom a round waits for.

One bootstrap address is enough to join, and any live peer can be one; after that the DHT carries on alone.

In a large swarm none of this may grow with its size: only those speak whom the round waits for (the committee and
the cohort), as seldom as there are many of them; everybody opens a dozen connections, to peers that a hash picks; and
records are looked up less often the more there are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import trio

from p2pflock.errors import FlockError, InvalidMessageError
from p2pflock.node.context import PeerContext
from p2pflock.ports import Verdict
from p2pflock.primitives import wire
from p2pflock.protocol import validation
from p2pflock.protocol.messages import PeerRecord

STATUS_SECONDS = 1.0
LIVE_STATUSES = 6  # as many lost status messages in a row
SMALL_SWARM = 64  # on the roster: up to here everybody speaks, and is connected with everybody
SPEAKERS = 32  # up to here each speaks once in STATUS_SECONDS
LINKS = 12  # connections that a peer of a large swarm opens; about as many come in
ANNOUNCE_SHARE = 3.0  # announcements per lifetime
LOOKUP_SECONDS = 3.0
MAX_KNOWN = 8192
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
        self._found: dict[bytes, bytes] = {}  # as found, not looked at
        self._raw: dict[bytes, bytes] = {}  # as found, of the records
        self._status: dict[bytes, Status] = {}
        self._discredited: dict[bytes, float] = {}  # peer -> until when its claims are not followed
        self._moved = trio.Event()  # a round has begun
        self._is_large = context.committee.roster_size > SMALL_SWARM
        seats = frozenset(range(len(context.committee.seats)))
        self._speakers = seats if self._is_large else None  # places in the roster; None: everybody
        speakers = len(context.committee.seats) + context.committee.cohort if self._is_large else 0
        self._status_seconds = STATUS_SECONDS * max(1.0, speakers / SPEAKERS)
        self._live_seconds = LIVE_STATUSES * self._status_seconds

    def begin_round(self, speakers: frozenset[int]) -> None:
        """Of a round they wait for these places of the roster: who is among them says so at once."""
        if self._is_large:
            self._speakers = speakers
            if self._context.index in speakers:  # it will swap with them
                for peer in map(self._context.peer_of, speakers):
                    self._admit(peer)
            self._moved.set()

    # --- questions ---
    def live_peers(self) -> list[bytes]:
        """Peers heard of lately, ourselves excluded."""
        now = self._context.now
        return [peer for peer, status in self._status.items() if now - status.heard < self._live_seconds]

    def live_seats(self) -> frozenset[int]:
        """Places in the roster that are worth waiting for: heard of lately and no more than one round behind."""
        head = self._context.ledger.head.record.round
        seats = {
            seat
            for peer in self.live_peers()
            if self._status[peer].round >= head - 1
            and (seat := self._context.committee.index_of(peer)) is not None
        }
        if self._context.index is not None:
            seats.add(self._context.index)
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
            if self._speakers is None or self._context.index in self._speakers:
                await self.speak_once(count)
            with trio.move_on_after(self._status_seconds):
                await self._moved.wait()
                self._moved = trio.Event()

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
                if peer in self._found or len(self._found) < MAX_KNOWN:
                    self._found[peer] = value
            if len(found) > SMALL_SWARM:
                await self._keep_links(found)
            else:
                for peer in found:
                    await self.reach(peer)
            await trio.sleep(LOOKUP_SECONDS * max(1.0, len(found) / SMALL_SWARM))

    async def _keep_links(self, found: Iterable[bytes]) -> None:
        """The first dozen that answer, in an order of our own: the graph is random, and stays when others come."""
        own = self._context.signer.peer_id
        linked = 0
        for peer in sorted(found, key=lambda peer: hashlib.sha256(own + peer).digest()):
            linked += await self.reach(peer)
            if linked >= LINKS:
                break

    async def reach(self, peer: bytes) -> bool:
        """Connect with a peer whose record we have, unless we are; whether we are then."""
        if peer == self._context.signer.peer_id:
            return False
        self._admit(peer)
        if peer not in self._context.host.connected_peers() and peer in self._records:
            await self._dial(self._records[peer].control_addresses)
        return peer in self._context.host.connected_peers()

    def _admit(self, peer: bytes) -> None:
        """Check what was found of a peer, once we need it: a flood of records must not buy signature checks."""
        context, value = self._context, self._found.get(peer)
        if value is None or peer == context.signer.peer_id:
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
            self._records[peer], self._raw[peer] = record, value
            context.swarm.add_addresses(peer, record.swarm_addresses)

    async def _dial(self, addresses: Sequence[str]) -> None:
        try:
            await self._context.host.connect(addresses)
        except FlockError:
            return  # gone, or not reachable from here: the next lookup tries again
        self._context.events.emit("connected", peers=len(self._context.host.connected_peers()))
