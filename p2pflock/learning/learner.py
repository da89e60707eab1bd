"""One peer's learning: local steps, fold, scores, and the checkpoint they act on.

Law: the same Learner runs over a torch model (network.py) and over the numpy model of the test kit, so what
the simulations exercise is what ships.  It reads no clock and no network; the only file it writes is its
own state.  The checkpoint changes in `adopt` and `load` alone.  `train` is a generator that a caller may drop
between two steps: nothing has happened then.

Trainer-local state is the inner optimizer and the error feedback.  It is saved together with what it was before,
so that training the same round again, say after a crash, gives the same payload and not a second one for the same
slot.  It is saved before a result is returned, or, where it is large, soon after: a crash in between repeats the
round's payload, or, once the node has published that, costs what one round's error feedback is worth.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from p2pflock.errors import InvalidMessageError, LocalProtocolError, SpecError
from p2pflock.learning import checkpoint, codec, compiled, fold, scoring, shards
from p2pflock.learning.checkpoint import Layout
from p2pflock.learning.codec import F32, Shape, Sparse
from p2pflock.learning.dataset import Split
from p2pflock.learning.optimizers import Optimizer, build_optimizer, compute_lr, compute_state_hash
from p2pflock.learning.spec import TaskSpec
from p2pflock.learning.state import LocalState, StateFile
from p2pflock.ports import Evaluation, FoldInput, FoldResult, Genesis, PayloadScore, TrainResult
from p2pflock.primitives import merkle, shuffle

MAX_CANDIDATES = 8  # folds kept until one is adopted: one per view of a disputed round
EVALUATION_BATCH = 500
# A peer that trained last longer ago starts with an empty error feedback: what it kept belongs to other weights.
# Absences of up to five rounds were measured, and keeping it was never worse (docs/design.md, Absences).
MAX_FEEDBACK_AGE_ROUNDS = 6


class Network(Protocol):
    """A model and its data: everything that needs a framework.  Vectors are (parameters,) float32."""

    @property
    def layout(self) -> Layout: ...

    @property
    def hidden(self) -> frozenset[str]:
        """Names of the tensors between input and output layer that are linear maps: what Muon is for."""
        ...

    def genesis(self) -> F32: ...

    def size(self, split: Split) -> int: ...

    def begin(self, seed: bytes) -> None:
        """Seed whatever randomness the model itself uses (dropout)."""
        ...

    def gradient(
        self, weights: F32, split: Split, indices: Sequence[int], *, is_training: bool
    ) -> tuple[float, F32]:
        """Mean loss of a batch and its gradient, a fresh vector."""
        ...

    def loss(self, weights: F32, split: Split, indices: Sequence[int]) -> tuple[float, float]:
        """(mean loss, accuracy in [0, 1] or 0 where there is none) of a batch."""
        ...

    def sample(self, weights: F32, length: int) -> str: ...


class Learner:
    """See the head of the file.  Create, then `open`."""

    def __init__(self, spec: TaskSpec, network: Network, state_dir: Path | None = None) -> None:
        self.spec = spec
        self.network = network
        self._layout = network.layout
        self._size = network.layout.parameters
        compiled.find(self._size)  # a first use compiles for seconds: not within a round
        self._rule = fold.FoldRule(
            floor_divisor=spec.fold.floor_divisor,
            gain=float(spec.fold.gain),
            norm_bound=float(spec.fold.norm_bound),
            is_clipped=spec.fold.clip == "median",
        )
        self._weights = network.genesis()
        self._model_hash = checkpoint.compute_model_hash(self.export())
        self._genesis = Genesis(
            self._model_hash, checkpoint.compute_weights_cid(self.export()), self._size
        )
        self._candidates: OrderedDict[bytes, F32] = OrderedDict()
        self._evaluation: tuple[bytes, Evaluation] | None = None
        self._yardstick: tuple[bytes, scoring.Yardstick] | None = None  # of this checkpoint, by its seed
        self._optimizer: tuple[bytes, Optimizer] | None = None  # as it is after training, and its state then
        self._file = StateFile(state_dir, spec.task_id, self._size) if state_dir else None
        self._state = (self._file.read() if self._file else None) or LocalState.fresh()

    def open(self) -> Genesis:
        return self._genesis

    @property
    def weights(self) -> F32:
        """The checkpoint, (parameters,); not to be written to."""
        return self._weights

    # --- local steps ------------------------------------------------------------------------------------
    def train(
        self, round_: int, shard: int, count: int, seed: bytes, steps: int = 0
    ) -> Generator[tuple[int, float], bool | None, TrainResult]:
        """Local steps; yields (steps done, loss) after each.  Sending True there ends the training: the steps
        made so far are the contribution.

        Args:
            steps: H of this round; 0 is the spec's.

        Raises:
            SpecError: the training diverged.
            LocalProtocolError: more steps than the spec allows.
        """
        local = self.spec.local
        wanted = steps or local.steps
        if not 1 <= wanted <= local.most_steps:
            raise LocalProtocolError(f"{wanted} local steps, at most {local.most_steps}")
        before = self._state_before(round_)
        optimizer = self._take_optimizer(before.optimizer)
        self.network.begin(shuffle.derive(seed, "model randomness", round_, shard))
        batches = shards.compute_batches(
            seed, round_, shard, count, self.network.size("train"), wanted, local.batch_size
        )
        weights = self._weights.copy()
        losses: list[float] = []
        leaves: list[bytes] = []
        for made, batch in enumerate(batches, 1):
            loss, gradient = self.network.gradient(weights, "train", batch, is_training=True)
            _clip_gradient(gradient, float(local.grad_clip))
            optimizer.step(weights, gradient, compute_lr(local, self.spec.task.rounds, round_, made - 1))
            losses.append(loss)
            if made % local.leaf_steps == 0:
                leaves.append(_compute_leaf(weights))
            if (yield made, loss):
                break
        made = len(losses)
        if made % local.leaf_steps:
            leaves.append(_compute_leaf(weights))  # the last leaf is always where the steps ended
        delta = self._weights - weights
        if not np.isfinite(delta).all():
            raise SpecError(f"training diverged in round {round_}", "lower local.lr or set local.grad_clip")
        payload, feedback = self._compress(round_, delta, before)
        optimizer_state = optimizer.state()
        self._optimizer = optimizer_state, optimizer
        self._state = LocalState(round_, before.optimizer, before.feedback, optimizer_state, feedback)
        if self._file:
            self._file.write(self._state)
        return TrainResult(
            payload=payload,
            steps=made,
            samples=made * local.batch_size,
            loss_micro=scoring.to_micro(float(np.mean(losses))),
            leaf_root=merkle.sha256_root(leaves),
            optimizer_hash=compute_state_hash(optimizer_state),
        )

    def _take_optimizer(self, state: bytes) -> Optimizer:
        """An optimizer in this state; empty: a fresh one.  The one of the round before is in it already."""
        kept, self._optimizer = self._optimizer, None  # a training that is dropped leaves it half-way
        if kept is not None and kept[0] is state:
            return kept[1]
        optimizer = build_optimizer(self.spec.local, self._layout, self.network.hidden)
        if state:
            optimizer.restore(state)
        return optimizer

    def _state_before(self, round_: int) -> _Before:
        state = self._state
        if round_ == state.round:  # once more, say after a crash: from the same state to the same payload
            return _Before(state.optimizer_before, state.feedback_before)
        if round_ < state.round:  # history begins anew: what we kept belongs to another one
            return _Before(b"", b"")
        is_recent = round_ - state.round <= MAX_FEEDBACK_AGE_ROUNDS
        return _Before(state.optimizer, state.feedback if is_recent else b"")

    def _compress(self, round_: int, delta: F32, before: _Before) -> tuple[bytes, bytes]:
        """(payload, error feedback to keep)."""
        if self.spec.averaging == "dense":
            return delta.astype("<f4", copy=False).tobytes(), b""
        kept = (
            np.frombuffer(before.feedback, "<f4").astype(np.float32)
            if before.feedback
            else np.zeros(self._size, np.float32)
        )
        payload, feedback = codec.compress_with_feedback(
            delta, kept, float(self.spec.codec.beta), self.shape(round_)
        )
        return payload, feedback.astype("<f4", copy=False).tobytes()

    def shape(self, round_: int) -> Shape:
        """What payloads of this round look like."""
        section = self.spec.codec
        if section.name == "int8":
            return Shape(self._size, section.chunk, section.chunk, is_dense=True)
        k = section.k_start if round_ <= section.start_rounds else section.k
        return Shape(self._size, section.chunk, k)

    # --- judging and folding ----------------------------------------------------------------------------
    def score(self, round_: int, payloads: Sequence[bytes], seed: bytes) -> list[PayloadScore]:
        yardstick = self._get_yardstick(seed)
        return [yardstick.score(self._decode_or_none(round_, payload)) for payload in payloads]

    def _get_yardstick(self, seed: bytes) -> scoring.Yardstick:
        """Kept for the next payloads of the same round: a gradient costs as much as several scores."""
        if self._yardstick is None or self._yardstick[0] != seed:
            section, pool = self.spec.scoring, self.network.size("public")
            batch = shards.compute_public(seed, "public batch", pool, section.batch_size)
            held_out = shards.compute_public(seed, "held out", pool, section.held_out)
            _, gradient = self.network.gradient(self._weights, "public", batch, is_training=False)
            made = scoring.Yardstick(
                self._weights, gradient, lambda weights: self.network.loss(weights, "public", held_out)[0]
            )
            self._yardstick = seed, made
        return self._yardstick[1]

    def _decode_or_none(self, round_: int, payload: bytes) -> Sparse | F32 | None:
        try:
            if self.spec.averaging == "dense":
                return self._decode_dense(payload)
            return codec.decode(payload, self.shape(round_))
        except InvalidMessageError:
            return None

    def _decode_dense(self, vector: bytes) -> F32:
        if len(vector) != 4 * self._size:
            raise InvalidMessageError(f"dense vector: {len(vector)} bytes, expected {4 * self._size}")
        values = np.frombuffer(vector, "<f4").astype(np.float32)
        if not np.isfinite(values).all():
            raise InvalidMessageError("dense vector: not finite")
        return values

    def fold(self, round_: int, inputs: Sequence[FoldInput]) -> FoldResult:
        """Raises InvalidMessageError when a payload does not decode; the checkpoint stays."""
        if self.spec.averaging == "dense" and inputs:
            raise LocalProtocolError("a dense task has no payloads to fold", "use set_dense")
        shape = self.shape(round_)
        weighted = [fold.Weighted(codec.decode(entry.payload, shape), entry.weight) for entry in inputs]
        return self._propose(fold.fold(self._rule, self._weights, weighted))

    def set_dense(self, vector: bytes) -> FoldResult:
        """Candidate = checkpoint - vector.  Raises InvalidMessageError."""
        result = self._weights - self._decode_dense(vector)
        if not np.isfinite(result).all():
            raise InvalidMessageError("dense vector: the result is not finite")
        return self._propose(result)

    def _propose(self, weights: F32) -> FoldResult:
        data = checkpoint.to_bytes(self._layout, weights)
        model_hash = checkpoint.compute_model_hash(data)
        self._candidates[model_hash] = weights
        self._candidates.move_to_end(model_hash)
        while len(self._candidates) > MAX_CANDIDATES:
            self._candidates.popitem(last=False)
        return FoldResult(model_hash, checkpoint.compute_weights_cid(data))

    def adopt(self, model_hash: bytes) -> None:
        """Raises LocalProtocolError when no recent fold has this hash."""
        if model_hash != self._model_hash:
            if model_hash not in self._candidates:
                raise LocalProtocolError(f"no fold with model hash {model_hash.hex()[:16]}")
            self._weights, self._model_hash = self._candidates[model_hash], model_hash
        self._candidates.clear()
        self._yardstick = None

    # --- the checkpoint ---------------------------------------------------------------------------------
    def export(self) -> bytes:
        return checkpoint.to_bytes(self._layout, self._weights)

    def load(self, weights: bytes) -> bytes:
        """Raises InvalidMessageError; the checkpoint stays."""
        self._weights = checkpoint.from_bytes(self._layout, weights)
        self._model_hash = checkpoint.compute_model_hash(weights)
        self._candidates.clear()
        self._yardstick = None
        return self._model_hash

    def evaluate(self) -> Evaluation:
        if self._evaluation is None or self._evaluation[0] != self._model_hash:
            self._evaluation = self._model_hash, self._evaluate()
        return self._evaluation[1]

    def _evaluate(self) -> Evaluation:
        size = self.network.size("test")
        loss = accuracy = 0.0
        for begin in range(0, size, EVALUATION_BATCH):
            indices = range(begin, min(size, begin + EVALUATION_BATCH))
            batch_loss, batch_accuracy = self.network.loss(self._weights, "test", indices)
            loss += batch_loss * len(indices)
            accuracy += batch_accuracy * len(indices)
        return Evaluation(
            scoring.to_micro(loss / size), scoring.to_micro(accuracy / size, scoring.MICRO), size
        )

    def sample(self, length: int) -> str:
        return self.network.sample(self._weights, length)


class _Before:
    __slots__ = ("feedback", "optimizer")

    def __init__(self, optimizer: bytes, feedback: bytes) -> None:
        self.optimizer, self.feedback = optimizer, feedback


def _compute_leaf(weights: F32) -> bytes:
    """32 bytes: a leaf of the Merkle tree over the weights every J steps."""
    return hashlib.sha256(weights.astype("<f4", copy=False).tobytes()).digest()


def _clip_gradient(gradient: F32, limit: float) -> None:
    if limit:
        norm = float(np.linalg.norm(gradient))
        if norm > limit:
            gradient *= np.float32(limit / norm)
