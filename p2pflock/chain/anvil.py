"""The embedded development chain: one anvil process that imitates Base.

Law: five blocks share a timestamp, `safe` and `finalized` trail by one and two blocks, transactions are mined
when they arrive, the EIP-2537 precompiles are there, and the state survives in a file.  It listens on
loopback only and dies with the thread that started it (so: start it from the main thread).  Its accounts are
public knowledge; nothing of value may ever depend on them.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final

import requests

from p2pflock.errors import MissingToolError, PortTakenError, StartupError
from p2pflock.processes import die_with_parent

# First account of anvil's mnemonic ("test test … junk"), printed by every anvil that starts.
DEV_KEY: Final = bytes.fromhex("ac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80")
BLOCK_SECONDS: Final = 0.2  # Base since Denim
READY_SECONDS: Final = 20.0
GRACE_SECONDS: Final = 5.0
POLL_SECONDS: Final = 0.01
ATTEMPTS: Final = 5  # ports that somebody took between our look and anvil's bind


def _candidates(environment: Mapping[str, str]) -> Iterator[str | None]:
    chosen = environment.get("P2PFLOCK_ANVIL")
    if chosen:
        yield shutil.which(chosen)
        return  # what was asked for, or an error: never something else in silence
    yield shutil.which("anvil", path=environment.get("PATH"))
    checkout = Path(__file__).resolve().parents[2] / "contracts"
    cache = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "p2pflock" / "npm"
    for root in (checkout, cache):
        for package in ("anvil-linux-amd64", "anvil-linux-arm64", "anvil-darwin-arm64", "anvil-darwin-amd64"):
            yield shutil.which(root / "node_modules" / "@foundry-rs" / package / "bin" / "anvil")


def find_anvil(environment: Mapping[str, str] = os.environ) -> Path:
    """Where anvil is: $P2PFLOCK_ANVIL, PATH, the checkout's contracts/, or the user's cache.

    Raises MissingToolError.
    """
    for candidate in _candidates(environment):
        if candidate is not None:
            return Path(candidate)
    asked = environment.get("P2PFLOCK_ANVIL")
    raise MissingToolError(
        f"P2PFLOCK_ANVIL names {asked}, which is no program" if asked else "anvil was not found",
        "run `npm ci` in contracts/, set P2PFLOCK_ANVIL, or use --chain none",
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else our own last run still holds it
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


class Anvil:
    """A running development chain.  `start`, then `stop` or leave the with block."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self._process = process
        self.port = port

    @property
    def rpc_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @classmethod
    def start(
        cls,
        *,
        port: int = 0,
        chain_id: int = 84_532,
        state_path: Path | None = None,
        block_seconds: float = BLOCK_SECONDS,
        environment: Mapping[str, str] = os.environ,
    ) -> Anvil:
        """Start anvil and wait until it answers.

        Args:
            port: on loopback; 0 for any.
            chain_id: what it calls itself; Base Sepolia's by default.
            state_path: where the chain is kept between runs; written every second and on `stop`.
            block_seconds: time between blocks when no transaction arrives.
            environment: of the process, and where P2PFLOCK_ANVIL and PATH are looked up.

        Raises:
            MissingToolError: there is no anvil.
            PortTakenError: `port` is in use.
            StartupError: it ended or did not answer.
        """
        binary = find_anvil(environment)
        if port and not _is_free(port):
            # Asked first: an anvil that already listens there would answer just as ours.
            raise PortTakenError(f"port {port} is in use", "choose another port, or stop what holds it")
        for _ in range(ATTEMPTS):
            chosen = port or _free_port()
            command = [str(binary), "--port", str(chosen), "--host", "127.0.0.1", "--quiet"]
            command += ["--chain-id", str(chain_id), "--network", "optimism", "--hardfork", "jovian"]
            command += ["--block-time", str(block_seconds), "--mixed-mining", "--slots-in-an-epoch", "1"]
            if state_path is not None:
                state_path.parent.mkdir(parents=True, exist_ok=True)
                command += ["--state", str(state_path), "--state-interval", "1"]
            reason = ""
            with tempfile.TemporaryFile() as words:
                process = _spawn(command, words.fileno(), environment)
                anvil = cls(process, chosen)
                if anvil._answers(chain_id):
                    return anvil
                anvil.stop()
                words.seek(0)
                reason = " ".join(words.read(4096).decode(errors="replace").split())
            if port or "already in use" not in reason:
                break
        raise StartupError(f"anvil did not start: {reason[:200] or 'no answer'}", "run it by hand to see why")

    def _answers(self, chain_id: int) -> bool:
        deadline = time.monotonic() + READY_SECONDS
        body = {"jsonrpc": "2.0", "id": 1, "method": "eth_chainId", "params": []}
        with requests.Session() as session:
            session.trust_env = False  # no proxy for loopback
            while self.alive and time.monotonic() < deadline:
                try:
                    answer = session.post(self.rpc_url, json=body, timeout=2).json()
                    # Another program on that port would answer something else.
                    if answer.get("result") == hex(chain_id) and self.alive:
                        return True
                except (requests.RequestException, ValueError):
                    pass
                time.sleep(POLL_SECONDS)
        return False

    def stop(self) -> None:
        """Ends it; the state file is written first."""
        if self.alive:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()

    def __enter__(self) -> Anvil:  # noqa: PYI034 - typing.Self is 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _spawn(command: list[str], stderr: int, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    parent = os.getpid()

    def arm() -> None:
        die_with_parent()
        if os.getppid() != parent:  # it died before the signal was armed
            os._exit(1)

    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=stderr,
        stderr=stderr,
        env={**environment, "RAYON_NUM_THREADS": "2"},
        start_new_session=True,  # Ctrl-C is the parent's to handle
        preexec_fn=arm if sys.platform == "linux" else None,  # noqa: PLW1509 - one libc call, no lock taken
    )
