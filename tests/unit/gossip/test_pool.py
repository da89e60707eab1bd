"""The payload pool holds what the node asked for, and nothing else."""

import pytest

from p2pflock.errors import InvalidMessageError, LocalProtocolError
from p2pflock.gossip import pool as pool_module
from p2pflock.gossip.pool import CLAIM_SECONDS, PayloadPool
from p2pflock.primitives import unixfs

PAYLOAD = b"pseudo-gradient"
CID = unixfs.compute_cid(PAYLOAD)


@pytest.fixture
def arrived():
    return []


@pytest.fixture
def pool(arrived):
    return PayloadPool(lambda round_key, cid: arrived.append((round_key, cid)), max_total_bytes=1000)


def test_expected_payload_enters_once(pool, arrived):
    pool.expect(b"r", CID, len(PAYLOAD))
    assert pool.wanted(b"r") == {CID: len(PAYLOAD)}
    assert pool.accept(b"r", CID, PAYLOAD)
    assert not pool.accept(b"r", CID, PAYLOAD)
    assert pool.wanted(b"r") == {}
    assert arrived == [(b"r", CID)]
    assert pool.collect(b"r") == {CID: PAYLOAD}


def test_offered_payload_is_there(pool, arrived):
    pool.offer(b"r", CID, PAYLOAD)
    pool.offer(b"r", CID, PAYLOAD)
    assert arrived == [(b"r", CID)]
    assert pool.find(b"r", CID) == PAYLOAD


@pytest.mark.parametrize("payload", [PAYLOAD[:-1], PAYLOAD + b"!", b""])
def test_what_does_not_match_is_refused(pool, payload):
    pool.expect(b"r", CID, len(PAYLOAD))
    with pytest.raises(InvalidMessageError):
        pool.accept(b"r", CID, payload)
    assert pool.refused == 1
    assert pool.collect(b"r") == {}


def test_unexpected_is_refused(pool):
    with pytest.raises(InvalidMessageError):
        pool.accept(b"r", CID, PAYLOAD)
    pool.expect(b"r", CID, len(PAYLOAD) - 1)
    with pytest.raises(InvalidMessageError):
        pool.accept(b"r", CID, PAYLOAD)


@pytest.mark.parametrize("lie", [-1, 1])
def test_a_false_size_for_anothers_content_stops_nothing(pool, lie):
    pool.expect(b"r", CID, len(PAYLOAD) + lie)
    pool.expect(b"r", CID, len(PAYLOAD))
    assert pool.promised_bytes == len(PAYLOAD) + max(0, lie)
    assert pool.accept(b"r", CID, PAYLOAD)
    pool.forget(b"r")
    assert pool.promised_bytes == 0


def test_a_raised_size_is_bounded_too(pool):
    pool.expect(b"r", CID, 900)
    with pytest.raises(InvalidMessageError):
        pool.expect(b"r", CID, 1001)
    assert pool.promised_bytes == 900


def test_promises_are_bounded_and_given_back(pool):
    pool.expect(b"r", CID, 900)
    with pytest.raises(InvalidMessageError):
        pool.expect(b"s", unixfs.compute_cid(b"other"), 101)
    pool.forget(b"r")
    pool.expect(b"s", unixfs.compute_cid(b"other"), 101)
    assert pool.promised_bytes == 101


def test_rounds_are_bounded(pool):
    for number in range(pool_module.MAX_ROUNDS):
        pool.expect(b"%d" % number, CID, 1)
    with pytest.raises(LocalProtocolError, match="forget"):
        pool.expect(b"one more", CID, 1)


def test_foreign_content_under_own_name_is_a_bug(pool):
    with pytest.raises(LocalProtocolError):
        pool.offer(b"r", CID, b"something else")


def test_what_a_partner_is_about_to_send_is_not_asked_of_another_for_a_while(pool):
    first, second = (unixfs.compute_cid(data) for data in (b"first", b"second"))
    for cid in (first, second):
        pool.expect(b"r", cid, 6)
    pool.claim(b"r", {first}, 0.0)
    assert set(pool.unclaimed(b"r", CLAIM_SECONDS - 0.1)) == {second}
    assert set(pool.unclaimed(b"r", CLAIM_SECONDS)) == {first, second}  # it did not come
    pool.claim(b"r", {first, second}, 10.0)
    pool.release(b"r", {first})
    assert set(pool.unclaimed(b"r", 10.0)) == {first}
    pool.claim(b"r", {first}, 11.0)  # promised too often
    assert set(pool.unclaimed(b"r", 11.0)) == {first}
    pool.claim(b"unknown", {first}, 0.0)
    assert pool.unclaimed(b"unknown", 0.0) == {}
