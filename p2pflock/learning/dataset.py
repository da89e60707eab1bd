"""What a data set must offer, and the simplest way to offer it.

Law: three disjoint splits: `train` is cut into shards, `public` is the pool that validators score with and
nobody trains on, `test` is touched by `evaluate` alone.  Same arguments, same data, on every machine: indices
of shards mean the same samples everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from p2pflock.errors import SpecError
from p2pflock.primitives import shuffle

if TYPE_CHECKING:
    from torch import Tensor

Split = Literal["train", "public", "test"]


class Dataset(Protocol):
    """What [data] factory returns."""

    def size(self, split: Split) -> int:
        """Samples in a split; at least one in each."""
        ...

    def batch(self, split: Split, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(inputs, targets) of some samples, first axis len(indices)."""
        ...


class TensorDataset:
    """A Dataset over tensors in memory: `public` samples of the training part are set aside by `seed`.

    >>> TensorDataset(train=(images, labels), test=(test_images, test_labels), public=2000)
    """

    def __init__(
        self,
        train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        *,
        public: int,
        seed: int = 0,
    ) -> None:
        count = len(train[0])
        if not 0 < public < count:
            raise SpecError(
                f"public = {public} of {count} training samples", "set aside at least one, not all of them"
            )
        order = shuffle.shuffled(shuffle.derive(bytes(32), "public pool", seed), count)
        pool, rest = sorted(order[:public]), sorted(order[public:])
        self._splits: Mapping[str, tuple[Tensor, Tensor]] = {
            "train": (train[0][rest], train[1][rest]),
            "public": (train[0][pool], train[1][pool]),
            "test": test,
        }

    def size(self, split: Split) -> int:
        return len(self._splits[split][0])

    def batch(self, split: Split, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        inputs, targets = self._splits[split]
        chosen = list(indices)
        return inputs[chosen], targets[chosen]
