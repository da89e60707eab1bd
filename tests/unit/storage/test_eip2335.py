"""The test vectors of EIP-2335, and what a hostile keystore file can do."""

from __future__ import annotations

import copy
import json
import os
from typing import Any

import pytest

from p2pflock.errors import KeystoreError, PasswordError
from p2pflock.primitives import bls
from p2pflock.storage import eip2335

PASSWORD = "𝔱𝔢𝔰𝔱𝔭𝔞𝔰𝔰𝔴𝔬𝔯𝔡🔑"
SECRET = bytes.fromhex("000000000019d6689c085ae165831e934ff763ae46a2a6c172b3f1b60a8ce26f")
SALT = "d4e56740f876aef8c010b86a40d5f56745a118d0906a34e69aec8c0db1cb8fa3"
PUBKEY = "9612d7a727c9d0a22e185a1c768478dfe919cada9266988cb32359c11f2b7b27f4ae4040902382ae2910c15e2b420d07"


def vector(function: str, params: dict[str, Any], checksum: str, message: str) -> dict[str, Any]:
    return {
        "crypto": {
            "kdf": {"function": function, "params": {"dklen": 32, "salt": SALT, **params}, "message": ""},
            "checksum": {"function": "sha256", "params": {}, "message": checksum},
            "cipher": {
                "function": "aes-128-ctr",
                "params": {"iv": "264daa3f303d7259501c93d997d84fe6"},
                "message": message,
            },
        },
        "description": "This is a test keystore.",
        "pubkey": PUBKEY,
        "path": "m/12381/60/3141592653/589793238",
        "uuid": "1d85ae20-35c5-4611-98e8-aa14a633906f",
        "version": 4,
    }


SCRYPT = vector(
    "scrypt",
    {"n": 262144, "p": 1, "r": 8},
    "d2217fe5f3e9a1e34581ef8a78f7c9928e436d36dacc5e846690a5581e8ea484",
    "06ae90d55fe0a6e9c5c3bc5b170827b2e5cce3929ed3f116c2811e6366dfe20f",
)
PBKDF2 = vector(
    "pbkdf2",
    {"c": 262144, "prf": "hmac-sha256"},
    "8a9f5d9912ed7e75ea794bc5a89bca5f193721d30868ade6f73043c6ea6febf1",
    "cee03fde2af33149775b7223e7845e4fb2c8ae1792e5f99fe9ecf474cc8c16ad",
)


@pytest.mark.parametrize("document", [SCRYPT, PBKDF2], ids=["scrypt", "pbkdf2"])
def test_vectors_of_the_eip(document: dict[str, Any]) -> None:
    secret = eip2335.decrypt(document, PASSWORD)
    assert secret == SECRET
    assert bls.secret_to_public(secret).hex() == document["pubkey"]


def test_password_normalization() -> None:
    assert eip2335.normalize_password(PASSWORD).hex() == "7465737470617373776f7264f09f9491"
    assert eip2335.normalize_password("a\x00b\x1f\x7f\x80\x9fc\u00a0") == b"abc "  # C0, Delete, C1 go; NBSP is a space
    assert eip2335.normalize_password("Å") == eip2335.normalize_password("A\u030a")


def test_round_trip() -> None:
    document = eip2335.encrypt(
        SECRET, "pass\tword", entropy=os.urandom, cost=eip2335.FAST, pubkey=b"\1\2", description="d"
    )
    document = json.loads(json.dumps(document))
    assert eip2335.decrypt(document, "password") == SECRET
    assert document["pubkey"] == "0102"
    assert SECRET.hex() not in json.dumps(document)
    with pytest.raises(PasswordError) as caught:
        eip2335.decrypt(document, "passwort")
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_flipped_cipher_text_is_noticed() -> None:
    document = copy.deepcopy(PBKDF2)
    document["crypto"]["cipher"]["message"] = "00" * 32
    with pytest.raises(PasswordError):
        eip2335.decrypt(document, PASSWORD)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("version", 5),
        ("crypto", None),
        ("crypto.kdf.function", "argon2"),
        ("crypto.kdf.params.salt", "zz"),
        ("crypto.kdf.params.salt", 7),
        ("crypto.kdf.params.dklen", 1 << 40),
        ("crypto.kdf.params.n", 1 << 30),  # 1 TiB of memory
        ("crypto.kdf.params.n", 3),
        ("crypto.kdf.params.n", "262144"),
        ("crypto.kdf.params.p", 1 << 20),
        ("crypto.kdf.params.r", 0),
        ("crypto.checksum.function", "md5"),
        ("crypto.cipher.function", "aes-128-ecb"),
        ("crypto.cipher.params.iv", "00"),
        ("crypto.cipher.message", "00" * 65),
    ],
)
def test_malformed_or_costly_files_are_refused(where: str, value: object) -> None:
    document = copy.deepcopy(SCRYPT)
    *parents, last = where.split(".")
    node = document
    for name in parents:
        node = node[name]
    node[last] = value
    with pytest.raises(KeystoreError):
        eip2335.decrypt(document, PASSWORD)


def test_costly_pbkdf2_is_refused() -> None:
    document = copy.deepcopy(PBKDF2)
    document["crypto"]["kdf"]["params"]["c"] = 1 << 40
    with pytest.raises(KeystoreError):
        eip2335.decrypt(document, PASSWORD)
