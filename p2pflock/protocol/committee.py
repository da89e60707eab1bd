"""The committee of an epoch, and everything that a beacon draws from it.

Law: pure functions of the snapshot and of 32-byte seeds: who is a member, what weighs enough, who contributes,
proposes, trains on which shard, scores whom and swaps with whom.  All weighing is integer arithmetic: "more than two thirds" is
3 w > 2 W, so rounding can never make a quorum.  Whether a snapshot is the chain's is not decided here.

The roster is the seats, which vote, and behind them the trainers, which do not.  Everybody on it is named by its
place: `seat_of` where a vote is meant, `index_of` where a contribution is.

Known limit: the beacon of a round is a hash of the decided parent, so the proposer of the parent, who chooses
which contributions it holds, has some influence on it.  It draws schedules with it, never money or the
public batch (that comes from unique signatures, compute_score_seed).

Sources: Knödel, "New gossips and telephones", Discrete Mathematics 13 (1975), for compute_partner;
Efraimidis & Spirakis (2006) for weighted sampling without replacement; Madow (1949) for systematic sampling (Panels).
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate

from p2pflock.errors import InvalidMessageError, LocalProtocolError
from p2pflock.primitives import shuffle, signing
from p2pflock.primitives.cid import CID
from p2pflock.protocol.messages import (
    DEFAULT_COHORT,
    MAX_COHORT,
    MAX_MEMBERS,
    MAX_TRAINERS,
    CommitteeBlock,
    Seat,
    Trainer,
    Vote,
)

SMALL_COHORT = 16  # up to here every validator scores every contribution
OPINIONS = 25  # on each contribution of a larger one; odd, so that half of them is no majority


@dataclass(frozen=True, slots=True)
class Committee:
    """The stake-weighted seats of one epoch, in snapshot order, and the trainers beside them.

    Raises InvalidMessageError when there is no seat, a seat has no weight, or two of the roster share a peer or a
    BLS key (a shared key would let one signature count twice).
    """

    task: bytes
    epoch: int
    chain_id: int  # 0: a static committee without a chain
    anchor: bytes  # 20 bytes, zero without a chain
    seats: tuple[Seat, ...]
    round_budget_wei: int = 0  # what settlement may give out for one round
    trainers: tuple[Trainer, ...] = ()
    cohort: int = DEFAULT_COHORT  # contributors of one round, drawn when the roster has more
    total_wei: int = field(init=False)
    _by_peer: dict[bytes, int] = field(init=False, repr=False, compare=False, hash=False)
    _by_key: dict[bytes, int] = field(init=False, repr=False, compare=False, hash=False)
    _roster: tuple[Seat | Trainer, ...] = field(init=False, repr=False, compare=False, hash=False)
    _block: bytes | None = field(init=False, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        if not 0 < len(self.seats) <= MAX_MEMBERS:
            raise InvalidMessageError(f"committee of {len(self.seats)} seats, expected 1..{MAX_MEMBERS}")
        if any(seat.weight_wei <= 0 for seat in self.seats):
            raise InvalidMessageError("committee seat without weight")
        if len(self.trainers) > MAX_TRAINERS or not 0 < self.cohort <= MAX_COHORT:
            raise InvalidMessageError(f"more than {MAX_TRAINERS} trainers, or no cohort of 1..{MAX_COHORT}")
        roster: tuple[Seat | Trainer, ...] = (*self.seats, *self.trainers)
        by_peer = {entry.peer: index for index, entry in enumerate(roster)}
        by_key = {entry.bls_public_key: index for index, entry in enumerate(roster)}
        if len(by_peer) != len(roster) or len(by_key) != len(roster):
            raise InvalidMessageError("committee names a peer or key twice")
        object.__setattr__(self, "total_wei", sum(seat.weight_wei for seat in self.seats))
        object.__setattr__(self, "_by_peer", by_peer)
        object.__setattr__(self, "_by_key", by_key)
        object.__setattr__(self, "_roster", roster)
        object.__setattr__(self, "_block", None)

    @classmethod
    def from_block(cls, block: CommitteeBlock) -> Committee:
        """Raises InvalidMessageError."""
        return cls(
            block.task,
            block.epoch,
            block.chain_id,
            block.anchor,
            block.seats,
            block.round_budget_wei,
            block.trainers,
            block.cohort,
        )

    def to_block(self) -> CommitteeBlock:
        return CommitteeBlock(
            self.task,
            self.epoch,
            self.chain_id,
            self.anchor,
            self.round_budget_wei,
            self.seats,
            self.trainers,
            self.cohort,
        )

    def encode(self) -> bytes:
        """The committee block's bytes; made once, since every round names them."""
        if self._block is None:
            object.__setattr__(self, "_block", self.to_block().encode())
        assert self._block is not None
        return self._block

    def cid(self) -> CID:
        """What a record's `committee` link names."""
        return CID.of_dag_cbor(self.encode())

    # --- who ---
    @property
    def roster_size(self) -> int:
        return len(self._roster)

    def index_of(self, peer: bytes) -> int | None:
        """Place in the roster of a 38-byte peer id, or None for a stranger."""
        return self._by_peer.get(peer)

    def seat_of(self, peer: bytes) -> int | None:
        """Seat of a 38-byte peer id, or None for who has no vote."""
        index = self._by_peer.get(peer)
        return index if index is not None and index < len(self.seats) else None

    def seat_of_key(self, bls_public_key: bytes) -> int | None:
        index = self._by_key.get(bls_public_key)
        return index if index is not None and index < len(self.seats) else None

    def at(self, index: int) -> Seat | Trainer:
        """Who has this place in the roster."""
        return self._roster[index]

    # --- how much ---
    def weight_of(self, places: Iterable[int]) -> int:
        """Stake of a set of places, each counted once; trainers weigh nothing."""
        return sum(self.seats[place].weight_wei for place in set(places) if place < len(self.seats))

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

    def has_minimum(self, seats: Iterable[int]) -> bool:
        """Of votes and scorecards there is no less than a quorum (see Cohort)."""
        return self.has_quorum(seats)


# --- cohort ---------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Cohort:
    """Who may contribute in one round, and how many of them make a round.

    Where it is the whole committee a quorum is one of stake, as for votes.  Where it was drawn, its members may
    have no stake, so heads are counted; and since trainers promise nothing, a round whose cohort stays away may
    close with fewer (collection.Waiting), down to a single one.
    """

    committee: Committee
    members: tuple[int, ...]  # places in the roster, ascending
    is_drawn: bool

    def has_quorum(self, places: Iterable[int]) -> bool:
        if not self.is_drawn:
            return self.committee.has_quorum(places)
        return 3 * len(set(places).intersection(self.members)) > 2 * len(self.members)

    def has_minimum(self, places: Iterable[int]) -> bool:
        """The least that a record may hold, however long the others stayed away."""
        return not set(places).isdisjoint(self.members) if self.is_drawn else self.has_quorum(places)

    def compute_shards(self, beacon: bytes) -> dict[int, int]:
        """Shard of each member: all of them are drawn, none twice."""
        size = len(self.members)
        return dict(zip(self.members, compute_shards(beacon, size, size), strict=True))


def compute_cohort(committee: Committee, beacon: bytes) -> Cohort:
    """Everybody on the roster, or, where there are more than `committee.cohort`, as many drawn by the beacon.

    Drawn without replacement and without regard to stake: what a trainer brings is its data, and a share of the
    rounds by stake is what the committee is for.
    """
    size = committee.roster_size
    if size <= committee.cohort:
        return Cohort(committee, tuple(range(size)), is_drawn=bool(committee.trainers))
    drawn = shuffle.draw(shuffle.derive(beacon, "cohort"), size, committee.cohort)
    return Cohort(committee, tuple(sorted(drawn)), is_drawn=True)


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
@dataclass(frozen=True, slots=True)
class Panels:
    """Who scores which contribution of a round, and what its opinion weighs.

    In a small cohort everybody scores everything, and an opinion weighs its author's stake.  In a larger one the
    cost of that grows with committee times cohort, so each contribution has a panel of OPINIONS opinions, which
    the seats hold by their stake: a seat with a tenth of it holds two or three, most hold one or none.
    """

    committee: Committee
    cohort: Cohort
    drawn: Mapping[int, Mapping[int, int]] | None  # place -> seat -> opinions; None: everybody scores everything

    def weight_of(self, seat: int, place: int) -> int:
        """Of what a seat says of the contribution at a place of the roster; 0 when it was not drawn for it."""
        if self.drawn is None:
            return self.committee.seats[seat].weight_wei
        return self.drawn.get(place, {}).get(seat, 0)

    def count(self, seat: int) -> int:
        """How many contributions the seat may score at most."""
        if self.drawn is None:
            return len(self.cohort.members)
        return sum(seat in panel for panel in self.drawn.values())

    def is_enough(self, weight: int) -> bool:
        """Whether opinions of this weight together make a score.

        Attack: a proposer leaves out a third of the cards, and with them all but two members of one panel."""
        return weight > 0 if self.drawn is None else 2 * weight > OPINIONS


def compute_panels(committee: Committee, cohort: Cohort, beacon: bytes) -> Panels:
    """Draw the panels of a round: the same number of opinions on each contribution, none of them its author's.

    Systematic sampling, for each contribution anew: the other seats stand on a line in drawn order, each as long as
    its stake, and the opinions are points at equal distances on it.  So a seat's number of opinions is its share of
    them, rounded up or down, and one stake split into many seats gains nothing.

    Opinions follow stake and are then counted alike.  Seats drawn as heads would let a third of the stake, on one
    seat among light ones, own every panel it is on.
    """
    size = len(committee.seats)
    if len(cohort.members) <= SMALL_COHORT or size <= OPINIONS + 1:
        return Panels(committee, cohort, None)
    drawn: dict[int, Mapping[int, int]] = {}
    for place in cohort.members:
        seed = shuffle.derive(beacon, "panel", place)
        line = [seat for seat in shuffle.shuffled(seed, size) if seat != place]
        ends = list(accumulate(committee.seats[seat].weight_wei for seat in line))
        first = int.from_bytes(shuffle.derive(seed, "start"), "big") * ends[-1] >> 256  # uniform on the line
        points = ((first + number * ends[-1] // OPINIONS) % ends[-1] for number in range(OPINIONS))
        drawn[place] = Counter(line[bisect_right(ends, point)] for point in points)
    return Panels(committee, cohort, drawn)


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
