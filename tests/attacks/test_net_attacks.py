"""What strangers tried, or could try, on the control plane.

Each test states the attack; where stock py-libp2p 0.8.1 falls to it, the guard is named in p2pflock.net.hardening
or p2pflock.net.pubsub.  The attacker is a real host with a valid key of its own unless the attack says otherwise.
"""

from __future__ import annotations

import contextlib
import random
import struct

import pytest
import trio
from libp2p.abc import INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.keys import KeyPair
from libp2p.custom_types import TProtocol
from libp2p.network.config import RetryConfig
from libp2p.network.exceptions import SwarmException
from libp2p.network.stream.exceptions import StreamError
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import PUBSUB_SIGNING_PREFIX
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.tools.anyio_service.context import background_trio_service
from libp2p.transport.tcp.tcp import TCP
from libp2p.transport.upgrader import TransportUpgrader
from libp2p.utils.varint import encode_varint_prefixed
from multiaddr import Multiaddr

from p2pflock.errors import InvalidMessageError, UnavailableError
from p2pflock.net import hardening
from p2pflock.net.host import Libp2pHost
from p2pflock.net.limits import Limits
from p2pflock.testing.conformance_host import accept, take, until

ALICE, VICTIM, MALLORY, HONEST = (bytes([n]) * 32 for n in (1, 2, 3, 4))
PATIENT = Limits(strikes=1e9)  # nobody is banned: every case reaches the victim


@contextlib.asynccontextmanager
async def trio_of_hosts(limits=None):
    """Victim, attacker, honest peer; both are connected with the victim, which listens on "t"."""
    async with (
        Libp2pHost.open(VICTIM, limits=limits) as victim,
        Libp2pHost.open(MALLORY) as mallory,
        Libp2pHost.open(HONEST) as honest,
    ):
        box = await victim.subscribe("t", accept)
        victim.serve("/echo/1", echo, max_request_bytes=1000)
        await mallory.connect(victim.addresses)
        await honest.connect(victim.addresses)
        yield victim, mallory, honest, box


async def echo(peer, request):
    return request


async def is_served(honest, victim, box):
    """The victim still talks with an honest peer, over connections old and new."""
    data = random.randbytes(8)
    await honest.publish("t", data)
    while (await take(box)).data != data:
        pass
    assert await honest.request(
        victim.peer_id, "/echo/1", data, max_response_bytes=100, deadline_seconds=5
    ) == data
    await honest.disconnect(victim.peer_id)
    await honest.connect(victim.addresses)
    assert await honest.request(
        victim.peer_id, "/echo/1", data, max_response_bytes=100, deadline_seconds=5
    ) == data


async def open_stream(attacker, victim, protocol) -> INetStream:
    return await attacker._host.new_stream(ID(victim.peer_id), [TProtocol(protocol)])


async def send_frames(attacker, victim, *frames):
    """Raw pubsub frames on a stream of their own; returns when the victim has read or refused them."""
    stream = await open_stream(attacker, victim, PROTOCOL_ID_V11)
    with contextlib.suppress(Exception):
        for frame in frames:
            await stream.write(encode_varint_prefixed(frame))
    with trio.move_on_after(5), contextlib.suppress(Exception):
        await stream.close()  # half: the victim reads to the end, then resets
        while await stream.read(1024):
            pass


def sign(message, seed):
    keys = create_new_key_pair(seed)
    message.signature = keys.private_key.sign(PUBSUB_SIGNING_PREFIX.encode() + message.SerializeToString())
    message.key = keys.public_key.serialize()
    return message


def author(seed):
    return ID.from_pubkey(create_new_key_pair(seed).public_key).to_bytes()


def message(seed=MALLORY, *, data=b"fuzz", topics=("t",), seqno=b"\0" * 8):
    return sign(rpc_pb2.Message(from_id=author(seed), data=data, topicIDs=topics, seqno=seqno), seed)


# --- identity -------------------------------------------------------------------------------------------
@contextlib.asynccontextmanager
async def plaintext_impostor():
    """Knows Alice's public key, has a key of its own, speaks only plaintext."""
    hardening.apply()
    alice = create_new_key_pair(ALICE).public_key
    private = create_new_key_pair(MALLORY).private_key
    private.get_public_key = lambda: alice
    keys = KeyPair(private, alice)
    peers = PeerStore()
    offer = {PLAINTEXT_PROTOCOL_ID: InsecureTransport(keys, peerstore=peers)}
    upgrader = TransportUpgrader(offer, {})
    upgrader.muxer_multistream = hardening.GuardedMuxer({TProtocol("/yamux/1.0.0"): Yamux})
    swarm = Swarm(ID.from_pubkey(alice), peers, upgrader, [TCP()], RetryConfig(max_retries=0))
    async with background_trio_service(swarm):
        yield swarm


def test_plaintext_impostor_is_never_listed():
    """Stock libp2p lists it as Alice, which the second half shows to be a real attack."""

    async def main():
        async with Libp2pHost.open(VICTIM) as victim, plaintext_impostor() as impostor:
            address = Multiaddr(victim.addresses[0].rpartition("/p2p/")[0])
            with pytest.raises(SwarmException):
                await impostor.dial_addr(address, ID(victim.peer_id))
            await until(lambda: victim.counters().get("handshakes_failed") == 1)
            assert victim.connected_peers() == frozenset()

            # The same impostor against the same host, with the offer that new_host() makes.
            keys = create_new_key_pair(VICTIM)
            victim._swarm.upgrader.security_multistream.add_transport(
                PLAINTEXT_PROTOCOL_ID, InsecureTransport(keys, peerstore=victim._swarm.peerstore)
            )
            await impostor.dial_addr(address, ID(victim.peer_id))
            await until(lambda: victim.connected_peers() == {author(ALICE)})

    trio.run(main)


@pytest.mark.parametrize("protocol", ["/plaintext/2.0.0", "/secio/1.0.0", "/tls/1.0.0", "/noise-but-not/1"])
def test_only_noise_is_negotiated(protocol):
    def line(text):
        return bytes([len(text) + 1]) + text.encode() + b"\n"

    async def main():
        async with Libp2pHost.open(VICTIM) as victim:
            port = int(victim.addresses[0].split("/")[4])
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            await stream.send_all(line("/multistream/1.0.0") + line(protocol) + line("/noise"))
            answer = b""
            with trio.fail_after(5):
                while not answer.endswith(line("/noise")):
                    answer += await stream.receive_some()
            assert answer == line("/multistream/1.0.0") + line("na") + line("/noise")

    trio.run(main)


def test_forged_author_is_not_delivered():
    """Mallory signs in Alice's name: with her own key, with Alice's key beside it, without, and for another topic."""

    async def main():
        async with trio_of_hosts(PATIENT) as (victim, mallory, honest, box):
            in_alices_name = rpc_pb2.Message(from_id=author(ALICE), data=b"forged", topicIDs=["t"], seqno=b"1" * 8)
            own_key = sign(rpc_pb2.Message.FromString(in_alices_name.SerializeToString()), MALLORY)
            alices_key = rpc_pb2.Message.FromString(own_key.SerializeToString())
            alices_key.key = create_new_key_pair(ALICE).public_key.serialize()
            moved = message(ALICE, data=b"forged", topics=["u"])  # Alice did sign it, elsewhere
            moved.topicIDs[:] = ["t"]
            for forged in (in_alices_name, own_key, alices_key, moved):
                await send_frames(mallory, victim, rpc_pb2.RPC(publish=[forged]).SerializeToString())
            await honest.publish("t", b"genuine")
            assert (await take(box)).data == b"genuine"
            await until(lambda: victim.counters().get("gossip_malformed", 0) == 4)
            # Control: what Alice did sign is delivered, whoever brings it.
            brought = rpc_pb2.RPC(publish=[message(ALICE, data=b"brought")])
            await send_frames(mallory, victim, brought.SerializeToString())
            delivered = await take(box)
            assert (delivered.sender, delivered.data) == (author(ALICE), b"brought")

    trio.run(main)


# --- pubsub ---------------------------------------------------------------------------------------------
def fuzz_cases(rng, count):
    """Frames near to what is valid: where parsers and validators break."""
    control = rpc_pb2.ControlMessage(
        ihave=[rpc_pb2.ControlIHave(topicID="t", messageIDs=[b"\xff" * 40, b"abc", b""])],
        iwant=[rpc_pb2.ControlIWant(messageIDs=[b"zz", b"0f", b"\0" * 500])],
        graft=[rpc_pb2.ControlGraft(topicID="nowhere"), rpc_pb2.ControlGraft()],
        prune=[rpc_pb2.ControlPrune(topicID="t", backoff=1 << 63, peers=[rpc_pb2.PeerInfo(peerID=b"x")])],
        idontwant=[rpc_pb2.ControlIDontWant(messageIDs=[b"1"] * 50)],
    )
    subscribe = [rpc_pb2.RPC.SubOpts(subscribe=flag, topicid=name) for flag in (True, False) for name in ("", "t", "x" * 999)]
    whole = rpc_pb2.RPC(publish=[message()], control=control, subscriptions=subscribe[1:2])
    hand_made = [
        rpc_pb2.RPC(publish=[rpc_pb2.Message()]),
        rpc_pb2.RPC(publish=[rpc_pb2.Message(topicIDs=["t"])]),
        rpc_pb2.RPC(publish=[rpc_pb2.Message(topicIDs=["t"], from_id=b"", data=b"x", key=b"\xff", signature=b"s")]),
        rpc_pb2.RPC(publish=[rpc_pb2.Message(topicIDs=["t"], from_id=b"\x12\x20" + bytes(32), key=b"\x08\x00")]),
        rpc_pb2.RPC(publish=[rpc_pb2.Message(topicIDs=["t"], from_id=author(ALICE), signature=b"short")]),
        rpc_pb2.RPC(publish=[message(topics=["t", "t"]), message(topics=[]), message(topics=["u"])]),
        rpc_pb2.RPC(publish=[message(seqno=b""), message(seqno=bytes(1000))]),
        rpc_pb2.RPC(publish=[rpc_pb2.Message(topicIDs=["t"])] * 300),
        rpc_pb2.RPC(subscriptions=subscribe),
        rpc_pb2.RPC(subscriptions=[rpc_pb2.RPC.SubOpts(subscribe=True, topicid=str(n)) for n in range(500)]),
        rpc_pb2.RPC(control=control),
        rpc_pb2.RPC(senderRecord=b"\xff" * 100),
        rpc_pb2.RPC(control=rpc_pb2.ControlMessage(extensions=rpc_pb2.ControlExtensions())),
    ]
    for case in hand_made:
        yield case.SerializeToString()
    valid = whole.SerializeToString()
    for number in range(count - len(hand_made)):
        if number % 10 == 0:
            yield rng.randbytes(rng.randrange(300))
        elif number % 10 == 1:
            yield valid[: rng.randrange(len(valid))]
        else:
            mutated = bytearray(valid)
            for _ in range(rng.randrange(1, 8)):
                mutated[rng.randrange(len(mutated))] = rng.randrange(256)
            yield bytes(mutated)


def test_malformed_pubsub_rpcs():
    """160 frames; stock libp2p dies of 7 in 111."""

    async def main():
        async with trio_of_hosts(PATIENT) as (victim, mallory, honest, box):
            cases = list(fuzz_cases(random.Random(2026), 160))
            for frame in cases:
                await send_frames(mallory, victim, frame)
                assert mallory.peer_id in victim.connected_peers()
            assert victim.counters()["gossip_malformed"] > 50
            assert not victim.counters().get("heartbeats_failed")
            assert not victim.counters().get("handlers_failed")  # every fault was recognised as the peer's
            await is_served(honest, victim, box)

    trio.run(main)


def test_malformed_rpcs_earn_a_ban():
    async def main():
        async with trio_of_hosts() as (victim, mallory, honest, box):
            for _ in range(6):
                with contextlib.suppress(Exception):  # it is gone before the last
                    await send_frames(mallory, victim, b"\xff\xff")
            await until(lambda: mallory.peer_id not in victim.connected_peers())
            assert victim.counters()["peers_banned"] == 1
            with pytest.raises(UnavailableError):
                await victim.connect(mallory.addresses)
            await is_served(honest, victim, box)

    trio.run(main)


def test_oversized_pubsub_frame_is_refused_before_it_is_read():
    async def main():
        async with trio_of_hosts(PATIENT) as (victim, mallory, honest, box):
            stream = await open_stream(mallory, victim, PROTOCOL_ID_V11)
            await stream.write(b"\x80\x80\x80\x10")  # 32 MiB are announced, none is sent
            await until(lambda: victim.counters().get("gossip_malformed") == 1)
            await is_served(honest, victim, box)

    trio.run(main)


def test_one_iwant_is_not_answered_ten_thousand_times():
    """Amplification: 400 kB of IWANT would fetch 1 GB."""

    async def main():
        async with trio_of_hosts(PATIENT) as (victim, mallory, honest, box):
            await honest.publish("t", bytes(100_000))
            await take(box)
            wanted = victim._router.mcache.window("t")
            assert len(wanted) == 1
            before = victim.traffic().sent_bytes
            iwant = rpc_pb2.ControlIWant(messageIDs=wanted * 10_000)
            frame = rpc_pb2.RPC(control=rpc_pb2.ControlMessage(iwant=[iwant])).SerializeToString()
            await send_frames(mallory, victim, frame)
            await is_served(honest, victim, box)  # the queue to mallory has been served meanwhile
            assert victim.traffic().sent_bytes - before < 2_000_000

    trio.run(main)


# --- handlers and streams -------------------------------------------------------------------------------
@pytest.mark.parametrize("error", [ValueError("x"), KeyError(), trio.ClosedResourceError(), AssertionError()])
def test_raising_stream_handler(error):
    """Stock libp2p: the host dies, or the connection silently accepts no more streams."""

    async def main():
        async with trio_of_hosts() as (victim, mallory, honest, box):

            async def raise_it(stream):
                raise error

            async def raise_group(stream):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(raise_it, stream)
                    nursery.start_soon(raise_it, stream)

            victim._host.set_stream_handler(TProtocol("/boom/1"), raise_it)
            victim._host.set_stream_handler(TProtocol("/booms/1"), raise_group)
            for protocol in ("/boom/1", "/booms/1", "/boom/1"):
                await open_stream(mallory, victim, protocol)
            await until(lambda: victim.counters().get("handlers_failed") == 3)
            # the very connection on which they raised
            same = await mallory.request(
                victim.peer_id, "/echo/1", b"still here", max_response_bytes=100, deadline_seconds=5
            )
            assert same == b"still here"
            await is_served(honest, victim, box)

    trio.run(main)


def test_lying_lengths():
    """A request that announces 4 GiB, and a response that does."""

    async def main():
        async with trio_of_hosts(PATIENT) as (victim, mallory, honest, box):
            stream = await open_stream(mallory, victim, "/echo/1")
            await stream.write(b"\xff\xff\xff\xff")
            await until(lambda: victim.counters().get("requests_malformed") == 1)

            async def lie(stream):
                await stream.write(b"\xff\xff\xff\xff")
                await trio.sleep_forever()

            mallory._host.set_stream_handler(TProtocol("/lie/1"), lie)
            with pytest.raises(InvalidMessageError):
                await victim.request(
                    mallory.peer_id, "/lie/1", b"", max_response_bytes=1000, deadline_seconds=5
                )
            await is_served(honest, victim, box)

    trio.run(main)


def test_slow_loris_on_every_read():
    """Streams that stop before the protocol, within the length, within the body, within a pubsub frame."""

    async def main():
        limits = Limits(strikes=1e9, grace_seconds=0.3, rpc_seconds=0.3, negotiation_seconds=1)
        async with trio_of_hosts(limits) as (victim, mallory, honest, box):
            connection = mallory._swarm.get_connections(ID(victim.peer_id))[0]
            mute = await connection.new_stream()
            stuck = []
            for protocol, begin in (
                ("/echo/1", b"\0\0"),
                ("/echo/1", b"\0\0\0\x10half"),
                (PROTOCOL_ID_V11, b"\x20half"),
            ):
                stuck.append(await open_stream(mallory, victim, protocol))
                await stuck[-1].write(begin)
            await until(lambda: victim.counters().get("requests_too_slow") == 2)
            await until(lambda: victim.counters().get("gossip_malformed") == 1)
            for stream in (mute, *stuck):
                with trio.fail_after(5), contextlib.suppress(StreamError):
                    while await stream.read(64):
                        pass
            await is_served(honest, victim, box)

    trio.run(main)


def test_handlers_that_one_peer_can_hold():
    """A peer that ignores the bound per peer is refused beyond it; others are served meanwhile."""

    async def main():
        async with trio_of_hosts(PATIENT) as (victim, mallory, honest, box):
            running = 0

            async def hang(peer, request):
                nonlocal running
                running += 1
                await trio.sleep_forever()

            victim.serve("/hang/1", hang, max_request_bytes=10)
            for _ in range(20):
                stream = await open_stream(mallory, victim, "/hang/1")
                with contextlib.suppress(Exception):
                    await stream.write(b"\0\0\0\0")
            await until(lambda: victim.counters().get("requests_refused") == 12)
            assert running == 8
            await is_served(honest, victim, box)

    trio.run(main)


def test_flood_of_streams_costs_its_connection():
    async def main():
        async with trio_of_hosts(PATIENT) as (victim, mallory, honest, box):
            connection = mallory._swarm.get_connections(ID(victim.peer_id))[0]
            with trio.move_on_after(3), contextlib.suppress(Exception):
                for _ in range(300):
                    await connection.new_stream()  # and never a byte
            assert victim.counters()["streams_refused"] > 0
            held = victim._swarm.get_connections(ID(mallory.peer_id))
            assert sum(len(conn.get_streams()) for conn in held) <= 130
            await is_served(honest, victim, box)

    trio.run(main)


def test_data_beyond_the_window_ends_the_connection():
    """Memory: Yamux buffers whatever comes for a stream that nobody reads, and only warns."""

    async def main():
        async with trio_of_hosts(PATIENT) as (victim, mallory, honest, box):

            async def never_read(stream):
                await trio.sleep_forever()

            victim._host.set_stream_handler(TProtocol("/deaf/1"), never_read)
            stream = await open_stream(mallory, victim, "/deaf/1")
            stream.muxed_stream.send_window = 1 << 30
            with trio.move_on_after(10), contextlib.suppress(Exception):
                for _ in range(64):
                    await stream.write(bytes(1 << 20))
            await until(lambda: mallory.peer_id not in victim.connected_peers())
            await is_served(honest, victim, box)

    trio.run(main)


# --- sockets --------------------------------------------------------------------------------------------
def test_three_hundred_half_open_connections():
    """Stock libp2p: new dials fail until the idle handshakes time out."""

    async def main():
        async with trio_of_hosts() as (victim, _, honest, box), contextlib.AsyncExitStack() as stack:
            port = int(victim.addresses[0].split("/")[4])
            for _ in range(300):
                await stack.enter_async_context(await trio.open_tcp_stream("127.0.0.1", port))
            started = trio.current_time()
            await is_served(honest, victim, box)
            assert trio.current_time() - started < 2
            assert victim.counters()["half_open_evicted"] >= 200
            assert len(victim._swarm._half_open) <= 64

    trio.run(main)


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\xff" * 4096,
        b"\x13/multistream/1.0.0\n\x07/noise\n" + b"\xff\xff" + bytes(65535),
        b"\x13/multistream/1.0.0\n\x07/noise\n\x00\x00",
        b"\x13/multistream/1.0.0\n" + b"\x03ls\n" * 1000,
    ],
)
def test_garbage_before_the_handshake(garbage):
    async def main():
        async with trio_of_hosts() as (victim, _, honest, box):
            port = int(victim.addresses[0].split("/")[4])
            for _ in range(5):
                stream = await trio.open_tcp_stream("127.0.0.1", port)
                with contextlib.suppress(trio.BrokenResourceError):
                    await stream.send_all(garbage)
                await stream.aclose()
            await until(lambda: victim.counters().get("handshakes_failed", 0) == 5)
            await is_served(honest, victim, box)

    trio.run(main)


def test_yamux_garbage_inside_noise():
    """An authenticated peer sends frames that no muxer sends."""

    async def main():
        async with trio_of_hosts(PATIENT) as (victim, mallory, honest, box):
            frames = [
                struct.pack("!BBHII", 0, 0, 0, 9999, 1 << 31),  # 2 GiB of data announced
                struct.pack("!BBHII", 7, 9, 0xFFFF, 0, 0),
                struct.pack("!BBHII", 0, 0, 1, 0, 0),
                random.Random(1).randbytes(4096),
            ]
            for frame in frames:
                await mallory.connect(victim.addresses)
                muxer = mallory._swarm.get_connections(ID(victim.peer_id))[0].muxed_conn
                with contextlib.suppress(Exception):
                    await muxer.secured_conn.write(frame)
                await mallory.disconnect(victim.peer_id)
                await is_served(honest, victim, box)

    trio.run(main)


def test_a_peer_holds_at_most_its_share_of_connections():
    async def main():
        async with trio_of_hosts() as (victim, mallory, honest, box):
            address = Multiaddr(victim.addresses[0].rpartition("/p2p/")[0])
            for _ in range(6):
                with contextlib.suppress(SwarmException):
                    await mallory._swarm.dial_addr(address, ID(victim.peer_id))
            await until(lambda: len(victim._swarm.get_connections(ID(mallory.peer_id))) <= 3)
            await is_served(honest, victim, box)

    trio.run(main)
