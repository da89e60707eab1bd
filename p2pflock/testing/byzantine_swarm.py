"""Learning in a swarm some of whose members attack it: everything but the network and the votes.

Law: trainers are the real Learner, payloads the real codec's bytes, and a round's outcome is what `settle` and the
fold make of unsigned headers and scorecards.  All honest peers hold one checkpoint (`step` checks the hash), so
the accuracy of the worst of them is that of any.  One process and one thread; the same arguments, the same run.

Attackers hold the last seats, train, send and judge: as validators they praise one another and condemn the rest.
Rules over dense vectors (learning/robust.py) take the place of gate and fold where a comparison asks for one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from p2pflock.errors import InvalidMessageError, LocalProtocolError
from p2pflock.learning import codec
from p2pflock.learning.codec import F32
from p2pflock.learning.learner import Learner
from p2pflock.learning.network import TorchNetwork
from p2pflock.learning.partition import PrivateShard
from p2pflock.learning.spec import TaskSpec
from p2pflock.ports import Evaluation, FoldInput
from p2pflock.primitives import shuffle
from p2pflock.primitives.cid import CID
from p2pflock.protocol import gate
from p2pflock.protocol.committee import Committee
from p2pflock.protocol.messages import (
    MICRO,
    ContributionHeader,
    Judgement,
    RoundRecord,
    Score,
    Scorecard,
    Seat,
    Trust,
)
from p2pflock.protocol.settlement import Tables, compute_genesis, settle
from p2pflock.testing.attackers import Attack, View, densify

Rule = Callable[[Sequence[gate.Candidate], Sequence[Trust]], gate.Outcome]
DenseRule = Callable[[Sequence[F32]], F32]  # pseudo-gradients in, their aggregate out


@dataclass(frozen=True)
class Setup:
    """One run."""

    spec: TaskSpec
    parts: Sequence[Sequence[int]]  # training samples of each seat
    attackers: int = 0  # the last seats
    attack: Callable[[], Attack] | None = None  # None: they are absent
    rule: Rule = gate.judge
    dense_rule: DenseRule | None = None  # instead of settlement's weights and the sparse fold
    dense_gain: float = 1.0
    validators: int = 4  # honest ones that score; attackers always do
    seed: int = 0


@dataclass
class Figures:
    """Of one round, by seat; a seat that is in neither sent nothing that decodes."""

    round: int
    judgements: dict[int, Judgement] = field(default_factory=dict)
    ratios: dict[int, int] = field(default_factory=dict)  # the gate's long memory, millionths


class ByzantineSwarm:
    def __init__(self, setup: Setup, network: TorchNetwork) -> None:
        self.setup, self.network = setup, network
        self.seats = len(setup.parts)
        self.honest = range(self.seats - setup.attackers)
        bad = range(self.seats - setup.attackers, self.seats) if setup.attack else range(0)
        self.attacks = {seat: setup.attack() for seat in bad if setup.attack}
        self.learners: dict[int, Learner] = {}
        for seat in (*self.honest, *bad):
            attack = self.attacks.get(seat)
            base = network.over(attack.poison(network.data)) if attack else network
            self.learners[seat] = Learner(setup.spec, PrivateShard(base, setup.parts[seat]))
        seats = tuple(Seat(_peer(i), bytes([i]) * 20, bytes([i]) * 48, 1) for i in range(self.seats))
        self.committee = Committee(setup.spec.task_id, 1, 0, bytes(20), seats, 0)
        genesis = self.learners[0].open()
        self.record: RoundRecord = compute_genesis(self.committee, genesis.model_hash, genesis.weights)
        self.tables = Tables()
        self.round = 0

    def step(self) -> Figures:
        """One whole round."""
        self.round += 1
        seed = shuffle.derive(bytes(32), "byzantine swarm", self.setup.seed, self.round)
        made = self._train(seed)
        # What does not decode is refused on arrival and its seat recorded as absent.
        payloads = {seat: payload for seat, payload in made.items() if self._decodes(payload)}
        headers = {seat: self._header(seat, payload) for seat, payload in payloads.items()}
        cards = self._score(seed, headers, payloads)
        settled = settle(self.committee, self.tables, list(headers.values()), cards, rule=self.setup.rule)
        judged = dict(zip(sorted(headers), settled.judgements, strict=True))
        weights = dict(zip(sorted(headers), settled.weights, strict=True))
        valid = [seat for seat in sorted(payloads) if judged[seat] is not Judgement.INVALID]
        if self.setup.dense_rule:
            model_hash = self._aggregate([payloads[seat] for seat in valid])
        else:
            model_hash = self._fold([FoldInput(payloads[seat], weights[seat]) for seat in valid if weights[seat]])
        self.record = replace(
            self.record, round=self.round, parent=self.record.cid(), trust=settled.trust, model_hash=model_hash
        )
        self.tables = self.tables.after(settled)
        ratios = {self.committee.seat_of(entry.peer): gate.compute_ratio(entry) for entry in self.tables.trust}
        return Figures(self.round, judged, {seat: ratio for seat, ratio in ratios.items() if seat is not None})

    def evaluate(self, network: TorchNetwork | None = None) -> Evaluation:
        """On the test set of `network` or the task's."""
        if network is None:
            return self.learners[0].evaluate()
        other = Learner(self.setup.spec, network)
        other.load(self.learners[0].export())
        return other.evaluate()

    # --- one round ---
    def _train(self, seed: bytes) -> dict[int, bytes]:
        """Payload bytes by seat, the attackers' last."""
        own = {}
        for seat, learner in self.learners.items():
            if seat in self.attacks and not self.attacks[seat].trains:
                continue
            steps = learner.train(self.round, 0, 1, shuffle.derive(seed, "seat", seat))
            while True:
                try:
                    next(steps)
                except StopIteration as done:
                    own[seat] = done.value.payload
                    break
        shape = self.learners[0].shape(self.round)
        payloads = {seat: own[seat] for seat in self.honest}
        honest = [codec.decode(payload, shape) for payload in payloads.values()]
        for seat, attack in self.attacks.items():
            view = View(
                round=self.round, seat=seat, shape=shape, weights=self.learners[0].weights, honest=honest,
                own=codec.decode(own[seat], shape) if seat in own else None, attackers=len(self.attacks),
                private=_generator(seed, seat), common=_generator(bytes(32), self.setup.seed),
                public_gradient=self._public_gradient,
            )  # fmt: skip
            payloads[seat] = attack.forge(view)
        return payloads

    def _decodes(self, payload: bytes) -> bool:
        try:
            codec.decode(payload, self.learners[0].shape(self.round))
        except InvalidMessageError:
            return False
        return True

    def _public_gradient(self) -> F32:
        """Over as much of the pool as one batch holds; validators draw theirs from the same pool."""
        pool = range(min(1000, self.network.size("public")))
        return self.network.gradient(self.learners[0].weights, "public", pool, is_training=False)[1]

    def _header(self, seat: int, payload: bytes) -> ContributionHeader:
        local = self.setup.spec.local
        return ContributionHeader(
            task=self.committee.task, round=self.round, parent=self.record.cid(), peer=_peer(seat),
            payload=CID.of_raw(payload), payload_bytes=len(payload), shard=seat, steps=local.steps,
            samples=local.steps * local.batch_size, loss_micro=0, leaf_root=bytes(32), optimizer_hash=bytes(32),
            signature=b"",
        )  # fmt: skip

    def _score(
        self, seed: bytes, headers: dict[int, ContributionHeader], payloads: dict[int, bytes]
    ) -> list[Scorecard]:
        cards = []
        names = [header.cid() for header in headers.values()]
        for seat in list(self.honest)[: self.setup.validators]:
            own_seed = shuffle.derive(seed, "validator", seat)
            scores = self.learners[seat].score(self.round, list(payloads.values()), own_seed)
            lines = [
                Score(name, score.is_valid, score.cosine_micro, score.loss_delta_micro)
                for name, score in zip(names, scores, strict=True)
            ]
            cards.append(self._card(seat, lines))
        for seat in self.attacks:
            lines = [
                Score(name, True, MICRO if of in self.attacks else -MICRO, 0)
                for of, name in zip(headers, names, strict=True)
            ]
            cards.append(self._card(seat, lines))
        return cards

    def _card(self, seat: int, lines: Sequence[Score]) -> Scorecard:
        return Scorecard(
            task=self.committee.task, round=self.round, parent=self.record.cid(), validator=_peer(seat),
            seed_proof=bytes(96), scores=tuple(lines), signature=b"",
        )  # fmt: skip

    def _fold(self, inputs: Sequence[FoldInput]) -> bytes:
        hashes = set()
        for seat in self.honest:
            folded = self.learners[seat].fold(self.round, inputs)
            self.learners[seat].adopt(folded.model_hash)
            hashes.add(folded.model_hash)
        if len(hashes) != 1:
            raise LocalProtocolError(f"round {self.round}: honest peers hold {len(hashes)} different models")
        data = self.learners[0].export()
        for seat in self.attacks:
            self.learners[seat].load(data)
        return hashes.pop()

    def _aggregate(self, payloads: Sequence[bytes]) -> bytes:
        assert self.setup.dense_rule is not None
        shape = self.learners[0].shape(self.round)
        update = self.setup.dense_rule([densify(codec.decode(payload, shape)) for payload in payloads])
        step = (np.float32(self.setup.dense_gain) * update).astype("<f4").tobytes()
        for learner in self.learners.values():
            folded = learner.set_dense(step)
            learner.adopt(folded.model_hash)
        return folded.model_hash


def _peer(seat: int) -> bytes:
    return bytes([0, 36]) + bytes([seat]) * 36


def _generator(seed: bytes, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(int.from_bytes(shuffle.derive(seed, "attack", number)[:8], "big")))
