from __future__ import annotations

import base58
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from eth_keys import keys

from p2pflock.errors import InvalidMessageError
from p2pflock.primitives import peerid

# RFC 8032, section 7.1, test 2
SEED = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
PUBLIC = bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
SIGNATURE = bytes.fromhex(
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)
PEER = peerid.from_ed25519(PUBLIC)
ED25519_ORDER = 2**252 + 27742317777372353535851937790883648493


def test_layout():
    assert PEER.hex() == "002408011220" + PUBLIC.hex()
    assert peerid.public_key(PEER) == PUBLIC


def test_text_is_base58():
    text = peerid.to_text(PEER)
    assert text == base58.b58encode(PEER).decode()
    assert text.startswith("12D3Koo")
    assert peerid.from_text(text) == PEER


@pytest.mark.parametrize("filler", [b"\x02", b"\x7e", b"\xfe"])
def test_text_round_trip_at_the_edges(filler):
    peer = peerid.from_ed25519(filler * 31 + b"\x12")
    assert peerid.from_text(peerid.to_text(peer)) == peer
    assert peerid.to_text(peer) == base58.b58encode(peer).decode()


def test_id_from_the_libp2p_specification():
    """libp2p/specs peer-ids: the identity hash of the Ed25519 key 1ed1e8fa…"""
    key = bytes.fromhex("1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")
    assert peerid.to_text(peerid.from_ed25519(key)) == "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        peerid.to_text(PEER)[:-1],
        peerid.to_text(PEER) + "1",
        "1" + peerid.to_text(PEER)[:-1],
        peerid.to_text(PEER)[:-1] + "0",
        "z" * 52,
        "QmcgpsyWgH8Y8ajJz1Cu72KnS5uo2Aa2LpzU7kinSupNKC",
        "1" * 10_000_000,
    ],
    ids=lambda text: f"{text:.20}",
)
def test_foreign_texts_are_refused(text):
    with pytest.raises(InvalidMessageError):
        peerid.from_text(text)


@pytest.mark.parametrize("peer", [b"", PEER[:-1], PEER + b"\0", b"\x12" + PEER[1:], bytes(38)])
def test_foreign_ids_are_refused(peer):
    for use in (peerid.public_key, peerid.to_text):
        with pytest.raises(InvalidMessageError):
            use(peer)
    assert not peerid.verify_ed25519(peer, b"\x72", SIGNATURE)


# --- Ed25519 ---
def test_verify_ed25519():
    assert Ed25519PrivateKey.from_private_bytes(SEED).sign(b"\x72") == SIGNATURE
    assert peerid.verify_ed25519(PEER, b"\x72", SIGNATURE)
    assert not peerid.verify_ed25519(PEER, b"\x73", SIGNATURE)
    assert not peerid.verify_ed25519(PEER, b"\x72", SIGNATURE[:-1])
    assert not peerid.verify_ed25519(PEER, b"\x72", b"")
    assert not peerid.verify_ed25519(peerid.from_ed25519(SEED), b"\x72", SIGNATURE)


def test_a_signature_has_one_form():
    """Attack: s + L satisfies the equation too; taken, one signed record would have two encodings."""
    s = int.from_bytes(SIGNATURE[32:], "little") + ED25519_ORDER
    assert not peerid.verify_ed25519(PEER, b"\x72", SIGNATURE[:32] + s.to_bytes(32, "little"))


def _small_order_points():
    """All eight points of 8-torsion, computed from the curve equation."""
    p = 2**255 - 19
    d = -121665 * pow(121666, -1, p) % p

    def add(a, b):
        k = d * a[0] * b[0] * a[1] * b[1] % p
        x = (a[0] * b[1] + b[0] * a[1]) * pow(1 + k, -1, p) % p
        return x, (a[1] * b[1] + a[0] * b[0]) * pow(1 - k, -1, p) % p

    def double_and_add(point, scalar):
        total = (0, 1)
        while scalar:
            if scalar & 1:
                total = add(total, point)
            point = add(point, point)
            scalar >>= 1
        return total

    points: set[tuple[int, int]] = set()
    y = 2
    while len(points) < 8:
        square = (y * y - 1) * pow(d * y * y + 1, -1, p) % p
        x = pow(square, (p + 3) // 8, p)
        if x * x % p != square:
            x = x * pow(2, (p - 1) // 4, p) % p
        if x * x % p == square:
            torsion, total = double_and_add((x, y), ED25519_ORDER), (0, 1)
            for _ in range(8):
                points.add(total)
                total = add(total, torsion)
        y += 1
    return points


def test_keys_anyone_can_sign_for_are_refused():
    points = _small_order_points()
    assert len(points) == 8
    for x, y in points:
        for sign in (0, x & 1):
            with pytest.raises(InvalidMessageError):
                peerid.from_ed25519((y | sign << 255).to_bytes(32, "little"))
    for y in (2**255 - 19, 2**255 - 18, 2**255 - 1):  # not canonical
        with pytest.raises(InvalidMessageError):
            peerid.from_ed25519(y.to_bytes(32, "little"))


# --- secp256k1 ---
KEY = keys.PrivateKey(b"\x11" * 32)
ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141


def signed(digest: bytes) -> bytes:
    made = KEY.sign_msg_hash(digest).to_bytes()
    return made[:64] + bytes((made[64] + 27,))


def test_recover_address():
    for filler in range(8):
        digest = bytes((filler,)) * 32
        assert peerid.recover_address(digest, signed(digest)) == KEY.public_key.to_canonical_address()
    assert peerid.recover_address(b"\x09" * 32, signed(b"\x08" * 32)) != KEY.public_key.to_canonical_address()


def variants():
    good = signed(bytes(32))
    r, s, v = good[:32], int.from_bytes(good[32:64], "big"), good[64]
    yield "short", good[:-1]
    yield "long", good + b"\0"
    yield "v of 0 or 1", good[:64] + bytes((v - 27,))
    yield "v with a chain id", good[:64] + bytes((v + 10,))
    yield "high s", r + (ORDER - s).to_bytes(32, "big") + bytes((55 - v,))
    yield "s of zero", r + bytes(32) + good[64:]
    yield "r of zero", bytes(32) + good[32:]
    yield "r of the order", ORDER.to_bytes(32, "big") + good[32:]
    yield "r that is no x coordinate", (5).to_bytes(32, "big") + good[32:]


@pytest.mark.parametrize(("why", "signature"), variants())
def test_other_forms_of_a_signature_are_refused(why, signature):
    with pytest.raises(InvalidMessageError):
        peerid.recover_address(bytes(32), signature)


def test_digest_is_32_bytes():
    with pytest.raises(InvalidMessageError):
        peerid.recover_address(bytes(31), signed(bytes(32)))
