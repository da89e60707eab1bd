"""Frozen parameters of a network, each with its unit and where its value comes from.

Law: a number stands here when changing it changes how peers of one network deal with each other or with the
chain, and it is not a matter of the task (H, optimizer, codec, fold rule: those are in the task's spec, which
is content-addressed).  Elsewhere stand the bounds of a message's shape (protocol/messages.py), what an adapter
grants to strangers (net/limits.py, gossip/limits.py) and the waits of a round, which are learnt
(protocol/timeouts.py).  Nothing here is read from the environment: a preset is chosen by name and passed down.

Units are in the names: `_seconds`, `_bytes`, `_wei` (1e-18 FLOCK).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from p2pflock.errors import SpecError

FLOCK_WEI = 10**18
GIB = 1 << 30
DAY_SECONDS = 86_400


@dataclass(frozen=True, slots=True)
class SwarmParams:
    """The DHT, as all peers use it."""

    # A record is announced anew at a third of its lifetime, so two lost announcements do no harm.
    record_ttl_seconds: float = 300.0


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long to wait for the outside world.  The waits inside a round adapt to what was measured:
    protocol/timeouts.py and protocol/collection.py."""

    # Joins that gave up after 15 s are the most frequent complaint of comparable systems.
    startup_seconds: float = 120.0
    rpc_seconds: float = 10.0
    # Rounds go on while the chain is away; anchors are retried at this pace, in order.
    anchor_retry_seconds: float = 5.0


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
    swarm: SwarmParams = field(default_factory=SwarmParams)
    timeouts: Timeouts = field(default_factory=Timeouts)
    storage: Storage = field(default_factory=Storage)
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
    timeouts=Timeouts(anchor_retry_seconds=1.0),
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
