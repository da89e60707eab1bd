"""The gate: whose contributions a round leaves out, and what is remembered of each peer.

Law: pure and in integers; a function of the scorecards' lines, the stake behind them and the trust in the parent
record, so every member recomputes it before it votes and anyone can later.  It moves no money and reads no
payload: what a payload is like reaches it as the integers of scorecards.

Rule (measured in docs/design.md, "Gate"), d = 0.98 a round::

    s_i = stake-weighted median of the validators' cosines of contribution i, cut to [-3 m, 3 m]
    m   = median |s| of the round                     what is usual: large in early rounds, small in late ones
    earned_i = d earned_i + s_i;  usual_i = d usual_i + m     over the rounds in which i was scored
    ratio_i  = earned_i / usual_i                     about 1 for honest work, 0 for noise, -1 for flipped signs
    recent_i = (recent_i + s_i / 3m) / 2
    drop i   when ratio_i < median ratio / 4 (or below the median itself, where that is negative)
             or   recent_i < min(median recent, 0) - 0.2
             at most half of a round: those with the least ratios

Single-round scores of honest peers are negative a third of the time, so no single round decides.  Rounds in which
scores are large say more, and weigh more, in the long memory; the ratio makes who came late comparable with who was
there from the start.  The short memory is for whoever works honestly at first and then does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from p2pflock.errors import InvalidMessageError
from p2pflock.protocol.messages import MICRO, Score, Trust

DECAY = 50  # a fiftieth of the long memory is forgotten in a round
LIMIT = 3  # usual scores: no single one counts for more
BAR = 4  # a contribution needs a quarter of the median ratio
SLUMP_MICRO = 200_000  # in thirds of the usual: 0.6 of it below zero, over the last two or three rounds


@dataclass(frozen=True, slots=True)
class Candidate:
    """A contribution that decodes, and what validators other than its author say of it."""

    seat: int
    peer: bytes
    opinions: Sequence[tuple[Score, int]]  # (a line that calls it valid, stake > 0)


@dataclass(frozen=True, slots=True)
class Outcome:
    dropped: frozenset[int]  # seats
    trust: tuple[Trust, ...]  # by peer id: of the candidates, and of everybody who had some before


def judge(candidates: Sequence[Candidate], before: Sequence[Trust]) -> Outcome:
    """Apply the rule to one round.

    Candidates nobody scored keep the trust they had; without any they pass, since nothing speaks against them.
    """
    trust = {entry.peer: entry for entry in before}
    scores = {
        entry.peer: compute_weighted_median([(line.cosine_micro, stake) for line, stake in entry.opinions])
        for entry in candidates
        if entry.opinions
    }
    usual = max(1, compute_median([abs(score) for score in scores.values()])) if scores else 1
    for peer, score in scores.items():
        trust[peer] = remember(trust.get(peer) or Trust(peer, 0, 0, 0), score, usual)
    known = {entry.seat: trust[entry.peer] for entry in candidates if entry.peer in trust}
    return Outcome(drop(known, len(candidates)), tuple(trust[peer] for peer in sorted(trust)))


def remember(before: Trust, score_micro: int, usual_micro: int) -> Trust:
    """One peer's trust after a round in which `usual_micro` > 0 was the median magnitude of scores."""
    score = max(-LIMIT * usual_micro, min(LIMIT * usual_micro, score_micro))
    earned = before.earned_micro - before.earned_micro // DECAY + score
    usual = before.usual_micro - before.usual_micro // DECAY + usual_micro
    recent = (before.recent_micro + score * MICRO // (LIMIT * usual_micro)) // 2
    return Trust(before.peer, earned, usual, recent)


def compute_ratio(trust: Trust) -> int:
    """Earned over usual, in millionths, rounded towards minus infinity."""
    return trust.earned_micro * MICRO // trust.usual_micro if trust.usual_micro else 0


def drop(trust: Mapping[int, Trust], candidates: int) -> frozenset[int]:
    """Seats to leave out, at most half of `candidates`."""
    if not trust:
        return frozenset()
    ratios = {seat: compute_ratio(entry) for seat, entry in trust.items()}
    median = compute_median(list(ratios.values()))
    bar = median // BAR if median > 0 else median
    slump = min(compute_median([entry.recent_micro for entry in trust.values()]), 0) - SLUMP_MICRO
    weak = [seat for seat in trust if ratios[seat] < bar or trust[seat].recent_micro < slump]
    return frozenset(sorted(weak, key=lambda seat: (ratios[seat], seat))[: candidates // 2])


def compute_weighted_median(values: Sequence[tuple[int, int]]) -> int:
    """Of (value, weight > 0) pairs: the middle of the lower and the upper weighted median, rounded down.

    They differ where the weight splits in two halves.  Attack: with four honest opinions and two liars the lower one
    alone is the worst honest opinion of whom the liars slander, round after round."""
    total = sum(weight for _, weight in values)
    lower, seen = None, 0
    for value, weight in sorted(values):
        seen += weight
        if lower is None and 2 * seen >= total:
            lower = value
        if lower is not None and 2 * seen > total:
            return (lower + value) // 2
    raise InvalidMessageError("a median needs at least one value")


def compute_median(values: Sequence[int]) -> int:
    """The middle value, or the middle of the middle two rounded down: as in the simulations, so that of two
    contributions the worse one is below it."""
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) // 2
