"""A rogue peer of the gossip swarm: stock hivemind with hand-made requests, driven by test_gossip_attacks.py.

A process of its own, because hivemind and libp2p cannot share the interpreter of the tests.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import P2P, PeerID
from hivemind.proto import averaging_pb2, dht_pb2, runtime_pb2
from hivemind.utils import MSGPackSerializer

from p2pflock import processes
from p2pflock.gossip import dense, limits, validator

FLOOD_BYTES = 96 << 20


class Rogue:
    def __init__(self, p2p, key, config):
        self.p2p, self.key = p2p, key
        self.peer = p2p.peer_id.to_bytes()
        self.task = config["task"]
        self.averager = dense.DenseAverager(p2p, self._no_connect)
        self.dht = f"p2pflock/1/{self.task.hex()}/dht"

    def sign(self, key, subkey, value, expiry, task=None):
        root = validator.compute_record_root(task or self.task, key, subkey, value, expiry)
        return value + self.key.sign(root)

    async def call_dht(self, victim, method, request, answer):
        return await self.p2p.call_protobuf_handler(PeerID(victim), f"{self.dht}.{method}", request, answer)

    async def store(self, victim, rows):
        """rows of (key, tag, value, expiry, in_cache)."""
        keys, tags, values, expiries, caches = (list(column) for column in zip(*rows))
        request = dht_pb2.StoreRequest(
            keys=keys, subkeys=tags, values=values, expiration_time=expiries, in_cache=caches
        )
        answer = await self.call_dht(victim, "rpc_store", request, dht_pb2.StoreResponse)
        return list(answer.store_ok)

    async def forge(self, params):
        """Each way to write what is not ours; name -> whether the victim took it."""
        victim, author = params["victim"], params["author"]
        key = DHTID.generate(params["key"]).to_bytes()
        soon, foreign = time.time() + 60, validator.encode_subkey(author)
        own = validator.encode_subkey(self.peer)
        text = validator.encode_value(b"forged")
        false, none = MSGPackSerializer.dumps(False), MSGPackSerializer.dumps(None)
        dictionary = DictionaryDHTValue()
        dictionary.store(author, text + bytes(64), soon)
        rows = {
            "regular key": (key, none, text, soon, False),
            "signed regular key": (key, none, self.sign(key, none, text, soon), soon, False),
            "unsigned": (key, foreign, text, soon, False),
            "signed by another": (key, foreign, self.sign(key, foreign, text, soon), soon, False),
            "tombstone of the author": (key, foreign, self.sign(key, foreign, false, soon), soon, False),
            "own tombstone False": (key, own, self.sign(key, own, false, soon), soon, False),
            "own tombstone None": (key, own, self.sign(key, own, none, soon), soon, False),
            "an hour": (key, own, self.sign(key, own, text, soon + 3600), soon + 3600, False),
            "another task": (key, own, self.sign(key, own, text, soon, bytes(32)), soon, False),
            "into the cache": (key, own, self.sign(key, own, text, soon), soon, True),
            "a megabyte": (key, own, bytes(1 << 20), soon, False),
            "dictionary": (key, b"", MSGPackSerializer.dumps(dictionary), soon, False),
        }
        taken = {}
        for name, row in rows.items():
            taken[name] = (await self.store(victim, [row]))[0]
        taken["control: own record"] = (
            await self.store(victim, [(key, own, self.sign(key, own, text, soon), soon, False)])
        )[0]
        return taken

    async def hoard(self, params):
        """A hundred valid records of our own; how many were kept."""
        kept, own, soon = 0, validator.encode_subkey(self.peer), time.time() + 60
        value = validator.encode_value(bytes(8000))
        for number in range(100):
            key = DHTID.generate(b"hoard %d" % number).to_bytes()
            kept += sum(
                await self.store(params["victim"], [(key, own, self.sign(key, own, value, soon), soon, False)])
            )
        return kept

    async def impersonate_nodes(self, params):
        """Ping under DHT ids that are not ours."""
        for number in range(params["count"]):
            info = dht_pb2.NodeInfo(node_id=hashlib.sha1(b"%d" % number).digest())
            await self.call_dht(params["victim"], "rpc_ping", dht_pb2.PingRequest(peer=info), dht_pb2.PingResponse)

    async def ask_too_much(self, params):
        """Two oversized requests; the errors that came back."""
        errors = []
        for request in (
            dht_pb2.FindRequest(keys=[os.urandom(20) for _ in range(10_000)]),
            dht_pb2.FindRequest(keys=[b"short"]),
        ):
            try:
                await self.call_dht(params["victim"], "rpc_find", request, dht_pb2.FindResponse)
                errors.append("")
            except Exception as error:
                errors.append(str(error))
        return errors

    async def flood_requests(self, params):
        """Pings as fast as possible; how many were refused."""
        refused = 0
        for _ in range(20):
            calls = [
                self.call_dht(params["victim"], "rpc_ping", dht_pb2.PingRequest(), dht_pb2.PingResponse)
                for _ in range(50)
            ]
            answers = await asyncio.gather(*calls, return_exceptions=True)
            refused += sum(isinstance(answer, Exception) for answer in answers)
        return refused

    async def bomb(self, params):
        """Announce 2^40 bytes and send; how many went through before the victim hung up."""
        _, _, writer = await self.p2p.call_binary_stream_handler(PeerID(params["victim"]), params["protocol"])
        sent, block = 0, bytes(1 << 20)
        try:
            writer.write(params["header"])
            while sent < FLOOD_BYTES:
                writer.write(block)
                await asyncio.wait_for(writer.drain(), 3)
                sent += len(block)
        except (OSError, asyncio.TimeoutError):
            pass
        writer.transport.abort()
        return sent

    async def average(self, params):
        """Take part in a dense average, as the kind of liar that is asked for."""
        stock = dense._Runner._generate_input_for_peer

        async def lie(runner, index):
            async for message in stock(runner, index):
                if params["lie"] == "weight":
                    message.weight = 1e9
                if params["lie"] == "dtype":
                    message.tensor_part.dtype = "float64"
                if params["lie"] == "infinite":
                    size = tuple(message.tensor_part.size)
                    message.tensor_part.buffer = torch.full(size, float("inf")).numpy().tobytes()
                if params["lie"] == "compressed":
                    message.tensor_part.compression = runtime_pb2.UNIFORM_8BIT
                yield message

        dense._Runner._generate_input_for_peer = lie
        try:
            return await self.averager.average(params["round"], params["vector"], params["members"], 5.0)
        except Exception:
            return b""
        finally:
            dense._Runner._generate_input_for_peer = stock

    async def _no_connect(self, peer):
        """Connected since the start."""

    async def wait_in_groups(self, params):
        """Open average streams for groups that do not exist; how many were turned away at once."""
        stub = dense.DenseAverager.get_stub(self.p2p, PeerID(params["victim"]))

        async def one(number):
            async def parts():
                yield averaging_pb2.AveragingData(group_id=hashlib.sha256(b"%d" % number).digest())

            try:
                async for _ in await stub.rpc_aggregate_part(parts()):
                    pass
            except Exception:
                return 1
            return 1

        tasks = [asyncio.create_task(one(number)) for number in range(params["count"])]
        done, pending = await asyncio.wait(tasks, timeout=1.5)
        for task in pending:
            task.cancel()
        return len(done)


async def setup(config, emit):
    key = Ed25519PrivateKey.from_private_bytes(config["seed"])
    descriptor = os.memfd_create("rogue")
    os.write(descriptor, limits.encode_identity(config["seed"], key.public_key().public_bytes_raw()))
    p2p = await P2P.create(
        initial_peers=config["initial_peers"],
        identity_path=f"/proc/{os.getpid()}/fd/{descriptor}",
        check_if_identity_free=False,
        nat_port_map=False,
        startup_timeout=60,
    )
    rogue = Rogue(p2p, key, config)
    await rogue.averager.add_p2p_handlers(p2p, namespace=None)
    names = "forge hoard impersonate_nodes ask_too_much flood_requests bomb average wait_in_groups"
    return {name: getattr(rogue, name) for name in names.split()} | {"ready_value": rogue.peer}


if __name__ == "__main__":
    processes.serve_asyncio(setup)
