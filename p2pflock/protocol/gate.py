"""The gate: whose contributions a round leaves out, and what is remembered of each peer.

Law: pure and in integers; a function of the scorecards' lines, the stake behind them and the trust in the parent
record, so every member recomputes it before it votes and anyone can later.  It moves no money and reads no
payload: what a payload is like reaches it as the integers of scorecards.

Rule (docs/design.md): a contribution's score is the stake-weighted median of the validators' cosines to a public
gradient, trust is its running mean, and a contribution is dropped while its peer's trust is negative and below
the median trust of the round (which at most half of them can be).  Single-round scores of honest peers are
negative a quarter of the time: the running mean is essential.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from p2pflock.errors import InvalidMessageError
from p2pflock.protocol.messages import Score, Trust

MEMORY_TENTHS = 7  # E = 0.7 E + 0.3 s


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
    trust = {entry.peer: entry for entry in before}
    for candidate in candidates:
        if candidate.opinions:
            score = compute_weighted_median([(line.cosine_micro, stake) for line, stake in candidate.opinions])
            known = trust.get(candidate.peer)
            ema_micro = compute_trust(known.ema_micro if known else 0, score)
            trust[candidate.peer] = Trust(candidate.peer, ema_micro)
    dropped = _drop({entry.seat: _ema(trust, entry.peer) for entry in candidates})
    return Outcome(dropped, tuple(trust[peer] for peer in sorted(trust)))


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
    """0.7 E + 0.3 s in millionths, rounded towards minus infinity."""
    return (MEMORY_TENTHS * before_micro + (10 - MEMORY_TENTHS) * score_micro) // 10


def compute_median(values: Sequence[int]) -> int:
    """The middle value, or the middle of the middle two rounded down: as in the simulations, so that of two
    contributions the worse one is below it."""
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) // 2


def _ema(trust: Mapping[bytes, Trust], peer: bytes) -> int:
    return trust[peer].ema_micro if peer in trust else 0


def _drop(trust_micro: Mapping[int, int]) -> frozenset[int]:
    """Seats whose trust is below min(median, 0).  No more than half can be below a median."""
    if not trust_micro:
        return frozenset()
    bar = min(compute_median(list(trust_micro.values())), 0)
    return frozenset(seat for seat, trust in trust_micro.items() if trust < bar)
