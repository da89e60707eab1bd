"""BLS signatures over BLS12-381: public keys in G1 (48 bytes), signatures in G2 (96 bytes), proof of possession.

Law: raises and returns False exactly as the Ethereum specification of BLS does.  Predicates never raise:
wrong lengths, flags, points off the curve or outside the subgroup, and infinity keys verify as False.
Aggregates of public keys are only safe among keys whose possession was proven (rogue keys); asking for that
proof is the registry's duty, not decided here.

Backends: arkworks, else py_ecc (`BACKEND` says which); both pass one conformance list.
Sources: draft-irtf-cfrg-bls-signature-05, ethereum/consensus-specs phase0/beacon-chain.md#bls-signatures,
EIP-2537 (encodings).
"""

from __future__ import annotations

import hashlib
import hmac
import importlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Final

from p2pflock.errors import InvalidMessageError

SIGNATURE_DST: Final = b"BLS_SIG_BLS12381G2_XMD:SHA-256_SSWU_RO_POP_"
POSSESSION_DST: Final = b"BLS_POP_BLS12381G2_XMD:SHA-256_SSWU_RO_POP_"
CURVE_ORDER: Final = 0x73EDA753299D7D483339D80809A1D80553BDA402FFFE5BFEFFFFFFFF00000001
FIELD_MODULUS: Final = int(
    "1a0111ea397fe69a4b1ba7b6434bacd764774b84f38512bf6730d2a0f6b0f6241eabfffeb153ffffb9feffffffffaaab", 16
)
INFINITY_SIGNATURE: Final = b"\xc0" + bytes(95)
KEY_CACHE_SIZE: Final = 4096  # parsed keys, about 300 bytes each


def _check_encoding(data: bytes, size: int) -> None:
    """Length, flag bits and field range, before any backend sees the bytes.

    Attack: arkworks reads an infinity with stray bits as infinity, so one point had many encodings.
    """
    if len(data) != size:
        raise ValueError(f"expected {size} bytes, got {len(data)}")
    flags = data[0] >> 5
    if flags == 0b110:
        if data[0] & 0x1F or any(data[1:]):
            raise ValueError("infinity with stray bits")
        return
    if flags not in (0b100, 0b101):
        raise ValueError("wrong flag bits")
    words = [bytes((data[0] & 0x1F,)) + data[1:48], *([data[48:]] if size == 96 else [])]
    if any(int.from_bytes(word, "big") >= FIELD_MODULUS for word in words):
        raise ValueError("coordinate outside the field")


def _scalar(secret_key: bytes) -> int:
    if len(secret_key) != 32:
        raise ValueError("a secret key is 32 bytes")
    scalar = int.from_bytes(secret_key, "big")
    if not 0 < scalar < CURVE_ORDER:
        raise ValueError("secret key out of range")
    return scalar


class Scheme:
    """The signature scheme over one backend module; the functions below are those of the default one."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.name: str = backend.NAME
        self._key: Callable[[bytes], Any] = lru_cache(maxsize=KEY_CACHE_SIZE)(self._read_key)

    # --- parsing ---
    def _read_key(self, public_key: bytes) -> Any:
        """KeyValidate: a point of the subgroup other than infinity; ValueError otherwise."""
        _check_encoding(public_key, 48)
        if public_key[0] & 0x40:
            raise ValueError("infinity is not a public key")
        return self.backend.read_g1(public_key)

    def _read_signature(self, signature: bytes) -> Any:
        _check_encoding(signature, 96)
        return self.backend.read_g2(signature)

    # --- keys ---
    def secret_to_public(self, secret_key: bytes) -> bytes:
        """48-byte public key.  ValueError for a secret key of 0, >= the curve order, or not 32 bytes."""
        return bytes(self.backend.public_key(_scalar(secret_key)))

    def key_validate(self, public_key: bytes) -> bool:
        """Whether these 48 bytes are a usable public key."""
        try:
            self._key(bytes(public_key))
        except (ValueError, TypeError):
            return False
        return True

    # --- one signer ---
    def sign(self, secret_key: bytes, message: bytes) -> bytes:
        """96-byte signature of any message.  ValueError for a bad secret key."""
        return self._sign(secret_key, message, SIGNATURE_DST)

    def verify(self, public_key: bytes, message: bytes, signature: bytes) -> bool:
        return self._verify([public_key], [message], signature, SIGNATURE_DST)

    def _sign(self, secret_key: bytes, message: bytes, dst: bytes) -> bytes:
        point = self.backend.hash_to_g2(bytes(message), dst)
        return bytes(self.backend.write_g2(self.backend.multiply_g2(point, _scalar(secret_key))))

    def _verify(
        self, public_keys: Sequence[bytes], messages: Sequence[bytes], signature: bytes, dst: bytes
    ) -> bool:
        """CoreVerify and CoreAggregateVerify: product of e(pk_i, H(m_i)) times e(-g1, signature) is one."""
        if not public_keys or len(public_keys) != len(messages):
            return False
        try:
            point = self._read_signature(bytes(signature))
            keys = [self._key(bytes(public_key)) for public_key in public_keys]
        except (ValueError, TypeError):
            return False
        hashes = [self.backend.hash_to_g2(bytes(message), dst) for message in messages]
        return bool(
            self.backend.is_pairing_product_one(
                [*keys, self.backend.NEGATIVE_GENERATOR], [*hashes, point]
            )
        )

    # --- many signers ---
    def aggregate(self, signatures: Sequence[bytes]) -> bytes:
        """96-byte sum of signatures.

        Raises ValueError for no signature at all, InvalidMessageError when one is not a valid point.
        """
        if not signatures:
            raise ValueError("nothing to aggregate")
        try:
            points = [self._read_signature(bytes(signature)) for signature in signatures]
        except (ValueError, TypeError) as error:
            raise InvalidMessageError(f"invalid BLS signature: {error}") from error
        return bytes(self.backend.write_g2(self.backend.sum_g2(points)))

    def fast_aggregate_verify(self, public_keys: Sequence[bytes], message: bytes, signature: bytes) -> bool:
        """Whether the aggregate holds for one message under all keys.  False without keys.

        Attack: {pk, -pk} sums to infinity, for which the infinity signature "verifies" any message.
        """
        try:
            point = self._read_signature(bytes(signature))
            keys = [self._key(bytes(public_key)) for public_key in public_keys]
        except (ValueError, TypeError):
            return False
        total = self.backend.sum_g1(keys)
        if not keys or self.backend.is_infinity_g1(total):
            return False
        hashed = self.backend.hash_to_g2(bytes(message), SIGNATURE_DST)
        return bool(
            self.backend.is_pairing_product_one([total, self.backend.NEGATIVE_GENERATOR], [hashed, point])
        )

    def aggregate_verify(
        self, public_keys: Sequence[bytes], messages: Sequence[bytes], signature: bytes
    ) -> bool:
        """Whether the aggregate holds for one message per key.  False without keys or with unequal counts."""
        return self._verify(public_keys, messages, signature, SIGNATURE_DST)

    # --- proof of possession ---
    def pop_prove(self, secret_key: bytes) -> bytes:
        """96-byte proof for one's own public key (PopProve of the draft)."""
        return self.sign_possession(secret_key, self.secret_to_public(secret_key))

    def pop_verify(self, public_key: bytes, proof: bytes) -> bool:
        return self.verify_possession(public_key, public_key, proof)

    def sign_possession(self, secret_key: bytes, message: bytes) -> bytes:
        """Signature of any message under the proof-of-possession DST; the registry's root, in our case."""
        return self._sign(secret_key, message, POSSESSION_DST)

    def verify_possession(self, public_key: bytes, message: bytes, proof: bytes) -> bool:
        return self._verify([public_key], [message], proof, POSSESSION_DST)

    # --- as the precompiles see it ---
    def g1_to_eip2537(self, public_key: bytes) -> bytes:
        """128 bytes: x ‖ y, each left-padded from 48 to 64 bytes.  InvalidMessageError for an invalid key."""
        try:
            return _pad(self.backend.affine_g1(self._key(bytes(public_key))))
        except (ValueError, TypeError) as error:
            raise InvalidMessageError(f"invalid BLS public key: {error}") from error

    def g2_to_eip2537(self, signature: bytes) -> bytes:
        """256 bytes: x.c0 ‖ x.c1 ‖ y.c0 ‖ y.c1, each left-padded to 64 bytes; zeros for infinity.

        InvalidMessageError for an invalid signature.
        """
        try:
            return _pad(self.backend.affine_g2(self._read_signature(bytes(signature))))
        except (ValueError, TypeError) as error:
            raise InvalidMessageError(f"invalid BLS signature: {error}") from error


def _pad(coordinates: bytes) -> bytes:
    return b"".join(bytes(16) + coordinates[i : i + 48] for i in range(0, len(coordinates), 48))


def keygen(ikm: bytes, key_info: bytes = b"") -> bytes:
    """32-byte secret key from at least 32 bytes of secret entropy (KeyGen of the draft).  ValueError."""
    if len(ikm) < 32:
        raise ValueError("key material must have at least 32 bytes")
    salt = b"BLS-SIG-KEYGEN-SALT-"
    scalar = 0
    while scalar == 0:
        salt = hashlib.sha256(salt).digest()
        key = hmac.digest(salt, ikm + b"\0", "sha256")
        okm, block = b"", b""
        for counter in (1, 2):  # HKDF-Expand to 48 bytes
            block = hmac.digest(key, block + key_info + b"\x00\x30" + bytes((counter,)), "sha256")
            okm += block
        scalar = int.from_bytes(okm[:48], "big") % CURVE_ORDER
    return scalar.to_bytes(32, "big")


def load(name: str) -> Scheme:
    """The scheme over "arkworks" or "py_ecc".  ImportError where it is not installed."""
    module = {"arkworks": "_bls_arkworks", "py_ecc": "_bls_pyecc"}[name]
    return Scheme(importlib.import_module(f"p2pflock.primitives.{module}"))


def _load_default() -> Scheme:
    try:
        return load("arkworks")
    except ImportError:  # no wheel for this platform
        return load("py_ecc")


_default = _load_default()
BACKEND: Final = _default.name

secret_to_public = _default.secret_to_public
key_validate = _default.key_validate
sign = _default.sign
verify = _default.verify
aggregate = _default.aggregate
fast_aggregate_verify = _default.fast_aggregate_verify
aggregate_verify = _default.aggregate_verify
pop_prove = _default.pop_prove
pop_verify = _default.pop_verify
sign_possession = _default.sign_possession
verify_possession = _default.verify_possession
g1_to_eip2537 = _default.g1_to_eip2537
g2_to_eip2537 = _default.g2_to_eip2537
