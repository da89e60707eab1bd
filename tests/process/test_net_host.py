"""Life of a real host: ports, addresses, the exceptions of its user, and a peer that freezes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import trio

from p2pflock.errors import LocalProtocolError, PortTakenError, SpecError, UnavailableError, UserError
from p2pflock.net.host import Libp2pHost
from p2pflock.ports import Verdict
from p2pflock.testing.conformance_host import accept, connect_all, take, until

PEER = """
import sys, threading, os, trio
from p2pflock.net.host import Libp2pHost
from p2pflock.ports import Verdict
from p2pflock.processes import die_with_parent

die_with_parent()
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()

async def main():
    async with Libp2pHost.open(bytes([9]) * 32) as host:
        await host.subscribe("t", lambda author, data: Verdict.ACCEPT)
        print(host.addresses[0], flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


def test_taken_port_is_one_line_and_says_how_to_fix_it():
    async def main():
        async with Libp2pHost.open(b"a" * 32) as host:
            port = int(host.addresses[0].split("/")[4])
            with pytest.raises(PortTakenError) as caught:
                async with Libp2pHost.open(b"b" * 32, listen=("127.0.0.1", port)):
                    pytest.fail("two hosts on one port")
        assert str(port) in caught.value.message
        assert caught.value.hint
        async with Libp2pHost.open(b"b" * 32, listen=("127.0.0.1", port)):  # free again at once
            pass

    trio.run(main)


def test_address_of_another_machine():
    async def main():
        async with Libp2pHost.open(b"a" * 32, listen=("192.0.2.7", 0)):
            pytest.fail("not ours")

    with pytest.raises(UserError):
        trio.run(main)


def test_wildcard_is_announced_by_an_address_that_can_be_dialed():
    async def main():
        async with (
            Libp2pHost.open(b"a" * 32, listen=("0.0.0.0", 0)) as anywhere,
            Libp2pHost.open(b"b" * 32) as other,
            Libp2pHost.open(b"c" * 32, listen=("0.0.0.0", 0), announce=["127.0.0.1", "localhost", "::1"]) as named,
        ):
            assert "0.0.0.0" not in anywhere.addresses[0]
            assert await other.connect(anywhere.addresses) == anywhere.peer_id
            assert [address.split("/")[1] for address in named.addresses] == ["ip4", "dns4", "ip6"]
            assert await other.connect(named.addresses) == named.peer_id

    trio.run(main)


def test_the_seed_is_the_identity():
    async def main():
        with pytest.raises(LocalProtocolError):
            async with Libp2pHost.open(b"short"):
                pass
        ids = []
        for seed in (b"a" * 32, b"a" * 32, b"b" * 32):
            async with Libp2pHost.open(seed) as host:
                ids.append(host.peer_id)
        assert ids[0] == ids[1] != ids[2]
        assert len(ids[0]) == 38

    trio.run(main)


def test_the_users_own_exception_comes_out_as_it_went_in():
    async def main():
        async with Libp2pHost.open(b"a" * 32):
            raise SpecError("mine")

    with pytest.raises(SpecError, match="mine"):
        trio.run(main)


def test_second_address_is_tried_and_both_dial_at_once():
    async def main():
        async with Libp2pHost.open(b"a" * 32) as a, Libp2pHost.open(b"b" * 32) as b:
            where, _, who = b.addresses[0].rpartition("/p2p/")
            nobody = f"/ip4/127.0.0.1/tcp/1/p2p/{who}"
            assert await a.connect([nobody, f"{where}/p2p/{who}"]) == b.peer_id
            with pytest.raises(UnavailableError):
                await a.connect([nobody, a.addresses[0]])  # two different peers
            await a.disconnect(b.peer_id)
            await until(lambda: not b.connected_peers())
            box_a, box_b = await a.subscribe("t", accept), await b.subscribe("t", accept)
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(a.connect, b.addresses)
                    nursery.start_soon(b.connect, a.addresses)
            for one, other, box in ((a, b, box_b), (b, a, box_a)):
                await one.publish("t", one.peer_id)
                assert (await take(box)).data == one.peer_id
                assert other.peer_id in one.connected_peers()
            # One of the two connections goes; gossip must survive in both directions.
            for connection in a._swarm.get_connections()[:1]:
                await connection.close()
            if not a.connected_peers():
                await a.connect(b.addresses)
            for one, box in ((a, box_b), (b, box_a)):
                await one.publish("t", b"again" + one.peer_id)
                assert (await take(box)).data == b"again" + one.peer_id

    trio.run(main)


def test_frozen_peer_is_noticed_and_may_return():
    """SIGSTOP: its sockets stay open and its kernel acknowledges.  Stock libp2p never notices."""
    child = subprocess.Popen(
        [sys.executable, "-c", PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    async def main():
        address = await trio.to_thread.run_sync(child.stdout.readline)
        async with Libp2pHost.open(b"a" * 32) as host:
            peer = await host.connect([address.strip()])
            os.kill(child.pid, signal.SIGSTOP)
            frozen = trio.current_time()
            await host.publish("t", bytes(1 << 20))  # more than the socket buffers: writes block, too
            await until(lambda: not host.connected_peers())
            assert trio.current_time() - frozen < 9.5
            os.kill(child.pid, signal.SIGCONT)
            assert await host.connect([address.strip()]) == peer

    try:
        trio.run(main)
    finally:
        child.kill()
        child.wait()


def test_eight_hosts_deliver_everything_to_everybody():
    async def main():
        async def join(number, *, task_status):
            async with Libp2pHost.open(bytes([50 + number]) * 32) as host:
                task_status.started(host)
                await trio.sleep_forever()

        async with trio.open_nursery() as nursery:
            hosts = [await nursery.start(join, number) for number in range(8)]
            boxes = [await host.subscribe("t", lambda author, data: Verdict.ACCEPT) for host in hosts]
            await connect_all(hosts)
            started = trio.current_time()
            for number in range(8):
                for host in hosts:
                    await host.publish("t", bytes([number]) * 500)
            for box in boxes:
                received = [await take(box) for _ in range(8 * 7)]
                assert len({(message.sender, message.data) for message in received}) == 8 * 7
            assert trio.current_time() - started < 20
            nursery.cancel_scope.cancel()

    trio.run(main)
