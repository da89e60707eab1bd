"""What consensus speaks of: values, the effects it asks for, and the votes it has counted.

Law: plain values and bookkeeping; no rule of the algorithm stands here (consensus.py has them all).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from p2pflock.errors import InvalidMessageError
from p2pflock.protocol.committee import Committee
from p2pflock.protocol.messages import NIL, Proposal, RoundRecord, Step, Vote


class Value(NamedTuple):
    """What is voted on.  The root is inside the record, but a vote states both: the anchor contract checks
    the signature over both and never sees the record."""

    digest: bytes
    rewards_root: bytes


NIL_VALUE = Value(NIL, bytes(32))

Message: TypeAlias = Proposal | Vote


def compute_value(record: bytes) -> Value | None:
    """What votes name an encoded record by, or None when it is not one."""
    try:
        decoded = RoundRecord.decode(record)
    except InvalidMessageError:
        return None
    return Value(decoded.digest(), decoded.rewards_root)


def get_value(vote: Vote) -> Value:
    return Value(vote.record_digest, vote.rewards_root)


# --- effects --------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Check:
    """Recompute this proposal's record and answer `on_checked(digest, ...)`, whenever that is done."""

    proposal: Proposal
    digest: bytes


@dataclass(frozen=True, slots=True)
class Save:
    """Others' messages that justify the vote that follows: on disk before going on."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class CastProposal:
    """Sign, write, send, feed back."""

    view: int
    valid_view: int
    record: bytes


@dataclass(frozen=True, slots=True)
class CastVote:
    """Sign, write, send, feed back."""

    view: int
    step: Step
    digest: bytes
    rewards_root: bytes


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Call `on_tick` at this time (monotonic seconds), or later.  Several may be pending."""

    time: float


@dataclass(frozen=True, slots=True)
class Decided:
    """Final.  `precommits` are a quorum for the record, ready for attestation.build_attestation.

    `own_check` False means that this machine computes otherwise than a quorum: the driver must stop, loudly,
    not adopt (a bug here, or more than a third of the stake is faulty); None: it was not done yet.
    """

    record: bytes
    digest: bytes
    rewards_root: bytes
    view: int
    precommits: tuple[Vote, ...]
    own_check: bool | None


@dataclass(frozen=True, slots=True)
class Equivocation:
    """One member signed both: slashable evidence."""

    first: Message
    second: Message


Effect: TypeAlias = Check | Save | CastProposal | CastVote | WakeAt | Decided | Equivocation


# --- what is known of a view ----------------------------------------------------------------------------
class Tally:
    """Votes of one view and step: each member's first, and later ones for values with honest support."""

    __slots__ = ("first", "is_timed", "opened", "voted_wei", "votes", "wei")

    def __init__(self) -> None:
        self.first: dict[int, Vote] = {}
        self.votes: dict[Value, dict[int, Vote]] = {}
        self.wei: dict[Value, int] = {}
        self.voted_wei = 0
        self.opened: float | None = None  # when a quorum had voted, for anything
        self.is_timed = False

    def add(self, vote: Vote, seat: int, committee: Committee) -> bool:
        """Whether the vote was new and is counted."""
        value, weight = get_value(vote), committee.seats[seat].weight_wei
        if seat in self.votes.get(value, {}):
            return False
        if seat not in self.first:
            self.first[seat] = vote
            self.voted_wei += weight
        elif not committee.is_blocking(self.wei.get(value, 0)):
            return False
        self.votes.setdefault(value, {})[seat] = vote
        self.wei[value] = self.wei.get(value, 0) + weight
        return True

    def time(self, value: Value, committee: Committee, now: float) -> float | None:
        """Once: seconds from a quorum of any votes to one for `value`."""
        if self.opened is None and committee.is_quorum(self.voted_wei):
            self.opened = now
        if self.opened is None or self.is_timed or not committee.is_quorum(self.wei[value]):
            return None
        self.is_timed = True
        return now - self.opened

    def all(self) -> tuple[Vote, ...]:
        return tuple(vote for votes in self.votes.values() for vote in votes.values())


class View:
    __slots__ = ("by_value", "proposal", "started", "tallies", "value")

    def __init__(self) -> None:
        self.proposal: Proposal | None = None  # the first of this view's proposer
        self.value: Value | None = None  # of that proposal; None when there is none or its record is broken
        self.by_value: dict[Value, Proposal] = {}  # it, and conflicting ones with honest support
        self.tallies = (Tally(), Tally())
        self.started: float | None = None

    def messages(self) -> tuple[Message, ...]:
        return (*self.by_value.values(), *self.tallies[0].all(), *self.tallies[1].all())


@dataclass(frozen=True, slots=True)
class Polka:
    """A proposal, and the prevote quorum that made it the valid value (paper: validValue, validRound)."""

    view: int
    value: Value
    proposal: Proposal
    prevotes: tuple[Vote, ...]
