"""Who misbehaved how often, and who is banned until when.

Law: decides, and remembers within a bound; disconnecting is the caller's.  Time is passed in.  py-libp2p's own
peer score is not used: its signs are inverted, it punishes peers that share an address, and a peer it
blacklists stays connected.
"""

from __future__ import annotations

from collections import OrderedDict

_REMEMBERED = 4096  # peers; ids are free to make, so the memory of them must be bounded


class Reputation:
    """A leaky bucket of strikes per peer."""

    def __init__(self, *, strikes: float, drained_per_second: float, ban_seconds: float) -> None:
        self._strikes = strikes
        self._drained_per_second = drained_per_second
        self._ban_seconds = ban_seconds
        self._buckets: OrderedDict[bytes, tuple[float, float]] = OrderedDict()  # peer -> (level, at)
        self._banned: OrderedDict[bytes, float] = OrderedDict()  # peer -> until

    def strike(self, peer: bytes, now: float, weight: float = 1.0) -> bool:
        """Count a fault; True when it is the one that earns a ban."""
        level, at = self._buckets.pop(peer, (0.0, now))
        level = max(0.0, level - (now - at) * self._drained_per_second) + weight
        if level < self._strikes:
            self._buckets[peer] = (level, now)
            if len(self._buckets) > _REMEMBERED:
                self._buckets.popitem(last=False)
            return False
        already = self.is_banned(peer, now)
        self._banned.pop(peer, None)
        self._banned[peer] = now + self._ban_seconds
        if len(self._banned) > _REMEMBERED:
            self._banned.popitem(last=False)
        return not already

    def is_banned(self, peer: bytes, now: float) -> bool:
        until = self._banned.get(peer)
        if until is None:
            return False
        if now < until:
            return True
        del self._banned[peer]
        return False
