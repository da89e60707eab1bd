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
DENSE = Shape(parameters=700, chunk=256, k=256, is_dense=True)


def vector(seed=0, size=SHAPE.parameters):
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def payload(seed=0, shape=SHAPE):
    return codec.encode(codec.compress(vector(seed, shape.parameters), shape))


@pytest.mark.parametrize("name", VECTORS)
def test_vectors(name):
    case = VECTORS[name]
    values = np.frombuffer(bytes.fromhex(case["vector"]), "<f4").astype(np.float32)
    shape = Shape(len(values), case["chunk"], case["k"], case.get("is_dense", False))
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


@pytest.mark.parametrize("shape", [SHAPE, DENSE])
def test_what_is_not_sent_stays_in_the_feedback(shape):
    """What a peer decodes and what stays are the whole: the rounding of the scale is not lost either."""
    delta, kept = vector(1), vector(2)
    data, feedback = codec.compress_with_feedback(delta, kept, 0.5, shape)
    sent = codec.decode(data, shape)
    total = feedback.copy()
    total[sent.indices] += sent.values()
    assert np.allclose(total, 0.5 * kept + delta, atol=1e-6)
    assert np.abs(feedback).max() > 1e-4


@pytest.mark.parametrize(("shape", "rest"), [(SHAPE, 0.1), (DENSE, 1e-4)])
def test_over_many_rounds_feedback_delivers_everything(shape, rest):
    """A constant pseudo-gradient arrives in full, although a round carries a tenth of it, or rounds it to a byte."""
    delta, feedback, arrived = vector(3), np.zeros(shape.parameters, np.float32), np.zeros(shape.parameters)
    for _ in range(200):
        data, feedback = codec.compress_with_feedback(delta, feedback, 1.0, shape)
        sent = codec.decode(data, shape)
        arrived[sent.indices] += sent.values()
    assert np.linalg.norm(arrived / 200 - delta) < rest * np.linalg.norm(delta)


def test_size_at_the_density_that_ships():
    """The figure of the research: about 0.034 bytes a parameter at k = 128 of 4096."""
    shape = Shape(200_000, 4096, 128)
    assert len(payload(shape=shape)) < 0.034 * shape.parameters


def test_two_hundred_times_smaller_at_the_density_of_the_acceptance():
    shape = Shape(1 << 20, 4096, 64)
    assert len(payload(shape=shape)) * 209 < 4 * shape.parameters


def test_scales_are_rounded_to_the_nearest_with_ties_to_even():
    below, above, tie = 1 + 2.0**-8 - 2.0**-20, 1 + 2.0**-8 + 2.0**-20, 1 + 2.0**-8
    given = np.array([below, above, tie, tie + 2.0**-7, 0, codec.MIN_SCALE, codec.MAX_SCALE], np.float32)
    expected = [1, 1 + 2.0**-7, 1, 1 + 2.0**-6, 0, codec.MIN_SCALE, codec.MAX_SCALE]
    assert codec.round_scales(given).tolist() == expected


def test_a_scale_that_was_not_rounded_is_not_written():
    sparse = codec.compress(vector(), SHAPE)
    odd = np.nextafter(sparse.scales, np.float32(1))
    with pytest.raises(LocalProtocolError):
        codec.encode(codec.Sparse(SHAPE, sparse.counts, odd, sparse.indices, sparse.levels))


def test_dense_sends_everything_within_half_a_step():
    sparse = codec.compress(vector(), DENSE)
    steps = np.repeat(sparse.scales, sparse.counts)
    assert sparse.indices.tolist() == list(range(DENSE.parameters))
    assert (np.abs(sparse.values() - vector()) <= 0.7 * steps).all()  # the largest may be cut: its scale was rounded
    assert (np.abs(sparse.values() - vector()) > 0.5 * steps).sum() <= DENSE.chunks
    assert len(codec.encode(sparse)) == DENSE.max_bytes() == codec.HEADER.size + 2 * 3 + 700


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_own_divergence_is_not_sent(bad):
    values = vector()
    values[7] = bad
    with pytest.raises(LocalProtocolError):
        codec.compress(values, SHAPE)


def test_shape_bounds():
    for arguments in ((0, 16, 1), (10, 16, 17), (10, 0, 0), (10, 1 << 16, 1), (1 << 31, 16, 1), (10, 16, 1, True)):
        with pytest.raises(LocalProtocolError):
            Shape(*arguments)


def refuse(data, shape=SHAPE):
    with pytest.raises(InvalidMessageError):
        codec.decode(bytes(data), shape)


@pytest.mark.parametrize("other", [Shape(701, 256, 24), Shape(700, 128, 24), Shape(700, 256, 25), DENSE])
def test_refuses_another_shape(other):
    refuse(payload(), other)


@pytest.mark.parametrize("shape", [SHAPE, DENSE])
def test_refuses_every_truncation_and_extension(shape):
    data = payload(shape=shape)
    for size in range(len(data)):
        refuse(data[:size], shape)
    for extra in (b"\0", b"\xff", data):
        refuse(data + extra, shape)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0, 0.0, -0.0, 2.0**-61, 2.0**21, 1e-42])
@pytest.mark.parametrize(("shape", "at"), [(SHAPE, codec.HEADER.size + 1), (DENSE, codec.HEADER.size)])
def test_refuses_a_scale_that_would_poison_the_fold(shape, at, scale):
    data = bytearray(payload(shape=shape))
    assert data[codec.HEADER.size] == 1 or shape.is_dense
    data[at : at + 2] = struct.pack("<f", scale)[2:]
    refuse(data, shape)


def test_refuses_counts_that_go_without_saying():
    """Every chunk sends its share, and one byte says so: the same array may not be written longer."""
    data, at = payload(), codec.HEADER.size
    counts = SHAPE.shares().astype("<u2").tobytes()
    assert data[at] == 1
    refuse(data[:at] + b"\0" + counts + data[at + 1 :])
    refuse(data[:at] + b"\2" + data[at + 1 :])


def test_refuses_to_leave_the_counts_out_of_a_payload_that_is_not_full():
    values = vector()
    values[3:256] = 0
    data, at = codec.encode(codec.compress(values, SHAPE)), codec.HEADER.size
    assert data[at] == 0
    assert struct.unpack_from("<3H", data, at + 1) == (3, 24, 18)
    refuse(data[:at] + b"\1" + data[at + 7 :])


@pytest.mark.parametrize("levels", [[-128, 127], [126, -126], [0, 0]])
def test_refuses_levels_that_a_scale_could_be_traded_against(levels):
    shape = Shape(2, 2, 2, is_dense=True)
    data = codec.encode(codec.compress(np.array([1, 0.5], np.float32), shape))
    codec.decode(data, shape)
    refuse(data[:-2] + struct.pack("<2b", *levels), shape)


def test_refuses_levels_without_a_scale():
    shape = Shape(2, 2, 2, is_dense=True)
    data = codec.encode(codec.compress(np.zeros(2, np.float32), shape))
    codec.decode(data, shape)
    refuse(data[:-1] + b"\x7f", shape)


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
    refuse(shape.head + b"\0" + b"\xff\x7f" * shape.chunks, shape)
    refuse(shape.head + b"\1" + b"\xff\x7f" * shape.chunks, shape)
    small = Shape(1 << 30, 16, 1)
    refuse(small.head + b"\1" + bytes(100), small)
    refuse(bytes(SHAPE.max_bytes() + 1))
