"""The contracts in memory: the same refusals under the same names, no node, no gas.

Law: a refusal here is a refusal there; p2pflock.testing.conformance_chain runs over both.  The order of checks
follows contracts/src.  Time is passed in.  One object is the chain, for any number of peers and threads.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from p2pflock.errors import ChainRejectedError, ChainUnavailableError
from p2pflock.params import FLOCK_WEI, LOCAL, ChainParams
from p2pflock.ports import AnchorCall, AnchorReceipt, Member, Signer, TaskOnChain
from p2pflock.primitives import bls, merkle, signing
from p2pflock.primitives.keccak import keccak256

MAX_MEMBERS = 218
GAS_USED = 260_000  # what the receipts of this chain say


def _address(label: str) -> bytes:
    return hashlib.sha256(b"p2pflock/fake-chain/" + label.encode()).digest()[:20]


@dataclass(slots=True)
class _Epoch:
    members: tuple[Member, ...]
    opened_at: int


@dataclass(slots=True)
class _Task:
    state: TaskOnChain
    paid: int = 0
    claimed: dict[bytes, int] = field(default_factory=dict)
    epochs: list[_Epoch] = field(default_factory=list)
    last_epoch: int = 0
    calls: list[tuple[AnchorCall, AnchorReceipt, int]] = field(default_factory=list)  # (…, anchored at)


class FakeChain:
    """A development chain without a process.

    Args:
        params: as of the network.
        now: unix seconds; a test owns it.
    """

    def __init__(
        self, params: ChainParams = LOCAL.chain, *, now: Callable[[], int] = lambda: 1_800_000_000
    ) -> None:
        self.params = params
        self.is_down = False  # a test's switch: every call raises ChainUnavailableError
        self._now = now
        self._lock = threading.RLock()
        self._anchor, self._registry = _address("anchor"), _address("registry")
        self._balances: dict[bytes, int] = {}
        self._peers: dict[bytes, tuple[bytes, bytes]] = {}  # operator -> (peer id, BLS key)
        self._stakes: dict[bytes, int] = {}
        self._seats: list[bytes] = []
        self._tasks: dict[bytes, _Task] = {}
        self._transactions = 0

    @contextmanager
    def _calling(self) -> Iterator[None]:
        with self._lock:
            if self.is_down:
                raise ChainUnavailableError("chain fake did not answer", "switch it on")
            yield

    @property
    def chain_id(self) -> int:
        return self.params.chain_id

    @property
    def anchor_address(self) -> bytes:
        return self._anchor

    @property
    def registry_address(self) -> bytes:
        return self._registry

    def mint(self, address: bytes, amount_wei: int = 1_000_000 * FLOCK_WEI) -> None:
        """FLOCK out of nothing, for a test's accounts."""
        with self._lock:
            self._balances[address] = self._balances.get(address, 0) + amount_wei

    # --- identity and stake -------------------------------------------------------------------------------
    def register(self, signer: Signer) -> None:
        with self._calling():
            operator, mine = signer.address, (signer.peer_id, signer.bls_public_key)
            if operator in self._peers:
                if self._peers[operator] != mine:
                    raise _refused("register", "AlreadyRegistered")
                return
            if any(peer == mine[0] for peer, _ in self._peers.values()):
                raise _refused("register", "PeerIdTaken")
            if any(key == mine[1] for _, key in self._peers.values()):
                raise _refused("register", "KeyTaken")
            root = signing.compute_possession_root(
                chain_id=self.chain_id,
                registry=self._registry,
                operator=operator,
                peer_id_hash=keccak256(mine[0]),
                bls_public_key=mine[1],
            )
            if not bls.verify_possession(mine[1], root, signer.prove_possession(root)):
                raise _refused("register", "BadProofOfPossession")
            self._peers[operator] = mine
            self._transactions += 1

    def stake(self, signer: Signer, amount_wei: int) -> None:
        with self._calling():
            operator = signer.address
            if amount_wei == 0:
                raise _refused("stake", "ZeroAmount")
            if operator not in self._peers:
                raise _refused("stake", "NotRegistered")
            self._take("stake", operator, amount_wei)
            self._stakes[operator] = self._stakes.get(operator, 0) + amount_wei
            self._seat(operator)

    def _seat(self, operator: bytes) -> None:
        if operator in self._seats or self._stakes[operator] < self.params.min_stake_wei:
            return
        if len(self._seats) == MAX_MEMBERS:
            # The latest of the smallest gives way to more stake, and the last fills its place.
            least = min(self._stakes[seated] for seated in self._seats)
            if least >= self._stakes[operator]:
                return
            gone = max(i for i, seated in enumerate(self._seats) if self._stakes[seated] == least)
            self._seats[gone] = self._seats[-1]
            self._seats.pop()
        self._seats.append(operator)

    def _take(self, action: str, address: bytes, amount_wei: int) -> None:
        if self._balances.get(address, 0) < amount_wei:
            raise _refused(action, "ERC20InsufficientBalance")
        self._balances[address] = self._balances.get(address, 0) - amount_wei
        self._transactions += 1

    # --- tasks and committees -----------------------------------------------------------------------------
    def create_task(self, signer: Signer, task: bytes, rounds: int, reward_wei: int) -> None:
        with self._calling():
            if not any(task):
                raise _refused("create task", "ZeroTask")
            if rounds == 0:
                raise _refused("create task", "ZeroRounds")
            if task in self._tasks:
                raise _refused("create task", "TaskExists")
            self._take("create task", signer.address, reward_wei)
            self._tasks[task] = _Task(TaskOnChain(task, signer.address, reward_wei, rounds, 0, task))

    def task(self, task: bytes) -> TaskOnChain:
        with self._calling():
            return self._get("read task", task).state

    def _get(self, action: str, task: bytes) -> _Task:
        found = self._tasks.get(task)
        if found is None:
            raise _refused(action, "UnknownTask")
        return found

    def open_epoch(self, signer: Signer, task: bytes, epoch: int) -> None:
        with self._calling():
            action = f"open epoch {epoch}"
            line = self._get(action, task)
            if epoch < len(line.epochs):
                return
            if epoch != len(line.epochs):
                raise _refused(action, "WrongEpoch")
            if line.epochs and self._now() < line.epochs[-1].opened_at + self.params.epoch_seconds:
                raise _refused(action, "EpochTooEarly")
            if not self._seats:
                raise _refused(action, "EmptyCommittee")
            members = tuple(
                Member(self._peers[operator][0], operator, self._peers[operator][1], self._stakes[operator])
                for operator in self._seats
            )
            line.epochs.append(_Epoch(members, self._now()))
            self._transactions += 1

    def committee(self, task: bytes, epoch: int) -> Sequence[Member]:
        with self._calling():
            line = self._tasks.get(task)
            return line.epochs[epoch].members if line is not None and epoch < len(line.epochs) else ()

    # --- anchors ------------------------------------------------------------------------------------------
    def anchor(self, signer: Signer, call: AnchorCall) -> AnchorReceipt:
        with self._calling():
            action = f"anchor round {call.round}"
            line = self._get(action, call.task)
            if 0 < call.round <= len(line.calls):
                known, receipt, _ = line.calls[call.round - 1]
                if known.record_digest != call.record_digest:
                    raise ChainRejectedError(f"{action}: another record is anchored for this round")
                return receipt
            self._check(action, line, call)
            head = signing.compute_head(
                task=call.task,
                round_=call.round,
                record_digest=call.record_digest,
                rewards_root=call.rewards_root,
                previous_head=line.state.head,
            )
            self._transactions += 1
            transaction = keccak256(head + self._transactions.to_bytes(8, "big"))
            receipt = AnchorReceipt(call.round, transaction, GAS_USED, self._transactions, head)
            line.state = replace(line.state, last_round=call.round, head=head)
            line.last_epoch = call.epoch
            line.calls.append((call, receipt, self._now()))
            return receipt

    def _check(self, action: str, line: _Task, call: AnchorCall) -> None:
        state = line.state
        if call.round != state.last_round + 1:
            raise _refused(action, "WrongRound")
        if call.epoch >= len(line.epochs):
            raise _refused(action, "UnknownEpoch")
        if call.round > state.rounds:
            raise _refused(action, "TaskFinished")
        if call.epoch < line.last_epoch:
            raise _refused(action, "WrongEpoch")
        if not any(call.record_digest):
            raise _refused(action, "NilRecord")
        epoch = line.epochs[call.epoch]
        params = self.params
        lifetime = params.cooldown_seconds - params.challenge_window_seconds - params.finality_seconds
        if self._now() > epoch.opened_at + lifetime:
            raise _refused(action, "EpochExpired")
        if call.signers >> len(epoch.members):
            raise _refused(action, "SignerOutOfRange")
        signing_members = [m for seat, m in enumerate(epoch.members) if call.signers >> seat & 1]
        weight = sum(member.weight for member in signing_members)
        if 3 * weight <= 2 * sum(member.weight for member in epoch.members):
            raise _refused(action, "NoQuorum")
        digest = signing.compute_vote_digest(
            chain_id=self.chain_id,
            anchor=self._anchor,
            task=call.task,
            epoch=call.epoch,
            round_=call.round,
            view=call.view,
            step=1,
            record_digest=call.record_digest,
            rewards_root=call.rewards_root,
            previous_head=state.head,
        )
        keys = [member.bls_public_key for member in signing_members]
        bls.g2_to_eip2537(call.signature)  # InvalidMessageError, as where the call is encoded
        if not bls.fast_aggregate_verify(keys, digest, call.signature):
            raise _refused(action, "BadSignature")

    def anchored(self, task: bytes, round_: int) -> AnchorReceipt | None:
        with self._calling():
            entry = self._entry(task, round_)
            return entry[1] if entry else None

    def anchored_call(self, task: bytes, round_: int) -> AnchorCall | None:
        with self._calling():
            entry = self._entry(task, round_)
            return entry[0] if entry else None

    def _entry(self, task: bytes, round_: int) -> tuple[AnchorCall, AnchorReceipt, int] | None:
        line = self._tasks.get(task)
        return line.calls[round_ - 1] if line is not None and 0 < round_ <= len(line.calls) else None

    def reorganise(self, task: bytes, rounds: int) -> None:
        """Forget the last anchors of a task, as a reorganisation of the chain does."""
        with self._lock:
            line = self._tasks[task]
            del line.calls[len(line.calls) - rounds :]
            head = line.calls[-1][1].head if line.calls else task
            line.state = replace(line.state, last_round=len(line.calls), head=head)
            line.last_epoch = line.calls[-1][0].epoch if line.calls else 0

    # --- money --------------------------------------------------------------------------------------------
    def claim(
        self, signer: Signer, task: bytes, round_: int, cumulative_wei: int, proof: Sequence[bytes]
    ) -> bytes:
        with self._calling():
            action, account = f"claim round {round_}", signer.address
            entry = self._entry(task, round_)
            if entry is None:
                raise _refused(action, "NotAnchored")
            if self._now() < entry[2] + self.params.challenge_window_seconds:
                raise _refused(action, "ChallengeWindowOpen")
            leaf = merkle.leaf_hash(task, account, cumulative_wei)
            if not merkle.verify(entry[0].rewards_root, leaf, list(proof)):
                raise _refused(action, "BadMerkleProof")
            line = self._tasks[task]
            due = cumulative_wei - line.claimed.get(account, 0)
            if due <= 0:
                raise _refused(action, "NothingDue")
            if line.paid + due > line.state.reward_wei * round_ // line.state.rounds:
                raise _refused(action, "AboveRoundCap")
            line.claimed[account] = cumulative_wei
            line.paid += due
            self._balances[account] = self._balances.get(account, 0) + due
            self._transactions += 1
            return keccak256(leaf + self._transactions.to_bytes(8, "big"))

    def claimed(self, task: bytes, address: bytes) -> int:
        with self._calling():
            line = self._tasks.get(task)
            return line.claimed.get(address, 0) if line is not None else 0

    def balance(self, address: bytes) -> int:
        with self._calling():
            return self._balances.get(address, 0)


def _refused(action: str, error: str) -> ChainRejectedError:
    return ChainRejectedError(f"{action}: {error}()")
