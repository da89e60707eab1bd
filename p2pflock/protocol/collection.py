"""What one member has gathered in a round, and when it may stop waiting.

Law: pure bookkeeping over verified messages.  It decides *when* collection closes, never *who is right*:
the record does that.  Quorum semantics instead of fixed time-outs: nothing closes below a quorum, everything
closes at once when nobody who is known to be alive is missing, and in between a grace window runs that is a
multiple of what this round has taken so far (research: adaptive deadlines end the split-swarm stalls).  A drawn
cohort that stays away cannot hold up the round: long after its first payload it closes with whoever is there.

Attack: a peer sends two different headers for one slot to different halves.  The first is kept, the second
is evidence, and the seat is out of the round for everyone who saw both.  Attack: it goes on to sign a thousand
more; one pair is proof enough, the rest is not kept.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from p2pflock.primitives.cid import CID
from p2pflock.protocol.committee import Cohort, Committee
from p2pflock.protocol.messages import Absence, Absentee, ContributionHeader, Scorecard


@dataclass(frozen=True, slots=True)
class Pacing:
    """How long a quorum waits for the rest.

    grace = clamp(elapsed * grace_share, minimum, maximum), where elapsed runs from the start of the round
    to the moment a quorum was complete.
    """

    grace_share: float = 1.0  # a peer half as fast as the quorum is still counted
    minimum_grace_seconds: float = 2.0
    maximum_grace_seconds: float = 60.0

    def compute_grace_seconds(self, elapsed_seconds: float) -> float:
        return min(
            self.maximum_grace_seconds, max(self.minimum_grace_seconds, elapsed_seconds * self.grace_share)
        )

    def compute_overdue_seconds(self, elapsed_seconds: float) -> float:
        """How long after the first payload a cohort is given up that is no quorum yet: who is a third as fast as
        the first one is waited for.  `elapsed_seconds` runs from the start of the round to that payload."""
        return max(self.maximum_grace_seconds, 2 * elapsed_seconds)


class Added(enum.Enum):
    NEW = "new"
    DUPLICATE = "duplicate"  # nothing that was not known
    EQUIVOCATION = "equivocation"  # the first proof against this seat


class Group(Protocol):
    """Over whom somebody waits: the committee or a cohort."""

    def has_quorum(self, places: Iterable[int], /) -> bool: ...

    def has_minimum(self, places: Iterable[int], /) -> bool: ...


class Waiting:
    """Closes over a set of seats: at once when all expected are in, after the grace once a quorum is.

    Attributes:
        is_short: it closed below a quorum, because the group stayed away too long.
    """

    def __init__(self, group: Group, pacing: Pacing, started: float) -> None:
        self._group = group
        self._pacing = pacing
        self._started = started
        self._first: float | None = None
        self.deadline: float | None = None
        self.is_short = False

    def is_over(self, ready: frozenset[int], expected: frozenset[int], now: float) -> bool:
        if self._first is None and self._group.has_minimum(ready):
            self._first = now
        if not self._group.has_quorum(ready):
            self.deadline = None
            self.is_short = self._is_overdue(ready, now)
            return self.is_short
        self.is_short = False
        if expected <= ready:
            return True
        if self.deadline is None:
            self.deadline = now + self._pacing.compute_grace_seconds(now - self._started)
        return now >= self.deadline

    def _is_overdue(self, ready: frozenset[int], now: float) -> bool:
        if self._first is None or not self._group.has_minimum(ready):
            return False
        return now >= self._first + self._pacing.compute_overdue_seconds(self._first - self._started)


class Collection:
    """Headers, payloads and scorecards of one round by place in the roster.

    Args:
        cohort: who contributes; by default every seat.

    Attributes:
        is_short: the cohort stayed away, so that a record may hold less than a quorum of it.
    """

    def __init__(self, committee: Committee, cohort: Cohort | None = None) -> None:
        self._committee = committee
        self._cohort = cohort or Cohort(committee, tuple(range(len(committee.seats))), is_drawn=False)
        self.is_short = False
        self._headers: dict[int, ContributionHeader] = {}
        self._equivocated: dict[int, tuple[ContributionHeader, ContributionHeader]] = {}
        self._sorted: dict[int, ContributionHeader] | None = None
        self._payloads: set[CID] = set()
        self._cards: dict[int, Scorecard] = {}

    def add_header(self, header: ContributionHeader) -> Added:
        seat = self._committee.index_of(header.peer)
        if seat is None:
            raise ValueError("header of a stranger must not pass validation")
        known = self._headers.get(seat)
        if known is None:
            self._headers[seat], self._sorted = header, None
            return Added.NEW
        if known == header or seat in self._equivocated:
            return Added.DUPLICATE
        self._equivocated[seat], self._sorted = (known, header), None
        return Added.EQUIVOCATION

    def add_payload(self, payload: CID) -> None:
        self._payloads.add(payload)

    @property
    def cohort(self) -> Cohort:
        return self._cohort

    def is_enough(self, places: Iterable[int]) -> bool:
        """Whether a record may hold the contributions of just these, as seen from here."""
        return self._cohort.has_quorum(places) or (self.is_short and self._cohort.has_minimum(places))

    def add_scorecard(self, card: Scorecard) -> None:
        """The first card of a validator counts; validation refused strangers."""
        seat = self._committee.seat_of(card.validator)
        if seat is not None:
            self._cards.setdefault(seat, card)

    def holds(self, message: ContributionHeader | Scorecard) -> bool:
        """Whether this is the first header or scorecard of its author, the one that is kept."""
        if isinstance(message, ContributionHeader):
            seat = self._committee.index_of(message.peer)
            return seat is not None and self._headers.get(seat) == message
        seat = self._committee.seat_of(message.validator)
        return seat is not None and self._cards.get(seat) == message

    @property
    def headers(self) -> dict[int, ContributionHeader]:
        """Seat -> header of everyone who has not equivocated, by seat; asked for at every message."""
        if self._sorted is None:
            self._sorted = {s: h for s, h in sorted(self._headers.items()) if s not in self._equivocated}
        return self._sorted

    @property
    def out(self) -> frozenset[int]:
        """Seats that have equivocated: nobody waits for them."""
        return frozenset(self._equivocated)

    @property
    def scorecards(self) -> dict[int, Scorecard]:
        return dict(sorted(self._cards.items()))

    @property
    def evidence(self) -> tuple[tuple[ContributionHeader, ContributionHeader], ...]:
        return tuple(self._equivocated.values())

    def ready(self) -> frozenset[int]:
        """Seats whose header and payload are both here."""
        return frozenset(seat for seat, header in self.headers.items() if header.payload in self._payloads)

    def missing_payloads(self) -> dict[int, ContributionHeader]:
        return {s: h for s, h in self.headers.items() if h.payload not in self._payloads}

    def absentees(self, included: frozenset[int], invalid: frozenset[int]) -> tuple[Absentee, ...]:
        """Everyone not included, with the reason as seen from here, by seat."""
        absent = []
        for seat in self._cohort.members:
            if seat in included:
                continue
            if seat in self._equivocated:
                reason = Absence.EQUIVOCATED
            elif seat in invalid:
                reason = Absence.INVALID
            elif seat in self._headers:
                reason = Absence.UNDELIVERED
            else:
                reason = Absence.SILENT
            absent.append(Absentee(seat, int(reason)))
        return tuple(absent)
