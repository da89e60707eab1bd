"""`p2pflock doctor`: would a peer run well on this machine, and if not, what to do about it.

Law: looks, and changes nothing.  Each check is a function that returns one or more findings: PASSED, WARNING (it
will run, with a drawback) or PROBLEM (it will not), the latter two with a fix.  The exit code is that of the worst
finding; a warning alone exits 0.  Slow libraries are looked up, not imported, except with --deep.
"""

from __future__ import annotations

import enum
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from p2pflock import params
from p2pflock.chain import anvil
from p2pflock.cli.options import Format, FormatOption, HomeOption, keystore_path
from p2pflock.cli.output import Output, format_bytes, format_seconds
from p2pflock.errors import (
    ChainUnavailableError,
    DiskFullError,
    EnvironmentError_,
    FlockError,
    KeystoreError,
    MissingToolError,
    PortTakenError,
)

# One peer: main process with libp2p 83 MB, hivemind process 345 MB, trainer with torch about as much again.
PEER_BYTES = 1 << 30
MIN_FREE_DISK_BYTES = 1 << 30
RELEASED_UNIX_SECONDS = 1_790_000_000  # 2026-09: a clock before this is not set
MAX_RPC_BYTES = 1 << 20
IMPORT_SECONDS = 120.0
# Exact versions whose internals our adapters mend, and one with a ceiling; see pyproject.toml.
EXACT = {"libp2p": "0.8.1", "hivemind": "1.1.12"}
LIBRARIES = ("torch", "hivemind", "libp2p", "trio", "web3", "numpy")
REINSTALL = "pip install -c constraints.txt -e '.[dev,fast]' (or: make setup)"


class Status(str, enum.Enum):
    PASSED = "PASSED"
    WARNING = "WARNING"
    PROBLEM = "PROBLEM"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found; `error` gives a problem its exit code."""

    check: str
    status: Status
    detail: str
    fix: str = ""
    error: type[FlockError] = EnvironmentError_


def passed(check: str, detail: str) -> Finding:
    return Finding(check, Status.PASSED, detail)


def warning(check: str, detail: str, fix: str) -> Finding:
    return Finding(check, Status.WARNING, detail, fix)


def problem(check: str, detail: str, fix: str, error: type[FlockError] = EnvironmentError_) -> Finding:
    return Finding(check, Status.PROBLEM, detail, fix, error)


@dataclass(frozen=True, slots=True)
class Machine:
    """What the checks are told: one peer's home and how it is meant to be run."""

    home: Path
    peers: int
    ports: tuple[int, ...]
    rpc: str | None
    network: params.NetworkParams
    with_embedded_chain: bool
    deep: bool


# --- the machine ----------------------------------------------------------------------------------------
def check_python(_: Machine) -> Iterator[Finding]:
    version = platform.python_version()
    if sys.platform != "linux":
        yield warning("python", f"{version} on {sys.platform}", "only Linux is tested")
    else:
        yield passed("python", version)


def check_cpu(machine: Machine) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores < 2:
        yield warning("cpu", "1 core", "rounds will be slow: training and network share it")
    else:
        yield passed("cpu", f"{cores} cores for {machine.peers} peer{'s' if machine.peers > 1 else ''}")


def available_memory_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Memory that can be had without swapping; None where the system does not say."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def check_memory(machine: Machine) -> Iterator[Finding]:
    available, wanted = available_memory_bytes(), machine.peers * PEER_BYTES
    if available is None:
        yield warning("memory", "unknown", f"make sure that {format_bytes(wanted)} are free")
    elif available < PEER_BYTES // 2:
        yield problem("memory", f"{format_bytes(available)} available", "close other programs: not even one peer fits")
    elif available < wanted:
        yield warning(
            "memory", f"{format_bytes(available)} available", f"{machine.peers} peers want {format_bytes(wanted)}"
        )
    else:
        yield passed("memory", f"{format_bytes(available)} available")


def check_disk(machine: Machine) -> Iterator[Finding]:
    place = machine.home
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    quota = machine.network.storage.quota_bytes * machine.peers
    detail = f"{format_bytes(free)} free at {machine.home}"
    if not os.access(place, os.W_OK):
        yield problem("disk", f"{place} is not writable", "choose another --home", DiskFullError)
    elif free < MIN_FREE_DISK_BYTES:
        yield problem("disk", detail, f"free at least {format_bytes(MIN_FREE_DISK_BYTES)}", DiskFullError)
    elif free < quota:
        yield warning("disk", detail, f"the block store may grow to {format_bytes(quota)}")
    else:
        yield passed("disk", detail)


def check_clock(_: Machine) -> Iterator[Finding]:
    # Peer records and rewards expire by wall clock.  How far off it is shows against the chain (check_rpc).
    if time.time() < RELEASED_UNIX_SECONDS:
        today = time.strftime("%Y-%m-%d", time.gmtime())
        yield problem("clock", f"it says {today}, before this release", "set the clock (ntpd, chronyd, timedatectl)")
    else:
        yield passed("clock", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()))


def check_ports(machine: Machine) -> Iterator[Finding]:
    for port in machine.ports or (0,):
        name = f"port {port}" if port else "ports"
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            # As listening servers do it: a connection in TIME_WAIT does not count as taken.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("0.0.0.0", port))  # noqa: S104 - only to see whether it is free; nothing listens
            except OSError as error:
                yield problem(name, error.strerror or "cannot be bound", "choose another port", PortTakenError)
            else:
                yield passed(name, "free" if port else "the system hands out free ones")


# --- programs and libraries -----------------------------------------------------------------------------
def check_libraries(_: Machine) -> Iterator[Finding]:
    for name in LIBRARIES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield problem(name, "not installed", REINSTALL, MissingToolError)
            continue
        numbers = [int(part) for part in re.findall(r"\d+", version)[:2]]
        if name in EXACT and version != EXACT[name]:
            yield problem(name, f"{version}, we mend {EXACT[name]}", REINSTALL, MissingToolError)
        elif name == "numpy" and numbers >= [2, 4]:
            # hivemind's 8-bit extraction fails there, and its average reports success.
            yield problem(name, f"{version}, must be below 2.4", REINSTALL, MissingToolError)
        else:
            yield passed(name, version)


def check_native(_: Machine) -> Iterator[Finding]:
    if importlib.util.find_spec("py_arkworks_bls12381") is None:
        yield warning("BLS", "py-ecc: about a hundred times slower", "pip install -c constraints.txt -e '.[fast]'")
    else:
        yield passed("BLS", "arkworks")
    hivemind = importlib.util.find_spec("hivemind")
    daemon = Path(hivemind.origin).parent / "hivemind_cli" / "p2pd" if hivemind and hivemind.origin else None
    if daemon is None or not os.access(daemon, os.X_OK):
        yield problem("p2pd", "hivemind's daemon is not there or not executable", REINSTALL, MissingToolError)
    else:
        yield passed("p2pd", "found")


def check_imports(machine: Machine) -> Iterator[Finding]:
    """hivemind and libp2p cannot live in one process, so each is imported in one of its own."""
    for name in ("torch", "hivemind", "libp2p", "web3") if machine.deep else ():
        try:
            done = subprocess.run(
                [sys.executable, "-c", f"import {name}"],
                capture_output=True,
                text=True,
                timeout=IMPORT_SECONDS,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            yield problem(f"import {name}", f"no end after {IMPORT_SECONDS:.0f} s", "close other programs")
            continue
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["died silently"])[-1]
            yield problem(f"import {name}", last[:200], REINSTALL, MissingToolError)
        else:
            yield passed(f"import {name}", "works")


def check_chain_tools(machine: Machine) -> Iterator[Finding]:
    if not machine.with_embedded_chain:
        return
    try:
        yield passed("anvil", str(anvil.find_anvil()))
    except MissingToolError as error:
        yield problem("anvil", error.message, error.hint, MissingToolError)
    for name in ("node", "npm"):
        if shutil.which(name):
            yield passed(name, "found")
        else:
            yield warning(name, "not found", "only needed to build the contracts: install Node.js 18 or newer")


# --- chain and keys -------------------------------------------------------------------------------------
def call_rpc(url: str, method: str, *arguments: object, seconds: float) -> Any:
    """One JSON-RPC call; raises OSError or ValueError."""
    import urllib.request

    if not url.startswith(("http://", "https://")):
        raise ValueError("not an http(s) URL")
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": list(arguments)}).encode()
    request = urllib.request.Request(url, body, {"content-type": "application/json"})  # noqa: S310 - checked above
    with urllib.request.urlopen(request, timeout=seconds) as response:  # noqa: S310 - checked above
        answer = json.loads(response.read(MAX_RPC_BYTES))
    if not isinstance(answer, dict) or "result" not in answer:
        raise ValueError("not a JSON-RPC answer")
    return answer["result"]


def check_rpc(machine: Machine) -> Iterator[Finding]:
    if machine.rpc is None:
        return
    chain, seconds = machine.network.chain, machine.network.timeouts.rpc_seconds
    try:
        chain_id = int(call_rpc(machine.rpc, "eth_chainId", seconds=seconds), 16)
        block = call_rpc(machine.rpc, "eth_getBlockByNumber", "latest", False, seconds=seconds)
        made_at = int(block["timestamp"], 16)
    except (OSError, ValueError, TypeError, KeyError) as error:
        # The URL may carry an access token: it is not repeated.
        reason = str(getattr(error, "reason", error)) or type(error).__name__
        yield problem("rpc", reason[:200], "check the URL, or choose another endpoint", ChainUnavailableError)
        return
    if chain_id != chain.chain_id:
        fix = f"network {machine.network.name!r} is chain {chain.chain_id}: choose its endpoint, or another --network"
        yield problem("rpc", f"chain {chain_id}", fix, ChainUnavailableError)
        return
    yield passed("rpc", f"chain {chain_id}")
    age = time.time() - made_at
    if age > chain.max_block_age_seconds:
        fix = "the endpoint is behind, or this machine's clock is ahead: try another endpoint, set the clock"
        yield problem("newest block", f"{format_seconds(age)} old", fix, ChainUnavailableError)
    elif -age > machine.network.max_clock_skew_seconds:
        yield problem("newest block", f"{format_seconds(-age)} in the future", "this machine's clock is behind: set it")
    else:
        yield passed("newest block", f"{format_seconds(age)} old")


def check_keystore(machine: Machine) -> Iterator[Finding]:
    path = keystore_path(machine.home)
    if not path.exists():
        yield warning("keystore", "none yet", f"p2pflock init --home {machine.home}")
        return
    open_to_others = [
        entry
        for entry in (path, *sorted(path.rglob("*")))
        if stat.S_IMODE(entry.stat().st_mode) & (stat.S_IRWXG | stat.S_IRWXO)
    ]
    if open_to_others:
        yield problem("keystore", f"{open_to_others[0]} is open to others", f"chmod -R go= {path}", KeystoreError)
    else:
        yield passed("keystore", f"{path}, readable by its owner only")


CHECKS: tuple[Callable[[Machine], Iterator[Finding]], ...] = (
    check_python,
    check_cpu,
    check_memory,
    check_disk,
    check_clock,
    check_ports,
    check_libraries,
    check_native,
    check_imports,
    check_chain_tools,
    check_rpc,
    check_keystore,
)


def examine(machine: Machine, checks: Sequence[Callable[[Machine], Iterator[Finding]]] = CHECKS) -> list[Finding]:
    return [finding for check in checks for finding in check(machine)]


def worst_exit_code(findings: Sequence[Finding]) -> int:
    """0 without a problem; the problem's code when all agree; 3 (this machine lacks something) when they differ."""
    codes = {finding.error.exit_code for finding in findings if finding.status is Status.PROBLEM}
    if not codes:
        return 0
    return codes.pop() if len(codes) == 1 else EnvironmentError_.exit_code


def doctor(
    home: HomeOption,
    network: Annotated[str, typer.Option(help=f"One of: {', '.join(params.PRESETS)}.")] = "local",
    chain: Annotated[str, typer.Option(help="anvil: the embedded development chain; none: no chain at all.")] = "anvil",
    rpc: Annotated[
        str | None, typer.Option(envvar="P2PFLOCK_RPC", help="Check this RPC endpoint instead of anvil.", metavar="URL")
    ] = None,
    port: Annotated[
        list[int] | None, typer.Option(min=1, max=65_535, help="A port that must be free; may be repeated.")
    ] = None,
    peers: Annotated[int, typer.Option(min=1, help="How many peers are to run here.")] = 1,
    deep: Annotated[bool, typer.Option("--deep", help="Also import the large libraries, each in a process.")] = False,
    form: FormatOption = Format.TEXT,
) -> None:
    """Check this machine: each check PASSED, or what is wrong and how to fix it."""
    preset = params.get_preset(network)
    machine = Machine(
        home=home,
        peers=peers,
        ports=tuple(port or ()),
        rpc=rpc,
        network=preset,
        with_embedded_chain=rpc is None and chain != "none",
        deep=deep,
    )
    findings = examine(machine)
    code = worst_exit_code(findings)
    output = Output(form)
    output.document(
        {
            "checks": [
                {"check": f.check, "status": f.status.value, "detail": f.detail, "fix": f.fix} for f in findings
            ],
            "exit_code": code,
        }
    )
    output.table("", ("check", "verdict", "found"), [(f.check, f.status.value, f.detail) for f in findings])
    troubled = [f for f in findings if f.status is not Status.PASSED]
    for finding in troubled:
        output.line(f"{finding.status.value.lower()}: {finding.check}: {finding.detail}")
        output.line(f"  fix: {finding.fix}")
    if not troubled:
        output.line("Everything passed.")
    if code:
        raise typer.Exit(code)
