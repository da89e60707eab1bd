"""name = "int8" on the tiny task, beside top k and beside float32: bytes and what is learned."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from p2pflock.errors import InvalidMessageError
from p2pflock.learning import codec
from p2pflock.learning.learner import Learner
from p2pflock.ports import FoldInput
from p2pflock.testing.tiny_task import NumpyNetwork, build_spec

PEERS, ROUNDS = 4, 20
SEED = bytes(range(32))


def finish(steps):
    try:
        while True:
            next(steps)
    except StopIteration as done:
        return done.value


def build(name, seed):
    if name == "float32":
        return build_spec(rounds=ROUNDS, seed=seed, averaging="dense")
    spec = build_spec(rounds=ROUNDS, seed=seed)
    return replace(spec, codec=replace(spec.codec, name=name))


def train(name, seed):
    """(test loss after the last round, bytes of one peer's payloads)"""
    spec = build(name, seed)
    learners = [Learner(spec, NumpyNetwork(seed)) for _ in range(PEERS)]
    sent = 0
    for round_ in range(1, ROUNDS + 1):
        payloads = [finish(one.train(round_, i, PEERS, SEED)).payload for i, one in enumerate(learners)]
        sent += len(payloads[0])
        for one in learners:
            if name == "float32":
                mean = np.mean([np.frombuffer(payload, "<f4") for payload in payloads], axis=0, dtype=np.float64)
                result = one.set_dense(mean.astype("<f4").tobytes())
            else:
                result = one.fold(round_, [FoldInput(payload, 40) for payload in sorted(payloads)])
            one.adopt(result.model_hash)
        assert len({one.export() for one in learners}) == 1
    return learners[0].evaluate().loss_micro / 1e6, sent


def test_a_byte_a_value_learns_like_float32_and_no_worse_than_top_k():
    losses = {name: [] for name in ("float32", "topk", "int8")}
    bytes_sent = {}
    for name, rows in losses.items():
        for seed in (1, 2, 3):
            loss, bytes_sent[name] = train(name, seed)
            rows.append(loss)
    means = {name: float(np.mean(rows)) for name, rows in losses.items()}
    genesis = Learner(build("int8", 1), NumpyNetwork(1)).evaluate().loss_micro / 1e6
    assert means["float32"] < 0.6 * genesis
    assert means["int8"] == pytest.approx(means["float32"], rel=0.02)
    assert means["int8"] < means["topk"] * 1.01
    parameters, chunks = 36, 3
    assert bytes_sent["int8"] == ROUNDS * (parameters + 2 * chunks + codec.HEADER.size) < bytes_sent["float32"] / 2


def test_a_peer_may_not_send_the_other_kind():
    one = Learner(build("int8", 1), NumpyNetwork(1))
    other = Learner(build("topk", 1), NumpyNetwork(1))
    with pytest.raises(InvalidMessageError):
        one.fold(1, [FoldInput(finish(other.train(1, 0, 1, SEED)).payload, 40)])
    with pytest.raises(InvalidMessageError):
        other.fold(1, [FoldInput(finish(one.train(1, 0, 1, SEED)).payload, 40)])
