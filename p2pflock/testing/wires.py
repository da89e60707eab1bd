"""What lies between simulated peers when a network is large: distance, bandwidth, lost packets.

Law: every byte of a peer, control and payload alike, goes through one uplink and one downlink of the same rate,
first come first served, in virtual time; a link between two peers has a latency of its own that never changes.
Streams are TCP in production, so a lost packet delays what it carried by a retransmission and loses nothing: what
gets lost are peers.  Who is reached from where is network.py's.

Simplified: a transfer enters the receiver's queue when it is sent, not when its first byte arrives, and headers of
TCP and IP are not counted.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from random import Random

import trio

RETRANSMISSION_SECONDS = 0.2  # the least a TCP sender waits (Linux: RTO_MIN)


@dataclass
class Wires:
    """One network's links, and how busy they are.

    Args:
        rng: draws what is lost.
        latency_seconds: one way; of a link, uniform between the two.
        bits_per_second: of each peer, up and down.
        loss: probability that a message has to be sent again.
    """

    rng: Random
    latency_seconds: tuple[float, float] = (0.020, 0.120)
    bits_per_second: float = 50e6
    loss: float = 0.0
    _up: dict[bytes, float] = field(default_factory=dict)  # peer -> when its uplink is free
    _down: dict[bytes, float] = field(default_factory=dict)
    _latencies: dict[tuple[bytes, bytes], float] = field(default_factory=dict)

    def latency(self, one: bytes, other: bytes) -> float:
        """Seconds one way; the same in both directions and in every run."""
        known = self._latencies.get((one, other))
        if known is None:
            share = zlib.crc32(min(one, other) + max(one, other)) / (1 << 32)
            low, high = self.latency_seconds
            known = self._latencies[one, other] = low + share * (high - low)
        return known

    def send(self, sender: bytes, receiver: bytes, size_bytes: int) -> float:
        """Seconds from now until the last byte is there."""
        now, busy = trio.current_time(), size_bytes * 8 / self.bits_per_second
        sent = self._up[sender] = max(now, self._up.get(sender, 0.0)) + busy
        arrived = sent + self.latency(sender, receiver)
        if self.rng.random() < self.loss:
            arrived += max(RETRANSMISSION_SECONDS, 2 * self.latency(sender, receiver))
        self._down[receiver] = max(arrived, self._down.get(receiver, 0.0) + busy)
        return self._down[receiver] - now
