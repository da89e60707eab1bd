"""DHT records: only the author's own, small, short-lived and signed ones pass."""

from dataclasses import dataclass, replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from p2pflock.errors import LocalProtocolError
from p2pflock.gossip import validator
from p2pflock.primitives import peerid

NOW = 1_800_000_000.0
TASK = bytes(range(32))
KEY = bytes(20)


@dataclass(frozen=True)
class Record:
    key: bytes
    subkey: bytes
    value: bytes
    expiration_time: float


def make(seed=1, task=TASK):
    key = Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)
    peer = peerid.from_ed25519(key.public_key().public_bytes_raw())
    return validator.RecordValidator(task, peer, key.sign, lambda: NOW), peer


AUTHOR, PEER = make()
OTHER, OTHER_PEER = make(2)


def signed(value=b"value", expiry=NOW + 60, author=AUTHOR, peer=PEER, raw=None):
    encoded = validator.encode_value(value) if raw is None else raw
    record = Record(KEY, validator.encode_subkey(peer), encoded, expiry)
    return replace(record, value=author.sign_value(record))


@given(st.binary(max_size=validator.MAX_VALUE_BYTES))
def test_own_record_passes_everywhere(value):
    record = signed(value)
    assert OTHER.validate(record)
    assert OTHER.strip_value(record) == validator.encode_value(value)


def test_longest_life_passes():
    assert OTHER.validate(signed(expiry=NOW + validator.MAX_TTL_SECONDS))


REFUSED = {
    "unsigned": replace(signed(), value=validator.encode_value(b"value")),
    "regular key": replace(signed(), subkey=b"\xc0"),
    "whole dictionary": replace(signed(), subkey=b""),
    "somebody else's subkey": replace(signed(), subkey=validator.encode_subkey(OTHER_PEER)),
    "subkey that is no peer id": replace(signed(), subkey=b"\xc4\x26" + bytes(38)),
    "another key": replace(signed(), key=bytes(19) + b"\1"),
    "prolonged": replace(signed(), expiration_time=NOW + 61),
    "altered value": replace(signed(), value=b"\xc4\5vaLue" + signed().value[-64:]),
    "tombstone False": signed(raw=b"\xc2"),
    "tombstone None": signed(raw=b"\xc0"),
    "number": signed(raw=b"\x01"),
    "extension object": signed(raw=b"\xc7\x01\x50\x00"),
    "trailing bytes": signed(raw=b"\xc4\x01aa"),
    "long form of a short value": signed(raw=b"\xc5\x00\x01a"),
    "empty": signed(raw=b""),
    "too large": signed(raw=b"\xc5" + (8193).to_bytes(2, "big") + bytes(8193)),
    "a megabyte": replace(signed(), value=bytes(1 << 20)),
    "lives too long": signed(expiry=NOW + validator.MAX_TTL_SECONDS + validator.CLOCK_SLACK_SECONDS + 1),
    "for ever": signed(expiry=float("inf")),
    "not a time": signed(expiry=float("nan")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    before = OTHER.refused
    assert not OTHER.validate(REFUSED[name])
    assert OTHER.refused == before + 1


def test_record_of_another_task_is_refused():
    elsewhere, peer = make(1, task=bytes(32))
    assert not OTHER.validate(signed(author=elsewhere, peer=peer))


def test_nobody_signs_for_others():
    with pytest.raises(LocalProtocolError):
        OTHER.sign_value(Record(KEY, validator.encode_subkey(PEER), b"\xc4\x01a", NOW + 60))


def test_oversized_value_is_a_fault_of_ours():
    with pytest.raises(LocalProtocolError):
        validator.encode_value(bytes(validator.MAX_VALUE_BYTES + 1))


def test_remembered_verdicts_are_bounded():
    checker, _ = make(3)
    bad = [replace(signed(), value=b"\xc4\1a" + number.to_bytes(64, "big")) for number in range(3)]
    for record in bad * 2:
        assert not checker.validate(record)
    assert len(checker._known) == 3


@given(st.binary(max_size=200), st.binary(max_size=60), st.floats())
def test_garbage_never_raises(value, subkey, expiry):
    assert not OTHER.validate(Record(KEY, subkey, value, expiry))
