"""Verdicts on built histories, and a trainer whose files are large enough to be trees."""

from __future__ import annotations

import hashlib

import trio

from p2pflock.errors import FlockError, InvalidMessageError
from p2pflock.node import verification
from p2pflock.ports import FoldInput, FoldResult, Genesis, PayloadScore, TrainResult
from p2pflock.primitives import unixfs
from p2pflock.protocol import provenance
from p2pflock.protocol.provenance import Trust, Verdict
from p2pflock.testing.history import History
from p2pflock.testing.trainer import FakeTrainer

PASS, FAIL, OPEN = Verdict.PASS, Verdict.FAIL, Verdict.NOT_CHECKED


class BulkyTrainer:
    """Weights and payloads of several chunks; folding is hashing.  No learning."""

    weights_chunks, payload_chunks = 3, 2

    def __init__(self) -> None:
        self._weights = self._stretch(b"genesis", self.weights_chunks)
        self._next: dict[bytes, bytes] = {}

    @staticmethod
    def _stretch(seed: bytes, chunks: int) -> bytes:
        size = (chunks - 1) * unixfs.CHUNK_BYTES + 7
        return (hashlib.sha512(seed).digest() * (size // 64 + 1))[:size]

    @staticmethod
    def _hash(data: bytes) -> bytes:
        return hashlib.sha256(data).digest()

    async def open(self) -> Genesis:
        return Genesis(self._hash(self._weights), unixfs.compute_cid(self._weights), 1)

    async def train(self, round_: int, shard: int, shards: int, seed: bytes) -> TrainResult:
        payload = self._stretch(seed + bytes([shard]), self.payload_chunks)
        return TrainResult(payload, 1, 1, 0, bytes(32), bytes(32))

    async def score(self, round_, payloads, seed):
        return [PayloadScore(True, 1, 0) for _ in payloads]

    async def fold(self, round_: int, inputs: list[FoldInput]) -> FoldResult:
        seed = b"".join(self._hash(i.payload) + i.weight.to_bytes(8, "big") for i in inputs)
        data = self._stretch(self._hash(self._weights) + seed, self.weights_chunks)
        self._next[self._hash(data)] = data
        return FoldResult(self._hash(data), unixfs.compute_cid(data))

    async def adopt(self, model_hash: bytes) -> None:
        self._weights = self._next[model_hash]

    async def export(self) -> bytes:
        return self._weights

    async def load(self, weights: bytes) -> bytes:
        self._weights = weights
        return self._hash(weights)


def trust_of(history: History) -> Trust:
    return Trust(frozenset({history.committee.cid()}), history.anchors if history.chain else None)


def judge(
    history: History, *, get=None, trust=None, attestation=..., checkpoint=None, trainer=None, is_exact=True
) -> provenance.Report:
    """All five questions, with the fold in this process."""
    get = get or history.store.get
    report = provenance.check(
        checkpoint or history.checkpoint,
        get,
        history.head.attestation if attestation is ... else attestation,
        trust_of(history) if trust is None else trust,
    )

    async def refold() -> None:
        try:
            await verification.refold(
                report, get, trainer or FakeTrainer(history.spec), is_genesis_exact=is_exact
            )
        except InvalidMessageError as error:
            report.fail("recomputed", error.message)
        except FlockError as error:
            report.conclude("recomputed", OPEN, error.message)

    if report.spine.is_whole:
        trio.run(refold)
    return report


def verdicts(report: provenance.Report) -> dict[str, Verdict]:
    return {name: report.findings[name].verdict for name in provenance.QUESTIONS}
