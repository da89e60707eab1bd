"""A deterministic network of consensus machines that lies, loses, delays, repeats, reorders and crashes.

Everything is drawn from one seed; nothing here knows how the machine works, only its inputs and effects.
Faulty seats run as twins (Bano et al., "Twins: BFT systems made robust", arXiv 2004.10617): two machines with
one identity, each seen by its own part of the members, so they equivocate in every step as naturally as
possible; a liar on top votes for whatever it has seen, in every view, towards random members.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

from p2pflock.primitives.cid import CID
from p2pflock.protocol import consensus as c
from p2pflock.protocol.committee import Committee
from p2pflock.protocol.messages import NIL, Proposal, RoundRecord, Seat, Vote
from p2pflock.protocol.timeouts import Timeouts

TASK = bytes(range(32))
ROUND = 7


def build_committee(weights: Iterable[int], cls: type[Committee] = Committee) -> Committee:
    seats = tuple(
        Seat(bytes([0, 36]) + bytes([i]) * 36, bytes([i + 1]) * 20, bytes([i]) * 48, weight)
        for i, weight in enumerate(weights)
    )
    return cls(TASK, 1, 0, bytes(20), seats)


@lru_cache(maxsize=4096)
def build_candidate(number: int) -> bytes:
    """An encoded record, different for every number.  Odd-looking ones (>= 1000) are invalid to all."""
    return RoundRecord(
        task=TASK, epoch=1, round=ROUND, parent=None, parent_attestation=None, committee=CID.of_raw(b"c"),
        contributions=(), absent=(), scorecards=(), trust=(), model_hash=number.to_bytes(32, "big"),
        weights=CID.of_raw(b"w"), rewards=(), rewards_root=number.to_bytes(32, "little"),
    ).encode()


class Violation(Exception):
    """Two honest members decided differently, one voted twice, or an invalid record was decided."""


@dataclass
class Weather:
    """What the network does before `calm`; afterwards everything arrives within a short delay."""

    loss: float = 0.2
    duplicate: float = 0.1
    delay: float = 4.0
    crash: float = 0.01
    calm: float = 60.0  # global stabilisation time
    check_delay: float = 1.0
    is_split: bool = False  # two sides that hardly hear each other, each with its own twins
    links_up: float = 1.0  # share of one-way links that work, drawn anew every other second
    precommit_loss: float = 0.0
    is_cruel: bool = False  # who decides is not heard again until the calm


def draw_weather(seed: int) -> Weather:
    draw = random.Random(f"weather {seed}")
    return Weather(
        loss=draw.choice((0.0, 0.2, 0.5)),
        delay=draw.choice((0.2, 1.0, 8.0)),
        crash=draw.choice((0.0, 0.01, 0.03)),
        calm=draw.choice((0.0, 20.0, 60.0)),
        check_delay=draw.choice((0.1, 1.0, 4.0)),
        is_split=draw.random() < 0.4,
        links_up=draw.choice((0.4, 0.7, 1.0)),
        precommit_loss=draw.choice((0.0, 0.3, 0.6)),
        is_cruel=draw.random() < 0.5,
    )


class Careless(c.Consensus):
    """A faulty machine: no lock, proposes its own whatever was agreed before, checks nothing."""

    def _may_prevote(self, value: c.Value, valid_view: int) -> bool:
        return True

    def _propose(self) -> bool:
        if self._step == c._PROPOSE:
            self._valid = None
        return super()._propose()

    def _check(self) -> bool:
        entry = self._views.get(self._view)
        self._checked.update(dict.fromkeys((v.digest for v in entry.by_value) if entry else (), True))
        return False


class Node:
    """One machine and its disk.  `links` are the node ids it may send to."""

    def __init__(self, network: Network, seat: int | None, node: int, is_honest: bool, candidate: int) -> None:
        self.network, self.seat, self.node, self.is_honest = network, seat, node, is_honest
        self.candidate = candidate
        self.disk: list[c.Message] = []
        self.written: dict[tuple[int, int], Vote] = {}
        self.decided: c.Decided | None = None
        self.links: list[int] = []
        self.incarnation = 0
        self.is_up = False
        self.views = 0

    def create(self) -> None:
        """Memory as it is after reading the disk."""
        net = self.network
        self.incarnation += 1
        self.is_up = True
        timeouts = Timeouts.create(propose_seconds=2.0, vote_seconds=0.5)
        kind = net.machine if self.is_honest or self.candidate % 3 == 0 else Careless
        self.machine = kind.restore(
            net.committee, ROUND, self.seat, net.beacon, timeouts, tuple(self.disk)
        )

    def start(self, now: float) -> None:
        net, incarnation = self.network, self.incarnation
        self.carry_out(self.machine.start(now), now)
        if incarnation == self.incarnation:
            net.at(now + net.random.random() * 3, lambda t: self.offer(t, incarnation))
            net.at(now + 1.0, lambda t: self.resend(t, incarnation))

    def crash(self, now: float) -> None:
        """Memory is gone, the disk is not."""
        self.network.crashes += 1
        self.incarnation += 1
        self.is_up = False
        self.network.at(now + self.network.random.random() * 5, self.reboot)

    def reboot(self, now: float) -> None:
        self.create()
        self.start(now)

    def offer(self, now: float, incarnation: int) -> None:
        if incarnation == self.incarnation:
            self.carry_out(self.machine.offer(build_candidate(self.candidate), now), now)

    def resend(self, now: float, incarnation: int) -> None:
        if incarnation == self.incarnation:
            for message in self.machine.resend():
                self.send(message, now)
            self.network.at(now + 2.0, lambda t: self.resend(t, incarnation))

    def send(self, message: c.Message, now: float) -> None:
        for other in self.links:
            if self.network.is_linked(self.node, other, now):
                self.network.post(message, other, now)

    def receive(self, message: c.Message, now: float) -> None:
        if not self.is_up:
            return
        step = self.machine.on_vote if isinstance(message, Vote) else self.machine.on_proposal
        self.carry_out(step(message, now), now)

    def carry_out(self, effects: tuple[c.Effect, ...], now: float) -> None:
        net, incarnation = self.network, self.incarnation
        for effect in effects:
            if self.is_honest and now < net.weather.calm and net.random.random() < net.weather.crash:
                self.crash(now)  # the effects left over never happen
                return
            if isinstance(effect, c.CastVote):
                vote = Vote(
                    TASK, ROUND, effect.view, int(effect.step), effect.digest, effect.rewards_root,
                    net.committee.seats[self.seat].peer, b"",
                )
                if self.is_honest and self.written.setdefault((vote.view, vote.step), vote) != vote:
                    raise Violation("an honest member voted twice")
                self.sign(vote, now)
            elif isinstance(effect, c.CastProposal):
                self.sign(
                    Proposal(
                        TASK, ROUND, effect.view, effect.valid_view, net.committee.seats[self.seat].peer,
                        effect.record, b"",
                    ),
                    now,
                )
            elif isinstance(effect, c.Save):
                self.disk.extend(effect.messages)
            elif isinstance(effect, c.Check):
                is_valid = effect.proposal.record in net.valid_records
                digest = effect.digest
                net.at(
                    now + net.random.random() * net.weather.check_delay,
                    lambda t, digest=digest, is_valid=is_valid: self.answer(digest, is_valid, t, incarnation),
                )
            elif isinstance(effect, c.WakeAt):
                net.at(effect.time, lambda t: self.tick(t, incarnation))
            elif isinstance(effect, c.Decided):
                self.decided = effect
                if self.is_honest:
                    net.on_decided(self, effect)
            elif isinstance(effect, c.Equivocation):
                seat = net.committee.seat_of(c._author(effect.first))
                if seat not in net.faulty:
                    raise Violation("an honest member was accused")
                net.evidence += 1
        self.views = max(self.views, self.machine.view)

    def sign(self, message: c.Message, now: float) -> None:
        self.disk.append(message)
        self.send(message, now)
        self.network.at(now, lambda t: self.receive(message, t))

    def answer(self, digest: bytes, is_valid: bool, now: float, incarnation: int) -> None:
        if incarnation == self.incarnation:
            self.carry_out(self.machine.on_checked(digest, is_valid, now), now)

    def tick(self, now: float, incarnation: int) -> None:
        if incarnation == self.incarnation:
            self.carry_out(self.machine.on_tick(now), now)


class Network:
    def __init__(
        self,
        seed: int,
        weights: list[int],
        faulty: frozenset[int],
        weather: Weather,
        machine: type[c.Consensus] = c.Consensus,
        committee: type[Committee] = Committee,
    ) -> None:
        self.random = random.Random(seed)
        self.committee = build_committee(weights, committee)
        self.faulty = faulty
        self.weather = weather
        self.machine = machine
        self.beacon = self.random.randbytes(32)
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[float], None]]] = []
        self.count = 0
        self.crashes = self.evidence = self.view_at_calm = 0
        self.seen: list[tuple[int, bytes, bytes]] = []
        self.outcome: bytes | None = None
        self.valid_records = {build_candidate(i) for i in range(200)}
        honest = [s for s in range(len(weights)) if s not in faulty]
        self.nodes = [Node(self, s, i, True, i) for i, s in enumerate(honest)]
        onlooker = Node(self, None, len(self.nodes), True, 0)
        self.honest = [*self.nodes, onlooker]
        self.nodes.append(onlooker)
        self.side = [node.node % 2 for node in self.honest]
        self.random.shuffle(self.side)
        self.period = -1.0
        self.down: set[tuple[int, int]] = set()
        for seat in sorted(faulty):
            for half in ([n.node for n in self.honest if self.side[n.node] == s] for s in (0, 1)):
                # Half of what twins propose is invalid.
                number = len(self.nodes) + self.random.choice((0, 1000))
                twin = Node(self, seat, len(self.nodes), False, number)
                twin.links = half
                self.nodes.append(twin)
        for node in self.honest:
            # A twin hears its own side only, so what it relays does not bridge a split.
            node.links = [o.node for o in self.nodes if o is not node and (o.is_honest or node.node in o.links)]

    # --- the world ---
    def at(self, time: float, action: Callable[[float], None]) -> None:
        self.count += 1
        heapq.heappush(self.events, (max(time, self.now), self.count, action))

    def post(self, message: c.Message, node: int, now: float) -> None:
        weather, draw = self.weather, self.random
        stormy = now < weather.calm
        if isinstance(message, Vote) and len(self.seen) < 500:
            self.seen.append((message.view, message.record_digest, message.rewards_root))
        is_precommit = isinstance(message, Vote) and message.step == 1
        if stormy and draw.random() < (max(weather.loss, weather.precommit_loss * is_precommit)):
            return
        for _ in range(2 if stormy and draw.random() < weather.duplicate else 1):
            delay = draw.random() * (weather.delay if stormy else 0.1)
            self.at(now + delay, lambda t: self.nodes[node].receive(message, t))

    def is_linked(self, sender: int, receiver: int, now: float) -> bool:
        weather, draw = self.weather, self.random
        if now >= weather.calm:
            return True
        if weather.is_cruel and self.nodes[sender].decided:
            return False
        if max(sender, receiver) >= len(self.honest):
            return True
        if weather.is_split and self.side[sender] != self.side[receiver]:
            return draw.random() < 0.02
        if now > self.period:
            self.period = now + 0.2 + draw.random() * 2
            pairs = ((a.node, b.node) for a in self.honest for b in self.honest)
            self.down = {pair for pair in pairs if draw.random() > weather.links_up}
        return (sender, receiver) not in self.down

    def on_decided(self, node: Node, decided: c.Decided) -> None:
        if decided.record not in self.valid_records:
            raise Violation("an invalid record was decided")
        seats = {self.committee.seat_of(vote.validator) for vote in decided.precommits}
        if not self.committee.has_quorum(seats):
            raise Violation("decided without a quorum of precommits")
        if self.outcome is None:
            self.outcome = decided.digest
        if decided.digest != self.outcome:
            raise Violation("two honest members decided differently")

    def look(self, now: float) -> None:
        self.view_at_calm = max(node.machine.view for node in self.honest)

    def lie(self, now: float) -> None:
        """Faulty members vote for anything anyone has voted for, in nearby views, to some members."""
        if self.seen and self.faulty:
            view, digest, root = self.random.choice(self.seen)
            if self.random.random() < 0.2:
                digest, root = NIL, bytes(32)
            view = max(0, view + self.random.choice((-1, 0, 0, 0, 1, 40)))
            seat = self.random.choice(sorted(self.faulty))
            peer = self.committee.seats[seat].peer
            vote = Vote(TASK, ROUND, view, self.random.choice((0, 1)), digest, root, peer, b"")
            for node in self.honest:
                if self.random.random() < 0.5:
                    self.post(vote, node.node, now)
        self.at(now + self.random.random(), self.lie)

    def run(self, limit: float) -> None:
        """Until all honest have decided, or the time is up.  Raises Violation."""
        for node in self.nodes:
            node.create()  # hears others before it starts itself
            self.at(self.random.random() * 5, node.start)
        self.at(1.0, self.lie)
        self.at(self.weather.calm, self.look)
        while self.events and not all(node.decided for node in self.honest):
            time, _, action = heapq.heappop(self.events)
            if time > limit:
                return
            self.now = time
            action(time)


def draw_committee(seed: int) -> tuple[list[int], frozenset[int]]:
    """4..10 members with unequal stakes, and a heaviest-possible faulty set below one third."""
    draw = random.Random(seed)
    weights = [draw.choice((1, 1, 2, 3, 10**18, 2 * 10**18))] * draw.randint(4, 10)
    if draw.random() < 0.6:
        weights = [draw.randint(5, 12) for _ in weights]
    faulty: set[int] = set()
    for seat in draw.sample(range(len(weights)), len(weights)):
        if 3 * (sum(weights[s] for s in faulty) + weights[seat]) < sum(weights):
            faulty.add(seat)
    return weights, frozenset(faulty)
