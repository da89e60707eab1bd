"""EIP-2335: one secret, encrypted under a password, as a JSON object.

Law: `decrypt(encrypt(secret, p), p) == secret`, a wrong password is told from a damaged file wherever the
format allows, and no file makes us spend more than 1 GiB or ten million iterations.  BLS keys use it as the
standard has it; the Ed25519 seed uses the same envelope under another description, so neither opens as the
other.  Where files are and who may read them is keystore.py's business.

Source: https://eips.ethereum.org/EIPS/eip-2335 (version 4: scrypt or pbkdf2, sha256 checksum, aes-128-ctr).
"""

from __future__ import annotations

import hashlib
import hmac
import unicodedata
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from p2pflock.errors import KeystoreError, PasswordError

_KEY_BYTES = 32
_MAX_SCRYPT_BYTES = 1 << 30
_OPENSSL_LIMIT = (1 << 31) - 1  # what hashlib takes; the bound that counts is the one above
_MAX_ITERATIONS = 10_000_000
_MAX_SECRET_BYTES = 64


@dataclass(frozen=True, slots=True)
class Cost:
    """What one guess of the password costs (scrypt, r = 8, p = 1: 1024 * n bytes of memory)."""

    scrypt_n: int


STANDARD = Cost(1 << 18)  # the EIP's and geth's own: 256 MiB and about 0.7 s
FAST = Cost(1 << 12)  # local testnets only: 4 MiB and a few ms, a weak password falls quickly


def normalize_password(password: str) -> bytes:
    """NFKD, without C0, C1 and Delete, as UTF-8 (EIP-2335, "Password requirements")."""
    text = unicodedata.normalize("NFKD", password)
    return "".join(c for c in text if not (ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0)).encode("utf-8")


def encrypt(
    secret: bytes,
    password: str,
    *,
    entropy: Callable[[int], bytes],
    cost: Cost = STANDARD,
    pubkey: bytes = b"",
    path: str = "",
    description: str = "",
) -> dict[str, Any]:
    """The JSON object, ready to be written.

    Args:
        secret: 1..64 bytes.
        password: any text; normalized as the EIP says.
        entropy: n -> n random bytes, for salt, IV and uuid.
        cost: of one guess.
        pubkey: public key that belongs to the secret; stands in clear.
        path: EIP-2334 derivation path; empty for a key that was not derived.
        description: free text, in clear.
    """
    params = {"dklen": _KEY_BYTES, "n": cost.scrypt_n, "p": 1, "r": 8, "salt": entropy(32).hex()}
    key = _derive("scrypt", params, normalize_password(password))
    iv = entropy(16)
    message = _aes_128_ctr(key[:16], iv, secret)
    return {
        "crypto": {
            "kdf": {"function": "scrypt", "params": params, "message": ""},
            "checksum": {"function": "sha256", "params": {}, "message": _checksum(key, message).hex()},
            "cipher": {"function": "aes-128-ctr", "params": {"iv": iv.hex()}, "message": message.hex()},
        },
        "description": description,
        "pubkey": pubkey.hex(),
        "path": path,
        "uuid": str(uuid.UUID(bytes=entropy(16), version=4)),
        "version": 4,
    }


def decrypt(document: Mapping[str, Any], password: str) -> bytes:
    """The secret.  Raises PasswordError for a wrong password, KeystoreError for anything malformed."""
    try:
        crypto = document["crypto"]
        kdf, checksum, cipher = crypto["kdf"], crypto["checksum"], crypto["cipher"]
        functions = (document["version"], checksum["function"], cipher["function"])
        message = _hex(cipher["message"])
        iv = _hex(cipher["params"]["iv"])
        expected = _hex(checksum["message"])
        function, params = kdf["function"], kdf["params"]
        if functions != (4, "sha256", "aes-128-ctr") or len(iv) != 16 or len(message) > _MAX_SECRET_BYTES:
            raise KeystoreError("keystore uses an unknown version, checksum or cipher")
        key = _derive(function, params, normalize_password(password))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise KeystoreError(f"keystore is malformed: {type(error).__name__} {error}") from error
    if not hmac.compare_digest(_checksum(key, message), expected):
        raise PasswordError("wrong keystore password", "type the password again, or restore the keystore")
    return _aes_128_ctr(key[:16], iv, message)


def _hex(value: str) -> bytes:
    return bytes.fromhex(value.removeprefix("0x"))


def _checksum(key: bytes, message: bytes) -> bytes:
    return hashlib.sha256(key[16:32] + message).digest()


def _aes_128_ctr(key: bytes, iv: bytes, data: bytes) -> bytes:
    # CTR encrypts and decrypts alike; the checksum, not the cipher, authenticates
    step = Cipher(algorithms.AES128(key), modes.CTR(iv)).encryptor()
    return step.update(data) + step.finalize()


def _derive(function: str, params: Mapping[str, Any], password: bytes) -> bytes:
    """32-byte decryption key.  Attack: parameters that exhaust memory or time are refused first."""
    salt = _hex(params["salt"])
    if params["dklen"] != _KEY_BYTES:
        raise ValueError("dklen is not 32")
    if function == "scrypt":
        n, r, p = check_scrypt(params)
        return hashlib.scrypt(password, salt=salt, n=n, r=r, p=p, dklen=_KEY_BYTES, maxmem=_OPENSSL_LIMIT)
    if function == "pbkdf2" and params["prf"] == "hmac-sha256":
        return hashlib.pbkdf2_hmac("sha256", password, salt, check_iterations(params), _KEY_BYTES)
    raise ValueError(f"unknown key derivation {function!r}")


def check_scrypt(params: Mapping[str, Any]) -> tuple[int, int, int]:
    """(n, r, p) of scrypt when they cost at most 1 GiB and 16 lanes; ValueError otherwise."""
    n, r, p = params["n"], params["r"], params["p"]
    if not all(type(x) is int and x > 0 for x in (n, r, p)) or 128 * n * r > _MAX_SCRYPT_BYTES or p > 16:
        raise ValueError("scrypt parameters out of bounds")
    return n, r, p


def check_iterations(params: Mapping[str, Any]) -> int:
    """The iteration count of PBKDF2 when it is at most ten million; ValueError otherwise."""
    count = params["c"]
    if type(count) is not int or not 0 < count <= _MAX_ITERATIONS:
        raise ValueError("pbkdf2 iteration count out of bounds")
    return count
