"""One directory with a peer's three keys, encrypted under one password.

::

    keystore/        0700
      evm.json       0600  secp256k1: stake, rewards, transactions   Web3 Secret Storage v3 (opens in geth)
      bls.json       0600  BLS12-381: votes and contributions        EIP-2335 (opens in Ethereum validators)
      peer.json      0600  Ed25519: the libp2p identity              the EIP-2335 envelope, other description

Law: keys exist in clear only inside an `Identity` in memory, which never shows them in its repr, in an error
or in a pickle.  Files that others can read are refused.  A keystore is created whole or not at all, and never
overwritten.  Python cannot wipe memory: an attacker who reads this process's memory has the keys.

Sources: https://ethereum.org/en/developers/docs/data-structures-and-encoding/web3-secret-storage, EIP-2335.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from eth_keyfile import keyfile
from eth_keys.datatypes import PrivateKey

from p2pflock.errors import KeystoreError, PasswordError
from p2pflock.primitives import bls, peerid
from p2pflock.storage import durable, eip2335

EVM_FILE, BLS_FILE, PEER_FILE = "evm.json", "bls.json", "peer.json"
BLS_DESCRIPTION = "p2pflock BLS12-381 voting key"
PEER_DESCRIPTION = "p2pflock libp2p Ed25519 seed"
MIN_PASSWORD_CHARACTERS = 8
_MAX_FILE_BYTES = 64 << 10
_SECP256K1_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
_FIX_DAMAGE = "restore the directory from a backup, or create another identity with `p2pflock init`"


@dataclass(frozen=True, slots=True)
class PublicIdentity:
    """What everybody may know of a peer, read without the password."""

    peer_id: bytes  # 38 bytes
    address: bytes  # 20 bytes
    bls_public_key: bytes  # 48 bytes


@final
class Identity:
    """The three keys of one peer, unlocked; implements the Signer port."""

    __slots__ = ("_bls", "_bls_public", "_evm", "_peer")

    def __init__(self, *, evm_key: bytes, bls_key: bytes, seed: bytes) -> None:
        """Args: three 32-byte secrets.  Raises KeystoreError when one is not a key of its curve."""
        try:
            self._evm = PrivateKey(evm_key)
            if not 0 < int.from_bytes(evm_key, "big") < _SECP256K1_ORDER:
                raise ValueError("EVM key out of range")
            self._bls = bytes(bls_key)
            self._bls_public = bls.secret_to_public(self._bls)
            self._peer = Ed25519PrivateKey.from_private_bytes(seed)
        except Exception as error:  # noqa: BLE001 - three libraries, each with its own
            # `from None`: a library's message may quote the bytes it was given
            raise KeystoreError(f"not a valid set of keys: {type(error).__name__}", _FIX_DAMAGE) from None

    @classmethod
    def generate(cls, entropy: Callable[[int], bytes]) -> Identity:
        """Fresh keys.  `entropy`: n -> n random bytes; os.urandom, or a seeded one in tests."""
        evm_key = entropy(32)
        while not 0 < int.from_bytes(evm_key, "big") < _SECP256K1_ORDER:
            evm_key = entropy(32)
        return cls(evm_key=evm_key, bls_key=bls.keygen(entropy(32)), seed=entropy(32))

    @property
    def peer_id(self) -> bytes:
        return peerid.from_ed25519(self._peer.public_key().public_bytes_raw())

    @property
    def address(self) -> bytes:
        return bytes(self._evm.public_key.to_canonical_address())

    @property
    def bls_public_key(self) -> bytes:
        return self._bls_public

    @property
    def public(self) -> PublicIdentity:
        return PublicIdentity(self.peer_id, self.address, self.bls_public_key)

    def sign_bls(self, root: bytes) -> bytes:
        return bls.sign(self._bls, root)

    def prove_possession(self, root: bytes) -> bytes:
        return bls.sign_possession(self._bls, root)

    def sign_ed25519(self, root: bytes) -> bytes:
        return self._peer.sign(root)

    def sign_evm(self, digest: bytes) -> bytes:
        signature = self._evm.sign_msg_hash(digest)  # RFC 6979 nonce, low s
        r, s, v = signature.r, signature.s, signature.v
        return bytes(r.to_bytes(32, "big") + s.to_bytes(32, "big") + bytes((27 + v,)))

    def ed25519_seed(self) -> bytes:
        return self._peer.private_bytes_raw()

    def evm_private_key(self) -> bytes:
        return bytes(self._evm.to_bytes())

    def __repr__(self) -> str:
        return f"<Identity {peerid.to_text(self.peer_id)} 0x{self.address.hex()}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an unlocked identity is never pickled or copied")

    def _secret_bls(self) -> bytes:
        return self._bls


def create(
    path: Path, password: str, *, entropy: Callable[[int], bytes] = os.urandom, fast: bool = False
) -> Identity:
    """Make a keystore directory with fresh keys; whole or not at all.

    Args:
        path: must not exist, or be an empty directory.
        password: at least 8 characters, unless `fast`.
        entropy: n -> n random bytes.
        fast: a key derivation hundreds of times cheaper, for local testnets; never for keys with stake.

    Raises KeystoreError when something is there already, PasswordError for a password too short to protect
    anything, DiskFullError.
    """
    check_password(password, fast=fast)
    identity = Identity.generate(entropy)
    cost = eip2335.FAST if fast else eip2335.STANDARD
    documents = {
        EVM_FILE: _encrypt_evm(identity, password, cost),
        BLS_FILE: eip2335.encrypt(
            identity._secret_bls(),  # noqa: SLF001 - same module, kept out of the port
            password,
            entropy=entropy,
            cost=cost,
            pubkey=identity.bls_public_key,
            description=BLS_DESCRIPTION,
        ),
        PEER_FILE: eip2335.encrypt(
            identity.ed25519_seed(),
            password,
            entropy=entropy,
            cost=cost,
            pubkey=peerid.public_key(identity.peer_id),
            description=PEER_DESCRIPTION,
        ),
    }
    with durable.mapped_errors(f"cannot create keystore {path}"):
        if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
            raise KeystoreError(f"{path} already exists", "choose another directory; keys are never overwritten")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f"{durable.TEMP_PREFIX}{path.name}-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(mode=0o700)
        try:
            for name, document in documents.items():
                durable.write_synced(temporary / name, json.dumps(document, indent=2).encode() + b"\n")
            durable.sync_directory(temporary)
            temporary.rename(path)  # replaces an empty directory, fails on any other
            durable.sync_directory(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return identity


def unlock(path: Path, password: str) -> Identity:
    """Decrypt the three keys.

    Raises PasswordError when the password is wrong; KeystoreError when a file is missing, damaged, readable
    by other users, or does not hold the key it names.
    """
    documents = _read(path)
    named = _public(path, documents)
    if not password:
        raise PasswordError("the keystore password is empty", "give the password that `p2pflock init` asked for")
    # The envelope with a checksum of its own goes first: after it, a mismatch below is damage
    with _naming(path / PEER_FILE):
        seed = eip2335.decrypt(documents[PEER_FILE], password)
    try:
        with _naming(path / BLS_FILE):
            bls_key = eip2335.decrypt(documents[BLS_FILE], password)
        with _naming(path / EVM_FILE):
            evm_key = _decrypt_evm(documents[EVM_FILE], password)
    except PasswordError as error:
        raise KeystoreError(f"the files of {path} do not share one password", _FIX_DAMAGE) from error
    identity = Identity(evm_key=evm_key, bls_key=bls_key, seed=seed)
    if identity.public != named:
        raise KeystoreError(f"a key in {path} is not the one its file names", _FIX_DAMAGE)
    return identity


def read_public(path: Path) -> PublicIdentity:
    """Ids and public keys that the files name; no password needed, nothing proven.  Raises KeystoreError."""
    return _public(path, _read(path))


def exists(path: Path) -> bool:
    """Whether a keystore, whole or not, is at `path`."""
    return any((path / name).exists() for name in (EVM_FILE, BLS_FILE, PEER_FILE))


def check_password(password: str, *, fast: bool = False) -> None:
    """Raises PasswordError for a new password that would not protect anything."""
    least = 1 if fast else MIN_PASSWORD_CHARACTERS
    if len(eip2335.normalize_password(password).decode()) < least:
        raise PasswordError(f"the password is shorter than {least} characters", "choose a longer one")


def read_password(
    *,
    environ: Mapping[str, str],
    password_file: Path | None = None,
    prompt: Callable[[str], str] | None = None,
    confirm: bool = False,
) -> str:
    """The keystore password: from `password_file`, else $P2PFLOCK_PASSWORD_FILE, else $P2PFLOCK_PASSWORD, else
    the prompt.  A command line is no source: everybody on the machine can read it.

    Args:
        environ: e.g. os.environ.
        password_file: first line counts; must be readable by its owner alone.
        prompt: e.g. getpass.getpass; None where there is no terminal.
        confirm: ask twice, for a new password.

    Raises PasswordError when there is no source or the two answers differ, KeystoreError for a file that is
    missing or readable by others.
    """
    if password_file is None and environ.get("P2PFLOCK_PASSWORD_FILE"):
        password_file = Path(environ["P2PFLOCK_PASSWORD_FILE"])
    if password_file is not None:
        return _read_password_file(password_file)
    if environ.get("P2PFLOCK_PASSWORD"):
        return environ["P2PFLOCK_PASSWORD"]
    if prompt is None:
        raise PasswordError(
            "no keystore password given", "set P2PFLOCK_PASSWORD_FILE or P2PFLOCK_PASSWORD, or run in a terminal"
        )
    password = prompt("Keystore password: ")
    if confirm and prompt("Again: ") != password:
        raise PasswordError("the two passwords differ", "type the same password twice")
    return password


def _read_password_file(path: Path) -> str:
    """The first line of a file, which must be its owner's alone; pipes and descriptors are let through."""
    try:
        with path.open("rb") as source:
            status = os.fstat(source.fileno())
            if stat.S_ISREG(status.st_mode) and status.st_mode & 0o077:
                raise KeystoreError(f"password file {path} is readable by others", f"chmod 600 {path}")
            line = source.readline(4096).removesuffix(b"\n").removesuffix(b"\r")
    except OSError as error:
        raise KeystoreError(f"cannot read password file {path}: {error.strerror}", "check the path") from error
    try:
        password = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PasswordError(f"password file {path} is not UTF-8", "save it as UTF-8 text") from error
    if not password:
        raise PasswordError(f"password file {path} is empty", "write the password into its first line")
    return password


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's name in front of a KeystoreError."""
    try:
        yield
    except KeystoreError as error:
        raise KeystoreError(f"{path}: {error.message}", error.hint or _FIX_DAMAGE) from error


def _check_private(path: Path, status: os.stat_result, mode: str) -> None:
    if status.st_mode & 0o077:
        raise KeystoreError(f"{path} is readable by other users", f"chmod {mode} {path}")
    if status.st_uid != os.geteuid():
        raise KeystoreError(f"{path} belongs to another user", f"run as its owner, or: chown {os.geteuid()} {path}")


def _read(path: Path) -> dict[str, dict[str, Any]]:
    documents = {}
    try:
        _check_private(path, path.stat(), "700")
        for name in (EVM_FILE, BLS_FILE, PEER_FILE):
            with (path / name).open("rb") as source:
                _check_private(path / name, os.fstat(source.fileno()), "600")
                data = source.read(_MAX_FILE_BYTES + 1)
            document = json.loads(data) if len(data) <= _MAX_FILE_BYTES else None
            if type(document) is not dict:
                raise KeystoreError(f"{path / name} is not a keystore", _FIX_DAMAGE)
            documents[name] = document
    except FileNotFoundError as error:
        missing = error.filename or path
        hint = _FIX_DAMAGE if exists(path) else "create it with `p2pflock init`"
        raise KeystoreError(f"{missing} does not exist", hint) from error
    except OSError as error:
        raise KeystoreError(f"cannot read {path}: {error.strerror}", _FIX_DAMAGE) from error
    except (ValueError, RecursionError) as error:
        raise KeystoreError(f"{path} is damaged: not JSON", _FIX_DAMAGE) from error
    return documents


def _public(path: Path, documents: Mapping[str, Mapping[str, Any]]) -> PublicIdentity:
    try:
        if documents[PEER_FILE]["description"] != PEER_DESCRIPTION:  # a BLS keystore opens with the same password
            raise ValueError("not an Ed25519 seed")
        address = bytes.fromhex(documents[EVM_FILE]["address"].removeprefix("0x"))
        bls_key = bytes.fromhex(documents[BLS_FILE]["pubkey"])
        peer_id = peerid.from_ed25519(bytes.fromhex(documents[PEER_FILE]["pubkey"]))
        if (len(address), len(bls_key)) != (20, 48):
            raise ValueError("wrong length")
    except Exception as error:
        raise KeystoreError(f"{path} is damaged: {type(error).__name__}", _FIX_DAMAGE) from error
    return PublicIdentity(peer_id, address, bls_key)


def _encrypt_evm(identity: Identity, password: str, cost: eip2335.Cost) -> dict[str, Any]:
    document: dict[str, Any] = keyfile.create_keyfile_json(
        identity.evm_private_key(), password.encode(), version=3, kdf="scrypt", iterations=cost.scrypt_n
    )
    return document


def _decrypt_evm(document: Mapping[str, Any], password: str) -> bytes:
    try:
        crypto = {key.lower(): value for key, value in document.items()}["crypto"]
        if crypto["kdf"] == "scrypt":
            eip2335.check_scrypt(crypto["kdfparams"])
        else:
            eip2335.check_iterations(crypto["kdfparams"])
        return bytes(keyfile.decode_keyfile_json(dict(document), password.encode()))
    except ValueError as error:
        if "MAC mismatch" in str(error):
            raise PasswordError("wrong keystore password", "type the password again") from None
        raise KeystoreError("malformed Web3 keystore", _FIX_DAMAGE) from None
    except Exception:  # noqa: BLE001 - eth_keyfile lets whatever its input provokes escape
        raise KeystoreError("malformed Web3 keystore", _FIX_DAMAGE) from None
