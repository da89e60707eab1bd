"""Peer ids and the two classical signature schemes that a peer record carries.

Law: a peer id is the identity multihash of a libp2p Ed25519 public key: the id is the key, nothing is looked
up.  Keys of small order and non-canonical keys are refused: anyone can sign for them, so records "signed" by
such a peer would prove nothing.

Sources: libp2p specs/peer-ids; RFC 8032; libsodium's list of small-order points; EIP-2 (low s).
"""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from eth_keys.datatypes import Signature
from eth_keys.exceptions import BadSignature
from eth_utils.exceptions import ValidationError

from p2pflock.errors import InvalidMessageError

SIZE_BYTES = 38
_PREFIX = bytes.fromhex("002408011220")  # identity, 36 bytes; protobuf: type Ed25519, key of 32 bytes

_FIELD = 2**255 - 19
_SMALL_ORDER_Y = frozenset(
    (
        0,
        1,
        _FIELD - 1,
        int.from_bytes(
            bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little"
        ),
        int.from_bytes(
            bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"), "little"
        ),
    )
)

_SECP256K1_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141

_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_DIGIT = {letter: value for value, letter in enumerate(_ALPHABET)}


def from_ed25519(public_key: bytes) -> bytes:
    """38-byte peer id of a 32-byte Ed25519 public key.  Raises InvalidMessageError."""
    if len(public_key) != 32:
        raise InvalidMessageError("an Ed25519 public key is 32 bytes")
    y = int.from_bytes(public_key, "little") & ((1 << 255) - 1)
    if y >= _FIELD or y in _SMALL_ORDER_Y:
        raise InvalidMessageError("weak or non-canonical Ed25519 key")
    return _PREFIX + public_key


def public_key(peer_id: bytes) -> bytes:
    """The 32-byte Ed25519 public key inside a peer id.  Raises InvalidMessageError."""
    if len(peer_id) != SIZE_BYTES or not peer_id.startswith(_PREFIX):
        raise InvalidMessageError("not an Ed25519 peer id")
    key = bytes(peer_id[len(_PREFIX) :])
    from_ed25519(key)
    return key


def to_text(peer_id: bytes) -> str:
    """"12D3Koo…": base58btc without a multibase prefix.  Raises InvalidMessageError."""
    public_key(peer_id)
    number = int.from_bytes(peer_id, "big")
    digits = []
    while number:
        number, digit = divmod(number, 58)
        digits.append(_ALPHABET[digit])
    return "1" + "".join(reversed(digits))  # the id begins with exactly one zero byte


def from_text(text: str) -> bytes:
    """Raises InvalidMessageError for anything `to_text` would not have written."""
    if len(text) != 52:  # every id lies between 58^51 and 58^52; also bounds the arithmetic below
        raise InvalidMessageError("not an Ed25519 peer id")
    number = 0
    for letter in text:
        if letter not in _DIGIT:
            raise InvalidMessageError("not base58")
        number = number * 58 + _DIGIT[letter]
    if number >= 1 << 8 * SIZE_BYTES:
        raise InvalidMessageError("not an Ed25519 peer id")
    peer_id = number.to_bytes(SIZE_BYTES, "big")
    if to_text(peer_id) != text:
        raise InvalidMessageError("not a canonical peer id")
    return peer_id


def verify_ed25519(peer_id: bytes, root: bytes, signature: bytes) -> bool:
    """Whether `signature` (64 bytes) of `root` was made by the key inside the peer id."""
    try:
        key = Ed25519PublicKey.from_public_bytes(public_key(peer_id))
        key.verify(bytes(signature), bytes(root))
    except (InvalidMessageError, InvalidSignature, ValueError):
        return False
    return True


def recover_address(digest: bytes, signature: bytes) -> bytes:
    """20-byte EVM address that signed a 32-byte digest.

    Args:
        digest: 32 bytes.
        signature: 65 bytes r‖s‖v with v in {27, 28} and s in the lower half of the order: the one form, so
            that nobody can turn a signature into a second valid one.

    Raises InvalidMessageError.
    """
    if len(digest) != 32 or len(signature) != 65:
        raise InvalidMessageError("expected a 32-byte digest and a 65-byte signature")
    r, s, v = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:64], "big"), signature[64]
    if v not in (27, 28) or not 0 < r < _SECP256K1_ORDER or not 0 < s <= _SECP256K1_ORDER // 2:
        raise InvalidMessageError("signature is not in canonical form")
    try:
        recovered = Signature(vrs=(v - 27, r, s)).recover_public_key_from_msg_hash(bytes(digest))
    except (BadSignature, ValidationError, ValueError) as error:
        raise InvalidMessageError("signature recovers to no key") from error
    return recovered.to_canonical_address()
