"""Frozen parameters of a network, each with its unit and where its value comes from.

Law: a number stands here when changing it changes how peers of one network deal with each other or with the
chain, and it is not a matter of the task (H, optimizer, codec, fold rule: those are in the task's spec, which
is content-addressed).  Bounds that are part of a message's shape stand in protocol/messages.py.  Nothing here
is read from the environment: a preset is chosen by name and passed down.

Units are in the names: `_seconds`, `_bytes`, `_wei` (1e-18 FLOCK), `_bps` (1/10,000).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from p2pflock.errors import SpecError

FLOCK_WEI = 10**18
MIB = 1 << 20
GIB = 1 << 30
DAY_SECONDS = 86_400


@dataclass(frozen=True, slots=True)
class GossipLimits:
    """What one peer may cost another on the control plane (libp2p, GossipSub)."""

    # GossipSub drops larger messages silently while `publish` reports success, so we refuse them ourselves.
    message_bytes: int = MIB
    # The spam guard of py-libp2p counts per forwarder, not per author, so its stock 10/s drops honest traffic.
    # A member of 218 seats forwards at most 218 headers + 218 scorecards + 436 votes a round.
    messages_per_second: int = 1_000
    # Per topic and subscriber; the oldest are dropped beyond it (counted).  One round of 218 seats fits.
    queue_messages: int = 1_024
    # py-libp2p refuses new dials at 300 idle half-open connections; we stay well below.
    connections: int = 128
    connections_per_address: int = 16
    streams_per_connection: int = 64
    # Bad messages from one peer before it is disconnected and refused for `ban_seconds`.
    strikes: int = 20
    ban_seconds: float = 600.0
    # A block on the wire: IPFS implementations refuse more than 1 MiB, UnixFS leaves are 256 KiB.
    block_bytes: int = MIB


@dataclass(frozen=True, slots=True)
class SwarmLimits:
    """What one peer may cost another in the hivemind process (DHT, payload exchange)."""

    # hivemind reads a length header without a cap: 8 bytes allocate gigabytes.  One chunk is 256 KiB.
    frame_bytes: int = 4 * MIB
    # A PeerRecord is at most 4 KiB (messages.py) plus the DHT envelope.
    record_bytes: int = 8 * 1_024
    # Records one peer may keep in our part of the DHT.
    records_per_peer: int = 64
    # A record is announced anew at a third of its lifetime, so two lost announcements do no harm.
    record_ttl_seconds: float = 300.0
    # Partners a peer swaps payloads with per round: log2(218) rounded up.
    partners_per_round: int = 8
    # Sum of expected payloads held for all open rounds of a task.
    held_bytes: int = 2 * GIB


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long to wait.  Adaptive ones start at their minimum, grow on failure by `growth` up to the maximum,
    and shrink back on success."""

    # Joins that gave up after 15 s are the most frequent complaint of comparable systems.
    startup_seconds: float = 120.0
    dial_seconds: float = 10.0
    request_seconds: float = 10.0
    # A frozen peer is noticed by pings in about 9 s.
    swap_seconds: float = 15.0
    # Wait for headers after the first one of a round arrived, then for payloads.
    grace_min_seconds: float = 1.0
    grace_max_seconds: float = 120.0
    # Tendermint steps (arXiv 1807.04938): timeout(view) = min(min + view * step, max).
    propose_min_seconds: float = 3.0
    vote_min_seconds: float = 1.0
    view_step_seconds: float = 1.0
    view_max_seconds: float = 60.0
    growth: float = 1.5
    # Rounds go on while the chain is away; anchors are retried at this pace, in order.
    anchor_retry_seconds: float = 5.0
    rpc_seconds: float = 10.0

    def __post_init__(self) -> None:
        if self.grace_min_seconds > self.grace_max_seconds:
            raise SpecError("grace_min_seconds is above grace_max_seconds")
        if max(self.propose_min_seconds, self.vote_min_seconds) > self.view_max_seconds:
            raise SpecError("a step's minimum is above view_max_seconds")
        if self.growth <= 1.0:
            raise SpecError("growth must be above 1: timeouts would never become long enough")

    def propose_seconds(self, view: int) -> float:
        """Allowance for a proposal to arrive in this view."""
        return min(self.propose_min_seconds + view * self.view_step_seconds, self.view_max_seconds)

    def vote_seconds(self, view: int) -> float:
        """Allowance for the rest of the votes once a quorum of any votes is in."""
        return min(self.vote_min_seconds + view * self.view_step_seconds, self.view_max_seconds)


@dataclass(frozen=True, slots=True)
class Storage:
    quota_bytes: int = 10 * GIB
    # Full weights are stored every K rounds, the rounds between are snapshot + payloads.
    snapshot_every_rounds: int = 1
    # Rounds whose payloads stay pinned behind the head, for peers that catch up by folding.
    history_rounds: int = 256


@dataclass(frozen=True, slots=True)
class ChainParams:
    """The contracts' side of the network."""

    chain_id: int
    # Stake that buys one seat's candidature.
    min_stake_wei: int
    # Rewards of an anchored round become claimable after this.
    challenge_window_seconds: int
    # An epoch fixes the committee; a new one needs a new snapshot on chain.
    epoch_seconds: int
    # From a block to `finalized`; on Base about 20 minutes.
    finality_seconds: int
    # Unbonding stake stays slashable this long; see `__post_init__`.
    cooldown_seconds: int
    # An RPC endpoint whose newest block is older than this is not the chain's head.
    max_block_age_seconds: int
    # "latest" is the sequencer's word; payouts and slashing on a real chain wait for "finalized".
    settle_on: str = "finalized"

    def __post_init__(self) -> None:
        least = self.epoch_seconds + self.challenge_window_seconds + self.finality_seconds
        if self.cooldown_seconds <= least:
            # Attack: vote wrongly at the end of an epoch and unbond before the evidence can be submitted.
            raise SpecError(f"cooldown_seconds must exceed epoch + challenge window + finality = {least}")


@dataclass(frozen=True, slots=True)
class NetworkParams:
    """Everything that the peers of one network have in common."""

    name: str
    chain: ChainParams
    gossip: GossipLimits = field(default_factory=GossipLimits)
    swarm: SwarmLimits = field(default_factory=SwarmLimits)
    timeouts: Timeouts = field(default_factory=Timeouts)
    storage: Storage = field(default_factory=Storage)
    # Above this many peers a cohort drawn by the beacon contributes; everybody folds.
    cohort_peers: int = 64
    # Clock error that is tolerated before `doctor` complains: expiry times are in whole seconds.
    max_clock_skew_seconds: float = 30.0


# One machine, an embedded development chain that imitates Base (blocks of 200 ms, two blocks to finality).
LOCAL = NetworkParams(
    name="local",
    chain=ChainParams(
        chain_id=84_532,
        min_stake_wei=100 * FLOCK_WEI,
        challenge_window_seconds=1,
        epoch_seconds=3_600,
        finality_seconds=2,
        cooldown_seconds=2 * 3_600,
        max_block_age_seconds=60,
        settle_on="latest",
    ),
    # Loopback: a partner answers in milliseconds, so failures show after seconds.
    timeouts=Timeouts(
        dial_seconds=5.0,
        grace_min_seconds=0.5,
        grace_max_seconds=60.0,
        propose_min_seconds=2.0,
        vote_min_seconds=0.5,
        view_step_seconds=0.5,
        view_max_seconds=20.0,
        anchor_retry_seconds=1.0,
    ),
)

# Base Sepolia: real blocks, play money, short windows so that a test run sees a claim.
TESTNET = NetworkParams(
    name="testnet",
    chain=ChainParams(
        chain_id=84_532,
        min_stake_wei=100 * FLOCK_WEI,
        challenge_window_seconds=600,
        epoch_seconds=3_600,
        finality_seconds=1_200,
        cooldown_seconds=2 * 3_600,
        max_block_age_seconds=60,
    ),
)

# Base mainnet: a day to challenge, a week and a day until stake is free.
BASE = NetworkParams(
    name="base",
    chain=ChainParams(
        chain_id=8_453,
        min_stake_wei=1_000 * FLOCK_WEI,
        challenge_window_seconds=DAY_SECONDS,
        epoch_seconds=DAY_SECONDS,
        finality_seconds=1_200,
        cooldown_seconds=8 * DAY_SECONDS,
        max_block_age_seconds=60,
    ),
    storage=replace(Storage(), snapshot_every_rounds=10),
)

PRESETS = {preset.name: preset for preset in (LOCAL, TESTNET, BASE)}


def get_preset(name: str) -> NetworkParams:
    """Raises SpecError for a name that is no preset."""
    preset = PRESETS.get(name)
    if preset is None:
        raise SpecError(f"no network called {name!r}", f"choose one of: {', '.join(PRESETS)}")
    return preset
