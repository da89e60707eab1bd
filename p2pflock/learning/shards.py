"""Which samples a peer trains on, and which a validator scores with: seeds in, indices out.

Law: pure; everyone computes the same.  The shards of one seed are disjoint and cover the training split; the
public pool and the test set are other splits of the data set, never part of a shard.
"""

from __future__ import annotations

from functools import lru_cache

from p2pflock.errors import LocalProtocolError
from p2pflock.primitives import shuffle


@lru_cache(maxsize=2)
def _order(seed: bytes, size: int) -> tuple[int, ...]:
    return tuple(shuffle.shuffled(shuffle.derive(seed, "shards"), size))


def compute_shard(seed: bytes, shard: int, shards: int, size: int) -> tuple[int, ...]:
    """Indices of one of `shards` disjoint parts of range(size), whose lengths differ by at most one."""
    if not 0 <= shard < shards:
        raise LocalProtocolError(f"shard {shard} of {shards}")
    if shards > size:
        raise LocalProtocolError(f"{shards} shards of {size} samples")
    return _order(seed, size)[shard * size // shards : (shard + 1) * size // shards]


def compute_batches(
    seed: bytes, round_: int, shard: int, shards: int, size: int, steps: int, batch_size: int
) -> list[list[int]]:
    """`steps` lists of `batch_size` indices of the shard: without replacement until it is used up, then anew."""
    part = compute_shard(seed, shard, shards, size)
    wanted = steps * batch_size
    chosen: list[int] = []
    epoch = 0
    while len(chosen) < wanted:
        count = min(wanted - len(chosen), len(part))
        label = shuffle.derive(seed, "batches", round_, shard, epoch)
        chosen += [part[index] for index in shuffle.draw(label, len(part), count)]
        epoch += 1
    return [chosen[step * batch_size : (step + 1) * batch_size] for step in range(steps)]


def compute_public(seed: bytes, label: str, size: int, count: int) -> list[int]:
    """At most `count` distinct indices of the public pool."""
    return shuffle.draw(shuffle.derive(seed, label), size, min(count, size))
