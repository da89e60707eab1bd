"""The gate: whose contributions a round leaves out, and what is remembered of each peer.

Law: pure and in integers; a function of the scorecards' lines, the stake behind them and the trust in the parent
record, so every member recomputes it before it votes and anyone can later.  It moves no money and reads no
payload: what a payload is like reaches it as the integers of scorecards.

Rule (measured in docs/design.md, "Gate")::

    s_i = stake-weighted median of the validators' cosines of contribution i
    n_i = s_i / median |s| of the round, cut to [-3, 3]    early rounds have large cosines: they must not buy credit
    E_i += (n_i - E_i) / 5 when n_i < E_i, else / 10       trust is lost fast and won back slowly
    drop i while E_i < min(median E of the round, 0)       at most half of a round can be below its median

Single-round scores of honest peers are negative a third of the time, so no single round decides.  The two rates are
for whoever works honestly for some rounds and then does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from p2pflock.errors import InvalidMessageError
from p2pflock.protocol.messages import MICRO, Score, Trust

FALL, RISE = 5, 10  # trust moves by a fifth of the way down, a tenth of the way up
LIMIT = 3  # in medians of the round; so trust is in thirds of a median, in millionths


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
    """Apply the rule to one round.  Candidates nobody scored keep the trust they had."""
    trust = {entry.peer: entry.ema_micro for entry in before}
    scores = {
        entry.peer: compute_weighted_median([(line.cosine_micro, stake) for line, stake in entry.opinions])
        for entry in candidates
        if entry.opinions
    }
    for peer, score in normalise(scores).items():
        trust[peer] = compute_trust(trust.get(peer, 0), score)
    dropped = drop({entry.seat: trust.get(entry.peer, 0) for entry in candidates})
    return Outcome(dropped, tuple(Trust(peer, trust[peer]) for peer in sorted(trust)))


def normalise(scores: Mapping[bytes, int]) -> dict[bytes, int]:
    """Scores in units of LIMIT times the round's median magnitude, in millionths, in [-MICRO, MICRO]."""
    if not scores:
        return {}
    unit = LIMIT * max(1, compute_median([abs(score) for score in scores.values()]))
    return {peer: max(-MICRO, min(MICRO, score * MICRO // unit)) for peer, score in scores.items()}


def compute_weighted_median(values: Sequence[tuple[int, int]]) -> int:
    """Lower weighted median of (value, weight > 0) pairs: the least value with half of the weight at or below."""
    total = sum(weight for _, weight in values)
    seen = 0
    for value, weight in sorted(values):
        seen += weight
        if 2 * seen >= total:
            return value
    raise InvalidMessageError("a median needs at least one value")


def compute_trust(before_micro: int, score_micro: int) -> int:
    """A part of the way from `before` to `score`, rounded towards minus infinity."""
    return before_micro + (score_micro - before_micro) // (FALL if score_micro < before_micro else RISE)


def compute_median(values: Sequence[int]) -> int:
    """The middle value, or the middle of the middle two rounded down: as in the simulations, so that of two
    contributions the worse one is below it."""
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) // 2


def drop(trust_micro: Mapping[int, int]) -> frozenset[int]:
    """Seats whose trust is below min(median, 0).  No more than half can be below a median."""
    if not trust_micro:
        return frozenset()
    bar = min(compute_median(list(trust_micro.values())), 0)
    return frozenset(seat for seat, trust in trust_micro.items() if trust < bar)
