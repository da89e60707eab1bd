"""The torch side: what may be a model, and that its vector is the model."""

from __future__ import annotations

import hashlib
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from p2pflock.errors import MissingToolError, SpecError
from p2pflock.learning.dataset import TensorDataset
from p2pflock.learning.network import TorchNetwork, choose_device
from p2pflock.learning.network import _find_hidden as find_hidden
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


def network(build, more="", load=None, local=""):
    module = types.ModuleType("own_task")
    module.build = build
    module.load = load or (lambda: TensorDataset(points(40), points(12), public=8))
    module.mean_square = lambda outputs, targets: (outputs.sum(-1) - targets).square().mean()
    module.speak = lambda model, length: "x" * length
    sys.modules["own_task"] = module
    try:
        return TorchNetwork(parse_spec(SPEC.format(more=more) + local), ["own_task"])
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


@pytest.mark.parametrize("size", [1, 3, 5, 11])
def test_micro_batches_give_the_gradient_of_the_mean(size):
    """11 samples in parts that do not divide them, through a model with a curved loss."""
    seen = []

    def build():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
        return model

    whole, parts = network(build), network(build, local=f"micro_batch = {size}")
    weights = whole.genesis()
    loss, gradient = whole.gradient(weights, "train", range(11), is_training=True)
    seen.clear()
    again, summed = parts.gradient(weights, "train", range(11), is_training=True)
    assert max(seen) == size and sum(seen) == 11  # what bounds the memory
    assert again == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(summed, gradient, rtol=1e-4, atol=1e-7)


def test_bfloat16_computes_in_it_and_keeps_float32_weights():
    seen = []

    def build():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        model[0].register_forward_hook(lambda _, __, output: seen.append(output.dtype))
        return model

    exact, mixed = network(build), network(build, local='precision = "bfloat16"')
    weights = exact.genesis()
    assert np.array_equal(weights, mixed.genesis())
    loss, gradient = exact.gradient(weights, "train", range(16), is_training=True)
    seen.clear()
    near, rounded = mixed.gradient(weights, "train", range(16), is_training=True)
    assert set(seen) == {torch.bfloat16}
    assert rounded.dtype == np.float32
    assert 0 < np.linalg.norm(rounded - gradient) < 0.02 * np.linalg.norm(gradient)
    assert near == pytest.approx(loss, rel=0.01)
    assert mixed.loss(weights, "test", range(12)) == exact.loss(weights, "test", range(12))
    for _ in range(60):
        weights -= np.float32(0.5) * mixed.gradient(weights, "train", range(32), is_training=True)[1]
    assert exact.loss(weights, "train", range(32))[0] < 0.85 * loss


def test_hidden_matrices_are_neither_embeddings_nor_the_head():
    gpt = shakespeare.build_model(layers=1, heads=2, width=8, block=4)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    assert find_hidden(gpt, tokens) == {f"layers.0.{name}.weight" for name in ("qkv", "out", "up", "down")}
    assert find_hidden(mnist.build_model(), torch.zeros(1, 1, 28, 28)) == {"0.weight", "2.weight", "5.weight"}
    assert find_hidden(nn.Linear(4, 3), torch.zeros(1, 4)) == {"weight"}
    assert network(Tied).hidden == {"one.weight"}


def test_a_device_that_is_not_there_is_named(monkeypatch):
    with pytest.raises(SpecError, match="tpu"):
        choose_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(MissingToolError, match="no CUDA device"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == "cuda"


def test_shipped_models_start_at_these_bits():
    """Drawn by integers and scaled by exact operations, so every machine stands at the same genesis."""
    digests = {}
    for name, build in (("mnist", mnist.build_model), ("shakespeare", shakespeare.build_model)):
        torch.manual_seed(1)
        parameters = sorted(build().named_parameters())
        flat = np.concatenate([parameter.detach().numpy().reshape(-1) for _, parameter in parameters])
        digests[name] = hashlib.sha256(flat.astype("<f4").tobytes()).hexdigest()[:16]
    assert digests == {"mnist": "109737acacd56995", "shakespeare": "fb804d9f6b692462"}
