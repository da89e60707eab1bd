"""One RPC endpoint: where web3 is set up, and the contracts bound to an address book.

Law: construction never touches the network, so a peer starts with its chain away; the first call checks that
the endpoint serves the chain that the address book names.  A refused connection is reported at once: waiting
and trying again is the caller's policy.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from eth_utils.address import to_checksum_address
from web3 import HTTPProvider, Web3
from web3.contract import Contract

from p2pflock.chain import artifacts, failures
from p2pflock.chain.addresses import AddressBook
from p2pflock.errors import ChainUnavailableError, SpecError

RPC_SECONDS = 10.0


class Endpoint:
    """A JSON-RPC endpoint that must serve one chain."""

    def __init__(
        self, rpc_url: str, chain_id: int | None = None, *, timeout_seconds: float = RPC_SECONDS
    ) -> None:
        if not rpc_url.startswith(("http://", "https://")):
            raise SpecError("an RPC URL starts with http:// or https://", "like http://127.0.0.1:8545")
        self.rpc_url = rpc_url
        self.web3 = Web3(
            HTTPProvider(
                rpc_url, request_kwargs={"timeout": timeout_seconds}, exception_retry_configuration=None
            )
        )
        self._expected_chain_id = chain_id
        self._is_checked = False
        self._lock = threading.Lock()

    @contextmanager
    def calling(self, action: str) -> Iterator[Web3]:
        """The web3 to call on; every failure comes out as one of our errors, named after `action`."""
        with failures.mapped(self.rpc_url, action):
            self._check_chain()
            yield self.web3

    def _check_chain(self) -> None:
        with self._lock:
            if self._is_checked:
                return
            actual = self.web3.eth.chain_id
            if self._expected_chain_id not in {None, actual}:
                raise ChainUnavailableError(
                    f"the RPC endpoint serves chain {actual}, not {self._expected_chain_id}",
                    "choose an endpoint of the network, or another network",
                )
            self._is_checked = True


def checksum(address: bytes) -> Any:
    """What web3 wants an address to be."""
    return to_checksum_address(address)


class Contracts:
    """The six contracts of a deployment."""

    def __init__(self, web3: Web3, book: AddressBook) -> None:
        def bind(name: str, address: bytes) -> Contract:
            contract: Contract = web3.eth.contract(
                address=checksum(address), abi=artifacts.get_artifact(name).abi
            )
            return contract

        self.token = bind(artifacts.TOKEN, book.token)
        self.registry = bind(artifacts.REGISTRY, book.registry)
        self.staking = bind(artifacts.STAKING, book.staking)
        self.tasks = bind(artifacts.TASKS, book.tasks)
        self.anchor = bind(artifacts.ANCHOR, book.anchor)
        self.rewards = bind(artifacts.REWARDS, book.rewards)
