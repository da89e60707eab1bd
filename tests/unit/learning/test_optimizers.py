"""Inner optimizers: exact states, Muon's orthogonal steps, and the learning rate over the rounds."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from itertools import pairwise

import numpy as np
import pytest
import torch

from p2pflock.errors import InvalidMessageError
from p2pflock.learning.checkpoint import Layout
from p2pflock.learning.optimizers import AdamW, build_optimizer, compute_lr, find_matrices, orthogonalise
from p2pflock.learning.spec import Local

LAYOUT = Layout.of({"a.bias": (3,), "b.weight": (4, 6), "c.embedding": (5, 2), "d.filters": (2, 3, 2, 2), "e.bias": (2,)})
HIDDEN = frozenset({"b.weight", "d.filters"})
SIZE = LAYOUT.parameters


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon"])
def test_state_restores_exactly(kind):
    local = Local(lr=Decimal("0.1"), optimizer=kind, weight_decay=Decimal("0.01"))
    gradients = normal(6, SIZE)
    one, weights = build_optimizer(local, LAYOUT, HIDDEN), np.ones(SIZE, np.float32)
    for gradient in gradients[:3]:
        one.step(weights, gradient, 0.1)
    assert np.array_equal(gradients, normal(6, SIZE))  # left as they are
    two, copied = build_optimizer(local, LAYOUT, HIDDEN), weights.copy()
    two.restore(one.state())
    for gradient in gradients[3:]:
        one.step(weights, gradient, 0.1)
        two.step(copied, gradient, 0.1)
    assert np.array_equal(weights, copied)
    assert one.state() == two.state()
    nan = np.float32("nan").tobytes()
    first = len(kind) + (0 if kind == "muon" else 8)  # where the first moment begins
    poisoned = one.state()[:first] + nan + one.state()[first + 4 :]
    for bad in (b"", one.state()[:-1], one.state()[:-4] + nan, poisoned, one.state() + bytes(4)):
        with pytest.raises(InvalidMessageError):
            two.restore(bad)
    for other in {"adamw", "sgd", "muon"} - {kind}:
        with pytest.raises(InvalidMessageError):
            build_optimizer(replace(local, optimizer=other), LAYOUT, HIDDEN).restore(one.state())


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8), (1, 9)])
def test_orthogonalise_keeps_the_singular_vectors_and_evens_the_values(shape):
    matrix = normal(*shape) * np.float32(1e-3)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    turned = left.T @ orthogonalise(matrix) @ right.T  # diagonal, were it exact
    assert np.abs(turned - np.diag(np.diag(turned))).max() < 1e-3
    assert values.max() / values.min() == 1 or values.max() / values.min() > 1.5
    large = np.diag(turned)[values > values.max() / 20]
    assert large.min() > 0.6
    assert large.max() < 1.3
    assert orthogonalise(matrix).dtype == np.float32
    assert not orthogonalise(np.zeros(shape, np.float32)).any()


def test_muon_is_torchs():
    """Against torch.optim.Muon, another implementation of the same rule, in bfloat16 there."""
    layout = Layout.of({"w": (24, 16)})
    local = Local(lr=Decimal("0.1"), optimizer="muon", momentum=Decimal("0.95"), weight_decay=Decimal("0.1"))
    own, weights = build_optimizer(local, layout, {"w"}), normal(24 * 16)
    theirs = torch.nn.Parameter(torch.from_numpy(weights.copy().reshape(24, 16)))
    reference = torch.optim.Muon(
        [theirs], lr=0.1, momentum=0.95, weight_decay=0.1, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    start = weights.copy()
    for gradient in normal(5, 24 * 16, seed=1):
        own.step(weights, gradient, 0.1)
        theirs.grad = torch.from_numpy(gradient.reshape(24, 16))
        reference.step()
    moved, expected = weights - start, theirs.detach().numpy().reshape(-1) - start
    assert np.linalg.norm(moved - expected) < 0.02 * np.linalg.norm(expected)


def test_muon_leaves_the_rest_to_adamw():
    local = Local(lr=Decimal("0.1"), optimizer="muon", weight_decay=Decimal("0.01"))
    muon, weights = build_optimizer(local, LAYOUT, HIDDEN), normal(SIZE)
    is_rest = np.ones(SIZE, bool)
    for matrix in find_matrices(LAYOUT, HIDDEN):
        is_rest[matrix.span] = False
    assert is_rest.sum() == 3 + 10 + 2
    adamw, rest = AdamW(15, 0.9, 0.95, 0.01), weights[is_rest].copy()
    for gradient in normal(4, SIZE, seed=1):
        before = weights.copy()
        muon.step(weights, gradient, 0.1)
        adamw.step(rest, gradient[is_rest], 0.1)
        for matrix in find_matrices(LAYOUT, HIDDEN):
            change = weights[matrix.span] - before[matrix.span] * np.float32(1 - 0.1 * 0.01)
            values = np.linalg.svd(change.reshape(matrix.rows, matrix.columns), compute_uv=False)
            scale = 0.1 * 0.2 * max(matrix.rows, matrix.columns) ** 0.5
            assert (values < 1.3 * scale).all()
            assert values[0] > 0.6 * scale
    assert np.array_equal(weights[is_rest], rest)


def test_filters_are_rows():
    assert [(m.begin, m.rows, m.columns) for m in find_matrices(LAYOUT, HIDDEN)] == [(3, 4, 6), (37, 2, 12)]
    assert find_matrices(LAYOUT, {"a.bias"}) == ()


def test_learning_rate_warms_up_and_decays():
    local = Local(lr=Decimal(1), steps=10, warmup_steps=4, final_lr_fraction=Decimal("0.5"))
    rates = [compute_lr(local, 10, round_, step) for round_ in range(1, 11) for step in range(10)]
    rates.append(compute_lr(local, 10, 11, 0))
    assert rates[0] == pytest.approx(0.2)
    assert rates[:4] == sorted(rates[:4])
    assert rates[100] == pytest.approx(0.5)
    assert all(a >= b for a, b in pairwise(rates[4:]))
    assert compute_lr(local, 10, 500, 0) == pytest.approx(0.5)
    # Who makes more steps than the spec's H is in the same place of the schedule when the next round begins.
    assert compute_lr(local, 10, 3, 127) == compute_lr(local, 10, 3, 9) > compute_lr(local, 10, 4, 0)
