from __future__ import annotations

import hashlib
import json
import struct

import numpy as np
import pytest
from safetensors.numpy import load, save

from p2pflock.errors import InvalidMessageError, LocalProtocolError
from p2pflock.learning import checkpoint
from p2pflock.learning.checkpoint import Layout

LAYOUT = Layout.of({"b.weight": (2, 3), "a.bias": (4,), "b.bias": (), "ä": (1, 1)})


def vector():
    return np.arange(LAYOUT.parameters, dtype=np.float32)


def test_bytes_are_what_the_safetensors_library_writes_and_reads():
    data = checkpoint.to_bytes(LAYOUT, vector())
    tensors = {name: np.array(view) for name, view in LAYOUT.split(vector()).items()}
    assert data == save(tensors)
    read = load(data)
    assert list(LAYOUT.split(vector())) == sorted(read)
    assert all(np.array_equal(read[name], view) for name, view in tensors.items())


def test_round_trip_and_names_of_the_bytes():
    data = checkpoint.to_bytes(LAYOUT, vector())
    assert np.array_equal(checkpoint.from_bytes(LAYOUT, data), vector())
    assert checkpoint.compute_model_hash(data) == hashlib.sha256(data).digest()
    assert str(checkpoint.compute_weights_cid(data)).startswith("bafkrei")  # one raw block


def rewritten(change):
    data = checkpoint.to_bytes(LAYOUT, vector())
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.update(__metadata__={"a": "b"}),
        lambda header: header.update(c=header.pop("a.bias")),
        lambda header: header["a.bias"].update(shape=[2, 2]),
        lambda header: header["a.bias"].update(dtype="I32"),
        lambda header: header["a.bias"].update(data_offsets=[0, 1 << 60]),
        lambda header: header.pop("b.bias"),
    ],
)
def test_refuses_every_other_header(change):
    with pytest.raises(InvalidMessageError):
        checkpoint.from_bytes(LAYOUT, rewritten(change))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_refuses_what_is_not_finite(value):
    bad = vector()
    bad[-1] = value
    with pytest.raises(InvalidMessageError):
        checkpoint.from_bytes(LAYOUT, checkpoint.to_bytes(LAYOUT, bad))


def test_own_vector_must_fit():
    for bad in (vector()[:-1], vector().astype(np.float64)):
        with pytest.raises(LocalProtocolError):
            checkpoint.to_bytes(LAYOUT, bad)
