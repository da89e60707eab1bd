"""The torch side: what may be a model, and that its vector is the model."""

from __future__ import annotations

import hashlib
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from p2pflock.errors import SpecError
from p2pflock.learning.dataset import TensorDataset
from p2pflock.learning.network import TorchNetwork
from p2pflock.learning.spec import parse_spec
from p2pflock.learning.tasks import mnist, shakespeare

SPEC = """
[task]
name = "own"
rounds = 3
[model]
factory = "own_task:build"
{more}
[data]
factory = "own_task:load"
[local]
lr = 0.1
"""


def points(count):
    draw = torch.Generator().manual_seed(count)
    return torch.randn(count, 4, generator=draw), torch.arange(count) % 3


def network(build, more="", load=None):
    module = types.ModuleType("own_task")
    module.build = build
    module.load = load or (lambda: TensorDataset(points(40), points(12), public=8))
    module.mean_square = lambda outputs, targets: (outputs.sum(-1) - targets).square().mean()
    module.speak = lambda model, length: "x" * length
    sys.modules["own_task"] = module
    try:
        return TorchNetwork(parse_spec(SPEC.format(more=more)), ["own_task"])
    finally:
        del sys.modules["own_task"]


class Tied(nn.Module):
    """Two names for one parameter, a parameter that is not used, and a scratch buffer."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 3, bias=False)
        self.two = nn.Linear(4, 3, bias=False)
        self.two.weight = self.one.weight
        self.idle = nn.Parameter(torch.ones(2))
        self.register_buffer("scratch", torch.ones(1), persistent=False)

    def forward(self, x):
        return self.one(x) + self.two(x) * self.scratch


def test_gradient_is_that_of_the_loss():
    own = network(Tied)
    assert [tensor.name for tensor in own.layout.tensors] == ["idle", "one.weight"]
    weights = own.genesis()
    loss, gradient = own.gradient(weights, "train", range(8), is_training=True)
    assert gradient[:2].tolist() == [0, 0]
    for at in (2, 7, 13):
        moved = [weights.copy(), weights.copy()]
        moved[0][at] += 1e-2
        moved[1][at] -= 1e-2
        slope = (own.loss(moved[0], "train", range(8))[0] - own.loss(moved[1], "train", range(8))[0]) / 2e-2
        assert gradient[at] == pytest.approx(slope, abs=2e-3)
    assert own.loss(weights, "train", range(8))[0] == pytest.approx(loss)
    assert np.array_equal(own.genesis(), weights)


def test_splits_are_disjoint_and_public_is_set_aside():
    own = network(Tied)
    assert [own.size(split) for split in ("train", "public", "test")] == [32, 8, 12]


def test_own_loss_and_sample():
    own = network(Tied, 'loss = "own_task:mean_square"\nsample = "own_task:speak"')
    loss, accuracy = own.loss(own.genesis(), "test", range(12))
    assert loss > 0
    assert accuracy == 0
    assert own.sample(own.genesis(), 3) == "xxx"
    assert network(Tied).sample(own.genesis(), 3) == ""


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), "buffer 1.num_batches_tracked|buffer 1.running"),
        (lambda: nn.Linear(4, 3).double(), "float64"),
        (nn.ReLU, "no parameters"),
        (dict, "gave a dict"),
        (lambda: nn.Linear(5, 3), "do not fit together"),
        (lambda: nn.Linear(4, 2), "do not fit together"),
        (lambda: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_what_cannot_be_trained_is_named(build, words):
    with pytest.raises(SpecError, match=words) as raised:
        network(build)
    assert raised.value.hint


def test_weights_that_are_not_finite_are_refused():
    def build():
        model = nn.Linear(4, 3)
        nn.init.constant_(model.bias, float("nan"))
        return model

    with pytest.raises(SpecError, match="not finite"):
        network(build)


def test_shipped_models_start_at_these_bits():
    """Drawn by integers and scaled by exact operations, so every machine stands at the same genesis."""
    digests = {}
    for name, build in (("mnist", mnist.build_model), ("shakespeare", shakespeare.build_model)):
        torch.manual_seed(1)
        parameters = sorted(build().named_parameters())
        flat = np.concatenate([parameter.detach().numpy().reshape(-1) for _, parameter in parameters])
        digests[name] = hashlib.sha256(flat.astype("<f4").tobytes()).hexdigest()[:16]
    assert digests == {"mnist": "109737acacd56995", "shakespeare": "fb804d9f6b692462"}
