"""Attacks on BLS aggregates with special points.  Each worked against a plain wrapper of a pairing library."""

from __future__ import annotations

import json
from pathlib import Path

import py_arkworks_bls12381 as arkworks
import pytest

from p2pflock.primitives import bls

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "bls.json").read_text())
KEYS = [bytes.fromhex(key["publicKey"][2:]) for key in VECTORS["keys"]]
SECRETS = [bytes.fromhex(key["secretKey"][2:]) for key in VECTORS["keys"]]
INFINITY_KEY = b"\xc0" + bytes(47)


def negated(point: bytes) -> bytes:
    return bytes((point[0] ^ 0x20,)) + point[1:]


@pytest.fixture(params=["arkworks", "py_ecc"])
def scheme(request):
    return bls.load(request.param)


def test_keys_that_cancel(scheme):
    """{pk, -pk} sums to infinity, under which the infinity signature holds for every message."""
    pair = [KEYS[0], negated(KEYS[0])]
    assert all(scheme.key_validate(key) for key in pair)
    assert not scheme.fast_aggregate_verify(pair, b"any record", bls.INFINITY_SIGNATURE)


def test_infinity_key(scheme):
    assert not scheme.verify(INFINITY_KEY, b"any record", bls.INFINITY_SIGNATURE)
    assert not scheme.fast_aggregate_verify([INFINITY_KEY], b"any record", bls.INFINITY_SIGNATURE)
    assert not scheme.aggregate_verify([INFINITY_KEY], [b"any record"], bls.INFINITY_SIGNATURE)
    assert not scheme.pop_verify(INFINITY_KEY, bls.INFINITY_SIGNATURE)


def test_infinity_key_as_a_free_member(scheme):
    """An infinity key in the set would count as a signer without signing."""
    signature = scheme.sign(SECRETS[0], b"record")
    assert not scheme.fast_aggregate_verify([KEYS[0], INFINITY_KEY], b"record", signature)


def test_backend_accepts_stray_bits_in_infinity_and_we_do_not():
    """arkworks 0.5 decodes e000…00 and c000…01 as infinity: three encodings of one signature."""
    for data in (b"\xe0" + bytes(95), b"\xc0" + bytes(94) + b"\1"):
        assert arkworks.G2Point.from_compressed_bytes(data) == arkworks.G2Point.identity()
        with pytest.raises(Exception, match="invalid BLS signature"):
            bls.aggregate([data])


def test_rogue_key_is_stopped_by_the_proof_of_possession():
    """x·G - pk forges an aggregate with pk's owner asleep; nobody can prove possession of it."""
    x = 123456789
    victim = arkworks.G1Point.from_compressed_bytes(KEYS[0])
    rogue = (arkworks.G1Point() * arkworks.Scalar(x) - victim).to_compressed_bytes()
    secret = x.to_bytes(32, "big")
    assert bls.fast_aggregate_verify([KEYS[0], rogue], b"record", bls.sign(secret, b"record"))
    assert not bls.pop_verify(rogue, bls.sign_possession(secret, rogue))
