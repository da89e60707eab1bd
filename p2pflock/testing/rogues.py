"""Members that lie, for testing.simulation: each class is one way of cheating, signed with the liar's own keys.

Law: a rogue runs the real peer and departs from it in one place, so that it gets as far as such a liar can.
Where a lie needs a message, it is made from the honest one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace

import trio

from p2pflock.node.sync import BLOCK_PROTOCOL, ROUNDS_PROTOCOL
from p2pflock.ports import (
    Evaluation,
    FoldInput,
    FoldResult,
    Genesis,
    PayloadScore,
    RequestHandler,
    Trainer,
    TrainResult,
    Validator,
    Verdict,
)
from p2pflock.primitives import wire
from p2pflock.primitives.cid import CID
from p2pflock.protocol.committee import compute_beacon, compute_proposer, compute_vote_root
from p2pflock.protocol.messages import (
    NIL,
    Absence,
    Attestation,
    ContributionHeader,
    Proposal,
    RoundRecord,
    Vote,
)
from p2pflock.testing.simulation import Conduct


def _sign_header(rogue: Conduct, header: ContributionHeader) -> bytes:
    bare = replace(header, signature=b"")
    return replace(bare, signature=rogue.me.signer.sign_bls(bare.signing_root())).encode()


def _sign_proposal(rogue: Conduct, proposal: Proposal) -> bytes:
    bare = replace(proposal, signature=b"")
    return replace(bare, signature=rogue.me.signer.sign_bls(bare.signing_root())).encode()


class TwoHeaders(Conduct):
    """Two different contributions for every round; who hears which first is left to the network.

    Args:
        versions: how many different ones.
    """

    def __init__(self, versions: int = 2) -> None:
        self.versions = versions

    def publish(self, topic: str, data: bytes) -> Iterable[bytes]:
        if topic != "header":
            return (data,)
        header = ContributionHeader.decode(data)
        others = (replace(header, loss_micro=header.loss_micro + n) for n in range(1, self.versions))
        return (data, *(_sign_header(self, other) for other in others))


class TwoVotes(Conduct):
    """Votes for the record and for nothing, and as a proposer proposes two records, in every view."""

    def publish(self, topic: str, data: bytes) -> Iterable[bytes]:
        if topic == "proposal":
            proposal = Proposal.decode(data)
            if proposal.proposer != self.me.signer.peer_id:
                return (data,)
            record = RoundRecord.decode(proposal.record)
            absent = tuple(replace(entry, reason=int(Absence.UNDELIVERED)) for entry in record.absent)
            other = replace(record, absent=absent, model_hash=record.model_hash if absent else NIL)
            return (_sign_proposal(self, replace(proposal, record=other.encode())), data)
        if topic != "vote" or self.me.context is None:
            return (data,)
        vote = Vote.decode(data)
        if vote.validator != self.me.signer.peer_id:
            return (data,)
        digest = NIL if vote.record_digest != NIL else hashlib.sha256(data).digest()
        other_vote = replace(vote, record_digest=digest, rewards_root=NIL, signature=b"")
        parent = self.me.context.ledger.at(vote.round - 1)
        assert parent is not None
        root = compute_vote_root(self.me.context.committee, other_vote, parent.head)
        lie = replace(other_vote, signature=self.me.signer.sign_bls(root)).encode()
        return (lie, data) if vote.view % 2 else (data, lie)


class WrongModel(Conduct):
    """As a proposer names a model that the contributions do not give."""

    def publish(self, topic: str, data: bytes) -> Iterable[bytes]:
        if topic != "proposal":
            return (data,)
        proposal = Proposal.decode(data)
        if proposal.proposer != self.me.signer.peer_id:
            return (data,)
        record = RoundRecord.decode(proposal.record)
        lie = replace(record, model_hash=hashlib.sha256(record.model_hash).digest())
        return (_sign_proposal(self, replace(proposal, record=lie.encode())),)


class GenesisAttester(Conduct):
    """As the proposer of round 1 shows a quorum for genesis, which nobody signs."""

    def publish(self, topic: str, data: bytes) -> Iterable[bytes]:
        if topic != "proposal":
            return (data,)
        proposal = Proposal.decode(data)
        if proposal.proposer != self.me.signer.peer_id or proposal.round != 1:
            return (data,)
        record = RoundRecord.decode(proposal.record)
        assert record.parent is not None
        forged = Attestation(record.parent, 0, b"\x7f", bytes(96))
        lie = replace(record, parent_attestation=forged)
        return (_sign_proposal(self, replace(proposal, record=lie.encode())),)


class HastyProposer(Conduct):
    """When the first turn of a round is its own, proposes a worthless record before anybody could have trained;
    and, like a mute one, nothing else."""

    def publish(self, topic: str, data: bytes) -> Iterable[bytes | tuple[str, bytes]]:
        context = self.me.context
        if topic == "status" and context is not None:
            parent = context.ledger.head
            beacon = compute_beacon(context.facts.task, 0, parent.record.round + 1, parent.cid.digest)
            if compute_proposer(context.committee, beacon, 0) == self.me.number:
                record = replace(parent.record, round=parent.record.round + 1, parent=parent.cid)
                signer = context.signer.peer_id
                lie = Proposal(record.task, record.round, 0, -1, signer, record.encode(), b"")
                return (data, ("proposal", _sign_proposal(self, lie)))
        return () if topic == "proposal" else (data,)


class MuteProposer(Conduct):
    """Does everything but propose."""

    def publish(self, topic: str, data: bytes) -> Iterable[bytes]:
        return () if topic == "proposal" else (data,)


class Censor(Conduct):
    """Is deaf to one seat's contributions, so its records leave them out."""

    def __init__(self, victim: int) -> None:
        self.victim = victim

    def judge(self, topic: str, validator: Validator) -> Validator:
        def deaf(author: bytes, data: bytes) -> Verdict:
            context = self.me.context
            if topic == "header" and context is not None:
                header = ContributionHeader.decode(data)
                if context.committee.seat_of(header.peer) == self.victim:
                    return Verdict.ACCEPT
            return validator(author, data)

        return deaf


class WrongSize(Conduct):
    """Copies whatever contribution it hears first under its own name, with a false size: whoever hears the
    copy before the original has two sizes for one content id."""

    def __init__(self) -> None:
        self._copied: ContributionHeader | None = None

    def judge(self, topic: str, validator: Validator) -> Validator:
        def listen(author: bytes, data: bytes) -> Verdict:
            verdict = validator(author, data)
            if topic == "header" and verdict is Verdict.ACCEPT:
                self._copied = ContributionHeader.decode(data)
            return verdict

        return listen

    def publish(self, topic: str, data: bytes) -> Iterable[bytes]:
        if topic != "header":
            return (data,)
        own, other = ContributionHeader.decode(data), self._copied
        if other is None or other.round != own.round:
            return ()
        return (_sign_header(self, replace(own, payload=other.payload, payload_bytes=other.payload_bytes + 1)),)


class RogueTrainer:
    """A Trainer whose results are noise, else as the honest one."""

    def __init__(self, inner: Trainer) -> None:
        self._inner = inner

    async def open(self) -> Genesis:
        return await self._inner.open()

    async def train(self, round_: int, shard: int, shards: int, seed: bytes, steps: int = 0) -> TrainResult:
        result = await self._inner.train(round_, shard, shards, seed, steps)
        return replace(result, payload=hashlib.sha512(result.payload).digest() * 2)

    async def finish(self) -> None:
        await self._inner.finish()

    async def score(self, round_: int, payloads: Sequence[bytes], seed: bytes) -> Sequence[PayloadScore]:
        return await self._inner.score(round_, payloads, seed)

    async def fold(self, round_: int, inputs: Sequence[FoldInput]) -> FoldResult:
        return await self._inner.fold(round_, inputs)

    async def adopt(self, model_hash: bytes) -> None:
        await self._inner.adopt(model_hash)

    async def set_dense(self, vector: bytes) -> FoldResult:
        return await self._inner.set_dense(vector)

    async def export(self) -> bytes:
        return await self._inner.export()

    async def load(self, weights: bytes) -> bytes:
        return await self._inner.load(weights)

    async def evaluate(self) -> Evaluation:
        return await self._inner.evaluate()

    async def sample(self, length: int) -> str:
        return await self._inner.sample(length)


class Garbage(Conduct):
    """Contributes bytes that do not decode."""

    def trainer(self, trainer: Trainer) -> Trainer:
        return RogueTrainer(trainer)


class NeverDelivers(Conduct):
    """Announces a contribution with a content id that nobody has: it cannot be delivered."""

    def publish(self, topic: str, data: bytes) -> Iterable[bytes]:
        if topic != "header":
            return (data,)
        header = ContributionHeader.decode(data)
        return (_sign_header(self, replace(header, payload=CID.of_raw(data))),)


class Boaster(Conduct):
    """Says that it is far ahead and answers whoever asks with rounds and blocks that it made up.

    Args:
        seconds: how long it keeps a request waiting before the lie.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.asked = 0

    def publish(self, topic: str, data: bytes) -> Iterable[bytes]:
        if topic != "status":
            return (data,)
        _, *rest = wire.unpack(data, max_bytes=128)
        return (wire.pack([1 << 40, *rest]),)

    def serve(self, protocol: str, handler: RequestHandler) -> RequestHandler:
        async def lie(peer: bytes, request: bytes) -> bytes:
            self.asked += 1
            await trio.sleep(self.seconds)
            if protocol == BLOCK_PROTOCOL:
                return hashlib.sha512(request).digest()
            if protocol == ROUNDS_PROTOCOL:
                return self._forge(await handler(peer, request))
            return await handler(peer, request)

        return lie

    def _forge(self, answer: bytes) -> bytes:
        """True rounds with another model under the true signatures."""
        forged = []
        for record, attestation in wire.unpack(answer, max_bytes=2 << 20):
            lie = replace(RoundRecord.decode(record), model_hash=hashlib.sha256(record).digest())
            forged.append([lie.encode(), attestation])
        return wire.pack(forged)


class Flooder(Conduct):
    """With every contribution sends many that claim to be of the next round."""

    def __init__(self, messages: int = 40, size: int = 1 << 10) -> None:
        self.messages = messages
        self.size = size
        self._sent = 0

    def publish(self, topic: str, data: bytes) -> Iterable[bytes]:
        if topic != "header":
            return (data,)
        return (data, *self._early(ContributionHeader.decode(data)))

    def _early(self, header: ContributionHeader) -> Iterable[bytes]:
        for _ in range(self.messages):
            self._sent += 1
            early = replace(header, round=header.round + 1, loss_micro=self._sent, signature=b"")
            yield early.encode()


