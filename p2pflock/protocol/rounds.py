"""One round as one member lives it: train, collect, score, decide.  A state machine without I/O.

Law: inputs are verified messages, answers of the driver and the time; outputs are frozen effects, in the order
in which they must happen.  Who may speak is decided in validation.py, what follows from the contributions in
settlement.py, which record wins in consensus.py.  This file only decides what to do next.

    phase        leaves when
    COLLECTING   payloads of everybody expected are here, or of a quorum and the grace is over
    SCORING      our scorecard and those of the collected seats are here, or of a quorum and the grace is over
    DECIDING     consensus decides

A member that is still training when a quorum of the others has delivered finishes at once and contributes the
steps it made, within the grace that begins then.  Whoever does not make it even so stops, and takes part in the
vote without a contribution of its own: holding up three peers for one slow one is what adaptive deadlines are against.
With `is_dense` nothing is scored: SCORING is the time in which the group averages, and ends with on_averaged.
Whoever has no seat collects, contributes when it is drawn, and follows the votes; its SCORING is empty.
Votes of more than a third of the stake move us to DECIDING at once, because an honest member found a quorum;
we go on collecting beside it, since a later proposer may need our scorecard.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from p2pflock.primitives.cid import CID
from p2pflock.protocol import ballots
from p2pflock.protocol.collection import Added, Collection, Pacing, Waiting
from p2pflock.protocol.committee import Cohort, Committee, Panels
from p2pflock.protocol.consensus import Consensus
from p2pflock.protocol.messages import Absentee, ContributionHeader, Proposal, Scorecard, Vote
from p2pflock.protocol.settlement import find_overreach


class Phase(enum.Enum):
    COLLECTING = "collecting"
    SCORING = "scoring"
    DECIDING = "deciding"
    DECIDED = "decided"


# --- effects ----------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Train:
    """Start the local steps; answer with on_contribution, or with nothing when it was stopped."""


@dataclass(frozen=True, slots=True)
class FinishTraining:
    """The others are done: contribute what there is after the step at hand."""


@dataclass(frozen=True, slots=True)
class StopTraining:
    """The round goes on without our contribution."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """A header names a payload we lack; answer with on_payload when it is here."""

    seat: int
    header: ContributionHeader


@dataclass(frozen=True, slots=True)
class ScoreContributions:
    """Score these payloads; answer with on_scorecard for our own card."""

    headers: tuple[ContributionHeader, ...]


@dataclass(frozen=True, slots=True)
class Probe:
    """Find out which of these late payloads decode; answer with on_probed."""

    headers: tuple[ContributionHeader, ...]


@dataclass(frozen=True, slots=True)
class BuildCandidate:
    """It is our turn to propose: settle, fold, and answer with on_candidate."""

    view: int
    headers: tuple[ContributionHeader, ...]
    scorecards: tuple[Scorecard, ...]
    absent: tuple[Absentee, ...]


@dataclass(frozen=True, slots=True)
class FoldAhead:
    """Somebody else is about to propose, most likely this: fold it beside the proposer, not after it."""

    headers: tuple[ContributionHeader, ...]
    scorecards: tuple[Scorecard, ...]


@dataclass(frozen=True, slots=True)
class HeaderEquivocation:
    """Evidence: two headers of one seat for this round."""

    first: ContributionHeader
    second: ContributionHeader


Effect = (
    Train
    | FinishTraining
    | StopTraining
    | Fetch
    | ScoreContributions
    | Probe
    | BuildCandidate
    | FoldAhead
    | HeaderEquivocation
    | ballots.Effect
)


class Round:
    """One member's state in one round.

    Args:
        committee: seats of the epoch.
        seat: our own place in the roster.
        machine: consensus on this round, already restored from saved votes where there are any.
        pacing: grace windows.
        is_dense: the group averages instead of exchanging and scoring payloads.
        cohort: who contributes; by default every seat.
        panels: who scores whom; by default every seat everybody.
    """

    def __init__(
        self,
        committee: Committee,
        seat: int,
        machine: Consensus,
        pacing: Pacing,
        *,
        is_dense: bool = False,
        cohort: Cohort | None = None,
        panels: Panels | None = None,
    ) -> None:
        self._committee = committee
        self._seat = seat
        self._machine = machine
        self._pacing = pacing
        self.collection = Collection(committee, cohort)
        self._cohort = self.collection.cohort
        self._panels = panels or Panels(committee, self._cohort, None)
        self._is_voter = seat < len(committee.seats)
        self._is_closed = False
        self.phase = Phase.COLLECTING
        self._expected: frozenset[int] = frozenset()
        self._collected: frozenset[int] = frozenset()
        self._invalid: frozenset[int] = frozenset()  # known not to decode
        self._sound: frozenset[int] = frozenset()  # known to decode
        self._probing: frozenset[int] = frozenset()
        self._voters: frozenset[int] = frozenset()
        self._payloads: Waiting | None = None
        self._cards: Waiting | None = None
        self._is_training = False
        self._is_finishing = False
        self._is_dense = is_dense
        self._is_averaged = False
        self._built: tuple[frozenset[int], frozenset[int]] | None = None
        self._machine_started = False

    # --- inputs ---
    def start(self, now: float, *, is_training: bool) -> tuple[Effect, ...]:
        """`is_training` is False when our contribution of this round was already saved before a restart."""
        self._payloads = Waiting(self._cohort, self._pacing, now)
        self._is_training = is_training and self._seat in self._cohort.members
        effects: tuple[Effect, ...] = (Train(),) if self._is_training else ()
        if not self._is_voter:  # it decides nothing, so it may follow the votes from the beginning
            self._machine_started = True
            effects += self._vote(self._machine.start(now))
        return effects

    def on_presence(self, live: Iterable[int], now: float) -> tuple[Effect, ...]:
        """Seats that were heard of lately; only they are worth waiting for beyond a quorum."""
        self._expected = frozenset(live) | {self._seat}
        self._machine.on_presence(self._expected)
        return self._advance(now)

    def on_contribution(self, header: ContributionHeader, now: float) -> tuple[Effect, ...]:
        """Our own, signed and saved."""
        self._is_training = False
        self.collection.add_header(header)
        self.collection.add_payload(header.payload)
        return self._advance(now)

    def on_header(self, header: ContributionHeader, now: float) -> tuple[Effect, ...]:
        added = self.collection.add_header(header)
        seat = self._committee.index_of(header.peer)
        if added is Added.EQUIVOCATION and self.collection.evidence:
            first, second = self.collection.evidence[-1]
            return (HeaderEquivocation(first, second), *self._advance(now))
        if added is not Added.NEW or seat is None:
            return ()
        return (Fetch(seat, header), *self._advance(now))

    def on_payload(self, payload: CID, now: float) -> tuple[Effect, ...]:
        self.collection.add_payload(payload)
        return self._advance(now)

    def on_undecodable(self, seats: Iterable[int], now: float) -> tuple[Effect, ...]:
        """Payloads that our own scoring found to be no payloads."""
        self._invalid |= frozenset(seats)
        return self._advance(now)

    def on_averaged(self, seats: Iterable[int], now: float) -> tuple[Effect, ...]:
        """Dense mode: the mean over exactly these seats is here."""
        self._collected = frozenset(seats)
        self._is_averaged = True
        return self._advance(now)

    def on_scorecard(self, card: Scorecard, now: float) -> tuple[Effect, ...]:
        self.collection.add_scorecard(card)
        effects: tuple[Effect, ...] = ()
        if self._committee.seat_of(card.validator) == self._seat:
            self._sound |= frozenset(filter(self.is_to_score, self._collected)) - self._invalid
            if self._machine.get_proposer(self._machine.view) == self._seat:  # it looks at the others' while it waits
                effects = self._probe(tuple(sorted(self._collected - self._sound - self._invalid)))
        return effects + self._advance(now)

    def on_probed(self, sound: Iterable[int], invalid: Iterable[int], now: float) -> tuple[Effect, ...]:
        """The answer to `Probe`."""
        self._sound |= frozenset(sound)
        self._probing = frozenset()
        return self.on_undecodable(invalid, now)

    def on_candidate(self, record: bytes, now: float) -> tuple[Effect, ...]:
        return self._vote(self._machine.offer(record, now))

    def on_candidate_failed(self) -> None:
        """Something it needs is gone: ask again when it is our turn again."""
        self._built = None

    def on_proposal(self, proposal: Proposal, now: float) -> tuple[Effect, ...]:
        """Kept until we decide ourselves.

        Attack: a proposer that proposes anything at once, so that everybody stops training."""
        return self._vote(self._machine.on_proposal(proposal, now))

    def on_checked(self, digest: bytes, is_valid: bool, now: float) -> tuple[Effect, ...]:  # noqa: FBT001
        return self._vote(self._machine.on_checked(digest, is_valid, now))

    def on_vote(self, vote: Vote, now: float) -> tuple[Effect, ...]:
        """More than a third of the stake votes: an honest member found a quorum, so we go on without more."""
        effects = self._vote(self._machine.on_vote(vote, now))
        seat = self._committee.seat_of(vote.validator)
        if seat is not None and seat != self._seat:
            self._voters |= {seat}
        if self._committee.has_blocking(self._voters):
            effects += self._begin_deciding(now)
        return effects

    def on_tick(self, now: float) -> tuple[Effect, ...]:
        effects = self._advance(now)
        if self._machine_started and (self.phase is Phase.DECIDING or not self._is_voter):
            effects += self._vote(self._machine.on_tick(now))
        return effects

    def resend(self) -> tuple[ballots.Message, ...]:
        """What to send again now and then, since gossip may lose messages."""
        return self._machine.resend() if self._machine_started and self._is_voter else ()

    def is_to_score(self, place: int) -> bool:
        """Whether the contribution at this place of the roster was drawn for us."""
        return self._is_voter and self._panels.weight_of(self._seat, place) > 0

    # --- what next ---
    def _advance(self, now: float) -> tuple[Effect, ...]:
        effects: tuple[Effect, ...] = ()
        if self._is_collecting() and self._payloads is not None:
            ready = self.collection.ready()
            expected = self._expected.intersection(self._cohort.members)
            expected -= self.collection.out
            if self._payloads.is_over(ready, expected, now):
                self._collected = ready
                self.collection.is_short = self._payloads.is_short
                if not self._is_voter:
                    self._is_closed, self.phase = True, Phase.DECIDING
                    return self._stop_training()
                if self.phase is Phase.COLLECTING:
                    self.phase = Phase.SCORING
                self._cards = Waiting(self._committee, self._pacing, now)
                effects += self._stop_training()
                headers = self.collection.headers
                effects += (ScoreContributions(tuple(headers[seat] for seat in sorted(ready))),)
            elif self._cohort.has_quorum(ready):  # the grace runs
                effects += self._finish_training()
        if self.phase is Phase.SCORING and (self._is_averaged or self._is_scored(now)):
            effects += self._begin_deciding(now) + self._fold_ahead()
        if self.phase is Phase.DECIDING:
            effects += self._propose_if_due()
        return effects

    def _is_collecting(self) -> bool:
        """Still, when others had us decide early: a proposer may need our scorecard later."""
        is_late = self.phase is Phase.DECIDING and self._cards is None and not self._is_dense
        return (self.phase is Phase.COLLECTING or is_late) and not self._is_closed

    def _is_scored(self, now: float) -> bool:
        assert self._cards is not None
        scored = frozenset(self.collection.scorecards)
        waited = (self._expected if self._cohort.is_drawn else self._expected & self._collected) | {self._seat}
        waited = frozenset(seat for seat in waited if seat < len(self._committee.seats))
        return self._seat in scored and self._cards.is_over(scored, waited, now)

    def _finish_training(self) -> tuple[Effect, ...]:
        if not self._is_training or self._is_finishing:
            return ()
        self._is_finishing = True
        return (FinishTraining(),)

    def _stop_training(self) -> tuple[Effect, ...]:
        if not self._is_training:
            return ()
        self._is_training = False
        return (StopTraining(),)

    def _begin_deciding(self, now: float) -> tuple[Effect, ...]:
        stop = self._stop_training()
        if self._machine_started:
            return stop
        self._machine_started = True
        self.phase = Phase.DECIDING
        return stop + self._vote(self._machine.start(now))

    def _fold_ahead(self) -> tuple[Effect, ...]:
        included = self._get_proposable()
        if self._is_dense or self._machine.get_proposer(self._machine.view) == self._seat or not included <= self._sound:
            return ()
        headers = self.collection.headers
        return (
            FoldAhead(
                tuple(headers[seat] for seat in sorted(included)),
                tuple(self._get_proposable_cards(included).values()),
            ),
        )

    def _propose_if_due(self) -> tuple[Effect, ...]:
        """Ask for a candidate when it is our turn and there is a quorum to propose; once per content."""
        view = self._machine.view
        if self._machine.get_proposer(view) != self._seat:
            return ()
        included = self._get_proposable()
        if unknown := () if self._is_dense else tuple(sorted(included - self._sound)):
            return self._probe(unknown)
        content = (included, frozenset(self.collection.scorecards))
        if content == self._built or not self.collection.is_enough(included):
            return ()
        cards = self._get_proposable_cards(included)
        if not (self._is_averaged if self._is_dense else self._committee.has_quorum(cards)):
            return ()
        self._built = content
        headers = self.collection.headers
        return (
            BuildCandidate(
                view,
                tuple(headers[seat] for seat in sorted(included)),
                tuple(cards.values()),
                self.collection.absentees(included, self._invalid),
            ),
        )

    def _get_proposable(self) -> frozenset[int]:
        """What we scored, or, when too much of that turned out to be no payload, whatever is here by now.

        Attack: contributions that do not decode make up a part of the first quorum."""
        headers = self.collection.headers.keys()
        scored = (self._collected & headers) - self._invalid
        if self._is_dense or self.collection.is_enough(scored):
            return scored
        return self.collection.ready() - self._invalid

    def _get_proposable_cards(self, included: frozenset[int]) -> dict[int, Scorecard]:
        """Whoever scored what was not drawn for it is left out: with its card the record would be refused."""
        headers = self.collection.headers
        places = {headers[place].cid(): place for place in included}
        return {
            seat: card
            for seat, card in self.collection.scorecards.items()
            if find_overreach(self._panels, seat, card, places) is None
        }

    def _probe(self, seats: tuple[int, ...]) -> tuple[Effect, ...]:
        if self._probing or not seats:
            return ()
        self._probing = frozenset(seats)
        headers = self.collection.headers
        return (Probe(tuple(headers[seat] for seat in seats)),)

    def _vote(self, effects: Iterable[ballots.Effect]) -> tuple[Effect, ...]:
        result: tuple[Effect, ...] = tuple(effects)
        if any(isinstance(effect, ballots.Decided) for effect in result):
            self.phase = Phase.DECIDED
        elif self.phase is Phase.DECIDING:
            result += self._propose_if_due()
        return result
