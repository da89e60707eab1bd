"""What web3, requests and the contracts raise, turned into our errors.

Law: the world's failures become ChainUnavailableError (try again) and the contracts' refusals become
ChainRejectedError (do not), with the custom error's name and arguments in one line.  No foreign exception
leaves the package.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Final

import requests
from eth_abi.abi import decode as decode_abi
from eth_abi.exceptions import DecodingError
from web3 import exceptions

from p2pflock.chain import artifacts
from p2pflock.errors import ChainRejectedError, ChainUnavailableError
from p2pflock.primitives.keccak import keccak256

HINTS: Final = {
    "ChallengeWindowOpen": "claim again once the challenge window is over",
    "EpochExpired": "open the next epoch",
    "EpochTooEarly": "wait for the epoch to end",
    "WrongRound": "anchor the rounds in order",
    "NotRegistered": "register the operator first",
    "PeerIdTaken": "create a new identity with `p2pflock init`",
    "ERC20InsufficientBalance": "fund the account with FLOCK",
    "ERC20InsufficientAllowance": "fund the account with FLOCK",
    "TaskExists": "change the task spec: its id is its hash",
}


@lru_cache(maxsize=1)
def _custom_errors() -> dict[bytes, tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """Selector -> (name, argument names, argument types) of every custom error of every contract."""
    found = {}
    for name in artifacts.NAMES:
        for item in artifacts.get_artifact(name).abi:
            if item["type"] == "error":
                types = tuple(argument["type"] for argument in item["inputs"])
                selector = keccak256(f"{item['name']}({','.join(types)})".encode())[:4]
                found[selector] = (item["name"], tuple(a["name"] for a in item["inputs"]), types)
    return found


def describe_revert(data: bytes) -> tuple[str, str]:
    """(error name, one line) of revert data; the name is empty when it is none of ours."""
    known = _custom_errors().get(data[:4])
    if known is None:
        return "", f"reverted with 0x{data[:68].hex()}" if data else "reverted without a reason"
    name, labels, types = known
    try:
        values = decode_abi(types, data[4:])
    except DecodingError:
        return name, name
    shown = (
        f"{label}={'0x' + value.hex() if isinstance(value, bytes) else value}"
        for label, value in zip(labels, values, strict=True)
    )
    return name, f"{name}({', '.join(shown)})"


def rejected(action: str, data: bytes) -> ChainRejectedError:
    name, line = describe_revert(data)
    return ChainRejectedError(f"{action}: {line}", HINTS.get(name, ""))


def _one_line(value: object) -> str:
    return " ".join(str(value).split())[:200]


def _revert_data(error: exceptions.ContractLogicError) -> bytes:
    try:
        return bytes.fromhex(str(error.data).removeprefix("0x"))
    except ValueError:
        return b""


def _is_refused_for_funds(error: exceptions.Web3RPCError) -> bool:
    return "insufficient funds" in str(error).lower()


@contextmanager
def mapped(rpc_url: str, action: str) -> Iterator[None]:
    """Turns whatever happens inside into ChainUnavailableError or ChainRejectedError."""
    unreachable = f"chain {_without_secret(rpc_url)} did not answer"
    try:
        yield
    except exceptions.ContractLogicError as error:
        data = _revert_data(error)
        if data:
            raise rejected(action, data) from error
        raise ChainRejectedError(f"{action}: {_one_line(error)}") from error
    except exceptions.BadFunctionCallOutput as error:
        raise ChainUnavailableError(
            f"{action}: no contract at the address", "use the address book of this very chain"
        ) from error
    except exceptions.Web3RPCError as error:
        if _is_refused_for_funds(error):
            raise ChainRejectedError(
                f"{action}: the account cannot pay for gas", "fund it with native coin"
            ) from error
        raise ChainUnavailableError(f"{action}: {_one_line(error)}", "check the RPC endpoint") from error
    except exceptions.TimeExhausted as error:
        raise ChainUnavailableError(
            f"{action}: the transaction was not included in time", "try again, or use another endpoint"
        ) from error
    except (requests.RequestException, OSError) as error:
        raise ChainUnavailableError(
            f"{unreachable} ({type(error).__name__})", "is it running, and is the RPC URL right?"
        ) from error
    except (exceptions.Web3Exception, json.JSONDecodeError, TypeError, KeyError, ValueError) as error:
        # Attack: an endpoint that answers with anything but JSON-RPC must not crash a peer.
        raise ChainUnavailableError(
            f"{action}: the endpoint answered nonsense ({type(error).__name__}: {_one_line(error)})",
            "use another RPC endpoint",
        ) from error


def _without_secret(rpc_url: str) -> str:
    """Scheme and host only: providers put API keys into path, query and user part."""
    scheme, _, rest = rpc_url.partition("://")
    return f"{scheme}://{rest.split('/')[0].split('?')[0].rpartition('@')[2]}"
