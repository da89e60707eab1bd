"""What a person sees when something is wrong: one `error:` line, one `fix:` line, the documented exit code.

Every case runs `python -m p2pflock`; the first one of each class also runs it with `--format json`, side by side.
All but a full disk must be found before a child process is started, hence quickly; that is measured in CPU
seconds, which load does not stretch.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from p2pflock.chain.addresses import AddressBook
from p2pflock.primitives.cid import CID
from p2pflock.protocol.committee import Committee
from p2pflock.protocol.messages import Seat
from p2pflock.storage import keystore
from p2pflock.storage.blocks import DiskStore
from p2pflock.testing import tiny_task

PASSWORD = "correct horse battery"
CPU_SECONDS = 3.0
ROOT = Path(__file__).resolve().parents[2]
STRANGER = "12D3KooWAWcvbvgYWe7F7v7GfvxYyGGSLzfpzkcXoJ7xYEZa4fUe"
ROUNDS = 6
SEEN_AS_JSON: set[str] = set()


class World:
    """A peer's home and files, and the arguments that make a good `run`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.home = path / "home"
        self.signer = keystore.create(self.home / "keystore", PASSWORD, fast=True)
        self.password = self.write("password", PASSWORD + "\n")
        spec = tiny_task.build_spec(rounds=ROUNDS)
        self.task = self.write("task.cbor", spec.encode())
        self.committee = self.write("committee.cbor", self.make_committee(spec))
        book = AddressBook(84_532, 0, *(bytes([n]) * 20 for n in range(6)))
        self.book = path / "contracts.json"
        book.save(self.book)

    def make_committee(self, spec):
        seat = Seat(self.signer.peer_id, self.signer.address, self.signer.bls_public_key, 10**18)
        return (
            Committee(task=spec.task_id, epoch=0, chain_id=0, anchor=bytes(20), seats=(seat,)).to_block().encode()
        )

    def write(self, name, content):
        path = self.path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        path.chmod(0o600)
        return path

    def run(self, **changed):
        """Arguments of `run`; an option given as None is left out."""
        options = {
            "task": self.task,
            "home": self.home,
            "password_file": self.password,
            "committee": self.committee,
            "trust_module": tiny_task.MODULE,
            **changed,
        }
        given = (("--" + name.replace("_", "-"), str(value)) for name, value in options.items() if value is not None)
        return ["run", *(part for pair in given for part in pair)]

    def run_on_chain(self, rpc):
        return self.run(committee=None, rpc=rpc, address_book=self.book)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("exit"))


@pytest.fixture
def taken_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def chain_of_somebody():
    """An endpoint that serves chain 1."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            call = json.loads(self.rfile.read(int(self.headers["content-length"])))
            body = json.dumps({"jsonrpc": "2.0", "id": call["id"], "result": "0x1"}).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def start(arguments, environment=None, limit=None):
    clean = {key: value for key, value in os.environ.items() if not key.startswith("P2PFLOCK_")}
    return subprocess.Popen(
        [sys.executable, "-m", "p2pflock", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**clean, **(environment or {})},
        preexec_fn=limit,
    )


def documented():
    """class -> exit code, as docs/exit-codes.md has it."""
    table = (ROOT / "docs" / "exit-codes.md").read_text(encoding="utf-8")
    return {name: int(code) for code, name in re.findall(r"^\| (\d+) \| `(\w+)` \|", table, re.MULTILINE)}


def read_text_error(stderr):
    """(message, fix) of the only error that was printed."""
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    fixes = [line for line in stderr.splitlines() if line.startswith("fix: ")]
    assert (len(errors), len(fixes)) == (1, 1), stderr
    assert stderr.splitlines()[-2:] == [*errors, *fixes]
    assert "Traceback" not in stderr
    return errors[0].removeprefix("error: "), fixes[0].removeprefix("fix: ")


def assert_fails(world, arguments, kind, says, environment=None):
    code = documented()[kind]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    peers = [start(arguments, environment)]
    if kind not in SEEN_AS_JSON:
        peers.append(start([*arguments, "--format", "json"], environment))
        SEEN_AS_JSON.add(kind)
    said = [peer.communicate(timeout=120) for peer in peers]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert {peer.returncode for peer in peers} == {code}, said
    assert not any(stdout for stdout, _ in said)
    message, fix = read_text_error(said[0][1])
    assert re.search(says, message), message
    for _, stderr in said[1:]:
        (line,) = stderr.splitlines()
        found = json.loads(line)["error"]
        assert (found["kind"], found["exit_code"], found["fix"]) == (kind, code, fix)
    assert not list((world.home / "logs").glob("*")), "a child was started, or a traceback was logged"
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < CPU_SECONDS * len(peers)


# --- the person's input ---------------------------------------------------------------------------------------
def test_wrong_password(world):
    wrong = world.write("wrong", "incorrect horse\n")
    assert_fails(world, world.run(password_file=wrong), "PasswordError", "wrong keystore password")


def test_no_password(world):
    assert_fails(world, world.run(password_file=None), "PasswordError", "no keystore password")


def test_no_keystore(world):
    assert_fails(world, world.run(home=world.path / "nobody"), "KeystoreError", "does not exist")


def test_keystore_that_others_can_read(world, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(world.home / "keystore", home / "keystore")
    for path in (home / "keystore").iterdir():
        path.chmod(0o644)
    assert_fails(world, world.run(home=home), "KeystoreError", "other users|others")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("open.toml", "[task\n", "not TOML.*line 1"),
        ("unknown.toml", '[task]\nname = "a"\nrounds = 3\ncolour = 1\n', r"unknown key task\.colour"),
        ("noise.toml", bytes(range(256)), "UTF-8"),
        ("noise.cbor", bytes(range(256)), "noise.cbor"),
    ],
)
def test_malformed_task(world, name, content, says):
    assert_fails(world, world.run(task=world.write(name, content)), "SpecError", says)


def test_task_that_is_not_there(world):
    assert_fails(world, world.run(task=world.path / "missing.cbor"), "SpecError", "missing.cbor")


def test_module_that_nobody_trusted(world):
    assert_fails(world, world.run(trust_module=None), "SpecError", "not trusted")


def test_committee_of_another_task(world):
    other = world.write("other.cbor", world.make_committee(tiny_task.build_spec(rounds=ROUNDS + 1)))
    assert_fails(world, world.run(committee=other), "SpecError", "committee of another task")


def test_file_that_is_no_committee(world):
    assert_fails(world, world.run(committee=world.task), "SpecError", "no committee file")


def test_neither_chain_nor_committee(world):
    assert_fails(world, world.run(committee=None), "SpecError", "committee file")


def test_malformed_bootstrap_address(world):
    assert_fails(world, world.run(bootstrap="127.0.0.1:4001"), "SpecError", "malformed bootstrap address")


def test_unknown_option(world):
    assert_fails(world, [*world.run(), "--nosuch"], "UserError", "--nosuch")


def test_address_of_another_machine(world):
    assert_fails(world, world.run(host="192.0.2.1"), "UserError", "192.0.2.1")


@pytest.mark.parametrize(
    ("what", "kind", "says"),
    [
        ("noise", "UserError", "neither a checkpoint id nor"),
        ("noise.car", "UserError", "no whole CAR file"),
        ("missing.car", "UserError", "cannot read"),
        (str(CID.of_raw(b"never seen")), "KeystoreError", "not the home of a peer"),
    ],
)
def test_verify_of_garbage(world, tmp_path, what, kind, says):
    if what == "noise.car":
        world.write(what, bytes(range(256)))
    target = world.path / what if what.endswith(".car") else what
    assert_fails(world, ["verify", target, "--home", tmp_path], kind, says)


def test_status_of_no_peer(world, tmp_path):
    assert_fails(world, ["status", "--home", tmp_path], "KeystoreError", "not the home of a peer")


# --- this machine ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("option", ["control_port", "swarm_port"])
def test_taken_port(world, option, taken_port):
    assert_fails(world, world.run(**{option: taken_port}), "PortTakenError", f"port {taken_port} .* in use")


def test_home_of_a_running_peer(world, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(world.home / "keystore", home / "keystore")
    with DiskStore.open(home / "blocks"):
        assert_fails(world, world.run(home=home), "EnvironmentError_", "in use by process")
    # status and verify still see what the running peer wrote
    assert not (home / "run.json").exists()


def test_anvil_is_missing(world, tmp_path):
    arguments = ["up", "--home", tmp_path / "swarm"]
    assert_fails(world, arguments, "MissingToolError", "anvil|P2PFLOCK_ANVIL", {"P2PFLOCK_ANVIL": "/nonexistent"})


def test_full_disk_and_after_it(world, tmp_path):
    """A limit on file sizes stands for the disk: it needs no privileges, and fails the same calls."""
    home = tmp_path / "home"
    shutil.copytree(world.home / "keystore", home / "keystore")
    arguments = [*world.run(home=home), "--exit-when-done"]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    peer = start(arguments, limit=limit)
    _, stderr = peer.communicate(timeout=180)
    assert peer.returncode == documented()["DiskFullError"], stderr
    assert read_text_error(stderr)[0].endswith("File too large")
    # nothing is damaged: with room again it goes on where it was
    again = start(arguments)
    _, stderr = again.communicate(timeout=180)
    assert again.returncode == 0, stderr
    decided = [
        entry["round"]
        for line in (home / "events.jsonl").read_text().splitlines()
        if (entry := json.loads(line))["event"] == "decided"
    ]
    assert max(decided) == ROUNDS
    assert f"round {ROUNDS}/{ROUNDS}" in stderr
    assert f"round 1/{ROUNDS}" not in stderr


# --- the world outside ----------------------------------------------------------------------------------------
def test_no_bootstrap_peer(world):
    port = free_port()
    address = f"/ip4/127.0.0.1/tcp/{port}/p2p/{STRANGER}"
    says = rf"no bootstrap peer answered within 10 s: 127\.0\.0\.1:{port} \(.*Connection refused\)"
    assert_fails(world, world.run(bootstrap=address), "BootstrapError", says)


def test_dead_rpc(world):
    arguments = world.run_on_chain(f"http://127.0.0.1:{free_port()}")
    assert_fails(world, arguments, "ChainUnavailableError", "did not answer")


def test_rpc_of_another_chain(world, chain_of_somebody):
    arguments = world.run_on_chain(chain_of_somebody)
    assert_fails(world, arguments, "ChainUnavailableError", "serves chain 1, not 84532")


def test_rpc_that_speaks_no_http(world, taken_port):
    arguments = world.run_on_chain(f"ftp://127.0.0.1:{taken_port}")
    assert_fails(world, arguments, "SpecError", "http")
