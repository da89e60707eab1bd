"""Which DHT records are true: signed by the peer they are stored under, small, and about to expire.

Law: a record is (key, subkey, value, expiry).  The subkey is the Ed25519 peer id of its author, so the key
that must have signed is in the record; the signature covers all four and the task.  Nobody but the author can
therefore write, prolong, shorten or erase a record.  This file decides on one record; how many of them a node
holds is records.py's business.  Pure: time comes in as a function.

Attacks on stock hivemind that this refuses: a tombstone (`subkey=victim, value=False, expiry +1 h`), a regular
key overwritten by whoever picks the later expiry, a record replayed in another task, records of megabytes,
records that never expire.

Layout: hivemind hands over key = 20-byte DHT id, subkey = msgpack(bin peer id), value = msgpack(bin) ‖ 64-byte
signature, expiry = float64 seconds since 1970.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from p2pflock.errors import LocalProtocolError
from p2pflock.primitives import peerid

MAX_VALUE_BYTES = 8 << 10
MAX_TTL_SECONDS = 600.0
CLOCK_SLACK_SECONDS = 60.0  # how far ahead of ours an honest author's clock may be
SIGNATURE_BYTES = 64
KEY_BYTES = 20  # hivemind's DHT id, a SHA-1
REMEMBERED_VERDICTS = 4096

_SUBKEY_HEAD = b"\xc4\x26"  # msgpack bin8 of 38 bytes
_DOMAIN = b"p2pflock/1/dht-record\0"


class SignedRecord(Protocol):
    """hivemind's DHTRecord, as far as we read it."""

    @property
    def key(self) -> bytes: ...
    @property
    def subkey(self) -> bytes: ...
    @property
    def value(self) -> bytes: ...
    @property
    def expiration_time(self) -> float: ...


def encode_subkey(peer: bytes) -> bytes:
    """How hivemind writes a 38-byte peer id as subkey."""
    return _SUBKEY_HEAD + peer


def encode_value(value: bytes) -> bytes:
    """How hivemind writes bytes.  Raises LocalProtocolError above MAX_VALUE_BYTES."""
    if len(value) > MAX_VALUE_BYTES:
        raise LocalProtocolError(f"DHT record of {len(value)} bytes, at most {MAX_VALUE_BYTES}")
    if len(value) < 0x100:
        return b"\xc4" + len(value).to_bytes(1, "big") + value
    return b"\xc5" + len(value).to_bytes(2, "big") + value


def is_bytes_value(encoded: bytes) -> bool:
    """Whether `encoded` is exactly one msgpack bin of allowed size, and not None, False or an object."""
    if encoded[:1] == b"\xc4":
        return len(encoded) >= 2 and len(encoded) == 2 + encoded[1]
    if encoded[:1] == b"\xc5":
        size = int.from_bytes(encoded[1:3], "big")
        return 0x100 <= size <= MAX_VALUE_BYTES and len(encoded) == 3 + size
    return False


def compute_record_root(task: bytes, key: bytes, subkey: bytes, value: bytes, expiry: float) -> bytes:
    """32 bytes that the author signs.

    Args:
        task: 32-byte task id.
        key: 20-byte DHT id.
        subkey: 40 bytes, msgpack of the author's peer id.
        value: msgpack of the value, without signature.
        expiry: seconds since 1970.
    """
    parts = task, key, subkey, struct.pack(">d", expiry), hashlib.sha256(value).digest()
    return hashlib.sha256(_DOMAIN + b"".join(parts)).digest()


class RecordValidator:
    """hivemind's RecordValidatorBase by shape, so that this file needs no hivemind.

    Args:
        task: 32-byte task id.
        peer: our 38-byte peer id.
        sign: Ed25519 signature (64 bytes) of a 32-byte root with our key.
        now: seconds since 1970.
    """

    priority = 0

    def __init__(
        self, task: bytes, peer: bytes, sign: Callable[[bytes], bytes], now: Callable[[], float]
    ) -> None:
        self._task = task
        self._subkey = encode_subkey(peer)
        self._sign = sign
        self._now = now
        self._known: OrderedDict[bytes, bool] = OrderedDict()
        self.refused = 0

    def sign_value(self, record: SignedRecord) -> bytes:
        """The value with our signature.  Records of others can not be signed: LocalProtocolError."""
        if record.subkey != self._subkey:
            raise LocalProtocolError("a peer signs DHT records under its own id only")
        root = compute_record_root(
            self._task, record.key, record.subkey, record.value, record.expiration_time
        )
        return record.value + self._sign(root)

    def strip_value(self, record: SignedRecord) -> bytes:
        """The value without its signature; hivemind calls it on validated records only."""
        return record.value[:-SIGNATURE_BYTES]

    def validate(self, record: SignedRecord) -> bool:
        """Whether the author of `record` wrote it.  Never raises."""
        is_valid = self._is_well_formed(record) and self._is_signed(record)
        self.refused += not is_valid
        return is_valid

    def merge_with(self, other: object) -> bool:
        return False

    def _is_well_formed(self, record: SignedRecord) -> bool:
        if len(record.key) != KEY_BYTES:
            return False
        if len(record.subkey) != len(self._subkey) or not record.subkey.startswith(_SUBKEY_HEAD):
            return False  # a regular key, a whole dictionary, or a subkey that is no peer id
        if not math.isfinite(record.expiration_time):
            return False
        if record.expiration_time > self._now() + MAX_TTL_SECONDS + CLOCK_SLACK_SECONDS:
            return False
        if len(record.value) > MAX_VALUE_BYTES + 3 + SIGNATURE_BYTES:
            return False
        return is_bytes_value(record.value[:-SIGNATURE_BYTES])

    def _is_signed(self, record: SignedRecord) -> bool:
        value, signature = record.value[:-SIGNATURE_BYTES], record.value[-SIGNATURE_BYTES:]
        root = compute_record_root(self._task, record.key, record.subkey, value, record.expiration_time)
        # A lookup meets the same record at every replica; a verification costs 130 us.
        name = root + signature
        verdict = self._known.get(name)
        if verdict is None:
            verdict = peerid.verify_ed25519(record.subkey[len(_SUBKEY_HEAD) :], root, signature)
            self._known[name] = verdict
            if len(self._known) > REMEMBERED_VERDICTS:
                self._known.popitem(last=False)
        return verdict
