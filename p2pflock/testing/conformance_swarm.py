"""What every implementation of ports.Swarm must do; one suite over FakeSwarm and HivemindSwarm.

Each check is an async function of three swarms that have met, and of a salt that keeps the keys and rounds of
one check from another's, so that expensive swarms can serve all checks.  Run them with `CHECKS`.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import trio

from p2pflock.errors import LocalProtocolError, UnavailableError
from p2pflock.ports import Swarm
from p2pflock.primitives import unixfs
from p2pflock.primitives.cid import CID
from p2pflock.testing.swarm import compute_mean

DEADLINE_SECONDS = 20.0

Peers = Sequence[bytes]
Check = Callable[[Sequence[Swarm], Peers, str], Awaitable[None]]


def _payload(salt: str, size: int) -> tuple[CID, bytes]:
    seed = hashlib.sha256(salt.encode()).digest()
    payload = (seed * (size // 32 + 1))[:size]
    return unixfs.compute_cid(payload), payload


async def _raises(error: type[Exception], call: Callable[[], Awaitable[Any]]) -> None:
    try:
        await call()
    except error:
        return
    raise AssertionError(f"expected {error.__name__}")


async def _until(condition: Callable[[], Awaitable[bool]]) -> None:
    with trio.fail_after(DEADLINE_SECONDS):
        while not await condition():  # noqa: ASYNC110 - the condition is at another peer
            await trio.sleep(0.05)


async def check_records_are_found_by_author(swarms: Sequence[Swarm], peers: Peers, salt: str) -> None:
    key = f"records {salt}"
    for number, swarm in enumerate(swarms):
        await swarm.announce(key, b"value %d" % number, ttl_seconds=300)
    expected = {peer: b"value %d" % number for number, peer in enumerate(peers)}
    for swarm in swarms:

        async def found(swarm: Swarm = swarm) -> bool:
            return dict(await swarm.lookup(key)) == expected

        await _until(found)
    assert await swarms[0].lookup(f"nothing {salt}") == {}


async def check_records_are_replaced(swarms: Sequence[Swarm], peers: Peers, salt: str) -> None:
    """Also by a record that is meant to live shorter."""
    key = f"replaced {salt}"
    await swarms[0].announce(key, b"old", ttl_seconds=300)
    await swarms[0].announce(key, b"new", ttl_seconds=30)

    async def found() -> bool:
        return dict(await swarms[1].lookup(key)) == {peers[0]: b"new"}

    await _until(found)


async def check_oversized_record_is_refused(swarms: Sequence[Swarm], peers: Peers, salt: str) -> None:
    await _raises(
        LocalProtocolError, lambda: swarms[0].announce(f"big {salt}", bytes((8 << 10) + 1), ttl_seconds=30)
    )


async def check_swap_goes_both_ways(swarms: Sequence[Swarm], peers: Peers, salt: str) -> None:
    round_key = salt.encode()[:60]
    mine, theirs = _payload(salt + "a", 600_000), _payload(salt + "b", 300_001)
    await swarms[0].offer(round_key, *mine)
    await swarms[1].offer(round_key, *theirs)
    await swarms[0].expect(round_key, theirs[0], len(theirs[1]))
    await swarms[1].expect(round_key, mine[0], len(mine[1]))
    arrived = await swarms[0].swap(round_key, peers[1], deadline_seconds=DEADLINE_SECONDS)
    assert list(arrived) == [theirs[0]]
    for swarm in swarms[:2]:
        assert dict(await swarm.collect(round_key)) == dict((mine, theirs))
    assert await swarms[0].swap(round_key, peers[1], deadline_seconds=DEADLINE_SECONDS) == []
    await swarms[0].forget(round_key)
    assert await swarms[0].collect(round_key) == {}
    await swarms[1].forget(round_key)


async def check_both_may_swap_at_once(swarms: Sequence[Swarm], peers: Peers, salt: str) -> None:
    round_key = salt.encode()[:60]
    payloads = [_payload(salt + str(number), 200_000) for number in range(2)]
    for number, swarm in enumerate(swarms[:2]):
        await swarm.offer(round_key, *payloads[number])
        await swarm.expect(round_key, payloads[1 - number][0], 200_000)
    async with trio.open_nursery() as nursery:
        for number, swarm in enumerate(swarms[:2]):

            async def swap(swarm: Swarm = swarm, partner: bytes = peers[1 - number]) -> None:
                await swarm.swap(round_key, partner, deadline_seconds=DEADLINE_SECONDS)

            nursery.start_soon(swap)
    for swarm in swarms[:2]:
        assert dict(await swarm.collect(round_key)) == dict(payloads)
        await swarm.forget(round_key)


async def check_payloads_spread_through_others(swarms: Sequence[Swarm], peers: Peers, salt: str) -> None:
    round_key = salt.encode()[:60]
    cid, payload = _payload(salt, 100_000)
    await swarms[0].offer(round_key, cid, payload)
    for swarm in swarms[1:]:
        await swarm.expect(round_key, cid, len(payload))
    assert list(await swarms[1].swap(round_key, peers[0], deadline_seconds=DEADLINE_SECONDS)) == [cid]
    assert list(await swarms[2].swap(round_key, peers[1], deadline_seconds=DEADLINE_SECONDS)) == [cid]
    for swarm in swarms:
        await swarm.forget(round_key)


async def check_only_expected_payloads_enter(swarms: Sequence[Swarm], peers: Peers, salt: str) -> None:
    round_key = salt.encode()[:60]
    cid, payload = _payload(salt, 50_000)
    await swarms[0].offer(round_key, cid, payload)
    assert await swarms[1].swap(round_key, peers[0], deadline_seconds=DEADLINE_SECONDS) == []
    assert await swarms[1].collect(round_key) == {}
    await _raises(LocalProtocolError, lambda: swarms[1].offer(round_key, cid, b"not what the id says"))
    # Too small a size keeps it out; any other, true or too large, lets it in.
    await swarms[1].expect(round_key, cid, len(payload) - 1)
    with contextlib.suppress(UnavailableError):
        assert await swarms[1].swap(round_key, peers[0], deadline_seconds=DEADLINE_SECONDS) == []
    assert await swarms[1].collect(round_key) == {}
    await swarms[1].expect(round_key, cid, len(payload) + 1)
    await swarms[1].expect(round_key, cid, len(payload))
    assert await swarms[1].swap(round_key, peers[0], deadline_seconds=DEADLINE_SECONDS) == [cid]
    for swarm in swarms[:2]:
        await swarm.forget(round_key)


async def check_arrivals_are_told_in_order(swarms: Sequence[Swarm], peers: Peers, salt: str) -> None:
    round_key = salt.encode()[:60]
    own, foreign = _payload(salt + "own", 1000), _payload(salt + "foreign", 2000)
    arrivals: AsyncIterator[tuple[bytes, CID]] = await swarms[0].arrivals()
    await swarms[0].offer(round_key, *own)
    await swarms[0].expect(round_key, foreign[0], 2000)
    await swarms[1].offer(round_key, *foreign)
    await swarms[0].swap(round_key, peers[1], deadline_seconds=DEADLINE_SECONDS)
    with trio.fail_after(DEADLINE_SECONDS):
        assert [await arrivals.__anext__() for _ in range(2)] == [
            (round_key, own[0]),
            (round_key, foreign[0]),
        ]
    for swarm in swarms[:2]:
        await swarm.forget(round_key)


async def check_a_gift_reaches_who_expects_it(swarms: Sequence[Swarm], peers: Peers, salt: str) -> None:
    """Whether its header comes before it or just after, and nobody else; absent partners are left out."""
    round_key = salt.encode()[:60]
    cid, payload = _payload(salt, 300_000)
    nobody = peers[0][:6] + hashlib.sha256(salt.encode()).digest()
    await swarms[0].offer(round_key, cid, payload)
    await swarms[1].expect(round_key, cid, len(payload))
    has: list[bytes] = []
    async with trio.open_nursery() as nursery:

        async def give() -> None:
            has.extend(await swarms[0].give(round_key, cid, [*peers[1:3], nobody], deadline_seconds=DEADLINE_SECONDS))

        nursery.start_soon(give)
        await _until(lambda: _holds(swarms[1], round_key, cid))
        await swarms[2].expect(round_key, cid, len(payload))
    assert has == list(peers[1:3])
    for swarm in swarms:
        assert dict(await swarm.collect(round_key)) == {cid: payload}
        await swarm.forget(round_key)
    await _raises(LocalProtocolError, lambda: swarms[0].give(round_key, cid, peers[1:2], deadline_seconds=1.0))


async def _holds(swarm: Swarm, round_key: bytes, cid: CID) -> bool:
    return cid in await swarm.collect(round_key)


async def check_a_gift_that_nobody_named_is_none(swarms: Sequence[Swarm], peers: Peers, salt: str) -> None:
    round_key = salt.encode()[:60]
    cid, payload = _payload(salt, 50_000)
    await swarms[0].offer(round_key, cid, payload)
    await swarms[1].expect(round_key, cid, len(payload) - 1)
    assert list(await swarms[0].give(round_key, cid, peers[1:2], deadline_seconds=1.0)) == []
    assert await swarms[1].collect(round_key) == {}
    for swarm in swarms[:2]:
        await swarm.forget(round_key)


async def check_absent_partner_is_unavailable(swarms: Sequence[Swarm], peers: Peers, salt: str) -> None:
    nobody = peers[0][:6] + hashlib.sha256(salt.encode()).digest()
    await _raises(UnavailableError, lambda: swarms[0].swap(b"round", nobody, deadline_seconds=2.0))


async def check_average_has_the_same_bits(swarms: Sequence[Swarm], peers: Peers, salt: str) -> None:
    values = 70_001  # more than one part of hivemind's, and no multiple of anything
    vectors = {
        peer: _vector(f"{salt} {number}", values) for number, peer in enumerate(peers)
    }
    means: dict[bytes, bytes] = {}
    async with trio.open_nursery() as nursery:
        for swarm, peer in zip(swarms, peers, strict=True):

            async def average(swarm: Swarm = swarm, peer: bytes = peer) -> None:
                means[peer] = await swarm.average(
                    salt.encode(), vectors[peer], peers, deadline_seconds=DEADLINE_SECONDS
                )

            nursery.start_soon(average)
    expected = compute_mean([vectors[peer] for peer in sorted(peers)])
    assert all(mean == expected for mean in means.values())


async def check_average_without_a_member_is_none(swarms: Sequence[Swarm], peers: Peers, salt: str) -> None:
    vector = _vector(salt, 100)
    await _raises(
        UnavailableError, lambda: swarms[0].average(salt.encode(), vector, peers, deadline_seconds=1.0)
    )
    await _raises(
        LocalProtocolError, lambda: swarms[0].average(salt.encode(), vector, peers[1:], deadline_seconds=1.0)
    )


def _vector(salt: str, values: int) -> bytes:
    """Float32 in [1, 2) with random mantissas, so that every order of summing rounds differently."""
    raw = np.frombuffer(hashlib.shake_256(salt.encode()).digest(4 * values), dtype="<u4")
    vector: bytes = ((raw & 0x7FFFFF) | 0x3F800000).astype("<u4").tobytes()
    return vector


CHECKS: Sequence[Check] = (
    check_records_are_found_by_author,
    check_records_are_replaced,
    check_oversized_record_is_refused,
    check_swap_goes_both_ways,
    check_both_may_swap_at_once,
    check_payloads_spread_through_others,
    check_only_expected_payloads_enter,
    check_arrivals_are_told_in_order,
    check_a_gift_reaches_who_expects_it,
    check_a_gift_that_nobody_named_is_none,
    check_absent_partner_is_unavailable,
    check_average_has_the_same_bits,
    check_average_without_a_member_is_none,
)
