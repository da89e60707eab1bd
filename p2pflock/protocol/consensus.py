"""Agreement on one round's record: Tendermint, one instance per member and round, without I/O.

Law: whatever the network does, two honest members never decide differently while less than one third of the
stake is faulty; once messages arrive in time again, all of them decide.  The machine takes *verified*
messages (validation.py has checked signatures, membership, task and round) and the passing of time, and
returns effects, in order, for a driver to carry out.  It signs nothing, sends nothing, reads no clock, and
does not know what makes a record right: that is the answer to `Check`.

The driver's part, on which safety rests:

* `CastVote`, `CastProposal`: sign, write to disk, only then send, then feed the signed message back through
  `on_vote` or `on_proposal`.  `Save`: on disk before the effects that follow it.
* After a crash, `restore` with everything that was written for this round.  A vote that was written is never
  contradicted; a vote that was not written was not sent.
* While undecided or while others may be, send `resend()` every now and then (it includes other members'
  messages: a faulty member may have sent its votes to us alone, and those who have moved on must show why).

Source: Buchman, Kwon, Milosevic, "The latest gossip on BFT consensus", arXiv 1807.04938, algorithm 1; the
comments cite its lines.  The paper's "round" is our view, its "height" our round.  Departures:

* timeoutPropose is shorter, though it grows as well, where the proposer is known to be away.
* valid(v) is asynchronous: rules that need it wait for `on_checked`, and time out as if no proposal had come.
* Line 49 decides without an own check: a precommit quorum contains an honest member that made it.
* The paper assumes that what one correct member receives all do.  Here `resend` gives that, and a member's
  second, different vote counts once more than a third of the stake backs its value; else the first stands.
  So at most three votes of a slot are kept, and an equivocator cannot split who sees a quorum for ever.
"""

from __future__ import annotations

from collections.abc import Iterable

from p2pflock.errors import LocalProtocolError
from p2pflock.protocol.ballots import (
    NIL_VALUE,
    CastProposal,
    CastVote,
    Check,
    Decided,
    Effect,
    Equivocation,
    Message,
    Polka,
    Save,
    Tally,
    Value,
    View,
    WakeAt,
    compute_value,
    get_value,
)
from p2pflock.protocol.committee import Committee, compute_proposer_order
from p2pflock.protocol.messages import Proposal, Step, Vote
from p2pflock.protocol.timeouts import Timeouts

WINDOW = 32  # views before and after the current one whose messages are kept
_PROPOSE = -1  # the step before Step.PREVOTE


class Consensus:
    """One member's (or, with `me` None, an onlooker's) part in the decision of one round.

    Args:
        committee: of the round's epoch.
        round_: number of the round.
        me: own seat, or None to follow without voting.
        beacon: 32-byte seed of the proposer order.
        timeouts: starting values; what this round taught is in `.timeouts` afterwards.
    """

    def __init__(
        self, committee: Committee, round_: int, me: int | None, beacon: bytes, timeouts: Timeouts
    ) -> None:
        self.committee = committee
        self.round = round_
        self.me = me
        self.timeouts = timeouts
        self.decision: Decided | None = None
        self._beacon = beacon
        self._orders: dict[int, tuple[int, ...]] = {}
        self._running = False
        self._view = 0
        self._step: int = _PROPOSE
        self._views: dict[int, View] = {}
        self._far: dict[int, Vote] = {}  # seat -> its highest vote beyond the window
        self._highest: dict[int, int] = {}  # seat -> highest view it was seen in
        self._locked: tuple[int, Value] | None = None  # paper: lockedRound, lockedValue
        self._valid: Polka | None = None
        self._candidate: tuple[bytes, Value] | None = None
        self._proposed_view = -1
        self._checked: dict[bytes, bool] = {}
        self._checking: set[bytes] = set()
        self._timers: dict[int, float] = {}  # step -> deadline, current view only
        self._present: frozenset[int] | None = None  # None: nothing is known of who is there
        self._accused: set[tuple[int, int]] = set()  # seat and step: one evidence each is enough
        self._justification: tuple[Message, ...] = ()  # why we may be in this view
        self._last_cast: dict[Step, Vote] = {}  # own latest vote of each step, for resend
        self._cast: dict[tuple[int, Step], Value] = {}  # the guard against contradicting ourselves
        self._out: list[Effect] = []

    @classmethod
    def restore(
        cls,
        committee: Committee,
        round_: int,
        me: int | None,
        beacon: bytes,
        timeouts: Timeouts,
        saved: Iterable[Message],
    ) -> Consensus:
        """The machine as it must be after a crash; `saved` is every message that was written for this round,
        own and others', in any order."""
        machine = cls(committee, round_, me, beacon, timeouts)
        machine._recall([message for message in saved if message.round == round_])
        return machine

    # --- inputs -----------------------------------------------------------------------------------------
    def start(self, now: float) -> tuple[Effect, ...]:
        """Begin, or go on after `restore`.  Messages may be fed before."""
        if self._running:
            raise LocalProtocolError("consensus was started twice")
        self._running = True
        self._enter(self._view, now, self._step)
        return self._run(now)

    def offer(self, record: bytes, now: float) -> tuple[Effect, ...]:
        """Our own candidate (again, if a better one replaces it): proposed when it is our turn."""
        value = compute_value(record)
        if value is None:
            raise LocalProtocolError("offered bytes are not a round record")
        self._candidate = (record, value)
        self._checked[value.digest] = True
        return self._run(now)

    def on_proposal(self, proposal: Proposal, now: float) -> tuple[Effect, ...]:
        seat = self.committee.seat_of(proposal.proposer)
        if proposal.round != self.round or seat is None or not self._is_kept(proposal.view):
            return ()
        if seat != self.get_proposer(proposal.view):
            return ()
        self._take_proposal(proposal, seat)
        return self._run(now)

    def on_checked(self, digest: bytes, is_valid: bool, now: float) -> tuple[Effect, ...]:  # noqa: FBT001
        """The driver's answer to `Check`."""
        if digest in self._checking:
            self._checking.discard(digest)
            self._checked[digest] = is_valid
            self._observe_check(digest, now)
        return self._run(now)

    def on_vote(self, vote: Vote, now: float) -> tuple[Effect, ...]:
        seat = self.committee.seat_of(vote.validator)
        if vote.round != self.round or seat is None:
            return ()
        self._take_vote(vote, seat, now)
        return self._run(now)

    def on_presence(self, seats: Iterable[int]) -> None:
        """Who was heard of lately, ourselves included: a proposer that is not there gets the least timeout.

        It still doubles with the view, so that a network in which everybody seems gone decides in the end."""
        self._present = frozenset(seats)

    def on_tick(self, now: float) -> tuple[Effect, ...]:
        """Time has passed."""
        if self._running and self.decision is None:
            self._hurry()
            view = self._view
            for step, deadline in list(self._timers.items()):
                if now >= deadline and view == self._view:
                    self._time_out(step, now)
        return self._run(now)

    # --- questions --------------------------------------------------------------------------------------
    @property
    def view(self) -> int:
        return self._view

    def get_proposer(self, view: int) -> int:
        """Seat whose turn a view is."""
        cycle, turn = divmod(view, len(self.committee.seats))
        if cycle not in self._orders:
            if len(self._orders) >= 4:  # a peer names views at will: recompute rather than grow
                self._orders.clear()
            self._orders[cycle] = compute_proposer_order(self.committee, self._beacon, cycle)
        return self._orders[cycle][turn]

    def is_wanted(self, message: Proposal | Vote) -> bool:
        """Whether more than a third of the stake voted for what it stands for: then it counts, even as the second one
        of its slot."""
        if isinstance(message, Vote):
            return self._is_supported(message.view, message.step, get_value(message))
        return self._is_supported_anywhere(compute_value(message.record))

    def _is_supported(self, view: int, step: int, value: Value) -> bool:
        entry = self._views.get(view)
        return entry is not None and self.committee.is_blocking(entry.tallies[step].wei.get(value, 0))

    def _is_supported_anywhere(self, value: Value | None) -> bool:
        return value is not None and any(self._is_supported(v, step, value) for v in self._views for step in Step)

    def resend(self) -> tuple[Message, ...]:
        """What others may have missed and need to follow us; O(members) messages, all signed by their
        authors."""
        if self.decision is not None:
            value = Value(self.decision.digest, self.decision.rewards_root)
            entry = self._views[self.decision.view]
            proposal = entry.by_value.get(value) or self._proposals_of(value)[0]
            return (proposal, *self.decision.precommits)
        messages: dict[Message, None] = dict.fromkeys(self._justification)
        if self._valid is not None:
            messages.update(dict.fromkeys((self._valid.proposal, *self._valid.prevotes)))
        messages.update(dict.fromkeys(self._last_cast.values()))
        if self._view in self._views:
            messages.update(dict.fromkeys(self._views[self._view].messages()))
        return tuple(messages)

    # --- taking messages in -----------------------------------------------------------------------------
    def _is_kept(self, view: int) -> bool:
        if abs(view - self._view) <= WINDOW:
            return True
        # Line 28 asks for the prevotes of any earlier view that the current proposal names.
        entry = self._views.get(self._view)
        return entry is not None and entry.proposal is not None and entry.proposal.valid_view == view

    def _take_proposal(self, proposal: Proposal, seat: int) -> None:
        if not self._is_kept(proposal.view):
            return
        self._highest[seat] = max(self._highest.get(seat, -1), proposal.view)
        entry = self._views.setdefault(proposal.view, View())
        if entry.proposal == proposal:
            return
        value = compute_value(proposal.record)
        if entry.proposal is None:
            entry.proposal, entry.value = proposal, value
            if value is not None:
                entry.by_value[value] = proposal
            return
        if (value, proposal.valid_view) != (entry.value, entry.proposal.valid_view):
            self._accuse(seat, _PROPOSE, entry.proposal, proposal)
        if value is not None and self._is_supported_anywhere(value):
            entry.by_value.setdefault(value, proposal)

    def _take_vote(self, vote: Vote, seat: int, now: float | None) -> None:
        self._highest[seat] = max(self._highest.get(seat, -1), vote.view)
        if not self._is_kept(vote.view):
            if vote.view > self._view and (seat not in self._far or self._far[seat].view < vote.view):
                self._far[seat] = vote  # enough to follow line 55 from however far behind
            return
        tally = self._views.setdefault(vote.view, View()).tallies[vote.step]
        first = tally.first.get(seat)
        if tally.add(vote, seat, self.committee):
            if seat == self.me:
                self._recall_own(vote)
            seconds = None if now is None else tally.time(get_value(vote), self.committee, now)
            if seconds is not None:
                self.timeouts = Timeouts(self.timeouts.propose, self.timeouts.vote.observe(seconds))
        if first is not None and get_value(first) != get_value(vote):
            self._accuse(seat, vote.step, first, vote)

    def _accuse(self, seat: int, step: int, first: Message, second: Message) -> None:
        if (seat, step) not in self._accused:
            self._accused.add((seat, step))
            self._out.append(Equivocation(first, second))

    def _recall_own(self, vote: Vote) -> None:
        """An own vote came in: just cast, read back from disk, or, after the disk was lost, heard from
        others.  In each case it binds."""
        step, value = Step(vote.step), get_value(vote)
        self._cast.setdefault((vote.view, step), value)
        if step not in self._last_cast or self._last_cast[step].view < vote.view:
            self._last_cast[step] = vote
        is_lock = step is Step.PRECOMMIT and value != NIL_VALUE
        if is_lock and (self._locked is None or self._locked[0] < vote.view):
            self._locked = (vote.view, value)

    # --- the rules --------------------------------------------------------------------------------------
    def _run(self, now: float) -> tuple[Effect, ...]:
        """Apply rules until none applies; give out what they ask for."""
        while self._running and self.decision is None and self._apply_one(now):
            pass
        out, self._out = tuple(self._out), []
        return out

    def _apply_one(self, now: float) -> bool:
        """The first rule whose condition holds, if any."""
        return (
            self._decide()
            or self._skip_ahead(now)
            or self._propose()
            or self._check()
            or self._prevote_for_proposal(now)
            or self._follow_polka(now)
            or self._precommit_nil(now)
            or self._await_votes(now)
        )

    def _decide(self) -> bool:
        """Line 49: a proposal of any view with a precommit quorum of that view."""
        for view, entry in self._views.items():
            precommits = entry.tallies[Step.PRECOMMIT]
            for value, weight in precommits.wei.items():
                if value == NIL_VALUE or not self.committee.is_quorum(weight):
                    continue
                proposals = self._proposals_of(value)
                if not proposals:
                    continue
                votes = precommits.votes[value]
                self.decision = Decided(
                    record=proposals[0].record,
                    digest=value.digest,
                    rewards_root=value.rewards_root,
                    view=view,
                    precommits=tuple(votes[seat] for seat in sorted(votes)),
                    own_check=self._checked.get(value.digest),
                )
                self._out.append(self.decision)
                self._timers.clear()
                return True
        return False

    def _proposals_of(self, value: Value) -> list[Proposal]:
        found = [entry.by_value[value] for entry in self._views.values() if value in entry.by_value]
        if self._valid is not None and self._valid.value == value:
            found.append(self._valid.proposal)
        return found

    def _skip_ahead(self, now: float) -> bool:
        """Line 55: more than a third of the stake is in later views, so an honest member is."""
        weight = 0
        for view, seat in sorted(((v, s) for s, v in self._highest.items() if v > self._view), reverse=True):
            weight += self.committee.seats[seat].weight_wei
            if self.committee.is_blocking(weight):
                shown = [self._show(other) for other, seen in self._highest.items() if seen >= view]
                self._justify(tuple(message for message in shown if message is not None))
                self._enter(view, now)
                return True
        return False

    def _show(self, seat: int) -> Message | None:
        """A message of this seat from the highest view it was seen in."""
        if seat in self._far and self._far[seat].view == self._highest[seat]:
            return self._far[seat]
        entry = self._views.get(self._highest[seat])
        if entry is None:
            return None
        for tally in entry.tallies:
            if seat in tally.first:
                return tally.first[seat]
        return entry.proposal

    def _propose(self) -> bool:
        """Lines 14-19: on our turn, the valid value if there is one, else our candidate."""
        if self._step != _PROPOSE or self._proposed_view >= self._view:
            return False
        if self.me is None or self.get_proposer(self._view) != self.me:
            return False
        if self._valid is not None:
            self._out.append(CastProposal(self._view, self._valid.view, self._valid.proposal.record))
        elif self._candidate is not None:
            self._out.append(CastProposal(self._view, -1, self._candidate[0]))
        else:
            return False
        self._proposed_view = self._view
        return True

    def _check(self) -> bool:
        entry = self._views.get(self._view)
        if entry is None:
            return False
        for value, proposal in entry.by_value.items():
            if value.digest not in self._checked and value.digest not in self._checking:
                self._checking.add(value.digest)
                self._out.append(Check(proposal, value.digest))
                return True
        return False

    def _prevote_for_proposal(self, now: float) -> bool:
        """Lines 22-33."""
        entry = self._views.get(self._view)
        if self._step != _PROPOSE or entry is None or entry.proposal is None:
            return False
        value, valid_view = entry.value, entry.proposal.valid_view
        if value is None or valid_view >= self._view:  # broken record; a quorum from the future
            return self._vote(Step.PREVOTE, NIL_VALUE, now)
        if value.digest not in self._checked:
            return False
        if valid_view >= 0 and not self._has_polka(valid_view, value):  # line 28
            return False
        is_good = self._checked[value.digest] and self._may_prevote(value, valid_view)
        return self._vote(Step.PREVOTE, value if is_good else NIL_VALUE, now)

    def _may_prevote(self, value: Value, valid_view: int) -> bool:
        """The lock: lines 23 and 29.  Without it two records could both be decided."""
        return self._locked is None or self._locked[1] == value or self._locked[0] <= valid_view

    def _has_polka(self, view: int, value: Value) -> bool:
        if self._valid is not None and (self._valid.view, self._valid.value) == (view, value):
            return True
        entry = self._views.get(view)
        return entry is not None and self.committee.is_quorum(entry.tallies[Step.PREVOTE].wei.get(value, 0))

    def _follow_polka(self, now: float) -> bool:
        """Lines 36-43: a prevote quorum for a proposal of this view: lock, precommit, remember as valid."""
        entry = self._views.get(self._view)
        if self._step < Step.PREVOTE or entry is None:
            return False
        for value, proposal in entry.by_value.items():
            if not self._checked.get(value.digest) or not self._has_polka(self._view, value):
                continue
            is_new = self._valid is None or self._valid.view < self._view
            if is_new:
                prevotes = tuple(entry.tallies[Step.PREVOTE].votes[value].values())
                self._valid = Polka(self._view, value, proposal, prevotes)
                self._out.append(Save((proposal, *prevotes)))
            if self._step == Step.PREVOTE:
                self._locked = (self._view, value)
                return self._vote(Step.PRECOMMIT, value, now)
            return is_new
        return False

    def _precommit_nil(self, now: float) -> bool:
        """Lines 44-46."""
        if self._step != Step.PREVOTE or not self._has_polka(self._view, NIL_VALUE):
            return False
        return self._vote(Step.PRECOMMIT, NIL_VALUE, now)

    def _await_votes(self, now: float) -> bool:
        """Lines 34 and 47: a quorum has voted, not all alike: give the others a little longer."""
        entry = self._views.get(self._view)
        if entry is None:
            return False
        for step in Step:
            ready = self._step == Step.PREVOTE if step is Step.PREVOTE else True
            if ready and step not in self._timers and self.committee.is_quorum(entry.tallies[step].voted_wei):
                self._set_timer(step, now + self.timeouts.vote.compute_seconds(self._view))
                return True
        return False

    # --- moving -----------------------------------------------------------------------------------------
    def _enter(self, view: int, now: float, step: int = _PROPOSE) -> None:
        """Line 11: begin a view (or go on in one, after a crash)."""
        self._view, self._step = view, step
        self._timers.clear()
        for kept in [v for v in self._views if abs(v - view) > WINDOW]:
            del self._views[kept]
        self._cast = {slot: value for slot, value in self._cast.items() if slot[0] >= view}
        self._accused.clear()
        entry = self._views.setdefault(view, View())
        entry.started = now
        for seat, vote in list(self._far.items()):
            if vote.view <= view + WINDOW:
                del self._far[seat]
                self._take_vote(vote, seat, None)
        digests = {value.digest for known in self._views.values() for value in known.by_value}
        digests |= {value.digest for value in self._held_values()}
        self._checked = {digest: good for digest, good in self._checked.items() if digest in digests}
        self._checking &= digests
        if step == _PROPOSE:
            self._set_timer(_PROPOSE, now + self.timeouts.propose.compute_seconds(view))

    def _justify(self, messages: tuple[Message, ...]) -> None:
        self._justification = messages
        self._out.append(Save(messages))

    def _held_values(self) -> list[Value]:
        held = []
        if self._valid is not None:
            held.append(self._valid.value)
        if self._candidate is not None:
            held.append(self._candidate[1])
        return held

    def _hurry(self) -> None:
        """The proposer of this view is gone and left no proposal: do not wait for what it takes others."""
        entry = self._views[self._view]
        if self._step != _PROPOSE or entry.proposal is not None or entry.started is None or self._present is None:
            return
        if self.get_proposer(self._view) not in self._present:
            least = entry.started + self.timeouts.propose.compute_least_seconds(self._view)
            self._timers[_PROPOSE] = min(self._timers[_PROPOSE], least)

    def _set_timer(self, step: int, deadline: float) -> None:
        self._timers[step] = deadline
        self._out.append(WakeAt(deadline))

    def _time_out(self, step: int, now: float) -> None:
        """Lines 57-67."""
        if step == _PROPOSE and self._step == _PROPOSE:
            self._vote(Step.PREVOTE, NIL_VALUE, now)
        elif step == Step.PREVOTE and self._step == Step.PREVOTE:
            self._vote(Step.PRECOMMIT, NIL_VALUE, now)
        elif step == Step.PRECOMMIT:
            # Those left behind need what let us go on: this view's precommits, whoever sent them.
            self._justify(self._views[self._view].tallies[Step.PRECOMMIT].all())
            self._enter(self._view + 1, now)
            return
        self._timers[step] = float("inf")  # once per view

    def _vote(self, step: Step, value: Value, now: float) -> bool:
        self._step = step
        if self.me is None or (self._view, step) in self._cast:  # never two votes for one slot
            return True
        self._cast[self._view, step] = value
        self._out.append(CastVote(self._view, step, value.digest, value.rewards_root))
        return True

    def _observe_check(self, digest: bytes, now: float) -> None:
        """How long a proposal took from the start of its view to a verdict, however late it was."""
        for entry in self._views.values():
            if entry.started is not None and entry.value is not None and entry.value.digest == digest:
                seconds = now - entry.started
                self.timeouts = Timeouts(self.timeouts.propose.observe(seconds), self.timeouts.vote)
                return

    # --- after a crash ----------------------------------------------------------------------------------
    def _recall(self, saved: list[Message]) -> None:
        """Rebuild votes, lock and valid value from what was written before it was sent."""
        own = [m for m in saved if self.me is not None and self.committee.seat_of(_author(m)) == self.me]
        for message in own:
            if isinstance(message, Proposal):
                self._proposed_view = max(self._proposed_view, message.view)
                self._checked_own(message)
            step = _PROPOSE if isinstance(message, Proposal) else message.step
            self._view, self._step = max((self._view, self._step), (message.view, step))
        self._valid = self._recall_polka(saved)
        if self._valid is not None:
            self._checked[self._valid.value.digest] = True  # only what had been checked was saved
        for message in own:
            if isinstance(message, Vote):
                if self._cast.get((message.view, Step(message.step)), get_value(message)) != get_value(message):
                    raise LocalProtocolError("the vote book contradicts itself")
                self._recall_own(message)
        self._justification = tuple(m for m in saved if m.view >= self._view - 1)
        for message in saved:
            seat = self.committee.seat_of(_author(message))
            if seat is None:
                continue
            if isinstance(message, Vote):
                self._take_vote(message, seat, None)
            else:
                self._take_proposal(message, seat)
        self._out.clear()

    def _checked_own(self, proposal: Proposal) -> None:
        value = compute_value(proposal.record)
        if value is not None:
            self._checked[value.digest] = True

    def _recall_polka(self, saved: list[Message]) -> Polka | None:
        tallies: dict[int, Tally] = {}
        for message in saved:
            seat = self.committee.seat_of(_author(message))
            if isinstance(message, Vote) and message.step == Step.PREVOTE and seat is not None:
                tallies.setdefault(message.view, Tally()).add(message, seat, self.committee)
        proposals = {
            (message.view, compute_value(message.record)): message
            for message in saved
            if isinstance(message, Proposal)
        }
        for view in sorted(tallies, reverse=True):
            for value, weight in tallies[view].wei.items():
                if self.committee.is_quorum(weight) and (view, value) in proposals:
                    prevotes = tuple(tallies[view].votes[value].values())
                    return Polka(view, value, proposals[view, value], prevotes)
        return None


def _author(message: Message) -> bytes:
    return message.proposer if isinstance(message, Proposal) else message.validator
