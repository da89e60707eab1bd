"""What a host grants to strangers, in one place.

Law: every buffer, table and wait that a peer can make us hold is bounded by a number in this file.  The
defaults suit swarms of a few hundred peers; the worst case in memory is stated beside each bound.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_MESSAGE_BYTES = 1 << 20  # gossip payload; ports.Gossip promises it
RPC_OVERHEAD_BYTES = 16 << 10  # protobuf framing, signature and piggybacked control around one payload
MAX_TOPIC_CHARACTERS = 256
REPEAT_SECONDS = 10.0  # the same bytes by the same author are delivered once in this time


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one host.  Units are in the names."""

    # connections
    connections: int = 256
    connections_per_peer: int = 3  # two peers that dial each other at once hold two for a while
    half_open: int = 64  # unauthenticated sockets; beyond it the oldest of the busiest address goes
    handshake_seconds: float = 5.0
    dial_seconds: float = 5.0
    streams_per_connection: int = 128  # inbound; twice as many close the connection
    negotiation_seconds: int = 10  # choosing a protocol on a stream
    # health: a frozen peer is noticed after at most interval + timeout
    ping_interval_seconds: float = 3.0
    ping_timeout_seconds: float = 6.0
    # gossip
    mailbox_messages: int = 1024  # per subscription, oldest dropped
    mailbox_bytes: int = 32 << 20
    send_queue_messages: int = 1024  # per peer, oldest dropped
    send_queue_bytes: int = 16 << 20
    messages_per_rpc: int = 256
    subscriptions_per_peer: int = 64
    rpc_seconds: float = 30.0  # from the first byte of a pubsub frame to its last
    # reputation
    strikes: float = 20.0  # leaky bucket: this many faults at once, or a steady …
    strikes_drained_per_second: float = 0.5  # … rate above this, earns a ban
    ban_seconds: float = 300.0
    # requests
    requests: int = 64  # handlers running at once
    requests_per_peer: int = 8  # in each direction
    handler_seconds: float = 120.0
    grace_seconds: float = 10.0  # every read and write of a frame gets this …
    slowest_bytes_per_second: int = 50_000  # … plus its size at this rate
