"""Compiled and numpy code on the same random input: the same bytes, the same refusals, no index out of bounds."""

from __future__ import annotations

from types import SimpleNamespace

import numba
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from p2pflock.errors import InvalidMessageError
from p2pflock.learning import codec, compiled, kernels
from p2pflock.learning.codec import Shape
from p2pflock.learning.fold import FoldRule, Weighted, fold
from p2pflock.learning.kernels import OPTIONS

floats = st.one_of(
    st.just(0.0),
    st.just(-0.0),
    st.sampled_from([1.0, -1.0, 0.5, 2.0**-149, -(2.0**-126), -(2.0**-59), 2.0**40, 3.4028234663852886e38]),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-1, 1, width=32),
)


@st.composite
def shaped(draw, vectors=1):
    size = draw(st.integers(1, 150))
    chunk = draw(st.sampled_from([1, 16, 17, 64, 128]))
    k = draw(st.one_of(st.just(chunk), st.integers(1, chunk)))
    made = []
    for _ in range(vectors):
        palette = draw(st.one_of(st.just(floats), st.lists(floats, min_size=1, max_size=3).map(st.sampled_from)))
        made.append(np.array(draw(st.lists(palette, min_size=size, max_size=size)), np.float32))
    is_dense = draw(st.integers(0, 3)) == 0
    return Shape(size, chunk, chunk if is_dense else k, is_dense), made


def both(compute):
    results = []
    for choice in ("always", "never"):
        with compiled.choose(choice):
            results.append(compute())
    assert results[0] == results[1]
    return results[0]


def parts(sparse):
    return [getattr(sparse, name).tobytes() for name in ("counts", "scales", "indices", "levels")]


def read(payload, shape):
    try:
        sparse = codec.decode(payload, shape)
    except InvalidMessageError:
        return None
    return parts(sparse), sparse.norm()


@given(shaped())
def test_the_same_bytes(case):
    shape, (vector,) = case
    both(lambda: parts(codec.compress(vector, shape)))
    payload = both(lambda: codec.encode(codec.compress(vector, shape)))
    assert both(lambda: read(payload, shape)) is not None


@given(shaped(vectors=2), st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_the_same_feedback(case, beta):
    shape, (delta, kept) = case
    assume(np.abs(delta).max() < 2.0**126 and np.abs(kept).max() < 2.0**126)

    def feed():
        payload, feedback = codec.compress_with_feedback(delta, kept, beta, shape)
        return payload, feedback.tobytes()

    both(feed)


@given(shaped(), st.data())
@settings(max_examples=300)
def test_the_same_refusals(case, data):
    shape, (vector,) = case
    payload = bytearray(codec.encode(codec.compress(vector, shape)))
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(codec.HEADER.size, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    both(lambda: read(bytes(payload), shape))
    cut = data.draw(st.integers(0, len(payload)))
    both(lambda: read(bytes(payload[:cut]), shape))


@given(
    shaped(vectors=5),
    st.lists(st.one_of(st.integers(1, 5), st.integers(1, 1 << 40)), min_size=4, max_size=4),
    st.booleans(),
    st.sampled_from([0.0, 0.01, 0.5, 2.0]),
    st.sampled_from([0.0, 1.0, 1.5, -0.7]),
    st.integers(1, 9),
)
def test_the_same_fold(case, weights, is_clipped, norm_bound, gain, floor_divisor):
    shape, (checkpoint, *vectors) = case
    rule = FoldRule(floor_divisor, gain, norm_bound, is_clipped)
    inputs = [Weighted(codec.compress(vector, shape), weight) for vector, weight in zip(vectors, weights, strict=True)]
    both(lambda: attempt(rule, checkpoint, inputs))


def attempt(rule, checkpoint, inputs):
    try:
        return fold(rule, checkpoint, inputs).tobytes()
    except InvalidMessageError as error:
        return str(error)


@pytest.fixture(scope="module")
def checked():
    """The kernels once more, with every index checked."""
    options = {**OPTIONS, "boundscheck": True}
    names = ("pick", "pack", "unpack", "sum_squares", "combine", "subtract")
    made = {name: numba.njit(**options)(getattr(kernels, name).py_func) for name in names}
    constants = {name: getattr(kernels, name) for name in ("OK", "NOT_FINITE", "BAD_POSITION", "PADDING")}
    return SimpleNamespace(**made, **constants)


def test_no_payload_leads_out_of_bounds(checked, monkeypatch):
    monkeypatch.setattr(compiled, "_load", lambda: checked)

    @given(shaped(), st.data())
    @settings(max_examples=300, deadline=None)  # the first calls compile
    def attack(case, data):
        shape, (vector,) = case
        with compiled.choose("always"):
            payload = bytearray(codec.encode(codec.compress(vector, shape)))
            head = codec.HEADER.size
            if data.draw(st.booleans()):
                payload[head:] = data.draw(st.binary(max_size=200))
            elif len(payload) > head:
                payload[data.draw(st.integers(head, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
            try:
                sparse = codec.decode(bytes(payload), shape)
            except InvalidMessageError:
                return
            assert codec.encode(sparse) == payload
            fold(FoldRule(), np.zeros(shape.parameters, np.float32), [Weighted(sparse, 1), Weighted(sparse, 2)])

    attack()
