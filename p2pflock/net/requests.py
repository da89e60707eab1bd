"""One request, one response, over one stream.

Law: both frames are length-prefixed and bounded, every read and write has a deadline, a peer runs a bounded
number of our handlers at once, and whatever a handler raises becomes a reset of its stream and a count.

Wire: 4-byte big-endian length and body, each way, on a stream whose protocol id names the service.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import trio
from libp2p.abc import IHost, INetStream
from libp2p.custom_types import TProtocol
from libp2p.io.exceptions import IOException
from libp2p.peer.id import ID

from p2pflock.errors import (
    FlockError,
    InvalidMessageError,
    LocalProtocolError,
    RemoteProtocolError,
    UnavailableError,
)
from p2pflock.net import framing
from p2pflock.net.limits import Limits
from p2pflock.ports import RequestHandler

_REFUSED_WEIGHT = 0.5
_OVERSIZE_WEIGHT = 5.0

_LARGEST_FRAME = (1 << 32) - 1


class RequestService:
    """Both ends of the request protocols of one host."""

    def __init__(
        self, host: IHost, limits: Limits, counters: Counter[str], strike: Callable[[bytes, float], None]
    ) -> None:
        self._host = host
        self._limits = limits
        self._counters = counters
        self._strike = strike
        self._running = trio.CapacityLimiter(limits.requests)
        self._serving: Counter[bytes] = Counter()
        self._asking: dict[bytes, trio.Semaphore] = {}

    def serve(self, protocol: str, handler: RequestHandler, *, max_request_bytes: int) -> None:
        if not protocol.startswith("/"):
            raise LocalProtocolError(f"a protocol id begins with a slash: {protocol}")

        async def handle(stream: INetStream) -> None:
            peer = stream.muxed_conn.peer_id.to_bytes()
            if self._serving[peer] >= self._limits.requests_per_peer:
                self._counters["requests_refused"] += 1
                self._strike(peer, _REFUSED_WEIGHT)
                await _reset(stream)
                return
            self._serving[peer] += 1
            try:
                await self._answer(stream, peer, handler, max_request_bytes)
            finally:
                self._serving[peer] -= 1
                if not self._serving[peer]:
                    del self._serving[peer]

        self._host.set_stream_handler(TProtocol(protocol), handle)

    async def _answer(
        self, stream: INetStream, peer: bytes, handler: RequestHandler, max_request_bytes: int
    ) -> None:
        done = False
        try:
            with trio.fail_after(self._limits.grace_seconds):
                size = await framing.read_length(stream, max_request_bytes)
            with trio.fail_after(self._seconds(size)):
                request = await framing.read_exactly(stream, size)
            with trio.fail_after(self._limits.handler_seconds):
                async with self._running:
                    response = await handler(peer, request)
            with trio.fail_after(self._seconds(len(response))):
                await stream.write(framing.prefix(response))
                await stream.close()
            done = True
            self._counters["requests_served"] += 1
        except InvalidMessageError:
            self._counters["requests_malformed"] += 1
            self._strike(peer, _OVERSIZE_WEIGHT)
        except trio.TooSlowError:
            self._counters["requests_too_slow"] += 1
        except RemoteProtocolError:
            self._counters["requests_declined"] += 1  # the handler does not have what was asked for
        except IOException:
            self._counters["requests_abandoned"] += 1  # the peer ended or reset the stream
        except Exception:  # noqa: BLE001 - attack: whatever input makes a handler raise, the host lives
            self._counters["requests_failed"] += 1
        finally:
            if not done:
                await _reset(stream)

    def _seconds(self, size: int) -> float:
        return self._limits.grace_seconds + size / self._limits.slowest_bytes_per_second

    async def request(
        self, peer: bytes, protocol: str, data: bytes, *, max_response_bytes: int, deadline_seconds: float
    ) -> bytes:
        if len(data) > _LARGEST_FRAME:
            raise LocalProtocolError(f"request of {len(data)} bytes")
        # Our own bound per peer keeps us below the peer's bound; the rest wait their turn within the deadline.
        turn = self._asking.setdefault(peer, trio.Semaphore(self._limits.requests_per_peer))
        try:
            with trio.fail_after(deadline_seconds):
                async with turn:
                    return await self._ask(peer, protocol, data, max_response_bytes)
        except trio.TooSlowError as error:
            self._counters["requests_unanswered"] += 1
            raise UnavailableError(f"no answer to {protocol} within {deadline_seconds:g} s") from error

    def forget(self, peer: bytes) -> None:
        """A peer has gone; drop its idle bookkeeping."""
        turn = self._asking.get(peer)
        if turn is not None and turn.value == self._limits.requests_per_peer:
            del self._asking[peer]

    async def _ask(self, peer: bytes, protocol: str, data: bytes, max_response_bytes: int) -> bytes:
        stream: INetStream | None = None
        try:
            stream = await self._host.new_stream(ID(peer), [TProtocol(protocol)])
            await stream.write(framing.prefix(data))
            size = await framing.read_length(stream, max_response_bytes)
            response = await framing.read_exactly(stream, size)
            await stream.close()
        except FlockError:
            await _reset(stream)
            raise
        except Exception as error:
            await _reset(stream)
            self._counters["requests_unanswered"] += 1
            raise UnavailableError(f"the peer did not answer {protocol}") from error
        except BaseException:  # cancelled: by the deadline, or by the caller
            await _reset(stream)
            raise
        return response


async def _reset(stream: INetStream | None) -> None:
    """Best effort, also while being cancelled; a peer that reads nothing cannot hold us."""
    if stream is None:
        return
    with trio.CancelScope(deadline=trio.current_time() + 1.0, shield=True):
        try:
            await stream.reset()
        except Exception:  # noqa: BLE001 - it is gone either way
            return
