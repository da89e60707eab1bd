# ruff: noqa: SLF001 - the network and its hosts are one thing in two classes
"""A network in memory: the Host port without sockets, with faults on demand.

Law: one FakeNetwork is one run.  Every delay, loss and duplicate is drawn from the `random.Random` it was
given, time is trio's, and deliveries happen in one task in order of (time, number sent); with
`run_simulation` two runs of one seed are equal.  The fake keeps the promises that conformance_host.py checks,
and shares mailboxes, bounds and reputation with the real host.  By default a message travels along every link
between subscribers.  With `wires` (for large swarms) it travels along a GossipSub mesh of bounded degree, one for
all topics, every byte takes the time that the wires give it, and validators see all messages but no iterator yields
them: a node acts in its validators, and waking a thousand readers for nothing takes most of the time.

    async def main() -> None:
        async with FakeNetwork.open(random.Random(7), loss=0.1) as network:
            async with network.host(seed_a) as a, network.host(seed_b) as b:
                await a.connect(b.addresses)

    run_simulation(main, seed=7)
"""

from __future__ import annotations

import contextlib
import heapq
import math
import random
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import trio
import trio.testing
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from trio._core import _run

from p2pflock.errors import (
    FlockError,
    InvalidMessageError,
    LocalProtocolError,
    RemoteProtocolError,
    UnavailableError,
)
from p2pflock.net.limits import MAX_MESSAGE_BYTES, MAX_TOPIC_CHARACTERS, REPEAT_SECONDS, Limits
from p2pflock.net.mailbox import Mailbox
from p2pflock.net.recent import Recent
from p2pflock.net.reputation import Reputation
from p2pflock.ports import GossipMessage, RequestHandler, Traffic, Validator, Verdict
from p2pflock.primitives import peerid
from p2pflock.testing.wires import Wires

DETECT_SECONDS = 9.0  # how long the real host takes to notice a peer that fell silent
REPLAY_SECONDS = 3.0  # what a subscriber that comes late still gets: the message cache's window
# The real host has 6 and lets it drift between 4 and 12; here it hardly drifts, so that sizes compare.
MESH_DEGREE, MESH_LOW, MESH_HIGH = 6, 4, 8
QUANTUM_SECONDS = 0.002  # with wires, deliveries are rounded up to it: one waking up for many
OVERHEAD_BYTES = 100  # per message: signature, author, framing

Result = TypeVar("Result")


def run_simulation(main: Callable[[], Awaitable[Result]], *, seed: int) -> Result:
    """Run `main` under a clock that jumps, with trio's own scheduling drawn from `seed` too."""
    # The two switches that trio keeps for property-based tests (see hypothesis-trio).
    vars(_run)["_ALLOW_DETERMINISTIC_SCHEDULING"] = True
    _run._r.seed(seed)
    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@dataclass(frozen=True, slots=True)
class Flight:
    """One thing on its way, as a fault hook sees it."""

    sender: bytes
    receiver: bytes
    kind: str  # "gossip", "request" or "response"
    channel: str  # topic or protocol
    data: bytes


Fault = Callable[[Flight], float | None]  # extra seconds on the way, or None: lost


@dataclass(frozen=True, slots=True)
class _Gossip:
    number: int
    message: GossipMessage
    arrivals: dict[bytes, float] = field(default_factory=dict, compare=False)  # on the mesh: when it is where


class FakeNetwork:
    """Everything between hosts.  All attributes may be changed while it runs."""

    def __init__(self, rng: random.Random, nursery: trio.Nursery) -> None:
        self.rng = rng
        self.delay_seconds = (0.002, 0.020)  # uniform; a wide range reorders messages
        self.loss = 0.0  # probability that gossip or a request is lost
        self.duplicate = 0.0  # probability that gossip arrives twice
        self.fault: Fault | None = None
        self.wires: Wires | None = None
        self._nursery = nursery
        self._hosts: dict[bytes, FakeHost] = {}
        self._islands: list[frozenset[bytes]] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._lives = 0
        self._ports = 40_000
        self._wake = trio.Event()

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        rng: random.Random,
        *,
        delay_seconds: tuple[float, float] = (0.002, 0.020),
        loss: float = 0.0,
        duplicate: float = 0.0,
        fault: Fault | None = None,
        wires: Wires | None = None,
    ) -> AsyncIterator[FakeNetwork]:
        async with trio.open_nursery() as nursery:
            network = cls(rng, nursery)
            network.delay_seconds, network.loss = delay_seconds, loss
            network.duplicate, network.fault, network.wires = duplicate, fault, wires
            nursery.start_soon(network._run)
            try:
                yield network
            finally:
                nursery.cancel_scope.cancel()

    @contextlib.asynccontextmanager
    async def host(self, seed: bytes, *, limits: Limits | None = None) -> AsyncIterator[FakeHost]:
        """A host that lives as long as the block; leaving it is what kill -9 looks like to the others."""
        self._ports += 1
        host = FakeHost(self, seed, self._ports, limits or Limits())
        if host.peer_id in self._hosts:
            raise LocalProtocolError("two hosts with one key")
        async with trio.open_nursery() as nursery:
            host._start(nursery)
            self._hosts[host.peer_id] = host
            try:
                yield host
            finally:
                del self._hosts[host.peer_id]
                host._stop()
                nursery.cancel_scope.cancel()

    # - faults -
    def partition(self, *islands: Iterable[bytes]) -> None:
        """Nothing passes between islands; peers in none form one more.  Links across break in 9 s."""
        self._islands = [frozenset(island) for island in islands]
        self.call_later(DETECT_SECONDS, self._break_links)

    def heal(self) -> None:
        self._islands = []

    def is_separated(self, one: bytes, other: bytes) -> bool:
        if not self._islands:
            return False
        return any((one in island) != (other in island) for island in self._islands)

    def _break_links(self) -> None:
        for host in self._hosts.values():
            for peer in sorted(host._links):
                if self.is_separated(host.peer_id, peer):
                    self.unlink(host.peer_id, peer)

    # - what hosts use -
    def first_number(self) -> int:
        """Where a host that starts now begins to count its messages: above those of any earlier life."""
        self._lives += 1
        return self._lives << 32

    def find(self, peer: bytes) -> FakeHost | None:
        return self._hosts.get(peer)

    def unlink(self, one: bytes, other: bytes) -> None:
        for peer, lost in ((one, other), (other, one)):
            host = self._hosts.get(peer)
            if host is not None:
                host._links.discard(lost)
                host._mesh.discard(lost)
                if len(host._mesh) < MESH_LOW:
                    for candidate in sorted(host._links - host._mesh):
                        self.graft(peer, candidate)

    def graft(self, one: bytes, other: bytes) -> None:
        """Link into the mesh what is linked, within the degrees."""
        first, second = self._hosts.get(one), self._hosts.get(other)
        if first is None or second is None or len(second._mesh) >= MESH_HIGH or len(first._mesh) >= MESH_DEGREE:
            return
        first._mesh.add(other)
        second._mesh.add(one)

    def travel_seconds(self, flight: Flight) -> float | None:
        """How long it takes; None when it never arrives."""
        if self.is_separated(flight.sender, flight.receiver):
            return None
        if self.wires is not None:
            seconds = self.wires.send(flight.sender, flight.receiver, len(flight.data) + OVERHEAD_BYTES)
        else:
            seconds = self.rng.uniform(*self.delay_seconds)
            if self.rng.random() < self.loss:
                return None
        if self.fault is not None:
            extra = self.fault(flight)
            return None if extra is None else seconds + extra
        return seconds

    def call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        self._number += 1
        due = trio.current_time() + seconds
        if self.wires is not None:
            due = math.ceil(due / QUANTUM_SECONDS) * QUANTUM_SECONDS
        heapq.heappush(self._events, (due, self._number, callback))
        if self._events[0][1] == self._number:  # the others know when to wake up
            self._wake.set()

    async def _run(self) -> None:
        while True:
            self._wake = trio.Event()
            due = self._events[0][0] if self._events else float("inf")
            with trio.move_on_at(due):
                await self._wake.wait()
            while self._events and self._events[0][0] <= trio.current_time():
                heapq.heappop(self._events)[2]()


class FakeHost:
    """See ports.Host.  Get one from `FakeNetwork.host`."""

    def __init__(self, network: FakeNetwork, seed: bytes, port: int, limits: Limits) -> None:
        if len(seed) != 32:
            raise LocalProtocolError("an Ed25519 seed is 32 bytes")
        public = Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
        self._peer_id = peerid.from_ed25519(public)
        self._network = network
        self._port = port
        self._limits = limits
        self._links: set[bytes] = set()
        self._mesh: set[bytes] = set()
        self._neighbours: dict[bytes, frozenset[bytes]] = {}
        self._mailboxes: dict[str, Mailbox] = {}
        self._validators: dict[str, Validator] = {}
        self._handlers: dict[str, tuple[RequestHandler, int]] = {}
        self._seen: Recent[tuple[bytes, int], bool] = Recent(120.0, 1 << 16)
        self._repeats: Recent[tuple[str, bytes, bytes], Verdict] = Recent(REPEAT_SECONDS, 4096)
        self._recent: deque[tuple[float, _Gossip]] = deque()
        self._number = network.first_number()
        self._sent = 0
        self._received = 0
        self._counters: Counter[str] = Counter()
        self._reputation = Reputation(
            strikes=limits.strikes,
            drained_per_second=limits.strikes_drained_per_second,
            ban_seconds=limits.ban_seconds,
        )
        self._nursery: trio.Nursery | None = None

    def _start(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    def _stop(self) -> None:
        for peer in sorted(self._links):
            self._network.unlink(self._peer_id, peer)
        self._links.clear()
        self._mesh.clear()
        self._nursery = None
        for mailbox in self._mailboxes.values():
            mailbox.close()

    # - connections -
    @property
    def peer_id(self) -> bytes:
        return self._peer_id

    @property
    def addresses(self) -> Sequence[str]:
        return (f"/ip4/127.0.0.1/tcp/{self._port}/p2p/{peerid.to_text(self._peer_id)}",)

    async def connect(self, addresses: Sequence[str]) -> bytes:
        await trio.lowlevel.checkpoint()
        if not addresses:
            raise UnavailableError("no address to dial")
        try:
            peer = peerid.from_text(addresses[0].rpartition("/p2p/")[2])
        except FlockError as error:
            raise UnavailableError("malformed address") from error
        other = self._network.find(peer)
        if peer == self._peer_id:
            raise UnavailableError("that address is this peer's own")
        if other is None or other.addresses[0] not in addresses:
            raise UnavailableError("cannot reach the peer")
        now = trio.current_time()
        if self._reputation.is_banned(peer, now) or other._reputation.is_banned(self._peer_id, now):
            raise UnavailableError("banned")
        if peer in self._links:
            return peer
        await trio.sleep(self._network.rng.uniform(*self._network.delay_seconds))
        if self._network.is_separated(self._peer_id, peer) or self._network.find(peer) is not other:
            raise UnavailableError("cannot reach the peer")
        self._links.add(peer)
        other._links.add(self._peer_id)
        self._network.graft(self._peer_id, peer)
        for topic in sorted(self._mailboxes):
            other._replay(topic, self._peer_id)
        for topic in sorted(other._mailboxes):
            self._replay(topic, peer)
        return peer

    async def disconnect(self, peer: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self._network.unlink(self._peer_id, peer)

    def connected_peers(self) -> frozenset[bytes]:
        return frozenset(self._links)

    def note_neighbours(self, peer: bytes, neighbours: frozenset[bytes]) -> None:
        if peer in self._links:
            self._neighbours[peer] = neighbours

    # - gossip -
    async def publish(self, topic: str, data: bytes) -> None:
        if len(data) > MAX_MESSAGE_BYTES:
            raise LocalProtocolError(f"gossip message of {len(data)} bytes, at most {MAX_MESSAGE_BYTES}")
        await trio.lowlevel.checkpoint()
        self._number += 1
        self._counters["gossip_published"] += 1
        gossip = _Gossip(self._number, GossipMessage(topic, self._peer_id, bytes(data)))
        self._seen.put((self._peer_id, self._number), True)
        self._pass_on(gossip, self._peer_id)

    async def subscribe(self, topic: str, validator: Validator) -> AsyncIterator[GossipMessage]:
        if topic in self._mailboxes:
            raise LocalProtocolError(f"already subscribed to {topic}")
        if not 0 < len(topic) <= MAX_TOPIC_CHARACTERS:
            raise LocalProtocolError(f"a topic has 1 to {MAX_TOPIC_CHARACTERS} characters")
        await trio.lowlevel.checkpoint()

        def count(dropped: int) -> None:
            self._counters["gossip_mailbox_dropped"] += dropped

        mailbox = Mailbox(self._limits.mailbox_messages, self._limits.mailbox_bytes, count)
        self._mailboxes[topic], self._validators[topic] = mailbox, validator
        for peer in sorted(self._links):
            other = self._network.find(peer)
            if other is not None:
                other._replay(topic, self._peer_id)
        return mailbox

    async def unsubscribe(self, topic: str) -> None:
        await trio.lowlevel.checkpoint()
        mailbox = self._mailboxes.pop(topic, None)
        if mailbox is not None:
            del self._validators[topic]
            mailbox.close()

    def _pass_on(self, gossip: _Gossip, forwarder: bytes) -> None:
        now = trio.current_time()
        while self._recent and now - self._recent[0][0] >= REPLAY_SECONDS:
            self._recent.popleft()
        self._recent.append((now, gossip))
        author, has_wires = gossip.message.sender, self._network.wires is not None
        for peer in sorted((self._mesh if has_wires else self._links) - {forwarder, author}):
            # With wires an author sends along its mesh only, so that being connected with it is not enough.
            if has_wires or author == self._peer_id or author not in self._neighbours.get(peer, ()):
                self._send(gossip, peer)

    def _replay(self, topic: str, peer: bytes) -> None:
        now = trio.current_time()
        for at, gossip in self._recent:
            is_fresh = gossip.message.topic == topic and now - at < REPLAY_SECONDS
            if is_fresh and gossip.message.sender != peer and not self._is_known(gossip, peer):
                self._send(gossip, peer)

    def _is_known(self, gossip: _Gossip, peer: bytes) -> bool:
        """On the mesh only: a peer asks for what it is told of and lacks."""
        other = self._network.find(peer)
        if self._network.wires is None or other is None:
            return False
        if other._seen.get((gossip.message.sender, gossip.number)):
            return True
        gossip.arrivals.pop(peer, None)  # it was on its way to one who has died and come back
        return False

    def _send(self, gossip: _Gossip, peer: bytes) -> None:
        other = self._network.find(peer)
        if other is None or gossip.message.topic not in other._mailboxes:
            return
        flight = Flight(self._peer_id, peer, "gossip", gossip.message.topic, gossip.message.data)
        sender = self._peer_id
        if self._network.wires is not None:
            self._send_on_mesh(flight, gossip, other)
            return
        copies = 2 if self._network.rng.random() < self._network.duplicate else 1
        for _ in range(copies):
            self._sent += len(flight.data) + OVERHEAD_BYTES
            seconds = self._network.travel_seconds(flight)
            if seconds is not None:
                self._network.call_later(seconds, lambda: other._receive(gossip, sender))

    def _send_on_mesh(self, flight: Flight, gossip: _Gossip, other: FakeHost) -> None:
        """Every copy costs its bytes; only one that comes before the others is an event."""
        seconds = self._network.travel_seconds(flight)
        if seconds is None:
            return
        size, sender = len(flight.data) + OVERHEAD_BYTES, self._peer_id
        self._sent += size
        other._received += size
        due = trio.current_time() + seconds
        known = gossip.arrivals.get(flight.receiver)
        if known is not None and known <= due:
            other._counters["gossip_duplicate"] += 1
            return
        gossip.arrivals[flight.receiver] = due
        self._network.call_later(seconds, lambda: other._receive(gossip, sender))

    def _receive(self, gossip: _Gossip, forwarder: bytes) -> None:
        message = gossip.message
        if forwarder not in self._links or message.topic not in self._mailboxes:
            return
        if self._network.wires is None:
            self._received += len(message.data) + OVERHEAD_BYTES
        self._counters["gossip_received"] += 1
        if message.sender == self._peer_id or self._seen.get((message.sender, gossip.number)):
            self._counters["gossip_duplicate"] += 1
            return
        self._seen.put((message.sender, gossip.number), True)
        key = (message.topic, message.sender, message.data)
        known = self._repeats.get(key)
        verdict = known or self._judge(message)
        if verdict is not Verdict.IGNORE and known is None:
            self._repeats.put(key, verdict)
        self._counters[f"gossip_{verdict.value}"] += 1
        if verdict is Verdict.REJECT:
            self._strike(forwarder)
        if verdict is Verdict.ACCEPT:
            if known is None and self._network.wires is None:
                self._mailboxes[message.topic].put(message)
            self._pass_on(gossip, forwarder)

    def _judge(self, message: GossipMessage) -> Verdict:
        try:
            return self._validators[message.topic](message.sender, message.data)
        except Exception:  # noqa: BLE001 - as the real host does
            self._counters["validators_failed"] += 1
            return Verdict.IGNORE

    def _strike(self, peer: bytes) -> None:
        self._counters["strikes"] += 1
        if self._reputation.strike(peer, trio.current_time()):
            self._counters["peers_banned"] += 1
            self._network.unlink(self._peer_id, peer)

    # - requests -
    def serve(self, protocol: str, handler: RequestHandler, *, max_request_bytes: int) -> None:
        if not protocol.startswith("/"):
            raise LocalProtocolError(f"a protocol id begins with a slash: {protocol}")
        self._handlers[protocol] = (handler, max_request_bytes)

    async def request(
        self, peer: bytes, protocol: str, data: bytes, *, max_response_bytes: int, deadline_seconds: float
    ) -> bytes:
        other = self._network.find(peer)
        if peer not in self._links or other is None:
            raise UnavailableError("not connected to that peer")
        try:
            with trio.fail_after(deadline_seconds):
                await self._travel(self._peer_id, peer, "request", protocol, data)
                self._sent += len(data) + OVERHEAD_BYTES
                response = await other._answer(protocol, self._peer_id, data)
                await self._travel(peer, self._peer_id, "response", protocol, response or b"")
        except trio.TooSlowError as error:
            raise UnavailableError(f"no answer to {protocol} within {deadline_seconds:g} s") from error
        if response is None:
            raise UnavailableError(f"the peer did not answer {protocol}")
        self._received += len(response) + OVERHEAD_BYTES
        if len(response) > max_response_bytes:
            raise InvalidMessageError(f"frame of {len(response)} bytes, at most {max_response_bytes}")
        return response

    async def _travel(self, sender: bytes, receiver: bytes, kind: str, channel: str, data: bytes) -> None:
        seconds = self._network.travel_seconds(Flight(sender, receiver, kind, channel, data))
        if seconds is None:
            await trio.sleep_forever()  # until the deadline
        else:
            await trio.sleep(seconds)

    async def _answer(self, protocol: str, peer: bytes, request: bytes) -> bytes | None:
        """The handler's response, in a task of this host; None stands for a reset stream."""
        handler, max_request_bytes = self._handlers.get(protocol, (None, 0))
        if handler is None or self._nursery is None:
            return None
        self._received += len(request) + OVERHEAD_BYTES
        if len(request) > max_request_bytes:
            self._counters["requests_malformed"] += 1
            return None
        answer: list[bytes] = []
        done = trio.Event()

        async def run(serve: RequestHandler) -> None:
            try:
                answer.append(await serve(peer, request))
                self._counters["requests_served"] += 1
            except RemoteProtocolError:
                self._counters["requests_declined"] += 1
            except Exception:  # noqa: BLE001 - as the real host does
                self._counters["requests_failed"] += 1
            finally:
                done.set()

        self._nursery.start_soon(run, handler)
        await done.wait()
        if not answer:
            return None
        self._sent += len(answer[0]) + OVERHEAD_BYTES
        return answer[0]

    # - measurements -
    def traffic(self) -> Traffic:
        return Traffic(sent_bytes=self._sent, received_bytes=self._received)

    def counters(self) -> Mapping[str, int]:
        return dict(self._counters)
