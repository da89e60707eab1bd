"""The Trainer port, spoken to a learning process over its pipe.

Law: a thin translation; it imports no torch.  Several calls may wait at once, the process answers in order.
Cancelling `train` tells the process to stop between two steps; the call itself returns at once.  `finish` tells it
to end there with a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio

from p2pflock.learning.spec import TaskSpec
from p2pflock.ports import Evaluation, FoldInput, FoldResult, Genesis, PayloadScore, TrainResult
from p2pflock.primitives.cid import CID
from p2pflock.processes import Child

MODULE = "p2pflock.learning.process"


class TrainerProcess:
    """A running learning process.  Create with `start`, end with `aclose`."""

    def __init__(self, child: Child) -> None:
        self._child = child

    @classmethod
    async def start(
        cls,
        nursery: trio.Nursery,
        spec: TaskSpec,
        *,
        state_dir: Path | None = None,
        threads: int = 1,
        device: str = "auto",
        trusted_modules: Sequence[str] = (),
        ready_seconds: float = 120.0,
        stderr_path: Path | None = None,
    ) -> TrainerProcess:
        """Start the process; nothing is imported or loaded before `open`.

        Args:
            nursery: owns the tasks that read the pipe.
            spec: what to train.
            state_dir: where optimizer state and error feedback survive a restart; None keeps them in memory.
            threads: torch threads of this process.
            device: "auto" (the GPU where there is one), "cpu" or "cuda"; refused by `open` if it is not there.
            trusted_modules: code outside the shipped tasks that the spec may name; the user's decision.
            ready_seconds: how long it may take to come up.
            stderr_path: a log file for what the process writes to stderr.

        Raises:
            StartupError: it did not come up.
        """
        config: dict[str, object] = {
            "spec": spec.encode(),
            "state_dir": str(state_dir) if state_dir else "",
            "threads": threads,
            "device": device,
            "trusted_modules": list(trusted_modules),
        }
        # torch starts its thread pools when it is imported
        env = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        child = await Child.start(
            nursery,
            MODULE,
            config,
            name="trainer",
            ready_seconds=ready_seconds,
            stderr_path=stderr_path,
            env=env,
        )
        return cls(child)

    @property
    def child(self) -> Child:
        """The process, for whoever watches over it."""
        return self._child

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def alive(self) -> bool:
        return self._child.alive

    def events(self) -> trio.MemoryReceiveChannel[tuple[str, Any]]:
        """("progress", {"round", "step", "steps", "loss_micro"}) while training; old ones are dropped."""
        return self._child.events()

    async def aclose(self) -> None:
        await self._child.aclose()

    # --- the port ---------------------------------------------------------------------------------------
    async def open(self) -> Genesis:
        reply = await self._child.call("open", {})
        return Genesis(reply["model_hash"], CID.from_bytes(reply["weights"]), reply["parameters"])

    async def train(self, round_: int, shard: int, shards: int, seed: bytes, steps: int = 0) -> TrainResult:
        reply = await self._child.call(
            "train", {"round": round_, "shard": shard, "shards": shards, "seed": seed, "steps": steps}
        )
        return TrainResult(**reply)

    async def finish(self) -> None:
        await self._child.hurry("train")

    async def score(self, round_: int, payloads: Sequence[bytes], seed: bytes) -> Sequence[PayloadScore]:
        reply = await self._child.call(
            "score", {"round": round_, "payloads": list(payloads), "seed": seed}
        )
        return [PayloadScore(*line) for line in reply]

    async def fold(self, round_: int, inputs: Sequence[FoldInput]) -> FoldResult:
        pairs = [[entry.payload, entry.weight] for entry in inputs]
        return _fold_result(await self._child.call("fold", {"round": round_, "inputs": pairs}))

    async def adopt(self, model_hash: bytes) -> None:
        await self._child.call("adopt", {"model_hash": model_hash})

    async def set_dense(self, vector: bytes) -> FoldResult:
        return _fold_result(await self._child.call("set_dense", {"vector": vector}))

    async def export(self) -> bytes:
        weights: bytes = await self._child.call("export", {})
        return weights

    async def load(self, weights: bytes) -> bytes:
        model_hash: bytes = await self._child.call("load", {"weights": weights})
        return model_hash

    async def evaluate(self) -> Evaluation:
        return Evaluation(*await self._child.call("evaluate", {}))

    async def sample(self, length: int) -> str:
        text: str = await self._child.call("sample", {"length": length})
        return text


def _fold_result(reply: Any) -> FoldResult:
    model_hash, weights = reply
    return FoldResult(model_hash, CID.from_bytes(weights))
