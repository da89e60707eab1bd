"""Attacks that work on stock hivemind 1.1.12, run against a live peer by a rogue one.

Two of ours (victim, witness) and one rogue process, started once.  Every test ends with the victim still
answering; the order is from mild to heavy.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import trio

from p2pflock.errors import UnavailableError
from p2pflock.gossip import exchange, records
from p2pflock.primitives import unixfs
from p2pflock.processes import Child
from p2pflock.testing.swarm import compute_mean
from tests.process.swarm_kit import TASK, TrioThread, resident_bytes, until

MIB = 1 << 20


@pytest.fixture(scope="module")
def portal():
    with TrioThread() as portal:
        yield portal


@pytest.fixture(scope="module")
def cast(portal):
    """(victim, witness, rogue)"""
    victim = portal.start_swarm(21)
    cast = {}

    async def start_rogue():
        config = {"task": TASK, "seed": bytes([66]) * 32, "initial_peers": list(victim.bootstrap_addresses)}
        cast["rogue"] = await Child.start(portal.nursery, "tests.attacks.rogue_gossip", config, name="rogue")

    async def start_both():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(start_rogue)
            cast["witness"] = await trio.to_thread.run_sync(
                portal.start_swarm, 22, tuple(victim.bootstrap_addresses)
            )

    portal.run(start_both, seconds=130)
    yield victim, cast["witness"], cast["rogue"]
    for swarm in (victim, cast["witness"]):
        portal.run(swarm.aclose)
    portal.run(cast["rogue"].aclose)


async def still_works(victim, witness, salt):
    """The victim stores, finds and swaps as if nothing had been."""
    data = hashlib.sha256(salt.encode()).digest() * 1000
    cid, round_key = unixfs.compute_cid(data), salt.encode()
    await witness.offer(round_key, cid, data)
    await victim.expect(round_key, cid, len(data))
    assert await victim.swap(round_key, witness.peer, deadline_seconds=20) == [cid]
    await victim.announce("alive", salt.encode(), ttl_seconds=60)

    async def found():
        return (await witness.lookup("alive")).get(victim.peer) == salt.encode()

    await until(found)
    for swarm in (victim, witness):
        await swarm.forget(round_key)


def test_forged_records_and_tombstones(portal, cast):
    victim, witness, rogue = cast

    async def scenario():
        for swarm in (victim, witness):
            await swarm.announce("peers", b"true", ttl_seconds=60)
        taken = await rogue.call("forge", {"victim": victim.peer, "author": witness.peer, "key": "peers"})
        assert taken.pop("control: own record") is True
        assert taken == dict.fromkeys(taken, False)
        for swarm in (victim, witness):
            found = dict(await swarm.lookup("peers"))
            assert found[victim.peer] == found[witness.peer] == b"true"
        assert (await victim.stats())["records_refused"] >= 8
        await still_works(victim, witness, "after forgeries")

    portal.run(scenario)


def test_hoarder_has_a_quota(portal, cast):
    victim, witness, rogue = cast

    async def scenario():
        assert await rogue.call("hoard", {"victim": victim.peer}) <= records.MAX_KEYS_PER_AUTHOR
        await still_works(victim, witness, "after hoarding")

    portal.run(scenario)


def test_node_ids_belong_to_peer_ids(portal, cast):
    victim, witness, rogue = cast

    async def scenario():
        before = await victim.stats()
        await rogue.call("impersonate_nodes", {"victim": victim.peer, "count": 20})
        after = await victim.stats()
        assert after["routing_entries"] == before["routing_entries"] == 1
        assert after["requests_refused"] >= before["requests_refused"] + 20
        await still_works(victim, witness, "after impersonation")

    portal.run(scenario)


def test_oversized_requests(portal, cast):
    victim, witness, rogue = cast

    async def scenario():
        too_many, malformed = await rogue.call("ask_too_much", {"victim": victim.peer})
        assert "too many keys" in too_many
        assert malformed == "" or "Error" in malformed
        await still_works(victim, witness, "after large requests")

    portal.run(scenario)


@pytest.mark.parametrize("lie", ["weight", "dtype", "infinite", "compressed"])
def test_liars_in_the_dense_average(portal, cast, lie):
    """A weight of 1e9 counts as one; malformed parts end the average for everybody, within the deadline."""
    victim, witness, rogue = cast
    members = [victim.peer, witness.peer, rogue.ready]
    vectors = {peer: np.full(250_000, value, "<f4").tobytes() for peer, value in zip(members, (1, 2, 1000))}
    met = []

    async def take_part(swarm):
        try:
            vector = vectors[swarm.peer]
            met.append(await swarm.average(lie.encode(), vector, members, deadline_seconds=10))
        except UnavailableError:
            met.append(None)

    async def scenario():
        async with trio.open_nursery() as nursery:
            for swarm in (victim, witness):
                nursery.start_soon(take_part, swarm)
            params = {"lie": lie, "round": lie.encode(), "vector": vectors[rogue.ready], "members": members}
            await rogue.call("average", params)
        expected = compute_mean([vectors[peer] for peer in sorted(members)])
        if lie == "weight":
            assert met == [expected, expected]
        else:
            assert met == [None, None]
        await still_works(victim, witness, f"after lie {lie}")

    portal.run(scenario)


def test_streams_for_groups_that_never_come(portal, cast):
    victim, witness, rogue = cast

    async def scenario():
        turned_away = await rogue.call("wait_in_groups", {"victim": victim.peer, "count": 40})
        assert turned_away >= 40 - 16
        await still_works(victim, witness, "after waiting")

    portal.run(scenario)


def test_flood_of_requests(portal, cast):
    victim, witness, rogue = cast

    async def scenario():
        assert await rogue.call("flood_requests", {"victim": victim.peer}) > 100
        await still_works(victim, witness, "after flood")

    portal.run(scenario)


BOMBS = {
    # Our own frames: a chunk of four gigabytes.
    "exchange": (
        f"p2pflock/1/{TASK.hex()}/exchange",
        bytes([exchange.HELLO]) + (0xFFFFFFFF).to_bytes(4, "big"),
    ),
    # hivemind's protobuf streams: an 8-byte length header without a cap.
    "protobuf stream": ("DenseAverager.rpc_aggregate_part", b"\x00" + (1 << 40).to_bytes(8, "big")),
}


@pytest.mark.parametrize("name", BOMBS)
def test_memory_bomb(portal, cast, name):
    victim, witness, rogue = cast
    protocol, header = BOMBS[name]

    async def scenario():
        before = resident_bytes(victim.child.pid)
        sent = await rogue.call("bomb", {"victim": victim.peer, "protocol": protocol, "header": header})
        assert sent < 32 * MIB
        assert resident_bytes(victim.child.pid) - before < 32 * MIB
        await still_works(victim, witness, f"after {name}")

    portal.run(scenario)
