from __future__ import annotations

import base64
import hashlib

import pytest

from p2pflock.errors import InvalidMessageError
from p2pflock.primitives.cid import CID, DAG_CBOR, DAG_PB, RAW

# `printf 'hello world' | ipfs add --cid-version=1 --raw-leaves`: well known.
HELLO = "bafkreifzjut3te2nhyekklss27nh3k72ysco7y32koao5eei66wof36n5e"


def test_known_id():
    cid = CID.of_raw(b"hello world")
    assert str(cid) == HELLO
    assert CID.parse(HELLO) == cid
    assert cid.digest == hashlib.sha256(b"hello world").digest()


@pytest.mark.parametrize("codec", [RAW, DAG_PB, DAG_CBOR])
def test_both_forms_round_trip(codec):
    cid = CID.of(codec, b"x")
    assert CID.from_bytes(cid.to_bytes()) == cid
    assert CID.parse(str(cid)) == cid
    assert len(cid.to_bytes()) == 36


def test_matches_looks_at_content_only():
    assert CID.of_raw(b"a").matches(b"a")
    assert not CID.of_raw(b"a").matches(b"b")
    assert CID.of_raw(b"a") != CID.of_dag_cbor(b"a")
    assert len({CID.of_raw(b"a"), CID.of_raw(b"a")}) == 1


GOOD = CID.of_raw(b"hello world")
BINARY = GOOD.to_bytes()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        BINARY[:-1],
        BINARY + b"\0",
        b"\x00" + BINARY[1:],  # version
        b"\x01\x85" + BINARY[2:],  # unknown codec
        b"\x01\xd5\x00" + BINARY[2:-1],  # padded varint
        BINARY[:2] + b"\x13\x20" + BINARY[4:],  # sha2-512
        BINARY[:2] + b"\x12\x1f" + BINARY[4:],
        b"\x12\x20" + GOOD.digest,  # CIDv0
    ],
)
def test_other_binary_forms_are_refused(data):
    with pytest.raises(InvalidMessageError):
        CID.from_bytes(data)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "b",
        HELLO[:-1],
        HELLO + "a",
        HELLO + "=",
        HELLO.upper(),
        HELLO[:-2] + "5E",
        "z" + HELLO[1:],
        HELLO[:-1] + "f",  # spare bits of the last digit are set
        HELLO[:10] + "0" + HELLO[11:],  # not a base32 digit
        HELLO[:10] + "é" + HELLO[11:],
        "QmT78zSuBmuS4z925WZfrqQ1qHaJ56DQaTfyMUF7F8ff5o",
        "b" + base64.b32encode(b"\x02" + BINARY[1:]).decode().lower().rstrip("="),
    ],
)
def test_other_texts_are_refused(text):
    with pytest.raises(InvalidMessageError):
        CID.parse(text)


@pytest.mark.parametrize(("codec", "digest"), [(0x12, bytes(32)), (RAW, bytes(31)), (RAW, bytearray(32))])
def test_constructor_refuses_foreign_parts(codec, digest):
    with pytest.raises(InvalidMessageError):
        CID(codec, digest)
