"""The Host promises, over the real host on loopback and over the fake under a clock that jumps."""

from __future__ import annotations

import contextlib
import random

import pytest
import trio

from p2pflock.net.host import Libp2pHost
from p2pflock.testing import conformance_host
from p2pflock.testing.network import FakeNetwork, run_simulation

CHECKS = [pytest.param(check, id=check.__name__) for check in conformance_host.CHECKS]


@contextlib.asynccontextmanager
async def open_real(count):
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(Libp2pHost.open(bytes([n + 1]) * 32)) for n in range(count)]


@contextlib.asynccontextmanager
async def open_fake(count):
    async with contextlib.AsyncExitStack() as stack:
        network = await stack.enter_async_context(FakeNetwork.open(random.Random(count)))
        yield [await stack.enter_async_context(network.host(bytes([n + 1]) * 32)) for n in range(count)]


@pytest.mark.parametrize("check", CHECKS)
def test_real_host(check):
    trio.run(check, open_real)


@pytest.mark.parametrize("check", CHECKS)
def test_fake_host(check):
    async def main():
        await check(open_fake)

    run_simulation(main, seed=1)
