"""What one member has gathered in a round, and when it may stop waiting.

Law: pure bookkeeping over verified messages.  It decides *when* collection closes, never *who is right*:
the record does that.  Quorum semantics instead of fixed time-outs: nothing closes below a quorum, everything
closes at once when nobody who is known to be alive is missing, and in between a grace window runs that is a
multiple of what this round has taken so far (research: adaptive deadlines end the split-swarm stalls).

Attack: a peer sends two different headers for one slot to different halves.  The first is kept, the second
is evidence, and the seat is out of the round for everyone who saw both.  Attack: it goes on to sign a thousand
more; one pair is proof enough, the rest is not kept.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from p2pflock.primitives.cid import CID
from p2pflock.protocol.committee import Committee
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


class Added(enum.Enum):
    NEW = "new"
    DUPLICATE = "duplicate"  # nothing that was not known
    EQUIVOCATION = "equivocation"  # the first proof against this seat


class Waiting:
    """Closes over a set of seats: at once when all expected are in, after the grace once a quorum is."""

    def __init__(self, committee: Committee, pacing: Pacing, started: float) -> None:
        self._committee = committee
        self._pacing = pacing
        self._started = started
        self.deadline: float | None = None

    def is_over(self, ready: frozenset[int], expected: frozenset[int], now: float) -> bool:
        if not self._committee.has_quorum(ready):
            self.deadline = None
            return False
        if expected <= ready:
            return True
        if self.deadline is None:
            self.deadline = now + self._pacing.compute_grace_seconds(now - self._started)
        return now >= self.deadline


class Collection:
    """Headers, payloads and scorecards of one round by seat."""

    def __init__(self, committee: Committee) -> None:
        self._committee = committee
        self._headers: dict[int, ContributionHeader] = {}
        self._equivocated: dict[int, tuple[ContributionHeader, ContributionHeader]] = {}
        self._payloads: set[CID] = set()
        self._cards: dict[int, Scorecard] = {}

    def add_header(self, header: ContributionHeader) -> Added:
        seat = self._committee.seat_of(header.peer)
        if seat is None:
            raise ValueError("header of a stranger must not pass validation")
        known = self._headers.get(seat)
        if known is None:
            self._headers[seat] = header
            return Added.NEW
        if known == header or seat in self._equivocated:
            return Added.DUPLICATE
        self._equivocated[seat] = (known, header)
        return Added.EQUIVOCATION

    def add_payload(self, payload: CID) -> None:
        self._payloads.add(payload)

    def add_scorecard(self, card: Scorecard) -> None:
        """The first card of a validator counts; validation refused strangers."""
        seat = self._committee.seat_of(card.validator)
        if seat is not None:
            self._cards.setdefault(seat, card)

    def holds(self, message: ContributionHeader | Scorecard) -> bool:
        """Whether this is the first header or scorecard of its author, the one that is kept."""
        if isinstance(message, ContributionHeader):
            seat = self._committee.seat_of(message.peer)
            return seat is not None and self._headers.get(seat) == message
        seat = self._committee.seat_of(message.validator)
        return seat is not None and self._cards.get(seat) == message

    @property
    def headers(self) -> dict[int, ContributionHeader]:
        """Seat -> header of everyone who has not equivocated."""
        return {s: h for s, h in sorted(self._headers.items()) if s not in self._equivocated}

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
        for seat in range(len(self._committee.seats)):
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
