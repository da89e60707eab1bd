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
EARLY_BYTES_AN_AUTHOR = 1 << 20
SEEN = 8192
VERSIONS_A_SLOT = 3
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
        self._versions: Counter[tuple[object, ...]] = Counter()
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
            self._context.committee,
            head.record,
            head.head,
            driver.beacon,
            max_steps=self._context.facts.max_steps,
            batch_size=self._context.facts.batch_size,
        )
        self._driver = driver
        self._seen.clear()
        self._versions.clear()
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
        if self._driver is not None and not self._driver.has_room:
            self.refused["inbox full"] += 1
            return Verdict.IGNORE  # not marked as seen: it will be sent again
        ruling = RULES[kind](facts, message)
        if not ruling.is_accepted:
            return self._refuse(_VERDICTS[ruling.decision], f"{kind.KIND}: {ruling.reason}")
        if not self._take_note(message, digest):
            self.refused[f"{kind.KIND}: too many different ones for one slot"] += 1
            return Verdict.IGNORE  # whoever forwarded it may have seen no more than three
        if self._driver is not None:
            self._driver.deliver(message)
        return Verdict.ACCEPT

    def _take_note(self, message: Message, digest: bytes) -> bool:
        """Whether to deliver it.

        Attack: a member signs a thousand messages for one slot.  Two are proof, and more are not wanted, but for
        votes and proposals that more than a third of the stake stands behind.

        Attack: a member votes twice, and some hear of the one vote first, some of the other.  Consensus counts the
        second only once it has that support; heard before, it must not be taken for known when it is sent again, or a
        quorum that others are locked on is never seen here, and nobody decides.
        """
        slot = _slot(message)
        self._versions[slot] += 1
        is_first = self._versions[slot] == 1
        is_known = is_first
        if not is_first and isinstance(message, (Proposal, Vote)):
            is_known = self._driver is not None and self._driver.machine.is_wanted(message)
        if self._versions[slot] > VERSIONS_A_SLOT and not is_known:
            return False
        if is_known or isinstance(message, (ContributionHeader, Scorecard)):
            self._seen[digest] = None
            if len(self._seen) > SEEN:
                self._seen.popitem(last=False)
        return True

    def _refuse(self, verdict: Verdict, reason: str) -> Verdict:
        if verdict is Verdict.REJECT:
            self.refused[reason if len(self.refused) < 64 or reason in self.refused else "other"] += 1
        return verdict

    @property
    def early_bytes(self) -> int:
        """Held for the next round; at most EARLY_BYTES_AN_AUTHOR a seat."""
        return sum(len(data) for held in self._early.values() for data in held)

    def _keep_early(self, author: bytes, data: bytes, kind: Kind) -> None:
        """Attack: memory filled with messages of rounds to come, which nobody can check yet.  Only members may
        have some kept, a few and not large, and trainers no more than a header; what is pushed out is sent again."""
        committee = self._context.committee
        is_voter = committee.seat_of(author) is not None
        if not is_voter and (committee.index_of(author) is None or kind is not ContributionHeader):
            return
        held = self._early.setdefault(author, OrderedDict())
        held[data] = kind
        most = EARLY_AN_AUTHOR if is_voter else 1
        while len(held) > most or sum(map(len, held)) > EARLY_BYTES_AN_AUTHOR:
            held.popitem(last=False)


def _slot(message: Message) -> tuple[object, ...]:
    """What a member may say only once."""
    match message:
        case ContributionHeader():
            return "header", message.peer
        case Scorecard():
            return "scorecard", message.validator
        case Proposal():
            return "proposal", message.proposer, message.view
        case Vote():
            return "vote", message.validator, message.view, message.step
