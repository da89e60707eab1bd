"""FakeTrainer: the Trainer port in memory, over the real Learner and by default a model of 36 numpy weights.

Law: codec, fold, scores, state and their errors are those of the real learning process; only the model, the
data and the pipe are missing.  Two FakeTrainers with one spec are two honest peers: same checkpoint and same
payloads give the same bits.  A whole round takes about two milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import trio

from p2pflock.learning.learner import Learner, Network
from p2pflock.learning.spec import TaskSpec
from p2pflock.ports import Evaluation, FoldInput, FoldResult, Genesis, PayloadScore, TrainResult
from p2pflock.testing.tiny_task import NumpyNetwork, build_spec


class FakeTrainer:
    """Implements ports.Trainer.

    Args:
        spec: by default the tiny task's; its [model] and [data] are not looked at.
        network: model and data in place of the numpy model; it holds no state of a peer, so peers may share one.
        step_seconds: trio time per local step, for simulations under trio.testing.MockClock.
        state_dir: as for TrainerProcess.
    """

    def __init__(
        self,
        spec: TaskSpec | None = None,
        *,
        network: Network | None = None,
        step_seconds: float = 0.0,
        state_dir: Path | None = None,
    ) -> None:
        self.spec = spec or build_spec()
        self.step_seconds = step_seconds
        self._is_hurried = False
        self._learner = Learner(self.spec, network or NumpyNetwork(self.spec.task.seed), state_dir)

    async def open(self) -> Genesis:
        await trio.lowlevel.checkpoint()
        return self._learner.open()

    async def train(self, round_: int, shard: int, shards: int, seed: bytes, steps: int = 0) -> TrainResult:
        training = self._learner.train(round_, shard, shards, seed, steps)
        self._is_hurried = False
        is_last: bool | None = None
        try:
            while True:
                if not is_last:
                    await trio.sleep(self.step_seconds)
                training.send(is_last)
                is_last = self._is_hurried
        except StopIteration as done:
            result: TrainResult = done.value
            return result
        finally:
            training.close()

    async def finish(self) -> None:
        await trio.lowlevel.checkpoint()
        self._is_hurried = True

    async def score(self, round_: int, payloads: Sequence[bytes], seed: bytes) -> Sequence[PayloadScore]:
        await trio.lowlevel.checkpoint()
        return self._learner.score(round_, payloads, seed)

    async def fold(self, round_: int, inputs: Sequence[FoldInput]) -> FoldResult:
        await trio.lowlevel.checkpoint()
        return self._learner.fold(round_, inputs)

    async def adopt(self, model_hash: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self._learner.adopt(model_hash)

    async def set_dense(self, vector: bytes) -> FoldResult:
        await trio.lowlevel.checkpoint()
        return self._learner.set_dense(vector)

    async def export(self) -> bytes:
        await trio.lowlevel.checkpoint()
        return self._learner.export()

    async def load(self, weights: bytes) -> bytes:
        await trio.lowlevel.checkpoint()
        return self._learner.load(weights)

    async def evaluate(self) -> Evaluation:
        await trio.lowlevel.checkpoint()
        return self._learner.evaluate()

    async def sample(self, length: int) -> str:
        await trio.lowlevel.checkpoint()
        return self._learner.sample(length)
