"""Puts the contracts on a chain, and money into accounts.

Law: six creations from one account, in an order in which every address is known beforehand; the result is the
AddressBook.  Afterwards the deployer owns three switches (pairing gas twice, who slashes), no balances.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from eth_account import Account
from web3.types import Nonce
from web3.utils import get_create_address

from p2pflock.chain import artifacts, transactions
from p2pflock.chain.addresses import AddressBook
from p2pflock.chain.rpc import Contracts, Endpoint, checksum
from p2pflock.errors import ChainUnavailableError
from p2pflock.params import FLOCK_WEI, ChainParams

INITIAL_SUPPLY_WEI: Final = 100_000_000 * FLOCK_WEI  # a tenth of the cap; to the deployer, who distributes it
BURN_ADDRESS: Final = bytes(18) + b"\xde\xad"  # no one has its key


def compute_create_address(sender: bytes, nonce: int) -> bytes:
    """20 bytes: where a creation by `sender` with this nonce ends up (yellow paper, section 7)."""
    return bytes.fromhex(get_create_address(checksum(sender), Nonce(nonce))[2:])


def compute_committee_lifetime_seconds(params: ChainParams) -> int:
    """How long a committee may anchor: it must still have stake to lose when its last anchor is challenged."""
    return params.cooldown_seconds - params.challenge_window_seconds - params.finality_seconds


def deploy(
    rpc_url: str,
    deployer_key: bytes,
    params: ChainParams,
    *,
    initial_supply_wei: int = INITIAL_SUPPLY_WEI,
    slash_sink: bytes = BURN_ADDRESS,
) -> AddressBook:
    """Deploy all contracts; about two seconds on a development chain.

    Args:
        rpc_url: of the chain.
        deployer_key: 32 bytes; receives the initial supply of FLOCK and owns the switches.
        params: of the network; the endpoint must serve `params.chain_id`.
        initial_supply_wei: FLOCK to mint, at most 1e27.
        slash_sink: 20 bytes, where slashed stake goes.
    """
    endpoint = Endpoint(rpc_url, params.chain_id)
    deployer = bytes.fromhex(Account.from_key(deployer_key).address[2:])
    with endpoint.calling("deploy") as web3:
        nonce = web3.eth.get_transaction_count(checksum(deployer), "pending")
        block = web3.eth.block_number
    token, registry, staking, tasks, anchor, rewards = (
        compute_create_address(deployer, nonce + i) for i in range(len(artifacts.NAMES))
    )
    owner = checksum(deployer)
    arguments: dict[str, tuple[object, ...]] = {
        artifacts.TOKEN: (owner, initial_supply_wei),
        artifacts.REGISTRY: (owner,),
        artifacts.STAKING: (
            checksum(token),
            checksum(registry),
            params.min_stake_wei,
            params.cooldown_seconds,
            checksum(slash_sink),
            owner,
        ),
        artifacts.TASKS: (checksum(token), checksum(rewards)),
        artifacts.ANCHOR: (
            checksum(registry),
            checksum(staking),
            checksum(tasks),
            params.epoch_seconds,
            compute_committee_lifetime_seconds(params),
            owner,
        ),
        artifacts.REWARDS: (checksum(tasks), checksum(anchor), params.challenge_window_seconds),
    }
    expected = dict(zip(artifacts.NAMES, (token, registry, staking, tasks, anchor, rewards), strict=True))
    for name in artifacts.NAMES:
        artifact = artifacts.get_artifact(name)
        contract = endpoint.web3.eth.contract(abi=artifact.abi, bytecode=artifact.bytecode)
        data = str(contract.constructor(*arguments[name]).data_in_transaction)
        receipt = transactions.send(endpoint, deployer_key, f"deploy {name}", to=None, data=data)
        if bytes.fromhex(receipt["contractAddress"][2:]) != expected[name]:
            raise ChainUnavailableError(
                f"deploy {name}: another transaction of the deployer came between",
                "deploy from an account that does nothing else, and try again",
            )
    return AddressBook(params.chain_id, block, token, registry, staking, tasks, anchor, rewards)


def fund(
    rpc_url: str,
    book: AddressBook,
    funder_key: bytes,
    addresses: Iterable[bytes],
    *,
    native_wei: int = 0,
    flock_wei: int = 0,
) -> None:
    """Send each address this much native coin and FLOCK from the funder's account."""
    endpoint = Endpoint(rpc_url, book.chain_id)
    token = Contracts(endpoint.web3, book).token
    for address in addresses:
        if native_wei:
            transactions.send(endpoint, funder_key, "fund with native coin", to=address, value_wei=native_wei)
        if flock_wei:
            data = token.encode_abi("transfer", (checksum(address), flock_wei))
            transactions.send(endpoint, funder_key, "fund with FLOCK", to=book.token, data=data)
