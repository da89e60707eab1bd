"""Flower's side of benchmarks/flower.py, run by the Python of Flower's own environment: FedAvg on a given plan.

Law: Flower's own strategy, server loop, ClientApp and message encoding; only the transport is replaced, by one that
hands the encoded bytes over within the process.  So every byte counted is one that Flower serialises, and HTTP,
TCP and its task processes cost it nothing here.  The clients train with the same network, optimizer code and
batches as ours; a client's optimizer begins anew each round, as FedAvg has it.  Prints one JSON line per round.

    python benchmarks/flower_app.py PLAN.json
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.methods import Peer
from benchmarks.mnist_peers import Plan, compute_accuracy, open_peers
from p2pflock.learning import shards
from p2pflock.learning.checkpoint import Layout
from p2pflock.learning.codec import F32
from p2pflock.learning.optimizers import build_optimizer


class GoalReachedError(Exception):
    """Ends Flower's server loop, which knows rounds only."""


def to_record(layout: Layout, weights: F32) -> ArrayRecord:
    """As a Flower app sends a model: its state_dict, tensor by tensor."""
    return ArrayRecord({name: torch.from_numpy(view) for name, view in layout.split(weights).items()})


def from_record(layout: Layout, record: ArrayRecord) -> F32:
    tensors = record.to_torch_state_dict()
    return np.concatenate([tensors[tensor.name].numpy().reshape(-1) for tensor in layout.tensors])


class Clients(Grid):
    """Every client of one process behind Flower's Grid; counts what is encoded."""

    def __init__(self, apps: dict[int, ClientApp]) -> None:
        self.apps = apps
        self.sent_bytes = 0
        self.client_seconds = 0.0

    def get_node_ids(self) -> Iterable[int]:
        return list(self.apps)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return [self._call(message) for message in messages]

    def _call(self, message: Message) -> Message:
        begin = time.perf_counter()
        node = message.metadata.dst_node_id
        message.metadata.__dict__["_message_id"] = str(uuid.uuid4())  # what a SuperLink would set
        context = Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})
        reply = self._carry(self.apps[node](self._carry(message), context))
        self.client_seconds += time.perf_counter() - begin
        return reply

    def _carry(self, message: Message) -> Message:
        wire = message_to_proto(message).SerializeToString()
        self.sent_bytes += len(wire)
        return message_from_proto(ProtoMessage.FromString(wire))

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *arguments: Any, **keywords: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError


def build_client(plan: Plan, peer: Peer) -> ClientApp:
    """One client with its own part; `local_steps` 0 is one epoch."""
    local, layout = plan.spec.local, peer.network.layout
    samples = peer.network.size("train")
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        round_ = int(message.content["config"]["server-round"])
        weights = from_record(layout, message.content["arrays"])
        optimizer = build_optimizer(local, layout, peer.network.hidden)
        steps = plan.local_steps or max(1, samples // local.batch_size)
        seed = plan.compute_seed(round_)
        for batch in shards.compute_batches(seed, round_, 0, 1, samples, steps, local.batch_size):
            _, gradient = peer.network.gradient(weights, "train", batch, is_training=True)
            optimizer.step(weights, gradient, float(local.lr))
        content = RecordDict(
            {
                "arrays": to_record(layout, weights),
                "metrics": MetricRecord({"num-examples": samples, "trained": steps * local.batch_size}),
            }
        )
        return Message(content, reply_to=message)

    return app


def main(path: str) -> int:
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    plan = Plan.read(path)
    peers = open_peers(plan)
    grid = Clients({number: build_client(plan, peer) for number, peer in enumerate(peers, 2)})
    network = peers[0].network
    state = {"at": time.perf_counter(), "clients": 0.0, "seconds": 0.0}

    def evaluate(round_: int, arrays: ArrayRecord) -> MetricRecord | None:
        elapsed = time.perf_counter() - state["at"]
        if round_:
            clients = grid.client_seconds - state["clients"]
            accuracy = compute_accuracy(network, from_record(network.layout, arrays))
            # Every client has a core of its own; the server's work comes on top.
            state["seconds"] += elapsed - clients + clients / len(plan.parts)
            row = {"round": round_, "accuracy": accuracy, "bytes": grid.sent_bytes, "seconds": state["seconds"]}
            print(json.dumps(row), flush=True)
            if accuracy >= plan.goal:
                raise GoalReachedError
        state["clients"], state["at"] = grid.client_seconds, time.perf_counter()
        return None

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # as in a server's task process
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=len(plan.parts), min_available_nodes=len(plan.parts))
    with contextlib.suppress(GoalReachedError):
        strategy.start(grid, to_record(network.layout, network.genesis()), num_rounds=plan.rounds, evaluate_fn=evaluate)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
