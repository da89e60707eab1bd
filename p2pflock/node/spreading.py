"""How the payloads of one round reach everybody whom the round waits for, and from them everybody else.

Law: this file decides whom to give what and whom to ask next; bytes move through the Exchange port, and what may be
taken in is the port's business (gossip/pool.py).  benchmarks/exchange_peer.py runs this same code.

In a small group an author gives its payload to all others the moment it is made: one trip instead of log2(n) swaps
one after another, and for as many bytes in all, since everybody must receive every payload once.  What has not come
by itself a moment after its header is asked for, as in a large group, where nobody could open that many streams:
partners that the beacon draws swap what the other lacks, log2(n) hops, after which all have all if all went well,
and twice as many where the group is large, since partners never keep step; then whatever is still missing comes from
its author or, in turn with it, from the next whom the beacon draws: an author may be dead and its payload not.

Who is in no group takes what its neighbours have.  The group has it first; would all ask it, each of the group would
serve log(n) of them.  So only a quarter as many as the group has members ask there, drawn anew each round, and everybody
else asks those who are in no group either; now and then each asks whomever it is connected with, lest it wait for the
dead.

Attack, and everyday life: a partner that is frozen keeps a swap waiting until its deadline, and a gift never comes.
Neither may keep the others waiting: with a third of the peers away in every round that would be every round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import trio

from p2pflock.errors import FlockError
from p2pflock.ports import Exchange
from p2pflock.primitives import shuffle
from p2pflock.primitives.cid import CID
from p2pflock.protocol.committee import compute_hops, compute_partner

SMALL_GROUP = 16  # that keeps step well enough to swap through one cycle of hops, and whose members give
GIVE_SECONDS = 30.0
GIVEN_SECONDS = 1.5  # after its header, in which a payload comes by itself
SWAP_SECONDS = 15.0
SWAP_PATIENCE_SECONDS = 1.0  # then the next partner is met beside the slow one
SWAPS_AT_ONCE = 8
FETCH_PAUSE_SECONDS = 0.4
FIRST_PAUSE_SECONDS = 0.025  # doubled while swaps bring nothing
SOURCES_A_FIRST = 4
ANYBODY_HOPS = 8  # every so many, one who is in no group asks whomever


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a member sees of its round; asked anew each time.

    Attributes:
        group: places in the roster of who swaps, our own among them; None where we are in no group.
        missing: place of the author -> content id, of every payload that is named and not here.
        peer_of: place -> peer id.
        neighbours: peer ids of whom we are connected with.
        sources: those of everybody in the group, dead or alive, for who is in none.
        outsiders: how many are in no group.
        may_hop: whether hops drawn by the beacon have begun; before, one would bring nothing.
        now: monotonic seconds.
        on_failed: told why a swap failed.
    """

    group: Callable[[], frozenset[int] | None]
    missing: Callable[[], Mapping[int, CID]]
    peer_of: Callable[[int], bytes]
    neighbours: Callable[[], Iterable[bytes]]
    may_hop: Callable[[], bool]
    now: Callable[[], float]
    on_failed: Callable[[str], None]
    sources: frozenset[bytes] = frozenset()
    outsiders: int = 0


class Spreading:
    """The payloads of one round, from one member's place.

    Args:
        swarm: moves them.
        round_key: the round in the exchange.
        beacon: 32 bytes, the round's; draws the partners.
        seat: our own place in the roster.
        around: what we see of the round.
    """

    def __init__(self, swarm: Exchange, round_key: bytes, beacon: bytes, seat: int, around: Surroundings) -> None:
        self._swarm = swarm
        self._key = round_key
        self._beacon = beacon
        self._seat = seat
        self._around = around
        self._named: dict[CID, float] = {}  # when we first missed it
        self._wanted = trio.lowlevel.ParkingLot()  # while there is nothing to do
        self._swapping: set[bytes] = set()
        self._arrived: set[CID] = set()  # by swaps; the round may not have looked at them yet

    def wake(self) -> None:
        """A payload was named, or has arrived."""
        self._wanted.unpark_all()

    async def give(self, payload: CID) -> None:
        """Our own, offered just now, to everybody in a small group."""
        group = self._around.group()
        if group is None or not 1 < len(group) <= SMALL_GROUP:
            return
        partners = [self._around.peer_of(place) for place in sorted(group - {self._seat})]
        try:
            await self._swarm.give(self._key, payload, partners, deadline_seconds=GIVE_SECONDS)
        except FlockError as error:  # they ask for it
            self._around.on_failed(str(error))

    async def run(self) -> None:
        """Until cancelled: ask for whatever is missing."""
        hop, pause = 0, FIRST_PAUSE_SECONDS
        async with trio.open_nursery() as nursery:
            while True:
                missing, due = self._look()
                if not missing:  # a hop now would bring nothing: whoever lacks ours asks for it
                    await self._rest(min(FETCH_PAUSE_SECONDS, due))
                    continue
                group = self._around.group()
                hops = 0 if group is None else compute_hops(len(group)) * (2 if len(group) > SMALL_GROUP else 1)
                is_drawn = group is not None and self._around.may_hop() and (hop < hops or (hop - hops) % 2 == 1)
                drawn = hop if group is None or hop < hops else hops + (hop - hops) // 2
                partner = self._choose(group, missing, drawn, is_drawn=is_drawn)
                if partner is not None or is_drawn or hop >= hops:
                    hop += 1
                if partner is None or partner in self._swapping or len(self._swapping) >= SWAPS_AT_ONCE:
                    await self._rest(FETCH_PAUSE_SECONDS)
                    continue
                self._swapping.add(partner)
                ended, known = trio.Event(), len(self._arrived)
                nursery.start_soon(self._swap, partner, ended)
                with trio.move_on_after(SWAP_PATIENCE_SECONDS):
                    await ended.wait()
                is_fruitless = len(self._arrived) == known
                pause = min(2 * pause, FETCH_PAUSE_SECONDS) if is_fruitless else FIRST_PAUSE_SECONDS
                if hop >= hops and is_fruitless:
                    await self._rest(pause)  # what we lack may be on its way from another

    async def _rest(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await self._wanted.park()

    def _look(self) -> tuple[list[int], float]:
        """Authors of what must be asked for now, and seconds until the next one must be."""
        now, group = self._around.now(), self._around.group()
        grace = GIVEN_SECONDS if group is not None and len(group) <= SMALL_GROUP else 0.0
        missing, due = [], FETCH_PAUSE_SECONDS
        for place, payload in self._around.missing().items():
            if payload in self._arrived:
                continue
            left = self._named.setdefault(payload, now) + grace - now
            if left <= 0:
                missing.append(place)
            else:
                due = min(due, left)
        return missing, due

    def _choose(
        self, group: frozenset[int] | None, missing: Sequence[int], hop: int, *, is_drawn: bool
    ) -> bytes | None:
        around = self._around
        if group is None:
            return self._draw_neighbour(hop)
        if is_drawn:
            place = compute_partner(self._beacon, hop, group, self._seat)
            return None if place is None else around.peer_of(place)
        authors = [peer for place in missing if (peer := around.peer_of(place)) not in self._swapping]
        return authors[hop % len(authors)] if authors else None

    async def _swap(self, partner: bytes, ended: trio.Event) -> None:
        try:
            self._arrived.update(await self._swarm.swap(self._key, partner, deadline_seconds=SWAP_SECONDS))
        except FlockError as error:
            self._around.on_failed(str(error))
            await trio.sleep(FETCH_PAUSE_SECONDS)  # not the same one again at once
        finally:
            self._swapping.discard(partner)
            ended.set()

    def _is_first(self) -> bool:
        """Whether we are of those, one for so many sources, who take from them."""
        draw = int.from_bytes(shuffle.derive(self._beacon, "first", self._seat), "big")
        return SOURCES_A_FIRST * (draw * self._around.outsiders >> 256) < len(self._around.sources)

    def _draw_neighbour(self, hop: int) -> bytes | None:
        """The next of those we are connected with, in an order of our own."""
        connected = sorted(self._around.neighbours())
        if hop % ANYBODY_HOPS != ANYBODY_HOPS - 1:
            first = self._is_first()
            connected = [peer for peer in connected if (peer in self._around.sources) == first] or connected
        if not connected:
            return None
        cycle, step = divmod(hop, len(connected))
        seed = shuffle.derive(self._beacon, "neighbour", self._seat, cycle)
        return connected[shuffle.shuffled(seed, len(connected))[step]]
