"""The queue between gossip and one subscriber.

Law: never blocks the sender, never grows beyond its two bounds; the oldest messages go first and are counted.
Iteration ends once it is closed and drained.  No clock, no I/O, one reader.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import trio

from p2pflock.ports import GossipMessage


class Mailbox:
    """Bounded queue of messages, oldest dropped first.  `async for` reads it."""

    def __init__(self, max_messages: int, max_bytes: int, on_drop: Callable[[int], None]) -> None:
        self._messages: deque[GossipMessage] = deque()
        self._bytes = 0
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._on_drop = on_drop
        self._lot = trio.lowlevel.ParkingLot()
        self._closed = False

    def __len__(self) -> int:
        return len(self._messages)

    @property
    def size_bytes(self) -> int:
        return self._bytes

    def put(self, message: GossipMessage) -> None:
        if self._closed:
            return
        self._messages.append(message)
        self._bytes += len(message.data)
        dropped = 0
        while len(self._messages) > self._max_messages or self._bytes > self._max_bytes:
            self._bytes -= len(self._messages.popleft().data)
            dropped += 1
        if dropped:
            self._on_drop(dropped)
        self._lot.unpark()

    def close(self) -> None:
        self._closed = True
        self._lot.unpark_all()

    def __aiter__(self) -> Mailbox:
        return self

    async def __anext__(self) -> GossipMessage:
        await trio.lowlevel.checkpoint()
        while not self._messages:
            if self._closed:
                raise StopAsyncIteration
            await self._lot.park()
        message = self._messages.popleft()
        self._bytes -= len(message.data)
        return message
