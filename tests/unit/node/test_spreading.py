"""How payloads reach everybody: by gifts in a small group, by drawn partners in a large one, around who is frozen."""

from __future__ import annotations

import math

import pytest
import trio
from trio.testing import MockClock

from p2pflock.node import spreading
from p2pflock.node.spreading import GIVEN_SECONDS, SMALL_GROUP, Spreading, Surroundings
from p2pflock.primitives import peerid, unixfs
from p2pflock.testing.swarm import FakeSwarmNetwork

ROUND, BEACON = b"round", bytes(range(32))
DELAY = 0.05


def peer_of(place):
    return peerid._PREFIX + bytes([place]) * 32


def payload_of(place):
    return b"payload of %d" % place


CIDS = [unixfs.compute_cid(payload_of(place)) for place in range(64)]


class Member:
    """Knows all headers from the beginning."""

    def __init__(self, network, place, places, authors, *, is_member=True, outside=()):
        self.swarm = network.join(peer_of(place))
        self.place, self.authors, self.failures = place, authors, []
        self.complete_at = math.inf
        around = Surroundings(
            group=lambda: frozenset(places) if is_member else None,
            missing=lambda: {a: CIDS[a] for a in authors if self.swarm.pool.find(ROUND, CIDS[a]) is None},
            peer_of=peer_of,
            neighbours=lambda: [peer_of(other) for other in (*places, *outside) if other != place],
            may_hop=lambda: True,
            now=trio.current_time,
            on_failed=self.failures.append,
            sources=frozenset(map(peer_of, places)),
            outsiders=len(outside),
        )
        self.spreading = Spreading(self.swarm, ROUND, BEACON, place, around)

    async def live(self):
        arrivals = await self.swarm.arrivals()
        for author in self.authors:
            if author != self.place:
                await self.swarm.expect(ROUND, CIDS[author], 100)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.spreading.run)
            if self.place in self.authors:
                await self.swarm.offer(ROUND, CIDS[self.place], payload_of(self.place))
                nursery.start_soon(self.spreading.give, CIDS[self.place])
            while len(self.swarm.pool.collect(ROUND)) < len(self.authors):
                await arrivals.__anext__()
                self.spreading.wake()
            self.complete_at = trio.current_time()
            await trio.sleep_forever()  # others may ask


def play(size, *, latency=lambda sender, receiver: DELAY, authors=None, onlookers=(), seconds=60):
    """The members after they had so much time."""
    members = []

    async def main():
        network = FakeSwarmNetwork(latency)
        everyone = [*range(size), *onlookers]
        for place in everyone:
            member = Member(
                network, place, range(size), authors or range(size), is_member=place not in onlookers, outside=onlookers
            )
            members.append(member)
        start = trio.current_time()
        with trio.move_on_after(seconds):
            async with trio.open_nursery() as nursery:
                for member in members:
                    nursery.start_soon(member.live)
        for member in members:
            member.complete_at -= start

    trio.run(main, clock=MockClock(autojump_threshold=0))
    return members


@pytest.mark.parametrize("size", [2, 5, 8, SMALL_GROUP])
def test_in_a_small_group_it_takes_one_trip_and_each_payload_travels_once(size):
    members = play(size)
    assert [member.complete_at for member in members] == pytest.approx([DELAY] * size)
    total = sum(len(payload_of(place)) for place in range(size))
    assert sum(member.swarm.sent_bytes for member in members) == (size - 1) * total
    assert not any(member.failures for member in members)


def test_in_a_large_group_nobody_gives_and_all_arrives(monkeypatch):
    given = []
    give = FakeSwarmNetwork.join(FakeSwarmNetwork(), peer_of(1)).give.__func__

    async def watched(self, *args, **options):
        given.append(self.peer)
        return await give(self, *args, **options)

    monkeypatch.setattr("p2pflock.testing.swarm.FakeSwarm.give", watched)
    members = play(SMALL_GROUP + 1)
    assert max(member.complete_at for member in members) < 5
    assert not given


def test_a_gift_that_does_not_come_is_asked_of_another():
    """Author 0 reaches nobody but 1: the others have it from whoever has it, soon after they waited in vain."""

    def latency(sender, receiver):
        ends = {sender, receiver}
        return math.inf if peer_of(0) in ends and peer_of(1) not in ends else DELAY

    members = play(4, latency=latency, authors=[0])
    assert [member.complete_at for member in members[:2]] == pytest.approx([0, DELAY])
    late = [member.complete_at for member in members[2:]]
    assert all(GIVEN_SECONDS < at < GIVEN_SECONDS + 3 * spreading.SWAP_PATIENCE_SECONDS for at in late)


def test_whoever_is_in_no_group_takes_what_its_neighbours_have():
    onlooker = play(4, onlookers=[9])[-1]
    assert onlooker.complete_at < 2


def test_most_of_those_in_no_group_have_it_from_one_another():
    """128 of them and 8 in the group: were all to ask it, each member would serve about log(16) of them."""
    members = play(8, onlookers=range(10, 138))
    assert max(member.complete_at for member in members) < 10
    total = sum(len(payload_of(place)) for place in range(8))
    for member in members[:8]:
        assert member.swarm.sent_bytes < 4.5 * total
    assert sum(member.swarm.sent_bytes for member in members[:8]) < 8 * 2 * total
