"""Ways to train one model with the same samples: our peers, dense DiLoCo, one process with their joint batch.

Law: all three use the same networks, inner optimizer, schedule and batches; only what happens between rounds
differs.  Ours and DiLoCo drive the Learner that peers run.  Nothing here is tuned: that is the caller's spec.

DiLoCo: Douillard et al., arXiv 2311.08105: mean of the peers' deltas, outer SGD with Nesterov momentum.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from p2pflock.learning import checkpoint, shards
from p2pflock.learning.codec import F32
from p2pflock.learning.learner import Learner, Network
from p2pflock.learning.optimizers import build_optimizer, compute_lr
from p2pflock.learning.simulate import train
from p2pflock.learning.spec import TaskSpec
from p2pflock.ports import FoldInput, TrainResult
from p2pflock.primitives import shuffle
from p2pflock.primitives.cid import CID


@dataclass(frozen=True)
class Peer:
    """Whose samples: part `shard` of `shards` of this network's training split."""

    network: Network
    shard: int
    shards: int


@dataclass(frozen=True)
class Round:
    """After one round, which all peers finished with the same weights."""

    number: int
    weights: F32
    train_loss: float
    payload_bytes: float  # mean of what one peer hands to one other
    seconds: float  # of computing, when every peer has a core of its own


Method = Callable[[TaskSpec, Sequence[Peer]], Iterator[Round]]


def compute_seed(spec: TaskSpec, round_: int) -> bytes:
    """What the beacon would be: decides which samples a round uses."""
    return shuffle.derive(bytes(32), "simulation", spec.task.seed, round_)


def train_ours(spec: TaskSpec, peers: Sequence[Peer]) -> Iterator[Round]:
    """Codec, error feedback and fold, as every peer does them; every peer folds for itself."""
    learners = [Learner(spec, peer.network) for peer in peers]
    for number in range(1, spec.task.rounds + 1):
        begin = time.perf_counter()
        results = _train_locally(learners, peers, number, compute_seed(spec, number))
        payloads = sorted((result.payload for result in results), key=CID.of_raw)
        inputs = [FoldInput(payload, results[0].samples) for payload in payloads]
        hashes = set()
        for learner in learners:
            folded = learner.fold(number, inputs)
            learner.adopt(folded.model_hash)
            hashes.add(folded.model_hash)
        assert len(hashes) == 1, "peers hold different models"
        seconds = (time.perf_counter() - begin) / len(peers)
        yield _row(number, learners[0], results, seconds)


def train_diloco(
    spec: TaskSpec, peers: Sequence[Peer], outer_lr: float = 0.7, outer_momentum: float = 0.9
) -> Iterator[Round]:
    """Dense deltas; the inner optimizer's state stays with its peer between rounds, as ours does."""
    spec = replace(spec, averaging="dense")
    learners = [Learner(spec, peer.network) for peer in peers]
    velocity = np.zeros(peers[0].network.layout.parameters, np.float32)
    for number in range(1, spec.task.rounds + 1):
        begin = time.perf_counter()
        results = _train_locally(learners, peers, number, compute_seed(spec, number))
        mean = np.mean([np.frombuffer(result.payload, "<f4") for result in results], axis=0)
        velocity = np.float32(outer_momentum) * velocity + mean
        update = np.float32(outer_lr) * (mean + np.float32(outer_momentum) * velocity)
        for learner in learners:
            learner.adopt(learner.set_dense(update.astype("<f4", copy=False).tobytes()).model_hash)
        seconds = (time.perf_counter() - begin) / len(peers)
        yield _row(number, learners[0], results, seconds)


def train_alone(spec: TaskSpec, peers: Sequence[Peer]) -> Iterator[Round]:
    """One process: each step on all the samples that the peers would use in that step, so the batch is that
    many times larger.  The peers must share one network."""
    local, network = spec.local, peers[0].network
    weights = network.genesis()
    optimizer = build_optimizer(local, network.layout, network.hidden)
    limit = float(local.grad_clip)
    for number in range(1, spec.task.rounds + 1):
        seed = compute_seed(spec, number)
        cut = [
            shards.compute_batches(
                seed, number, peer.shard, peer.shards, network.size("train"), local.steps, local.batch_size
            )
            for peer in peers
        ]
        losses = []
        begin = time.perf_counter()
        for step, batches in enumerate(zip(*cut, strict=True)):
            loss, gradient = network.gradient(weights, "train", list(chain(*batches)), is_training=True)
            norm = float(np.linalg.norm(gradient))
            if limit and norm > limit:
                gradient *= np.float32(limit / norm)
            optimizer.step(weights, gradient, compute_lr(local, spec.task.rounds, number, step))
            losses.append(loss)
        yield Round(number, weights.copy(), float(np.mean(losses)), 0.0, time.perf_counter() - begin)


def _train_locally(
    learners: Sequence[Learner], peers: Sequence[Peer], number: int, seed: bytes
) -> list[TrainResult]:
    return [
        train(learner, number, peer.shard, peer.shards, seed)
        for learner, peer in zip(learners, peers, strict=True)
    ]


def _row(number: int, learner: Learner, results: Sequence[TrainResult], seconds: float) -> Round:
    return Round(
        number,
        checkpoint.from_bytes(learner.network.layout, learner.export()),
        float(np.mean([result.loss_micro for result in results])) / 1e6,
        float(np.mean([len(result.payload) for result in results])),
        seconds,
    )
