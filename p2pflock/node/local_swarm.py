"""A swarm of N peer processes and a chain on this machine: what `p2pflock up` starts and watches.

Law: the peers are ordinary `p2pflock run` processes that know nothing of each other but one bootstrap address;
this file is no server of theirs.  It prepares keys, funds and stakes them on a development chain, starts them,
and reads their event files.  Kill any of them, or this process: the rest goes on, or dies with it.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from p2pflock.chain import anvil, deployment
from p2pflock.chain.evm import EvmChain
from p2pflock.errors import StartupError, UserError
from p2pflock.learning.spec import TaskSpec
from p2pflock.node.assembly import COMMITTEE_FILE, EPOCH, SPEC_FILE
from p2pflock.params import FLOCK_WEI, NetworkParams
from p2pflock.ports import Signer
from p2pflock.primitives import peerid
from p2pflock.protocol.committee import Committee
from p2pflock.protocol.messages import Seat, Trainer
from p2pflock.storage import keystore

POLL_SECONDS = 0.2
STOP_SECONDS = 10.0
STAKE_WEI = 1_000 * FLOCK_WEI
REWARD_A_ROUND_WEI = 10 * FLOCK_WEI
GAS_WEI = 10**18


@dataclass
class PeerProcess:
    """One child peer.  `process` is None until it was started, and is replaced when it is started again."""

    name: str
    home: Path
    signer: Signer
    process: subprocess.Popen[bytes] | None = None
    offset: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def events_file(self) -> Path:
        return self.home / "events.jsonl"


class LocalSwarm:
    """N peers and, unless `chain` is "none", a development chain.

    Args:
        home: directory of the swarm; one sub-directory a peer.  Must be new or of an earlier local swarm.
        spec: the task, its number of rounds already set.
        peers: how many.
        chain: "anvil" or "none".
        network: parameters; the local preset.
        stakes: wei of each peer, all the same by default; 0 makes an onlooker, who follows without a seat.
        trusted_modules: code outside p2pflock's shipped tasks that the spec may name.
    """

    def __init__(
        self,
        home: Path,
        spec: TaskSpec,
        peers: int,
        chain: str,
        network: NetworkParams,
        *,
        threads: int = 1,
        stakes: Sequence[int] | None = None,
        trusted_modules: Sequence[str] = (),
    ) -> None:
        if peers < 1:
            raise UserError("a swarm has at least one peer", "pass --peers 4")
        if stakes is not None and len(stakes) != peers:
            raise UserError(f"{len(stakes)} stakes for {peers} peers", "give each peer one")
        self.home = home
        self.spec = spec
        self.count = peers
        self.chain_kind = chain
        self.network = network
        self.threads = threads
        self.stakes = tuple(stakes) if stakes is not None else (STAKE_WEI,) * peers
        self.trusted_modules = tuple(trusted_modules)
        self.peers: list[PeerProcess] = []
        self.rpc_url = ""
        self.address_book: Path | None = None
        self.chain: EvmChain | None = None
        self._anvil: anvil.Anvil | None = None
        self._password_file = home / "password"

    # --- preparation ---
    def start_chain(self) -> None:
        """Call from the main thread: the chain dies with the thread that started it (0.2 s).

        Raises MissingToolError, StartupError."""
        self._make_home()
        if self.chain_kind != "none":
            self._anvil = anvil.Anvil.start(
                chain_id=self.network.chain.chain_id, state_path=self.home / "chain" / "state.json"
            )
            self.rpc_url = self._anvil.rpc_url

    def prepare(self, tell: Callable[[str], None]) -> None:
        """Keys, contracts, stakes, task, committee.  Blocking; raises FlockError."""
        tell(f"creating {self.count} identities")
        password = self._password_file.read_text().strip()
        for number in range(1, self.count + 1):
            home = self.home / f"peer-{number}"
            signer = keystore.create(home / "keystore", password, fast=True)
            self.peers.append(PeerProcess(f"peer-{number}", home, signer))
        (self.home / SPEC_FILE).write_bytes(self.spec.encode())
        if self.chain_kind == "none":
            self._write_static_committee()
        else:
            self._prepare_chain(tell)
        self._write_swarm_file()

    def _make_home(self) -> None:
        marker = self.home / "swarm.json"
        if self.home.exists() and any(self.home.iterdir()):
            if not marker.exists():
                raise UserError(
                    f"{self.home} exists and is not a local swarm", "choose another --home, or empty it"
                )
            shutil.rmtree(self.home)
        self.home.mkdir(parents=True, exist_ok=True)
        marker.write_text("{}\n")
        self._password_file.touch(mode=0o600)
        self._password_file.write_text(secrets.token_urlsafe(24) + "\n")

    def _write_static_committee(self) -> None:
        """The first peers with a stake get the seats; those that are left over are trainers."""
        wanted, staked = self.spec.committee, [p for p, wei in zip(self.peers, self.stakes, strict=True) if wei]
        stakes = [wei for wei in self.stakes if wei]
        committee = Committee(
            task=self.spec.task_id,
            epoch=EPOCH,
            chain_id=0,
            anchor=bytes(20),
            seats=tuple(
                Seat(p.signer.peer_id, p.signer.address, p.signer.bls_public_key, stake)
                for p, stake in zip(staked[: wanted.size], stakes, strict=False)
            ),
            trainers=tuple(
                Trainer(p.signer.peer_id, p.signer.address, p.signer.bls_public_key) for p in staked[wanted.size :]
            ),
            cohort=wanted.cohort,
        )
        (self.home / COMMITTEE_FILE).write_bytes(committee.to_block().encode())

    def _prepare_chain(self, tell: Callable[[str], None]) -> None:
        params = self.network.chain
        tell("deploying the contracts")
        book = deployment.deploy(self.rpc_url, anvil.DEV_KEY, params)
        self.address_book = self.home / "contracts.json"
        book.save(self.address_book)
        self.chain = chain = EvmChain(self.rpc_url, book)
        tell("funding, registering and staking the peers")
        reward = REWARD_A_ROUND_WEI * self.spec.task.rounds
        creator = self.peers[0].signer
        for peer, stake in zip(self.peers, self.stakes, strict=True):
            flock = stake + (reward if peer.signer is creator else 0)
            deployment.fund(
                self.rpc_url, book, anvil.DEV_KEY, [peer.signer.address], native_wei=GAS_WEI, flock_wei=flock
            )
            chain.register(peer.signer)
            if stake:
                chain.stake(peer.signer, stake)
        chain.create_task(creator, self.spec.task_id, self.spec.task.rounds, reward)
        chain.open_epoch(creator, self.spec.task_id, EPOCH)

    # --- running ---
    def start_peer(self, peer: PeerProcess, bootstrap: Sequence[str]) -> None:
        """Start, or start again after it was killed.  `bootstrap` may be empty for the first one only."""
        peer.home.joinpath("logs").mkdir(exist_ok=True)
        with (peer.home / "logs" / "peer.log").open("ab") as log:
            peer.process = subprocess.Popen(
                self.command(peer, bootstrap),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "P2PFLOCK_DIE_WITH_PARENT": "1"},
                start_new_session=True,
            )
        self._write_swarm_file()

    def command(self, peer: PeerProcess, bootstrap: Sequence[str]) -> list[str]:
        """What starts a peer; a harness may put it into a network of its own."""
        arguments = [
            sys.executable,
            "-m",
            "p2pflock",
            "run",
            "--task",
            str(self.home / SPEC_FILE),
            "--home",
            str(peer.home),
            "--password-file",
            str(self._password_file),
            "--threads",
            str(self.threads),
            "--network",
            self.network.name,
            *(part for address in bootstrap for part in ("--bootstrap", address)),
            *(part for module in self.trusted_modules for part in ("--trust-module", module)),
        ]
        if self.rpc_url:
            arguments += ["--rpc", self.rpc_url, "--address-book", str(self.address_book)]
        else:
            arguments += ["--committee", str(self.home / COMMITTEE_FILE)]
        return arguments

    async def start(self, *, wait_seconds: float) -> None:
        """The first peer, then all others through its one address.  Raises StartupError with a peer's words."""
        self.start_peer(self.peers[0], ())
        address = (await self.wait_started(self.peers[0], wait_seconds))["swarm_addresses"]
        for peer in self.peers[1:]:
            self.start_peer(peer, address[:1])

    async def wait_started(self, peer: PeerProcess, wait_seconds: float) -> dict[str, Any]:
        """Its `started` event, once that is there.  Raises StartupError."""
        with trio.move_on_after(wait_seconds):
            while "started" not in peer.facts:
                self.read_new_events(peer)
                self.raise_if_failed(peer)
                await trio.sleep(POLL_SECONDS)
        if "started" not in peer.facts:
            raise StartupError(f"{peer.name} did not start within {wait_seconds:.0f} s", f"see {peer.home}/logs")
        started: dict[str, Any] = peer.facts["started"]
        return started

    def raise_if_failed(self, peer: PeerProcess) -> None:
        """A peer that ended by itself before it was done is an error with that peer's last line."""
        if peer.process is None or peer.process.poll() in (None, 0, -signal.SIGKILL):
            return
        log = peer.home / "logs" / "peer.log"
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        cause = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "")
        fix = next((line for line in reversed(lines) if line.startswith("fix:")), "")
        raise StartupError(
            f"{peer.name} ended with exit code {peer.process.returncode}: {cause.removeprefix('error: ')}",
            fix.removeprefix("fix: ") or f"see {log}",
        )

    def read_new_events(self, peer: PeerProcess) -> list[dict[str, Any]]:
        """Whole lines written since the last call; the latest of each kind is kept in `facts`."""
        if not peer.events_file.exists():
            return []
        with peer.events_file.open("rb") as file:
            file.seek(peer.offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        peer.offset += len(whole)
        entries = [json.loads(line) for line in whole.splitlines()]
        for entry in entries:
            peer.facts[entry["event"]] = entry
        return entries

    async def events(self) -> AsyncIterator[tuple[PeerProcess, dict[str, Any]]]:
        """Events of all peers as they come; ends when every peer that still runs has finished."""
        while True:
            for peer in self.peers:
                for entry in self.read_new_events(peer):
                    yield peer, entry
            for peer in self.peers:
                self.raise_if_failed(peer)
            running = [peer for peer in self.peers if peer.is_running]
            if not running:
                raise StartupError("every peer has ended", f"see the logs below {self.home}")
            if all("finished" in peer.facts for peer in running):
                return
            await trio.sleep(POLL_SECONDS)

    def kill(self, peer: PeerProcess) -> None:
        """SIGKILL, as a power failure would."""
        assert peer.process is not None
        peer.process.kill()
        peer.process.wait()

    def stop(self) -> None:
        """Ask every process to end, insist after a while.  Safe to call at any time."""
        for peer in self.peers:
            if peer.is_running and peer.process is not None:
                peer.process.terminate()
        for peer in self.peers:
            if peer.process is not None:
                try:
                    peer.process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    peer.process.kill()
                    peer.process.wait()
        if self._anvil is not None:
            self._anvil.stop()

    def _write_swarm_file(self) -> None:
        facts = {
            "task": self.spec.task_id.hex(),
            "rounds": self.spec.task.rounds,
            "rpc": self.rpc_url,
            "address_book": str(self.address_book) if self.address_book else "",
            "peers": [
                {
                    "name": p.name,
                    "home": str(p.home),
                    "peer": peerid.to_text(p.signer.peer_id),
                    "address": "0x" + p.signer.address.hex(),
                    "pid": p.process.pid if p.process else None,
                }
                for p in self.peers
            ],
        }
        temporary = self.home / "swarm.tmp"
        temporary.write_text(json.dumps(facts, indent=2) + "\n")
        temporary.replace(self.home / "swarm.json")


