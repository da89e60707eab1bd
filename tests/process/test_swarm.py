"""Real swarms: four processes with p2pd each, one start for all tests.  Tests that kill come last.

Imports nothing of hivemind: it shares no interpreter with libp2p, which other tests import.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import trio

from p2pflock.errors import BootstrapError, FlockError, PortTakenError, SpecError, UnavailableError
from p2pflock.gossip.client import HivemindSwarm, SwarmConfig
from p2pflock.primitives import peerid, unixfs
from p2pflock.testing.conformance_swarm import CHECKS
from tests.process.swarm_kit import TASK, TrioThread, is_running, until


@pytest.fixture(scope="module")
def portal():
    with TrioThread() as portal:
        yield portal


@pytest.fixture(scope="module")
def swarms(portal):
    first = portal.start_swarm(1)
    # One of the bootstrap addresses is dead: nobody may mind.
    dead = f"/ip4/127.0.0.1/tcp/1/p2p/{peerid.to_text(peerid._PREFIX + bytes([3]) * 32)}"
    others = portal.start_together([2, 3, 4], (dead, *first.bootstrap_addresses))
    swarms = [first, *others]
    yield swarms
    for swarm in swarms:
        portal.run(swarm.aclose)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(portal, swarms, check):
    peers = [swarm.peer for swarm in swarms[:3]]
    portal.run(check, swarms[:3], peers, check.__name__)


def random_payload(name, size):
    data = hashlib.shake_256(name.encode()).digest(size)
    return unixfs.compute_cid(data), data


@pytest.mark.parametrize("size", [600_000, 5_000_000])
def test_swap_of_size_and_its_traffic(portal, swarms, size):
    a, b = swarms[:2]
    cid, data = random_payload(f"size {size}", size)
    round_key = b"size %d" % size

    async def scenario():
        await a.offer(round_key, cid, data)
        await b.expect(round_key, cid, size)
        before = [await swarm.measure_traffic() for swarm in (a, b)]
        assert await b.swap(round_key, a.peer, deadline_seconds=20) == [cid]
        after = [await swarm.measure_traffic() for swarm in (a, b)]
        assert (await b.collect(round_key))[cid] == data
        await b.forget(round_key)
        sent = after[0].sent_bytes - before[0].sent_bytes
        received = after[1].received_bytes - before[1].received_bytes
        # At the socket: the payload, its framing, and the little that DHT and libp2p say meanwhile.
        assert size < sent < size * 1.05 + 20_000
        assert size < received < size * 1.05 + 20_000
        await until(lambda: settled(b, after[1].received_bytes))

    async def settled(swarm, received):
        return swarm.traffic().received_bytes >= received

    portal.run(scenario)


def test_frozen_peer_costs_the_deadline(portal, swarms):
    """Both halves of the partner stop: its kernel still accepts what we send."""
    a, b = swarms[:2]

    async def scenario():
        daemon = (await b.stats())["daemon_pid"]
        cid, data = random_payload("frozen", 2_000_000)
        await a.offer(b"frozen", cid, data)
        for pid in (b.child.pid, daemon):
            os.kill(pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            with pytest.raises(UnavailableError):
                await a.swap(b"frozen", b.peer, deadline_seconds=1.5)
            assert time.monotonic() - started < 3
        finally:
            for pid in (daemon, b.child.pid):
                os.kill(pid, signal.SIGCONT)
        await b.expect(b"frozen", cid, len(data))
        assert await b.swap(b"frozen", a.peer, deadline_seconds=20) == [cid]

    portal.run(scenario)


def test_cancelled_swap_leaves_the_child_working(portal, swarms):
    a, b = swarms[:2]

    async def scenario():
        daemon = (await b.stats())["daemon_pid"]
        os.kill(daemon, signal.SIGSTOP)
        try:
            with trio.move_on_after(0.2) as scope:
                await a.swap(b"cancelled", b.peer, deadline_seconds=30)
            assert scope.cancelled_caught
        finally:
            os.kill(daemon, signal.SIGCONT)
        assert await a.swap(b"cancelled", b.peer, deadline_seconds=20) == []

    portal.run(scenario)


def test_failed_starts_name_their_cause(portal, swarms):
    """Taken port, dead bootstrap, malformed address: side by side, each start costs an import."""
    port = int(swarms[0].bootstrap_addresses[0].split("/")[4])
    dead = f"/ip4/127.0.0.1/tcp/1/p2p/{peerid.to_text(peerid._PREFIX + bytes([3]) * 32)}"
    cases = [
        # p2pd alone would share the port: it listens with SO_REUSEPORT.
        (PortTakenError, {"listen_port": port}),
        (BootstrapError, {"initial_peers": (dead,), "bootstrap_seconds": 0.0}),
        (SpecError, {"initial_peers": ("/ip4/127.0.0.1/tcp/x",)}),
    ]
    met = {}

    async def attempt(error, options):
        async with trio.open_nursery() as nursery:
            try:
                config = SwarmConfig(task=TASK, seed=bytes(31) + b"\x07", **options)
                await HivemindSwarm.start(nursery, config)
            except FlockError as met_error:
                met[error] = met_error
            nursery.cancel_scope.cancel()

    async def all_():
        async with trio.open_nursery() as nursery:
            for case in cases:
                nursery.start_soon(attempt, *case)

    portal.run(all_, seconds=130)
    for error, _ in cases:
        assert type(met[error]) is error
        assert "\n" not in str(met[error])
        assert met[error].hint
    assert str(port) in str(met[PortTakenError])


OWNER = """
import sys, trio
from p2pflock.gossip.client import HivemindSwarm, SwarmConfig
async def main():
    async with trio.open_nursery() as nursery:
        swarm = await HivemindSwarm.start(nursery, SwarmConfig(task=bytes(32), seed=bytes(31) + b"\\x09"))
        print(swarm.child.pid, (await swarm.stats())["daemon_pid"], flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


def test_everything_dies_with_the_main_process(portal):
    """kill -9 of the main process ends the child and p2pd, even a frozen p2pd; no key was on disk."""
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE)
    try:
        child, daemon = map(int, owner.stdout.readline().split())
        command = Path(f"/proc/{daemon}/cmdline").read_bytes()
        assert b"-id=/proc/" in command
        assert (bytes(31) + b"\x09") not in command
        os.kill(daemon, signal.SIGSTOP)
    finally:
        owner.kill()
        owner.wait()

    async def gone():
        return not is_running(child) and not is_running(daemon)

    portal.run(until, gone, 5)


def test_daemon_and_child_end_together(portal, swarms):
    """Without p2pd the child is useless: calls fail at once instead of hanging."""
    fourth = swarms[3]

    async def scenario():
        arrivals = await fourth.arrivals()
        os.kill((await fourth.stats())["daemon_pid"], signal.SIGKILL)
        with trio.fail_after(5):
            await fourth.child.wait_ended()
            assert [arrival async for arrival in arrivals] == []
        with pytest.raises(UnavailableError):
            await fourth.lookup("anything")
        started = time.monotonic()
        with pytest.raises(UnavailableError):
            await swarms[0].swap(b"killed", fourth.peer, deadline_seconds=10)
        assert time.monotonic() - started < 9

    portal.run(scenario)


def test_bootstrap_dies_and_the_others_go_on(portal, swarms):
    """The first peer is killed; the others still exchange and find records, a newcomer joins through one of
    them, and the first one comes back under its name."""
    first, second, third, _ = swarms
    first_peer = first.peer

    async def kill():
        daemon = (await first.stats())["daemon_pid"]
        os.kill(daemon, signal.SIGKILL)
        os.kill(first.child.pid, signal.SIGKILL)
        await first.child.wait_ended()

    portal.run(kill)
    back = portal.start_swarm(1, second.bootstrap_addresses)
    assert back.peer == first_peer
    survivors = [second, third, back]
    swarms[0] = back

    async def scenario():
        for number, swarm in enumerate(survivors):
            await swarm.announce("after", b"%d" % number, ttl_seconds=60)
        expected = {swarm.peer: b"%d" % number for number, swarm in enumerate(survivors)}
        for swarm in survivors:

            async def found(swarm=swarm):
                return dict(await swarm.lookup("after")) == expected

            await until(found, 20)
        cid, data = random_payload("after", 100_000)
        await third.offer(b"after", cid, data)
        await back.expect(b"after", cid, len(data))
        assert await back.swap(b"after", third.peer, deadline_seconds=20) == [cid]

    portal.run(scenario)


def test_clean_end_leaves_nothing_behind(portal, swarms):
    before = {path.name for path in Path(tempfile.gettempdir()).glob("p2pflock-gossip-*")}
    child = swarms[2].child.pid
    portal.run(swarms[2].aclose)
    after = {path.name for path in Path(tempfile.gettempdir()).glob("p2pflock-gossip-*")}
    assert len(before - after) == 1
    assert not is_running(child)
