"""One conformance list over both backends, against vectors that py_ecc made (tests/vectors/generate.py).

py_ecc takes about 0.4 s for a pairing check, so the list makes each point once.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from py_ecc.bls import G2ProofOfPossession

from p2pflock.errors import InvalidMessageError
from p2pflock.primitives import bls

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "bls.json").read_text())


def raw(text: str) -> bytes:
    return bytes.fromhex(text[2:])


SECRET = [raw(key["secretKey"]) for key in VECTORS["keys"]]
PUBLIC = [raw(key["publicKey"]) for key in VECTORS["keys"]]
SIGNED = VECTORS["signatures"]
SIGNATURE = [raw(case["signature"]) for case in SIGNED]
MESSAGE = [raw(case["message"]) for case in SIGNED]


def cases(name):
    return [pytest.param(raw(case["bytes"]), id=case["why"]) for case in VECTORS[name]]


@pytest.fixture(scope="module", params=["arkworks", "py_ecc"])
def scheme(request):
    return bls.load(request.param)


# --- keys ---
def test_default_backend_is_the_fast_one():
    assert bls.BACKEND == "arkworks"


def test_public_keys(scheme):
    for key in VECTORS["keys"]:
        assert scheme.secret_to_public(raw(key["secretKey"])) == raw(key["publicKey"])
        assert scheme.g1_to_eip2537(raw(key["publicKey"])) == raw(key["publicKeyEip2537"])
        assert scheme.key_validate(raw(key["publicKey"]))


@pytest.mark.parametrize(
    "secret",
    [b"", bytes(32), bytes(31) + b"", b"\1" * 33, bls.CURVE_ORDER.to_bytes(32, "big"), b"\xff" * 32],
    ids=["empty", "zero", "31 bytes", "33 bytes", "order", "all ones"],
)
def test_secret_key_out_of_range(scheme, secret):
    for use in (
        lambda: scheme.secret_to_public(secret),
        lambda: scheme.sign(secret, b""),
        lambda: scheme.pop_prove(secret),
        lambda: scheme.sign_possession(secret, b""),
    ):
        with pytest.raises(ValueError, match="secret key"):
            use()


def test_largest_and_smallest_secret_key(scheme):
    one = scheme.secret_to_public((1).to_bytes(32, "big"))
    minus_one = scheme.secret_to_public((bls.CURVE_ORDER - 1).to_bytes(32, "big"))
    assert one[1:] == minus_one[1:]
    assert one[0] ^ minus_one[0] == 0x20


def test_keygen_is_that_of_the_draft():
    for ikm in (bytes(32), b"\xff" * 32, b"p2pflock" * 10):
        assert int.from_bytes(bls.keygen(ikm), "big") == G2ProofOfPossession.KeyGen(ikm)
    assert int.from_bytes(bls.keygen(bytes(32), b"info"), "big") == G2ProofOfPossession.KeyGen(bytes(32), b"info")
    with pytest.raises(ValueError, match="32 bytes"):
        bls.keygen(bytes(31))


@pytest.mark.parametrize("key", cases("invalidPublicKeys"))
def test_invalid_public_key(scheme, key):
    assert not scheme.key_validate(key)
    assert not scheme.verify(key, MESSAGE[0], SIGNATURE[0])
    assert not scheme.verify_possession(key, MESSAGE[0], SIGNATURE[0])
    assert not scheme.pop_verify(key, SIGNATURE[0])
    assert not scheme.fast_aggregate_verify([PUBLIC[0], key], MESSAGE[0], SIGNATURE[0])
    assert not scheme.aggregate_verify([PUBLIC[0], key], [MESSAGE[0], b""], SIGNATURE[0])
    with pytest.raises(InvalidMessageError):
        scheme.g1_to_eip2537(key)


@pytest.mark.parametrize("signature", cases("invalidSignatures"))
def test_invalid_signature(scheme, signature):
    assert not scheme.verify(PUBLIC[0], MESSAGE[0], signature)
    assert not scheme.pop_verify(PUBLIC[0], signature)
    assert not scheme.fast_aggregate_verify([PUBLIC[0]], MESSAGE[0], signature)
    assert not scheme.aggregate_verify([PUBLIC[0]], [MESSAGE[0]], signature)
    with pytest.raises(InvalidMessageError):
        scheme.aggregate([SIGNATURE[0], signature])
    with pytest.raises(InvalidMessageError):
        scheme.g2_to_eip2537(signature)


# --- one signer ---
@pytest.mark.parametrize("index", [0, 2])  # the empty message and a vote digest
def test_sign_and_verify(scheme, index):
    assert scheme.sign(SECRET[index], MESSAGE[index]) == SIGNATURE[index]
    assert scheme.verify(PUBLIC[index], MESSAGE[index], SIGNATURE[index])
    assert scheme.g2_to_eip2537(SIGNATURE[index]) == raw(SIGNED[index]["signatureEip2537"])


def test_wrong_message_key_or_signature(scheme):
    assert not scheme.verify(PUBLIC[0], b"other", SIGNATURE[0])
    assert not scheme.verify(PUBLIC[1], MESSAGE[0], SIGNATURE[0])
    assert not scheme.verify(PUBLIC[0], MESSAGE[0], bls.INFINITY_SIGNATURE)


# --- many signers ---
def test_aggregate(scheme):
    assert scheme.aggregate(SIGNATURE[:1]) == SIGNATURE[0]
    assert scheme.aggregate(SIGNATURE) == scheme.aggregate(SIGNATURE[::-1]) == G2ProofOfPossession.Aggregate(SIGNATURE)
    assert scheme.aggregate([bls.INFINITY_SIGNATURE]) == bls.INFINITY_SIGNATURE
    assert scheme.g2_to_eip2537(bls.INFINITY_SIGNATURE) == bytes(256)
    with pytest.raises(ValueError, match="nothing"):
        scheme.aggregate([])


def test_fast_aggregate_verify(scheme):
    case = VECTORS["aggregates"][1]
    keys = [raw(key) for key in case["publicKeys"]]
    assert scheme.fast_aggregate_verify(keys, raw(case["message"]), raw(case["signature"]))
    assert not scheme.fast_aggregate_verify(keys[1:], raw(case["message"]), raw(case["signature"]))


def test_fast_aggregate_verify_needs_keys(scheme):
    assert not scheme.fast_aggregate_verify([], b"", bls.INFINITY_SIGNATURE)
    assert not scheme.fast_aggregate_verify([], MESSAGE[0], SIGNATURE[0])


def test_aggregate_verify(scheme):
    aggregate = scheme.aggregate(SIGNATURE[:2])
    assert scheme.aggregate_verify(PUBLIC[:2], MESSAGE[:2], aggregate)
    assert not scheme.aggregate_verify(PUBLIC[1::-1], MESSAGE[:2], aggregate)
    assert not scheme.aggregate_verify(PUBLIC[:2], MESSAGE[:1], aggregate)
    assert not scheme.aggregate_verify(PUBLIC[:1], MESSAGE[:2], aggregate)
    assert not scheme.aggregate_verify([], [], aggregate)
    assert not scheme.aggregate_verify([], [], bls.INFINITY_SIGNATURE)


# --- possession ---
def test_possession(scheme):
    proof = raw(VECTORS["popProofs"][0]["proof"])
    assert scheme.pop_prove(SECRET[0]) == proof
    assert scheme.pop_verify(PUBLIC[0], proof)
    # Attack: a proof is no signature over the key's bytes as an ordinary message.
    assert not scheme.verify(PUBLIC[0], PUBLIC[0], proof)


def test_possession_of_a_message(scheme):
    proof = scheme.sign_possession(SECRET[1], MESSAGE[1])
    assert proof == G2ProofOfPossession._CoreSign(
        int.from_bytes(SECRET[1], "big"), MESSAGE[1], G2ProofOfPossession.POP_TAG
    )
    assert scheme.verify_possession(PUBLIC[1], MESSAGE[1], proof)
    assert not scheme.verify_possession(PUBLIC[1], MESSAGE[0], proof)


# --- around the scheme ---
def test_all_vectors_on_the_default_backend():
    for case in SIGNED:
        assert bls.sign(raw(case["secretKey"]), raw(case["message"])) == raw(case["signature"])
        assert bls.verify(raw(case["publicKey"]), raw(case["message"]), raw(case["signature"]))
        assert bls.g2_to_eip2537(raw(case["signature"])) == raw(case["signatureEip2537"])
    for case in VECTORS["aggregates"]:
        keys = [raw(key) for key in case["publicKeys"]]
        assert bls.fast_aggregate_verify(keys, raw(case["message"]), raw(case["signature"]))
        assert not bls.fast_aggregate_verify(keys[1:], raw(case["message"]), raw(case["signature"]))
        assert [bls.g1_to_eip2537(key) for key in keys] == [raw(key) for key in case["publicKeysEip2537"]]


def test_key_cache_is_bounded_and_does_not_hold_failures(monkeypatch):
    monkeypatch.setattr(bls, "KEY_CACHE_SIZE", 2)
    scheme = bls.Scheme(importlib.import_module("p2pflock.primitives._bls_arkworks"))
    bad = raw(VECTORS["invalidPublicKeys"][-2]["bytes"])
    for _ in range(2):
        assert all(scheme.key_validate(key) for key in PUBLIC)
        assert not scheme.key_validate(bad)
    assert scheme._key.cache_info().currsize == 2
    assert scheme.verify(PUBLIC[0], MESSAGE[0], SIGNATURE[0])


def test_falls_back_to_py_ecc(monkeypatch):
    monkeypatch.delitem(sys.modules, "p2pflock.primitives._bls_arkworks", raising=False)
    monkeypatch.setitem(sys.modules, "py_arkworks_bls12381", None)  # as if no wheel existed
    assert bls._load_default().name == "py_ecc"
