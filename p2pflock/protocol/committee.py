"""The committee of an epoch, and everything that a beacon draws from it.

Law: pure functions of the snapshot and of 32-byte seeds: who is a member, what weighs enough, who proposes,
trains on which shard and swaps with whom.  All weighing is integer arithmetic: "more than two thirds" is
3 w > 2 W, so rounding can never make a quorum.  Whether a snapshot is the chain's is not decided here.

Known limit: the beacon of a round is a hash of the decided parent, so the proposer of the parent, who chooses
which contributions it holds, has some influence on it.  It draws schedules with it, never money or the
public batch (that comes from unique signatures, compute_score_seed).

Sources: Knödel, "New gossips and telephones", Discrete Mathematics 13 (1975), for compute_partner;
Efraimidis & Spirakis (2006) for weighted sampling without replacement.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache

from p2pflock.errors import InvalidMessageError, LocalProtocolError
from p2pflock.primitives import shuffle, signing
from p2pflock.primitives.cid import CID
from p2pflock.protocol.messages import MAX_MEMBERS, CommitteeBlock, Seat, Vote


@dataclass(frozen=True, slots=True)
class Committee:
    """The stake-weighted seats of one epoch, in snapshot order.

    Raises InvalidMessageError when there is no seat, a seat has no weight, or two seats share a peer or a
    BLS key (a shared key would let one signature count twice).
    """

    task: bytes
    epoch: int
    chain_id: int  # 0: a static committee without a chain
    anchor: bytes  # 20 bytes, zero without a chain
    seats: tuple[Seat, ...]
    round_budget_wei: int = 0  # what settlement may give out for one round
    total_wei: int = field(init=False)
    _by_peer: dict[bytes, int] = field(init=False, repr=False, compare=False, hash=False)
    _by_key: dict[bytes, int] = field(init=False, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        if not 0 < len(self.seats) <= MAX_MEMBERS:
            raise InvalidMessageError(f"committee of {len(self.seats)} seats, expected 1..{MAX_MEMBERS}")
        if any(seat.weight_wei <= 0 for seat in self.seats):
            raise InvalidMessageError("committee seat without weight")
        by_peer = {seat.peer: index for index, seat in enumerate(self.seats)}
        by_key = {seat.bls_public_key: index for index, seat in enumerate(self.seats)}
        if len(by_peer) != len(self.seats) or len(by_key) != len(self.seats):
            raise InvalidMessageError("committee names a peer or key twice")
        object.__setattr__(self, "total_wei", sum(seat.weight_wei for seat in self.seats))
        object.__setattr__(self, "_by_peer", by_peer)
        object.__setattr__(self, "_by_key", by_key)

    @classmethod
    def from_block(cls, block: CommitteeBlock) -> Committee:
        """Raises InvalidMessageError."""
        return cls(
            block.task, block.epoch, block.chain_id, block.anchor, block.seats, block.round_budget_wei
        )

    def to_block(self) -> CommitteeBlock:
        return CommitteeBlock(
            self.task, self.epoch, self.chain_id, self.anchor, self.round_budget_wei, self.seats
        )

    def cid(self) -> CID:
        """What a record's `committee` link names."""
        return self.to_block().cid()

    # --- who ---
    def seat_of(self, peer: bytes) -> int | None:
        """Seat index of a 38-byte peer id, or None for a stranger."""
        return self._by_peer.get(peer)

    def seat_of_key(self, bls_public_key: bytes) -> int | None:
        return self._by_key.get(bls_public_key)

    # --- how much ---
    def weight_of(self, seats: Iterable[int]) -> int:
        """Stake of a set of seats, each counted once."""
        return sum(self.seats[seat].weight_wei for seat in set(seats))

    def is_quorum(self, weight_wei: int) -> bool:
        """Strictly more than two thirds: two quorums share more than one third, so an honest member."""
        return 3 * weight_wei > 2 * self.total_wei

    def is_blocking(self, weight_wei: int) -> bool:
        """Strictly more than one third: at least one honest member is among them."""
        return 3 * weight_wei > self.total_wei

    def has_quorum(self, seats: Iterable[int]) -> bool:
        return self.is_quorum(self.weight_of(seats))

    def has_blocking(self, seats: Iterable[int]) -> bool:
        return self.is_blocking(self.weight_of(seats))


# --- beacon ---------------------------------------------------------------------------------------------
def compute_beacon(task: bytes, epoch: int, round_: int, parent_digest: bytes) -> bytes:
    """32-byte public seed of a round: known to all once the parent is decided, and to nobody before."""
    return shuffle.derive(
        hashlib.sha256(b"p2pflock/1/beacon\0" + task + parent_digest).digest(), "beacon", epoch, round_
    )


def compute_proposer_order(committee: Committee, beacon: bytes, cycle: int) -> tuple[int, ...]:
    """All seats in the order in which they propose, heavy ones earlier on average.

    Drawn by weight without replacement: every seat's turn comes within one cycle of len(seats) views, so many
    light faulty seats can delay a decision, never prevent it.
    """
    seed = shuffle.derive(beacon, "proposer", cycle)
    left = list(range(len(committee.seats)))
    order = []
    for turn in range(len(left)):
        weights = [committee.seats[seat].weight_wei for seat in left]
        order.append(left.pop(shuffle.weighted_index(shuffle.derive(seed, "turn", turn), weights)))
    return tuple(order)


def compute_proposer(committee: Committee, beacon: bytes, view: int) -> int:
    """Seat that may propose in a view."""
    cycle, turn = divmod(view, len(committee.seats))
    return compute_proposer_order(committee, beacon, cycle)[turn]


def compute_shards(beacon: bytes, seats: int, shards: int) -> tuple[int, ...]:
    """Shard of each seat for this round; distinct as long as there are at least as many shards as seats.

    The draw changes every round, so nobody chooses its data and every shard is seen by everyone in time.
    """
    if seats < 1 or shards < 1:
        raise LocalProtocolError("shards are drawn for at least one seat and one shard")
    order = shuffle.shuffled(shuffle.derive(beacon, "shard"), shards)
    return tuple(order[seat % shards] for seat in range(seats))


def compute_shard(beacon: bytes, seat: int, seats: int, shards: int) -> int:
    return compute_shards(beacon, seats, shards)[seat]


# --- epidemic exchange ----------------------------------------------------------------------------------
def _partner_at(position: int, step: int, size: int) -> int | None:
    """Knödel matching on positions: the left half meets the right half, shifted by 2^k - 1.

    An odd number is filled up with a hole at the end of the right side; who meets it idles.
    """
    half = (size + 1) // 2
    shift = (1 << step % (2 * half - 1).bit_length()) - 1
    side, j = divmod(position, half)
    other = half + (j + shift) % half if side == 0 else (j - shift) % half
    return other if other < size else None


@cache
def compute_hops(members: int) -> int:
    """Hops of one cycle, after which everyone has everything if all swaps succeed.

    ceil(log2 n) for an even number, the least possible; one to three more for an odd one.  Found by playing
    it through on bitmaps, so it holds by construction.
    """
    known = [1 << position for position in range(members)]
    hops = 0
    while any(have != (1 << members) - 1 for have in known):
        partners = [_partner_at(position, hops, members) for position in range(members)]
        known = [
            have if other is None else have | known[other]
            for have, other in zip(known, partners, strict=True)
        ]
        hops += 1
    return hops


def compute_partner(beacon: bytes, hop: int, members: Iterable[int], me: int) -> int | None:
    """Whom to swap with at a hop, or None to sit it out.  Symmetric: my partner's partner is me.

    Within a cycle the matchings are Knödel's: left j meets right j + 2^k - 1, so what is known doubles each
    hop.  Each further cycle draws new positions, so dead partners of one cycle are met around in the next.

    Args:
        beacon: 32 bytes, the round's.
        hop: 0, 1, …; not bounded.
        members: seats that take part, the same set for everyone; order does not matter.
        me: one of them.
    """
    seats = sorted(set(members))
    if me not in seats:
        raise LocalProtocolError("only members swap")
    if len(seats) < 2:
        return None
    cycle, step = divmod(hop, compute_hops(len(seats)))
    order = shuffle.shuffled(shuffle.derive(beacon, "swap", cycle), len(seats))
    other = _partner_at(order.index(seats.index(me)), step, len(seats))
    return None if other is None else seats[order[other]]


# --- scoring --------------------------------------------------------------------------------------------
def compute_seed_root(task: bytes, round_: int, parent: CID) -> bytes:
    """32 bytes whose BLS signature is a scorecard's `seed_proof`."""
    body = parent.to_bytes() + round_.to_bytes(8, "big")
    return signing.compute_root(signing.Domain.SCORE_SEED, task, body)


def compute_score_seed(seed_proof: bytes) -> bytes:
    """32-byte seed of the public batch.  BLS signatures are unique, so the validator could not choose it,
    and nobody else knew it before the scorecard was out."""
    return hashlib.sha256(b"p2pflock/1/score\0" + seed_proof).digest()


def compute_vote_root(committee: Committee, vote: Vote, previous_head: bytes) -> bytes:
    """32-byte digest that the vote's signature covers; the anchor contract recomputes it for precommits."""
    return signing.compute_vote_digest(
        chain_id=committee.chain_id,
        anchor=committee.anchor,
        task=vote.task,
        epoch=committee.epoch,
        round_=vote.round,
        view=vote.view,
        step=vote.step,
        record_digest=vote.record_digest,
        rewards_root=vote.rewards_root,
        previous_head=previous_head,
    )
