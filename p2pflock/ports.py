"""The ports: what the protocol needs from the outside world, and nothing more.

Law: this file holds interfaces and the small frozen values that cross them.  An adapter package implements
a port over exactly one foreign library; p2pflock.testing implements every port in memory; one conformance
suite (p2pflock.testing.conformance) runs over both.  Ports speak in bytes, integers and our own value
types: no torch tensor, libp2p peer or web3 contract crosses this line.

Async methods are trio coroutines and may be cancelled at any checkpoint.  Sync methods never block on the
network, except Chain and Pinning, which the node calls in a worker thread.

Errors at every port: `errors.RemoteProtocolError` for a peer's fault, `errors.EnvironmentError_` or
`errors.NetworkError` for the world's.  A foreign exception that escapes an adapter is a bug.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from p2pflock.primitives.cid import CID


# --- time -----------------------------------------------------------------------------------------------
class Clock(Protocol):
    """Where time comes from, so that a test can own it."""

    def monotonic_seconds(self) -> float:
        """Seconds since an arbitrary start; never goes back."""
        ...

    def unix_seconds(self) -> int:
        """Wall clock, whole seconds since 1970, UTC."""
        ...


# --- keys -----------------------------------------------------------------------------------------------
class Signer(Protocol):
    """The three keys of one peer, unlocked.  Private scalars never leave the implementation, except the
    Ed25519 seed, which both network stacks need to speak Noise."""

    @property
    def peer_id(self) -> bytes:
        """38-byte identity multihash of the Ed25519 public key (00 24 08 01 12 20 ‖ key32)."""
        ...

    @property
    def address(self) -> bytes:
        """20-byte EVM address of the operator."""
        ...

    @property
    def bls_public_key(self) -> bytes:
        """48-byte compressed G1 point."""
        ...

    def sign_bls(self, root: bytes) -> bytes:
        """96-byte min-pk signature (POP suite) of a 32-byte signing root."""
        ...

    def prove_possession(self, root: bytes) -> bytes:
        """96-byte signature of `root` under the proof-of-possession DST."""
        ...

    def sign_ed25519(self, root: bytes) -> bytes:
        """64-byte signature of a 32-byte signing root."""
        ...

    def sign_evm(self, digest: bytes) -> bytes:
        """65-byte r‖s‖v (v in {27, 28}, low s) over a 32-byte digest."""
        ...

    def ed25519_seed(self) -> bytes:
        """32-byte private seed for the Noise handshakes."""
        ...

    def evm_private_key(self) -> bytes:
        """32-byte secp256k1 key; only chain/ may call this, to sign transactions."""
        ...


# --- gossip (libp2p) ------------------------------------------------------------------------------------
class Verdict(enum.Enum):
    """What a gossip validator says of a message (gossipsub v1.1)."""

    ACCEPT = "accept"  # deliver and forward
    IGNORE = "ignore"  # neither, and nobody is to blame (late, duplicate, unknown yet)
    REJECT = "reject"  # neither, and the forwarder loses score


@dataclass(frozen=True, slots=True)
class GossipMessage:
    topic: str
    sender: bytes  # author's peer id, authenticated by the pubsub signature
    data: bytes


Validator = Callable[[bytes, bytes], Verdict]  # (author peer id, data) -> verdict; pure, under 5 ms


class Gossip(Protocol):
    """Small signed messages to everyone on a topic.  At most 1 MiB each; best effort, any order, possibly
    twice.  Slow subscribers lose the oldest messages (counted), they never grow memory."""

    async def publish(self, topic: str, data: bytes) -> None: ...

    async def subscribe(self, topic: str, validator: Validator) -> AsyncIterator[GossipMessage]:
        """Join a topic; the iterator ends when the host stops.  Own messages are not delivered back."""
        ...

    async def unsubscribe(self, topic: str) -> None: ...


RequestHandler = Callable[[bytes, bytes], Awaitable[bytes]]  # (authenticated peer id, request) -> response


class Requests(Protocol):
    """One request, one response, over an authenticated stream."""

    def serve(self, protocol: str, handler: RequestHandler, *, max_request_bytes: int) -> None: ...

    async def request(
        self, peer: bytes, protocol: str, data: bytes, *, max_response_bytes: int, deadline_seconds: float
    ) -> bytes:
        """Raises UnavailableError when the peer does not answer in time, InvalidMessageError when its
        answer is larger than allowed."""
        ...


class Host(Gossip, Requests, Protocol):
    """A libp2p host: gossip, requests and its connections."""

    @property
    def addresses(self) -> Sequence[str]:
        """Dialable multiaddresses, each ending in /p2p/<peer id>."""
        ...

    async def connect(self, addresses: Sequence[str]) -> bytes:
        """Dial one peer; returns its authenticated id.  Raises UnavailableError."""
        ...

    async def disconnect(self, peer: bytes) -> None: ...

    def connected_peers(self) -> frozenset[bytes]: ...

    def note_neighbours(self, peer: bytes, neighbours: frozenset[bytes]) -> None:
        """`peer` says that it is connected with these: what they publish they send it themselves, so we need not
        pass it on to it.  Replaces what it said before."""
        ...

    def traffic(self) -> Traffic: ...


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes counted at the socket, both directions, control traffic included."""

    sent_bytes: int
    received_bytes: int


# --- swarm (hivemind) -----------------------------------------------------------------------------------
class Discovery(Protocol):
    """Signed peer records under one key per task, with a lifetime.  Whatever comes back is unverified."""

    @property
    def bootstrap_addresses(self) -> Sequence[str]:
        """Multiaddresses by which another peer can join through this one."""
        ...

    async def announce(self, key: str, value: bytes, *, ttl_seconds: float) -> None: ...

    async def lookup(self, key: str) -> Mapping[bytes, bytes]:
        """Peer id -> value, for every live record whose DHT signature holds."""
        ...


class Exchange(Protocol):
    """Payloads of a round, spread epidemically.  Only content that `expect` named is taken in, so what a
    peer can make us hold is bounded by the sum of the expected sizes."""

    async def offer(self, round_key: bytes, cid: CID, payload: bytes) -> None:
        """Make an own payload available to partners of this round."""
        ...

    async def expect(self, round_key: bytes, cid: CID, size_bytes: int) -> None:
        """Allow a foreign payload of this content id and at most this size; the largest size named counts."""
        ...

    async def swap(self, round_key: bytes, partner: bytes, *, deadline_seconds: float) -> Sequence[CID]:
        """Give a partner what it lacks and take what we lack; returns what arrived.  UnavailableError."""
        ...

    async def give(
        self, round_key: bytes, cid: CID, partners: Sequence[bytes], *, deadline_seconds: float
    ) -> Sequence[bytes]:
        """Send a payload that we offered just now to partners that can not have it yet, without asking; those that
        confirm it in time.  Whoever does not expect it lets it go after a moment."""
        ...

    async def collect(self, round_key: bytes) -> Mapping[CID, bytes]:
        """Everything of the round that is here and matches its content id."""
        ...

    async def forget(self, round_key: bytes) -> None: ...

    async def arrivals(self) -> AsyncIterator[tuple[bytes, CID]]:
        """(round key, content id) of each payload as it becomes available, in order of arrival."""
        ...


class DenseAverage(Protocol):
    """hivemind's own dense all-reduce; for trusted LANs and as the baseline (`averaging = "dense"`)."""

    async def average(
        self, round_key: bytes, vector: bytes, members: Sequence[bytes], *, deadline_seconds: float
    ) -> bytes:
        """Mean over the group of little-endian float32 vectors of equal length."""
        ...


class Swarm(Discovery, Exchange, DenseAverage, Protocol):
    """Everything that lives in the hivemind process."""

    def traffic(self) -> Traffic: ...

    def add_addresses(self, peer: bytes, addresses: Sequence[str]) -> None:
        """Remember where a partner listens."""
        ...


# --- training -------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Genesis:
    model_hash: bytes  # sha256 of the canonical safetensors bytes
    weights: CID  # UnixFS CID of the same bytes
    parameters: int


@dataclass(frozen=True, slots=True)
class TrainResult:
    payload: bytes  # canonical encoding of the compressed pseudo-gradient
    steps: int
    samples: int
    loss_micro: int  # mean training loss, in millionths
    leaf_root: bytes  # 32 bytes, Merkle root over weight hashes every J steps
    optimizer_hash: bytes  # 32 bytes, sha256 of the inner optimizer state
    step_micros: int = field(default=0, compare=False)  # time in local steps alone, in 1e-6 s; 0: not known


@dataclass(frozen=True, slots=True)
class PayloadScore:
    """One validator's view of one payload, integers only (training.md: the gate)."""

    is_valid: bool
    cosine_micro: int  # cosine to the public batch's descent direction, millionths, in [-1e6, 1e6]
    loss_delta_micro: int  # held-out loss after minus before applying it alone, millionths


@dataclass(frozen=True, slots=True)
class FoldInput:
    payload: bytes
    weight: int  # > 0, token weight after capping


@dataclass(frozen=True, slots=True)
class FoldResult:
    model_hash: bytes
    weights: CID


@dataclass(frozen=True, slots=True)
class Evaluation:
    loss_micro: int
    accuracy_micro: int  # 0 where the task has no accuracy
    samples: int


class Trainer(Protocol):
    """The learning process: owns the model, never sees the network."""

    async def open(self) -> Genesis:
        """Build the genesis model of the task and load the data.  Raises SpecError, MissingToolError."""
        ...

    async def train(self, round_: int, shard: int, shards: int, seed: bytes, steps: int = 0) -> TrainResult:
        """`steps` local steps (0: the spec's H) from the current checkpoint; may be cancelled, which leaves the
        model as it was.  The result says how many were made."""
        ...

    async def finish(self) -> None:
        """Have a `train` that was called end after the step it is at, and at least one, with what was made.
        Does not wait for it; without such a call nothing happens."""
        ...

    async def score(self, round_: int, payloads: Sequence[bytes], seed: bytes) -> Sequence[PayloadScore]:
        """Each payload against a public batch drawn from `seed`, at the current checkpoint.  `is_valid` says
        exactly whether `fold` of the same round would take the payload in."""
        ...

    async def fold(self, round_: int, inputs: Sequence[FoldInput]) -> FoldResult:
        """Deterministic fold over the current checkpoint; changes nothing until `adopt`.  The result is a
        function of the checkpoint, the round number and the sequence alone, on every machine."""
        ...

    async def adopt(self, model_hash: bytes) -> None:
        """Make the last fold with this hash the current checkpoint."""
        ...

    async def set_dense(self, vector: bytes) -> FoldResult:
        """Candidate checkpoint = parent - mean pseudo-gradient vector; for `averaging = "dense"`."""
        ...

    async def export(self) -> bytes:
        """Canonical safetensors bytes of the current checkpoint."""
        ...

    async def load(self, weights: bytes) -> bytes:
        """Replace the current checkpoint; returns its model hash.  Raises InvalidMessageError."""
        ...

    async def evaluate(self) -> Evaluation:
        """Loss and accuracy of the current checkpoint on the task's test set."""
        ...

    async def sample(self, length: int) -> str:
        """Text from a language model; empty where the task has none."""
        ...


# --- storage --------------------------------------------------------------------------------------------
@runtime_checkable
class BlobStore(Protocol):
    """Content-addressed blocks.  What `get` returns always hashes to the id it was asked for."""

    def put(self, cid: CID, data: bytes) -> None:
        """Store one block.  Raises InvalidMessageError when the data does not hash to `cid`,
        DiskFullError when there is no room."""
        ...

    def get(self, cid: CID) -> bytes:
        """Raises UnavailableError when the block is not here or what is here is damaged."""
        ...

    def has(self, cid: CID) -> bool: ...

    def pin(self, cid: CID) -> None:
        """Keep this root and everything it links to."""
        ...

    def unpin(self, cid: CID) -> None: ...

    def pins(self) -> Iterator[CID]: ...


# --- chain ----------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Member:
    """One committee seat, in snapshot order."""

    peer: bytes  # 38-byte peer id
    address: bytes  # 20 bytes
    bls_public_key: bytes  # 48 bytes
    weight: int  # stake in wei, > 0, < 2^128


@dataclass(frozen=True, slots=True)
class TaskOnChain:
    task: bytes  # 32 bytes
    creator: bytes
    reward_wei: int
    rounds: int
    last_round: int
    head: bytes  # 32 bytes, chained digest


@dataclass(frozen=True, slots=True)
class AnchorReceipt:
    round: int
    transaction: bytes  # 32-byte hash
    gas_used: int
    block_number: int
    head: bytes


@dataclass(frozen=True, slots=True)
class AnchorCall:
    """Everything the anchor contract checks; see contracts/src/interfaces/IAnchor.sol."""

    task: bytes
    epoch: int
    round: int
    view: int
    record_digest: bytes
    rewards_root: bytes
    signers: int  # bitmap, bit i = member i of the snapshot
    signature: bytes  # 96-byte aggregate


class Chain(Protocol):
    """The contracts, seen through one RPC endpoint.  Blocking: call it in a thread."""

    @property
    def chain_id(self) -> int: ...

    @property
    def anchor_address(self) -> bytes: ...

    def register(self, signer: Signer) -> None:
        """Bind operator, BLS key (with proof of possession) and peer id; no-op when already so."""
        ...

    def stake(self, signer: Signer, amount_wei: int) -> None: ...

    def create_task(self, signer: Signer, task: bytes, rounds: int, reward_wei: int) -> None: ...

    def open_epoch(self, signer: Signer, task: bytes, epoch: int) -> None:
        """Build the committee snapshot of an epoch from stake; anyone may; no-op when it exists."""
        ...

    def task(self, task: bytes) -> TaskOnChain: ...

    def committee(self, task: bytes, epoch: int) -> Sequence[Member]: ...

    def anchor(self, signer: Signer, call: AnchorCall) -> AnchorReceipt:
        """Submit; when somebody else already anchored the same digest, returns their receipt."""
        ...

    def anchored(self, task: bytes, round_: int) -> AnchorReceipt | None: ...

    def anchored_call(self, task: bytes, round_: int) -> AnchorCall | None:
        """What was anchored, signature and bitmap included, read back from the chain alone."""
        ...

    def claim(
        self, signer: Signer, task: bytes, round_: int, cumulative_wei: int, proof: Sequence[bytes]
    ) -> bytes:
        """Claim matured rewards of `round_`'s root; returns the transaction hash."""
        ...

    def claimed(self, task: bytes, address: bytes) -> int: ...

    def balance(self, address: bytes) -> int:
        """FLOCK balance in wei."""
        ...
