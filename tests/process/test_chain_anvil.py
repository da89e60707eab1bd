"""The chain adapter and the real contracts on a real anvil: conformance, reorganisations, dead endpoints, gas."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import requests

from p2pflock.chain.addresses import AddressBook
from p2pflock.chain.anvil import DEV_KEY, Anvil, find_anvil
from p2pflock.chain.deployment import deploy, fund
from p2pflock.chain.evm import EvmChain
from p2pflock.errors import (
    ChainRejectedError,
    ChainUnavailableError,
    FlockError,
    MissingToolError,
    PortTakenError,
)
from p2pflock.params import FLOCK_WEI, LOCAL
from p2pflock.primitives.keccak import keccak256
from p2pflock.storage.keystore import Identity
from p2pflock.testing.conformance_chain import CHECKS, ChainBench, build_call, start

# Real time passes on anvil: with the local network's second, no test could see the window open.
PARAMS = replace(LOCAL.chain, challenge_window_seconds=600)
ETHER = 10**18
SIGNERS = [Identity.generate(lambda n, i=i: hashlib.shake_256(b"anvil %d" % i).digest(n)) for i in range(5)]


EVENTS = {
    "0x" + keccak256(event.encode()).hex(): name
    for name, event in {
        "register": "Registered(address,bytes32,bytes,bytes)",
        "stake": "Deposited(address,uint256,uint256)",
        "create task": "TaskCreated(bytes32,address,uint64,uint256)",
        "open epoch of 4": "EpochOpened(bytes32,uint64,address,uint256,address[])",
        "anchor": "Anchored(bytes32,uint64,uint64,uint64,bytes32,bytes32,bytes32,uint256,bytes)",
    }.items()
}


def rpc(url: str, method: str, *params: object) -> object:
    body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": list(params)}
    answer = requests.post(url, json=body, timeout=10).json()
    assert "error" not in answer, answer
    return answer["result"]


@pytest.fixture(scope="module")
def anvil() -> Iterator[Anvil]:
    with Anvil.start() as running:
        yield running


@pytest.fixture(scope="module")
def deployed(anvil: Anvil) -> AddressBook:
    book = deploy(anvil.rpc_url, DEV_KEY, PARAMS)
    addresses = [signer.address for signer in SIGNERS]
    fund(anvil.rpc_url, book, DEV_KEY, addresses, native_wei=ETHER, flock_wei=10_000 * FLOCK_WEI)
    return book


@pytest.fixture
def bench(anvil: Anvil, deployed: AddressBook) -> Iterator[ChainBench]:
    """The same fresh deployment for every test: the chain is taken back afterwards."""
    snapshot = rpc(anvil.rpc_url, "evm_snapshot")

    def advance(seconds: int) -> None:
        rpc(anvil.rpc_url, "evm_increaseTime", seconds)
        rpc(anvil.rpc_url, "evm_mine")

    yield ChainBench(EvmChain(anvil.rpc_url, deployed), SIGNERS, PARAMS, advance)
    rpc(anvil.rpc_url, "evm_revert", snapshot)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(check, bench: ChainBench) -> None:
    check(bench)


def test_reorganisation_drops_and_restores_anchors(anvil: Anvil, bench: ChainBench) -> None:
    chain, task = bench.chain, start(bench)
    for round_ in (1, 2):
        receipt = chain.anchor(SIGNERS[0], build_call(bench, task, round_))
    kept = chain.anchored(task, 1)
    call = chain.anchored_call(task, 2)
    newest = int(str(rpc(anvil.rpc_url, "eth_blockNumber")), 16)
    # Every block from round 2's on is replaced by an empty one.
    rpc(anvil.rpc_url, "anvil_reorg", newest - receipt.block_number + 1, [])
    assert chain.anchored(task, 2) is None
    assert chain.anchored_call(task, 2) is None
    assert chain.anchored(task, 1) == kept
    assert chain.task(task).last_round == 1
    again = chain.anchor(SIGNERS[1], call)  # the same attestation, submitted by another
    assert again.head == receipt.head
    assert again.transaction != receipt.transaction
    assert chain.anchored(task, 2) == again
    assert EvmChain(anvil.rpc_url, chain.book).anchored(task, 2) == again


def test_gas_of_a_whole_run(anvil: Anvil, bench: ChainBench, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints what each transaction of a run costs; the anchor is bound by the acceptance of issue 2."""
    chain, task = bench.chain, start(bench)
    receipts = [
        chain.anchor(SIGNERS[0], build_call(bench, task, round_, signers=signers))
        for round_, signers in enumerate((0b1111, 0b0111, 0b1011), 1)
    ]
    book = chain.book
    first = hex(book.deployed_block)
    addresses = ["0x" + address.hex() for address in (book.registry, book.staking, book.tasks, book.anchor)]
    logs = rpc(anvil.rpc_url, "eth_getLogs", {"address": addresses, "fromBlock": first, "toBlock": "latest"})
    gas: dict[str, list[int]] = {}
    for log in logs:
        name = EVENTS.get(log["topics"][0])
        if name:
            found = rpc(anvil.rpc_url, "eth_getTransactionReceipt", log["transactionHash"])
            gas.setdefault(name, []).append(int(found["gasUsed"], 16))
    with capsys.disabled():
        for name, used in gas.items():
            print(f"\n  gas {name}: {min(used):,} - {max(used):,} ({len(used)})", end="")
    assert gas.keys() == set(EVENTS.values())
    assert [receipt.gas_used for receipt in receipts] == gas["anchor"]
    assert max(gas["anchor"]) <= 290_000


def test_poor_account_is_told_so(bench: ChainBench) -> None:
    poor = Identity.generate(lambda n: hashlib.shake_256(b"poor").digest(n))
    with pytest.raises(ChainRejectedError) as caught:
        bench.chain.register(poor)
    assert "gas" in caught.value.message
    assert caught.value.hint


# --- the endpoint is the fault ----------------------------------------------------------------------------
def expect_unavailable(url: str, book: AddressBook) -> FlockError:
    chain = EvmChain(url, book, timeout_seconds=0.5)  # never touches the network
    with pytest.raises(ChainUnavailableError) as caught:
        chain.balance(bytes(20))
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    return caught.value


def test_dead_endpoint(deployed: AddressBook) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        error = expect_unavailable(f"http://127.0.0.1:{unused.getsockname()[1]}/v2/secret-api-key", deployed)
    assert "secret-api-key" not in str(error)


def test_silent_endpoint(deployed: AddressBook) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        expect_unavailable(f"http://127.0.0.1:{silent.getsockname()[1]}", deployed)


@pytest.mark.parametrize(
    "body", [b"<html>", b"[]", b'{"result": null}', b'{"jsonrpc":"2.0","id":0,"result":7}']
)
def test_nonsense_endpoint(deployed: AddressBook, body: bytes) -> None:
    import http.server
    import threading

    class Nonsense(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Nonsense) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        expect_unavailable(f"http://127.0.0.1:{server.server_port}", deployed)
        server.shutdown()
        thread.join()


def test_endpoint_of_another_chain(anvil: Anvil, deployed: AddressBook) -> None:
    error = expect_unavailable(anvil.rpc_url, replace(deployed, chain_id=8453))
    assert "8453" in error.message


def test_address_book_of_another_deployment(anvil: Anvil, deployed: AddressBook) -> None:
    expect_unavailable(anvil.rpc_url, replace(deployed, token=bytes(19) + b"\x99"))


# --- anvil itself -----------------------------------------------------------------------------------------
def test_taken_port_is_named(anvil: Anvil) -> None:
    with pytest.raises(PortTakenError) as caught:
        Anvil.start(port=anvil.port)
    assert str(anvil.port) in caught.value.message


def test_missing_anvil_says_how_to_get_it() -> None:
    with pytest.raises(MissingToolError) as caught:
        find_anvil({**os.environ, "P2PFLOCK_ANVIL": "/nonexistent/anvil"})
    assert caught.value.hint


def test_state_survives_a_restart(tmp_path: Path) -> None:
    state = tmp_path / "chain" / "state.json"
    with Anvil.start(state_path=state) as first:
        book = deploy(first.rpc_url, DEV_KEY, PARAMS)
        fund(first.rpc_url, book, DEV_KEY, [SIGNERS[0].address], native_wei=ETHER, flock_wei=7)
    book.save(tmp_path / "book.json")
    with Anvil.start(state_path=state) as second:
        chain = EvmChain(second.rpc_url, AddressBook.load(tmp_path / "book.json"))
        assert chain.balance(SIGNERS[0].address) == 7
        assert chain.native_balance(SIGNERS[0].address) == ETHER


def test_anvil_dies_with_its_parent() -> None:
    script = (
        "import sys, time\n"
        "from p2pflock.chain.anvil import Anvil\n"
        "anvil = Anvil.start()\n"
        "print(anvil.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    os.kill(pid, 0)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "anvil outlived its parent"
        time.sleep(0.01)
