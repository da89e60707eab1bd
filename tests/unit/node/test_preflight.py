"""Checks before the start: what they refuse, and what they must let pass."""

from __future__ import annotations

import functools
import socket

import pytest
import trio
import trio.testing

from p2pflock.errors import BootstrapError, PortTakenError, SpecError, UserError
from p2pflock.node import preflight
from p2pflock.primitives import peerid
from p2pflock.testing import tiny_task

OWN, OTHER = (peerid.from_ed25519(bytes([n]) * 32) for n in (1, 2))


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def dead():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return port


def address(port, peer=OTHER, host="/ip4/127.0.0.1"):
    return f"{host}/tcp/{port}/p2p/{peerid.to_text(peer)}"


def check(*addresses):
    ask = functools.partial(preflight.check_bootstrap, addresses, OWN, seconds=2)
    trio.run(ask, clock=trio.testing.MockClock(autojump_threshold=0.2))


def test_one_live_bootstrap_peer_is_enough(listening, dead):
    check(address(dead), address(listening))


@pytest.mark.parametrize(
    "addresses",
    [
        (),
        (address(1, OWN),),  # our own: whoever started first is given the same list as all others
        (f"/ip4/127.0.0.1/udp/1/quic-v1/p2p/{peerid.to_text(OTHER)}",),  # only the daemon can tell
    ],
)
def test_nothing_to_ask(addresses):
    check(*addresses)


def test_a_peer_that_comes_up_a_little_later_is_found(dead):
    async def body():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(preflight.check_bootstrap, [address(dead)], OWN)
            await trio.sleep(3 * preflight.RETRY_SECONDS)
            (listener,) = await trio.open_tcp_listeners(dead, host="127.0.0.1")
            async with listener:
                await (await listener.accept()).aclose()

    trio.run(body, clock=trio.testing.MockClock(autojump_threshold=0.2))


def test_all_dead_names_each_cause(dead):
    with pytest.raises(BootstrapError, match=rf"127\.0\.0\.1:{dead} \(.*refused\)") as caught:
        check(address(dead))
    assert caught.value.hint


@pytest.mark.parametrize(
    "text",
    ["", "127.0.0.1:4001", "/ip4/127.0.0.1/tcp/4001", "/ip4/127.0.0.1/tcp/x/p2p/" + peerid.to_text(OTHER), address(1)[:-1]],
)
def test_malformed_addresses(text):
    with pytest.raises(SpecError, match="malformed bootstrap address"):
        preflight.parse_bootstrap(text)


def test_ports(listening, dead):
    preflight.check_port("127.0.0.1", dead, "--swarm-port")
    preflight.check_port("127.0.0.1", 0, "--swarm-port")
    with pytest.raises(PortTakenError) as caught:
        preflight.check_port("127.0.0.1", listening, "--swarm-port")
    assert "--swarm-port" in caught.value.hint
    for port in (0, listening):
        with pytest.raises(UserError, match="cannot listen"):
            preflight.check_port("192.0.2.1", port, "--swarm-port")


def test_foreign_modules_need_trust():
    spec = tiny_task.build_spec()
    for trusted in ((tiny_task.MODULE,), ("p2pflock.testing",)):
        preflight.check_modules(spec, trusted)
    for trusted in ((), (tiny_task.MODULE[:-1],), (tiny_task.MODULE + ".more",)):
        with pytest.raises(SpecError, match="not trusted"):
            preflight.check_modules(spec, trusted)
