"""How many local steps a peer makes in its next round: H from measured step time and measured overhead.

Law: pure; times are arguments.  A round is training and overhead, and the overhead (exchange, scores, votes) does
not grow with H.  So with H steps of s seconds and o seconds of overhead, utilisation is H s / (H s + o), and

    H = clamp(ceil(o u / (1 - u) / s), least, most)

is the smallest H that reaches u.  Every peer measures about the same overhead, so fast and slow ones aim at the
same wall time with different H; the fold weighs what they made by its samples.

Waiting for others to train is not overhead.  Counted as such, two peers would chase each other: whoever waits
trains longer, and then the other one waits.  The driver measures accordingly (node/driver.py).

Medians of the last rounds: one slow exchange, or one round with a dead proposer, changes nothing.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass

WINDOW_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class PaceRule:
    """What a task says of H."""

    base: int  # until something is measured, and always where it is fixed
    least: int
    most: int
    utilisation: float  # in (0, 1)

    @property
    def is_adaptive(self) -> bool:
        return self.least < self.most


def compute_steps(rule: PaceRule, step_seconds: float, overhead_seconds: float) -> int:
    """H for a round; see the head of the file.  Both times are at least 0."""
    if step_seconds <= 0:
        return rule.most
    wanted = overhead_seconds * rule.utilisation / (1 - rule.utilisation) / step_seconds
    return max(rule.least, min(rule.most, math.ceil(min(wanted, rule.most))))


class Pace:
    """One peer's measurements over its rounds."""

    def __init__(self, rule: PaceRule) -> None:
        self._rule = rule
        self._steps: deque[float] = deque(maxlen=WINDOW_ROUNDS)
        self._overheads: deque[float] = deque(maxlen=WINDOW_ROUNDS)

    def on_trained(self, steps: int, seconds: float) -> None:
        """Local steps took this long in all."""
        self._steps.append(seconds / steps)

    def on_decided(self, overhead_seconds: float) -> None:
        """A round that we went through, and what of it was not training."""
        self._overheads.append(overhead_seconds)

    @property
    def next_steps(self) -> int:
        rule = self._rule
        if not rule.is_adaptive or not self._steps or not self._overheads:
            return rule.base
        return compute_steps(rule, statistics.median(self._steps), statistics.median(self._overheads))
