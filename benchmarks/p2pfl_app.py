"""p2pfl's side of benchmarks/with_p2pfl.py, run by the Python of p2pfl's own environment: its nodes on a given plan.

Law: p2pfl's own nodes, gossip, aggregation and gRPC on loopback, all nodes in one process, everyone connected to
everyone and in the training set of every round.  Counted are the bytes of every protobuf message that a node sends.
Only its learner is ours: the same network, optimizer and batches as the other systems, one node at a time.
Prints one JSON line per round: the accuracy of what node 0 aggregated.

    python benchmarks/p2pfl_app.py PLAN.json
"""

# ruff: noqa: E402 - importing p2pfl's node starts Ray unless a setting is changed before

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from p2pfl.settings import Settings

Settings.general.DISABLE_RAY = True  # before anything that would start it
Settings.general.LOG_DIR = "build/p2pfl-logs"

from p2pfl.communication.protocols.protobuff.grpc.client import GrpcClient
from p2pfl.learning.aggregators.fedavg import FedAvg
from p2pfl.learning.frameworks import Framework
from p2pfl.learning.frameworks.learner import Learner
from p2pfl.learning.frameworks.p2pfl_model import P2PFLModel
from p2pfl.management.logger import logger
from p2pfl.node import Node
from p2pfl.utils.utils import set_standalone_settings, wait_convergence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.methods import Peer
from benchmarks.mnist_peers import Plan, compute_accuracy, open_peers
from p2pflock.learning import shards
from p2pflock.learning.optimizers import build_optimizer

DEADLINE = 1500.0
ONE_AT_A_TIME = threading.Lock()  # the peers share one torch model


class Counter:
    """What all nodes send."""

    def __init__(self) -> None:
        self.bytes = 0
        self._lock = threading.Lock()
        send = GrpcClient.send

        def counted(client: Any, message: Any, *arguments: Any, **keywords: Any) -> Any:
            with self._lock:
                self.bytes += message.ByteSize()
            return send(client, message, *arguments, **keywords)

        GrpcClient.send = counted


class VectorModel(P2PFLModel):
    """A list of arrays, as the layout has them."""

    def get_parameters(self) -> list[np.ndarray]:
        return list(self.model)

    def set_parameters(self, params: list[np.ndarray] | bytes) -> None:
        if isinstance(params, bytes):
            params, info = self.decode_parameters(params)
            self.additional_info.update(info)
        self.model = [np.asarray(array, np.float32) for array in params]

    def get_framework(self) -> str:
        return str(Framework.PYTORCH.value)


class PartLearner(Learner):
    """Trains on one peer's part; `report` gets what a round starts from."""

    def __init__(self, plan: Plan, peer: Peer, report: Any = None) -> None:
        super().__init__()
        self.plan, self.peer, self.report = plan, peer, report
        self.round = 0

    def fit(self) -> P2PFLModel:
        with ONE_AT_A_TIME:
            return self._fit()

    def _fit(self) -> P2PFLModel:
        plan, network, local = self.plan, self.peer.network, self.plan.spec.local
        model = self.get_model()
        weights = np.concatenate([array.reshape(-1) for array in model.get_parameters()])
        if self.report and self.round:
            self.report(self.round, weights)
        self.round += 1
        samples = network.size("train")
        optimizer = build_optimizer(local, network.layout, network.hidden)
        steps = plan.local_steps or max(1, samples // local.batch_size)
        seed = plan.compute_seed(self.round)
        for batch in shards.compute_batches(seed, self.round, 0, 1, samples, steps, local.batch_size):
            _, gradient = network.gradient(weights, "train", batch, is_training=True)
            optimizer.step(weights, gradient, float(local.lr))
        model.set_parameters([view.copy() for view in network.layout.split(weights).values()])
        model.set_contribution([self.addr], samples)
        return model

    def interrupt_fit(self) -> None:
        pass

    def evaluate(self) -> dict[str, float]:
        return {}

    def get_framework(self) -> str:
        return str(Framework.PYTORCH.value)


class Part:
    """What p2pfl asks of a data set besides its samples."""

    dataset_name = "mnist"

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size


def main(path: str) -> int:
    torch.set_num_threads(1)
    set_standalone_settings()
    logger.set_level("ERROR")
    plan = Plan.read(path)
    peers = open_peers(plan)
    counter, done = Counter(), threading.Event()
    state: dict[str, float] = {}

    def report(round_: int, weights: Any) -> None:
        elapsed, sent = time.perf_counter() - state["begin"], counter.bytes
        accuracy = compute_accuracy(peers[0].network, weights)
        state["begin"] += time.perf_counter() - state["begin"] - elapsed  # evaluation is not counted
        row = {"round": round_, "accuracy": accuracy, "bytes": sent, "seconds": elapsed}
        print(json.dumps(row), flush=True)
        if accuracy >= plan.goal or round_ >= plan.rounds:
            done.set()

    layout, genesis = peers[0].network.layout, peers[0].network.genesis()
    nodes = [
        Node(
            VectorModel([view.copy() for view in layout.split(genesis).values()]),
            Part(plan.spec.local.batch_size),
            addr="127.0.0.1",
            learner=PartLearner(plan, peer, None if number else report),
            aggregator=FedAvg(),
        )
        for number, peer in enumerate(peers)
    ]
    for node in nodes:
        node.start()
    for number, node in enumerate(nodes):
        for other in nodes[:number]:
            node.connect(other.addr)
    wait_convergence(nodes, len(nodes) - 1, only_direct=True, wait=60)
    state["begin"], counter.bytes = time.perf_counter(), 0
    nodes[0].set_start_learning(rounds=plan.rounds + 1, epochs=1, trainset_size=len(nodes))
    is_done = done.wait(DEADLINE)
    sys.stdout.flush()
    os._exit(0 if is_done else 1)  # its threads do not all end when told to


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
