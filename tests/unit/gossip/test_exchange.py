"""Sessions over local sockets: what partners may do to each other, and what they may not.

No hivemind here; the partner is either another PayloadExchange or a script that writes raw frames.
"""

import asyncio
import contextlib
import hashlib

import pytest

from p2pflock.errors import UnavailableError
from p2pflock.gossip import exchange as ex
from p2pflock.gossip.exchange import ExchangeLimits, PayloadExchange
from p2pflock.gossip.meter import LocalMeter
from p2pflock.gossip.pool import PayloadPool
from p2pflock.primitives import unixfs, wire

ROUND = b"round 1"
QUICK = ExchangeLimits(idle_seconds=0.2, session_seconds=2.0)


def payload(name, size=1000):
    data = hashlib.shake_256(name.encode()).digest(size)
    return unixfs.compute_cid(data), data


class Peer:
    def __init__(self, net, peer, limits=None):
        self.pool = PayloadPool(lambda round_key, cid: None)
        self.exchange = PayloadExchange(self.pool, peer, net.opener(peer), limits)
        self.peer = peer

    async def serve(self, partner, reader, writer):
        await self.exchange.serve(partner, reader, writer)


class Net:
    """Streams between peers; each knows for sure who opened it, as with Noise."""

    def __init__(self, directory):
        self.directory = directory
        self.servers = []
        self.streams = 0

    def opener(self, me):
        async def open_stream(partner):
            self.streams += 1
            reader, writer = await LocalMeter().open_unix_connection(str(self.directory / partner.hex()))
            writer.write(len(me).to_bytes(1, "big") + me)
            return reader, writer

        return open_stream

    async def add(self, peer, limits=None):
        node = Peer(self, peer, limits)
        await self.listen(peer, node.serve)
        return node

    async def listen(self, peer, serve):
        async def accept(reader, writer):
            partner = await reader.readexactly((await reader.readexactly(1))[0])
            with contextlib.suppress(OSError, EOFError):
                await serve(partner, reader, writer)

        path = str(self.directory / peer.hex())
        self.servers.append(await asyncio.start_unix_server(accept, path))

    def close(self):
        for server in self.servers:
            server.close()


@pytest.fixture
def run(tmp_path):
    def run(scenario):
        async def main():
            net = Net(tmp_path)
            try:
                await asyncio.wait_for(scenario(net), 20)
            finally:
                net.close()

        asyncio.run(main())

    return run


def frame(kind, body=b"", size=None):
    return bytes([kind]) + (len(body) if size is None else size).to_bytes(4, "big") + body


def hello(*wants, round_key=ROUND, version=ex.VERSION, serial=1):
    return frame(ex.HELLO, wire.pack([version, round_key, serial, [cid.to_bytes() for cid in wants]]))


def announce(cid, size):
    return frame(ex.PAYLOAD, cid.to_bytes() + size.to_bytes(8, "big"))


def test_large_payloads_cross_without_waiting_for_each_other(run):
    async def scenario(net):
        a, b = await net.add(b"a"), await net.add(b"b")
        mine, theirs = payload("a", 3_000_000), payload("b", 4_000_000)
        a.pool.offer(ROUND, *mine)
        b.pool.offer(ROUND, *theirs)
        a.pool.expect(ROUND, theirs[0], 4_000_000)
        b.pool.expect(ROUND, mine[0], 3_000_000)
        assert await a.exchange.swap(ROUND, b"b", 10) == [theirs[0]]
        assert b.pool.collect(ROUND) == a.pool.collect(ROUND) == dict([mine, theirs])
        assert a.exchange.payload_bytes_sent == b.exchange.payload_bytes_received == 3_000_000

    run(scenario)


def test_both_at_once_send_each_payload_once(run):
    async def scenario(net):
        a, b = await net.add(b"a"), await net.add(b"b")
        mine, theirs = payload("a", 600_000), payload("b", 600_000)
        a.pool.offer(ROUND, *mine)
        b.pool.offer(ROUND, *theirs)
        a.pool.expect(ROUND, theirs[0], 600_000)
        b.pool.expect(ROUND, mine[0], 600_000)
        arrived = await asyncio.gather(a.exchange.swap(ROUND, b"b", 5), b.exchange.swap(ROUND, b"a", 5))
        assert arrived == [[theirs[0]], [mine[0]]]
        assert a.exchange.payload_bytes_sent == b.exchange.payload_bytes_sent == 600_000

    run(scenario)


def test_a_second_call_joins_the_first(run):
    async def scenario(net):
        a, b = await net.add(b"a"), await net.add(b"b")
        theirs = payload("b", 600_000)
        b.pool.offer(ROUND, *theirs)
        a.pool.expect(ROUND, theirs[0], 600_000)
        arrived = await asyncio.gather(*(a.exchange.swap(ROUND, b"b", 5) for _ in range(3)))
        assert arrived == [[theirs[0]]] * 3
        assert net.streams == 1

    run(scenario)


def test_who_joined_a_cancelled_call_starts_anew(run):
    async def scenario(net):
        a, b = await net.add(b"a"), await net.add(b"b")
        b.pool.offer(ROUND, WANTED, WANTED_DATA)
        a.pool.expect(ROUND, WANTED, 1000)
        first, second = (asyncio.ensure_future(a.exchange.swap(ROUND, b"b", 5)) for _ in range(2))
        while not a.exchange._outgoing:
            await asyncio.sleep(0)
        first.cancel()
        assert await second == [WANTED]

    run(scenario)


def test_who_joined_a_session_that_the_partner_gave_up_tries_itself(run):
    async def scenario(net):
        a, b = await net.add(b"a"), await net.add(b"b")
        b.pool.offer(ROUND, WANTED, WANTED_DATA)
        a.pool.expect(ROUND, WANTED, 1000)
        _, stale = await net.opener(b"b")(b"a")
        stale.write(hello())
        while not a.exchange._incoming:
            await asyncio.sleep(0.01)
        swapping = asyncio.ensure_future(a.exchange.swap(ROUND, b"b", 5))
        await asyncio.sleep(0)
        stale.transport.abort()
        assert await swapping == [WANTED]

    run(scenario)


def test_slow_taker_is_not_silent(run):
    """A partner that takes our payload bit by bit, and says nothing meanwhile, is within its rights."""

    async def scenario(net):
        a = await net.add(b"a", ExchangeLimits(idle_seconds=0.4))
        mine = payload("a", 4_000_000)
        a.pool.offer(ROUND, *mine)

        async def slow(partner, reader, writer):
            writer.write(hello(mine[0]))
            taken = bytearray()
            while not taken.endswith(frame(ex.DONE)):
                taken += await reader.read(1 << 18)
                await asyncio.sleep(0.02)
            writer.write(frame(ex.DONE))

        await net.listen(b"b", slow)
        assert await a.exchange.swap(ROUND, b"b", 15) == []

    run(scenario)


WANTED, WANTED_DATA = payload("wanted")
UNASKED, UNASKED_DATA = payload("unasked")
RUDE = {
    "says nothing": [],
    "hangs after hello": [hello()],
    "hangs inside a frame": [hello(), frame(ex.DONE)[:3]],
    "garbage": [b"GET / HTTP/1.1\r\n\r\n"],
    "memory bomb": [hello(), announce(WANTED, 1000), frame(ex.CHUNK, bytes(100), size=0xFFFFFFFF)],
    "huge hello": [frame(ex.HELLO, b"", size=1 << 24)],
    "another version": [hello(version=99)],
    "another round": [hello(round_key=b"round 2")],
    "a payload nobody asked for": [hello(), announce(UNASKED, 1000), frame(ex.CHUNK, UNASKED_DATA)],
    "another size": [hello(), announce(WANTED, 1001), frame(ex.CHUNK, WANTED_DATA + b"!")],
    "other content": [hello(), announce(WANTED, 1000), frame(ex.CHUNK, UNASKED_DATA)],
    "more chunks than size": [hello(), announce(WANTED, 1000), frame(ex.CHUNK, WANTED_DATA + b"!")],
    "empty chunks for ever": [hello(), announce(WANTED, 1000), frame(ex.CHUNK) * 10],
    "the same twice": [hello(), (announce(WANTED, 1000) + frame(ex.CHUNK, WANTED_DATA)) * 2],
    "unknown kind": [frame(99)],
    "done before hello": [frame(ex.DONE)],
}


@pytest.mark.parametrize("name", RUDE)
def test_rude_partner_is_unavailable_in_bounded_time(run, name):
    async def scenario(net):
        a = await net.add(b"a", QUICK)
        a.pool.expect(ROUND, WANTED, 1000)

        async def rude(partner, reader, writer):
            for part in RUDE[name]:
                writer.write(part)
            await asyncio.sleep(5)

        await net.listen(b"b", rude)
        started = asyncio.get_running_loop().time()
        with pytest.raises(UnavailableError):
            await a.exchange.swap(ROUND, b"b", 3)
        assert asyncio.get_running_loop().time() - started < 1.5
        assert set(a.pool.collect(ROUND)) <= {WANTED}
        assert UNASKED not in a.pool.collect(ROUND)
        assert a.exchange._buffered_bytes == 0

    run(scenario)


@pytest.mark.parametrize("name", sorted(set(RUDE) - {"another round"}))
def test_rude_caller_costs_one_session(run, name):
    async def scenario(net):
        a = await net.add(b"a", QUICK)
        a.pool.expect(ROUND, WANTED, 1000)
        reader, writer = await net.opener(b"rude")(b"a")
        for part in RUDE[name]:
            writer.write(part)
        with contextlib.suppress(OSError):
            while await reader.read(1 << 16):
                pass
        while a.exchange._sessions:
            await asyncio.sleep(0.01)
        assert set(a.pool.collect(ROUND)) <= {WANTED}
        assert a.exchange.broken_sessions == 1
        good = await net.add(b"good")
        good.pool.offer(ROUND, WANTED, WANTED_DATA)
        await good.exchange.swap(ROUND, b"a", 3)
        assert a.pool.collect(ROUND) == {WANTED: WANTED_DATA}

    run(scenario)


def test_whole_payloads_before_a_break_are_kept(run):
    async def scenario(net):
        a = await net.add(b"a", QUICK)
        second = payload("second")
        a.pool.expect(ROUND, WANTED, 1000)
        a.pool.expect(ROUND, second[0], 1000)

        async def dies(partner, reader, writer):
            await reader.readexactly(int.from_bytes((await reader.readexactly(5))[1:], "big"))
            writer.write(hello() + announce(WANTED, 1000) + frame(ex.CHUNK, WANTED_DATA))
            writer.write(announce(second[0], 1000) + frame(ex.CHUNK, second[1][:500]))
            await writer.drain()
            writer.close()

        await net.listen(b"b", dies)
        with pytest.raises(UnavailableError):
            await a.exchange.swap(ROUND, b"b", 3)
        assert a.pool.collect(ROUND) == {WANTED: WANTED_DATA}
        assert list(a.pool.wanted(ROUND)) == [second[0]]

    run(scenario)


async def always_yield(partner, reader, writer):
    writer.write(frame(ex.YIELD))
    await asyncio.sleep(5)


def test_always_yielding_partner_is_bounded(run):
    async def scenario(net):
        a = await net.add(b"a")

        await net.listen(b"b", always_yield)
        with pytest.raises(UnavailableError, match=r"0\.3 s"):
            await a.exchange.swap(ROUND, b"b", 0.3)

    run(scenario)


def test_who_yields_to_a_session_that_has_ended_does_not_cost_the_deadline(run, monkeypatch):
    """The partner answered our call when it had not noticed yet that its own session with us was over."""
    monkeypatch.setattr(ex, "YIELD_SECONDS", 0.1)

    async def scenario(net):
        a = await net.add(b"a")

        await net.listen(b"b", always_yield)
        with pytest.raises(UnavailableError, match="had ended"):
            await a.exchange.swap(ROUND, b"b", 60)

    run(scenario)


def test_a_partner_that_gave_up_may_come_again(run):
    """Its old session may still be open at our side; the new one takes its place."""

    async def scenario(net):
        a, b = await net.add(b"a"), await net.add(b"b")
        a.pool.offer(ROUND, WANTED, WANTED_DATA)
        b.pool.expect(ROUND, WANTED, 1000)
        _, stale = await net.opener(b"b")(b"a")
        stale.write(hello())
        while not a.exchange._incoming:
            await asyncio.sleep(0.01)
        assert await b.exchange.swap(ROUND, b"a", 3) == [WANTED]
        while a.exchange.broken_sessions < 1:
            await asyncio.sleep(0.01)
        assert not a.exchange._incoming
        stale.close()

    run(scenario)


def test_an_overtaken_session_does_not_end_the_later_one(run):
    async def scenario(net):
        a = await net.add(b"a")
        later_reader, later = await net.opener(b"b")(b"a")
        later.write(hello(serial=2))
        await later_reader.readexactly(5)
        earlier_reader, earlier = await net.opener(b"b")(b"a")
        earlier.write(hello(serial=1))
        assert await earlier_reader.read() == b""
        assert len(a.exchange._incoming) == 1
        later.write(frame(ex.DONE))
        answer = bytearray()
        while not answer.endswith(frame(ex.DONE)):
            answer += await later_reader.readexactly(1)
        for writer in (later, earlier):
            writer.close()

    run(scenario)


def test_sessions_are_bounded(run):
    async def scenario(net):
        a = await net.add(b"a", ExchangeLimits(idle_seconds=5, sessions=3, sessions_per_partner=2))
        streams = [await net.opener(name)(b"a") for name in (b"x", b"x", b"x", b"y", b"z")]
        while a.exchange.refused_sessions < 2:
            await asyncio.sleep(0.01)
        assert a.exchange._sessions == {b"x": 2, b"y": 1} or a.exchange._sessions.total() == 3
        for _, writer in streams:
            writer.close()

    run(scenario)


def test_payloads_in_flight_are_bounded(run):
    """Attack: many partners each send all but the last byte of a large expected payload."""

    async def scenario(net):
        a = await net.add(b"a", ExchangeLimits(idle_seconds=5, buffered_bytes=1500))
        a.pool.expect(ROUND, WANTED, 1000)
        streams = []
        for name in (b"x", b"y", b"z"):
            streams.append(await net.opener(name)(b"a"))
            streams[-1][1].write(hello() + announce(WANTED, 1000) + frame(ex.CHUNK, WANTED_DATA[:999]))
        while a.exchange.broken_sessions < 2:
            await asyncio.sleep(0.01)
        assert a.exchange._buffered_bytes == 999
        for _, writer in streams:
            writer.close()

    run(scenario)


def test_strangers_are_turned_away_when_restricted(run):
    async def scenario(net):
        a, b, c = [await net.add(name) for name in (b"a", b"b", b"c")]
        a.pool.offer(ROUND, WANTED, WANTED_DATA)
        a.exchange.restrict([b"b"])
        for other in (b, c):
            other.pool.expect(ROUND, WANTED, 1000)
        assert await b.exchange.swap(ROUND, b"a", 3) == [WANTED]
        with pytest.raises(UnavailableError):
            await c.exchange.swap(ROUND, b"a", 3)
        a.exchange.restrict(None)
        assert await c.exchange.swap(ROUND, b"a", 3) == [WANTED]

    run(scenario)


# --- gifts -------------------------------------------------------------------------------------------------
def gift(cid, size, round_key=ROUND):
    return frame(ex.GIVE, wire.pack([ex.VERSION, round_key, cid.to_bytes(), size]))


def test_a_gift_reaches_all_who_expect_it(run):
    async def scenario(net):
        a, others = await net.add(b"a"), [await net.add(name) for name in (b"b", b"c", b"d")]
        mine = payload("a", 600_000)
        a.pool.offer(ROUND, *mine)
        for other in others[:2]:
            other.pool.expect(ROUND, mine[0], 600_000)
        giving = asyncio.create_task(a.exchange.give(ROUND, mine[0], [b"b", b"c", b"d", b"nobody"], 10))
        while not others[2].exchange._sessions:  # it waits for the header, and reads nothing meanwhile
            await asyncio.sleep(0)
        others[2].pool.expect(ROUND, mine[0], 600_000)
        assert await giving == [b"b", b"c", b"d"]
        assert all(other.pool.collect(ROUND) == dict([mine]) for other in others)
        assert a.exchange.payload_bytes_sent == 3 * 600_000

    run(scenario)


def test_who_has_it_already_says_so_before_it_reads(run):
    async def scenario(net):
        a, b = await net.add(b"a"), await net.add(b"b")
        mine = payload("a", 5_000_000)
        for peer in (a, b):
            peer.pool.offer(ROUND, *mine)
        assert await a.exchange.give(ROUND, mine[0], [b"b"], 10) == [b"b"]
        assert a.exchange.payload_bytes_sent == b.exchange.payload_bytes_received == 0

    run(scenario)


@pytest.mark.parametrize("size", [1000, 1001])
def test_a_gift_that_nobody_named_ends_after_a_moment(run, monkeypatch, size):
    """Nor one that is larger than was named."""
    monkeypatch.setattr(ex, "EXPECT_SECONDS", 0.05)

    async def scenario(net):
        a, b = await net.add(b"a"), await net.add(b"b")
        mine = payload("a", size)
        a.pool.offer(ROUND, *mine)
        b.pool.expect(ROUND, mine[0] if size > 1000 else payload("another")[0], 1000)
        assert await a.exchange.give(ROUND, mine[0], [b"b"], 10) == []
        assert b.exchange.refused_sessions == 1
        assert not b.pool.collect(ROUND)
        assert not b.pool._watching

    run(scenario)


RUDE_GIFTS = {
    "other bytes": lambda cid: gift(cid, 1000) + frame(ex.CHUNK, bytes(1000)),
    "too long": lambda cid: gift(cid, 1000) + frame(ex.CHUNK, bytes(1001)),
    "stops": lambda cid: gift(cid, 1000) + frame(ex.CHUNK, bytes(999)),
    "empty chunks": lambda cid: gift(cid, 1000) + frame(ex.CHUNK, b"") * 3,
    "not a chunk": lambda cid: gift(cid, 1000) + frame(ex.PAYLOAD, bytes(44)),
    "malformed": lambda cid: frame(ex.GIVE, wire.pack([ex.VERSION, ROUND, cid.to_bytes(), -1])),
    "oversized": lambda cid: frame(ex.GIVE, size=ex.MAX_GIVE_BYTES + 1),
}


@pytest.mark.parametrize("name", RUDE_GIFTS)
def test_a_rude_giver_costs_one_session(run, name):
    async def scenario(net):
        a, b = await net.add(b"a", QUICK), await net.add(b"b")
        cid, data = payload("wanted")
        b.pool.offer(ROUND, cid, data)
        a.pool.expect(ROUND, cid, 1000)
        reader, writer = await net.opener(b"x")(b"a")
        writer.write(RUDE_GIFTS[name](cid))
        assert await reader.read() == b""
        assert a.exchange.broken_sessions == 1
        assert a.exchange._buffered_bytes == 0
        assert not a.pool.collect(ROUND)
        assert await a.exchange.swap(ROUND, b"b", 10) == [cid]  # the claim ended with the session

    run(scenario)


def test_a_frozen_taker_does_not_keep_the_others_waiting(run):
    async def scenario(net):
        frozen = asyncio.Event()

        async def hold(partner, reader, writer):
            await frozen.wait()

        a, b = await net.add(b"a"), await net.add(b"b")
        await net.listen(b"z", hold)
        mine = payload("a", 5_000_000)
        a.pool.offer(ROUND, *mine)
        b.pool.expect(ROUND, mine[0], 5_000_000)
        assert await a.exchange.give(ROUND, mine[0], [b"z", b"b"], 0.5) == [b"b"]
        frozen.set()

    run(scenario)
