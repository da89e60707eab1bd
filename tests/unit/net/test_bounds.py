"""The small parts that keep memory bounded and time honest."""

from __future__ import annotations

from collections import Counter

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from libp2p.pubsub.pb import rpc_pb2

from p2pflock.errors import InvalidMessageError, MissingToolError
from p2pflock.net import framing, hardening
from p2pflock.net.limits import Limits
from p2pflock.net.mailbox import Mailbox
from p2pflock.net.pubsub import SendQueue, _keep_unique
from p2pflock.net.recent import Recent
from p2pflock.net.reputation import Reputation
from p2pflock.ports import GossipMessage


def run(main):
    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@given(st.lists(st.integers(0, 40)), st.integers(1, 8), st.integers(10, 100))
def test_mailbox_keeps_the_newest_within_both_bounds(sizes, max_messages, max_bytes):
    dropped = []
    box = Mailbox(max_messages, max_bytes, dropped.append)
    sent = [GossipMessage("t", bytes([n % 256]), bytes(size)) for n, size in enumerate(sizes)]
    for message in sent:
        box.put(message)
        assert len(box) <= max_messages
        assert box.size_bytes <= max_bytes
    box.close()

    async def main():
        return [message async for message in box]

    kept = run(main)
    assert len(kept) + sum(dropped) == len(sent)
    assert kept == sent[len(sent) - len(kept) :]
    assert box.size_bytes == 0


def test_closing_a_mailbox_wakes_its_reader():
    async def main():
        box = Mailbox(1, 1, lambda n: None)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(box_is_empty, box)
            await trio.testing.wait_all_tasks_blocked()
            box.close()

    async def box_is_empty(box):
        assert [message async for message in box] == []

    run(main)


def test_reputation_bans_bursts_and_steady_faults_but_not_rare_ones():
    rare = Reputation(strikes=3, drained_per_second=1, ban_seconds=10)
    assert not any(rare.strike(b"p", now=2.0 * n) for n in range(100))
    burst = Reputation(strikes=3, drained_per_second=1, ban_seconds=10)
    assert [burst.strike(b"p", now=0.0) for _ in range(4)] == [False, False, True, False]
    assert burst.is_banned(b"p", 9.9)
    assert not burst.is_banned(b"p", 10.0)
    assert not burst.is_banned(b"q", 0.0)


def test_reputation_forgets_the_oldest_of_too_many():
    reputation = Reputation(strikes=2, drained_per_second=0, ban_seconds=10)
    for n in range(10_000):
        reputation.strike(n.to_bytes(4, "big"), now=0.0)
    assert len(reputation._buckets) <= 4096


def test_recent_forgets_by_age_and_by_number():
    async def main():
        recent = Recent(10.0, 3)
        for n in range(4):
            recent.put(n, n)
        assert recent.get(0) is None
        assert recent.get(3) == 3
        await trio.sleep(11)
        assert recent.get(3) is None

    run(main)


def test_send_queue_drops_the_oldest_payload_and_keeps_control():
    async def main():
        counters = Counter()
        queue = SendQueue(Limits(send_queue_messages=10, send_queue_bytes=5000), counters)
        control = rpc_pb2.RPC(control=rpc_pb2.ControlMessage(graft=[rpc_pb2.ControlGraft(topicID="t")]))
        assert queue.push(control, priority=True)
        for n in range(50):
            assert queue.push(rpc_pb2.RPC(publish=[rpc_pb2.Message(seqno=bytes([n]), data=bytes(1000))]))
        popped = [await queue.pop() for _ in range(len(queue))]
        assert popped[0].HasField("control")
        assert [rpc.publish[0].seqno[0] for rpc in popped[1:]] == [46, 47, 48, 49]
        assert counters["gossip_send_dropped"] == 46
        queue.close()
        assert await queue.pop() is None
        assert not queue.push(control)

    run(main)


class Chunks:
    """A stream that delivers what it likes."""

    def __init__(self, *chunks):
        self.chunks = list(chunks)

    async def read(self, n=None):
        if not self.chunks:
            return b""
        chunk = self.chunks.pop(0)
        if len(chunk) > n:
            self.chunks.insert(0, chunk[n:])
        return chunk[:n]


def test_frames_arrive_in_any_number_of_pieces():
    async def main():
        data = bytes(range(256)) * 4
        framed = framing.prefix(data)
        stream = Chunks(*[framed[n : n + 1] for n in range(len(framed))])  # libp2p gives up after a hundred
        assert await framing.read_exactly(stream, await framing.read_length(stream, 1024)) == data
        with pytest.raises(InvalidMessageError):
            await framing.read_length(Chunks(framing.prefix(data)), 1023)
        with pytest.raises(Exception, match="ended"):
            await framing.read_exactly(Chunks(b"ab"), 3)

    run(main)


def test_reading_ahead_changes_nothing():
    async def main():
        frames = [bytes([n]) * n * 100 for n in range(20)]
        stream = framing.Buffered(Chunks(b"".join(map(framing.prefix, frames))))
        for frame in frames:
            assert await framing.read_exactly(stream, await framing.read_length(stream, 2000)) == frame

    run(main)


@pytest.mark.parametrize(("encoded", "value"), [(b"\x00", 0), (b"\x7f", 127), (b"\x80\x01", 128), (b"\xff\xff\x03", 65535)])
def test_varint(encoded, value):
    async def main():
        return await framing.read_varint(Chunks(encoded[1:]), encoded[:1], 65535)

    assert run(main) == value


@pytest.mark.parametrize("encoded", [b"\x80\x80\x04", b"\xff" * 10, b"\x80\x80\x80\x80\x80\x01"])
def test_varint_out_of_bounds(encoded):
    async def main():
        await framing.read_varint(Chunks(encoded[1:]), encoded[:1], 65535)

    with pytest.raises(InvalidMessageError):
        run(main)


def test_control_ids_are_unique_and_few():
    iwant = rpc_pb2.ControlIWant(messageIDs=[b"same"] * 10_000 + [n.to_bytes(2, "big") for n in range(1000)])
    _keep_unique(iwant.messageIDs)
    assert len(iwant.messageIDs) == 64
    assert len(set(iwant.messageIDs)) == 64


def test_guards_refuse_a_libp2p_they_do_not_know(monkeypatch):
    hardening.apply()
    hardening.apply()  # again is no error
    monkeypatch.setattr(hardening, "version", lambda name: "0.9.0")
    with pytest.raises(MissingToolError) as caught:
        hardening.apply()
    assert "0.9.0" in str(caught.value)


def test_guards_are_applied_once():
    from libp2p.network.connection.swarm_connection import SwarmConn

    hardening.apply()
    guarded = SwarmConn._handle_muxed_stream
    hardening.apply()
    assert SwarmConn._handle_muxed_stream is guarded


@given(st.lists(st.integers(1, 300_000), max_size=40))
def test_credit_never_exceeds_the_window(reads):
    """The invariant that BoundedBuffer relies on: an honest peer never overruns it."""
    hardening.apply()

    class Stream:
        target_recv_window = 256 << 10
        recv_window = 256 << 10
        _pending_recv_release = 0

        async def send_window_update(self, credit):
            nonlocal window
            window += credit

    stream, window, buffered = Stream(), 256 << 10, 0

    async def main():
        nonlocal window, buffered
        for wanted in reads:
            buffered, window = buffered + window, 0  # a peer that always sends all that it may
            assert buffered <= hardening.WINDOW_BYTES
            taken = min(wanted, buffered)
            buffered -= taken
            await hardening._send_window_update(stream, bytes_read=taken)

    run(main)
    assert stream.target_recv_window <= hardening.WINDOW_BYTES
