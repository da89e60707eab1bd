"""Who is there: announces this peer, finds the others, keeps connections, and hears who is alive.

Law: a peer is known by a PeerRecord that all three of its keys signed, found in the DHT under the task; it is
*live* while its status messages arrive, which are rarer while we are connected with it: a connection that breaks
or freezes is noticed at once (net/hardening.py).  Nothing else decides whom a round waits for.

One bootstrap address is enough to join, and any live peer can be one; after that the DHT carries on alone.  What
goes on without a round costs bytes by the minute, so we speak when there is news, look around less and less often
while there is none, and tell others whom we hear ourselves, so that they need not repeat it to us.

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

STATUS_SECONDS = 10.0  # without news: a round decided, a connection made or lost
NEWS_SECONDS = 0.5  # how often we look for news
LIVE_SECONDS = 25.0  # since the last word of a peer that we hear through others,
CONNECTED_LIVE_SECONDS = 45.0  # of one whose connection stands,
LOST_LIVE_SECONDS = 6.0  # and of one whose connection broke since: it would have spoken again
SMALL_SWARM = 64  # on the roster: up to here everybody speaks, and is connected with everybody
LARGE_STATUS_SECONDS = 1.0  # of those who speak in a larger one,
LARGE_LIVE_STATUSES = 6  # with as many lost in a row,
SPEAKERS = 16  # while they are not more; else as much less often
LINKS = 12  # connections that a peer of a large swarm opens; about as many come in
ANNOUNCE_SHARE = 3.0  # announcements per lifetime
LOOKUP_SECONDS = 3.0  # four times as long for each lookup that changed nothing (one costs 90 kB among eight), up to ...
CALM_SECONDS = 300.0  # ... this while everybody on the roster is live, and ...
SHORT_HANDED_SECONDS = 30.0  # ... this while one is missing
MAX_KNOWN = 8192
MAX_STATUS_BYTES = 128  # a bitmap of 218 seats is 28
DISCREDIT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Status:
    """A peer's word on where it is; authenticated by the gossip layer, trusted for nothing but a hint."""

    round: int  # last decided round
    count: int
    heard: float
    was_connected: bool


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
        speakers = len(context.committee.seats) + context.committee.cohort
        busy = LARGE_STATUS_SECONDS * max(1.0, speakers / SPEAKERS)
        self._status_seconds = busy if self._is_large else STATUS_SECONDS
        self._live_seconds = LARGE_LIVE_STATUSES * busy  # of a large swarm

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
        now, connected = self._context.now, self._context.host.connected_peers()

        def patience(peer: bytes, status: Status) -> float:
            if self._is_large:
                return self._live_seconds
            if peer in connected:
                return CONNECTED_LIVE_SECONDS
            return LOST_LIVE_SECONDS if status.was_connected else LIVE_SECONDS

        return [peer for peer, status in self._status.items() if now - status.heard < patience(peer, status)]

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
            value = wire.unpack(data, max_bytes=MAX_STATUS_BYTES)
        except InvalidMessageError:
            return Verdict.REJECT
        # [last decided round, count of statuses sent, bitmap of the seats it is connected with]
        if type(value) is not list or [type(part) for part in value] != [int, int, bytes]:
            return Verdict.REJECT
        round_, count, seats = value
        if min(round_, count) < 0:
            return Verdict.REJECT
        known = self._status.get(author)
        if known is not None and known.count >= count:
            return Verdict.ACCEPT  # overtaken by a later one
        if known is None and len(self._status) >= MAX_KNOWN:
            self._forget_oldest()
        host = self._context.host
        self._status[author] = Status(round_, count, self._context.now, author in host.connected_peers())
        host.note_neighbours(author, self._unpack_seats(seats))
        return Verdict.ACCEPT

    def _unpack_seats(self, bitmap: bytes) -> frozenset[bytes]:
        seats = self._context.committee.seats
        bits = int.from_bytes(bitmap, "little")
        return frozenset(seat.peer for number, seat in enumerate(seats) if bits >> number & 1)

    def _pack_seats(self, peers: frozenset[bytes]) -> bytes:
        seats = self._context.committee.seats
        bits = sum(1 << number for number, seat in enumerate(seats) if seat.peer in peers)
        return bits.to_bytes(-(-len(seats) // 8), "little")

    def _forget_oldest(self) -> None:
        oldest = min(self._status, key=lambda peer: self._status[peer].heard)
        del self._status[oldest]

    async def speak_once(self, count: int) -> None:
        host = self._context.host
        seats = self._pack_seats(host.connected_peers())
        await host.publish(self._topic, wire.pack([self._context.ledger.head.record.round, count, seats]))

    async def _speak(self) -> None:
        # The wall clock, not a counter: after a restart the first message must differ from earlier ones.
        count = self._context.clock.unix_seconds() << 20
        context = self._context
        while True:
            count += 1
            said = context.ledger.head.record.round, context.host.connected_peers()
            if self._speakers is None or context.index in self._speakers:
                await self.speak_once(count)
            with trio.move_on_after(self._status_seconds):
                if self._is_large:
                    await self._moved.wait()
                    self._moved = trio.Event()
                    continue
                while said == (context.ledger.head.record.round, context.host.connected_peers()):  # noqa: ASYNC110
                    await trio.sleep(NEWS_SECONDS)

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
        pause, last = LOOKUP_SECONDS, None
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
                await trio.sleep(LOOKUP_SECONDS * len(found) / SMALL_SWARM)
                continue
            for peer in found:
                await self.reach(peer)
            connected = self._context.host.connected_peers()
            situation = frozenset(found), connected
            is_complete = len(self.live_seats()) >= self._context.committee.roster_size
            longest = CALM_SECONDS if is_complete else SHORT_HANDED_SECONDS
            pause = LOOKUP_SECONDS if situation != last else min(4 * pause, longest)
            last = situation
            with trio.move_on_after(pause):
                while self._context.host.connected_peers() == connected:  # noqa: ASYNC110
                    await trio.sleep(NEWS_SECONDS)

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
