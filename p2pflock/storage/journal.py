"""The vote journal: what this peer has signed, on disk before anybody else sees it.

Law: `append` returns after the entry is on the device, and `replay` gives every entry whose append returned.
A crash may leave a torn last entry, whose append never returned: opening cuts it off.  Damage anywhere else
is refused, never repaired: forgetting a vote could make this peer sign a second one, and be slashed for it.

Format: 8 bytes magic, 16 bytes salt, 8 bytes check of the salt, then frames `length u32 | check 8 bytes | payload`, big endian, with
payload `round u64 | kind length u8 | kind | body` and check = blake2b(offset ‖ length ‖ payload, key = salt).
The salt keeps bytes of a body (which may quote a peer) from passing for a frame when a damaged file is
searched for frames that follow the damage.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import final

from p2pflock.errors import EnvironmentError_, LocalProtocolError
from p2pflock.storage import durable

_MAGIC = b"P2PFJRN1"
_SALT_BYTES = 16
_START = len(_MAGIC) + _SALT_BYTES + 8
_HEAD = struct.Struct(">I8s")
_PAYLOAD = struct.Struct(">QB")
MAX_BODY_BYTES = 1 << 20
MAX_FILE_BYTES = 256 << 20
_MAX_PAYLOAD_BYTES = _PAYLOAD.size + 255 + MAX_BODY_BYTES
_FIX = "restore the file from a backup; without it, do not vote again with the same BLS key"


@dataclass(frozen=True, slots=True)
class Entry:
    round: int
    kind: str
    body: bytes


@final
class VoteJournal:
    """Append-only; one writer.  Not safe for concurrent use by several threads."""

    def __init__(self, path: Path, handle: int, salt: bytes, end: int) -> None:
        self._path = path
        self._handle = handle
        self._salt = salt
        self._end = end
        self._broken = False

    @classmethod
    def open(cls, path: Path) -> VoteJournal:
        """Open or create; cuts off a torn last entry.

        Raises EnvironmentError_ when the file is damaged elsewhere, DiskFullError.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            durable.write_file(path, _header(os.urandom(_SALT_BYTES)))
        with durable.mapped_errors(f"cannot open {path}"):
            handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            with durable.mapped_errors(f"cannot read {path}"):
                data = _read(path, handle)
                salt = _salt(data)
                end = _START
                for _, end in _frames(data, salt):  # noqa: B007 - the last end is wanted
                    pass
                _refuse_damage(path, data, salt, end)
                if end < len(data):
                    os.ftruncate(handle, end)
                    os.fsync(handle)
        except BaseException:
            os.close(handle)
            raise
        return cls(path, handle, salt, end)

    @staticmethod
    def read(path: Path) -> list[Entry]:
        """Every whole entry, beside a writer or without one; nothing is cut off or locked.

        Raises EnvironmentError_ when it is not a vote journal.
        """
        with durable.mapped_errors(f"cannot read {path}"):
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                data = _read(path, handle)
            finally:
                os.close(handle)
        return [entry for entry, _ in _frames(data, _salt(data))]

    def append(self, kind: str, body: bytes, *, round_: int) -> None:
        """Write one entry; returns once it is durable.

        Args:
            kind: at most 255 bytes of ASCII, e.g. "prevote".
            body: at most 1 MiB.
            round_: what `compact` goes by.

        Raises DiskFullError (nothing was written; the journal stays usable), EnvironmentError_ when the
        device failed to confirm: the journal then refuses further entries, for nobody knows what is on disk.
        """
        if self._broken:
            raise EnvironmentError_(f"{self._path} failed to reach the disk earlier", "restart once the disk is well")
        frame = _frame(self._salt, self._end, kind, body, round_)
        if self._end + len(frame) > MAX_FILE_BYTES:
            raise LocalProtocolError(f"{self._path} reached {MAX_FILE_BYTES} bytes: compact it")
        with durable.mapped_errors(f"cannot write {self._path}"):
            try:
                durable.write_all_at(self._handle, frame, self._end)
            except OSError:
                self._roll_back()
                raise
            try:
                os.fsync(self._handle)
            except OSError:
                self._broken = True  # pages may have been dropped (fsyncgate): a retry would lie
                raise
        self._end += len(frame)

    def replay(self) -> Iterator[Entry]:
        """Every entry, oldest first."""
        with durable.mapped_errors(f"cannot read {self._path}"):
            data = _read(self._path, self._handle)[: self._end]
        for entry, _ in _frames(data, self._salt):
            yield entry

    def compact(self, before_round: int) -> int:
        """Forget entries of rounds below `before_round`, atomically; returns how many.

        Only for rounds that are decided and anchored: their votes can never be asked for again.
        """
        entries = list(self.replay())
        kept = [entry for entry in entries if entry.round >= before_round]
        if len(kept) == len(entries):
            return 0
        salt = os.urandom(_SALT_BYTES)
        data = bytearray(_header(salt))
        for entry in kept:
            data += _frame(salt, len(data), entry.kind, entry.body, entry.round)
        durable.write_file(self._path, bytes(data))
        with durable.mapped_errors(f"cannot open {self._path}"):
            handle = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        os.close(self._handle)
        self._handle, self._salt, self._end = handle, salt, len(data)
        return len(entries) - len(kept)

    @property
    def size_bytes(self) -> int:
        return self._end

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
            self._broken = True

    def __enter__(self) -> VoteJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _roll_back(self) -> None:
        try:
            os.ftruncate(self._handle, self._end)
        except OSError:
            self._broken = True


def _read(path: Path, handle: int) -> bytes:
    size = os.fstat(handle).st_size
    if size > MAX_FILE_BYTES:
        raise EnvironmentError_(f"{path} is larger than {MAX_FILE_BYTES} bytes", _FIX)
    data = bytearray()
    while len(data) < size and (part := os.pread(handle, size - len(data), len(data))):
        data += part
    if len(data) < _START or data[:_START] != _header(_salt(data)):
        raise EnvironmentError_(f"{path} is not a vote journal", _FIX)
    return bytes(data)


def _header(salt: bytes) -> bytes:
    return _MAGIC + salt + hashlib.blake2b(salt, digest_size=8).digest()


def _salt(data: bytes | bytearray) -> bytes:
    return bytes(data[len(_MAGIC) : len(_MAGIC) + _SALT_BYTES])


def _check(salt: bytes, offset: int, payload: bytes) -> bytes:
    head = struct.pack(">QI", offset, len(payload))
    return hashlib.blake2b(head + payload, digest_size=8, key=salt).digest()


def _frame(salt: bytes, offset: int, kind: str, body: bytes, round_: int) -> bytes:
    if not kind.isascii() or len(kind) > 255 or len(body) > MAX_BODY_BYTES or not 0 <= round_ < 1 << 64:
        raise LocalProtocolError(f"journal entry out of bounds: {kind!r}, {len(body)} bytes, round {round_}")
    payload = _PAYLOAD.pack(round_, len(kind)) + kind.encode("ascii") + body
    return _HEAD.pack(len(payload), _check(salt, offset, payload)) + payload


def _frame_at(data: bytes, salt: bytes, offset: int) -> tuple[Entry, int] | None:
    """The entry that starts at `offset` and where it ends; None unless it is whole."""
    if len(data) - offset < _HEAD.size:
        return None
    size, check = _HEAD.unpack_from(data, offset)
    start = offset + _HEAD.size
    if not _PAYLOAD.size <= size <= _MAX_PAYLOAD_BYTES or size > len(data) - start:
        return None
    payload = data[start : start + size]
    if _check(salt, offset, payload) != check:
        return None
    round_, kind_size = _PAYLOAD.unpack_from(payload)
    rest = payload[_PAYLOAD.size :]
    return Entry(round_, rest[:kind_size].decode("ascii"), rest[kind_size:]), start + size


def _frames(data: bytes, salt: bytes) -> Iterator[tuple[Entry, int]]:
    offset = _START
    while (found := _frame_at(data, salt, offset)) is not None:
        yield found
        offset = found[1]


def _refuse_damage(path: Path, data: bytes, salt: bytes, end: int) -> None:
    """What follows `end` must look like one torn append: shorter than an entry, no whole entry inside."""
    torn = len(data) - end
    if torn > _HEAD.size + _MAX_PAYLOAD_BYTES:
        raise EnvironmentError_(f"{path} is damaged at byte {end}", _FIX)
    for offset in range(end + 1, len(data)):
        with contextlib.suppress(UnicodeDecodeError):
            if _frame_at(data, salt, offset) is not None:
                raise EnvironmentError_(f"{path} is damaged at byte {end}", _FIX)
