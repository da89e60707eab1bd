"""Gossip in and out: one topic per kind of message, each judged before it is delivered or forwarded.

Law: a message is decoded once, judged by protocol/validation.py, and handed to the round it belongs to.  A
message of the next round is kept undecoded until that round begins, a few per author, because its parent is
not known yet; everything older is ignored.  Whatever is refused is counted by its reason.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping

import trio

from p2pflock.errors import InvalidMessageError
from p2pflock.node.context import PeerContext
from p2pflock.node.driver import Message, RoundDriver
from p2pflock.ports import Verdict
from p2pflock.protocol import validation
from p2pflock.protocol.messages import ContributionHeader, Proposal, Scorecard, Vote

Kind = type[ContributionHeader] | type[Scorecard] | type[Proposal] | type[Vote]

TOPICS: Mapping[str, Kind] = {
    "header": ContributionHeader,
    "scorecard": Scorecard,
    "proposal": Proposal,
    "vote": Vote,
}
RULES: Mapping[Kind, Callable[..., validation.Ruling]] = {
    ContributionHeader: validation.validate_header,
    Scorecard: validation.validate_scorecard,
    Proposal: validation.validate_proposal,
    Vote: validation.validate_vote,
}
EARLY_AN_AUTHOR = 64
EARLY_AUTHORS = 512
SEEN = 8192
VOTES_A_SLOT = 3
_VERDICTS = {
    validation.Decision.ACCEPT: Verdict.ACCEPT,
    validation.Decision.IGNORE: Verdict.IGNORE,
    validation.Decision.REJECT: Verdict.REJECT,
}


class Intake:
    """Subscribes, judges, delivers; publishes what the driver signs."""

    def __init__(self, context: PeerContext) -> None:
        self._context = context
        self._driver: RoundDriver | None = None
        self._facts: validation.RoundFacts | None = None
        self._early: OrderedDict[bytes, OrderedDict[bytes, Kind]] = OrderedDict()
        self._seen: OrderedDict[bytes, None] = OrderedDict()  # accepted in this round, by sha256
        self._votes: Counter[tuple[bytes, int, int]] = Counter()
        self.refused: Counter[str] = Counter()

    def _topic(self, name: str) -> str:
        return f"/p2pflock/1/{self._context.facts.task.hex()}/{name}"

    async def publish(self, message: Message) -> None:
        name = next(name for name, kind in TOPICS.items() if isinstance(message, kind))
        await self._context.host.publish(self._topic(name), message.encode())

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for name, kind in TOPICS.items():
                messages = await self._context.host.subscribe(self._topic(name), self._judge_as(kind))
                nursery.start_soon(self._drain, messages)

    async def _drain(self, messages: object) -> None:
        async for _ in messages:  # type: ignore[attr-defined]
            pass  # delivered by the validator, which sees each message exactly once

    # --- rounds ---
    def enter(self, driver: RoundDriver) -> None:
        """Messages of this round go to `driver` from now on, those that came early first."""
        head = self._context.ledger.head
        self._facts = validation.facts_of(
            self._context.committee, head.record, head.head, driver.beacon
        )
        self._driver = driver
        self._seen.clear()
        self._votes.clear()
        early, self._early = self._early, OrderedDict()
        for author, held in early.items():
            for data, kind in held.items():
                self._judge(kind, author, data)

    def leave(self) -> None:
        self._driver = self._facts = None

    # --- judging ---
    def _judge_as(self, kind: Kind) -> Callable[[bytes, bytes], Verdict]:
        return lambda author, data: self._judge(kind, author, data)

    def _judge(self, kind: Kind, author: bytes, data: bytes) -> Verdict:
        try:
            message = kind.decode(data)
        except InvalidMessageError as error:
            return self._refuse(Verdict.REJECT, f"{kind.KIND}: {error.message}")
        digest = hashlib.sha256(data).digest()
        if digest in self._seen:  # sent again, perhaps by somebody else: no second signature check
            return Verdict.IGNORE
        facts = self._facts
        if facts is None or message.round > facts.round:
            expected = self._context.ledger.head.record.round + (1 if facts is None else 2)
            if message.round == expected:
                self._keep_early(author, data, kind)
            return Verdict.IGNORE
        ruling = RULES[kind](facts, message)
        if not ruling.is_accepted:
            return self._refuse(_VERDICTS[ruling.decision], f"{kind.KIND}: {ruling.reason}")
        if isinstance(message, Vote) and not self._count(message):
            self.refused["vote: too many different ones for one slot"] += 1
            return Verdict.IGNORE  # whoever forwarded it may have seen no more than three
        self._seen[digest] = None
        if len(self._seen) > SEEN:
            self._seen.popitem(last=False)
        if self._driver is not None:
            self._driver.deliver(message)
        return Verdict.ACCEPT

    def _count(self, vote: Vote) -> bool:
        """Attack: a member signs a thousand different votes for one slot.  Three are as many as consensus uses."""
        slot = (vote.validator, vote.view, vote.step)
        self._votes[slot] += 1
        return self._votes[slot] <= VOTES_A_SLOT

    def _refuse(self, verdict: Verdict, reason: str) -> Verdict:
        if verdict is Verdict.REJECT:
            self.refused[reason if len(self.refused) < 64 or reason in self.refused else "other"] += 1
        return verdict

    def _keep_early(self, author: bytes, data: bytes, kind: Kind) -> None:
        """Attack: a stranger fills memory with messages of rounds to come; bounded by author and in total."""
        held = self._early.setdefault(author, OrderedDict())
        held[data] = kind
        if len(held) > EARLY_AN_AUTHOR:
            held.popitem(last=False)
        if len(self._early) > EARLY_AUTHORS:
            self._early.popitem(last=False)
