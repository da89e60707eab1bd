from __future__ import annotations

import hashlib

import pytest

from p2pflock.errors import ChainUnavailableError
from p2pflock.params import FLOCK_WEI, LOCAL
from p2pflock.storage.keystore import Identity
from p2pflock.testing.chain import FakeChain
from p2pflock.testing.conformance_chain import CHECKS, STAKE, ChainBench, build_call, start

SIGNERS = [
    Identity.generate(lambda n, i=i: hashlib.shake_256(b"fake chain %d" % i).digest(n)) for i in range(5)
]


@pytest.fixture
def bench() -> ChainBench:
    clock = [1_800_000_000]
    chain = FakeChain(LOCAL.chain, now=lambda: clock[0])
    for signer in SIGNERS:
        chain.mint(signer.address, 10_000 * FLOCK_WEI)

    def advance(seconds: int) -> None:
        clock[0] += seconds

    return ChainBench(chain, SIGNERS, LOCAL.chain, advance)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(check, bench: ChainBench) -> None:
    check(bench)


def test_a_chain_that_is_down_says_so_and_comes_back(bench: ChainBench) -> None:
    chain = bench.chain
    assert isinstance(chain, FakeChain)
    chain.is_down = True
    with pytest.raises(ChainUnavailableError):
        chain.balance(bytes(20))
    chain.is_down = False
    assert chain.balance(bytes(20)) == 0


def test_reorganised_anchors_are_gone_and_can_be_anchored_again(bench: ChainBench) -> None:
    task = start(bench)
    calls = []
    for round_ in (1, 2):
        calls.append(build_call(bench, task, round_))
        receipt = bench.chain.anchor(SIGNERS[0], calls[-1])
    bench.chain.reorganise(task, 1)
    assert bench.chain.anchored(task, 2) is None
    assert bench.chain.anchor(SIGNERS[1], calls[1]).head == receipt.head


def test_the_smallest_seat_gives_way(bench: ChainBench) -> None:
    import p2pflock.testing.chain as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_MEMBERS", 2)
        for signer, amount in zip(SIGNERS, (STAKE, STAKE, STAKE, STAKE + 1), strict=False):
            bench.chain.register(signer)
            bench.chain.stake(signer, amount)
        task = bytes([1]) * 32
        bench.chain.create_task(SIGNERS[0], task, 1, 0)
        bench.chain.open_epoch(SIGNERS[0], task, 0)
        seated = [member.address for member in bench.chain.committee(task, 0)]
        assert seated == [SIGNERS[0].address, SIGNERS[3].address]
