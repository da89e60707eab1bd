"""What every Chain must do, whoever implements it.

Law: each `check_` function takes a fresh `ChainBench` and asserts one group of promises of ports.py; `CHECKS`
is all of them.  Refusals are recognised by the contract's error name in the message, so a fake that refuses
for another reason than the contracts does not pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest

from p2pflock.errors import ChainRejectedError
from p2pflock.params import FLOCK_WEI, ChainParams
from p2pflock.ports import AnchorCall, Chain, Signer
from p2pflock.primitives import bls, merkle, signing

STAKE = 100 * FLOCK_WEI
REWARD = 1_000 * FLOCK_WEI
ROUNDS = 4


@dataclass(frozen=True)
class ChainBench:
    """A fresh deployment and what a test needs around it.

    Args:
        signers: at least five, funded with gas money and 10,000 FLOCK each, none registered.
        params: what was deployed; conformance needs min_stake_wei == STAKE.
        advance: moves the chain's clock on by this many seconds.
    """

    chain: Chain
    signers: Sequence[Signer]
    params: ChainParams
    advance: Callable[[int], None]


def digest_of(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


def start(bench: ChainBench, members: int = 4, task: bytes = digest_of("task")) -> bytes:
    """`members` registered and staked, a task, its first epoch; returns the task id."""
    for signer in bench.signers[:members]:
        bench.chain.register(signer)
        bench.chain.stake(signer, STAKE)
    bench.chain.create_task(bench.signers[0], task, ROUNDS, REWARD)
    bench.chain.open_epoch(bench.signers[0], task, 0)
    return task


def sign_call(bench: ChainBench, call: AnchorCall) -> AnchorCall:
    """The call with the aggregate of the members that its bitmap names, over the chain's present head."""
    chain = bench.chain
    digest = signing.compute_vote_digest(
        chain_id=chain.chain_id,
        anchor=chain.anchor_address,
        task=call.task,
        epoch=call.epoch,
        round_=call.round,
        view=call.view,
        step=1,
        record_digest=call.record_digest,
        rewards_root=call.rewards_root,
        previous_head=chain.task(call.task).head,
    )
    by_address = {signer.address: signer for signer in bench.signers}
    members = chain.committee(call.task, call.epoch)
    signatures = [
        by_address[member.address].sign_bls(digest)
        for seat, member in enumerate(members)
        if call.signers >> seat & 1
    ]
    return replace(call, signature=bls.aggregate(signatures))


def build_call(
    bench: ChainBench, task: bytes, round_: int, *, signers: int = 0b1011, rewards_root: bytes = bytes(32)
) -> AnchorCall:
    call = AnchorCall(
        task=task,
        epoch=0,
        round=round_,
        view=round_ % 3,
        record_digest=digest_of("record", round_),
        rewards_root=rewards_root,
        signers=signers,
        signature=bytes(96),
    )
    return sign_call(bench, call)


def expect_refused(name: str, act: Callable[[], object]) -> None:
    with pytest.raises(ChainRejectedError) as caught:
        act()
    assert name in caught.value.message, caught.value.message
    assert "\n" not in str(caught.value)


# --- the checks -------------------------------------------------------------------------------------------
def check_committee_is_who_staked(bench: ChainBench) -> None:
    chain, signers = bench.chain, bench.signers
    task = digest_of("task")
    expect_refused("NotRegistered", lambda: chain.stake(signers[0], STAKE))
    before = chain.balance(signers[0].address)
    for i, signer in enumerate(signers[:4]):
        chain.register(signer)
        chain.register(signer)  # again changes nothing
        chain.stake(signer, STAKE + i)
    chain.register(signers[4])  # no stake, no seat
    assert chain.balance(signers[0].address) == before - STAKE
    chain.create_task(signers[3], task, ROUNDS, REWARD)
    assert tuple(chain.committee(task, 0)) == ()
    expect_refused("WrongEpoch", lambda: chain.open_epoch(signers[4], task, 1))
    chain.open_epoch(signers[4], task, 0)
    chain.open_epoch(signers[1], task, 0)  # again changes nothing
    expect_refused("EpochTooEarly", lambda: chain.open_epoch(signers[4], task, 1))
    chain.stake(signers[4], 50 * STAKE)  # too late for this epoch
    members = chain.committee(task, 0)
    assert [(m.peer, m.address, m.bls_public_key, m.weight) for m in members] == [
        (s.peer_id, s.address, s.bls_public_key, STAKE + i) for i, s in enumerate(signers[:4])
    ]
    bench.advance(bench.params.epoch_seconds)
    chain.open_epoch(signers[2], task, 1)
    assert [m.address for m in chain.committee(task, 1)] == [s.address for s in signers[:5]]
    assert len(chain.committee(task, 0)) == 4


def check_stake_below_minimum_has_no_seat(bench: ChainBench) -> None:
    chain, signers = bench.chain, bench.signers
    for signer, amount in zip(signers, (STAKE - 1, STAKE), strict=False):
        chain.register(signer)
        chain.stake(signer, amount)
    task = digest_of("task")
    chain.create_task(signers[0], task, ROUNDS, 0)
    chain.open_epoch(signers[0], task, 0)
    assert [m.address for m in chain.committee(task, 0)] == [signers[1].address]


def check_tasks(bench: ChainBench) -> None:
    chain, signer = bench.chain, bench.signers[0]
    task = digest_of("task")
    expect_refused("", lambda: chain.task(task))
    expect_refused("UnknownTask", lambda: chain.open_epoch(signer, task, 0))
    before = chain.balance(signer.address)
    chain.create_task(signer, task, ROUNDS, REWARD)
    assert chain.balance(signer.address) == before - REWARD
    found = chain.task(task)
    assert (found.task, found.creator, found.reward_wei, found.rounds) == (
        task, signer.address, REWARD, ROUNDS,
    )  # fmt: skip
    assert (found.last_round, found.head) == (0, task)
    expect_refused("TaskExists", lambda: chain.create_task(signer, task, ROUNDS, REWARD))
    expect_refused("ZeroRounds", lambda: chain.create_task(signer, digest_of(1), 0, REWARD))
    expect_refused("ERC20Insufficient", lambda: chain.create_task(signer, digest_of(2), 1, 10**30))
    expect_refused("EmptyCommittee", lambda: chain.open_epoch(signer, task, 0))


def check_anchors_chain(bench: ChainBench) -> None:
    chain, signers = bench.chain, bench.signers
    task = start(bench)
    head = task
    assert chain.anchored(task, 1) is None
    assert chain.anchored_call(task, 1) is None
    for round_ in range(1, ROUNDS + 1):
        call = build_call(bench, task, round_, signers=(0b1011, 0b1111, 0b0111, 0b1110)[round_ - 1])
        receipt = chain.anchor(signers[round_ % 4], call)
        head = signing.compute_head(
            task=task,
            round_=round_,
            record_digest=call.record_digest,
            rewards_root=call.rewards_root,
            previous_head=head,
        )
        assert (receipt.round, receipt.head) == (round_, head)
        assert 0 < receipt.gas_used <= 290_000
        assert chain.anchored(task, round_) == receipt
        assert chain.anchored_call(task, round_) == call  # signature and bitmap come back from the chain
        assert (chain.task(task).last_round, chain.task(task).head) == (round_, head)
        assert chain.anchor(signers[0], call) == receipt  # somebody was faster: their receipt
    after = replace(call, round=ROUNDS + 1)
    expect_refused("TaskFinished", lambda: chain.anchor(signers[0], sign_call(bench, after)))


def check_bad_anchors_are_refused(bench: ChainBench) -> None:
    chain, signers = bench.chain, bench.signers
    task = start(bench)
    good = build_call(bench, task, 1)

    def refuse(name: str, call: AnchorCall) -> None:
        expect_refused(name, lambda: chain.anchor(signers[0], call))

    refuse("WrongRound", build_call(bench, task, 2))  # queued until round 1 is there
    refuse("WrongRound", replace(good, round=0))
    refuse("NoQuorum", build_call(bench, task, 1, signers=0b0011))  # half
    refuse("SignerOutOfRange", replace(good, signers=0b11111))
    refuse("BadSignature", replace(good, signers=0b1111))  # claims more than signed
    refuse("BadSignature", replace(good, view=good.view + 1))
    refuse("BadSignature", replace(good, rewards_root=digest_of("mine")))
    refuse("BadSignature", replace(good, signature=bls.INFINITY_SIGNATURE))
    refuse("UnknownEpoch", replace(good, epoch=1))
    refuse("NilRecord", sign_call(bench, replace(good, record_digest=bytes(32))))
    foreign = bls.aggregate([signers[4].sign_bls(digest_of("digest"))])
    refuse("BadSignature", replace(good, signature=foreign))
    assert chain.anchored(task, 1) is None
    chain.anchor(signers[4], good)  # by anyone
    refuse("another record", replace(good, record_digest=digest_of("other")))


def check_one_identity_each(bench: ChainBench) -> None:
    chain, signers = bench.chain, bench.signers
    chain.register(signers[0])
    expect_refused("PeerIdTaken", lambda: chain.register(_Mixed(signers[1], peer=signers[0])))
    expect_refused("KeyTaken", lambda: chain.register(_Mixed(signers[1], key=signers[0])))
    expect_refused(
        "BadProofOfPossession", lambda: chain.register(_Mixed(signers[1], key=signers[2], prover=signers[3]))
    )
    with pytest.raises(ChainRejectedError):
        chain.register(_Mixed(signers[0], key=signers[1]))  # no silent change of keys


def check_claims(bench: ChainBench) -> None:
    chain, signers = bench.chain, bench.signers
    task = start(bench)
    share = REWARD // ROUNDS // 4
    accounts = [signer.address for signer in signers[:4]]
    first = [merkle.leaf_hash(task, account, share) for account in accounts]
    # In round 2 the committee hands out more than two rounds' worth, by one wei.
    amounts = [2 * share, 2 * share, 2 * share, 2 * share + 1]
    second = [merkle.leaf_hash(task, account, x) for account, x in zip(accounts, amounts, strict=True)]
    chain.anchor(signers[0], build_call(bench, task, 1, rewards_root=merkle.root(first)))
    chain.anchor(signers[0], build_call(bench, task, 2, rewards_root=merkle.root(second)))

    def claim(i: int, round_: int, amount: int, leaves: Sequence[bytes]) -> bytes:
        return chain.claim(signers[i], task, round_, amount, merkle.proof(leaves, i))

    expect_refused("NotAnchored", lambda: claim(0, 3, share, first))
    expect_refused("ChallengeWindowOpen", lambda: claim(0, 1, share, first))
    bench.advance(bench.params.challenge_window_seconds)
    before = chain.balance(accounts[0])
    assert len(claim(0, 1, share, first)) == 32
    assert chain.balance(accounts[0]) == before + share
    assert chain.claimed(task, accounts[0]) == share
    assert chain.claimed(task, accounts[1]) == 0
    expect_refused("NothingDue", lambda: claim(0, 1, share, first))
    expect_refused("BadMerkleProof", lambda: claim(0, 1, share + 1, first))
    expect_refused("BadMerkleProof", lambda: claim(0, 2, share, first))
    for i in range(3):
        claim(i, 2, amounts[i], second)
    assert chain.balance(accounts[0]) == before + 2 * share
    expect_refused("AboveRoundCap", lambda: claim(3, 2, amounts[3], second))
    # Round 1's share of the escrow is spent by then: the late claim with the newest matured root.
    expect_refused("AboveRoundCap", lambda: claim(3, 1, share, first))
    chain.anchor(signers[0], build_call(bench, task, 3, rewards_root=merkle.root(second)))
    bench.advance(bench.params.challenge_window_seconds)
    claim(3, 3, amounts[3], second)
    assert chain.claimed(task, accounts[3]) == amounts[3]


class _Mixed:
    """One operator that presents the identity of others."""

    def __init__(
        self,
        operator: Signer,
        *,
        peer: Signer | None = None,
        key: Signer | None = None,
        prover: Signer | None = None,
    ) -> None:
        self._operator, self._peer, self._key = operator, peer or operator, key or operator
        self._prover = prover or self._key

    @property
    def peer_id(self) -> bytes:
        return self._peer.peer_id

    @property
    def address(self) -> bytes:
        return self._operator.address

    @property
    def bls_public_key(self) -> bytes:
        return self._key.bls_public_key

    def sign_bls(self, root: bytes) -> bytes:
        return self._key.sign_bls(root)

    def prove_possession(self, root: bytes) -> bytes:
        return self._prover.prove_possession(root)

    def sign_ed25519(self, root: bytes) -> bytes:
        return self._peer.sign_ed25519(root)

    def sign_evm(self, digest: bytes) -> bytes:
        return self._operator.sign_evm(digest)

    def ed25519_seed(self) -> bytes:
        return self._peer.ed25519_seed()

    def evm_private_key(self) -> bytes:
        return self._operator.evm_private_key()


CHECKS: tuple[Callable[[ChainBench], None], ...] = (
    check_committee_is_who_staked,
    check_stake_below_minimum_has_no_seat,
    check_tasks,
    check_anchors_chain,
    check_bad_anchors_are_refused,
    check_one_identity_each,
    check_claims,
)
