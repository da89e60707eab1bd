"""Everything at once, drawn from a seed: deaths, splits, losses, delays and two liars; then calm, and an end."""

from __future__ import annotations

import random

import pytest
import trio

from p2pflock.testing import rogues
from p2pflock.testing.network import run_simulation
from p2pflock.testing.simulation import SimulatedSwarm

ROUNDS = 4
STORM_SECONDS = 60.0
LIES = (
    rogues.TwoHeaders, rogues.TwoVotes, rogues.WrongModel, rogues.MuteProposer, rogues.HastyProposer, rogues.WrongSize,
    rogues.Garbage, rogues.NeverDelivers, rogues.Boaster, rogues.Flooder, lambda: rogues.Censor(4), lambda: rogues.Boaster(60),
)  # fmt: skip


async def blow(swarm, rng):
    """Bad weather; at its end everybody runs and everything arrives."""
    network = swarm.network
    while trio.current_time() < STORM_SECONDS and min(p.head for p in swarm.peers) < ROUNDS - 1:
        await trio.sleep(rng.uniform(0.2, 4))
        draw = rng.random()
        if draw < 0.35:
            down = [peer.number for peer in swarm.peers if peer.is_running]
            await swarm.kill(*rng.sample(down, min(len(down), rng.choice((1, 1, 1, 2, 7)))))
        elif draw < 0.7:
            for peer in swarm.peers:
                if not peer.is_running and rng.random() < 0.7:
                    swarm.start(peer.number)
        elif draw < 0.8:
            side = rng.sample(range(7), rng.randint(1, 3))
            swarm.partition(side, set(range(7)) - set(side))
        elif draw < 0.9:
            swarm.heal()
        else:
            network.loss, network.delay_seconds = rng.choice((0, 0.05, 0.3)), rng.choice(((0.002, 0.02), (0.05, 0.6)))
        swarm.check()
    swarm.heal()
    network.loss, network.delay_seconds = 0.0, (0.002, 0.02)
    await swarm.start_all()


def survive(seed):
    rng = random.Random(seed)
    liars = rng.sample(range(7), 2)
    conducts = {liar: rng.choice(LIES)() for liar in liars}

    async def main():
        async with SimulatedSwarm.open(
            peers=7, rounds=ROUNDS, seed=seed, conducts=conducts, snapshot_every_rounds=3
        ) as swarm:
            await swarm.start_all()
            await blow(swarm, rng)
            await swarm.until_round(ROUNDS, seconds=900)
            swarm.check()

    run_simulation(main, seed=seed)


@pytest.mark.parametrize("seed", range(2))
def test_any_weather(seed):
    survive(seed)
