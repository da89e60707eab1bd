"""Claiming: the newest anchored round whose window is over, once."""

from __future__ import annotations

from functools import reduce

import pytest

from p2pflock.errors import ChainRejectedError
from p2pflock.node.claiming import build_proof, claim
from p2pflock.params import LOCAL
from p2pflock.primitives import merkle
from p2pflock.protocol.settlement import Tables
from p2pflock.testing.network import run_simulation
from p2pflock.testing.simulation import SimulatedSwarm

WINDOW = LOCAL.chain.challenge_window_seconds


@pytest.fixture(scope="module")
def paid():
    """Two rounds decided and anchored; (chain, signers, records), with a clock that the test owns."""
    kept = []

    async def main():
        async with SimulatedSwarm.open(peers=4, rounds=2, seed=5, has_chain=True) as swarm:
            await swarm.start_all()
            await swarm.until(lambda: all(peer.is_finished for peer in swarm.peers))
            records = [swarm.peers[0].record(n) for n in range(3)]
            kept.append((swarm.chain, [p.signer for p in swarm.peers], records))

    run_simulation(main, seed=5)
    return kept[0]


def at(chain, round_, task, later):
    """Set the chain's clock relative to when a round was anchored."""
    anchored_at = chain._entry(task, round_)[2]
    chain._now = lambda: anchored_at + later


def prove(records, round_, address):
    table = reduce(Tables.after, records[: round_ + 1], Tables())
    return build_proof(records[0].task, table.rewards, address)


def test_proofs_hold_under_the_anchored_root(paid):
    _, signers, records = paid
    record = records[2]
    for signer in signers:
        cumulative, path = prove(records, 2, signer.address)
        assert cumulative > 0
        leaf = merkle.leaf_hash(record.task, signer.address, cumulative)
        assert merkle.verify(record.rewards_root, leaf, path)
    assert prove(records, 2, b"x" * 20) == (0, [])


def test_claims_grow_with_the_rounds_and_pay_once(paid):
    chain, signers, records = paid
    task, me = records[0].task, signers[0]
    at(chain, 2, task, 0)
    if WINDOW:  # round 2's window is open
        first = chain._entry(task, 1)[2]
        chain._now = lambda: first + WINDOW - 1
        with pytest.raises(ChainRejectedError, match="window"):
            claim(chain, me, records)
    at(chain, 2, task, WINDOW)
    before = chain.balance(me.address)
    done = claim(chain, me, records)
    assert (done.round, done.balance_wei) == (2, before + done.amount_wei)
    assert done.amount_wei == prove(records, 2, me.address)[0]
    again = claim(chain, me, records)
    assert (again.amount_wei, again.transaction) == (0, "")
    assert chain.balance(me.address) == done.balance_wei


def test_while_the_newest_window_is_open_the_round_before_pays(paid):
    chain, signers, records = paid
    task, me = records[0].task, signers[1]
    at(chain, 1, task, WINDOW)
    is_open = chain._now() < chain._entry(task, 2)[2] + WINDOW
    done = claim(chain, me, records)
    assert done.round == (1 if is_open else 2)
    at(chain, 2, task, WINDOW)
    total = done.amount_wei + claim(chain, me, records).amount_wei
    assert total == prove(records, 2, me.address)[0]


def test_an_account_without_rewards_has_nothing_to_claim(paid, members):
    chain, _, records = paid
    assert claim(chain, members.stranger, records).amount_wei == 0


def test_other_refusals_are_passed_on(paid, monkeypatch):
    chain, signers, records = paid

    def refuse(*_):
        raise ChainRejectedError("claim round 2: AboveRoundCap()")

    monkeypatch.setattr(chain, "claim", refuse)
    with pytest.raises(ChainRejectedError, match="AboveRoundCap"):
        claim(chain, signers[2], records)
