"""Guards around py-libp2p 0.8: each names the defect or the attack that it answers.

Law: what can be mended by a subclass is (here the muxer and the swarm; the router in pubsub.py), what cannot
is patched by `apply`, which is idempotent and refuses any libp2p whose insides it does not know, so that a
silent upgrade cannot unguard a peer.  Attacks with a test each: tests/attacks/test_net_attacks.py.

Not needed here because of how host.py builds its parts: the plaintext and SECIO offers of `new_host()` (a peer
that knew Alice's public key was listed as Alice), its resource manager (one shared 10-per-second bucket
for everybody who has not introduced himself yet) and the 250 ms that every `dial_peer` waits even after
success (we dial addresses, not peers).
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any

import trio
from libp2p.abc import IMuxedConn, IMuxedStream, INetConn, ISecureConn
from libp2p.io.abc import ReadWriteCloser
from libp2p.network.connection import swarm_connection
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.exceptions import SwarmException
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux import yamux
from libp2p.stream_muxer.yamux.yamux import Yamux, YamuxStream
from multiaddr import Multiaddr

from p2pflock.errors import MissingToolError
from p2pflock.net.limits import Limits
from p2pflock.primitives import peerid

KNOWN_VERSION = "0.8."
WINDOW_BYTES = 1 << 20  # largest receive window of one stream; libp2p's 16 MiB times 128 streams is too much

_MARK = "_p2pflock_guarded"


def apply() -> None:
    """Patch what no subclass reaches.  Idempotent.  Raises MissingToolError for another libp2p."""
    found = version("libp2p")
    if not found.startswith(KNOWN_VERSION):
        raise MissingToolError(
            f"libp2p {found} is installed, the guards know {KNOWN_VERSION}x", "pip install 'libp2p==0.8.1'"
        )
    if getattr(yamux, _MARK, False):
        return
    setattr(yamux, _MARK, True)
    # Attack: memory.  Every stream's window grows to 16 MiB as it is read.
    yamux.MAX_WINDOW_SIZE = WINDOW_BYTES
    # Defect: a WINDOW_UPDATE for every read (70 instead of 152 MB/s), and credit beyond the window.
    YamuxStream._auto_tune_and_send_window_update = _send_window_update  # type: ignore[method-assign]
    # Defect: a raising stream handler takes down the host or ends the connection's accept loop in silence.
    SwarmConn._handle_muxed_stream = _guard(SwarmConn._handle_muxed_stream)  # type: ignore[method-assign, assignment]
    # Attack: log flooding.  Refused peers cost a traceback at WARNING each, and this module writes to the root
    # logger, which installs a handler for the whole process.
    vars(swarm_connection)["logging"] = logging.getLogger("libp2p.network.connection")
    if "LIBP2P_DEBUG" not in os.environ:  # libp2p's own switch
        logging.getLogger("libp2p").setLevel(logging.CRITICAL)


async def _send_window_update(self: YamuxStream, *, bytes_read: int = 0) -> None:
    """Give credit back in quarters of the window.  Invariant that BoundedBuffer relies on: credit given and
    not yet consumed, plus bytes buffered, never exceeds `target_recv_window`."""
    self._pending_recv_release += bytes_read
    if self._pending_recv_release < self.target_recv_window // 4:
        return
    credit = self._pending_recv_release
    self._pending_recv_release = 0
    grown = min(self.target_recv_window * 2, WINDOW_BYTES)
    credit += grown - self.target_recv_window
    self.target_recv_window = grown
    self.recv_window += credit
    await self.send_window_update(credit)


_StreamHandler = Callable[[SwarmConn, IMuxedStream], Awaitable[None]]


def _guard(handle: _StreamHandler) -> _StreamHandler:
    async def guarded(self: SwarmConn, stream: IMuxedStream) -> None:
        swarm = self.swarm
        limits = swarm.limits if isinstance(swarm, GuardedSwarm) else Limits()
        counters = swarm.counters if isinstance(swarm, GuardedSwarm) else Counter[str]()
        pending: int = getattr(self, "_p2pflock_streams", 0)
        # Attack: memory.  Nothing in libp2p bounds the streams that a peer opens; resetting them takes a write
        # that a peer which reads nothing can block, so twice the bound ends the connection.
        if pending >= limits.streams_per_connection:
            counters["streams_refused"] += 1
            if pending >= 2 * limits.streams_per_connection:
                await self.close()
                return
        self._p2pflock_streams = pending + 1  # type: ignore[attr-defined]
        try:
            if pending < limits.streams_per_connection:
                await handle(self, stream)
            else:
                await stream.reset()
        except Exception:  # noqa: BLE001 - that is the guard
            counters["handlers_failed"] += 1
            with contextlib.suppress(Exception), trio.move_on_after(1.0):
                await stream.reset()
        finally:
            self._p2pflock_streams -= 1  # type: ignore[attr-defined]

    return guarded


# --- muxer ----------------------------------------------------------------------------------------------
class WindowExceededError(trio.TooSlowError):
    """More bytes than credit.  The base class is the one exception that Yamux answers, at every place where
    it buffers, by closing the connection."""


class BoundedBuffer(bytearray):
    """Attack: memory.  Yamux only warns when a peer ignores the window, and buffers whatever comes."""

    def extend(self, data: Any) -> None:
        if len(self) + len(data) > WINDOW_BYTES:
            raise WindowExceededError
        super().extend(data)


class _Buffers(dict[int, bytearray]):
    def __setitem__(self, stream: int, buffer: bytearray) -> None:
        super().__setitem__(stream, BoundedBuffer(buffer))


class GuardedYamux(Yamux):
    """Bounded buffers, and a health check on every connection."""

    ping_interval_seconds = Limits().ping_interval_seconds
    ping_timeout_seconds = Limits().ping_timeout_seconds

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stream_buffers = _Buffers()

    async def start(self) -> None:
        """Defect: what escapes from here stops the whole swarm, not this connection."""
        try:
            await super().start()
        except Exception:  # noqa: BLE001 - that is the guard
            with contextlib.suppress(Exception):
                await self.close()

    async def _measure_rtt_loop(self) -> None:
        """Defect: a frozen peer is never noticed.  libp2p's opt-in monitor pings connections one after the
        other over streams; Yamux has a ping of its own that costs 12 bytes, but nobody looks at a missing
        answer.  A peer that does not answer in time is closed."""
        while not self.event_shutting_down.is_set():
            answered = False
            with trio.move_on_after(self.ping_timeout_seconds):
                self._ping_id = (self._ping_id + 1) & 0xFFFFFFFF
                self._ping_event = trio.Event()
                self._ping_sent_time = trio.current_time()
                try:
                    await self._write_frame(
                        struct.pack(
                            yamux.YAMUX_HEADER_FORMAT,
                            0,
                            yamux.TYPE_PING,
                            yamux.FLAG_SYN,
                            0,
                            self._ping_id,
                        )
                    )
                    await self._ping_event.wait()
                    answered = True
                except Exception:  # noqa: BLE001 - the connection is gone
                    return
            if not answered:
                # Closing the socket wakes `handle_incoming`, which tears everything down the ordinary way.
                self.event_shutting_down.set()
                with contextlib.suppress(Exception):
                    await self.secured_conn.close()
                return
            with trio.move_on_after(self.ping_interval_seconds):
                await self.event_shutting_down.wait()


class GuardedMuxer(MuxerMultistream):
    """Defect: `new_conn` names the class Yamux itself, whatever muxer was configured."""

    async def new_conn(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        protocol, muxer = await self._selector.select(conn, conn.is_initiator, self.negotiate_timeout)
        return self._annotate_connection(
            muxer(conn, peer_id, is_initiator=conn.is_initiator),  # type: ignore[call-arg]
            conn,
            protocol,
        )


class _NoAutoConnector:
    """Attack: poisoned addresses.  libp2p's dials up to 128 peers of its own choice, at addresses that strangers
    told, even with all watermarks at zero.  Who to talk to is the node's decision."""

    async def start(self) -> None: ...

    async def run_background_task(self, nursery: trio.Nursery) -> None: ...

    async def stop(self) -> None: ...


# --- swarm ----------------------------------------------------------------------------------------------
class GuardedSwarm(Swarm):
    """Admission of connections."""

    def __init__(
        self,
        *args: Any,
        limits: Limits,
        counters: Counter[str],
        is_banned: Callable[[bytes], bool],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.limits = limits
        self.counters = counters
        self._is_banned = is_banned
        self._half_open: dict[int, tuple[str, trio.CancelScope]] = {}  # in order of arrival
        self._arrivals = 0
        self.notifees.clear()  # the tag store remembers every peer for ever
        self.auto_connector = _NoAutoConnector()  # type: ignore[assignment]

    def _admit(self, address: str, scope: trio.CancelScope) -> int:
        """Attack: 300 idle half-open connections make new dials fail (each holds a slot until it times out).
        A newcomer is always let in; the oldest of the address that holds most makes room."""
        if len(self._half_open) >= self.limits.half_open:
            held = Counter(owner for owner, _ in self._half_open.values())
            busiest = max(held.values())
            victim = next(key for key, (owner, _) in self._half_open.items() if held[owner] == busiest)
            self._half_open.pop(victim)[1].cancel()
            self.counters["half_open_evicted"] += 1
        self._arrivals += 1
        self._half_open[self._arrivals] = (address, scope)
        return self._arrivals

    async def _handle_inbound_connection(self, read_write_closer: ReadWriteCloser, maddr: Multiaddr) -> None:
        """Defect: the original keeps its slot of the inbound limit until the host stops, so that a host which
        has accepted 250 connections in its life accepts no more.  This one ends with the connection."""
        remote = read_write_closer.get_remote_address()
        scope = trio.CancelScope()
        ticket = self._admit(remote[0] if remote else "", scope)
        muxed: IMuxedConn | None = None
        with scope:
            try:
                muxed = await self.upgrade_inbound_raw_conn(RawConnection(read_write_closer, False), maddr)
            except Exception:  # noqa: BLE001 - whatever a stranger sends ends here
                self.counters["handshakes_failed"] += 1
            finally:
                self._half_open.pop(ticket, None)
        if isinstance(muxed, Yamux):
            await muxed.event_closed.wait()

    async def dial_peer(self, peer_id: ID) -> list[INetConn]:
        """Attack: poisoned addresses.  The peerstore holds what strangers said; only `connect` dials."""
        raise SwarmException(f"not connected to {peer_id}")

    async def add_conn(self, muxed_conn: IMuxedConn, direction: str = "unknown") -> SwarmConn:
        peer = muxed_conn.peer_id.to_bytes()
        if reason := self._refusal(muxed_conn.peer_id, peer):
            self.counters["connections_refused"] += 1
            with contextlib.suppress(Exception):
                await muxed_conn.close()
            raise SwarmException(f"connection refused: {reason}")
        return await super().add_conn(muxed_conn, direction)

    def _refusal(self, peer_id: ID, peer: bytes) -> str:
        if peer_id == self.self_id:
            return "that is this peer itself"
        if len(peer) != peerid.SIZE_BYTES:
            return "not an Ed25519 peer id"
        if self._is_banned(peer):
            return "banned"
        # Defect: libp2p lets a peer exceed its share for the first 20 seconds of each connection.
        if len(self.get_connections(peer_id)) >= self.limits.connections_per_peer:
            return "too many connections with this peer"
        return ""

    async def notify_disconnected(self, conn: INetConn) -> None:
        """Without the original's report to the auto-connector."""
        await self._notify("disconnected", conn)
