"""Content ids: CIDv1 with sha2-256, the only kind p2pflock writes, stores or follows.

Law: a CID has one binary form (36 bytes) and one text form (base32, lower case, no padding); every other
spelling of the same id (CIDv0, other bases, other hash functions, padded varints) is refused, so an id can be
compared byte by byte.  Whether a block is well formed is decided by its codec's module, not here.

Sources: https://github.com/multiformats/cid, https://github.com/multiformats/multicodec (table.csv).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass

from p2pflock.errors import InvalidMessageError

RAW = 0x55
DAG_PB = 0x70
DAG_CBOR = 0x71
CODECS = frozenset((RAW, DAG_PB, DAG_CBOR))

SIZE_BYTES = 36
_TEXT_SIZE = 59  # "b" + 58 base32 digits of 36 bytes
_SHA2_256 = b"\x12\x20"


@dataclass(frozen=True, slots=True, order=True)
class CID:
    """The sha2-256 `digest` (32 bytes) of a block, and how to read the block (`codec`)."""

    codec: int
    digest: bytes

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise InvalidMessageError(f"unknown CID codec {self.codec!r}")
        if type(self.digest) is not bytes or len(self.digest) != 32:
            raise InvalidMessageError("a CID digest is 32 bytes")

    @classmethod
    def of(cls, codec: int, data: bytes) -> CID:
        return cls(codec, hashlib.sha256(data).digest())

    @classmethod
    def of_raw(cls, data: bytes) -> CID:
        return cls.of(RAW, data)

    @classmethod
    def of_dag_cbor(cls, data: bytes) -> CID:
        return cls.of(DAG_CBOR, data)

    def matches(self, data: bytes) -> bool:
        """Whether the block hashes to this id.  Says nothing about the codec."""
        return hashlib.sha256(data).digest() == self.digest

    def to_bytes(self) -> bytes:
        """36 bytes: version 1, codec, sha2-256, length 32, digest."""
        return bytes((1, self.codec)) + _SHA2_256 + self.digest

    @classmethod
    def from_bytes(cls, data: bytes) -> CID:
        """Raises InvalidMessageError for anything `to_bytes` would not have written."""
        if len(data) != SIZE_BYTES or data[0] != 1 or data[2:4] != _SHA2_256:
            raise InvalidMessageError("not a 36-byte CIDv1 with sha2-256")
        return cls(data[1], bytes(data[4:]))  # all codecs of ours are one-byte varints

    def __str__(self) -> str:
        return "b" + base64.b32encode(self.to_bytes()).decode("ascii").lower().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> CID:
        """Read the text form.  Raises InvalidMessageError for anything `str` would not have written."""
        if len(text) != _TEXT_SIZE or text[0] != "b" or not text.isascii() or text != text.lower():
            raise InvalidMessageError("not a base32 CIDv1")
        try:
            data = base64.b32decode(text[1:].upper() + "======")
        except (binascii.Error, ValueError) as error:
            raise InvalidMessageError("not a base32 CIDv1") from error
        cid = cls.from_bytes(data)
        if str(cid) != text:  # spare bits of the last digit
            raise InvalidMessageError("not a canonical base32 CIDv1")
        return cid
