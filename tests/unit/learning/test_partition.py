from __future__ import annotations

import numpy as np
import pytest

from p2pflock.errors import SpecError
from p2pflock.learning.learner import Learner
from p2pflock.learning.partition import PrivateShard, draw_dirichlet
from p2pflock.testing.tiny_task import NumpyNetwork, build_spec

LABELS = [number % 10 for number in range(2000)]


def test_parts_are_disjoint_and_cover_everything():
    parts = draw_dirichlet(LABELS, 8, 0.3, seed=1)
    assert sorted(index for part in parts for index in part) == list(range(2000))


def test_the_same_seed_gives_the_same_parts_and_another_one_others():
    assert draw_dirichlet(LABELS, 8, 0.3, seed=1) == draw_dirichlet(LABELS, 8, 0.3, seed=1)
    assert draw_dirichlet(LABELS, 8, 0.3, seed=1) != draw_dirichlet(LABELS, 8, 0.3, seed=2)


def test_a_small_alpha_skews_the_labels():
    def share_of_the_commonest_label(alpha):
        parts = draw_dirichlet(LABELS, 8, alpha, seed=3)
        return np.mean([np.bincount([LABELS[i] for i in part], minlength=10).max() / len(part) for part in parts])

    assert share_of_the_commonest_label(0.1) > 2 * share_of_the_commonest_label(100.0)


def test_too_many_parts_are_refused():
    with pytest.raises(SpecError):
        draw_dirichlet(LABELS[:20], 10, 0.1, seed=1)


def test_a_private_shard_trains_on_its_own_samples_only():
    seen = []

    class Watched(NumpyNetwork):
        def gradient(self, weights, split, indices, *, is_training):
            seen.extend(indices)
            return super().gradient(weights, split, indices, is_training=is_training)

    own = [3, 5, 8, 13, 21, 34, 55, 89, 144, 233]
    spec = build_spec()
    learner = Learner(spec, PrivateShard(Watched(spec.task.seed), own))
    list(learner.train(1, 0, 1, bytes(32)))
    assert seen and set(seen) <= set(own)


def test_an_empty_part_is_refused():
    with pytest.raises(SpecError):
        PrivateShard(NumpyNetwork(1), [])
