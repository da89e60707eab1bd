"""The Swarm port in memory: a network of peers in one trio program, with delays and losses on request.

Law: what the port promises holds here as over hivemind (conformance_swarm.py runs over both): only expected
payloads that match enter, a swap gives each side what it lacks, deadlines end in UnavailableError, records
age.  Payloads go through the same gossip.pool.  Time is trio's, so a MockClock drives it.

Not here: sockets, processes, signatures on DHT records (a FakeSwarm can only write its own).
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import trio

from p2pflock.errors import LocalProtocolError, UnavailableError
from p2pflock.gossip.pool import PayloadPool
from p2pflock.ports import Traffic
from p2pflock.primitives import peerid
from p2pflock.primitives.cid import CID
from p2pflock.primitives.cid import SIZE_BYTES as CID_BYTES
from p2pflock.testing.wires import Wires

MAX_VALUE_BYTES = 8 << 10
MAX_TTL_SECONDS = 600.0
ARRIVALS_BUFFERED = 8192
HELLO_BYTES = 120  # gossip/exchange.py: round key, serial, framing; each wanted id comes on top
GIVE_BYTES, DONE_BYTES = 110, 5
EXPECT_SECONDS = 3.0
RECORD_BYTES = 120  # of a DHT record beside its value: subkey, expiry, signature

Latency = Callable[[bytes, bytes], float]  # (from, to) -> seconds one way; math.inf: frozen
Loss = Callable[[bytes, bytes], bool]  # (from, to) -> whether this exchange fails at once


def _no_latency(sender: bytes, receiver: bytes) -> float:
    return 0.0


def _no_loss(sender: bytes, receiver: bytes) -> bool:
    return False


@dataclass(slots=True)
class _Average:
    vectors: dict[bytes, bytes] = field(default_factory=dict)
    complete: trio.Event = field(default_factory=trio.Event)


class FakeSwarmNetwork:
    """Everybody's view of everybody.

    Attributes:
        latency: seconds from one peer to another; `math.inf` freezes, and deadlines then decide.
        loss: asked once per swap; True makes it fail at once, as a killed peer does.
        wires: carry every byte of a swap, where they are given.
    """

    def __init__(
        self, latency: Latency = _no_latency, loss: Loss = _no_loss, wires: Wires | None = None
    ) -> None:
        self.latency = latency
        self.loss = loss
        self.wires = wires
        self.swarms: dict[bytes, FakeSwarm] = {}
        self.records: dict[str, dict[bytes, tuple[bytes, float]]] = {}
        self.averages: dict[tuple[bytes, tuple[bytes, ...], int], _Average] = {}

    def join(self, peer: bytes) -> FakeSwarm:
        """A new peer, or the same one after a restart: with nothing in memory."""
        swarm = self.swarms[peer] = FakeSwarm(self, peer)
        return swarm

    def kill(self, peer: bytes) -> None:
        """Gone without a word; its records stay until they expire."""
        swarm = self.swarms.pop(peer, None)
        if swarm is not None:
            swarm.close()

    async def travel(self, sender: bytes, receiver: bytes, size_bytes: int = 0) -> None:
        delay = self.latency(sender, receiver)
        if math.isinf(delay):
            await trio.sleep_forever()
        if self.wires is not None:
            delay = self.wires.send(sender, receiver, size_bytes)
        await trio.sleep(delay)


class FakeSwarm:
    """ports.Swarm.  Made by FakeSwarmNetwork.join."""

    def __init__(self, network: FakeSwarmNetwork, peer: bytes) -> None:
        self._network = network
        self._peer = peer
        self._listeners: list[trio.MemorySendChannel[tuple[bytes, CID]]] = []
        self.sent_bytes = 0
        self.received_bytes = 0
        self.control_bytes = 0  # with wires: what swaps and lookups cost beside payloads, both directions
        self.pool = PayloadPool(self._tell)
        self.known: dict[bytes, tuple[str, ...]] = {}

    @property
    def peer(self) -> bytes:
        return self._peer

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()
        self._network.kill(self._peer)

    def close(self) -> None:
        for listener in self._listeners:
            listener.close()

    # --- discovery ------------------------------------------------------------------------------------
    @property
    def bootstrap_addresses(self) -> Sequence[str]:
        return (f"/memory/0/p2p/{peerid.to_text(self._peer)}",)

    async def announce(self, key: str, value: bytes, *, ttl_seconds: float) -> None:
        if len(value) > MAX_VALUE_BYTES:
            raise LocalProtocolError(f"DHT record of {len(value)} bytes, at most {MAX_VALUE_BYTES}")
        await trio.lowlevel.checkpoint()
        expiry = trio.current_time() + min(ttl_seconds, MAX_TTL_SECONDS)
        self._network.records.setdefault(key, {})[self._peer] = (value, expiry)

    async def lookup(self, key: str) -> Mapping[bytes, bytes]:
        await trio.lowlevel.checkpoint()
        now = trio.current_time()
        records = self._network.records.get(key, {})
        found = {peer: value for peer, (value, expiry) in records.items() if expiry > now}
        self.control_bytes += sum(RECORD_BYTES + len(value) for value in found.values())
        return found

    def add_addresses(self, peer: bytes, addresses: Sequence[str]) -> None:
        self.known[peer] = tuple(addresses)

    # --- exchange -------------------------------------------------------------------------------------
    async def offer(self, round_key: bytes, cid: CID, payload: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.pool.offer(round_key, cid, payload)

    async def expect(self, round_key: bytes, cid: CID, size_bytes: int) -> None:
        await trio.lowlevel.checkpoint()
        self.pool.expect(round_key, cid, size_bytes)

    async def swap(self, round_key: bytes, partner: bytes, *, deadline_seconds: float) -> Sequence[CID]:
        arrived: list[CID] = []
        with trio.move_on_after(deadline_seconds) as scope:
            if self._network.wires is not None:
                return await self._swap_on_wires(round_key, partner)
            await self._network.travel(self._peer, partner)
            other = self._network.swarms.get(partner)
            if other is None or self._network.loss(self._peer, partner):
                raise UnavailableError("partner hung up")
            _give(self, other, round_key)
            await self._network.travel(partner, self._peer)
            if self._network.swarms.get(partner) is not other:
                raise UnavailableError("partner hung up")
            arrived = _give(other, self, round_key)
        if scope.cancelled_caught:
            raise UnavailableError(f"partner did not finish within {deadline_seconds:g} s")
        return arrived

    async def give(
        self, round_key: bytes, cid: CID, partners: Sequence[bytes], *, deadline_seconds: float
    ) -> Sequence[bytes]:
        payload = self.pool.find(round_key, cid)
        if payload is None:
            raise LocalProtocolError("only a payload that is here can be given")
        has: set[bytes] = set()
        with trio.move_on_after(deadline_seconds):
            async with trio.open_nursery() as nursery:
                for partner in partners:
                    nursery.start_soon(self._give_one, round_key, cid, payload, partner, has)
        return [partner for partner in partners if partner in has]

    async def _give_one(self, round_key: bytes, cid: CID, payload: bytes, partner: bytes, has: set[bytes]) -> None:
        network = self._network
        await network.travel(self._peer, partner, GIVE_BYTES + len(payload))
        other = network.swarms.get(partner)
        if other is None or network.loss(self._peer, partner):
            return
        self.control_bytes += GIVE_BYTES
        self.sent_bytes += len(payload)
        other.received_bytes += len(payload)
        if not other.pool.is_expected(round_key, cid, len(payload)):
            named = trio.Event()
            with other.pool.watch(round_key, cid, named.set), trio.move_on_after(EXPECT_SECONDS):
                await named.wait()
            if not other.pool.is_expected(round_key, cid, len(payload)):
                return
        if network.swarms.get(partner) is not other:
            return
        other.pool.accept(round_key, cid, payload)
        await network.travel(partner, self._peer, DONE_BYTES)
        has.add(partner)

    async def _swap_on_wires(self, round_key: bytes, partner: bytes) -> list[CID]:
        """As gossip/exchange.py: my wants; its wants and what I lack; what it lacks."""
        network = self._network
        hello = self.count_hello(round_key)
        await network.travel(self._peer, partner, hello)
        other = self._find(partner)
        other.control_bytes += hello
        taken = _choose(other, self, round_key)
        size, hello = sum(map(len, taken.values())), other.count_hello(round_key)
        other.sent_bytes += size
        await network.travel(partner, self._peer, hello + size)
        self.control_bytes += hello
        self.received_bytes += size
        arrived = [cid for cid, payload in taken.items() if self.pool.accept(round_key, cid, payload)]
        if self._find(partner) is not other:
            raise UnavailableError("partner hung up")
        given = _choose(self, other, round_key)
        size = sum(map(len, given.values()))
        if size:
            self.sent_bytes += size
            await network.travel(self._peer, partner, size)
            if self._find(partner) is other:
                other.received_bytes += size
                for cid, payload in given.items():
                    other.pool.accept(round_key, cid, payload)
        return arrived

    def _find(self, partner: bytes) -> FakeSwarm:
        other = self._network.swarms.get(partner)
        if other is None:
            raise UnavailableError("partner hung up")
        return other

    def count_hello(self, round_key: bytes) -> int:
        size = HELLO_BYTES + len(self.pool.wanted(round_key)) * (CID_BYTES + 2)
        self.control_bytes += size
        return size

    async def collect(self, round_key: bytes) -> Mapping[CID, bytes]:
        await trio.lowlevel.checkpoint()
        return self.pool.collect(round_key)

    async def forget(self, round_key: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.pool.forget(round_key)

    async def arrivals(self) -> AsyncIterator[tuple[bytes, CID]]:
        await trio.lowlevel.checkpoint()
        send, receive = trio.open_memory_channel[tuple[bytes, CID]](ARRIVALS_BUFFERED)
        self._listeners.append(send)
        return receive

    def _tell(self, round_key: bytes, cid: CID) -> None:
        for listener in list(self._listeners):
            try:
                listener.send_nowait((round_key, cid))
            except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
                self._listeners.remove(listener)

    # --- dense average --------------------------------------------------------------------------------
    async def average(
        self, round_key: bytes, vector: bytes, members: Sequence[bytes], *, deadline_seconds: float
    ) -> bytes:
        group = tuple(sorted(set(members)))
        if self._peer not in group or len(vector) % 4:
            raise LocalProtocolError("average() needs a float32 vector and a group that we belong to")
        name = round_key, group, len(vector)
        meeting = self._network.averages.setdefault(name, _Average())
        meeting.vectors[self._peer] = vector
        if len(meeting.vectors) == len(group):
            meeting.complete.set()
            self._network.averages.pop(name, None)
        with trio.move_on_after(deadline_seconds):
            for member in group:
                await self._network.travel(member, self._peer)
            await meeting.complete.wait()
        if not meeting.complete.is_set():
            meeting.vectors.pop(self._peer, None)
            raise UnavailableError(f"dense average not finished within {deadline_seconds:g} s")
        self.sent_bytes += len(vector)
        self.received_bytes += len(vector)
        return compute_mean([meeting.vectors[member] for member in group])

    # --- figures --------------------------------------------------------------------------------------
    def traffic(self) -> Traffic:
        """Payload bytes only: there is no socket here."""
        return Traffic(self.sent_bytes, self.received_bytes)


def _choose(giver: FakeSwarm, taker: FakeSwarm, round_key: bytes) -> dict[CID, bytes]:
    """What one holds and the other lacks; another session may be bringing it too, and then it comes twice."""
    found = {cid: giver.pool.find(round_key, cid) for cid in taker.pool.wanted(round_key)}
    return {cid: payload for cid, payload in found.items() if payload is not None}


def _give(giver: FakeSwarm, taker: FakeSwarm, round_key: bytes) -> list[CID]:
    given = []
    for cid, size in taker.pool.wanted(round_key).items():
        payload = giver.pool.find(round_key, cid)
        if payload is not None and len(payload) <= size and taker.pool.accept(round_key, cid, payload):
            giver.sent_bytes += len(payload)
            taker.received_bytes += len(payload)
            given.append(cid)
    return given


def compute_mean(vectors: Sequence[bytes]) -> bytes:
    """Mean of little-endian float32 vectors, summed in the given order in float32: what every member of a
    dense average must hold, bit by bit.  `vectors` are in the order of their owners' peer ids."""
    total = np.zeros(len(vectors[0]) // 4, dtype="<f4")
    for vector in vectors:
        total += np.frombuffer(vector, dtype="<f4")
    mean: bytes = (total / np.float32(len(vectors))).astype("<f4").tobytes()
    return mean
