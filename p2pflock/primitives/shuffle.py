"""Seeded choice: the same seed gives the same permutation, sample or index on every machine.

Law: all choice comes from sha256 in counter mode over a 32-byte seed, and is exactly uniform (rejection
sampling: no modulo bias that a grinder of seeds or stakes could use).  Where the seed comes from, and
whether it may be trusted, is not decided here.

`draw` is a prefix of `shuffled` (forward Fisher-Yates), so a sample can be extended without a re-draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

_WORD = 1 << 64
MAX_SIZE = 1 << 32


def derive(seed: bytes, label: str, *numbers: int) -> bytes:
    """32-byte seed for one purpose: sha256 over seed, length-prefixed label and 8-byte big-endian integers.

    Raises ValueError for a seed that is not 32 bytes or an integer outside [0, 2^64).
    """
    _check_seed(seed)
    name = label.encode("utf-8")
    body = b"".join(number.to_bytes(8, "big") for number in _check_words(numbers))
    return hashlib.sha256(b"p2pflock/1/derive\0" + seed + len(name).to_bytes(4, "big") + name + body).digest()


def shuffled(seed: bytes, size: int) -> list[int]:
    """A uniform permutation of range(size).  O(size) time, about 1 µs an item."""
    _check_size(size)
    items = list(range(size))
    words = _words(seed)
    for i in range(size - 1):
        j = i + _below(words, size - i)
        items[i], items[j] = items[j], items[i]
    return items


def draw(seed: bytes, size: int, count: int) -> list[int]:
    """`count` distinct indices below `size` in drawn order: shuffled(seed, size)[:count], in O(count)."""
    _check_size(size)
    if not 0 <= count <= size:
        raise ValueError(f"can not draw {count} of {size}")
    words = _words(seed)
    moved: dict[int, int] = {}
    chosen = []
    for i in range(count):
        j = i if i == size - 1 else i + _below(words, size - i)
        chosen.append(moved.get(j, j))
        moved[j] = moved.get(i, i)
    return chosen


def weighted_index(seed: bytes, weights: Sequence[int]) -> int:
    """Index i with probability weights[i] / sum(weights), exactly.

    Raises ValueError when there is no weight, a negative one, or the sum reaches 2^256.
    """
    _check_seed(seed)
    total = sum(weights)
    if any(weight < 0 for weight in weights) or not 0 < total < 1 << 256:
        raise ValueError("weights must be non-negative with a sum in (0, 2^256)")
    limit = (1 << 256) - (1 << 256) % total
    counter = 0
    while True:
        point = int.from_bytes(_block(seed, counter), "big")
        if point < limit:
            break
        counter += 1
    point %= total
    for index, weight in enumerate(weights):
        if point < weight:
            return index
        point -= weight
    raise AssertionError("unreachable: point < total")


def _check_seed(seed: bytes) -> None:
    if len(seed) != 32:
        raise ValueError("a seed is 32 bytes")


def _check_size(size: int) -> None:
    if not 0 <= size <= MAX_SIZE:
        raise ValueError(f"size must be in [0, {MAX_SIZE}]")


def _check_words(numbers: Sequence[int]) -> Sequence[int]:
    if not all(0 <= number < _WORD for number in numbers):
        raise ValueError("integers must be in [0, 2^64)")
    return numbers


def _block(seed: bytes, counter: int) -> bytes:
    return hashlib.sha256(seed + counter.to_bytes(8, "big")).digest()


def _words(seed: bytes) -> Iterator[int]:
    """Endless big-endian 64-bit words, four to a block."""
    _check_seed(seed)
    counter = 0
    while True:
        block = _block(seed, counter)
        counter += 1
        for start in (0, 8, 16, 24):
            yield int.from_bytes(block[start : start + 8], "big")


def _below(words: Iterator[int], bound: int) -> int:
    limit = _WORD - _WORD % bound
    while True:
        word = next(words)
        if word < limit:
            return word % bound
