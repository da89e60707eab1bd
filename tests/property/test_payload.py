"""Codec and fold on random input: round trips, strictness against mutation, agreement with the slow oracle."""

from __future__ import annotations

import importlib.util
import math
import tracemalloc
from pathlib import Path

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from p2pflock.errors import InvalidMessageError
from p2pflock.learning import codec
from p2pflock.learning.codec import Shape
from p2pflock.learning.fold import FoldRule, Weighted, fold

ORACLE = Path(__file__).parents[1] / "vectors" / "learning_oracle.py"
_spec = importlib.util.spec_from_file_location("learning_oracle", ORACLE)
oracle = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(oracle)

floats = st.one_of(
    st.just(0.0),
    st.sampled_from([1.0, -1.0, 0.5, 2.0**-149, -(2.0**-59), 2.0**40, 3.4028234663852886e38]),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-1, 1, width=32),
)


@st.composite
def shaped(draw, vectors=1):
    size = draw(st.integers(1, 90))
    chunk = draw(st.sampled_from([16, 17, 64, 128]))
    is_dense = draw(st.booleans())
    shape = Shape(size, chunk, chunk if is_dense else draw(st.integers(1, chunk)), is_dense)
    made = [np.array(draw(st.lists(floats, min_size=size, max_size=size)), np.float32) for _ in range(vectors)]
    return shape, made


@given(shaped())
def test_round_trip_and_oracle(case):
    shape, (vector,) = case
    sparse = codec.compress(vector, shape)
    data = codec.encode(sparse)
    assert len(data) <= shape.max_bytes()
    if shape.is_dense:
        assert data == oracle.encode_dense(vector.tolist(), shape.chunk)
    else:
        assert data == oracle.encode(vector.tolist(), shape.chunk, shape.k)
    back = codec.decode(data, shape)
    for name in ("counts", "scales", "indices", "levels"):
        assert np.array_equal(getattr(back, name), getattr(sparse, name))
    assert codec.encode(back) == data
    assert np.isfinite(back.values()).all()
    assert math.isfinite(back.norm())


@given(shaped(), st.data())
@settings(max_examples=300)
def test_a_mutated_payload_is_refused_or_is_another_canonical_one(case, data):
    shape, (vector,) = case
    payload = bytearray(codec.encode(codec.compress(vector, shape)))
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    check_strict(bytes(payload), shape)


@given(shaped(), st.binary(max_size=200))
@settings(max_examples=300)
def test_random_bytes_behind_a_true_header(case, body):
    shape, _ = case
    check_strict(shape.head + body, shape)


@given(st.integers(1, 40), st.sampled_from([4, 16]), st.booleans(), st.data())
@settings(max_examples=300)
def test_random_bytes_of_the_right_length_behind_a_true_header(size, chunk, is_dense, data):
    shape = Shape(size, chunk, chunk if is_dense else 2, is_dense)
    body = data.draw(st.binary(min_size=2 * shape.chunks, max_size=shape.max_bytes() - codec.HEADER.size))
    check_strict(shape.head + body, shape)


@given(st.integers(1, 1 << 22), st.sampled_from([16, 4096]), st.booleans(), st.binary(max_size=300))
@settings(max_examples=50, deadline=2000)
def test_a_short_message_takes_little_memory_whatever_it_claims(size, chunk, is_dense, body):
    """Bounded by what this peer knows of its own model (a few integers for each chunk), and the message."""
    shape = Shape(size, chunk, chunk if is_dense else 16, is_dense)
    message = shape.head + body
    tracemalloc.start()
    try:
        check_strict(message, shape)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200_000 + 500 * len(message)


def check_strict(payload, shape):
    try:
        sparse = codec.decode(payload, shape)
    except InvalidMessageError:
        return
    assert codec.encode(sparse) == payload
    assert (np.diff(sparse.indices) > 0).all()
    assert ((sparse.indices >= 0) & (sparse.indices < shape.parameters)).all()
    assert np.isfinite(sparse.values()).all()


@given(shaped(vectors=4), st.lists(st.integers(1, 1 << 40), min_size=3, max_size=3), st.booleans())
def test_fold_equals_the_oracle(case, weights, is_clipped):
    shape, (checkpoint, *vectors) = case
    assume(np.abs(checkpoint).max() < 2.0**100)
    inputs = [
        Weighted(codec.compress(vector, shape), weight) for vector, weight in zip(vectors, weights, strict=True)
    ]
    result = fold(FoldRule(is_clipped=is_clipped), checkpoint, inputs)
    pairs = [(vector.tolist(), weight) for vector, weight in zip(vectors, weights, strict=True)]
    expected = oracle.fold(
        checkpoint.tolist(), pairs, shape.chunk, shape.k, is_dense=shape.is_dense, is_clipped=is_clipped
    )
    assert result.tobytes() == np.array(expected, np.float32).tobytes()
