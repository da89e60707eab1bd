"""Real peers in network namespaces, for the benchmarks that count bytes or time on links.

Law: a peer is `p2pflock run` as anybody would start it, three processes and p2pd, with fixed ports so that packets
can be told apart.  What is measured comes from the event files and from the packets, never from the peers' memory.
The task is the shipped Shakespeare one with a GPT of 10.7 million parameters, static committee, no chain.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import trio

from benchmarks.namespaces import Network, address_of
from p2pflock.errors import StartupError
from p2pflock.learning import codec
from p2pflock.learning.spec import TaskSpec, parse_spec
from p2pflock.node.local_swarm import POLL_SECONDS, LocalSwarm, PeerProcess
from p2pflock.params import BASE

CONTROL_PORT, SWARM_PORT = 4001, 4002
PARAMETERS = 10_700_544
START_SECONDS = 300.0


def build_spec(rounds: int, *, steps: int, batch_size: int, k: int = 64, scored: int = 4, averaging: str = "gossip") -> TaskSpec:
    """A byte-level GPT of 10.7 million parameters, payloads at `k` of 4,096 from the first round on."""
    text = (Path(codec.__file__).parent / "tasks" / "shakespeare.toml").read_text()
    for old, new in (
        ('averaging = "gossip"', f'averaging = "{averaging}"'),
        ("\nrounds = 20", f"\nrounds = {rounds}"),
        ("layers = 3, heads = 4, width = 96", "layers = 6, heads = 6, width = 384"),
        ("arguments = { block = 64 }", "arguments = { block = 64, test_blocks = 50 }"),
        ("\nsteps = 60\nbatch_size = 16", f"\nsteps = {steps}\nbatch_size = {batch_size}"),
        ("warmup_steps = 60", "warmup_steps = 2"),
        ("k = 256\nk_start = 1024\nstart_rounds = 5", f"k = {k}\nk_start = {k}\nstart_rounds = 1"),
        ("batch_size = 64\nheld_out = 64", f"batch_size = {scored}\nheld_out = {scored}"),
    ):
        if old not in text:
            raise ValueError(f"the shipped task no longer says {old!r}")
        text = text.replace(old, new)
    return parse_spec(text)


class NamespacedSwarm(LocalSwarm):
    """A local swarm whose peers live in the namespaces of a Network."""

    def __init__(self, home: Path, spec: TaskSpec, network: Network) -> None:
        # Snapshots every ten rounds, as on Base: a 40 MB file per round is for development swarms.
        super().__init__(home, spec, network.peers, "none", BASE)
        self._network = network
        self.events_of: dict[str, list[dict[str, Any]]] = {}

    def command(self, peer: PeerProcess, bootstrap: Sequence[str]) -> list[str]:
        number = self.peers.index(peer) + 1
        own = ["--host", address_of(number), "--control-port", str(CONTROL_PORT), "--swarm-port", str(SWARM_PORT)]
        return self._network.command(number, [*super().command(peer, bootstrap), *own])

    async def watch(self, until: Callable[[Mapping[str, list[dict[str, Any]]]], bool], seconds: float) -> None:
        """Collect events, stamped with `seen`, until a condition on them holds.  Raises StartupError."""
        with trio.move_on_after(seconds):
            while True:
                for peer in self.peers:
                    self.raise_if_failed(peer)
                    entries = self.events_of.setdefault(peer.name, [])
                    entries += [{**entry, "seen": time.monotonic()} for entry in self.read_new_events(peer)]
                if until(self.events_of):
                    return
                await trio.sleep(POLL_SECONDS)
        raise StartupError(f"the swarm was not done in {seconds:.0f} s", f"see the logs below {self.home}")


def has_decided(events: Mapping[str, list[dict[str, Any]]], round_: int, peers: int) -> bool:
    done = [any(e["event"] == "decided" and e["round"] >= round_ for e in entries) for entries in events.values()]
    return sum(done) == peers


def prepare(home: Path, spec: TaskSpec, network: Network) -> NamespacedSwarm:
    """A fresh swarm with identities and a committee; nothing runs yet."""
    shutil.rmtree(home, ignore_errors=True)
    swarm = NamespacedSwarm(home, spec, network)
    swarm.start_chain()
    swarm.prepare(lambda text: print(text, flush=True))
    return swarm
