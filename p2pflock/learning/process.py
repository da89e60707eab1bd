"""The learning process: a Learner over torch behind a framed pipe.  Run as a child, never by hand.

Law: this file translates frames to Learner calls and back.  Calls run one after another in the main thread;
a cancelled `train` stops between two steps and leaves no trace, a hurried one ends there with its result.  The process holds no key and no socket.

Config frame: spec (canonical bytes), state_dir (text, "" for none), threads, trusted_modules (list of text), device.
Event `progress`: {"round", "step", "steps", "loss_micro"}.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from p2pflock.errors import LocalProtocolError
from p2pflock.learning import scoring
from p2pflock.learning.learner import Learner
from p2pflock.learning.spec import TaskSpec
from p2pflock.ports import FoldInput
from p2pflock.processes import Cancelled_, CancelToken, Emit, ThreadedHandler, serve_threaded

PROGRESS_SECONDS = 0.2  # between two progress events; the last step always has one


def setup(config: dict[str, Any], emit: Emit) -> Mapping[str, ThreadedHandler]:
    """Handlers by method name.  torch is imported here, so that a bad spec fails before that takes seconds."""
    spec = TaskSpec.decode(config["spec"])
    return _Service(spec, config, emit).handlers()


class _Service:
    def __init__(self, spec: TaskSpec, config: dict[str, Any], emit: Emit) -> None:
        self._spec = spec
        self._config = config
        self._emit = emit
        self._opened: Learner | None = None

    def handlers(self) -> dict[str, ThreadedHandler]:
        return {
            "open": self.open,
            "train": self.train,
            "score": self.score,
            "fold": self.fold,
            "adopt": lambda params, _: self._learner.adopt(params["model_hash"]),
            "set_dense": self.set_dense,
            "export": lambda _params, _: self._learner.export(),
            "load": lambda params, _: self._learner.load(params["weights"]),
            "evaluate": self.evaluate,
            "sample": lambda params, _: self._learner.sample(params["length"]),
        }

    @property
    def _learner(self) -> Learner:
        if self._opened is None:
            raise LocalProtocolError("the trainer was not opened")
        return self._opened

    def open(self, _params: dict[str, Any], _token: CancelToken) -> dict[str, Any]:
        if self._opened is None:
            import torch

            from p2pflock.learning.network import TorchNetwork

            torch.set_num_threads(self._config["threads"])
            network = TorchNetwork(self._spec, self._config["trusted_modules"], self._config["device"])
            state_dir = self._config["state_dir"]
            self._opened = Learner(self._spec, network, Path(state_dir) if state_dir else None)
        genesis = self._opened.open()
        return {
            "model_hash": genesis.model_hash,
            "weights": genesis.weights.to_bytes(),
            "parameters": genesis.parameters,
        }

    def train(self, params: dict[str, Any], token: CancelToken) -> dict[str, Any]:
        total, reported = params["steps"] or self._spec.local.steps, 0.0
        steps = self._learner.train(params["round"], params["shard"], params["shards"], params["seed"], total)
        is_last: bool | None = None  # what a generator that has not begun takes
        first = ended = 0.0  # when the first and the last step ended
        while True:
            if token.cancelled:
                steps.close()
                raise Cancelled_
            try:
                step, loss = steps.send(is_last)
            except StopIteration as done:
                result = done.value
                fields = {name: getattr(result, name) for name in result.__slots__}
                # What comes before the first step is not known apart from it, so that one counts like the others.
                share = result.steps / (result.steps - 1) if result.steps > 1 else 0.0
                return {**fields, "step_micros": int(1e6 * (ended - first) * share)}
            ended = time.monotonic()
            first = first or ended
            is_last = token.hurried
            if step == total or is_last or time.monotonic() - reported >= PROGRESS_SECONDS:
                reported = time.monotonic()
                progress = {"round": params["round"], "step": step, "steps": total}
                self._emit("progress", {**progress, "loss_micro": scoring.to_micro(loss)})

    def score(self, params: dict[str, Any], _token: CancelToken) -> list[list[Any]]:
        scores = self._learner.score(params["round"], params["payloads"], params["seed"])
        return [[score.is_valid, score.cosine_micro, score.loss_delta_micro] for score in scores]

    def fold(self, params: dict[str, Any], _token: CancelToken) -> list[bytes]:
        inputs = [FoldInput(payload, weight) for payload, weight in params["inputs"]]
        result = self._learner.fold(params["round"], inputs)
        return [result.model_hash, result.weights.to_bytes()]

    def set_dense(self, params: dict[str, Any], _token: CancelToken) -> list[bytes]:
        result = self._learner.set_dense(params["vector"])
        return [result.model_hash, result.weights.to_bytes()]

    def evaluate(self, _params: dict[str, Any], _token: CancelToken) -> list[int]:
        result = self._learner.evaluate()
        return [result.loss_micro, result.accuracy_micro, result.samples]


if __name__ == "__main__":
    serve_threaded(setup)
