"""`averaging = "dense"`: the group's mean instead of payloads and fold, in the same round, decided alike."""

from __future__ import annotations

from p2pflock.testing.network import run_simulation
from p2pflock.testing.simulation import SimulatedSwarm


def simulate(scenario, **options):
    async def main():
        async with SimulatedSwarm.open(averaging="dense", **options) as swarm:
            await scenario(swarm)
            swarm.check()

    run_simulation(main, seed=1)


def test_all_hold_the_same_mean_after_every_round():
    async def scenario(swarm):
        await swarm.start_all()
        await swarm.until_round(3)
        records = [{peer.record(round_) for peer in swarm.peers} for round_ in range(4)]
        assert all(len(held) == 1 for held in records)
        newest = records[3].pop()
        assert {c.seat for c in newest.contributions} == set(range(5))
        assert newest.scorecards == ()
        assert len({held.pop().model_hash for held in records[:3]} | {newest.model_hash}) == 4

    simulate(scenario, peers=5, rounds=3)


def test_one_dies_while_averaging_and_comes_back():
    async def scenario(swarm):
        await swarm.start_all()
        victim = swarm.peers[4]
        await swarm.until(lambda: victim.told("collected", round=2))
        await swarm.kill(4)
        others = swarm.peers[:4]
        await swarm.until(lambda: all(peer.head >= 4 for peer in others))
        assert 4 in {entry.seat for entry in others[0].record(3).absent}
        swarm.start(4)
        await swarm.until(lambda: victim.told("caught_up"))
        assert victim.record(4) == others[0].record(4)

    simulate(scenario, peers=5, rounds=12)
