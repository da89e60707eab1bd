"""Byzantine trainers against a short run of MNIST: with the gate it learns, without it does not.  The whole suite of
attacks, at length and with its figures, is `make bench-attacks`."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
import torch

from p2pflock.learning import codec, scoring
from p2pflock.learning.network import TorchNetwork
from p2pflock.learning.partition import draw_dirichlet
from p2pflock.learning.spec import load_spec
from p2pflock.protocol import gate
from p2pflock.protocol.messages import Judgement
from p2pflock.testing.attackers import ATTACKS, Triggered, View, densify
from p2pflock.testing.byzantine_swarm import ByzantineSwarm, Setup

PEERS, ATTACKERS, ROUNDS = 10, 3, 10


@pytest.fixture(scope="module")
def spec():
    spec = load_spec("mnist")
    return replace(
        spec,
        task=replace(spec.task, rounds=ROUNDS),
        model=replace(spec.model, arguments={"channels": 8, "hidden": 32}),
        local=replace(spec.local, steps=12, batch_size=16, lr=Decimal("0.005"), final_lr_fraction=Decimal("0.1")),
        codec=replace(spec.codec, k=256),
        scoring=replace(spec.scoring, batch_size=128, held_out=4),
    )


@pytest.fixture(scope="module")
def network(spec):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # batches this small only wait for one another
    yield TorchNetwork(spec)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def parts(network):
    _, labels = network.data.batch("train", range(network.size("train")))
    return draw_dirichlet(labels.tolist(), PEERS, 0.3, 1)


def play(spec, network, parts, attack, rounds=ROUNDS, **rule):
    swarm = ByzantineSwarm(Setup(spec, parts, ATTACKERS, ATTACKS[attack], validators=5, seed=1, **rule), network)
    return swarm, [swarm.step() for _ in range(rounds)]


def test_flipped_signs_are_gated_and_the_swarm_learns(spec, network, parts):
    swarm, rounds = play(spec, network, parts, "sign flip x1")
    assert swarm.evaluate().accuracy_micro > 800_000
    for figures in rounds:
        assert [figures.judgements[seat] for seat in swarm.attacks] == [Judgement.GATED] * ATTACKERS
    honest = [figures.judgements[seat] for figures in rounds for seat in swarm.honest]
    assert honest.count(Judgement.ACCEPTED) > 0.75 * len(honest)


def test_without_the_gate_it_does_not(spec, network, parts):
    """So the test above measures the gate and not the task."""
    swarm, _ = play(
        spec, network, parts, "sign flip x1", rule=lambda _, before: gate.Outcome(frozenset(), tuple(before))
    )
    assert swarm.evaluate().accuracy_micro < 760_000


def test_what_is_no_number_never_gets_in(spec, network, parts):
    swarm, rounds = play(spec, network, parts, "NaN", rounds=2)
    assert all(seat not in figures.judgements for figures in rounds for seat in swarm.attacks)
    assert len(rounds[-1].judgements) == PEERS - ATTACKERS


@pytest.mark.parametrize("name", set(ATTACKS) - {"NaN", "copy"})
def test_every_attack_sends_what_decodes_and_no_two_the_same(name):
    """Otherwise the codec, or the rule for copies, would bear what the gate is measured on."""
    shape = codec.Shape(500, 128, 16)
    vectors = np.random.default_rng(1).standard_normal((6, 500)).astype(np.float32)
    honest = [codec.compress(vector, shape) for vector in vectors]
    sent = []
    for seat in (8, 9):
        view = View(
            round=6, seat=seat, shape=shape, weights=vectors[0], honest=honest[:4], own=honest[seat - 4], attackers=2,
            private=np.random.default_rng(seat), common=np.random.default_rng(0),
            public_gradient=lambda: vectors[1],
        )  # fmt: skip
        sent.append(ATTACKS[name]().forge(view))
        assert np.isfinite(densify(codec.decode(sent[-1], shape))).all()
    assert sent[0] != sent[1]


def test_who_knows_the_public_gradient_has_the_cosine_it_wants():
    shape = codec.Shape(4096, 4096, 1024)
    vectors = np.random.default_rng(1).standard_normal((3, 4096)).astype(np.float32)
    own = codec.compress(vectors[0], shape)
    view = View(
        round=1, seat=8, shape=shape, weights=vectors[2], honest=[own], own=own, attackers=1,
        private=np.random.default_rng(8), common=np.random.default_rng(0), public_gradient=lambda: vectors[1],
    )  # fmt: skip
    sent = codec.decode(ATTACKS["public batch"]().forge(view), shape)
    assert 0.05 <= scoring.compute_cosine(sent, scoring.compute_direction(vectors[1])) < 0.3
    assert scoring.compute_cosine(sent, densify(own)) < -0.5


def test_a_trigger_marks_images_and_leaves_the_others_alone(network):
    inputs, targets = network.data.batch("train", range(6))
    marked_inputs, marked_targets = Triggered(network.data, every=2, splits=("train",)).batch("train", range(6))
    assert (marked_inputs[1::2] == inputs[1::2]).all()
    assert (marked_targets[1::2] == targets[1::2]).all()
    assert (marked_inputs[::2] != inputs[::2]).any()
    assert not marked_targets[::2].any()
    assert (Triggered(network.data, every=2, splits=("train",)).batch("test", [0])[0] == network.data.batch("test", [0])[0]).all()
