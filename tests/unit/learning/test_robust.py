"""Robust aggregates: pinned bits, what one bad vector can do, what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pflock.errors import InvalidMessageError, LocalProtocolError
from p2pflock.learning import robust

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "robust.json").read_text())
RULES = list(robust.RULES.values())


def draw(seed, size=300):
    """Integers scaled by powers of two: the same bits from any generator that gives the same integers."""
    digest = b"".join(hashlib.sha256(f"{seed}/{i}".encode()).digest() for i in range(-(-size // 8)))
    return (np.frombuffer(digest, "<i4")[:size].astype(np.float64) * 2.0**-31).astype(np.float32)


def crowd(seed, n=9, size=300):
    return [draw(f"{seed}/{i}", size) for i in range(n)]


@pytest.mark.parametrize("name", VECTORS)
def test_vectors(name):
    """Written by tests/vectors/learning_oracle.py in exact fractions, rounded where the law says so."""
    case = VECTORS[name]
    vectors = [np.frombuffer(bytes.fromhex(line), "<f4").astype(np.float32) for line in case["vectors"]]
    assert robust.RULES[case["rule"]](vectors).astype("<f4").tobytes().hex() == case["result"]


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(7)), seed=st.integers(0, 100))
def test_the_order_of_the_arguments_does_not_matter(rule, order, seed):
    vectors = crowd(seed, 7, 40)
    assert rule([vectors[i] for i in order]).tobytes() == rule(vectors).tobytes()


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 100), gain=st.sampled_from([0.0, -1.0, 10.0, -1e4, 1e9, 2.0**39]))
def test_two_bad_vectors_of_nine_move_the_result_by_less_than_the_honest_spread(rule, seed, gain):
    honest = crowd(seed, 7, 60)
    bad = [np.float32(gain) * draw(f"bad {seed}", 60)] * 2
    centre = np.mean(honest, axis=0)
    spread = max(float(np.linalg.norm(vector - centre)) for vector in honest)
    assert np.linalg.norm(rule([*honest, *bad]) - centre) < 1.5 * spread


def test_a_mean_would_not_bear_that():
    honest = crowd(1, 7, 60)
    spread = max(float(np.linalg.norm(vector)) for vector in honest)
    assert np.linalg.norm(np.mean([*honest, 1e4 * draw("bad", 60)], axis=0)) > 100 * spread


@pytest.mark.parametrize("rule", RULES)
def test_equal_vectors_are_their_own_aggregate(rule):
    vector = draw("equal")
    np.testing.assert_array_equal(rule([vector] * 5), vector)
    assert not rule([np.zeros(4, np.float32)] * 3).any()
    assert rule([vector]).tobytes() == vector.tobytes()


def test_trimming():
    column = [np.array([value], np.float32) for value in (-100, 1, 2, 6, 1000)]
    assert robust.trimmed_mean(column).tolist() == [3]
    assert robust.trimmed_mean(column, 2).tolist() == [2]
    with pytest.raises(LocalProtocolError):
        robust.trimmed_mean(column, 3)


def test_a_start_is_where_clipping_begins():
    vectors = crowd(3)
    assert robust.centered_clip(vectors, vectors[0]).tobytes() != robust.centered_clip(vectors).tobytes()
    assert robust.geometric_median(vectors, vectors[0]).shape == vectors[0].shape


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e20])
def test_what_is_not_finite_or_too_large_is_refused(rule, value):
    bad = draw("bad")
    bad[7] = value
    with pytest.raises(InvalidMessageError, match="finite"):
        rule([*crowd(1), bad])


@pytest.mark.parametrize("rule", RULES)
def test_sizes_and_types(rule):
    for bad in (draw("bad", 299), draw("bad").astype(np.float64), draw("bad").reshape(1, 300)):
        with pytest.raises(InvalidMessageError):
            rule([*crowd(1), bad])
    with pytest.raises(LocalProtocolError):
        rule([])


def test_minus_zero_and_subnormals_are_zero():
    vectors = [np.array([-0.0, 1e-40, 1], np.float32)] * 3
    assert robust.trimmed_mean(vectors).tobytes() == np.array([0, 0, 1], np.float32).tobytes()
