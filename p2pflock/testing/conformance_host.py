"""What every Host must do, whoever implements it.

Law: each `check_` function takes the means to open n connected-to-nobody hosts and asserts one promise of
ports.Host; CHECKS is all of them.  Nothing here sleeps: it waits on conditions, under whatever clock the
caller runs trio with.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import pytest
import trio

from p2pflock.errors import InvalidMessageError, LocalProtocolError, UnavailableError
from p2pflock.net.limits import MAX_MESSAGE_BYTES
from p2pflock.ports import GossipMessage, Host, Verdict

DEADLINE_SECONDS = 20.0


class TestedHost(Host, Protocol):
    """The port, and the two things that a test needs to see."""

    @property
    def peer_id(self) -> bytes: ...

    def counters(self) -> Mapping[str, int]: ...


Open = Callable[[int], AbstractAsyncContextManager[Sequence[TestedHost]]]


async def until(condition: Callable[[], bool], what: str = "") -> None:
    """Wait for a condition; polls under a deadline."""
    with trio.move_on_after(DEADLINE_SECONDS):
        while not condition():  # noqa: ASYNC110 - whatever changes it is not ours to signal
            await trio.sleep(0.01)
        return
    raise AssertionError(f"never happened: {what or condition}")


async def take(messages: AsyncIterator[GossipMessage]) -> GossipMessage:
    with trio.fail_after(DEADLINE_SECONDS):
        return await messages.__anext__()


def accept(author: bytes, data: bytes) -> Verdict:
    return Verdict.ACCEPT


async def connect_all(hosts: Sequence[TestedHost]) -> None:
    for number, host in enumerate(hosts):
        for other in hosts[:number]:
            await host.connect(other.addresses)


async def check_connect_names_the_peer(open_hosts: Open) -> None:
    async with open_hosts(2) as (a, b):
        assert await a.connect(b.addresses) == b.peer_id
        assert a.connected_peers() == {b.peer_id}
        await until(lambda: b.connected_peers() == {a.peer_id})
        assert await a.connect(b.addresses) == b.peer_id  # again is no error
        await a.disconnect(b.peer_id)
        assert not a.connected_peers()
        await until(lambda: not b.connected_peers())
        assert await b.connect(a.addresses) == a.peer_id  # and back


async def check_addresses_that_lead_nowhere(open_hosts: Open) -> None:
    async with open_hosts(3) as (a, b, c):
        somebody_else = b.addresses[0].rpartition("/p2p/")[0] + "/p2p/" + c.addresses[0].rpartition("/p2p/")[2]
        for bad in (
            [],
            [""],
            ["/p2p/"],
            ["not an address"],
            a.addresses,
            [somebody_else],  # b listens there, and b is not c
            [b.addresses[0].rpartition("/p2p/")[0]],
        ):
            with pytest.raises(UnavailableError):
                await a.connect(bad)
        assert not a.connected_peers()


async def check_gossip_reaches_subscribers(open_hosts: Open) -> None:
    async with open_hosts(4) as hosts:
        author, first, second, deaf = hosts
        boxes = [await host.subscribe("topic", accept) for host in (first, second)]
        await deaf.subscribe("other", accept)
        await connect_all(hosts)
        await author.publish("topic", b"hello")
        for box in boxes:
            assert await take(box) == GossipMessage("topic", author.peer_id, b"hello")
        own = await author.subscribe("topic", accept)
        await author.publish("topic", b"mine")
        await first.publish("topic", b"yours")
        assert (await take(own)).data == b"yours"  # own messages are not delivered back
        assert "gossip_accept" not in deaf.counters()


async def check_gossip_right_after_connecting(open_hosts: Open) -> None:
    """No mesh has formed yet."""
    async with open_hosts(2) as (a, b):
        box = await b.subscribe("topic", accept)
        await a.connect(b.addresses)
        await a.publish("topic", b"at once")
        assert (await take(box)).data == b"at once"


async def check_late_subscriber_gets_the_last_moments(open_hosts: Open) -> None:
    async with open_hosts(2) as (a, b):
        await a.connect(b.addresses)
        await a.publish("topic", b"just before")
        box = await b.subscribe("topic", accept)
        assert (await take(box)).data == b"just before"


async def check_gossip_is_forwarded(open_hosts: Open) -> None:
    """A line: the ends are not connected."""
    async with open_hosts(3) as (a, b, c):
        boxes = [await host.subscribe("topic", accept) for host in (a, b, c)]
        await a.connect(b.addresses)
        await b.connect(c.addresses)
        await a.publish("topic", b"far")
        assert (await take(boxes[2])) == GossipMessage("topic", a.peer_id, b"far")


async def check_gossip_is_not_passed_on_to_the_authors_neighbours(open_hosts: Open) -> None:
    """A line again; its end claims to be connected with the author, and then not any more."""
    async with open_hosts(3) as (a, b, c):
        boxes = [await host.subscribe("topic", accept) for host in (a, b, c)]
        await a.connect(b.addresses)
        await b.connect(c.addresses)
        await a.publish("topic", b"before")
        assert (await take(boxes[2])).data == b"before"
        b.note_neighbours(c.peer_id, frozenset({a.peer_id}))
        await a.publish("topic", b"not for c")
        await b.publish("topic", b"from b itself")
        assert (await take(boxes[2])).data == b"from b itself"
        assert [(await take(boxes[1])).data for _ in range(2)] == [b"before", b"not for c"]
        b.note_neighbours(c.peer_id, frozenset())
        await a.publish("topic", b"after")
        assert (await take(boxes[2])).data == b"after"


async def check_verdicts(open_hosts: Open) -> None:
    async with open_hosts(3) as (a, b, c):

        def judge(author: bytes, data: bytes) -> Verdict:
            if data == b"raise":
                raise RuntimeError("a bug of ours")
            return {b"good": Verdict.ACCEPT, b"bad": Verdict.REJECT}.get(data, Verdict.IGNORE)

        middle = await b.subscribe("topic", judge)
        end = await c.subscribe("topic", accept)
        await a.connect(b.addresses)
        await b.connect(c.addresses)
        for data in (b"bad", b"unknown", b"raise", b"good"):
            await a.publish("topic", data)
        assert (await take(middle)).data == b"good"
        assert (await take(end)).data == b"good"  # what is not accepted is not forwarded
        await until(lambda: b.counters().get("gossip_reject") == 1)
        assert b.counters()["gossip_ignore"] == 2
        assert c.counters()["gossip_accept"] == 1


async def check_message_sizes(open_hosts: Open) -> None:
    async with open_hosts(2) as (a, b):
        box = await b.subscribe("topic", accept)
        await a.connect(b.addresses)
        with pytest.raises(LocalProtocolError):
            await a.publish("topic", bytes(MAX_MESSAGE_BYTES + 1))
        for size in (0, MAX_MESSAGE_BYTES):
            await a.publish("topic", bytes(size))
            assert len((await take(box)).data) == size


async def check_repeats_are_delivered_once(open_hosts: Open) -> None:
    async with open_hosts(2) as (a, b):
        box = await b.subscribe("topic", accept)
        await a.connect(b.addresses)
        for data in (b"vote", b"vote", b"vote", b"end"):
            await a.publish("topic", data)
        received = [(await take(box)).data for _ in range(2)]
        assert sorted(received) == [b"end", b"vote"]
        await until(lambda: b.counters().get("gossip_accept", 0) == 4)


async def check_slow_subscriber_loses_the_oldest(open_hosts: Open) -> None:
    """Memory stays bounded: 48 messages of 1 MiB into a mailbox of 32 MiB."""
    count, size = 48, 1 << 20
    async with open_hosts(2) as (a, b):
        box = await b.subscribe("topic", accept)
        await a.connect(b.addresses)
        for number in range(count):
            await a.publish("topic", bytes([number]) + bytes(size - 1))
            if number % 8 == 7:  # do not overrun the sender's own queue: that is another bound
                await until(lambda wanted=number + 1: b.counters().get("gossip_accept", 0) == wanted)  # type: ignore[misc]
        dropped = b.counters()["gossip_mailbox_dropped"]
        assert count - dropped == (32 << 20) // size
        kept = [(await take(box)).data[0] for _ in range(count - dropped)]
        assert max(kept) == count - 1
        assert min(kept) >= dropped - 8  # the oldest went first, up to reordering on the way


async def check_rejected_forwarder_is_cut_off(open_hosts: Open) -> None:
    async with open_hosts(2) as (a, b):
        await b.subscribe("topic", lambda author, data: Verdict.REJECT)
        await a.connect(b.addresses)
        for number in range(40):
            await a.publish("topic", bytes([number]))
        await until(lambda: b.counters().get("peers_banned") == 1)
        await until(lambda: not b.connected_peers())
        for one, other in ((a, b), (b, a)):
            try:
                await one.connect(other.addresses)
            except UnavailableError:
                continue
        await until(lambda: not b.connected_peers())


async def check_topics_end(open_hosts: Open) -> None:
    async with open_hosts(2) as (a, b):
        box = await b.subscribe("topic", accept)
        with pytest.raises(LocalProtocolError):
            await b.subscribe("topic", accept)
        await b.unsubscribe("topic")
        await b.unsubscribe("topic")
        assert [message async for message in box] == []
        again = await b.subscribe("topic", accept)
        await a.connect(b.addresses)
        await a.publish("topic", b"back")
        assert (await take(again)).data == b"back"
    assert [message async for message in again] == []  # the host stopped


async def check_requests(open_hosts: Open) -> None:
    async with open_hosts(2) as (a, b):

        async def answer(peer: bytes, request: bytes) -> bytes:
            return peer + request[::-1]

        b.serve("/reverse/1", answer, max_request_bytes=1 << 20)
        a.serve("/reverse/1", answer, max_request_bytes=1 << 20)
        await a.connect(b.addresses)
        for one, other in ((a, b), (b, a)):
            for size in (0, 1, 256 << 10, 1 << 20):
                data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
                response = await one.request(
                    other.peer_id, "/reverse/1", data, max_response_bytes=2 << 20, deadline_seconds=10
                )
                assert response == one.peer_id + data[::-1]


async def check_many_requests_at_once(open_hosts: Open) -> None:
    """More than the bound per peer: they wait their turn."""
    async with open_hosts(2) as (a, b):

        async def answer(peer: bytes, request: bytes) -> bytes:
            await trio.lowlevel.checkpoint()
            return request

        b.serve("/echo/1", answer, max_request_bytes=1 << 20)
        await a.connect(b.addresses)
        answered: list[bytes] = []

        async def ask(number: int) -> None:
            data = number.to_bytes(2, "big") * 1000
            answered.append(
                await a.request(b.peer_id, "/echo/1", data, max_response_bytes=1 << 20, deadline_seconds=15)
            )

        async with trio.open_nursery() as nursery:
            for number in range(64):
                nursery.start_soon(ask, number)
        assert len(set(answered)) == 64


async def check_requests_that_fail(open_hosts: Open) -> None:
    async with open_hosts(3) as (a, b, c):

        async def handle(peer: bytes, request: bytes) -> bytes:
            if request == b"hang":
                await trio.sleep_forever()
            if request == b"raise":
                raise RuntimeError("a bug of ours")
            if request == b"decline":
                raise UnavailableError("not here")
            return bytes(1000)

        b.serve("/some/1", handle, max_request_bytes=100)
        await a.connect(b.addresses)

        async def ask(
            data: bytes, *, peer: bytes = b.peer_id, protocol: str = "/some/1", allowed: int = 1000
        ) -> bytes:
            return await a.request(peer, protocol, data, max_response_bytes=allowed, deadline_seconds=1.0)

        with pytest.raises(UnavailableError):
            await ask(b"", peer=c.peer_id)  # not connected
        with pytest.raises(UnavailableError):
            await ask(b"", protocol="/nobody/1")
        for data in (b"hang", b"raise", b"decline", bytes(101)):
            with pytest.raises(UnavailableError):
                await ask(data)
        with pytest.raises(InvalidMessageError):
            await ask(b"", allowed=999)
        assert await ask(b"") == bytes(1000)  # the connection outlived all of it
        assert a.connected_peers() == {b.peer_id}
        assert b.counters()["requests_failed"] == 1
        assert b.counters()["requests_declined"] == 1


async def check_a_peer_that_leaves(open_hosts: Open) -> None:
    """The fate of a request to a host that stops under it, and of its connections."""
    async with open_hosts(2) as (a, b):
        started = trio.Event()

        async def hang(peer: bytes, request: bytes) -> bytes:
            started.set()
            await trio.sleep_forever()

        b.serve("/hang/1", hang, max_request_bytes=100)
        await a.connect(b.addresses)
        outcome: list[type[BaseException]] = []

        async def ask() -> None:
            with pytest.raises(UnavailableError) as caught:
                await a.request(b.peer_id, "/hang/1", b"", max_response_bytes=1, deadline_seconds=5)
            outcome.append(caught.type)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await started.wait()
            await b.disconnect(a.peer_id)
        await until(lambda: not a.connected_peers())
        assert outcome == [UnavailableError]


async def check_traffic(open_hosts: Open) -> None:
    async with open_hosts(2) as (a, b):
        box = await b.subscribe("topic", accept)
        await a.connect(b.addresses)
        sent, received = a.traffic().sent_bytes, b.traffic().received_bytes
        await a.publish("topic", bytes(100_000))
        await take(box)
        assert 100_000 <= a.traffic().sent_bytes - sent <= 110_000
        assert 100_000 <= b.traffic().received_bytes - received <= 110_000


CHECKS: Sequence[Callable[[Open], Awaitable[None]]] = (
    check_connect_names_the_peer,
    check_addresses_that_lead_nowhere,
    check_gossip_reaches_subscribers,
    check_gossip_right_after_connecting,
    check_late_subscriber_gets_the_last_moments,
    check_gossip_is_forwarded,
    check_gossip_is_not_passed_on_to_the_authors_neighbours,
    check_verdicts,
    check_message_sizes,
    check_repeats_are_delivered_once,
    check_slow_subscriber_loses_the_oldest,
    check_rejected_forwarder_is_cut_off,
    check_topics_end,
    check_requests,
    check_many_requests_at_once,
    check_requests_that_fail,
    check_a_peer_that_leaves,
    check_traffic,
)
