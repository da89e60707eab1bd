from __future__ import annotations

import hashlib
from collections import Counter

import pytest

from p2pflock.primitives import shuffle

SEED = bytes(range(32))


def seeds(count):
    return (hashlib.sha256(b"%d" % i).digest() for i in range(count))


def test_pinned():
    """Peers of different versions must agree: a change here is a fork."""
    assert shuffle.shuffled(bytes(32), 10) == [8, 1, 3, 6, 2, 9, 0, 7, 4, 5]
    assert (
        hashlib.sha256(repr(shuffle.shuffled(SEED, 60_000)).encode()).hexdigest()
        == "cf6c66306113a9e20dfe5642d336ef34f023f7463ff19b6e228d4a8deea5448e"
    )
    assert shuffle.derive(SEED, "shard", 1, 2).hex() == "822615904b68f102eab544b567e4b5aab3d182eef28543f9fa565424d59a594d"
    assert shuffle.weighted_index(SEED, [10**18, 2 * 10**18, 3 * 10**18, 4 * 10**18]) == 3


@pytest.mark.parametrize("size", [0, 1, 2, 3, 100])
def test_a_permutation(size):
    assert sorted(shuffle.shuffled(SEED, size)) == list(range(size))


@pytest.mark.parametrize("size", [0, 1, 2, 7, 50])
def test_draw_is_a_prefix_of_the_permutation(size):
    for count in range(size + 1):
        assert shuffle.draw(SEED, size, count) == shuffle.shuffled(SEED, size)[:count]


def test_draw_from_many_costs_little():
    drawn = shuffle.draw(SEED, shuffle.MAX_SIZE, 100)
    assert len(set(drawn)) == 100
    assert max(drawn) > 1 << 31


def test_permutations_are_uniform():
    counts = Counter(tuple(shuffle.shuffled(seed, 4)) for seed in seeds(4800))
    assert len(counts) == 24
    chi_square = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert chi_square < 49.7  # 23 degrees of freedom, p = 0.001; seeds are fixed, so this never flickers


def test_weights_are_obeyed():
    weights = [0, 1, 2, 0, 5, 0]
    counts = Counter(shuffle.weighted_index(seed, weights) for seed in seeds(4000))
    assert set(counts) == {1, 2, 4}
    chi_square = sum((counts[i] - 500 * weights[i]) ** 2 / (500 * weights[i]) for i in counts)
    assert chi_square < 13.8  # 2 degrees of freedom, p = 0.001
    assert shuffle.weighted_index(SEED, [0, 0, 1 << 255]) == 2


def test_rejection_is_exact_at_the_edge():
    """A bound just above half the word range rejects almost half of the words; none may slip through."""
    bound = (1 << 63) + 1
    words = iter([bound, (1 << 64) - 1, 5])
    assert shuffle._below(words, bound) == 5
    assert shuffle._below(iter([bound - 1]), bound) == bound - 1


def test_weighted_rejection_is_exact_at_the_edge(monkeypatch):
    """2^256 mod 3 is 1, so the largest block is one too many."""
    monkeypatch.setattr(shuffle, "_block", lambda seed, counter: b"\xff" * 32 if counter == 0 else bytes(31) + b"\1")
    assert shuffle.weighted_index(SEED, [1, 1, 1]) == 1
    monkeypatch.setattr(shuffle, "_block", lambda seed, counter: b"\xff" * 31 + b"\xfe")
    assert shuffle.weighted_index(SEED, [1, 1, 1]) == 2


def test_derived_seeds_do_not_collide():
    derived = [
        shuffle.derive(SEED, "a"),
        shuffle.derive(SEED, "a", 0),
        shuffle.derive(SEED, "a", 0, 0),
        shuffle.derive(SEED, "a", 1),
        shuffle.derive(SEED, "b"),
        shuffle.derive(SEED, ""),
        shuffle.derive(SEED, "a\0\0\0\0\0\0\0\0"),
        shuffle.derive(bytes(32), "a"),
    ]
    assert len(set(derived)) == len(derived)


@pytest.mark.parametrize(
    "use",
    [
        lambda: shuffle.shuffled(b"short", 3),
        lambda: shuffle.shuffled(SEED, -1),
        lambda: shuffle.shuffled(SEED, shuffle.MAX_SIZE + 1),
        lambda: shuffle.draw(SEED, 3, 4),
        lambda: shuffle.draw(SEED, 3, -1),
        lambda: shuffle.weighted_index(SEED, []),
        lambda: shuffle.weighted_index(SEED, [0, 0]),
        lambda: shuffle.weighted_index(SEED, [2, -1]),
        lambda: shuffle.weighted_index(SEED, [1 << 255, 1 << 255]),
        lambda: shuffle.derive(SEED, "a", -1),
        lambda: shuffle.derive(SEED, "a", 1 << 64),
        lambda: shuffle.derive(b"", "a"),
    ],
)
def test_bad_arguments(use):
    with pytest.raises(ValueError):
        use()
