"""The record store keeps its budget, whatever it is given."""

import pytest

from p2pflock.gossip import records
from p2pflock.gossip.records import RecordStore


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(clock):
    return RecordStore(clock, lambda entries: {author: (value, expiry) for author, value, expiry in entries})


def test_later_expiry_replaces(store):
    assert store.store_subkey(1, b"a", b"old", 1010.0)
    assert store.store_subkey(1, b"a", b"new", 1020.0)
    assert not store.store_subkey(1, b"a", b"old", 1010.0)
    assert store.get(1) == {b"a": (b"new", 1020.0)}
    assert store.held_bytes == 3


def test_handing_over_the_same_record_is_fine(store):
    assert store.store(1, b"v", 1010.0, subkey=b"a")
    assert store.store(1, b"v", 1010.0, subkey=b"a")
    assert len(store) == 1


def test_replaying_the_previous_record_does_not_age_the_current_one(store, clock):
    store.store_subkey(1, b"a", b"old", 1010.0)
    store.store_subkey(1, b"a", b"new", 1020.0)
    store.store_subkey(1, b"a", b"old", 1010.0)
    clock.now = 1015.0
    assert store.get(1) == {b"a": (b"new", 1020.0)}


def test_records_expire(store, clock):
    store.store_subkey(1, b"a", b"v", 1010.0)
    store.store_subkey(1, b"b", b"v", 1020.0)
    clock.now = 1010.0
    assert store.get(1) == {b"b": (b"v", 1020.0)}
    clock.now = 1020.0
    assert store.get(1) is None
    assert (len(store), store.held_bytes, list(store.items())) == (0, 0, [])
    assert not store.store_subkey(1, b"a", b"v", 1020.0)


@pytest.mark.parametrize("subkey", [None, "text", 7])
def test_keys_without_an_author_are_refused(store, subkey):
    assert not store.store(1, b"v", 1010.0, subkey=subkey)
    assert store.refused == 1


def test_an_author_has_a_quota_and_gets_it_back(store, clock):
    kept = [store.store_subkey(key, b"a", b"v", 1010.0) for key in range(100)]
    assert sum(kept) == records.MAX_KEYS_PER_AUTHOR
    assert store.store_subkey(99, b"b", b"v", 1010.0)
    clock.now = 1011.0
    assert store.store_subkey(99, b"a", b"v", 1020.0)


def test_bytes_are_bounded(store, monkeypatch):
    monkeypatch.setattr(records, "MAX_TOTAL_BYTES", 10)
    assert store.store_subkey(1, b"a", b"12345", 1010.0)
    assert not store.store_subkey(2, b"b", b"123456", 1010.0)
    assert not store.store_subkey(1, b"a", b"12345678901", 1011.0)
    assert store.store_subkey(1, b"a", b"1234567890", 1011.0)


def test_records_are_bounded(store, monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORDS", 3)
    assert [store.store_subkey(1, bytes([n]), b"v", 1010.0) for n in range(5)] == [True] * 3 + [False] * 2


def test_answers_are_copies(store):
    store.store_subkey(1, b"a", b"v", 1010.0)
    store.get(1)[b"b"] = (b"stranger's", 2000.0)
    assert store.get(1) == {b"a": (b"v", 1010.0)}
