"""The Chain port over web3.

Law: this adapter reads and submits; what is accepted is decided by contracts/src.  It holds no state but a
cache of events that follows reorganisations, so any number of processes may look at one chain.  All reads are
of the `latest` block: whoever pays out or slashes on a public chain waits for `finalized` first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from web3 import exceptions

from p2pflock.chain import points, transactions
from p2pflock.chain.addresses import AddressBook
from p2pflock.chain.events import Event, EventSync
from p2pflock.chain.rpc import RPC_SECONDS, Contracts, Endpoint, checksum
from p2pflock.errors import ChainRejectedError, ChainUnavailableError
from p2pflock.ports import AnchorCall, AnchorReceipt, Member, Signer, TaskOnChain
from p2pflock.primitives import bls, signing
from p2pflock.primitives.keccak import keccak256

_SNAPSHOT_HEAD_BYTES: Final = 145  # 00, total key, total weight: contracts/src/libraries/CommitteeCode.sol
_SNAPSHOT_MEMBER_BYTES: Final = 112
_REORG_RETRIES: Final = 3


class EvmChain:
    """The contracts of `book`, seen through `rpc_url`.  Blocking and thread-safe."""

    def __init__(self, rpc_url: str, book: AddressBook, *, timeout_seconds: float = RPC_SECONDS) -> None:
        self.book = book
        self._endpoint = Endpoint(rpc_url, book.chain_id, timeout_seconds=timeout_seconds)
        self._contracts = Contracts(self._endpoint.web3, book)
        self._log = EventSync(self._contracts.anchor, ("Anchored", "EpochOpened"), book.deployed_block)
        self._gas_used: dict[tuple[bytes, bytes], int] = {}  # (transaction, block hash) -> gas

    @property
    def chain_id(self) -> int:
        return self.book.chain_id

    @property
    def anchor_address(self) -> bytes:
        return self.book.anchor

    # --- identity and stake -------------------------------------------------------------------------------
    def register(self, signer: Signer) -> None:
        registry = self._contracts.registry
        key = bls.g1_to_eip2537(signer.bls_public_key)
        with self._endpoint.calling("read registration"):
            is_registered = registry.functions.isRegistered(checksum(signer.address)).call()
            if is_registered:
                peer_id, known_key = registry.functions.peerOf(checksum(signer.address)).call()
        if is_registered:
            if (bytes(peer_id), bytes(known_key)) != (signer.peer_id, key):
                raise ChainRejectedError(
                    "register: the account is bound to another peer id or BLS key",
                    "use the identity that registered, or an account of its own",
                )
            return
        root = signing.compute_possession_root(
            chain_id=self.chain_id,
            registry=self.book.registry,
            operator=signer.address,
            peer_id_hash=keccak256(signer.peer_id),
            bls_public_key=signer.bls_public_key,
        )
        proof = bls.g2_to_eip2537(signer.prove_possession(root))
        self._transact(
            signer, "register", self.book.registry, registry, "register", signer.peer_id, key, proof
        )

    def stake(self, signer: Signer, amount_wei: int) -> None:
        self._allow(signer, self.book.staking, amount_wei)
        self._transact(signer, "stake", self.book.staking, self._contracts.staking, "deposit", amount_wei)

    def request_exit(self, signer: Signer, amount_wei: int) -> None:
        """Start the cooldown of active stake."""
        self._transact(
            signer, "request exit", self.book.staking, self._contracts.staking, "requestExit", amount_wei
        )

    def withdraw(self, signer: Signer) -> None:
        """Take out what has cooled down."""
        self._transact(signer, "withdraw", self.book.staking, self._contracts.staking, "withdraw")

    def staked(self, address: bytes) -> int:
        """Active stake in wei."""
        return int(self._read("read stake", self._contracts.staking, "activeOf", checksum(address)))

    # --- tasks and committees -----------------------------------------------------------------------------
    def create_task(self, signer: Signer, task: bytes, rounds: int, reward_wei: int) -> None:
        self._allow(signer, self.book.tasks, reward_wei)
        self._transact(
            signer,
            "create task",
            self.book.tasks,
            self._contracts.tasks,
            "createTask",
            task,
            rounds,
            reward_wei,
        )

    def task(self, task: bytes) -> TaskOnChain:
        creator, rounds, reward, _paid = self._read("read task", self._contracts.tasks, "taskOf", task)
        if rounds == 0:
            raise ChainRejectedError(
                f"task {task.hex()[:16]} is not on this chain", "create it, or use its network"
            )
        head, last_round, *_ = self._read("read task", self._contracts.anchor, "lineOf", task)
        return TaskOnChain(
            task=task,
            creator=bytes.fromhex(creator[2:]),
            reward_wei=reward,
            rounds=rounds,
            last_round=last_round,
            head=bytes(head) if any(head) else task,  # before the first epoch there is no line yet
        )

    def open_epoch(self, signer: Signer, task: bytes, epoch: int) -> None:
        if self._is_open(task, epoch):
            return
        action = f"open epoch {epoch}"
        try:
            self._transact(signer, action, self.book.anchor, self._contracts.anchor, "openEpoch", task, epoch)
        except ChainRejectedError:
            if not self._is_open(task, epoch):  # somebody else may have been faster
                raise

    def _is_open(self, task: bytes, epoch: int) -> bool:
        snapshot, _ = self._read("read epoch", self._contracts.anchor, "epochOf", task, epoch)
        return bool(int(snapshot, 16))

    def committee(self, task: bytes, epoch: int) -> Sequence[Member]:
        """Members in seat order; empty while the epoch is not open."""
        event = self._find("EpochOpened", task=task, epoch=epoch)
        if event is None:
            return ()
        with self._endpoint.calling("read committee") as web3:
            code = bytes(web3.eth.get_code(event.values["snapshot"]))[_SNAPSHOT_HEAD_BYTES:]
            operators = event.values["operators"]
            if len(code) != len(operators) * _SNAPSHOT_MEMBER_BYTES:
                raise ChainUnavailableError(
                    f"epoch {epoch}: event and snapshot disagree", "use another RPC endpoint"
                )
            members = []
            for seat, operator in enumerate(operators):
                entry = code[seat * _SNAPSHOT_MEMBER_BYTES :][:_SNAPSHOT_MEMBER_BYTES]
                peer_id, _ = self._contracts.registry.functions.peerOf(operator).call()
                members.append(
                    Member(
                        peer=bytes(peer_id),
                        address=bytes.fromhex(operator[2:]),
                        bls_public_key=points.unpack_key(entry[:96]),
                        weight=int.from_bytes(entry[96:], "big"),
                    )
                )
            return tuple(members)

    # --- anchors ------------------------------------------------------------------------------------------
    def anchor(self, signer: Signer, call: AnchorCall) -> AnchorReceipt:
        done = self._anchored_alike(call)
        if done is not None:
            return done
        action = f"anchor round {call.round}"
        argument = (
            call.task,
            call.epoch,
            call.round,
            call.view,
            call.record_digest,
            call.rewards_root,
            call.signers,
            bls.g2_to_eip2537(call.signature),
        )
        try:
            self._transact(signer, action, self.book.anchor, self._contracts.anchor, "anchor", argument)
        except ChainRejectedError:
            done = self._anchored_alike(call)  # two members may submit at once
            if done is None:
                raise
            return done
        receipt = self.anchored(call.task, call.round)
        if receipt is None:
            raise ChainUnavailableError(f"{action}: included, then dropped by a reorganisation", "try again")
        return receipt

    def _anchored_alike(self, call: AnchorCall) -> AnchorReceipt | None:
        """The receipt of the same record; ChainRejectedError when the round holds another one."""
        event = self._find("Anchored", task=call.task, round=call.round)
        if event is None:
            return None
        if bytes(event.values["recordDigest"]) != call.record_digest:
            raise ChainRejectedError(
                f"anchor round {call.round}: another record is anchored for this round",
                "sync: this peer follows a history that the committee did not choose",
            )
        return self.anchored(call.task, call.round)

    def anchored(self, task: bytes, round_: int) -> AnchorReceipt | None:
        for _ in range(_REORG_RETRIES):
            event = self._find("Anchored", task=task, round=round_)
            if event is None:
                return None
            gas_used = self._get_gas_used(event)
            if gas_used is not None:
                return AnchorReceipt(
                    round=round_,
                    transaction=event.transaction,
                    gas_used=gas_used,
                    block_number=event.block_number,
                    head=bytes(event.values["head"]),
                )
        raise ChainUnavailableError("the chain reorganises faster than it can be read", "try again")

    def anchored_call(self, task: bytes, round_: int) -> AnchorCall | None:
        event = self._find("Anchored", task=task, round=round_)
        if event is None:
            return None
        values = event.values
        return AnchorCall(
            task=task,
            epoch=values["epoch"],
            round=values["round"],
            view=values["view_"],
            record_digest=bytes(values["recordDigest"]),
            rewards_root=bytes(values["rewardsRoot"]),
            signers=values["signers"],
            signature=points.compress_g2(bytes(values["signature"])),
        )

    def _find(self, name: str, **wanted: object) -> Event | None:
        """The event on the canonical chain with these values; there is at most one."""
        with self._endpoint.calling("read events") as web3:
            for event in reversed(self._log.refresh(web3)):
                if event.name == name and all(
                    event.values[label] == value for label, value in wanted.items()
                ):
                    return event
        return None

    def _get_gas_used(self, event: Event) -> int | None:
        """None when the transaction is no longer where the event was: a reorganisation in between."""
        key = (event.transaction, event.block_hash)
        if key not in self._gas_used:
            with self._endpoint.calling("read receipt") as web3:
                try:
                    receipt = web3.eth.get_transaction_receipt(event.transaction)  # type: ignore[arg-type]
                except exceptions.TransactionNotFound:
                    return None
                if bytes(receipt["blockHash"]) != event.block_hash:
                    return None
                self._gas_used[key] = receipt["gasUsed"]
        return self._gas_used[key]

    # --- money --------------------------------------------------------------------------------------------
    def claim(
        self, signer: Signer, task: bytes, round_: int, cumulative_wei: int, proof: Sequence[bytes]
    ) -> bytes:
        receipt = self._transact(
            signer,
            f"claim round {round_}",
            self.book.rewards,
            self._contracts.rewards,
            "claim",
            task,
            round_,
            checksum(signer.address),
            cumulative_wei,
            list(proof),
        )
        return bytes(receipt["transactionHash"])

    def claimed(self, task: bytes, address: bytes) -> int:
        return int(self._read("read claims", self._contracts.rewards, "claimedOf", task, checksum(address)))

    def balance(self, address: bytes) -> int:
        return int(self._read("read balance", self._contracts.token, "balanceOf", checksum(address)))

    def native_balance(self, address: bytes) -> int:
        """What pays for gas, in wei."""
        with self._endpoint.calling("read balance") as web3:
            return int(web3.eth.get_balance(checksum(address)))

    # --- the two ways to call -----------------------------------------------------------------------------
    def _read(self, action: str, contract: Any, function: str, *arguments: object) -> Any:
        with self._endpoint.calling(action):
            return contract.functions[function](*arguments).call()

    def _transact(
        self, signer: Signer, action: str, to: bytes, contract: Any, function: str, *arguments: object
    ) -> Mapping[str, Any]:
        data = contract.encode_abi(function, arguments)
        return transactions.send(self._endpoint, signer.evm_private_key(), action, to=to, data=data)

    def _allow(self, signer: Signer, spender: bytes, amount_wei: int) -> None:
        """Let `spender` take exactly this much: no standing allowance for a contract that may have a fault."""
        token = self._contracts.token
        owner = checksum(signer.address)
        allowance = self._read("read allowance", token, "allowance", owner, checksum(spender))
        if allowance < amount_wei:
            self._transact(
                signer, "approve", self.book.token, token, "approve", checksum(spender), amount_wei
            )
