"""Data that is not spread evenly: one peer's own part of the training split, and the usual way to draw parts.

Law: pure; the same seed gives the same parts everywhere.  `PrivateShard` is a network that can train on its own
samples alone; the public pool and the test set stay everyone's.

Dirichlet parts by label: Hsu, Qi and Brown, "Measuring the effects of non-identical data distribution for
federated visual classification", arXiv 1909.06335.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from p2pflock.errors import SpecError
from p2pflock.learning.checkpoint import Layout
from p2pflock.learning.codec import F32
from p2pflock.learning.dataset import Split
from p2pflock.learning.learner import Network

ATTEMPTS = 1000


class PrivateShard:
    """A Network whose training split is `indices` of another's; implements learner.Network.

    Train with shard 0 of 1: the part is already this peer's own.
    """

    def __init__(self, network: Network, indices: Sequence[int]) -> None:
        if not indices:
            raise SpecError("a private part without a sample", "give every peer some data")
        self._network = network
        self._indices = tuple(indices)

    @property
    def layout(self) -> Layout:
        return self._network.layout

    @property
    def hidden(self) -> frozenset[str]:
        return self._network.hidden

    def genesis(self) -> F32:
        return self._network.genesis()

    def size(self, split: Split) -> int:
        return len(self._indices) if split == "train" else self._network.size(split)

    def begin(self, seed: bytes) -> None:
        self._network.begin(seed)

    def gradient(
        self, weights: F32, split: Split, indices: Sequence[int], *, is_training: bool
    ) -> tuple[float, F32]:
        return self._network.gradient(weights, split, self._resolve(split, indices), is_training=is_training)

    def loss(self, weights: F32, split: Split, indices: Sequence[int]) -> tuple[float, float]:
        return self._network.loss(weights, split, self._resolve(split, indices))

    def sample(self, weights: F32, length: int) -> str:
        return self._network.sample(weights, length)

    def _resolve(self, split: Split, indices: Sequence[int]) -> Sequence[int]:
        return [self._indices[index] for index in indices] if split == "train" else indices


def draw_dirichlet(
    labels: Sequence[int], parts: int, alpha: float, seed: int, *, minimum: int = 10
) -> list[list[int]]:
    """Cut samples into disjoint parts whose label mixtures are Dirichlet(alpha) draws: small alpha, skewed parts.

    Drawn anew until every part has `minimum` samples, as in the published benchmarks.

    Args:
        labels: class of each sample, (samples,).

    Raises SpecError when that does not happen.
    """
    draw = np.random.Generator(np.random.PCG64(seed))
    classes = np.asarray(labels)
    for _ in range(ATTEMPTS):
        cut: list[list[int]] = [[] for _ in range(parts)]
        for label in np.unique(classes):
            own = draw.permutation(np.flatnonzero(classes == label))
            shares = draw.dirichlet([alpha] * parts)
            ends = np.floor(np.cumsum(shares) * len(own)).astype(int)[:-1]
            for part, indices in zip(cut, np.split(own, ends), strict=True):
                part.extend(indices.tolist())
        if min(map(len, cut)) >= minimum:
            return [sorted(part) for part in cut]
    raise SpecError(
        f"no Dirichlet({alpha}) draw of {parts} parts has {minimum} samples in each", "use fewer parts, a larger alpha"
    )
