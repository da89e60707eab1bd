"""FakeTrainer passes the conformance suite, and what the suite cannot see from outside."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import trio
import trio.testing

from p2pflock.errors import SpecError
from p2pflock.learning import shards
from p2pflock.learning.learner import MAX_CANDIDATES, MAX_FEEDBACK_AGE_ROUNDS, Learner
from p2pflock.learning.optimizers import build_optimizer, compute_lr
from p2pflock.ports import FoldInput
from p2pflock.primitives import merkle
from p2pflock.testing import conformance_trainer as conformance
from p2pflock.testing.tiny_task import NumpyNetwork, build_spec
from p2pflock.testing.trainer import FakeTrainer

SEED = bytes(range(32))


def finish(steps):
    try:
        while True:
            next(steps)
    except StopIteration as done:
        return done.value


def learner(state_dir=None, **spec):
    made = build_spec(**spec)
    return Learner(made, NumpyNetwork(made.task.seed), state_dir)


@pytest.mark.parametrize("enough", [1, 2, 3, 5])
def test_finishing_ends_after_the_step_at_hand(enough):
    """The numbers of steps that a clock would decide, one by one."""
    hurried, planned = learner(), learner()
    training = hurried.train(1, 0, 2, SEED)
    assert [next(training)[0] for _ in range(enough)] == list(range(1, enough + 1))
    with pytest.raises(StopIteration) as done:
        training.send(True)
    assert done.value.value == finish(planned.train(1, 0, 2, SEED, enough))
    assert (done.value.value.steps, done.value.value.samples) == (enough, 8 * enough)
    assert finish(hurried.train(2, 0, 2, SEED)) == finish(planned.train(2, 0, 2, SEED))


def test_leaves_follow_the_steps_made():
    """J = 2: leaves at 2, 4 and at the end; what fewer steps share with more, they share."""
    roots = [finish(learner().train(1, 0, 2, SEED, steps)).leaf_root for steps in range(1, 6)]
    assert len(set(roots)) == 5
    one = learner()
    weights = one._weights.copy()
    leaves = []
    optimizer = build_optimizer(one.spec.local, one.network.layout)
    batches = shards.compute_batches(SEED, 1, 0, 2, one.network.size("train"), 3, 8)
    for step, batch in enumerate(batches):
        _, gradient = one.network.gradient(weights, "train", batch, is_training=True)
        optimizer.step(weights, gradient, compute_lr(one.spec.local, 20, 1, step))
        leaves.append(hashlib.sha256(weights.tobytes()).digest())
    assert roots[1] == merkle.sha256_root([leaves[1]])
    assert roots[2] == merkle.sha256_root([leaves[1], leaves[2]])


def test_finish_in_trio_time():
    async def main():
        trainer, began = FakeTrainer(build_spec(steps=5), step_seconds=10), trio.current_time()
        results = []

        async def train():
            results.append(await trainer.train(1, 0, 1, SEED))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(train)
            await trio.sleep(25)
            await trainer.finish()
        assert trio.current_time() - began == pytest.approx(30)
        assert results[0].steps == 3

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize(
    "check",
    [
        conformance.check_training_is_a_function_of_its_arguments,
        conformance.check_repeating_a_round_does_not_use_up_state,
        conformance.check_finished_training_is_as_good_as_one_of_so_many_steps,
        conformance.check_it_learns,
    ],
    ids=lambda check: check.__name__,
)
def test_fake_trainer_conforms_with_muon(check):
    spec = build_spec()
    spec = replace(spec, local=replace(spec.local, optimizer="muon"))

    async def main():
        a, b = FakeTrainer(spec), FakeTrainer(spec)
        await a.open()
        await conformance.run(check, a, b, await b.export())

    trio.run(main)


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_fake_trainer_conforms(check):
    async def main():
        a, b = FakeTrainer(), FakeTrainer()
        await a.open()
        await conformance.run(check, a, b, await b.export())

    trio.run(main)


def test_fake_trainer_conforms_in_dense_mode():
    spec = build_spec(averaging="dense")
    trio.run(conformance.check_dense, FakeTrainer(spec), FakeTrainer(spec))


def test_step_seconds_are_trio_time():
    async def main():
        began = trio.current_time()
        await FakeTrainer(build_spec(steps=4), step_seconds=10).train(1, 0, 1, SEED)
        assert trio.current_time() - began >= 40

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_state_survives_a_restart(tmp_path):
    steady, first = learner(), learner(tmp_path)
    for one in (steady, first):
        finish(one.train(1, 0, 2, SEED))
    restarted = learner(tmp_path)
    # killed after training, before its header went out: the same round gives the same payload
    assert finish(restarted.train(1, 0, 2, SEED)) == finish(steady.train(1, 0, 2, SEED))
    again = learner(tmp_path)
    following = finish(steady.train(2, 0, 2, SEED))
    assert finish(again.train(2, 0, 2, SEED)) == following
    assert finish(learner().train(2, 0, 2, SEED)) != following  # so the state did matter


def test_a_dropped_training_does_not_leave_the_kept_optimizer_half_way(tmp_path):
    one = learner(tmp_path)
    finish(one.train(1, 0, 2, SEED))
    assert one._take_optimizer(one._state.optimizer) is not one._take_optimizer(one._state.optimizer)
    finish(one.train(1, 0, 2, SEED))
    dropped = one.train(2, 0, 2, SEED)
    next(dropped)
    dropped.close()
    assert finish(one.train(2, 0, 2, SEED)) == finish(learner(tmp_path).train(2, 0, 2, SEED))


def test_scores_do_not_depend_on_what_was_scored_before():
    one, other = learner(), learner()
    payloads = [finish(one.train(1, shard, 3, SEED)).payload for shard in range(3)]
    together = one.score(1, [*payloads, b"no payload"], SEED)
    apart = [score for payload in reversed([*payloads, b"no payload"]) for score in other.score(1, [payload], SEED)]
    assert together == apart[::-1]
    assert [score.is_valid for score in together] == [True, True, True, False]
    assert one.score(1, payloads, bytes(32)) == learner().score(1, payloads, bytes(32)) != together[:3]
    one.adopt(one.fold(1, [FoldInput(payload, 1) for payload in payloads]).model_hash)
    assert one.score(1, payloads, SEED) != together[:3]  # of another checkpoint


@pytest.mark.parametrize("damage", ["cut", "flip", "garbage", "other task"])
def test_damaged_or_foreign_state_is_as_good_as_none(tmp_path, damage):
    finish(learner(tmp_path, seed=2 if damage == "other task" else 1).train(1, 0, 2, SEED))
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[-9:]
    elif damage == "flip":
        data[len(data) // 2] ^= 1
    elif damage == "garbage":
        data[:] = hashlib.sha256(b"\xc1").digest() + b"\xc1"
    path.write_bytes(data)
    assert finish(learner(tmp_path).train(2, 0, 2, SEED)) == finish(learner().train(2, 0, 2, SEED))


def test_stale_error_feedback_is_dropped():
    with_history, without = learner(), learner()
    finish(with_history.train(1, 0, 2, SEED))
    late = 1 + MAX_FEEDBACK_AGE_ROUNDS + 1
    finish(with_history.train(late, 0, 2, SEED))
    finish(without.train(late, 0, 2, SEED))
    assert with_history._state.feedback_before == without._state.feedback_before == b""
    assert with_history._state.optimizer_before != b""


def test_rewound_history_starts_afresh():
    rewound = learner()
    for round_ in (1, 2, 3):
        finish(rewound.train(round_, 0, 2, SEED))
    assert finish(rewound.train(1, 0, 2, SEED)) == finish(learner().train(1, 0, 2, SEED))


def test_divergence_is_named_and_changes_nothing():
    one = learner()
    expected = finish(one.train(1, 0, 2, SEED))
    gradient = one.network.gradient

    def explode(weights, split, indices, *, is_training):
        loss, vector = gradient(weights, split, indices, is_training=is_training)
        return loss, vector * float("inf")

    one.network.gradient = explode
    with np.errstate(invalid="ignore"), pytest.raises(SpecError, match="diverged"):
        finish(one.train(2, 0, 2, SEED))
    one.network.gradient = gradient
    assert finish(one.train(1, 0, 2, SEED)) == expected


def test_candidates_are_bounded():
    one = learner()
    payload = finish(one.train(1, 0, 2, SEED)).payload
    other = finish(one.train(1, 1, 2, SEED)).payload
    hashes = [
        one.fold(1, [FoldInput(payload, weight), FoldInput(other, 1)]).model_hash for weight in range(1, 30)
    ]
    assert len(set(hashes)) > MAX_CANDIDATES
    assert len(one._candidates) == MAX_CANDIDATES
    one.adopt(hashes[-1])
