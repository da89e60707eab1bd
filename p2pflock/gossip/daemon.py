"""Starting hivemind in this process: the Go daemon p2pd, the DHT node, and the causes when they do not start.

Law: after `open_stack` returns, the daemon listens with our identity, the DHT node has met at least one
bootstrap peer (where any was named), and nothing on disk holds the key: it reaches p2pd through an anonymous
memory file.  Everything hivemind or p2pd may raise at start-up is turned into an error of ours here.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hivemind.dht.node import DHTNode
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError
from hivemind.utils.multiaddr import Multiaddr

from p2pflock.errors import BootstrapError, PortTakenError, SpecError, StartupError
from p2pflock.gossip import limits, validator
from p2pflock.gossip.meter import LocalMeter, NetworkMeter
from p2pflock.primitives import peerid

DIRECTORY_PREFIX = "p2pflock-gossip-"
DHT_WAIT_SECONDS = 3.0  # for one answer of one node
CONNECT_SECONDS = 5.0
GIVE_WAY_SECONDS = 0.5  # to a peer that may be dialling us: two trips there and back, and then some
RETRY_SECONDS = 0.5  # between attempts to reach a bootstrap peer
MAINTENANCE_SECONDS = 5.0
PING_PAUSE_SECONDS = 60.0  # before we ask a peer again that does not speak our DHT
MAX_KNOWN_PEERS = 4096
MAX_ADDRESSES_PER_PEER = 8


@dataclass(frozen=True, slots=True)
class StackConfig:
    task: bytes  # 32 bytes
    seed: bytes  # 32 bytes, Ed25519
    listen_host: str
    listen_port: int  # 0: any
    announce_host: str  # empty: what the daemon sees
    initial_peers: Sequence[str]
    startup_seconds: float
    bootstrap_seconds: float  # how long to retry while no bootstrap peer answers


@dataclass(slots=True)
class Stack:
    """The running pieces of hivemind."""

    p2p: P2P
    node: DHTNode
    network: NetworkMeter
    peer: bytes
    addresses: Sequence[str]
    directory: Path
    known: dict[bytes, tuple[str, ...]]  # where peers listen, as far as we were told
    lock: int
    met: set[bytes] = field(default_factory=set)  # whom we had a connection with when we last looked

    def remember(self, peer: bytes, addresses: Sequence[str]) -> None:
        """Keep where a peer listens; malformed and surplus addresses are dropped."""
        usable = tuple(address for address in addresses if _transport_address(address) is not None)
        if usable and (peer in self.known or len(self.known) < MAX_KNOWN_PEERS):
            self.known[peer] = usable[:MAX_ADDRESSES_PER_PEER]

    async def connect(self, peer: bytes) -> None:
        """Dial a peer whose addresses we know; where that fails, p2pd's own routing may still find it.

        Of two that want each other at once the lower peer id dials.  p2pd dials from the port that it listens on, so
        two dials at once are one TCP connection that both opened: it fails, and neither tries again for seconds."""
        addresses = [_transport_address(address) for address in self.known.get(peer, ())]
        if not addresses or peer in self.met:
            return
        with contextlib.suppress(P2PDaemonError, OSError, asyncio.TimeoutError, EOFError):
            give_way_until = time.monotonic() + (GIVE_WAY_SECONDS if peer < self.peer else 0.0)
            while not await self._is_connected(peer):
                if time.monotonic() >= give_way_until:
                    await asyncio.wait_for(self.p2p._client.connect(PeerID(peer), addresses), CONNECT_SECONDS)
                    break
                await asyncio.sleep(GIVE_WAY_SECONDS / 10)
            if len(self.met) >= MAX_KNOWN_PEERS:
                self.met.clear()
            self.met.add(peer)

    async def _is_connected(self, peer: bytes) -> bool:
        return any(info.peer_id.to_bytes() == peer for info in await self.p2p.list_peers())

    async def maintain(self) -> None:
        """Runs for ever: comes back after isolation, and brings connected peers into the DHT's routing."""
        asked: dict[bytes, float] = {}
        while True:
            await asyncio.sleep(MAINTENANCE_SECONDS)
            with contextlib.suppress(P2PDaemonError, OSError, EOFError):
                connected = [info.peer_id for info in await self.p2p.list_peers()]
                self.met &= {peer.to_bytes() for peer in connected}
                if not connected:
                    await asyncio.gather(*(self.connect(peer) for peer in list(self.known)[:16]))
                now = time.monotonic()
                asked = {peer: at for peer, at in asked.items() if now - at < PING_PAUSE_SECONDS}
                for peer in connected:
                    name = peer.to_bytes()
                    if peer not in self.node.protocol.routing_table and name not in asked:
                        asked[name] = now
                        await self.node.protocol.call_ping(peer)

    async def aclose(self) -> None:
        await self.node.shutdown()
        await self.p2p.shutdown()
        shutil.rmtree(self.directory, ignore_errors=True)
        os.close(self.lock)


async def open_stack(config: StackConfig) -> Stack:
    """Start p2pd and the DHT node.

    Raises:
        SpecError: a bootstrap address is malformed.
        PortTakenError: the port is in use.
        BootstrapError: none of the bootstrap peers answered.
        StartupError: the daemon did not start, with its last words.
    """
    key = Ed25519PrivateKey.from_private_bytes(config.seed)
    public_key = key.public_key().public_bytes_raw()
    peer = peerid.from_ed25519(public_key)
    initial = [address for address in config.initial_peers if _parse_bootstrap(address) != peer]
    port = _check_port(config.listen_host, config.listen_port)
    directory, lock = _make_private_directory()
    local = LocalMeter()
    limits.install(config.task, local, str(directory))
    try:
        with _identity_file(limits.encode_identity(config.seed, public_key)) as identity:
            p2p = await _start_daemon(config, port, initial, identity)
        if p2p.peer_id.to_bytes() != peer:
            raise StartupError("the daemon runs under another identity")
        try:
            node = await DHTNode.create(
                p2p=p2p,
                node_id=limits.compute_node_id(peer),
                initial_peers=initial,
                record_validator=validator.RecordValidator(config.task, peer, key.sign, time.time),
                wait_timeout=DHT_WAIT_SECONDS,
                cache_locally=False,
                cache_on_store=False,
                cache_nearest=0,
                strict=False,  # a clock that is off by seconds is no reason not to start: see CLOCK_SLACK_SECONDS
            )
        except RuntimeError as error:
            raise _no_bootstrap(initial) from error
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)
        raise
    stack = Stack(
        p2p=p2p,
        node=node,
        network=NetworkMeter(p2p._child.pid, local),
        peer=peer,
        addresses=[str(address) for address in await p2p.get_visible_maddrs()],
        directory=directory,
        known={},
        lock=lock,
    )
    for address in initial:
        stack.remember(_parse_bootstrap(address), [address])
    return stack


async def _start_daemon(config: StackConfig, port: int, initial: Sequence[str], identity: str) -> P2P:
    version = "ip6" if ":" in config.listen_host else "ip4"
    options: dict[str, Any] = {}
    if config.announce_host:
        kind = _host_kind(config.announce_host)
        options["announce_maddrs"] = [f"/{kind}/{config.announce_host}/tcp/{port}"]
    give_up_at = time.monotonic() + config.bootstrap_seconds
    while True:
        try:
            return await P2P.create(
                initial_peers=list(initial) or None,
                host_maddrs=[f"/{version}/{config.listen_host}/tcp/{port}"],
                identity_path=identity,
                check_if_identity_free=False,  # asks with an RSA helper identity; and ours may just have died
                nat_port_map=False,
                startup_timeout=config.startup_seconds,
                **options,
            )
        except P2PDaemonError as error:
            message = str(error).splitlines()[0] if str(error) else type(error).__name__
            if "address already in use" in message or "failed to listen" in message:
                raise _port_taken(config.listen_host, port) from error
            if "bootstrap" not in message:
                raise StartupError(f"the libp2p daemon did not start: {message[:300]}") from error
            if time.monotonic() >= give_up_at:
                raise _no_bootstrap(initial) from error
            await asyncio.sleep(RETRY_SECONDS)


def _no_bootstrap(initial: Sequence[str]) -> BootstrapError:
    shown = ", ".join(initial[:3]) + (", …" if len(initial) > 3 else "")
    return BootstrapError(
        f"no bootstrap peer answered: {shown}", "check that one of them runs, and its address and firewall"
    )


def _port_taken(host: str, port: int) -> PortTakenError:
    return PortTakenError(f"port {port} on {host} is in use", "choose another --swarm-port, or 0 for any")


def _check_port(host: str, port: int) -> int:
    """The port to listen on; for 0 a free one, so that it can be announced.

    p2pd listens with SO_REUSEPORT: a second one on the same port starts without complaint and takes half of
    the first one's connections.  A bind without that option tells.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise _port_taken(host, port) from error
        return int(probe.getsockname()[1])


def _parse_bootstrap(address: str) -> bytes:
    """Peer id at the end of a bootstrap address.  Raises SpecError."""
    try:
        return PeerID.from_base58(Multiaddr(address)["p2p"]).to_bytes()
    except Exception as error:
        raise SpecError(
            f"malformed bootstrap address: {address[:200]}", "like /ip4/1.2.3.4/tcp/4001/p2p/12D3Koo…"
        ) from error


def _transport_address(address: str) -> Multiaddr | None:
    """The address without /p2p/…, or None when it is malformed."""
    try:
        return Multiaddr(address.split("/p2p/", maxsplit=1)[0])
    except Exception:  # noqa: BLE001 - the parser raises a dozen kinds
        return None


def _host_kind(host: str) -> str:
    if ":" in host:
        return "ip6"
    return "ip4" if host.replace(".", "").isdigit() else "dns4"


@contextlib.contextmanager
def _identity_file(content: bytes) -> Iterator[str]:
    """A path that p2pd can read the key from while it starts, and that never was on a disk."""
    descriptor = os.memfd_create("p2pflock-identity")
    try:
        os.write(descriptor, content)
        yield f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _make_private_directory() -> tuple[Path, int]:
    """A fresh 0700 directory for the control sockets, locked while we live.  Those of killed processes, whose
    lock the kernel released, are removed."""
    parent = Path(tempfile.gettempdir())
    for stale in parent.glob(f"{DIRECTORY_PREFIX}*"):
        with contextlib.suppress(OSError):
            if stale.stat().st_uid != os.geteuid():
                continue
            descriptor = os.open(stale / "lock", os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(stale, ignore_errors=True)
            finally:
                os.close(descriptor)
    directory = Path(tempfile.mkdtemp(prefix=DIRECTORY_PREFIX))
    lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return directory, lock
