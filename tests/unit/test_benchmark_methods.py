"""The three methods that bench-quality compares are what they say: checked where they must coincide."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import methods
from p2pflock.learning.network import TorchNetwork
from p2pflock.learning.spec import TaskSpec
from p2pflock.testing import tiny_task


@pytest.fixture(scope="module")
def network() -> TorchNetwork:
    return TorchNetwork(_spec(), [tiny_task.MODULE])


def _spec(steps: int = 5) -> TaskSpec:
    return tiny_task.build_spec(rounds=4, steps=steps)


def _peers(network: TorchNetwork, count: int) -> list[methods.Peer]:
    return [methods.Peer(network, shard, count) for shard in range(count)]


def test_one_diloco_peer_without_outer_momentum_is_one_process(network) -> None:
    peers = _peers(network, 1)
    alone = list(methods.train_alone(_spec(), peers))
    dense = list(methods.train_diloco(_spec(), peers, outer_lr=1.0, outer_momentum=0.0))
    for one, other in zip(alone, dense, strict=True):
        np.testing.assert_allclose(other.weights, one.weights, atol=1e-5)


def test_plain_descent_one_step_a_round_is_the_joint_batch(network) -> None:
    """The mean of four peers' gradients is the gradient of their batches together."""
    spec = _spec(steps=1)
    spec = replace(spec, local=replace(spec.local, optimizer="sgd", momentum=spec.local.weight_decay))
    peers = _peers(network, 4)
    alone = list(methods.train_alone(spec, peers))
    dense = list(methods.train_diloco(spec, peers, outer_lr=1.0, outer_momentum=0.0))
    for one, other in zip(alone, dense, strict=True):
        np.testing.assert_allclose(other.weights, one.weights, atol=1e-5)


def test_outer_momentum_carries_on(network) -> None:
    """A heavy ball that remembers everything goes further than the mean alone."""
    peers = _peers(network, 2)
    plain, heavy = (
        list(methods.train_diloco(_spec(), peers, outer_lr=0.5, outer_momentum=momentum)) for momentum in (0.0, 0.9)
    )
    start = network.genesis()
    # Round 1: Nesterov's step is 1 + momentum times the plain one.
    np.testing.assert_allclose(heavy[0].weights - start, 1.9 * (plain[0].weights - start), atol=1e-5)


def test_ours_sends_less_and_learns(network) -> None:
    rounds = list(methods.train_ours(_spec(), _peers(network, 4)))
    dense = list(methods.train_diloco(_spec(), _peers(network, 4)))
    assert rounds[-1].payload_bytes < dense[-1].payload_bytes
    assert rounds[-1].train_loss < rounds[0].train_loss
