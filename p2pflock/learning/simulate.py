"""A whole swarm's learning in one process: local steps, codec, fold and scores, without network or chain.

Law: it drives the same Learner as a peer does and prints what happened; it is for tuning a task and as
evidence that one learns.  All peers share one torch model, so its times are those of one peer after another.

    python -m p2pflock.learning.simulate mnist --peers 4 --rounds 12
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

import torch

from p2pflock.errors import FlockError, LocalProtocolError
from p2pflock.learning.learner import Learner
from p2pflock.learning.network import TorchNetwork
from p2pflock.learning.spec import TaskSpec, load_spec
from p2pflock.ports import FoldInput, TrainResult
from p2pflock.primitives import shuffle
from p2pflock.primitives.cid import CID


def train(learner: Learner, round_: int, shard: int, shards: int, seed: bytes) -> TrainResult:
    """All local steps of a round at once."""
    steps = learner.train(round_, shard, shards, seed)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            result: TrainResult = done.value
            return result


def simulate(spec: TaskSpec, peers: int, *, has_scores: bool = False, is_quiet: bool = False) -> list[dict[str, object]]:
    """Run every round of `spec` with `peers` peers; one row of figures per round.

    Raises LocalProtocolError if two peers ever hold different models.
    """
    network = TorchNetwork(spec)
    learners = [Learner(spec, network) for _ in range(peers)]
    print(f"{spec.task.name}: {network.layout.parameters:,} parameters, task {spec.task_id.hex()[:16]}", flush=True)
    rows: list[dict[str, object]] = []
    for round_ in range(1, spec.task.rounds + 1):
        seed = shuffle.derive(bytes(32), "simulation", spec.task.seed, round_)
        begin = time.perf_counter()
        results = [train(learner, round_, i, peers, seed) for i, learner in enumerate(learners)]
        trained = time.perf_counter()
        payloads = sorted((result.payload for result in results), key=CID.of_raw)
        samples = {result.payload: result.samples for result in results}
        inputs = [FoldInput(payload, samples[payload]) for payload in payloads]
        scores = learners[0].score(round_, payloads, seed) if has_scores else []
        scored = time.perf_counter()
        hashes = set()
        for learner in learners:
            folded = learner.fold(round_, inputs)
            learner.adopt(folded.model_hash)
            hashes.add(folded.model_hash)
        folded_at = time.perf_counter()
        if len(hashes) != 1:
            raise LocalProtocolError(f"round {round_}: peers hold {len(hashes)} different models")
        evaluation = learners[0].evaluate()
        row: dict[str, object] = {
            "round": round_,
            "train_loss": sum(result.loss_micro for result in results) / peers / 1e6,
            "test_loss": evaluation.loss_micro / 1e6,
            "accuracy": evaluation.accuracy_micro / 1e6,
            "payload_bytes": max(len(payload) for payload in payloads),
            "train_seconds": (trained - begin) / peers,
            "score_seconds": scored - trained,
            "fold_seconds": (folded_at - scored) / peers,
            "evaluate_seconds": time.perf_counter() - folded_at,
            "cosines": [score.cosine_micro / 1e6 for score in scores],
        }
        rows.append(row)
        if not is_quiet:
            print(json.dumps({key: _short(value) for key, value in row.items()}), flush=True)
    print(learners[0].sample(200))
    return rows


def _short(value: object) -> object:
    if isinstance(value, list):
        return [_short(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m p2pflock.learning.simulate", description=__doc__)
    parser.add_argument("task", help="a shipped task, or the path of a spec")
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scores", action="store_true", help="also score every payload")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        spec = load_spec(options.task)
        simulate(spec.with_rounds(options.rounds) if options.rounds else spec, options.peers, has_scores=options.scores)
    except FlockError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
