"""Signs here, sends there: one transaction at a time per account, included or explained.

Law: a call that returns has a receipt with status 1.  A refusal is known before anything is sent (the gas
estimate runs the call), or, when the state moved in between, by running the call again at the block of the
failed receipt.  A transaction that is not included in time is replaced once at a higher fee under the same
nonce, so that it can not happen twice.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any, Final

from eth_account import Account
from web3 import Web3, exceptions

from p2pflock.chain.rpc import Endpoint, checksum
from p2pflock.errors import ChainRejectedError, ChainUnavailableError

GAS_CAP: Final = 1 << 24  # of one transaction since Osaka
GAS_MARGIN_PERCENT: Final = 20  # state may move between estimate and inclusion
PRIORITY_FEE_WEI: Final = 1_000_000  # 0.001 gwei: what Base's sequencer asks for when idle
INCLUSION_SECONDS: Final = 30.0
POLL_SECONDS: Final = 0.02
REPLACEMENTS: Final = 2  # sendings under one nonce
NONCE_RACES: Final = 3

_account_locks: dict[tuple[str, str], threading.Lock] = {}
_account_locks_lock = threading.Lock()


def _account_lock(rpc_url: str, address: str) -> threading.Lock:
    with _account_locks_lock:
        return _account_locks.setdefault((rpc_url, address), threading.Lock())


def send(
    endpoint: Endpoint,
    private_key: bytes,
    action: str,
    *,
    to: bytes | None,
    data: str = "0x",
    value_wei: int = 0,
) -> Mapping[str, Any]:
    """Receipt of an included, successful transaction.

    Args:
        endpoint: of the chain.
        private_key: 32 bytes; stays in this process.
        action: what an error message says was tried.
        to: 20 bytes, or None to create a contract.
        data: 0x-prefixed call data or creation code.
        value_wei: native coin to send along.

    Raises:
        ChainRejectedError: the contract, or the account's balance, refuses.
        ChainUnavailableError: the endpoint is away or includes nothing.
    """
    account = Account.from_key(private_key)
    with _account_lock(endpoint.rpc_url, account.address), endpoint.calling(action) as web3:
        call: dict[str, Any] = {"from": account.address, "value": value_wei, "data": data}
        if to is not None:
            call["to"] = checksum(to)
        call["gas"] = _estimate_gas(web3, call)
        for race in range(NONCE_RACES):
            try:
                return _send_included(web3, account, call, action)
            except exceptions.Web3RPCError as error:
                # Another process used the same key in between: count again.
                if "nonce" not in str(error).lower() or race == NONCE_RACES - 1:
                    raise
    raise AssertionError("unreachable")


def _estimate_gas(web3: Web3, call: Mapping[str, Any]) -> int:
    estimate = web3.eth.estimate_gas(dict(call))  # type: ignore[arg-type]
    return min(estimate + estimate * GAS_MARGIN_PERCENT // 100, GAS_CAP)


def _send_included(web3: Web3, account: Any, call: Mapping[str, Any], action: str) -> Mapping[str, Any]:
    base_fee = web3.eth.get_block("latest").get("baseFeePerGas", 0)
    priority = PRIORITY_FEE_WEI
    fields = {
        **{name: value for name, value in call.items() if name != "from"},
        "chainId": web3.eth.chain_id,
        "nonce": web3.eth.get_transaction_count(account.address, "pending"),
        "type": 2,
    }
    hashes: list[bytes] = []
    for _ in range(REPLACEMENTS):
        # Twice the base fee outlives six full blocks; a replacement must offer more of both.
        fees = {"maxPriorityFeePerGas": priority, "maxFeePerGas": 2 * base_fee + priority}
        signed = account.sign_transaction({**fields, **fees})
        try:
            hashes.append(bytes(web3.eth.send_raw_transaction(signed.raw_transaction)))
        except exceptions.Web3RPCError as error:
            if not hashes and "already known" not in str(error).lower():
                raise
            hashes.append(bytes(signed.hash))  # the first one may be in by now
        receipt = _wait(web3, hashes)
        if receipt is not None:
            if receipt["status"] != 1:
                _explain(web3, call, receipt, action)
            return receipt
        base_fee, priority = 2 * base_fee, 2 * priority
    raise ChainUnavailableError(
        f"{action}: not included within {INCLUSION_SECONDS * REPLACEMENTS:.0f} s", "try again later"
    )


def _wait(web3: Web3, hashes: list[bytes]) -> Mapping[str, Any] | None:
    """Receipt of whichever of these was included, or None after INCLUSION_SECONDS."""
    deadline = time.monotonic() + INCLUSION_SECONDS
    while time.monotonic() < deadline:
        for transaction in hashes:
            try:
                return web3.eth.get_transaction_receipt(transaction)  # type: ignore[arg-type]
            except exceptions.TransactionNotFound:
                continue
        time.sleep(POLL_SECONDS)
    return None


def _explain(web3: Web3, call: Mapping[str, Any], receipt: Mapping[str, Any], action: str) -> None:
    """Raises what made a transaction fail that had passed its estimate."""
    web3.eth.call(dict(call), receipt["blockNumber"])  # type: ignore[arg-type]
    raise ChainRejectedError(f"{action}: the transaction failed", "try again: the state moved meanwhile")
