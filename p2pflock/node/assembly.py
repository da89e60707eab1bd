"""Puts a peer together from the real adapters and runs it: what `p2pflock run` does.

Law: the only place that chooses implementations.  Start order: cheap checks first (spec, keystore, directory
lock, ports), then the children side by side, then the peer.  Every child dies with this process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from p2pflock.errors import InvalidMessageError, KeystoreError, NetworkError, SpecError, StartupError
from p2pflock.learning.spec import TaskSpec
from p2pflock.node import preflight
from p2pflock.node.clock import SystemClock
from p2pflock.node.context import PeerContext, TaskFacts
from p2pflock.node.events import EventLog
from p2pflock.node.ledger import Ledger
from p2pflock.node.peer import Peer
from p2pflock.node.pinning import Pinning
from p2pflock.params import NetworkParams
from p2pflock.ports import Chain, Signer
from p2pflock.primitives import peerid
from p2pflock.processes import Child
from p2pflock.protocol.collection import Pacing
from p2pflock.protocol.committee import Committee
from p2pflock.protocol.messages import DEFAULT_COHORT, CommitteeBlock, Seat
from p2pflock.protocol.timeouts import Timeouts
from p2pflock.storage import durable
from p2pflock.storage.blocks import DiskStore
from p2pflock.storage.journal import VoteJournal

COMMITTEE_FILE = "committee.cbor"
SPEC_FILE = "task.cbor"
EPOCH = 0
GARBAGE_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class PeerConfig:
    """Everything `p2pflock run` is told.  No secrets: the unlocked signer is passed beside it."""

    home: Path
    spec: TaskSpec
    network: NetworkParams
    bootstrap: Sequence[str] = ()
    listen_host: str = "127.0.0.1"
    announce: Sequence[str] = ()
    control_port: int = 0
    swarm_port: int = 0
    rpc_url: str = ""  # empty: no chain, the committee comes from `committee_file`
    address_book: Path | None = None
    committee_file: Path | None = None
    kubo: str = ""  # multiaddress of a daemon's RPC that checkpoints are pinned at
    trusted_modules: Sequence[str] = ()
    threads: int = 1
    device: str = "auto"
    pacing: Pacing = field(default_factory=Pacing)

    @property
    def events_file(self) -> Path:
        return self.home / "events.jsonl"


def open_chain(rpc_url: str, address_book: Path | None, network: NetworkParams) -> Chain:
    """Raises ChainUnavailableError, SpecError."""
    from p2pflock.chain.addresses import AddressBook
    from p2pflock.chain.evm import EvmChain

    if address_book is None:
        raise SpecError("a chain needs to know its contracts", "pass --address-book FILE")
    return EvmChain(
        rpc_url, AddressBook.load(address_book), timeout_seconds=network.timeouts.rpc_seconds
    )


def load_committee(config: PeerConfig, chain: Chain | None) -> Committee:
    """The committee of the task's epoch, from the chain or from a file.  Raises NetworkError, SpecError."""
    task = config.spec.task_id
    if chain is None:
        path = config.committee_file or config.home / COMMITTEE_FILE
        try:
            block = CommitteeBlock.decode(path.read_bytes())
        except OSError as error:
            raise SpecError(
                f"cannot read the committee file {path}: {error.strerror}",
                "pass --committee FILE, or --rpc URL to take the committee from a chain",
            ) from error
        except InvalidMessageError as error:
            raise SpecError(
                f"{path} is no committee file: {error.message}", "pass the file that the swarm was started with"
            ) from error
        if block.task != task:
            raise SpecError(f"{path} is the committee of another task", "pass the committee of this task")
        return Committee.from_block(block)
    return build_committee(task, EPOCH, chain, cohort=config.spec.committee.cohort)


def build_committee(task: bytes, epoch: int, chain: Chain, *, cohort: int = DEFAULT_COHORT) -> Committee:
    """The committee as the chain has it, which knows seats and no trainers; the cohort is the spec's.  Raises NetworkError when the epoch is not open."""
    members = chain.committee(task, epoch)
    if not members:
        raise NetworkError("the task has no committee on this chain yet", "open the epoch first: p2pflock up does")
    on_chain = chain.task(task)
    return Committee(
        task=task,
        epoch=epoch,
        chain_id=chain.chain_id,
        anchor=chain.anchor_address,
        seats=tuple(Seat(m.peer, m.address, m.bls_public_key, m.weight) for m in members),
        round_budget_wei=on_chain.reward_wei // on_chain.rounds,
        cohort=cohort,
    )


async def run_peer(
    config: PeerConfig,
    signer: Signer,
    *,
    finished: Callable[[], None] = lambda: None,
    listen: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Run until cancelled; `listen` sees every event.  Raises FlockError when something does not come up."""
    from p2pflock.gossip.client import HivemindSwarm, SwarmConfig
    from p2pflock.learning.client import TrainerProcess
    from p2pflock.net.host import Libp2pHost

    preflight.check_modules(config.spec, config.trusted_modules)
    preflight.check_port(config.listen_host, config.control_port, "--control-port")
    preflight.check_port(config.listen_host, config.swarm_port, "--swarm-port")
    config.home.mkdir(parents=True, exist_ok=True)
    logs = config.home / "logs"
    logs.mkdir(exist_ok=True)
    clock = SystemClock()
    chain = open_chain(config.rpc_url, config.address_book, config.network) if config.rpc_url else None
    committee = await trio.to_thread.run_sync(load_committee, config, chain)
    await preflight.check_bootstrap(config.bootstrap, signer.peer_id)
    events = EventLog(config.events_file, clock, listen)
    facts = TaskFacts.of(config.spec, snapshot_every_rounds=config.network.storage.snapshot_every_rounds)
    with (
        DiskStore.open(config.home / "blocks", quota_bytes=config.network.storage.quota_bytes) as store,
        VoteJournal.open(config.home / "votes.journal") as votes,
        VoteJournal.open(config.home / f"ledger-{facts.task.hex()[:16]}.journal") as index,
    ):
        write_run_file(config)
        # For whoever verifies from this home when the chain is gone: `verify --committee`.
        durable.write_file(config.home / COMMITTEE_FILE, committee.to_block().encode())
        spec_block = config.spec.encode()
        store.put(facts.spec, spec_block)
        async with (
            Libp2pHost.open(
                signer.ed25519_seed(),
                listen=(config.listen_host, config.control_port),
                announce=config.announce,
            ) as host,
            trio.open_nursery() as nursery,
        ):
            swarm: HivemindSwarm | None = None
            trainer: TrainerProcess | None = None
            watching = trio.CancelScope()

            async def start_swarm() -> None:
                nonlocal swarm
                swarm = await HivemindSwarm.start(
                    nursery,
                    SwarmConfig(
                        task=facts.task,
                        seed=signer.ed25519_seed(),
                        listen_host=config.listen_host,
                        listen_port=config.swarm_port,
                        announce_host=config.announce[0] if config.announce else "",
                        initial_peers=tuple(config.bootstrap),
                        startup_seconds=config.network.timeouts.startup_seconds,
                    ),
                    stderr_path=logs / "swarm.log",
                )

            async def start_trainer() -> None:
                nonlocal trainer
                trainer = await TrainerProcess.start(
                    nursery,
                    config.spec,
                    state_dir=config.home / "trainer",
                    trusted_modules=config.trusted_modules,
                    threads=config.threads,
                    device=config.device,
                    ready_seconds=config.network.timeouts.startup_seconds,
                    stderr_path=logs / "trainer.log",
                )

            try:
                async with trio.open_nursery() as starting:
                    starting.start_soon(start_swarm)
                    starting.start_soon(start_trainer)
                assert swarm is not None
                assert trainer is not None
                context = PeerContext(
                    signer=signer,
                    committee=committee,
                    seat=committee.seat_of(signer.peer_id),
                    facts=facts,
                    params=config.network,
                    host=host,
                    swarm=swarm,
                    trainer=trainer,
                    store=store,
                    journal=votes,
                    ledger=Ledger(store, index, facts.spec),
                    chain=chain,
                    clock=clock,
                    events=events,
                )
                events.emit(
                    "started",
                    pid=os.getpid(),
                    peer=peerid.to_text(signer.peer_id),
                    address="0x" + signer.address.hex(),
                    seat=context.seat,
                    swarm_addresses=list(swarm.bootstrap_addresses),
                    control_addresses=list(host.addresses),
                )
                nursery.start_soon(_watch, watching, {"swarm": swarm.child, "trainer": trainer.child})
                nursery.start_soon(_collect_garbage, store)
                if config.kubo:
                    nursery.start_soon(Pinning(context, config.kubo).run)
                peer = Peer(context, pacing=config.pacing, timeouts=Timeouts.create())
                await peer.run(finished=finished)
            finally:
                watching.cancel()  # that the children end now is a consequence, and must not hide the cause
                with trio.CancelScope(shield=True):
                    for child in (swarm, trainer):
                        if child is not None:
                            await child.aclose()
                events.close()
            nursery.cancel_scope.cancel()


async def _collect_garbage(store: DiskStore) -> None:
    """Blocks of proposals that were not decided, now and then."""
    while True:
        await trio.sleep(GARBAGE_SECONDS)
        await trio.to_thread.run_sync(store.collect_garbage)


async def _watch(scope: trio.CancelScope, children: Mapping[str, Child]) -> None:
    """A peer without one of its processes is none: end, loudly, and let whoever supervises restart it."""

    async def watch(name: str, child: Child) -> None:
        await child.wait_ended()
        raise StartupError(f"the {name} process ended", "see the logs directory of this peer; start it again")

    with scope:
        async with trio.open_nursery() as nursery:
            for name, child in children.items():
                nursery.start_soon(watch, name, child)


def write_run_file(config: PeerConfig) -> None:
    """What other commands of this home need to know (status, verify, claim): no secrets.

    Only whoever holds the home's locks may call it, or a second start by mistake would rewrite it."""
    facts = {
        "task": config.spec.task_id.hex(),
        "rpc": config.rpc_url,
        "address_book": str(config.address_book.resolve()) if config.address_book else "",
        "committee": str(config.committee_file.resolve()) if config.committee_file else "",
        "pid": os.getpid(),
    }
    path = config.home / "run.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_run_file(home: Path) -> dict[str, str]:
    path = home / "run.json"
    try:
        loaded: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise KeystoreError(
            f"{home} is not the home of a peer that ran: run.json: {reason}", "pass --home DIR"
        ) from error
    return loaded
