"""What follows from the contributions and scorecards of a round: judgements, fold weights, trust, rewards.

Law: a pure function in integers; its inputs may come in any order, its outputs are sorted by seat.  Members
recompute it before they vote and anyone can later, so nothing here may depend on a float, a clock or a peer.

Whom the gate leaves out is decided in gate.py.  A validator's line about its own contribution counts for nothing.

Fold weights are sample counts, capped at twice their median.  Seats that sent the same payload share one
weight: what is sent twice is folded once.  Nothing in a round proves who was first.

Rewards: budget = what the committee block grants for a round; TRAINER_BPS of it goes to accepted contributions
by fold weight, the rest to validators whose scorecard is in the record, by how many of the others' contributions it
scored and what its opinion weighs: its stake, or in a large cohort its part of the panel (an empty card earns
nothing).  All divisions round down and the remainder stays in
escrow, so the sum never exceeds the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from p2pflock.errors import InvalidMessageError
from p2pflock.primitives import merkle
from p2pflock.primitives.cid import CID
from p2pflock.protocol import gate
from p2pflock.protocol.committee import Cohort, Committee, Panels, compute_beacon, compute_cohort
from p2pflock.protocol.messages import (
    Absentee,
    Attestation,
    Contribution,
    ContributionHeader,
    Judgement,
    Reward,
    RoundRecord,
    Score,
    Scorecard,
    Trust,
)

TRAINER_BPS = 8_000
BPS = 10_000
WEIGHT_CAP = 2  # times the median sample count: a fast machine may not own the round


class Entries(Protocol):
    """Trust by peer id and rewards by address, both ascending: a table, or what one record says."""

    @property
    def trust(self) -> tuple[Trust, ...]: ...

    @property
    def rewards(self) -> tuple[Reward, ...]: ...


@dataclass(frozen=True, slots=True)
class Tables:
    """What the records since genesis say last of each peer and account."""

    trust: tuple[Trust, ...] = ()
    rewards: tuple[Reward, ...] = ()

    def after(self, changes: Entries) -> Tables:
        """With the entries of a record, or of a settlement, in the place of older ones."""
        trust = {entry.peer: entry for entry in (*self.trust, *changes.trust)}
        rewards = {entry.address: entry for entry in (*self.rewards, *changes.rewards)}
        return Tables(
            tuple(trust[peer] for peer in sorted(trust)), tuple(rewards[address] for address in sorted(rewards))
        )


@dataclass(frozen=True, slots=True)
class Settlement:
    """Aligned with the headers sorted by place; `weights` is 0 unless accepted.

    `trust` and `rewards` are the entries that changed, `rewards_root` is that of the whole table.
    """

    judgements: tuple[Judgement, ...]
    weights: tuple[int, ...]
    trust: tuple[Trust, ...]
    rewards: tuple[Reward, ...]
    rewards_root: bytes


def settle(
    committee: Committee,
    parent: Entries,
    headers: Sequence[ContributionHeader],
    scorecards: Sequence[Scorecard],
    *,
    panels: Panels | None = None,
    rule: Callable[[Sequence[gate.Candidate], Sequence[Trust]], gate.Outcome] = gate.judge,
) -> Settlement:
    """Settle one round.

    Args:
        committee: of the round; grants the budget.
        parent: the tables after the round before.
        headers: of the contributions in the record, at most one a place of the roster.
        scorecards: in the record, at most one a validator.
        panels: who scores whom; by default every seat everybody, as in a small cohort.
        rule: the gate; another one only where rules are compared (benchmarks/attacks.py).

    Raises InvalidMessageError for strangers, duplicates, and cards that score what was not drawn for them.
    """
    panels = panels or Panels(committee, Cohort(committee, (), is_drawn=False), None)
    by_seat = _by_place(committee.index_of, [(header.peer, header) for header in headers])
    cards = _by_place(committee.seat_of, [(card.validator, card) for card in scorecards])
    seats = sorted(by_seat)
    ids = {seat: by_seat[seat].cid() for seat in seats}
    lines = {seat: _index(card) for seat, card in cards.items()}
    places = {ids[seat]: seat for seat in seats}
    if any(find_overreach(panels, scorer, cards[scorer], places) is not None for scorer in lines):
        raise InvalidMessageError("a scorecard scores a contribution that was not drawn for it")
    opinions = {seat: _opinions(panels, lines, seat, ids[seat]) for seat in seats}
    candidates = [
        gate.Candidate(seat, by_seat[seat].peer, [line for line in opinions[seat] if line[0].is_valid])
        for seat in seats
        if not _is_refused(opinions[seat])
    ]
    gated = rule(candidates, parent.trust)
    weights = _weigh({entry.seat: by_seat[entry.seat] for entry in candidates if entry.seat not in gated.dropped})
    work = {
        scorer: sum(
            panels.weight_of(scorer, places[cid]) for cid in scored if cid in places and places[cid] != scorer
        )
        for scorer, scored in lines.items()
    }
    rewards = _reward(committee, parent, weights, work)
    return Settlement(
        judgements=tuple(
            Judgement.ACCEPTED if seat in weights else Judgement.GATED if seat in gated.dropped else Judgement.INVALID
            for seat in seats
        ),
        weights=tuple(weights.get(seat, 0) for seat in seats),
        trust=_find_changed(parent.trust, gated.trust),
        rewards=_find_changed(parent.rewards, rewards),
        rewards_root=compute_rewards_root(committee.task, rewards),
    )


T = TypeVar("T")


def _by_place(find: Callable[[bytes], int | None], entries: Sequence[tuple[bytes, T]]) -> dict[int, T]:
    found: dict[int, T] = {}
    for peer, entry in entries:
        seat = find(peer)
        if seat is None or seat in found:
            raise InvalidMessageError("a stranger, or a member twice")
        found[seat] = entry
    return found


E = TypeVar("E", Trust, Reward)


def _find_changed(before: Sequence[E], after: Sequence[E]) -> tuple[E, ...]:
    known = set(before)
    return tuple(entry for entry in after if entry not in known)


def _index(card: Scorecard) -> dict[CID, Score]:
    """A card's first line about each contribution."""
    return {score.contribution: score for score in reversed(card.scores)}


def find_overreach(panels: Panels, scorer: int, card: Scorecard, places: Mapping[CID, int]) -> int | None:
    """A place whose contribution the card scores though it was not drawn for it: a record with both is refused.

    Attack: a validator that scores whom it likes, beside those it was drawn for."""
    if panels.drawn is None:
        return None
    named = (places[line.contribution] for line in card.scores if line.contribution in places)
    return next((place for place in named if panels.weight_of(scorer, place) == 0), None)


def _opinions(
    panels: Panels, lines: Mapping[int, Mapping[CID, Score]], author: int, contribution: CID
) -> list[tuple[Score, int]]:
    """(score, weight) of every validator but the author that scored it, unless they are too few of a panel."""
    found = [
        (scored[contribution], panels.weight_of(scorer, author))
        for scorer, scored in lines.items()
        if scorer != author and contribution in scored
    ]
    return found if panels.is_enough(sum(weight for _, weight in found)) else []


def _is_refused(opinions: Sequence[tuple[Score, int]]) -> bool:
    """More than half of those that looked at it, by weight, say it is no payload."""
    against = sum(weight for score, weight in opinions if not score.is_valid)
    return 2 * against > sum(weight for _, weight in opinions)


def _weigh(accepted: Mapping[int, ContributionHeader]) -> dict[int, int]:
    """Fold weights by seat: samples, capped at twice the median; equal payloads share the greatest of theirs,
    so that a copier cannot make its victim light by claiming few.

    A share is at least 1, since every accepted contribution has a weight.
    """
    if not accepted:
        return {}
    cap = WEIGHT_CAP * gate.compute_median([header.samples for header in accepted.values()])
    copies: dict[CID, list[int]] = {}
    for header in accepted.values():
        copies.setdefault(header.payload, []).append(min(header.samples, cap))
    return {
        seat: max(1, max(copies[header.payload]) // len(copies[header.payload]))
        for seat, header in accepted.items()
    }


def _reward(
    committee: Committee, parent: Entries, weights: Mapping[int, int], work: Mapping[int, int]
) -> tuple[Reward, ...]:
    """Cumulative rewards by address; `work` is what a validator's opinions on others' contributions weigh."""
    earned = {reward.address: reward.cumulative_wei for reward in parent.rewards}
    trainers_wei = committee.round_budget_wei * TRAINER_BPS // BPS
    validators_wei = committee.round_budget_wei - trainers_wei
    for pot_wei, shares in ((trainers_wei, weights), (validators_wei, work)):
        total = sum(shares.values())
        for seat, share in shares.items():
            due_wei = pot_wei * share // total if total else 0
            if due_wei:
                address = committee.at(seat).address
                earned[address] = earned.get(address, 0) + due_wei
    return tuple(Reward(address, earned[address]) for address in sorted(earned))


def compute_rewards_root(task: bytes, rewards: Sequence[Reward]) -> bytes:
    """32-byte Merkle root that the rewards contract checks claims against; zero when nobody earned anything."""
    return merkle.root([merkle.leaf_hash(task, r.address, r.cumulative_wei) for r in rewards])


def compute_genesis(committee: Committee, model_hash: bytes, weights: CID) -> RoundRecord:
    """Round 0: the same for everyone who opens the same spec with the same committee; nobody signs it."""
    return RoundRecord(
        task=committee.task,
        epoch=committee.epoch,
        round=0,
        parent=None,
        parent_attestation=None,
        committee=committee.cid(),
        contributions=(),
        absent=(),
        scorecards=(),
        trust=(),
        model_hash=model_hash,
        weights=weights,
        rewards=(),
        rewards_root=bytes(32),
    )


def compute_record(
    *,
    parent: RoundRecord,
    parent_attestation: Attestation | None,
    committee: Committee,
    headers: Sequence[ContributionHeader],
    absent: Sequence[Absentee],
    scorecards: Sequence[Scorecard],
    settled: Settlement,
    model_hash: bytes,
    weights: CID,
) -> RoundRecord:
    """The one record that these inputs give.  `settled` is what `settle` made of the same inputs.

    Raises InvalidMessageError when the members of the cohort are not each named once.
    """
    by_seat = _by_place(committee.index_of, [(header.peer, header) for header in headers])
    cards = _by_place(committee.seat_of, [(card.validator, card) for card in scorecards])
    named = sorted([*by_seat, *(entry.seat for entry in absent)])
    parent_cid = parent.cid()
    beacon = compute_beacon(committee.task, committee.epoch, parent.round + 1, parent_cid.digest)
    if named != list(compute_cohort(committee, beacon).members):
        raise InvalidMessageError("contributions and absences must name each seat once, or each of the cohort")
    return RoundRecord(
        task=parent.task,
        epoch=committee.epoch,
        round=parent.round + 1,
        parent=parent_cid,
        parent_attestation=parent_attestation,
        committee=committee.cid(),
        contributions=tuple(
            Contribution(seat, by_seat[seat].cid(), int(judgement), weight)
            for seat, judgement, weight in zip(
                sorted(by_seat), settled.judgements, settled.weights, strict=True
            )
        ),
        absent=tuple(sorted(absent, key=lambda entry: entry.seat)),
        scorecards=tuple(cards[seat].cid() for seat in sorted(cards)),
        trust=settled.trust,
        model_hash=model_hash,
        weights=weights,
        rewards=settled.rewards,
        rewards_root=settled.rewards_root,
    )
