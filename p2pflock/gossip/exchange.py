"""Payloads between two peers: each tells what it lacks, each sends what the other lacks; or one gives its own.

Law: a session is one authenticated stream, symmetric after the first frame.  Every read is bounded in size by
the frame it expects and in time by the idle limit and the session's deadline; a payload is buffered only up to
the size that the node expected, and kept only when it hashes to its id (pool.py).  Both sides read while they
write, so two full buffers can not wait for each other.  A partner that is slow, frozen, dead or lying costs a
bounded time and ends in UnavailableError; whole payloads that arrived before are kept.

Frames: kind (1 byte), body length (4 bytes, big endian), body.  Initiator first:
    HELLO    canonical msgpack [version, round key, serial, [content id that the sender lacks, ...]]
    PAYLOAD  content id (36 bytes), size (8 bytes), followed by CHUNKs of at most 256 KiB that add up to it
    DONE     nothing more will be sent.  The responder sends it after the initiator's, so that the initiator
             knows on receipt that all it sent has arrived, and closes.
    YIELD    answer to HELLO: my own session to you is under way (both called at once); the lower peer id wins
    GIVE     canonical msgpack [version, round key, content id, size] in place of HELLO, the CHUNKs right behind it:
             a gift, a session of its own kind, for a payload that was made just now, so that nobody can have it and
             asking first would only cost a round trip.  The answer is DONE, as soon as the payload is here.
A gift's chunks are not read before the node expects that payload of at least that size (the header that names it
is under way too), and it is refused when that takes longer than a moment.
A partner has one session per round with us.  A later one means that it gave the earlier one up, which then
ends; the serial tells which is later, since streams may overtake one another.

This file knows asyncio streams and no hivemind; process.py connects it to p2pd.  Not hivemind's protobuf
streams: those cost 30 % of the throughput and take an 8-byte length header without a cap (limits.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

from p2pflock.errors import InvalidMessageError, LocalProtocolError, RemoteProtocolError, UnavailableError
from p2pflock.gossip.pool import MAX_PAYLOADS_PER_ROUND, MAX_ROUND_KEY_BYTES, PayloadPool
from p2pflock.primitives import unixfs, wire
from p2pflock.primitives.cid import CID
from p2pflock.primitives.cid import SIZE_BYTES as CID_BYTES

VERSION = 1
CHUNK_BYTES = 256 << 10
YIELD_SECONDS = 0.3  # its HELLO left before its YIELD did
EXPECT_SECONDS = 3.0  # for the header that names a gift
HELLO, PAYLOAD, CHUNK, DONE, YIELD, GIVE = range(1, 7)
MAX_HELLO_BYTES = 128 + MAX_PAYLOADS_PER_ROUND * (CID_BYTES + 2)
MAX_GIVE_BYTES = 128 + CID_BYTES
_MAX_BODY = {
    HELLO: MAX_HELLO_BYTES,
    PAYLOAD: CID_BYTES + 8,
    CHUNK: CHUNK_BYTES,
    DONE: 0,
    YIELD: 0,
    GIVE: MAX_GIVE_BYTES,
}
_HASH_IN_THREAD_BYTES = 1 << 20

OpenStream = Callable[[bytes], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


@dataclass(frozen=True, slots=True)
class ExchangeLimits:
    idle_seconds: float = 10.0  # without a whole frame
    session_seconds: float = 120.0  # for a session that a partner opened
    sessions: int = 32  # opened by partners, at a time
    sessions_per_partner: int = 4
    buffered_bytes: int = 512 << 20  # payloads in flight, all sessions together


class _GivenUpError(UnavailableError):
    """Whoever led a session was cancelled; those who had joined it start their own."""


@dataclass(slots=True, eq=False)
class _Outgoing:
    """A session that we opened and that the partner has not answered yet, or its answer."""

    established: bool = False
    counterpart: asyncio.Future[list[CID]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    result: asyncio.Future[list[CID]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


@dataclass(slots=True, eq=False)
class _Incoming:
    """A session that a partner opened."""

    serial: int
    writer: asyncio.StreamWriter
    result: asyncio.Future[list[CID]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class PayloadExchange:
    """Runs sessions over streams that somebody else opens.

    Args:
        pool: where payloads come from and go to.
        peer: our peer id, which settles who yields.
        open_stream: opens an authenticated stream to a peer id; may raise anything.
    """

    def __init__(
        self, pool: PayloadPool, peer: bytes, open_stream: OpenStream, limits: ExchangeLimits | None = None
    ) -> None:
        self._pool = pool
        self._peer = peer
        self._open_stream = open_stream
        self._limits = limits or ExchangeLimits()
        self._partners: frozenset[bytes] | None = None
        self._outgoing: dict[tuple[bytes, bytes], _Outgoing] = {}
        self._incoming: dict[tuple[bytes, bytes], _Incoming] = {}
        self._sessions: Counter[bytes] = Counter()
        self._buffered_bytes = 0
        self._serials = itertools.count(time.time_ns())  # later than before a restart, too
        self.payload_bytes_sent = 0
        self.payload_bytes_received = 0
        self.refused_sessions = 0
        self.broken_sessions = 0

    def restrict(self, partners: Iterable[bytes] | None) -> None:
        """Serve these peers only; None serves everybody (who can still only send what we expect)."""
        self._partners = None if partners is None else frozenset(partners)

    # --- our side opens -------------------------------------------------------------------------------
    async def swap(self, round_key: bytes, partner: bytes, deadline_seconds: float) -> Sequence[CID]:
        """One session; what arrived in it.  Raises UnavailableError."""
        try:
            return await asyncio.wait_for(self._swap(round_key, partner), deadline_seconds)
        except (TimeoutError, asyncio.TimeoutError) as error:
            raise UnavailableError(f"partner did not finish within {deadline_seconds:g} s") from error

    async def give(
        self, round_key: bytes, cid: CID, partners: Sequence[bytes], deadline_seconds: float
    ) -> Sequence[bytes]:
        """Send one payload of the pool to several partners side by side; who has it now."""
        payload = self._pool.find(round_key, cid)
        if payload is None:
            raise LocalProtocolError("only a payload that is here can be given")

        async def give(partner: bytes) -> bool:
            with contextlib.suppress(Exception):  # whatever opening a stream may raise
                return await asyncio.wait_for(self._give(round_key, cid, payload, partner), deadline_seconds)
            return False

        has = await asyncio.gather(*map(give, partners))
        return [partner for partner, is_there in zip(partners, has, strict=True) if is_there]

    async def _give(self, round_key: bytes, cid: CID, payload: bytes, partner: bytes) -> bool:
        reader, writer = await self._open_stream(partner)
        session = _Session(self, reader, writer, round_key)
        sending = asyncio.ensure_future(session.send_gift(cid, payload))
        try:
            # A partner that has it already says so before it has read all.
            kind, _ = await session.read_frame()
            return kind == DONE
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            _abort(writer)

    async def _swap(self, round_key: bytes, partner: bytes) -> list[CID]:
        name = round_key, partner
        if name in self._incoming:
            # It may be one that the partner has given up already: then ours is the next try.
            with contextlib.suppress(UnavailableError):
                return await asyncio.shield(self._incoming[name].result)
        while name in self._outgoing:
            with contextlib.suppress(_GivenUpError):
                return await asyncio.shield(self._outgoing[name].result)
        outgoing = self._outgoing[name] = _Outgoing()
        try:
            arrived = await self._initiate(round_key, partner, outgoing)
        except BaseException as error:
            is_fault = isinstance(error, Exception)
            _settle(outgoing.result, (UnavailableError if is_fault else _GivenUpError)("session did not finish"))
            if isinstance(error, UnavailableError) or not isinstance(error, Exception):
                raise
            raise UnavailableError(f"session with partner failed: {_name(error)}") from error
        else:
            outgoing.result.set_result(arrived)
            return arrived
        finally:
            del self._outgoing[name]
            outgoing.counterpart.cancel()

    async def _initiate(self, round_key: bytes, partner: bytes, outgoing: _Outgoing) -> list[CID]:
        reader, writer = await self._open_stream(partner)
        try:
            session = _Session(self, reader, writer, round_key)
            await session.send_hello()
            kind, body = await session.read_frame()
            if kind == YIELD:
                return await self._await_counterpart((round_key, partner), outgoing)
            outgoing.established = True
            theirs, _, wants = _parse_hello(kind, body)
            if theirs != round_key:
                raise InvalidMessageError("answer for another round")
            return await session.run(wants, is_initiator=True)
        finally:
            _abort(writer)

    async def _await_counterpart(self, name: tuple[bytes, bytes], outgoing: _Outgoing) -> list[CID]:
        """What the partner's own session brings.  It is here within a round trip, or it had ended already when the
        partner answered us, and then nothing would ever come."""
        with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
            return await asyncio.wait_for(asyncio.shield(outgoing.counterpart), YIELD_SECONDS)
        incoming = self._incoming.get(name)
        if incoming is None:
            raise UnavailableError("the partner's session had ended")
        return await asyncio.shield(incoming.result)

    # --- a partner opens ------------------------------------------------------------------------------
    async def serve(
        self, partner: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Answer one session that `partner` (authenticated) opened.  Never raises."""
        limits = self._limits
        is_partner = self._partners is None or partner in self._partners
        if not is_partner or self._sessions.total() >= limits.sessions or self._sessions[partner] >= limits.sessions_per_partner:
            self.refused_sessions += 1
            _abort(writer)
            return
        self._sessions[partner] += 1
        try:
            await asyncio.wait_for(self._answer(partner, reader, writer), limits.session_seconds)
        except (RemoteProtocolError, OSError, EOFError, TimeoutError, asyncio.TimeoutError):
            self.broken_sessions += 1
        finally:
            self._sessions[partner] -= 1
            if not self._sessions[partner]:
                del self._sessions[partner]
            _abort(writer)

    async def _answer(
        self, partner: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        session = _Session(self, reader, writer, b"")
        kind, body = await session.read_frame()
        if kind == GIVE:
            await self._take_gift(session, *_parse_give(body))
            return
        round_key, serial, wants = _parse_hello(kind, body)
        name = round_key, partner
        outgoing = self._outgoing.get(name)
        if outgoing is not None and (outgoing.established or self._peer < partner):
            await session.yield_()
            return
        other = self._incoming.get(name)
        if other is not None:
            if serial <= other.serial:
                self.refused_sessions += 1
                return
            other.writer.transport.abort()
        incoming = self._incoming[name] = _Incoming(serial, writer)
        if outgoing is not None:
            _follow(incoming.result, outgoing.counterpart)
        try:
            session.round_key = round_key
            await session.send_hello()
            incoming.result.set_result(await session.run(wants, is_initiator=False))
        finally:
            _settle(incoming.result, UnavailableError("the partner's session did not finish"))
            if self._incoming.get(name) is incoming:
                del self._incoming[name]
        await session.wait_closed()

    async def _take_gift(self, session: _Session, round_key: bytes, cid: CID, size: int) -> None:
        pool = self._pool
        if pool.find(round_key, cid) is None:
            if not pool.is_expected(round_key, cid, size):
                # Attack: gifts of what nobody has named.  Nothing of it is read until it is, or it ends here.
                named = asyncio.Event()
                with (
                    pool.watch(round_key, cid, named.set),
                    contextlib.suppress(TimeoutError, asyncio.TimeoutError),
                ):
                    await asyncio.wait_for(named.wait(), EXPECT_SECONDS)
                if not pool.is_expected(round_key, cid, size):
                    self.refused_sessions += 1
                    return
            pool.claim(round_key, {cid}, asyncio.get_running_loop().time())
            try:
                session.round_key = round_key
                await session.receive_payload(cid, size)
            finally:
                pool.release(round_key, {cid})
        await session.finish()

    # --- for sessions ---------------------------------------------------------------------------------
    def draw_serial(self) -> int:
        return next(self._serials)

    def reserve(self, size: int) -> None:
        # Attack: many partners each send all but the last byte of a large expected payload.
        if self._buffered_bytes + size > self._limits.buffered_bytes:
            raise UnavailableError("too many payloads in flight")
        self._buffered_bytes += size

    def release(self, size: int) -> None:
        self._buffered_bytes -= size

    @property
    def pool(self) -> PayloadPool:
        return self._pool

    @property
    def idle_seconds(self) -> float:
        return self._limits.idle_seconds

    def compute_order(self, cid: CID) -> bytes:
        """Each peer sends in another order, so that a partner cut off early still has something rare."""
        return hashlib.sha256(self._peer + cid.digest).digest()


class _Session:
    def __init__(
        self,
        owner: PayloadExchange,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        round_key: bytes,
    ) -> None:
        self._owner = owner
        self._reader = reader
        self._writer = writer
        self._wanted: dict[CID, int] = {}
        self._moved_at = asyncio.get_running_loop().time()
        self.round_key = round_key

    async def send_hello(self) -> None:
        # What another session brings already is not asked for twice.
        self._wanted = self._owner.pool.unclaimed(self.round_key, asyncio.get_running_loop().time())
        wants = [cid.to_bytes() for cid in self._wanted]
        await self._send(HELLO, wire.pack([VERSION, self.round_key, self._owner.draw_serial(), wants]))

    async def yield_(self) -> None:
        await self._send(YIELD)
        await self.wait_closed()

    async def finish(self) -> None:
        await self._send(DONE)
        await self.wait_closed()

    async def send_gift(self, cid: CID, payload: bytes) -> None:
        await self._send(GIVE, wire.pack([VERSION, self.round_key, cid.to_bytes(), len(payload)]))
        await self._send_chunks(payload)

    async def run(self, wants: Sequence[CID], *, is_initiator: bool) -> list[CID]:
        """Send and receive side by side; what arrived."""

        async def send() -> None:
            await self._send_payloads(wants)
            if is_initiator:
                await self._send(DONE)

        # What the partner knows of and does not lack it has.
        pool, coming = self._owner.pool, self._wanted.keys() - set(wants)
        pool.claim(self.round_key, coming, asyncio.get_running_loop().time())
        sending, receiving = asyncio.ensure_future(send()), asyncio.ensure_future(self._receive_payloads())
        try:
            await asyncio.wait({sending, receiving}, return_when=asyncio.FIRST_EXCEPTION)
            if not receiving.done() or receiving.exception() is None:
                # A partner that hung up on our payloads may have sent its own before: take those first.
                await receiving
            await asyncio.gather(sending, receiving)
            if not is_initiator:
                await self._send(DONE)
            return receiving.result()
        finally:
            pool.release(self.round_key, coming)
            sending.cancel()
            receiving.cancel()
            await asyncio.gather(sending, receiving, return_exceptions=True)

    async def _send_payloads(self, wants: Sequence[CID]) -> None:
        owner = self._owner
        for cid in sorted(wants, key=owner.compute_order):
            payload = owner.pool.find(self.round_key, cid)
            if payload is None:
                continue
            await self._send(PAYLOAD, cid.to_bytes() + len(payload).to_bytes(8, "big"))
            await self._send_chunks(payload)

    async def _send_chunks(self, payload: bytes) -> None:
        view = memoryview(payload)
        for start in range(0, len(view), CHUNK_BYTES):
            await self._send(CHUNK, view[start : start + CHUNK_BYTES])
        self._owner.payload_bytes_sent += len(payload)

    async def _receive_payloads(self) -> list[CID]:
        arrived: list[CID] = []
        while True:
            kind, body = await self.read_frame()
            if kind == DONE:
                return arrived
            if kind != PAYLOAD or len(body) != CID_BYTES + 8:
                raise InvalidMessageError("unexpected frame")
            cid, size = CID.from_bytes(body[:CID_BYTES]), int.from_bytes(body[CID_BYTES:], "big")
            if size > self._wanted.pop(cid, -1):
                self._owner.pool.refused += 1
                raise InvalidMessageError("a payload that was not asked for")
            if await self.receive_payload(cid, size):
                arrived.append(cid)

    async def receive_payload(self, cid: CID, size: int) -> bool:
        owner, buffer = self._owner, bytearray()
        try:
            while len(buffer) < size:
                kind, chunk = await self.read_frame()
                if kind != CHUNK or not chunk or len(buffer) + len(chunk) > size:
                    raise InvalidMessageError("chunks do not add up to the payload")
                owner.reserve(len(chunk))
                buffer += chunk
            payload = bytes(buffer)
            owner.payload_bytes_received += size
            if size < _HASH_IN_THREAD_BYTES:
                return owner.pool.accept(self.round_key, cid, payload)
            computed = await asyncio.get_running_loop().run_in_executor(None, unixfs.compute_cid, payload)
            if computed != cid:
                owner.pool.refused += 1
                raise InvalidMessageError("payload does not match its content id")
            return owner.pool.accept_hashed(self.round_key, cid, payload)
        finally:
            owner.release(len(buffer))

    async def read_frame(self) -> tuple[int, bytes]:
        """Raises UnavailableError when nothing moved for the idle limit, in either direction: a partner that
        is busy taking a large payload from us has nothing to say.  InvalidMessageError for an oversized frame."""
        loop = asyncio.get_running_loop()
        reading = asyncio.ensure_future(self._read_frame())
        try:
            while not reading.done():
                left = self._moved_at + self._owner.idle_seconds - loop.time()
                if left <= 0:
                    raise UnavailableError("partner went silent")
                await asyncio.wait({reading}, timeout=left)
            self._moved_at = loop.time()
            return reading.result()
        except (EOFError, OSError) as error:
            raise UnavailableError("partner hung up") from error
        finally:
            reading.cancel()

    async def _read_frame(self) -> tuple[int, bytes]:
        head = await self._reader.readexactly(5)
        kind, size = head[0], int.from_bytes(head[1:], "big")
        if size > _MAX_BODY.get(kind, -1):
            raise InvalidMessageError("unknown or oversized frame")
        return kind, await self._reader.readexactly(size)

    async def _send(self, kind: int, body: bytes | memoryview = b"") -> None:
        self._writer.write(bytes((kind,)) + len(body).to_bytes(4, "big"))
        self._writer.write(body)
        try:
            await self._writer.drain()
        except OSError as error:
            raise UnavailableError("partner hung up") from error
        self._moved_at = asyncio.get_running_loop().time()

    async def wait_closed(self) -> None:
        """The last frame must reach the partner before we hang up: the partner hangs up first."""
        with contextlib.suppress(EOFError, OSError, asyncio.TimeoutError):
            await asyncio.wait_for(self._reader.readexactly(1), self._owner.idle_seconds)


def _parse_hello(kind: int, body: bytes) -> tuple[bytes, int, list[CID]]:
    if kind != HELLO:
        raise InvalidMessageError("expected HELLO")
    value = wire.unpack(body, max_bytes=MAX_HELLO_BYTES)
    if type(value) is not list or len(value) != 4 or value[0] != VERSION:
        raise InvalidMessageError("malformed HELLO")
    round_key, serial, wants = value[1:]
    if type(serial) is not int:
        raise InvalidMessageError("malformed HELLO")
    if type(round_key) is not bytes or not 0 < len(round_key) <= MAX_ROUND_KEY_BYTES:
        raise InvalidMessageError("malformed HELLO")
    if type(wants) is not list or len(wants) > MAX_PAYLOADS_PER_ROUND:
        raise InvalidMessageError("malformed HELLO")
    if any(type(cid) is not bytes for cid in wants) or len(set(wants)) != len(wants):
        raise InvalidMessageError("malformed HELLO")
    return round_key, serial, [CID.from_bytes(cid) for cid in wants]


def _parse_give(body: bytes) -> tuple[bytes, CID, int]:
    value = wire.unpack(body, max_bytes=MAX_GIVE_BYTES)
    if type(value) is not list or len(value) != 4 or value[0] != VERSION:
        raise InvalidMessageError("malformed GIVE")
    round_key, cid, size = value[1:]
    if type(round_key) is not bytes or not 0 < len(round_key) <= MAX_ROUND_KEY_BYTES:
        raise InvalidMessageError("malformed GIVE")
    if type(cid) is not bytes or type(size) is not int or size < 0:
        raise InvalidMessageError("malformed GIVE")
    return round_key, CID.from_bytes(cid), size


def _follow(source: asyncio.Future[list[CID]], target: asyncio.Future[list[CID]]) -> None:
    def copy(done: asyncio.Future[list[CID]]) -> None:
        if target.done():
            return
        error = done.exception()
        if error is None:
            target.set_result(done.result())
        else:
            _settle(target, error)

    source.add_done_callback(copy)


def _settle(future: asyncio.Future[list[CID]], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # nobody may be waiting, and asyncio would log that


def _abort(writer: asyncio.StreamWriter) -> None:
    # close() would wait for a frozen partner to take the rest.
    transport = writer.transport
    if transport.get_write_buffer_size():
        transport.abort()
    else:
        transport.close()


def _name(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
