"""Who weighs how much, and what the beacon draws."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from p2pflock.errors import InvalidMessageError, LocalProtocolError
from p2pflock.protocol import committee as c
from p2pflock.protocol.messages import CommitteeBlock

BEACON = b"b" * 32


def test_quorum_is_strictly_more_than_two_thirds(swarm_of) -> None:
    three = swarm_of((1, 1, 1)).committee
    assert not three.has_quorum([0, 1])
    assert three.has_quorum([0, 1, 2])
    assert not three.has_quorum([0, 0, 0, 1])  # a seat named twice counts once
    assert not three.has_blocking([0])
    assert three.has_blocking([0, 1])
    # One wei decides, far beyond what a float can tell apart.
    big = swarm_of((2 * 10**30, 10**30)).committee
    assert not big.has_quorum([0])
    assert not big.has_blocking([1])
    big = swarm_of((2 * 10**30 + 1, 10**30)).committee
    assert big.has_quorum([0])


def test_block_round_trip_and_lookup(swarm) -> None:
    block = swarm.committee.to_block()
    again = c.Committee.from_block(CommitteeBlock.decode(block.encode()))
    assert again == swarm.committee
    assert again.cid() == block.cid()
    for index, seat in enumerate(again.seats):
        assert again.seat_of(seat.peer) == again.seat_of_key(seat.bls_public_key) == index
    assert again.seat_of(b"\0" * 38) is None


def test_malformed_committees_are_refused(swarm) -> None:
    block = swarm.committee.to_block()
    first, second = block.seats[:2]
    for seats in (
        (),
        (replace(first, weight_wei=0), second),
        (first, replace(second, peer=first.peer)),
        (first, replace(second, bls_public_key=first.bls_public_key)),  # one signature would count twice
    ):
        with pytest.raises(InvalidMessageError):
            c.Committee.from_block(replace(block, seats=seats))


def test_beacon_depends_on_everything() -> None:
    base = (b"t" * 32, 1, 2, b"p" * 32)
    others = [(b"u" * 32, 1, 2, b"p" * 32), (b"t" * 32, 2, 2, b"p" * 32), (b"t" * 32, 1, 3, b"p" * 32),
              (b"t" * 32, 1, 2, b"q" * 32)]
    assert len({c.compute_beacon(*arguments) for arguments in (base, *others)}) == 5


def test_every_seat_proposes_within_a_cycle_and_heavy_ones_come_first_more_often(swarm_of) -> None:
    committee = swarm_of((1, 1, 1, 7)).committee
    for first_view in (0, 4, 400):
        seats = [c.compute_proposer(committee, BEACON, first_view + i) for i in range(4)]
        assert sorted(seats) == [0, 1, 2, 3]
    firsts = Counter(
        c.compute_proposer_order(committee, BEACON, cycle)[0] for cycle in range(400)
    )
    assert 240 < firsts[3] < 320  # 70 % of 400
    assert all(firsts[seat] > 15 for seat in range(3))


def test_shards_are_disjoint_and_move() -> None:
    rounds = [c.compute_shards(bytes([i]) * 32, 5, 5) for i in range(20)]
    assert all(sorted(shards) == [0, 1, 2, 3, 4] for shards in rounds)
    assert {shards[0] for shards in rounds} == {0, 1, 2, 3, 4}
    assert len(set(c.compute_shards(BEACON, 5, 50))) == 5
    assert c.compute_shard(BEACON, 3, 5, 50) == c.compute_shards(BEACON, 5, 50)[3]
    with pytest.raises(LocalProtocolError):
        c.compute_shards(BEACON, 5, 0)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 12, 17, 31, 64])
def test_one_cycle_of_swaps_spreads_everything(size: int) -> None:
    members = [10 + 3 * i for i in range(size)]
    hops = c.compute_hops(size)
    assert hops <= (size - 1).bit_length() + (3 if size % 2 else 0)
    for first in (0, hops, 2 * hops):  # further cycles as well, in new positions
        known = {seat: {seat} for seat in members}
        for hop in range(first, first + hops):
            partner = {seat: c.compute_partner(BEACON, hop, members, seat) for seat in members}
            assert all(partner[other] == seat for seat, other in partner.items() if other is not None)
            assert sum(other is None for other in partner.values()) == size % 2
            known = {
                seat: known[seat] | (known[other] if other is not None else set())
                for seat, other in partner.items()
            }
        assert all(have == set(members) for have in known.values())


def test_partners_change_between_cycles_and_strangers_have_none() -> None:
    members = list(range(16))
    hops = c.compute_hops(16)
    first = [c.compute_partner(BEACON, 0, members, seat) for seat in members]
    assert first != [c.compute_partner(BEACON, hops, members, seat) for seat in members]
    assert first == [c.compute_partner(BEACON, 0, set(reversed(members)), seat) for seat in members]
    with pytest.raises(LocalProtocolError):
        c.compute_partner(BEACON, 0, members, 16)
