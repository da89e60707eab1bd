"""How long to wait before moving on, learnt from how long things took.

Law: pure values; durations come in, durations go out.  Safety never depends on them, only speed does: too
short costs a view, too long costs idle time.

Sources: RFC 6298 (SRTT, RTTVAR, back-off); Tendermint's requirement that time-outs grow with the view, so
that after enough views they exceed whatever the network really takes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class AdaptiveTimeout:
    """Exponentially weighted mean plus four deviations, doubled for every view that failed.

    Args:
        initial_seconds: base before anything was measured.
        minimum_seconds, maximum_seconds: bounds of whatever comes out.
        mean_seconds, deviation_seconds: state; None before the first observation.
    """

    initial_seconds: float
    minimum_seconds: float
    maximum_seconds: float
    mean_seconds: float | None = None
    deviation_seconds: float = 0.0

    def observe(self, seconds: float) -> AdaptiveTimeout:
        """The timeout after one more measured duration."""
        seconds = min(max(seconds, 0.0), self.maximum_seconds)
        if self.mean_seconds is None:
            return replace(self, mean_seconds=seconds, deviation_seconds=seconds / 2)
        deviation = 0.75 * self.deviation_seconds + 0.25 * abs(seconds - self.mean_seconds)
        return replace(
            self, mean_seconds=0.875 * self.mean_seconds + 0.125 * seconds, deviation_seconds=deviation
        )

    def compute_seconds(self, view: int = 0) -> float:
        """How long to wait in a view."""
        base = (
            self.initial_seconds
            if self.mean_seconds is None
            else self.mean_seconds + 4 * self.deviation_seconds
        )
        base = max(base, self.minimum_seconds)
        return min(base * 2.0 ** min(view, 64), self.maximum_seconds)

    def compute_least_seconds(self, view: int = 0) -> float:
        """The same for whom we have reason not to wait for."""
        return min(self.minimum_seconds * 2.0 ** min(view, 64), self.compute_seconds(view))


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Both waits of a view.  Carried from round to round by the driver."""

    propose: AdaptiveTimeout  # from the start of a view to its proposal, recomputed and checked
    vote: AdaptiveTimeout  # from a quorum of any votes to a quorum for one value

    @classmethod
    def create(cls, *, propose_seconds: float = 10.0, vote_seconds: float = 2.0) -> Timeouts:
        """Starting values for a network nothing is known of."""
        return cls(
            AdaptiveTimeout(propose_seconds, propose_seconds / 5, 300.0),
            AdaptiveTimeout(vote_seconds, vote_seconds / 5, 60.0),
        )
