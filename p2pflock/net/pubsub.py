"""GossipSub 1.1 with our own validation, queues and reputation.

Law: a message is delivered when its author signed it (StrictSign), its topic is ours, it is at most 1 MiB and
the topic's validator says ACCEPT; each message id is judged once.  Judgement is synchronous: libp2p's
asynchronous validators let two copies race each other.  What a forwarder did wrong is reported as strikes; who
is cut off for it is decided in reputation.py and done in host.py.

An author sends to every subscriber it is connected with (flood publishing, gossipsub v1.1), so a message
needs no mesh for its first hop; a subscriber that connects within the message cache's window gets it too.
For the same reason a message is not passed on to a peer that told us that it is connected with the author: in a
swarm where everybody knows everybody a message travels once to each, not once per mesh link.  Whoever says so of
itself falsely misses messages, nobody else does.

Sources: libp2p specs/pubsub/gossipsub v1.0, v1.1.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any

import trio
from libp2p.abc import INetStream
from libp2p.io.exceptions import IOException
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.rpc_queue import RpcQueue
from libp2p.pubsub.validators import signature_validator

from p2pflock.errors import InvalidMessageError, LocalProtocolError
from p2pflock.net import framing
from p2pflock.net.limits import (
    MAX_MESSAGE_BYTES,
    MAX_TOPIC_CHARACTERS,
    REPEAT_SECONDS,
    RPC_OVERHEAD_BYTES,
    Limits,
)
from p2pflock.net.mailbox import Mailbox
from p2pflock.net.recent import Recent
from p2pflock.ports import GossipMessage, Validator, Verdict
from p2pflock.primitives import peerid

DEGREE = 6
DEGREE_LOW = 4
DEGREE_HIGH = 12
HEARTBEAT_SECONDS = 1
SEEN_SECONDS = 120.0  # a message id is remembered this long (libp2p's default)
SEEN_MESSAGES = 1 << 16
REPEATS = 4096
IDS_PER_CONTROL = 64  # of IHAVE and IWANT
NEIGHBOURHOODS = 1024  # peers whose connections we were told of

_REPLAY_SECONDS = 5.0  # longer than the message cache's window of three heartbeats
_MALFORMED_WEIGHT = 5.0  # no honest implementation does it; five in a row earn a ban
_REJECTED_WEIGHT = 1.0

Strike = Callable[[bytes, float], None]

class _Seen:
    """The two calls that libp2p makes on its seen cache, bounded in number as well as in time."""

    def __init__(self) -> None:
        self._recent: Recent[bytes, bool] = Recent(SEEN_SECONDS, SEEN_MESSAGES)

    def has(self, key: bytes) -> bool:
        return self._recent.get(key) is not None

    def add(self, key: bytes) -> bool:
        if self.has(key):
            return False
        self._recent.put(key, True)
        return True


class SendQueue(RpcQueue):
    """What waits to be written to one peer.  Defect: libp2p's holds 32 and drops the newest in silence, which
    a burst of messages from an honest peer overflows.  Bounded in number and bytes, oldest payloads dropped
    first and counted; control is kept while there is any payload left to drop."""

    def __init__(self, limits: Limits, counters: Counter[str]) -> None:
        super().__init__(limits.send_queue_messages, MAX_MESSAGE_BYTES + RPC_OVERHEAD_BYTES)
        self._payloads: deque[tuple[int, Any]] = deque()
        self._control: deque[tuple[int, Any]] = deque()
        self._bytes = 0
        self._limits = limits
        self._counters = counters
        self._sent: Recent[bytes, bool] = Recent(_REPLAY_SECONDS, limits.send_queue_messages)

    def has_sent(self, message: Any) -> bool:
        return self._sent.get(message.from_id + message.seqno) is not None

    def __len__(self) -> int:
        return len(self._payloads) + len(self._control)

    def push(self, rpc: Any, priority: bool = False) -> bool:  # noqa: FBT001, FBT002 - libp2p's signature
        if self._closed:
            return False
        (self._control if priority else self._payloads).append((rpc.ByteSize(), rpc))
        self._bytes += rpc.ByteSize()
        for message in rpc.publish:
            self._sent.put(message.from_id + message.seqno, True)
        while len(self) > self._limits.send_queue_messages or self._bytes > self._limits.send_queue_bytes:
            size, _ = (self._payloads or self._control).popleft()
            self._bytes -= size
            self._counters["gossip_send_dropped"] += 1
        self._notify.set()
        self._notify = trio.Event()
        return True

    async def pop(self) -> Any | None:
        while True:
            waiting = self._control or self._payloads
            if waiting:
                size, rpc = waiting.popleft()
                self._bytes -= size
                return rpc
            if self._closed:
                return None
            await self._notify.wait()


# --- router ---------------------------------------------------------------------------------------------
class Router(GossipSub):
    """GossipSub without scores, adaptation and extensions: what is left is meshsub 1.1."""

    def __init__(self, counters: Counter[str]) -> None:
        super().__init__(
            [PROTOCOL_ID_V11],
            DEGREE,
            DEGREE_LOW,
            DEGREE_HIGH,
            heartbeat_initial_delay=0.1,
            heartbeat_interval=HEARTBEAT_SECONDS,
            adaptive_gossip_enabled=False,
            spam_protection_enabled=False,  # 10 messages a second per forwarder, dropped in silence
            eclipse_protection_enabled=False,
        )
        self.scorer = None  # its signs are inverted and it punishes shared addresses: see reputation.py
        self._counters = counters
        self._neighbours: OrderedDict[ID, frozenset[bytes]] = OrderedDict()

    def note_neighbours(self, peer: ID, neighbours: frozenset[bytes]) -> None:
        """See ports.Host."""
        self._neighbours[peer] = neighbours
        self._neighbours.move_to_end(peer)
        if len(self._neighbours) > NEIGHBOURHOODS:
            self._neighbours.popitem(last=False)

    def remove_peer(self, peer_id: ID) -> None:
        self._neighbours.pop(peer_id, None)
        super().remove_peer(peer_id)

    async def publish(self, msg_forwarder: ID, pubsub_msg: Any) -> None:
        """Send an accepted message on.  Defect: the original keeps a timestamp per message for ever, queues
        a hundred payloads for each peer that did not subscribe, and writes them around the send queue."""
        self.mcache.put(pubsub_msg)
        rpc = rpc_pb2.RPC(publish=[pubsub_msg])
        origin = ID(pubsub_msg.from_id)
        for peer in list(self._get_peers_to_send(pubsub_msg.topicIDs, msg_forwarder, origin)):
            self.send_rpc(peer, rpc)

    def _get_peers_to_send(
        self, topic_ids: Iterable[str], msg_forwarder: ID, origin: ID, msg_id: bytes | None = None
    ) -> Iterable[ID]:
        if self.pubsub is None or origin != self.pubsub.my_id:
            onward = super()._get_peers_to_send(topic_ids, msg_forwarder, origin, msg_id)
            author = origin.to_bytes()
            return [peer for peer in onward if author not in self._neighbours.get(peer, ())]
        subscribers = (self.pubsub.peer_topics.get(topic, set()) for topic in topic_ids)
        return set().union(*subscribers) - {origin}

    async def flush_pending_messages(self, peer_id: ID) -> None:
        """Nothing is ever pending: `send_recent_messages` covers peers that subscribe late."""

    async def send_recent_messages(self, peer_id: ID, topic: str) -> None:
        """Defect: the original writes to the stream beside the queue's writer; payloads above one frame of
        64 KiB then interleave and the peer sees garbage.  What is on its way already is not sent again."""
        queue = self.pubsub.peer_queues.get(peer_id) if self.pubsub is not None else None
        if not isinstance(queue, SendQueue):
            return
        for message_id in self.mcache.window(topic):
            message = self.mcache.get(message_id)
            if message is not None and message.from_id != peer_id.to_bytes() and not queue.has_sent(message):
                self.send_rpc(peer_id, rpc_pb2.RPC(publish=[message]))

    async def on_peer_subscribed(self, peer_id: ID, topic: str) -> None:
        try:
            await super().on_peer_subscribed(peer_id, topic)
        except Exception:  # noqa: BLE001 - what escapes from here stops the host
            self._counters["gossip_malformed"] += 1

    async def emit_control_message(self, control_msg: Any, to_peer: ID) -> None:
        """Without libp2p's signed address record in every RPC: nobody here believes gossiped addresses, and
        each costs its receiver a signature check."""
        self.send_rpc(to_peer, rpc_pb2.RPC(control=control_msg), priority=True)

    async def handle_rpc(self, rpc: Any, sender_peer_id: ID) -> None:
        """Control messages.  Attack: amplification.  One IWANT that names a message ten thousand times makes
        libp2p send it ten thousand times; an IHAVE as long makes us ask for what nobody has."""
        for ihave in rpc.control.ihave:
            _keep_unique(ihave.messageIDs)
            await self.handle_ihave(ihave, sender_peer_id)
        for iwant in rpc.control.iwant:
            _keep_unique(iwant.messageIDs)
            await self.handle_iwant(iwant, sender_peer_id)
        for graft in rpc.control.graft:
            await self.handle_graft(graft, sender_peer_id)
        for prune in rpc.control.prune:
            await self.handle_prune(prune, sender_peer_id)

    def gossip_heartbeat(self) -> Any:
        """What others may have missed is announced to them, unless its author sends it to them itself."""
        announced = super().gossip_heartbeat()
        for peer, topics in announced.items():
            authors = self._neighbours.get(peer, frozenset())
            for topic, ids in list(topics.items()):
                # An id is its author's 38 bytes and a sequence number.
                topics[topic] = [id_ for id_ in ids if id_[: peerid.SIZE_BYTES] not in authors]
                if not topics[topic]:
                    del topics[topic]
        return {peer: topics for peer, topics in announced.items() if topics}

    async def heartbeat(self) -> None:
        """The mesh keeps itself.  Defect: one exception in here stops the host for good."""
        await trio.sleep(self.heartbeat_initial_delay)
        while True:
            try:
                grafts, prunes = self.mesh_heartbeat()
                self.fanout_heartbeat()
                await self._emit_control_msgs(grafts, prunes, self.gossip_heartbeat())
                self._periodic_security_cleanup()
            except Exception:  # noqa: BLE001 - that is the guard
                self._counters["heartbeats_failed"] += 1
            self.mcache.shift()
            await trio.sleep(self.heartbeat_interval)


def _keep_unique(ids: Any) -> None:
    unique = list(dict.fromkeys(ids))[:IDS_PER_CONTROL]
    del ids[:]
    ids.extend(unique)


# --- pubsub ---------------------------------------------------------------------------------------------
class GuardedPubsub(Pubsub):
    """Connects the router with streams below and subscribers above."""

    def __init__(
        self, host: Any, router: Router, limits: Limits, counters: Counter[str], strike: Strike
    ) -> None:
        super().__init__(
            host,
            router,
            strict_signing=True,
            max_subscriptions_per_peer=limits.subscriptions_per_peer,
            max_inbound_rpc_size=MAX_MESSAGE_BYTES + RPC_OVERHEAD_BYTES,
        )
        self.seen_messages = _Seen()  # type: ignore[assignment]
        self._limits = limits
        self._counters = counters
        self._strike = strike
        self._mailboxes: dict[str, Mailbox] = {}
        self._validators: dict[str, Validator] = {}
        self._repeats: Recent[bytes, Verdict] = Recent(REPEAT_SECONDS, REPEATS)
        self._inbound: dict[ID, INetStream] = {}  # the stream that a peer's subscriptions came by
        self._opening: set[ID] = set()
        self._greeted: set[ID] = set()
        self._greeting = trio.lowlevel.ParkingLot()

    # - subscribers -
    async def open_mailbox(self, topic: str, validator: Validator) -> Mailbox:
        if topic in self._mailboxes:
            raise LocalProtocolError(f"already subscribed to {topic}")
        if not 0 < len(topic) <= MAX_TOPIC_CHARACTERS:
            raise LocalProtocolError(f"a topic has 1 to {MAX_TOPIC_CHARACTERS} characters")

        def count(dropped: int) -> None:
            self._counters["gossip_mailbox_dropped"] += dropped

        mailbox = Mailbox(self._limits.mailbox_messages, self._limits.mailbox_bytes, count)
        self._mailboxes[topic] = mailbox
        self._validators[topic] = validator
        await self.subscribe(topic)
        return mailbox

    async def close_mailbox(self, topic: str) -> None:
        mailbox = self._mailboxes.pop(topic, None)
        if mailbox is not None:
            mailbox.close()
            del self._validators[topic]
            await self.unsubscribe(topic)

    def close_mailboxes(self) -> None:
        for mailbox in self._mailboxes.values():
            mailbox.close()

    # - judgement -
    async def push_msg(self, msg_forwarder: ID, msg: Any) -> None:
        """Judge one message and send it on.  Defect: in libp2p one malformed message raises here, in a task
        of the service, and takes the process down (7 of 111 fuzzed RPCs)."""
        if msg_forwarder == self.my_id:
            self._mark_msg_seen(msg)
            await self.router.publish(msg_forwarder, msg)
            return
        self._counters["gossip_received"] += 1
        topics = list(msg.topicIDs)
        if len(topics) != 1:
            raise InvalidMessageError("a message has one topic")
        topic = topics[0]
        if topic not in self._validators:
            self._counters["gossip_foreign_topic"] += 1  # we just left it, or the forwarder is confused
            return
        if len(msg.data) > MAX_MESSAGE_BYTES or len(msg.from_id) != peerid.SIZE_BYTES or len(msg.seqno) > 32:
            raise InvalidMessageError("oversized message or malformed author")
        if msg.from_id == self.my_id.to_bytes() or self._is_msg_seen(msg):
            self._counters["gossip_duplicate"] += 1
            return
        if not signature_validator(msg):
            raise InvalidMessageError("the author's signature does not verify")
        self._mark_msg_seen(msg)
        verdict, is_repeat = self._judge(topic, msg)
        self._counters[f"gossip_{verdict.value}"] += 1
        if verdict is Verdict.REJECT:
            self._strike(msg_forwarder.to_bytes(), _REJECTED_WEIGHT)
        if verdict is not Verdict.ACCEPT:
            return
        if not is_repeat:
            self._mailboxes[topic].put(GossipMessage(topic, bytes(msg.from_id), bytes(msg.data)))
        # A repeat is forwarded all the same: its author sends it again for those who missed it.
        await self.router.publish(msg_forwarder, msg)

    def _judge(self, topic: str, msg: Any) -> tuple[Verdict, bool]:
        """The verdict, and whether the same bytes were judged a moment ago.  IGNORE is not remembered: what is
        unknown yet may be known when its author sends it again."""
        key = hashlib.sha256(topic.encode() + b"\0" + msg.from_id + msg.data).digest()
        known = self._repeats.get(key)
        if known is not None:
            return known, True
        try:
            verdict = self._validators[topic](bytes(msg.from_id), bytes(msg.data))
        except Exception:  # noqa: BLE001 - a bug of ours must not let a peer stop the host
            self._counters["validators_failed"] += 1
            verdict = Verdict.IGNORE
        if verdict is not Verdict.IGNORE:
            self._repeats.put(key, verdict)
        return verdict, False

    # - streams -
    async def stream_handler(self, stream: INetStream) -> None:
        peer = stream.muxed_conn.peer_id
        self._forget_all_subscriptions(peer)
        self._inbound[peer] = stream
        reader = framing.Buffered(stream)
        try:
            while True:
                await self._take(peer, await self._read_rpc(reader))
                if peer not in self._greeted:
                    self._greeted.add(peer)
                    self._greeting.unpark_all()
        except InvalidMessageError:
            self._counters["gossip_malformed"] += 1
            self._strike(peer.to_bytes(), _MALFORMED_WEIGHT)
        except IOException:
            pass  # the stream ended, or broke: nobody's fault
        finally:
            if self._inbound.get(peer) is stream:
                del self._inbound[peer]
                self._greeted.discard(peer)
                self._forget_all_subscriptions(peer)
            with trio.move_on_after(1.0):
                await stream.reset()

    async def wait_for_hello(self, peer: ID) -> None:
        """Until the peer's first RPC was taken in.  A peer that subscribes to nothing sends none: bound it."""
        while peer not in self._greeted:
            await self._greeting.park()

    async def _read_rpc(self, stream: framing.Readable) -> Any:
        """One frame.  Attack: slow loris; a frame that has begun must end in time."""
        first = await framing.read_exactly(stream, 1)
        with trio.move_on_after(self._limits.rpc_seconds):
            size = await framing.read_varint(stream, first, self.max_inbound_rpc_size)
            frame = await framing.read_exactly(stream, size)
            rpc = rpc_pb2.RPC()
            try:
                rpc.ParseFromString(frame)
            except Exception as error:
                raise InvalidMessageError("not a pubsub RPC") from error
            return rpc
        raise InvalidMessageError("a pubsub frame came too slowly")

    async def _take(self, peer: ID, rpc: Any) -> None:
        """Everything in one RPC, in order and before the next is read: a flooding peer waits for us, where
        libp2p starts a task per message."""
        if len(rpc.publish) > self._limits.messages_per_rpc:
            raise InvalidMessageError("too many messages in one RPC")
        if len(rpc.subscriptions) > 2 * self._limits.subscriptions_per_peer:
            raise InvalidMessageError("too many subscriptions in one RPC")
        try:
            for change in rpc.subscriptions:
                if not 0 < len(change.topicid) <= MAX_TOPIC_CHARACTERS:
                    raise InvalidMessageError("malformed topic")
                self.handle_subscription(peer, change)
            for message in rpc.publish:
                await self.push_msg(peer, message)
            if rpc.HasField("control"):
                await self.router.handle_rpc(rpc, peer)
        except InvalidMessageError:
            raise
        except Exception as error:
            raise InvalidMessageError("malformed pubsub RPC") from error

    async def _handle_new_peer(self, peer_id: ID) -> None:
        """Open our side's stream.  Defect: the original builds its list of subscriptions, waits for a write
        and only then registers the peer; what is subscribed meanwhile is never announced."""
        old = self.peers.get(peer_id)
        if old is not None and _is_closed(old):
            self._handle_dead_peer(peer_id)
        if peer_id in self.peers or peer_id in self._opening:
            return
        self._opening.add(peer_id)
        try:
            stream = await self.host.new_stream(peer_id, list(self.protocols))
        except Exception as error:
            raise SwarmException("no pubsub stream") from error  # the one class that is tried again
        finally:
            self._opening.discard(peer_id)
        queue = SendQueue(self._limits, self._counters)
        hello = rpc_pb2.RPC(
            subscriptions=[rpc_pb2.RPC.SubOpts(subscribe=True, topicid=topic) for topic in self.topic_ids]
        )
        queue.push(hello, priority=True)  # also when empty: `wait_for_hello` on the other side
        self.router.add_peer(peer_id, stream.get_protocol())
        self.peers[peer_id] = stream
        self.peer_queues[peer_id] = queue
        if (waiting := self._peer_added_events.pop(peer_id, None)) is not None:
            waiting.set()
        self.manager.run_task(self.handle_sending_messages, peer_id, stream, queue)
        await self._send_recent_messages_to_new_peer(peer_id)

    def _handle_dead_peer(self, peer_id: ID) -> None:
        """Our stream to a peer broke.  Defect: the original also forgets the peer's subscriptions, which came
        by another stream that may live on, and which the peer will not send again."""
        self._clear_pending_announce_retries_for_peer(peer_id)
        self._replayed_recent_topics.pop(peer_id, None)
        if peer_id not in self._inbound:
            self._forget_all_subscriptions(peer_id)
        if self.peers.pop(peer_id, None) is not None:
            queue = self.peer_queues.pop(peer_id, None)
            if queue is not None:
                queue.close()
            self.router.remove_peer(peer_id)
        if self._peer_is_connected(peer_id):
            self._schedule_peer_stream_retry(peer_id)

    async def handle_dead_peer_queue(self) -> None:
        """Defect: the original keeps a stream of a closed connection while another connection lives."""
        async with self.dead_peer_receive_channel:
            self.event_handle_dead_peer_queue_started.set()
            async for peer_id in self.dead_peer_receive_channel:
                stream = self.peers.get(peer_id)
                if stream is None or _is_closed(stream) or not self._peer_is_connected(peer_id):
                    self._handle_dead_peer(peer_id)

    def _build_announce_rpc(self, topic_id: str, subscribe: bool) -> tuple[Any, Any]:  # noqa: FBT001 - theirs
        change = rpc_pb2.RPC.SubOpts(subscribe=subscribe, topicid=topic_id)
        return rpc_pb2.RPC(subscriptions=[change]), change


def _is_closed(stream: INetStream) -> bool:
    connection = stream.muxed_conn
    return bool(connection.is_closed) or connection.event_shutting_down.is_set()  # type: ignore[attr-defined]
