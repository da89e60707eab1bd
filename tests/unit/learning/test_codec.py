from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from p2pflock.errors import InvalidMessageError, LocalProtocolError
from p2pflock.learning import codec
from p2pflock.learning.codec import Shape

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "codec.json").read_text())
SHAPE = Shape(parameters=700, chunk=256, k=24)


def vector(seed=0, size=SHAPE.parameters):
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def payload(seed=0, shape=SHAPE):
    return codec.encode(codec.compress(vector(seed, shape.parameters), shape))


@pytest.mark.parametrize("name", VECTORS)
def test_vectors(name):
    case = VECTORS[name]
    values = np.frombuffer(bytes.fromhex(case["vector"]), "<f4").astype(np.float32)
    shape = Shape(len(values), case["chunk"], case["k"])
    sparse = codec.compress(values, shape)
    assert codec.encode(sparse).hex() == case["payload"]
    decoded = codec.decode(bytes.fromhex(case["payload"]), shape)
    assert codec.encode(decoded).hex() == case["payload"]
    assert np.array_equal(decoded.values(), sparse.values())
    assert np.array_equal(decoded.indices, sparse.indices)


def test_sends_the_largest_of_each_chunk_and_the_first_of_equals():
    values = np.zeros(32, np.float32)
    values[[1, 5, 9]] = [0.5, -4, 0.5]
    values[16:] = 1
    sparse = codec.compress(values, Shape(32, 16, 2))
    assert sparse.indices.tolist() == [1, 5, 16, 17]
    assert np.sign(sparse.values()).tolist() == [1, -1, 1, 1]
    assert sparse.values()[2] == 1  # equal magnitudes come back exactly


def test_norm_is_the_l2_norm():
    sparse = codec.compress(vector(), SHAPE)
    assert sparse.norm() == pytest.approx(float(np.linalg.norm(sparse.values().astype(np.float64))), rel=1e-7)


def test_what_is_not_sent_stays_in_the_feedback():
    delta, kept = vector(1), vector(2)
    data, feedback = codec.compress_with_feedback(delta, kept, 0.5, SHAPE)
    sent = codec.decode(data, SHAPE)
    total = feedback.copy()
    total[sent.indices] += sent.values()
    assert np.allclose(total, 0.5 * kept + delta, atol=1e-6)


def test_over_many_rounds_feedback_delivers_everything():
    """A constant pseudo-gradient arrives in full, although a round carries a tenth of it."""
    delta, feedback, arrived = vector(3), np.zeros(SHAPE.parameters, np.float32), np.zeros(SHAPE.parameters)
    for _ in range(200):
        data, feedback = codec.compress_with_feedback(delta, feedback, 1.0, SHAPE)
        sent = codec.decode(data, SHAPE)
        arrived[sent.indices] += sent.values()
    assert np.linalg.norm(arrived / 200 - delta) < 0.1 * np.linalg.norm(delta)


def test_size_at_the_density_that_ships():
    """The figure of the research: about 0.034 bytes a parameter at k = 128 of 4096."""
    shape = Shape(200_000, 4096, 128)
    assert len(payload(shape=shape)) < 0.036 * shape.parameters


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_own_divergence_is_not_sent(bad):
    values = vector()
    values[7] = bad
    with pytest.raises(LocalProtocolError):
        codec.compress(values, SHAPE)


def test_shape_bounds():
    for arguments in ((0, 16, 1), (10, 16, 17), (10, 0, 0), (10, 1 << 16, 1), (1 << 31, 16, 1)):
        with pytest.raises(LocalProtocolError):
            Shape(*arguments)


def refuse(data, shape=SHAPE):
    with pytest.raises(InvalidMessageError):
        codec.decode(bytes(data), shape)


@pytest.mark.parametrize("other", [Shape(701, 256, 24), Shape(700, 128, 24), Shape(700, 256, 25)])
def test_refuses_another_shape(other):
    refuse(payload(), other)


def test_refuses_every_truncation_and_extension():
    data = payload()
    for size in range(len(data)):
        refuse(data[:size])
    for extra in (b"\0", b"\xff", data):
        refuse(data + extra)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0, 0.0, -0.0, 2.0**-61, 2.0**21, 1e-42])
def test_refuses_a_scale_that_would_poison_the_fold(scale):
    data = bytearray(payload())
    struct.pack_into("<f", data, codec.HEADER.size + 2 * SHAPE.chunks, scale)
    refuse(data)


def test_refuses_more_entries_than_the_share():
    """The density of the start rounds in a later one would be a larger voice."""
    dense = Shape(SHAPE.parameters, SHAPE.chunk, 100)
    data = bytearray(payload(shape=dense))
    struct.pack_into("<I", data, 12, SHAPE.k)
    refuse(data)


def test_refuses_a_chunk_without_the_lower_level():
    """Levels 3 with scale s mean what levels 2 with scale 1.5 s mean: only one of the two is canonical."""
    shape = Shape(16, 16, 1)
    data = bytearray(codec.encode(codec.compress(np.eye(1, 16, 3, dtype=np.float32)[0], shape)))
    codec.decode(bytes(data), shape)
    data[-1] |= 0x40
    refuse(data, shape)


def test_claims_do_not_allocate():
    """A 4 GiB model's worth of counts in a short message is refused by its length."""
    shape = Shape(1 << 30, 1 << 15, 1 << 15)
    head = codec.HEADER.pack(codec.MAGIC, shape.parameters, shape.chunk, shape.k)
    refuse(head + b"\xff\x7f" * shape.chunks, shape)
    refuse(bytes(SHAPE.max_bytes() + 1))
