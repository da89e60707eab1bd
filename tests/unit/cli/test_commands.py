"""`cid` and `init` as a person runs them."""

from __future__ import annotations

import io
import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from p2pflock.cli import main as cli
from p2pflock.primitives import unixfs

PASSWORD = "correct horse battery"

# From `ipfs add --cid-version=1 --raw-leaves`: the empty file, and "hello world\n".
KNOWN = {
    b"": "bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku",
    b"hello world\n": "bafkreifjjcie6lypi6ny7amxnfftagclbuxndqonfipmb64f2km2devei4",
}


@pytest.fixture
def password_file(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text(PASSWORD + "\n")
    path.chmod(0o600)
    return path


@pytest.fixture(autouse=True)
def _no_password_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("P2PFLOCK_PASSWORD", "P2PFLOCK_PASSWORD_FILE", "P2PFLOCK_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO())


@pytest.mark.parametrize(("content", "expected"), KNOWN.items())
def test_cid_is_what_ipfs_prints(
    content: bytes, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert cli.main(["cid", str(path)]) == 0
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize("size", [unixfs.CHUNK_BYTES, unixfs.CHUNK_BYTES + 1, 5 * unixfs.CHUNK_BYTES // 2])
def test_a_pipe_has_the_id_of_the_file(size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytes(i * 31 & 0xFF for i in range(size))
    path = tmp_path / "file"
    path.write_bytes(content)
    assert cli.main(["cid", str(path), "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == {"cid": str(unixfs.compute_cid(content)), "bytes": size, "file": str(path)}
    piped = subprocess.run(
        [sys.executable, "-m", "p2pflock", "cid", "-"], input=content, capture_output=True, timeout=60, check=True
    )
    assert piped.stdout.decode().strip() == document["cid"]


def test_cid_of_what_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cid", str(tmp_path / "none")]) == 2
    assert cli.main(["cid", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("fix: ") == 2


def test_init_makes_an_identity_once(
    tmp_path: Path, password_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home"
    arguments = ["init", "--home", str(home), "--password-file", str(password_file), "--fast-kdf"]
    assert cli.main([*arguments, "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["peer"].startswith("12D3Koo")
    assert len(document["address"]) == 42
    assert len(document["bls_public_key"]) == 2 + 96
    keystore = Path(document["keystore"])
    assert keystore == home / "keystore"
    modes = {stat.S_IMODE(path.stat().st_mode) for path in keystore.iterdir()}
    assert modes == {0o600}

    before = {path.name: path.read_bytes() for path in keystore.iterdir()}
    assert cli.main(arguments) == 11
    assert "already" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in keystore.iterdir()} == before


def test_init_prints_public_things_only(
    tmp_path: Path, password_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from p2pflock.storage import keystore

    home = tmp_path / "home"
    assert cli.main(["init", "--home", str(home), "--password-file", str(password_file), "--fast-kdf"]) == 0
    printed = capsys.readouterr()
    signer = keystore.unlock(home / "keystore", PASSWORD)
    assert "0x" + signer.bls_public_key.hex() in printed.out
    for secret in (PASSWORD, signer.ed25519_seed().hex(), signer.evm_private_key().hex()):
        assert secret not in printed.out + printed.err


def test_the_password_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from p2pflock.storage import keystore

    monkeypatch.setenv("P2PFLOCK_PASSWORD", PASSWORD)
    assert cli.main(["init", "--home", str(tmp_path / "h"), "--fast-kdf"]) == 0
    assert keystore.unlock(tmp_path / "h" / "keystore", PASSWORD).peer_id


def test_init_without_a_password(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["init", "--home", str(tmp_path / "h")]) == 10
    error, fix = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and fix.startswith("fix: ")
    assert not (tmp_path / "h").exists()


def test_init_with_a_weak_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2PFLOCK_PASSWORD", "abc")
    assert cli.main(["init", "--home", str(tmp_path / "h")]) == 10


def test_a_password_is_no_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["init", "--home", str(tmp_path / "h"), "--password", PASSWORD]) == 2
    assert PASSWORD not in capsys.readouterr().err


def test_a_home_that_cannot_be_made(
    tmp_path: Path, password_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    arguments = ["init", "--home", str(tmp_path / "file" / "h"), "--password-file", str(password_file), "--fast-kdf"]
    assert cli.main(arguments) not in {0, 1}
    assert capsys.readouterr().err.startswith("error: ")
