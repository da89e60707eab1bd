"""MNIST among peers whose digits are not evenly spread: one plan, read by every system that is compared.

Law: a plan fixes model, parts, batches and goal, so ours, Flower and p2pfl train on the same samples from the same
first weights.  It travels as JSON to processes of other Python environments.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.methods import Peer
from p2pflock.learning.codec import F32
from p2pflock.learning.learner import Network
from p2pflock.learning.network import TorchNetwork
from p2pflock.learning.partition import PrivateShard, draw_dirichlet
from p2pflock.learning.spec import TaskSpec
from p2pflock.learning.tasks import mnist
from p2pflock.primitives import shuffle

TEST_BATCH = 500


@dataclass(frozen=True)
class Plan:
    """What one run of one system does."""

    spec: TaskSpec  # model, seed, optimizer and batch size
    parts: Sequence[Sequence[int]]  # of the training split, one per peer
    rounds: int  # at most
    local_steps: int  # per round; 0 is one epoch
    goal: float  # accuracy on the test set at which a run ends

    def compute_seed(self, round_: int) -> bytes:
        return shuffle.derive(bytes(32), "simulation", self.spec.task.seed, round_)

    def write(self, path: Path) -> None:
        body = {
            "spec": self.spec.encode().hex(),
            "parts": [list(part) for part in self.parts],
            "rounds": self.rounds,
            "local_steps": self.local_steps,
            "goal": self.goal,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(body), encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        body = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(spec=TaskSpec.decode(bytes.fromhex(body.pop("spec"))), **body)


def draw_parts(peers: int, alpha: float, seed: int) -> list[list[int]]:
    data = mnist.load_data()
    labels = data.batch("train", range(data.size("train")))[1].tolist()
    return draw_dirichlet(labels, peers, alpha, seed)


def open_peers(plan: Plan) -> list[Peer]:
    network = TorchNetwork(plan.spec)
    return [Peer(PrivateShard(network, part), 0, 1) for part in plan.parts]


def compute_accuracy(network: Network, weights: F32) -> float:
    """On the whole test set."""
    size = network.size("test")
    batches = [range(begin, min(size, begin + TEST_BATCH)) for begin in range(0, size, TEST_BATCH)]
    return sum(network.loss(weights, "test", batch)[1] * len(batch) for batch in batches) / size
