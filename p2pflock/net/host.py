"""The Host port over py-libp2p: TCP, Noise, Yamux, GossipSub.

Law: this file builds the parts, dials, listens and disconnects.  It offers Noise and nothing else: whoever is
listed as a peer has proven that it holds that peer's key.  What strangers may do is decided in limits.py, guarded in
hardening.py and pubsub.py, punished by reputation.py.

Sources: libp2p specs (connections, noise, yamux, pubsub).
"""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence

import trio
from libp2p.abc import INetConn, INetStream, INetwork, INotifee
from libp2p.crypto.ed25519 import create_new_key_pair as create_ed25519_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.host.ping import ID as PING_ID
from libp2p.host.ping import PingService
from libp2p.identity.identify.identify import ID as IDENTIFY_ID
from libp2p.identity.identify.identify import identify_handler_for
from libp2p.io.trio import TrioTCPStream
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_ID
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_ID
from libp2p.tools.anyio_service.context import background_trio_service
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr

from p2pflock.errors import FlockError, LocalProtocolError, PortTakenError, UnavailableError, UserError
from p2pflock.net import hardening
from p2pflock.net.limits import MAX_MESSAGE_BYTES, Limits
from p2pflock.net.pubsub import GuardedPubsub, Router
from p2pflock.net.reputation import Reputation
from p2pflock.net.requests import RequestService
from p2pflock.net.traffic import CountingStream, CountingTCP, Meter
from p2pflock.ports import GossipMessage, RequestHandler, Traffic, Validator
from p2pflock.primitives import peerid

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

_MAX_ADDRESS_CHARACTERS = 512
_HELLO_SECONDS = 2.0  # how long `connect` waits for the pubsub streams, beyond which it returns anyway
_CLOSE_SECONDS = 3.0


class _Host(BasicHost):
    """Defect: BasicHost asks every peer for its protocols and addresses, pushes its own to all, and believes
    the answers.  We answer such questions (other implementations ask) and ask none."""

    def _schedule_identify(self, peer_id: ID, *, reason: str) -> None:
        pass


class _Watcher(INotifee):
    """Tells the host that a connection ended."""

    def __init__(self, host: Libp2pHost) -> None:
        self._host = host

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        pass

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        self._host._forget(conn.muxed_conn.peer_id)

    async def opened_stream(self, network: INetwork, stream: INetStream) -> None:
        pass

    async def closed_stream(self, network: INetwork, stream: INetStream) -> None:
        pass

    async def listen(self, network: INetwork, multiaddr: Multiaddr) -> None:
        pass

    async def listen_close(self, network: INetwork, multiaddr: Multiaddr) -> None:
        pass


class Libp2pHost:
    """See ports.Host.  Get one from `open`."""

    def __init__(self, seed: bytes, addresses: Sequence[str], limits: Limits) -> None:
        if len(seed) != 32:
            raise LocalProtocolError("an Ed25519 seed is 32 bytes")
        hardening.apply()
        keys = create_ed25519_key_pair(seed)
        identity = ID.from_pubkey(keys.public_key)
        self._peer_id = identity.to_bytes()
        self._addresses = tuple(f"{address}/p2p/{peerid.to_text(self._peer_id)}" for address in addresses)
        self._limits = limits
        self._counters: Counter[str] = Counter()
        self._meter = Meter()
        self._reputation = Reputation(
            strikes=limits.strikes,
            drained_per_second=limits.strikes_drained_per_second,
            ban_seconds=limits.ban_seconds,
        )
        self._dialing: dict[bytes, trio.Lock] = {}
        self._nursery: trio.Nursery | None = None

        noise = NoiseTransport(keys, create_x25519_key_pair().private_key)
        upgrader = TransportUpgrader({NOISE_ID: noise}, {})

        class Muxer(hardening.GuardedYamux):
            ping_interval_seconds = limits.ping_interval_seconds
            ping_timeout_seconds = limits.ping_timeout_seconds

        upgrader.muxer_multistream = hardening.GuardedMuxer({TProtocol(YAMUX_ID): Muxer})
        peers = PeerStore()
        peers.add_key_pair(identity, keys)
        self._swarm = hardening.GuardedSwarm(
            identity,
            peers,
            upgrader,
            [CountingTCP(self._meter)],
            RetryConfig(max_retries=0),
            ConnectionConfig(
                max_connections=limits.connections,
                max_connections_per_peer=limits.connections_per_peer,
                min_connections=0,
                low_watermark=0,
                high_watermark=limits.connections,
                inbound_upgrade_timeout=limits.handshake_seconds,
                outbound_upgrade_timeout=limits.handshake_seconds,
                inbound_stream_protocol_negotiation_timeout=limits.negotiation_seconds,
                outbound_stream_protocol_negotiation_timeout=limits.negotiation_seconds,
            ),
            limits=limits,
            counters=self._counters,
            is_banned=lambda peer: self._reputation.is_banned(peer, trio.current_time()),
        )
        listening = [Multiaddr(address) for address in addresses]
        self._host = _Host(
            self._swarm,
            default_protocols=OrderedDict(),
            addrs_factory=lambda _: list(listening),
            disable_identify_address_discovery=True,
        )
        self._host.set_stream_handler(PING_ID, PingService(self._host).handle_ping)
        self._host.set_stream_handler(IDENTIFY_ID, identify_handler_for(self._host, use_varint_format=True))
        self._router = Router(self._counters)
        self._pubsub = GuardedPubsub(self._host, self._router, limits, self._counters, self._strike)
        self._requests = RequestService(self._host, limits, self._counters, self._strike)
        self._swarm.register_notifee(_Watcher(self))

    # - life -
    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        seed: bytes,
        *,
        listen: tuple[str, int] = ("127.0.0.1", 0),
        announce: Sequence[str] = (),
        limits: Limits | None = None,
    ) -> AsyncIterator[Libp2pHost]:
        """A running host.

        Args:
            seed: 32-byte Ed25519 private seed.
            listen: address and port; port 0 takes any free one.
            announce: IP addresses or host names by which others reach this machine, when `listen` is a
                wildcard; the address of the outgoing interface when empty.
            limits: what strangers may do.

        Raises:
            PortTakenError: somebody else listens there.
            UserError: the address is not one of this machine.
        """
        listeners = await _bind(*listen)
        port = listeners[0].socket.getsockname()[1]
        host = cls(seed, [_multiaddress(name, port) for name in announce or _reachable(listen[0])], limits or Limits())
        failure: BaseException | None = None
        try:
            async with (
                background_trio_service(host._swarm),
                background_trio_service(host._router),
                background_trio_service(host._pubsub),
                trio.open_nursery() as nursery,
            ):
                host._nursery = nursery
                await host._swarm.event_background_nursery_created.wait()
                await host._pubsub.wait_until_ready()
                nursery.start_soon(trio.serve_listeners, host._accept, listeners)
                try:
                    yield host
                except Exception as error:
                    failure = error
                    raise
                finally:
                    await host._close()
                    nursery.cancel_scope.cancel()
        except BaseExceptionGroup:
            # Whoever uses the host gets its own exception back, not wrapped once per nursery.
            if failure is not None:
                raise failure  # noqa: B904 - it is its own cause
            raise
        finally:
            with trio.CancelScope(shield=True):
                for listener in listeners:
                    await listener.aclose()

    async def _accept(self, stream: trio.SocketStream) -> None:
        counted = CountingStream(TrioTCPStream(stream), self._meter)
        await self._swarm._handle_inbound_connection(counted, Multiaddr("/ip4/0.0.0.0/tcp/0"))

    async def _close(self) -> None:
        self._pubsub.close_mailboxes()
        with trio.CancelScope(deadline=trio.current_time() + _CLOSE_SECONDS, shield=True):
            async with trio.open_nursery() as nursery:
                for connection in self._swarm.get_connections():
                    nursery.start_soon(_close_quietly, connection)

    # - connections -
    @property
    def peer_id(self) -> bytes:
        return self._peer_id

    @property
    def addresses(self) -> Sequence[str]:
        return self._addresses

    async def connect(self, addresses: Sequence[str]) -> bytes:
        """Dial one peer; addresses are tried in order.  Returns its authenticated id.  When this returns, the
        peer usually knows our subscriptions and we know its (waits up to 2 s for that)."""
        parsed = [_parse(address) for address in addresses]
        if not parsed:
            raise UnavailableError("no address to dial")
        peer = parsed[0][1]
        if any(other != peer for _, other in parsed):
            raise UnavailableError("the addresses name different peers")
        if peer == self._peer_id:
            raise UnavailableError("that address is this peer's own")
        if self._reputation.is_banned(peer, trio.current_time()):
            raise UnavailableError("the peer is banned for misbehaviour")
        lock = self._dialing.setdefault(peer, trio.Lock())
        try:
            async with lock:
                if not self._is_connected(peer):
                    await self._dial([address for address, _ in parsed], ID(peer))
        finally:
            if not lock.statistics().tasks_waiting:
                self._dialing.pop(peer, None)
        with trio.move_on_after(_HELLO_SECONDS):
            await self._pubsub.wait_for_peer(ID(peer), _HELLO_SECONDS)
            await self._pubsub.wait_for_hello(ID(peer))
        return peer

    async def _dial(self, addresses: Sequence[Multiaddr], peer: ID) -> None:
        reason = "timed out"
        for address in addresses:
            with trio.move_on_after(self._limits.dial_seconds):
                try:
                    await self._swarm.dial_addr(address, peer)
                except Exception as error:  # noqa: BLE001 - the adapter's edge
                    reason = _innermost(error)
                else:
                    return
        self._counters["dials_failed"] += 1
        raise UnavailableError(f"cannot reach {peerid.to_text(peer.to_bytes())}: {reason}")

    async def disconnect(self, peer: bytes) -> None:
        with trio.move_on_after(_CLOSE_SECONDS):
            await self._swarm.close_peer(ID(peer))

    def connected_peers(self) -> frozenset[bytes]:
        return frozenset(
            peer.to_bytes()
            for peer, connections in self._swarm.get_connections_map().items()
            if any(not connection.is_closed for connection in connections)
        )

    def note_neighbours(self, peer: bytes, neighbours: frozenset[bytes]) -> None:
        self._router.note_neighbours(ID(peer), neighbours)

    def _is_connected(self, peer: bytes) -> bool:
        return any(not connection.is_closed for connection in self._swarm.get_connections(ID(peer)))

    def _strike(self, peer: bytes, weight: float) -> None:
        self._counters["strikes"] += 1
        if self._reputation.strike(peer, trio.current_time(), weight):
            self._counters["peers_banned"] += 1
            # A peer that libp2p blacklists stays connected; ours does not.
            if self._nursery is not None:
                self._nursery.start_soon(self.disconnect, peer)

    def _forget(self, peer: ID) -> None:
        if not self._is_connected(peer.to_bytes()):
            self._requests.forget(peer.to_bytes())

    # - gossip -
    async def publish(self, topic: str, data: bytes) -> None:
        """See ports.Gossip.  Raises LocalProtocolError above 1 MiB, which libp2p would drop in silence."""
        if len(data) > MAX_MESSAGE_BYTES:
            raise LocalProtocolError(f"gossip message of {len(data)} bytes, at most {MAX_MESSAGE_BYTES}")
        await self._pubsub.publish(topic, data)
        self._counters["gossip_published"] += 1

    async def subscribe(self, topic: str, validator: Validator) -> AsyncIterator[GossipMessage]:
        return await self._pubsub.open_mailbox(topic, validator)

    async def unsubscribe(self, topic: str) -> None:
        await self._pubsub.close_mailbox(topic)

    # - requests -
    def serve(self, protocol: str, handler: RequestHandler, *, max_request_bytes: int) -> None:
        self._requests.serve(protocol, handler, max_request_bytes=max_request_bytes)

    async def request(
        self, peer: bytes, protocol: str, data: bytes, *, max_response_bytes: int, deadline_seconds: float
    ) -> bytes:
        if not self._is_connected(peer):
            raise UnavailableError("not connected to that peer")
        return await self._requests.request(
            peer,
            protocol,
            data,
            max_response_bytes=max_response_bytes,
            deadline_seconds=deadline_seconds,
        )

    # - measurements -
    def traffic(self) -> Traffic:
        return self._meter.read()

    def counters(self) -> Mapping[str, int]:
        """What was dropped, refused and punished, by name; a name that is absent is zero."""
        return dict(self._counters)


async def _bind(address: str, port: int) -> list[trio.SocketListener]:
    """Defect: libp2p listens with SO_REUSEPORT, so that a second process on the same port starts without an
    error and the two share the connections at random."""
    try:
        return list(await trio.open_tcp_listeners(port, host=address))
    except OSError as error:
        code = _errno(error)
        if code == errno.EADDRINUSE:
            raise PortTakenError(
                f"port {port} of {address} is taken", "choose another one, or 0 for any"
            ) from error
        if code == errno.EACCES:
            raise PortTakenError(f"port {port} needs privileges", "choose one above 1023") from error
        raise UserError(f"cannot listen on {address}:{port}", "give an address of this machine") from error


def _errno(error: BaseException | None) -> int | None:
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        error = error.__cause__
    return None


def _reachable(address: str) -> list[str]:
    """Where a wildcard is reached: the interface that the default route leaves by.  Sends nothing."""
    if address not in ("", "0.0.0.0", "::"):  # noqa: S104 - a comparison
        return [address]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # RFC 5737: nobody's
            return [str(probe.getsockname()[0])]
        except OSError:
            return ["127.0.0.1"]


def _multiaddress(name: str, port: int) -> str:
    try:
        socket.inet_pton(socket.AF_INET, name)
    except OSError:
        kind = "ip6" if ":" in name else "dns4"
    else:
        kind = "ip4"
    return f"/{kind}/{name}/tcp/{port}"


def _parse(address: str) -> tuple[Multiaddr, bytes]:
    """Address without, and id of the peer.  Addresses come from strangers: any fault is UnavailableError."""
    try:
        if len(address) > _MAX_ADDRESS_CHARACTERS:
            raise ValueError("too long")
        where, separator, who = address.rpartition("/p2p/")
        if not separator:
            raise ValueError("no peer id at its end")
        peer = peerid.from_text(who)
        parsed = Multiaddr(where)
        names = [part.name for part in parsed.protocols()]
        if len(names) != 2 or names[0] not in ("ip4", "ip6", "dns", "dns4", "dns6") or names[1] != "tcp":
            raise ValueError("not a TCP address")
    except (FlockError, ValueError, LookupError) as error:
        raise UnavailableError(f"malformed address: {error}") from error
    except Exception as error:
        raise UnavailableError("malformed address") from error
    return parsed, peer


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).splitlines()
    return text[0][:200] if text else type(error).__name__


async def _close_quietly(connection: INetConn) -> None:
    with contextlib.suppress(Exception):
        await connection.close()
