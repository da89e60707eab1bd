"""The fake network's own promises: faults happen, and two runs of one seed are equal."""

from __future__ import annotations

import contextlib
import random

import pytest
import trio

from p2pflock.errors import UnavailableError
from p2pflock.ports import Verdict
from p2pflock.testing.conformance_host import accept, connect_all, take, until
from p2pflock.testing.network import DETECT_SECONDS, FakeNetwork, run_simulation


@contextlib.asynccontextmanager
async def swarm(count, seed=1, **faults):
    async with contextlib.AsyncExitStack() as stack:
        network = await stack.enter_async_context(FakeNetwork.open(random.Random(seed), **faults))
        hosts = [await stack.enter_async_context(network.host(bytes([n + 1]) * 32)) for n in range(count)]
        await connect_all(hosts)
        yield network, hosts


def history(seed):
    """Everything that seven chatting peers receive, in order, with its time."""

    async def main():
        log = []

        async def listen(number, box):
            async for message in box:
                log.append((trio.current_time(), number, message.sender, message.data))

        async with swarm(7, seed, delay_seconds=(0.001, 2.0), loss=0.2, duplicate=0.2) as (_, hosts):
            async with trio.open_nursery() as nursery:
                for number, host in enumerate(hosts):
                    nursery.start_soon(listen, number, await host.subscribe("t", accept))
                for number in range(20):
                    await hosts[number % 7].publish("t", bytes([number]))
                    await trio.sleep(0.1)
                await trio.sleep(10)
                nursery.cancel_scope.cancel()
        return log

    return run_simulation(main, seed=seed)


def test_two_runs_of_one_seed_are_equal():
    first = history(5)
    assert first == history(5)
    assert first != history(6)
    order = [data for _, number, _, data in first if number == 0]
    assert order != sorted(order)  # messages overtake each other
    assert len(order) == len(set(order))  # duplicates are not delivered


def test_loss_loses_and_requests_time_out():
    async def main():
        async with swarm(2, loss=1.0) as (network, (a, b)):
            await b.subscribe("t", accept)

            async def echo(peer, request):
                return request

            b.serve("/echo/1", echo, max_request_bytes=10)
            await a.publish("t", b"lost")
            started = trio.current_time()
            with pytest.raises(UnavailableError):
                await a.request(b.peer_id, "/echo/1", b"", max_response_bytes=10, deadline_seconds=30)
            assert trio.current_time() - started == 30
            assert "gossip_received" not in b.counters()
            network.loss = 0.0
            assert await a.request(b.peer_id, "/echo/1", b"x", max_response_bytes=9, deadline_seconds=1) == b"x"

    run_simulation(main, seed=1)


def test_partition_separates_breaks_links_and_heals():
    async def main():
        async with swarm(4) as (network, (a, b, c, d)):
            boxes = [await host.subscribe("t", accept) for host in (a, b, c, d)]
            network.partition([a.peer_id, b.peer_id], [c.peer_id, d.peer_id])
            started = trio.current_time()
            await a.publish("t", b"west")
            await c.publish("t", b"east")
            assert (await take(boxes[1])).data == b"west"
            assert (await take(boxes[3])).data == b"east"
            await until(lambda: a.connected_peers() == {b.peer_id} and c.connected_peers() == {d.peer_id})
            assert DETECT_SECONDS <= trio.current_time() - started < DETECT_SECONDS + 1
            with pytest.raises(UnavailableError):
                await a.connect(c.addresses)
            network.heal()
            await a.connect(c.addresses)
            await a.publish("t", b"again")
            assert (await take(boxes[3])).data == b"again"  # through c

    run_simulation(main, seed=1)


def test_a_fault_hook_sees_and_decides():
    async def main():
        flights = []

        def fault(flight):
            flights.append((flight.kind, flight.channel, flight.data))
            return None if flight.data == b"drop" else 5.0

        async with swarm(2, fault=fault) as (_, (a, b)):
            box = await b.subscribe("t", accept)
            started = trio.current_time()
            await a.publish("t", b"drop")
            await a.publish("t", b"keep")
            assert (await take(box)).data == b"keep"
            assert trio.current_time() - started >= 5.0
            assert flights == [("gossip", "t", b"drop"), ("gossip", "t", b"keep")]

    run_simulation(main, seed=1)


def test_a_crash_takes_its_links_and_a_restart_comes_back():
    async def main():
        async with FakeNetwork.open(random.Random(1)) as network, network.host(b"a" * 32) as a:
            async with network.host(b"b" * 32) as b:
                box = await b.subscribe("t", lambda author, data: Verdict.ACCEPT)
                await a.connect(b.addresses)
            assert not a.connected_peers()
            assert [message async for message in box] == []
            with pytest.raises(UnavailableError):
                await a.connect(b.addresses)
            async with network.host(b"b" * 32) as b:
                assert await a.connect(b.addresses) == b.peer_id

    run_simulation(main, seed=1)
