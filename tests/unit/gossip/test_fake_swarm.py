"""FakeSwarm keeps the port's promises, and its delays and losses do what they say."""

import math

import pytest
import trio
from trio.testing import MockClock

from p2pflock.errors import UnavailableError
from p2pflock.primitives import peerid, unixfs
from p2pflock.testing.conformance_swarm import CHECKS
from p2pflock.testing.swarm import FakeSwarmNetwork

PEERS = [peerid._PREFIX + bytes([n]) * 32 for n in (3, 4, 5)]
PAYLOAD = b"payload"
CID = unixfs.compute_cid(PAYLOAD)


def run(scenario, *args):
    return trio.run(scenario, *args, clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("seconds", [0.0, 0.1])
def test_conformance(check, seconds):
    async def scenario():
        network = FakeSwarmNetwork(latency=lambda sender, receiver: seconds)
        await check([network.join(peer) for peer in PEERS], PEERS, check.__name__)

    run(scenario)


async def two(network):
    a, b = (network.join(peer) for peer in PEERS[:2])
    await b.offer(b"r", CID, PAYLOAD)
    await a.expect(b"r", CID, len(PAYLOAD))
    return a, b


def test_frozen_partner_costs_the_deadline():
    async def scenario():
        network = FakeSwarmNetwork(latency=lambda sender, receiver: math.inf)
        a, _ = await two(network)
        with pytest.raises(UnavailableError):
            await a.swap(b"r", PEERS[1], deadline_seconds=7)
        assert trio.current_time() == pytest.approx(7)

    run(scenario)


def test_latency_is_paid_both_ways():
    async def scenario():
        network = FakeSwarmNetwork(latency=lambda sender, receiver: 1.5)
        a, _ = await two(network)
        start = trio.current_time()
        assert await a.swap(b"r", PEERS[1], deadline_seconds=7) == [CID]
        assert trio.current_time() - start == pytest.approx(3)

    run(scenario)


def test_lost_and_killed_partners_fail_at_once():
    async def scenario():
        lost = []
        network = FakeSwarmNetwork(loss=lambda sender, receiver: not lost and not lost.append(1))
        a, _ = await two(network)
        with pytest.raises(UnavailableError):
            await a.swap(b"r", PEERS[1], deadline_seconds=7)
        assert await a.swap(b"r", PEERS[1], deadline_seconds=7) == [CID]
        network.kill(PEERS[1])
        with pytest.raises(UnavailableError):
            await a.swap(b"r", PEERS[1], deadline_seconds=7)

    run(scenario)


def test_records_outlive_their_author_until_they_expire():
    async def scenario():
        network = FakeSwarmNetwork()
        a, b = await two(network)
        await b.announce("k", b"v", ttl_seconds=10)
        network.kill(PEERS[1])
        assert await a.lookup("k") == {PEERS[1]: b"v"}
        await trio.sleep(10)
        assert await a.lookup("k") == {}

    run(scenario)


def test_arrivals_end_with_the_peer():
    async def scenario():
        network = FakeSwarmNetwork()
        a, _ = await two(network)
        arrivals = await a.arrivals()
        network.kill(PEERS[0])
        assert [arrival async for arrival in arrivals] == []

    run(scenario)
