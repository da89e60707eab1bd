"""The smallest task that learns: four clusters in eight dimensions, told apart by a linear model.

Law: one data set and one spec for both the numpy model of FakeTrainer and a torch model that a real
learning process builds, so that the same checks run over both.  It is also an example of an own task: for the
learning process this is a foreign module, named as trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from p2pflock.learning.spec import TaskSpec, parse_spec

if TYPE_CHECKING:
    from p2pflock.learning.dataset import Split, TensorDataset

MODULE = "p2pflock.testing.tiny_task"
FEATURES, CLASSES = 8, 4
SIZES = {"train": 256, "public": 64, "test": 64}

_SPEC = """
averaging = "{averaging}"
[task]
name = "tiny"
rounds = {rounds}
seed = {seed}
[model]
factory = "{module}:build_model"
[data]
factory = "{module}:load_data"
[local]
steps = {steps}
batch_size = 8
lr = 0.03
leaf_steps = 2
[codec]
chunk = 16
k = 6
k_start = 12
start_rounds = 2
[scoring]
batch_size = 32
held_out = 32
"""


def build_spec(*, rounds: int = 20, seed: int = 1, steps: int = 5, averaging: str = "gossip") -> TaskSpec:
    """The tiny task's spec; another seed gives another task id, genesis and data."""
    return parse_spec(
        _SPEC.format(module=MODULE, rounds=rounds, seed=seed, steps=steps, averaging=averaging), "tiny.toml"
    )


@lru_cache(maxsize=8)
def make_data(seed: int = 0) -> dict[str, tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """split -> (points (n, FEATURES), classes (n,)), disjoint draws of the same four clusters."""
    draw = np.random.Generator(np.random.PCG64(seed))
    centres = draw.integers(-2, 3, size=(CLASSES, FEATURES))
    data = {}
    for split, size in SIZES.items():
        classes = draw.integers(0, CLASSES, size=size)
        noise = draw.integers(-256, 257, size=(size, FEATURES)) / 128
        data[split] = ((centres[classes] + noise).astype(np.float32), classes.astype(np.int64))
    return data


def load_data() -> TensorDataset:
    """The task's data for a torch process."""
    import torch

    from p2pflock.learning.dataset import TensorDataset

    data = {name: tuple(map(torch.from_numpy, pair)) for name, pair in make_data().items()}
    joined: Any = tuple(torch.cat(pair) for pair in zip(data["train"], data["public"], strict=True))
    test: Any = data["test"]
    return TensorDataset(train=joined, test=test, public=SIZES["public"])


def build_model() -> Any:
    """(batch, FEATURES) -> (batch, CLASSES), a torch module."""
    import torch

    model = torch.nn.Linear(FEATURES, CLASSES)
    torch.nn.init.zeros_(model.bias)
    return model


class NumpyNetwork:
    """The same task without torch: softmax regression, its gradient by hand.  Implements learner.Network."""

    def __init__(self, seed: int) -> None:
        from p2pflock.learning.checkpoint import Layout

        self._seed = seed
        self._data = make_data()
        self.layout = Layout.of({"bias": (CLASSES,), "weight": (CLASSES, FEATURES)})
        self.hidden = frozenset({"weight"})  # its only layer

    def genesis(self) -> NDArray[np.float32]:
        draw = np.random.Generator(np.random.PCG64(self._seed))
        whole = draw.integers(-(1 << 20), 1 << 20, size=self.layout.parameters)
        return (whole / (1 << 22)).astype(np.float32)

    def size(self, split: Split) -> int:
        return SIZES[split]

    def begin(self, seed: bytes) -> None:
        """Nothing in this model is random."""

    def _forward(
        self, weights: NDArray[np.float32], split: Split, indices: Sequence[int]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
        """Points (n, FEATURES), probabilities (n, CLASSES), classes (n,)."""
        parts = self.layout.split(weights)
        points, classes = self._data[split]
        points, classes = points[list(indices)], classes[list(indices)]
        with np.errstate(over="ignore"):
            logits = points @ parts["weight"].T + parts["bias"]
            powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return points, powers / powers.sum(axis=1, keepdims=True), classes

    def gradient(
        self, weights: NDArray[np.float32], split: Split, indices: Sequence[int], *, is_training: bool
    ) -> tuple[float, NDArray[np.float32]]:
        points, probabilities, classes = self._forward(weights, split, indices)
        rows = np.arange(len(classes))
        loss = float(-np.log(np.maximum(probabilities[rows, classes], 1e-30)).mean())
        error = probabilities.copy()  # d loss / d logits, (n, CLASSES)
        error[rows, classes] -= 1
        error /= len(classes)
        return loss, np.concatenate((error.sum(axis=0), (error.T @ points).reshape(-1))).astype(np.float32)

    def loss(
        self, weights: NDArray[np.float32], split: Split, indices: Sequence[int]
    ) -> tuple[float, float]:
        _, probabilities, classes = self._forward(weights, split, indices)
        chosen = probabilities[np.arange(len(classes)), classes]
        accuracy = float((probabilities.argmax(axis=1) == classes).mean())
        return float(-np.log(np.maximum(chosen, 1e-30)).mean()), accuracy

    def sample(self, weights: NDArray[np.float32], length: int) -> str:
        return ""
