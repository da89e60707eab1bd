"""What stock hivemind 1.1.12 leaves open, closed: each repair names its attack.

Law: this file changes hivemind from outside, once, before anything of it is created (`install`).  It decides
how much a stranger can make this process hold or do; who may write what into the DHT is validator.py's.

Tests: tests/attacks/test_gossip_attacks.py.
"""
# No `from __future__ import annotations`: hivemind reads the type hints of rpc_* methods.

import asyncio
import hashlib
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import hivemind.dht.node as hivemind_node
import hivemind.p2p.p2p_daemon as hivemind_daemon
import hivemind.p2p.p2p_daemon_bindings.control as hivemind_control
import msgpack
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.proto import dht_pb2
from hivemind.utils.timed_storage import ValueWithExpiration

from p2pflock.errors import InvalidMessageError
from p2pflock.gossip import records, validator
from p2pflock.gossip.meter import LocalMeter
from p2pflock.processes import die_with_parent

MAX_MESSAGE_BYTES = 1 << 20  # a message on a protobuf stream; a part of the dense average is 256 KiB
MAX_KEYS_PER_REQUEST = 64
MAX_RECORDS_PER_KEY = 2048
MAX_DICTIONARY_BYTES = 3 << 20
MAX_ROUTING_ENTRIES = 4096
REQUESTS_PER_SECOND = 100.0  # of one peer, in the long run
REQUEST_BURST = 400.0
REMEMBERED_PEERS = 4096


def compute_node_id(peer: bytes) -> DHTID:
    """The one DHT id that a peer id may use.

    Attack: a peer that picks its DHT id freely sits next to any key it wants to hide, and a peer that pings
    under a million ids fills every routing table.
    """
    return DHTID(int.from_bytes(hashlib.sha1(b"p2pflock/node\0" + peer).digest(), "big"))  # noqa: S324 - the DHT's id space


# --- memory bomb: an 8-byte length header without a cap ---------------------------------------------------
async def _receive_raw_data(reader: asyncio.StreamReader) -> bytes:
    """Attack: announce 2^60 bytes and keep sending; stock hivemind buffers all of it."""
    size = int.from_bytes(await reader.readexactly(P2P.HEADER_LEN), P2P.BYTEORDER)
    if size > MAX_MESSAGE_BYTES:
        raise InvalidMessageError(f"message of {size} bytes, at most {MAX_MESSAGE_BYTES}")
    return await reader.readexactly(size)


# --- a dead reader: one odd answer ends all RPC -----------------------------------------------------------
_read_from_persistent_conn = hivemind_control.ControlClient._read_from_persistent_conn


async def _keep_reading(self: Any, reader: asyncio.StreamReader) -> None:
    """An answer that comes in the very moment its call is cancelled raises InvalidStateError inside the only
    reader task, after which no DHT call of this process ever returns.  Each message was read whole, so the
    reader can go on with the next."""
    while True:
        try:
            await _read_from_persistent_conn(self, reader)
        except (asyncio.InvalidStateError, ValueError, KeyError):
            continue
        return


# --- dictionaries of records ------------------------------------------------------------------------------
def _unpack_dictionary(raw: bytes) -> DictionaryDHTValue:
    """Attack: a dictionary of hundreds of thousands of tiny or nested entries, expanded before it is checked."""
    if len(raw) > MAX_DICTIONARY_BYTES:
        raise InvalidMessageError("dictionary too large")
    try:
        _, _, items = msgpack.unpackb(raw, raw=False, max_array_len=MAX_RECORDS_PER_KEY, ext_hook=_refuse)
        entries = [(author, value, float(expiry)) for author, value, expiry in items]
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise InvalidMessageError("malformed dictionary") from error
    if not all(type(author) is bytes and type(value) is bytes for author, value, _ in entries):
        raise InvalidMessageError("malformed dictionary")
    return build_dictionary(entries).value


def _refuse(code: int, data: bytes) -> Any:
    raise ValueError("extension type")


def build_dictionary(entries: Iterable[records.Entry]) -> ValueWithExpiration:
    """hivemind's own form of the records under one key."""
    dictionary = DictionaryDHTValue()
    with dictionary.freeze():
        for author, value, expiry in entries:
            dictionary.store(author, value, expiry)
    return ValueWithExpiration(dictionary, dictionary.latest_expiration_time)


# --- the DHT's requests -----------------------------------------------------------------------------------
class _Allowance:
    """Requests per peer, a token bucket each.

    Attack: a peer that asks without end keeps the event loop from everything else.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._buckets: OrderedDict[bytes, tuple[float, float]] = OrderedDict()

    def take(self, peer: bytes) -> bool:
        now = self._now()
        tokens, since = self._buckets.pop(peer, (REQUEST_BURST, now))
        tokens = min(REQUEST_BURST, tokens + (now - since) * REQUESTS_PER_SECOND)
        is_allowed = tokens >= 1.0
        self._buckets[peer] = (tokens - 1.0 if is_allowed else tokens, now)
        if len(self._buckets) > REMEMBERED_PEERS:
            self._buckets.popitem(last=False)
        return is_allowed


class TaskDHTProtocol(DHTProtocol):
    """hivemind's DHT protocol for one task, with bounds.

    Its name on the wire holds the task id (see `install`), so nodes of other tasks and stock nodes do not mix
    with ours.
    """

    _rpc_handlers = None
    _stub_type = None

    def __init__(self, *, _initialized_with_create: bool = False) -> None:
        super().__init__(_initialized_with_create=_initialized_with_create)
        self._records = records.RecordStore(time.time, build_dictionary)
        self._allowance = _Allowance(time.monotonic)
        self.refused = 0

    @property
    def storage(self) -> records.RecordStore:
        return self._records

    @storage.setter
    def storage(self, stock: object) -> None:
        """hivemind's `create` would put its unbounded storage here."""

    def _admit(self, context: P2PContext, keys: int) -> None:
        if not self._allowance.take(context.remote_id.to_bytes()):
            self.refused += 1
            raise InvalidMessageError("too many requests")
        if keys > MAX_KEYS_PER_REQUEST:
            self.refused += 1
            raise InvalidMessageError("too many keys in one request")

    async def rpc_ping(self, request: dht_pb2.PingRequest, context: P2PContext) -> dht_pb2.PingResponse:
        self._admit(context, 0)
        return await super().rpc_ping(request, context)

    async def rpc_find(self, request: dht_pb2.FindRequest, context: P2PContext) -> dht_pb2.FindResponse:
        """Attack: 4 MiB of keys, each answered with twenty neighbours: 200 MB of answer."""
        self._admit(context, len(request.keys))
        return await super().rpc_find(request, context)

    async def rpc_store(self, request: dht_pb2.StoreRequest, context: P2PContext) -> dht_pb2.StoreResponse:
        """Each record by itself: stock hivemind stops a dictionary at the first record that it already has in
        a newer version, takes regular keys from anybody, and lets strangers fill a cache."""
        self._admit(context, len(request.keys))
        columns = (request.keys, request.subkeys, request.values, request.expiration_time, request.in_cache)
        if len({len(column) for column in columns}) != 1:
            raise InvalidMessageError("store request with columns of unequal length")
        if request.peer.node_id:
            self._greet(dht_pb2.PingRequest(peer=request.peer), context)
        stored = [self._take_in(*row) for row in zip(*columns, strict=True)]
        return dht_pb2.StoreResponse(store_ok=stored, peer=self.node_info)

    def _greet(self, ping: dht_pb2.PingRequest, context: P2PContext) -> None:
        task = asyncio.create_task(super().rpc_ping(ping, context))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())

    def _take_in(self, key: bytes, tag: bytes, value: bytes, expiry: float, in_cache: object) -> bool:
        if in_cache or tag == self.IS_REGULAR_VALUE or len(key) != validator.KEY_BYTES:
            self.refused += 1
            return False
        if tag != self.IS_DICTIONARY:
            return self._take_in_record(key, tag, value, expiry)
        if len(value) > MAX_DICTIONARY_BYTES:
            self.refused += 1
            return False
        dictionary = self.serializer.loads(value)
        if not isinstance(dictionary, DictionaryDHTValue):
            return False
        with dictionary.freeze():
            taken = [
                type(author) is bytes
                and self._take_in_record(key, validator.encode_subkey(author), *dictionary.data[author])
                for author in list(dictionary.data)
            ]
        return any(taken)

    def _take_in_record(self, key: bytes, subkey: bytes, value: bytes, expiry: float) -> bool:
        if not self._validate_record(key, subkey, value, expiry):
            return False
        return self._records.store_subkey(DHTID.from_bytes(key), subkey[2:], value, expiry)

    def _validate_dictionary(self, key_bytes: bytes, dictionary: DictionaryDHTValue) -> bool:
        """Attack: stock hivemind throws a whole answer away for one bad record in it; one peer that gets such
        a record into a node would blind everybody for the key."""
        with dictionary.freeze():
            for author in list(dictionary.data):
                value, expiry = dictionary.data[author]
                subkey = validator.encode_subkey(author) if type(author) is bytes else b""
                if not self._validate_record(key_bytes, subkey, value, expiry):
                    del dictionary[author]
        return bool(dictionary.data)

    async def call_find(self, peer: PeerID, keys: Any) -> Any:
        """Attack: an answer with neighbours that do not exist or stand where they may not."""
        answer = await super().call_find(peer, keys)
        if answer is None:
            return None
        return {
            key: (value, dict(list(filter(_is_own_id, nearest.items()))[: self.bucket_size]))
            for key, (value, nearest) in answer.items()
        }

    async def update_routing_table(self, node_id: Any, peer_id: PeerID, responded: Any = 1) -> None:
        table = self.routing_table
        if responded and node_id is not None and not _is_own_id((node_id, peer_id)):
            self.refused += 1
            return
        if responded and node_id not in table and len(table.uid_to_peer_id) >= MAX_ROUTING_ENTRIES:
            return
        await super().update_routing_table(node_id, peer_id, responded)


def _is_own_id(entry: tuple[Any, PeerID]) -> bool:
    return entry[0] == compute_node_id(entry[1].to_bytes())


# --- putting it in ----------------------------------------------------------------------------------------
class _Shadow:
    """A module with some names replaced, for one importer only."""

    def __init__(self, module: Any, **replaced: Any) -> None:
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


async def _start_dying_with_parent(*arguments: Any, **options: Any) -> Any:
    """p2pd must not outlive us, whoever kills us and how: the kernel sees to it.  Stock p2pd leaves when its
    control connection closes, unless it hangs."""
    return await asyncio.create_subprocess_exec(*arguments, preexec_fn=die_with_parent, **options)


def install(task: bytes, local: LocalMeter, socket_directory: str) -> None:
    """Mend hivemind in this process.

    Args:
        task: 32-byte task id; DHT nodes of different tasks do not see one another.
        local: counts the bytes between us and p2pd.
        socket_directory: private to this process; stock hivemind puts its control sockets in /tmp.
    """
    P2P.receive_raw_data = staticmethod(_receive_raw_data)
    P2P._UNIX_SOCKET_PREFIX = f"/unix{socket_directory}/"
    hivemind_control.ControlClient._read_from_persistent_conn = _keep_reading
    hivemind_control.asyncio = _Shadow(
        asyncio, open_unix_connection=local.open_unix_connection, start_unix_server=local.start_unix_server
    )
    hivemind_daemon.asyncio = _Shadow(
        asyncio,
        subprocess=_Shadow(asyncio.subprocess, create_subprocess_exec=_start_dying_with_parent),
    )
    DictionaryDHTValue.unpackb = staticmethod(_unpack_dictionary)
    TaskDHTProtocol.__name__ = f"p2pflock/1/{task.hex()}/dht"
    hivemind_node.DHTProtocol = TaskDHTProtocol


def encode_identity(seed: bytes, public_key: bytes) -> bytes:
    """libp2p's protobuf of an Ed25519 private key, as p2pd reads it."""
    return struct.pack("BBBB", 8, 1, 18, 64) + seed + public_key
