"""Each check passes on a good machine, and says what is wrong with a bad one."""

from __future__ import annotations

import http.server
import importlib.metadata
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pflock import params
from p2pflock.cli import doctor
from p2pflock.cli import main as cli
from p2pflock.cli.doctor import Finding, Machine, Status


def machine(home: Path, **changes: object) -> Machine:
    values: dict[str, object] = {
        "home": home,
        "peers": 1,
        "ports": (),
        "rpc": None,
        "network": params.LOCAL,
        "with_embedded_chain": True,
        "deep": False,
    }
    return Machine(**{**values, **changes})  # type: ignore[arg-type]


def only(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding


class Endpoint(http.server.BaseHTTPRequestHandler):
    """A JSON-RPC endpoint of chain `chain_id` whose newest block is `age` seconds old."""

    chain_id = 84_532
    age = 0.0
    body: bytes | None = None

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        results = {
            "eth_chainId": hex(self.chain_id),
            "eth_getBlockByNumber": {"timestamp": hex(int(time.time() - self.age))},
        }
        answer = {"jsonrpc": "2.0", "id": asked["id"], "result": results[asked["method"]]}
        body = self.body if self.body is not None else json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def rpc(request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of an endpoint with the attributes in `request.param`."""
    handler = type("Configured", (Endpoint,), dict(getattr(request, "param", {})))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_good_endpoint(rpc: str, tmp_path: Path) -> None:
    assert [f.status for f in doctor.check_rpc(machine(tmp_path, rpc=rpc))] == [Status.PASSED, Status.PASSED]


@pytest.mark.parametrize(
    ("rpc", "says"),
    [
        ({"chain_id": 1}, "chain 1"),
        ({"age": 3_600.0}, "1 h 00 min old"),
        ({"age": -3_600.0}, "in the future"),
        ({"body": b"<html>"}, "Expecting value"),
        ({"body": b'{"error": {}}'}, "not a JSON-RPC answer"),
        ({"body": b'{"result": null}'}, ""),
    ],
    indirect=["rpc"],
)
def test_a_bad_endpoint(rpc: str, says: str, tmp_path: Path) -> None:
    last = list(doctor.check_rpc(machine(tmp_path, rpc=rpc)))[-1]
    assert last.status is Status.PROBLEM
    assert says in last.detail
    assert last.fix


def test_a_dead_endpoint_has_the_chain_code_and_its_token_stays_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v2/secret-token"
        assert cli.main(["doctor", "--home", str(tmp_path), "--rpc", url]) == 31
    captured = capsys.readouterr()
    assert "secret-token" not in captured.out + captured.err
    assert "refused" in captured.out


def test_only_http_is_asked(tmp_path: Path) -> None:
    assert only(doctor.check_rpc(machine(tmp_path, rpc="file:///etc/passwd"))).status is Status.PROBLEM


def test_a_taken_port(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        arguments = ["doctor", "--home", str(tmp_path), "--chain", "none", "--port", str(port)]
        assert cli.main(arguments) == 20
        assert f"port {port}" in capsys.readouterr().out
    assert only(doctor.check_ports(machine(tmp_path, ports=(port,)))).status is Status.PASSED


@pytest.mark.parametrize(
    ("meminfo", "expected"),
    [("MemTotal: 9 kB\nMemAvailable:   2048 kB\n", 2 << 20), ("MemTotal: 9 kB\n", None)],
)
def test_memory_is_read(meminfo: str, expected: int | None, tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(meminfo)
    assert doctor.available_memory_bytes(tmp_path / "meminfo") == expected
    assert doctor.available_memory_bytes(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("available", "peers", "status"),
    [
        (8 << 30, 4, Status.PASSED),
        (3 << 30, 4, Status.WARNING),
        (100 << 20, 1, Status.PROBLEM),
        (None, 1, Status.WARNING),
    ],
)
def test_memory(
    available: int | None, peers: int, status: Status, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "available_memory_bytes", lambda: available)
    assert only(doctor.check_memory(machine(tmp_path, peers=peers))).status is status


@pytest.mark.parametrize(("free", "status"), [(1 << 20, Status.PROBLEM), (2 << 30, Status.WARNING), (1 << 40, Status.PASSED)])
def test_disk(free: int, status: Status, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free}))
    found = only(doctor.check_disk(machine(tmp_path / "not" / "there" / "yet")))
    assert found.status is status
    if status is Status.PROBLEM:
        assert doctor.worst_exit_code([found]) == 21


def test_a_clock_that_was_never_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(doctor.check_clock(machine(tmp_path))).status is Status.PASSED
    monkeypatch.setattr(doctor.time, "time", lambda: 0.0)
    assert only(doctor.check_clock(machine(tmp_path))).status is Status.PROBLEM


@pytest.mark.parametrize(
    ("name", "version", "status"),
    [
        ("numpy", "2.3.5", Status.PASSED),
        ("numpy", "2.4.0", Status.PROBLEM),
        ("numpy", "1.26.4", Status.PASSED),
        ("libp2p", "0.9.0", Status.PROBLEM),
        ("torch", "2.13.0+cpu", Status.PASSED),
        ("torch", None, Status.PROBLEM),
    ],
)
def test_library_versions(
    name: str, version: str | None, status: Status, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def installed(_: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(doctor, "LIBRARIES", (name,))
    monkeypatch.setattr(doctor.importlib.metadata, "version", installed)
    assert only(doctor.check_libraries(machine(tmp_path))).status is status


def test_the_versions_that_are_mended_are_the_pinned_ones() -> None:
    root = Path(__file__).resolve().parents[3]
    project = (root / "pyproject.toml").read_text()
    pins = (root / "constraints.txt").read_text().splitlines()
    for name, version in doctor.EXACT.items():
        assert f'"{name}=={version}"' in project
        assert f"{name}=={version}" in pins


def test_a_missing_anvil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2PFLOCK_ANVIL", str(tmp_path / "none"))
    found = list(doctor.check_chain_tools(machine(tmp_path)))
    assert doctor.worst_exit_code(found) == 22
    assert list(doctor.check_chain_tools(machine(tmp_path, with_embedded_chain=False))) == []


def test_deep_imports_run_in_processes_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Done:
        returncode = 1
        stderr = "Traceback\nImportError: libtorch.so: no such file"

    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: Done)
    found = list(doctor.check_imports(machine(tmp_path, deep=True)))
    assert [f.check for f in found] == ["import torch", "import hivemind", "import libp2p", "import web3"]
    assert all("libtorch.so" in f.detail and f.status is Status.PROBLEM for f in found)


def test_a_keystore_that_others_can_read(tmp_path: Path) -> None:
    assert only(doctor.check_keystore(machine(tmp_path))).status is Status.WARNING
    keystore = tmp_path / "keystore"
    keystore.mkdir(mode=0o700)
    (keystore / "bls.json").touch(mode=0o600)
    assert only(doctor.check_keystore(machine(tmp_path))).status is Status.PASSED
    os.chmod(keystore / "bls.json", 0o644)
    found = only(doctor.check_keystore(machine(tmp_path)))
    assert doctor.worst_exit_code([found]) == 11
    assert "bls.json" in found.detail


def test_the_exit_code_is_that_of_the_worst() -> None:
    taken = doctor.problem("port", "", "", doctor.PortTakenError)
    missing = doctor.problem("anvil", "", "", doctor.MissingToolError)
    fine, meh = doctor.passed("a", ""), doctor.warning("b", "", "")
    assert doctor.worst_exit_code([fine, meh]) == 0
    assert doctor.worst_exit_code([fine, taken, meh, taken]) == 20
    assert doctor.worst_exit_code([taken, missing]) == 3


def test_json_lists_every_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["doctor", "--home", str(tmp_path), "--format", "json", "--chain", "none"])
    document = json.loads(capsys.readouterr().out)
    assert document["exit_code"] == code
    names = {check["check"] for check in document["checks"]}
    assert {"python", "cpu", "memory", "disk", "clock", "torch", "hivemind", "libp2p", "BLS", "keystore"} <= names
    assert all(check["fix"] for check in document["checks"] if check["status"] != "PASSED")


def test_an_unknown_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--home", str(tmp_path), "--network", "mars"]) == 12
    assert "local, testnet, base" in capsys.readouterr().err
