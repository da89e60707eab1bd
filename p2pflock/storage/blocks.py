"""The embedded block store: content-addressed blocks in files, nothing but the file system needed.

::

    <root>/
      format            version of this layout
      lock              flock of the one writer; readers need none
      blocks/<x>/<cid>  x = last but one digit of the id: 32 shards
      pins/<cid>        everything below this root stays;  <cid>.direct: this block alone
      tmp/              blocks on their way in; emptied on opening

Law: a block is there whole, under its name, or not at all; what was acknowledged survives kill -9 and a power
cut; what `get` returns hashes to the id it was asked for.  A block that decayed is removed, so that it can be
fetched again.  Nothing that a pin reaches is collected; nothing that came in within the grace time either,
because who stores a graph pins its root last.

Safe for several threads of one process, and for readers in others.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import final

from p2pflock.errors import (
    DiskFullError,
    EnvironmentError_,
    InvalidMessageError,
    LocalProtocolError,
    UnavailableError,
)
from p2pflock.primitives.cid import CID
from p2pflock.storage import durable, graph

_FORMAT = b"p2pflock block store 1\n"
_DIGITS = "abcdefghijklmnopqrstuvwxyz234567"
_DIRECT = ".direct"
GRACE_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class StoreStats:
    blocks: int
    used_bytes: int  # sum of block sizes; directories and slack of the file system come on top
    quota_bytes: int | None
    damaged: int  # blocks found decayed since opening


@dataclass(frozen=True, slots=True)
class _Batch:
    """Blocks on their way in."""

    waiting: dict[CID, tuple[Path, int]]  # file under tmp/, and its size
    touched: set[CID]  # these and those that were here already: the collector leaves them until the batch ends


@final
class DiskStore:
    """A BlobStore in a directory.  Made by `open` or `open_readonly`."""

    def __init__(
        self,
        root: Path,
        lock: durable.DirectoryLock | None,
        quota_bytes: int | None,
        grace_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self._root = root
        self._lock = lock
        self._quota_bytes = quota_bytes
        self._grace_seconds = grace_seconds
        self._clock = clock
        self._guard = threading.RLock()  # counters, renames and removals; never held while data is written
        self._names = itertools.count()
        self._batches: list[_Batch] = []
        self._arrived: set[CID] | None = None  # while collecting: what was stored or pinned meanwhile
        self._collecting = threading.Lock()
        self._blocks = 0
        self._used_bytes = 0
        self._damaged = 0

    @classmethod
    def open(
        cls,
        root: Path,
        *,
        quota_bytes: int | None = None,
        grace_seconds: float = GRACE_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> DiskStore:
        """Open for writing, creating the directory where needed.

        Args:
            root: directory of the store.
            quota_bytes: sum of block sizes allowed; None for as much as the disk takes.
            grace_seconds: how long an unpinned block is safe from `collect_garbage`.
            clock: unix seconds, compared with the files' modification times.

        Raises EnvironmentError_ when another process has it open for writing, or it is no store of ours.
        """
        with durable.mapped_errors(f"cannot open block store {root}"):
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = durable.DirectoryLock(root, "block store")
            try:
                if not (root / "format").exists():
                    if any(path.name != "lock" and not _is_ours(path) for path in root.iterdir()):
                        raise EnvironmentError_(f"{root} holds other files", "give the block store its own directory")
                    for name in ("tmp", "pins", *(f"blocks/{digit}" for digit in _DIGITS)):
                        (root / name).mkdir(parents=True, exist_ok=True)
                    durable.sync_directory(root / "blocks")
                    durable.write_file(root / "format", _FORMAT)
                _check_format(root)
                for path in (root / "tmp").iterdir():
                    path.unlink()
                store = cls(root, lock, quota_bytes, grace_seconds, clock)
                store._count()
            except BaseException:
                lock.release()
                raise
        return store

    @classmethod
    def open_readonly(cls, root: Path) -> DiskStore:
        """Open beside a writer, or without one; every mutation raises LocalProtocolError."""
        with durable.mapped_errors(f"cannot open block store {root}"):
            _check_format(root)
            store = cls(root, None, None, GRACE_SECONDS, time.time)
            store._count()
        return store

    # --- BlobStore --------------------------------------------------------------------------------------
    def put(self, cid: CID, data: bytes) -> None:
        with self.batch() as put:
            put(cid, data)

    def get(self, cid: CID) -> bytes:
        with durable.mapped_errors(f"cannot read block {cid}"):
            is_here, data = _load(self._path(cid), cid)
        if not is_here:
            raise UnavailableError(f"block {cid} is not here")
        if data is None:
            self._discard(cid)
            raise UnavailableError(f"block {cid} was damaged on disk")
        return data

    def has(self, cid: CID) -> bool:
        """Whether a file of this name is here; only `get` knows whether it is intact."""
        return self._path(cid).exists()

    def pin(self, cid: CID) -> None:
        """Keep `cid` and everything it links to, as far as it is here now or arrives later.

        Pin first and fetch afterwards is fine.  Durable on return.
        """
        self._add_pin(cid, str(cid), lambda: graph.walk(self._get_or_none, [cid]))

    def pin_direct(self, cid: CID) -> None:
        """Keep this block alone: a record links to its parent, so a pin of the head would keep all history."""
        self._add_pin(cid, f"{cid}{_DIRECT}", lambda: [cid])

    def unpin(self, cid: CID) -> None:
        """Withdraw both kinds of pin; deletes nothing before `collect_garbage`."""
        self._check_writable()
        with durable.mapped_errors(f"cannot unpin {cid}"), self._guard:
            for name in (str(cid), f"{cid}{_DIRECT}"):
                (self._root / "pins" / name).unlink(missing_ok=True)
            durable.sync_directory(self._root / "pins")

    def pins(self) -> Iterator[CID]:
        """Pinned ids of either kind, in order."""
        return iter(sorted(self._read_pins(direct=False) | self._read_pins(direct=True)))

    # --- beyond the port --------------------------------------------------------------------------------
    @contextlib.contextmanager
    def batch(self) -> Iterator[Callable[[CID, bytes], None]]:
        """Store many blocks at once: all of them are durable when the context ends, none when it fails.

        Gives a function (cid, data) -> None that raises as `put` does.  Blocks of an open batch are not seen
        by `get`.  Costs one fsync a block and one a shard.
        """
        self._check_writable()
        batch = _Batch({}, set())
        with self._guard:
            self._batches.append(batch)
        try:
            yield lambda cid, data: self._stage(batch, cid, data)
            self._commit(batch)
        finally:
            self._abandon(batch)  # nothing is left to abandon after a commit
            with self._guard:
                self._batches.remove(batch)

    def blocks(self) -> Iterator[CID]:
        """Ids of all blocks, in no order."""
        for path in self._files():
            with contextlib.suppress(InvalidMessageError):
                yield CID.parse(path.name)

    def stats(self) -> StoreStats:
        with self._guard:
            return StoreStats(self._blocks, self._used_bytes, self._quota_bytes, self._damaged)

    def collect_garbage(self) -> int:
        """Remove every block that no pin reaches and whose grace time is over; returns the bytes freed.

        Other threads may go on: what they store or pin while this runs is kept.  Raises EnvironmentError_.
        """
        self._check_writable()
        with self._collecting, durable.mapped_errors(f"cannot collect garbage in {self._root}"):
            with self._guard:
                self._arrived = set()
            try:
                # the pins are read after `_arrived` is set: a pin is in one of them
                keep = set(graph.walk(self._get_or_none, sorted(self._read_pins(direct=False))))
                keep |= self._read_pins(direct=True)
                freed = 0
                for cid in self.blocks():
                    if cid not in keep:
                        freed += self._sweep(cid)
                return freed
            finally:
                with self._guard:
                    self._arrived = None

    def close(self) -> None:
        """Let another process write.  Idempotent."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> DiskStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- inside -----------------------------------------------------------------------------------------
    def _path(self, cid: CID) -> Path:
        name = str(cid)
        return self._root / "blocks" / name[-2] / name  # the last digit holds three bits only

    def _check_writable(self) -> None:
        if self._lock is None:
            raise LocalProtocolError(f"block store {self._root} is not open for writing")

    def _files(self) -> Iterator[Path]:
        for digit in _DIGITS:
            with os.scandir(self._root / "blocks" / digit) as entries:
                yield from (Path(entry.path) for entry in entries)

    def _count(self) -> None:
        for path in self._files():
            with contextlib.suppress(FileNotFoundError):
                self._used_bytes += path.stat().st_size
                self._blocks += 1

    def _get_or_none(self, cid: CID) -> bytes | None:
        try:
            return self.get(cid)
        except UnavailableError:
            return None

    def _read_pins(self, *, direct: bool) -> set[CID]:
        found = set()
        with durable.mapped_errors(f"cannot list pins of {self._root}"):
            for path in (self._root / "pins").iterdir():
                if path.name.endswith(_DIRECT) == direct:
                    with contextlib.suppress(InvalidMessageError):  # a stray file of somebody's editor
                        found.add(CID.parse(path.name.removesuffix(_DIRECT)))
        return found

    def _add_pin(self, cid: CID, name: str, reach: Callable[[], Iterator[CID] | list[CID]]) -> None:
        self._check_writable()
        with durable.mapped_errors(f"cannot pin {cid}"), self._guard:
            handle = os.open(self._root / "pins" / name, os.O_WRONLY | os.O_CREAT, 0o600)
            os.close(handle)
            durable.sync_directory(self._root / "pins")
            if self._arrived is not None:
                self._arrived.update(reach())  # under the guard: the sweep waits until all of it is known

    def _discard(self, cid: CID) -> None:
        """Remove a decayed block, unless somebody replaced it in the meantime."""
        if self._lock is None:
            return
        path = self._path(cid)
        with durable.mapped_errors(f"cannot remove {path}"), self._guard:
            if _load(path, cid) == (True, None):
                self._unlink(path)
                self._damaged += 1

    def _sweep(self, cid: CID) -> int:
        path = self._path(cid)
        with self._guard:
            if self._arrived is None or cid in self._arrived or any(cid in b.touched for b in self._batches):
                return 0
            try:
                if path.stat().st_mtime > self._clock() - self._grace_seconds:
                    return 0
            except FileNotFoundError:
                return 0
            return self._unlink(path)

    def _unlink(self, path: Path) -> int:
        size = path.stat().st_size
        path.unlink()
        self._used_bytes -= size
        self._blocks -= 1
        return size

    # --- batches ----------------------------------------------------------------------------------------
    def _stage(self, batch: _Batch, cid: CID, data: bytes) -> None:
        """Write one block under tmp/, without waiting for the device."""
        if not cid.matches(data):
            raise InvalidMessageError(f"block does not hash to {cid}")
        if cid in batch.waiting:
            return
        with durable.mapped_errors(f"cannot store block {cid}"):
            with self._guard:
                batch.touched.add(cid)
            if self._is_intact(cid):
                return
            path = self._root / "tmp" / str(next(self._names))
            self._reserve(len(data))
            try:
                _write(path, data)
            except BaseException:
                self._release(len(data))
                raise
            batch.waiting[cid] = (path, len(data))

    def _commit(self, batch: _Batch) -> None:
        """Contents first, then names, then the directories that hold the names."""
        with durable.mapped_errors(f"cannot store blocks in {self._root}"):
            for path, _ in batch.waiting.values():
                _sync(path)
            shards = set()
            for cid, (path, _) in list(batch.waiting.items()):
                target = self._path(cid)
                with self._guard:
                    replaced = _size(target)  # a twin of another thread, or a decayed block, gives way
                    self._make_young(path)
                    path.replace(target)
                    if replaced is None:
                        self._blocks += 1
                    else:
                        self._used_bytes -= replaced
                    if self._arrived is not None:
                        self._arrived.add(cid)
                del batch.waiting[cid]
                shards.add(target.parent)
            for shard in sorted(shards):
                durable.sync_directory(shard)

    def _abandon(self, batch: _Batch) -> None:
        for path, size in batch.waiting.values():
            with contextlib.suppress(OSError):
                path.unlink()
            self._release(size)
        batch.waiting.clear()

    def _reserve(self, size: int) -> None:
        with self._guard:
            if self._quota_bytes is not None and self._used_bytes + size > self._quota_bytes:
                raise DiskFullError(
                    f"block store {self._root} would exceed its quota of {self._quota_bytes} bytes",
                    "raise the quota, or unpin old checkpoints and collect garbage",
                )
            self._used_bytes += size

    def _release(self, size: int) -> None:
        with self._guard:
            self._used_bytes -= size

    def _is_intact(self, cid: CID) -> bool:
        """Whether this very block is here already; if so it is young again, for the collector."""
        path = self._path(cid)
        with self._guard:
            if _load(path, cid)[1] is None:
                return False
            if self._arrived is not None:
                self._arrived.add(cid)
            self._make_young(path)
            return True

    def _make_young(self, path: Path) -> None:
        now = self._clock()
        os.utime(path, (now, now))


def _is_ours(path: Path) -> bool:
    return path.name in {"tmp", "pins", "blocks"} or path.name.startswith(durable.TEMP_PREFIX)


def _check_format(root: Path) -> None:
    path = root / "format"
    if not path.exists():
        raise EnvironmentError_(f"{root} is not a block store", "check the path")
    if path.read_bytes() != _FORMAT:
        raise EnvironmentError_(f"{root} was written by another version", "upgrade p2pflock, or use another directory")


def _load(path: Path, cid: CID) -> tuple[bool, bytes | None]:
    """(whether a file is here, its bytes if they hash to `cid`)."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return False, None
    except OSError as error:
        if error.errno != errno.EIO:  # a sector that the device cannot read is decay like any other
            raise
        return True, None
    return True, data if cid.matches(data) else None


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _write(path: Path, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        durable.write_all(handle, data)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    finally:
        os.close(handle)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
