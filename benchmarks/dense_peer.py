"""One peer of dense training with hivemind, as benchmarks/utilisation.py starts it in a namespace.

Law: the same local steps as our peers make (the Learner, with averaging = "dense"), then the mean of everybody's
pseudo-gradient by DecentralizedAverager in fp16.  Its group is formed while it trains.  Prints JSON lines: its
address, a line a round, and at the end the seconds of the counted rounds.

    python benchmarks/dense_peer.py NUMBER PEERS HOST ROUNDS STEPS BATCH_SIZE [BOOTSTRAP]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hivemind
import numpy as np
import torch
from hivemind import compression

from benchmarks.swarm import PARAMETERS, build_spec

AVERAGE_SECONDS = 300.0
SEED = bytes(32)


def main(number: int, peers: int, host: str, rounds: int, steps: int, batch_size: int, bootstrap: list[str]) -> None:
    torch.set_num_threads(1)
    # Before anything of torch runs: both fork.
    dht = hivemind.DHT(initial_peers=bootstrap, host_maddrs=[f"/ip4/{host}/tcp/0"], start=True)
    averager = hivemind.DecentralizedAverager(
        [torch.zeros(PARAMETERS)],
        dht,
        prefix="utilisation",
        target_group_size=peers,
        min_group_size=peers,
        compression=compression.Float16Compression(),
        start=True,
    )
    say(address=next(str(a) for a in dht.get_visible_maddrs() if host in str(a)))
    train, wall, begin = 0.0, 0.0, 0.0
    learner = build_learner(rounds, steps, batch_size)
    for round_ in range(1, rounds + 1):
        control = averager.step(wait=False, require_trigger=True, timeout=AVERAGE_SECONDS)
        seconds, vector = take_steps(learner, round_, number - 1, peers)
        with averager.get_tensors() as tensors:
            tensors[0].numpy()[:] = np.frombuffer(vector, "<f4")
        control.allow_allreduce()
        group = control.result(timeout=AVERAGE_SECONDS)
        if len(group) != peers:
            raise RuntimeError(f"averaged {len(group)} of {peers}")
        with averager.get_tensors() as tensors:
            mean = tensors[0].numpy().astype("<f4").tobytes()
        learner.adopt(learner.set_dense(mean).model_hash)
        now = time.monotonic()
        if round_ > 1:
            train, wall = train + seconds, now - begin
        else:
            begin = now
        say(round=round_, train_seconds=seconds)
    say(train_seconds=train, wall_seconds=wall)
    sys.stdin.read()  # until all have finished: who leaves early takes its part of the network along


def build_learner(rounds: int, steps: int, batch_size: int) -> Any:
    from p2pflock.learning.learner import Learner
    from p2pflock.learning.network import TorchNetwork

    spec = build_spec(rounds, steps=steps, batch_size=batch_size, averaging="dense")
    learner = Learner(spec, TorchNetwork(spec))
    if learner.open().parameters != PARAMETERS:
        raise RuntimeError("benchmarks/swarm.py states another number of parameters")
    return learner


def take_steps(learner: Any, round_: int, shard: int, shards: int) -> tuple[float, bytes]:
    """(seconds in local steps, pseudo-gradient)."""
    first = end = 0.0
    training = learner.train(round_, shard, shards, SEED)
    while True:
        try:
            next(training)
        except StopIteration as done:
            # As learning/process.py counts: all steps like those after the first.
            result = done.value
            return (end - first) * result.steps / (result.steps - 1), result.payload
        end = time.monotonic()
        first = first or end


def say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    number_, peers_, host_, rounds_, steps_, batch_, *bootstrap_ = sys.argv[1:]
    main(int(number_), int(peers_), host_, int(rounds_), int(steps_), int(batch_), bootstrap_)
