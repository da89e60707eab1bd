from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path

import eth_account
import pytest

from p2pflock.errors import DiskFullError, KeystoreError, PasswordError
from p2pflock.storage import durable, keystore
from p2pflock.storage.keystore import Identity
from p2pflock.testing.conformance_storage import check_signer

PASSWORD = "correct horse"


def seeded(seed: bytes) -> Callable[[int], bytes]:
    counter = iter(range(1 << 30))
    return lambda n: hashlib.shake_256(seed + next(counter).to_bytes(4, "big")).digest(n)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Identity]:
    path = tmp_path_factory.mktemp("keys") / "keystore"
    return path, keystore.create(path, PASSWORD, entropy=seeded(b"a"), fast=True)


@pytest.fixture
def path(made: tuple[Path, Identity], tmp_path: Path) -> Path:
    copied = tmp_path / "keystore"
    shutil.copytree(made[0], copied)
    return copied


def test_created_keys_are_unlocked_again(made: tuple[Path, Identity]) -> None:
    path, identity = made
    again = keystore.unlock(path, PASSWORD)
    assert again.public == identity.public == keystore.read_public(path)
    assert again.evm_private_key() == identity.evm_private_key()
    assert again.sign_bls(bytes(32)) == identity.sign_bls(bytes(32))


def test_identity_is_a_signer(made: tuple[Path, Identity]) -> None:
    check_signer(keystore.unlock(made[0], PASSWORD))


def test_identity_agrees_with_eth_account() -> None:
    identity = Identity.generate(seeded(b"b"))
    account = eth_account.Account.from_key(identity.evm_private_key())
    assert bytes.fromhex(account.address[2:]) == identity.address
    digest = hashlib.sha256(b"digest").digest()
    assert identity.sign_evm(digest) == bytes(account.unsafe_sign_hash(digest).signature)


def test_same_entropy_same_keys_other_entropy_other_keys() -> None:
    assert Identity.generate(seeded(b"c")).public == Identity.generate(seeded(b"c")).public
    assert Identity.generate(seeded(b"c")).public != Identity.generate(seeded(b"d")).public


def test_generate_skips_numbers_that_are_no_key() -> None:
    draws = iter([bytes(32), b"\xff" * 32, b"\1" * 32, b"\2" * 32, b"\3" * 32])
    assert Identity.generate(lambda n: next(draws)).evm_private_key() == b"\1" * 32


def test_geth_and_validators_can_read_the_files(made: tuple[Path, Identity]) -> None:
    path, identity = made
    evm = json.loads((path / "evm.json").read_text())
    assert evm["version"] == 3
    assert bytes(eth_account.Account.decrypt(evm, PASSWORD)) == identity.evm_private_key()
    document = json.loads((path / "bls.json").read_text())
    assert document["version"] == 4
    assert document["pubkey"] == identity.bls_public_key.hex()


def test_modes(made: tuple[Path, Identity]) -> None:
    path, _ = made
    assert path.stat().st_mode & 0o777 == 0o700
    assert {p.name: p.stat().st_mode & 0o777 for p in path.iterdir()} == dict.fromkeys(
        ("evm.json", "bls.json", "peer.json"), 0o600
    )
    assert [p.name for p in path.parent.iterdir()] == ["keystore"]


def test_modes_do_not_depend_on_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        keystore.create(tmp_path / "keystore", PASSWORD, fast=True)
    finally:
        os.umask(before)
    test_modes((tmp_path / "keystore", None))  # type: ignore[arg-type]


def test_no_secret_is_shown_anywhere(made: tuple[Path, Identity]) -> None:
    path, identity = made
    secrets = [identity.evm_private_key(), identity._secret_bls(), identity.ed25519_seed()]
    shown = "".join(p.read_text() for p in path.iterdir()) + repr(identity) + f"{identity}" + repr([identity])
    shown += repr(identity.public)
    for secret in secrets:
        for form in (secret.hex(), secret.hex().upper(), repr(secret), str(int.from_bytes(secret, "big"))):
            assert form not in shown
    assert "12D3Koo" in repr(identity)
    for steal in (copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            steal(identity)


def test_bad_keys_are_refused_without_being_quoted() -> None:
    bad = b"\xff" * 32
    good = {"evm_key": b"\1" * 32, "bls_key": b"\2" * 32, "seed": b"\3" * 32}
    for name, value in (("evm_key", bad), ("bls_key", bad), ("evm_key", bytes(32)), ("seed", b"short")):
        try:
            Identity(**{**good, name: value})
        except KeystoreError as error:
            text = "".join(traceback.format_exception(error))
            assert value.hex() not in text
            assert repr(value) not in text.replace(repr(bytes(32)), "") or value == bytes(32)
        else:
            pytest.fail("accepted")


def test_wrong_password(path: Path) -> None:
    for wrong in ("correct horsf", "", "Correct horse"):
        with pytest.raises(PasswordError) as caught:
            keystore.unlock(path, wrong)
        assert caught.value.hint
        assert caught.value.exit_code == 10
        assert "\n" not in str(caught.value)
        assert wrong not in str(caught.value) or not wrong


@pytest.mark.parametrize("name", ["evm.json", "bls.json", "peer.json"])
def test_missing_and_damaged_files(path: Path, name: str) -> None:
    original = (path / name).read_text()
    for damage in ("", "{", "[]", "null", '"x"', "{}", "[" * 100_000, original[:-20], "x" * 100_000):
        (path / name).write_text(damage)
        with pytest.raises(KeystoreError) as caught:
            keystore.unlock(path, PASSWORD)
        assert caught.value.hint
    (path / name).unlink()
    with pytest.raises(KeystoreError, match=name):
        keystore.unlock(path, PASSWORD)


def test_no_keystore_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(KeystoreError, match="p2pflock init"):
        keystore.unlock(tmp_path / "none", PASSWORD)
    assert not keystore.exists(tmp_path / "none")


@pytest.mark.parametrize("name", [".", "evm.json", "bls.json", "peer.json"])
@pytest.mark.parametrize("mode", [0o040, 0o004, 0o020])
def test_files_of_others_are_refused(path: Path, name: str, mode: int) -> None:
    target = path / name
    target.chmod(target.stat().st_mode | mode)
    with pytest.raises(KeystoreError, match="chmod"):
        keystore.unlock(path, PASSWORD)


def test_swapped_files_are_refused(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    keystore.create(other, PASSWORD, entropy=seeded(b"z"), fast=True)
    good = (path / "peer.json").read_text()
    shutil.copy(path / "bls.json", path / "peer.json")
    with pytest.raises(KeystoreError):
        keystore.unlock(path, PASSWORD)
    # a ciphertext moved under a name that is not its own
    document = json.loads(good)
    document["crypto"] = json.loads((other / "peer.json").read_text())["crypto"]
    (path / "peer.json").write_text(json.dumps(document))
    with pytest.raises(KeystoreError, match="names"):
        keystore.unlock(path, PASSWORD)


def test_files_with_different_passwords_are_called_so(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    keystore.create(other, "another password", fast=True)
    shutil.copy(other / "evm.json", path / "evm.json")
    with pytest.raises(KeystoreError, match="one password"):
        keystore.unlock(path, PASSWORD)


def test_costly_web3_file_is_refused(path: Path) -> None:
    document = json.loads((path / "evm.json").read_text())
    document["crypto"]["kdfparams"]["n"] = 1 << 40
    (path / "evm.json").write_text(json.dumps(document))
    with pytest.raises(KeystoreError):
        keystore.unlock(path, PASSWORD)


def test_keys_are_never_overwritten(path: Path) -> None:
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    with pytest.raises(KeystoreError, match="already exists"):
        keystore.create(path, PASSWORD, fast=True)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before


def test_an_empty_directory_will_do(tmp_path: Path) -> None:
    keystore.create(tmp_path, PASSWORD, fast=True)
    assert keystore.exists(tmp_path)


def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = durable.write_synced

    def full(path: Path, data: bytes, *, mode: int = 0o600) -> None:
        if path.name == "peer.json":
            raise OSError(28, "No space left on device")
        real(path, data, mode=mode)

    monkeypatch.setattr(durable, "write_synced", full)
    with pytest.raises(DiskFullError):
        keystore.create(tmp_path / "k", PASSWORD, fast=True)
    assert list(tmp_path.iterdir()) == []


def test_short_passwords(tmp_path: Path) -> None:
    for password, fast in (("1234567", False), ("", False), ("", True), ("\x00\x01", True)):
        with pytest.raises(PasswordError):
            keystore.create(tmp_path / "k", password, fast=fast)
    assert not (tmp_path / "k").exists()


def test_standard_cost_is_the_eips(tmp_path: Path) -> None:
    keystore.create(tmp_path / "k", PASSWORD, entropy=seeded(b"s"))
    for name, where in (("evm.json", "kdfparams"), ("bls.json", "kdf"), ("peer.json", "kdf")):
        params = json.loads((tmp_path / "k" / name).read_text())["crypto"][where]
        assert params.get("params", params)["n"] == 262144
    assert keystore.read_public(tmp_path / "k") == Identity.generate(seeded(b"s")).public


# --- where the password comes from ----------------------------------------------------------------------
def never(prompt: str) -> str:
    raise AssertionError("prompted")


def test_password_sources_in_order(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    first.write_text("from option\nsecond line\n")
    second.write_text("from file variable\r\n")
    for file in (first, second):
        file.chmod(0o600)
    environ = {"P2PFLOCK_PASSWORD_FILE": str(second), "P2PFLOCK_PASSWORD": "from variable"}
    assert keystore.read_password(environ=environ, password_file=first, prompt=never) == "from option"
    assert keystore.read_password(environ=environ, prompt=never) == "from file variable"
    assert keystore.read_password(environ={"P2PFLOCK_PASSWORD": "x y "}, prompt=never) == "x y "
    assert keystore.read_password(environ={}, prompt=lambda _: "typed") == "typed"


def test_new_password_is_asked_twice() -> None:
    answers = iter(["one", "two"])
    with pytest.raises(PasswordError, match="differ"):
        keystore.read_password(environ={}, prompt=lambda _: next(answers), confirm=True)
    assert keystore.read_password(environ={}, prompt=lambda _: "same", confirm=True) == "same"


def test_no_password_anywhere() -> None:
    with pytest.raises(PasswordError, match="P2PFLOCK_PASSWORD_FILE"):
        keystore.read_password(environ={})


def test_bad_password_files(tmp_path: Path) -> None:
    file = tmp_path / "password"
    with pytest.raises(KeystoreError, match="cannot read"):
        keystore.read_password(environ={}, password_file=file)
    file.write_bytes(b"secret\n")
    file.chmod(0o644)
    with pytest.raises(KeystoreError, match="chmod 600"):
        keystore.read_password(environ={}, password_file=file)
    file.chmod(0o600)
    for content in (b"", b"\n", b"\xff\xfe\n"):
        file.write_bytes(content)
        with pytest.raises(PasswordError):
            keystore.read_password(environ={}, password_file=file)
