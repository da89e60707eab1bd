"""Writing to disk so that a crash leaves the old contents or the new ones, never a mixture.

Law: `write_file` returns once the bytes and the name that leads to them are on the device.  The order is
write, fsync the file, rename, fsync the directory; leaving one out loses data under a power cut.
Operating system errors become ours here: no space is DiskFullError, the rest is EnvironmentError_.

Source: T. Pillai et al., All File Systems Are Not Created Equal, OSDI 2014.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from p2pflock.errors import DiskFullError, EnvironmentError_

TEMP_PREFIX = ".tmp-"
_NO_ROOM = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


@contextlib.contextmanager
def mapped_errors(doing: str) -> Iterator[None]:
    """Turn an OSError of the block into DiskFullError or EnvironmentError_; `doing` starts the message."""
    try:
        yield
    except OSError as error:
        reason = f"{doing}: {error.strerror or error}"
        if error.errno in _NO_ROOM:
            raise DiskFullError(reason, "free some space, or move the data directory to a larger disk") from error
        raise EnvironmentError_(reason, "check that the directory exists and is yours to write") from error


def sync_directory(path: Path) -> None:
    """Make renames and removals inside `path` durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_all(handle: int, data: bytes | memoryview) -> None:
    """`os.write` until everything is written: one call may stop early."""
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def write_all_at(handle: int, data: bytes, offset: int) -> None:
    """`os.pwrite` until everything is written."""
    view = memoryview(data)
    while view:
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written


def write_synced(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Create or replace `path` in place and fsync it.  Not atomic: for temporary names.  On an error nothing
    is left behind.  Raises OSError."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        write_all(handle, data)
        os.fsync(handle)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    finally:
        os.close(handle)


def write_file(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace `path` by `data`, atomically and durably.  One writer per path at a time.

    Raises DiskFullError, EnvironmentError_; the old contents then stand.
    """
    temporary = path.parent / f"{TEMP_PREFIX}{path.name}"
    with mapped_errors(f"cannot write {path}"):
        write_synced(temporary, data, mode=mode)
        try:
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync_directory(path.parent)


class DirectoryLock:
    """An exclusive flock on `<directory>/lock`, held until `release` or the end of the process."""

    def __init__(self, directory: Path, what: str) -> None:
        """Raises EnvironmentError_ when another process, or another object of this one, holds it."""
        path = directory / "lock"
        with mapped_errors(f"cannot open {path}"):
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(self._handle, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._handle)
            raise EnvironmentError_(
                f"{what} {directory} is in use by process {owner}",
                "stop that process, or give this one another directory",
            ) from error
        with contextlib.suppress(OSError):  # the pid only serves the message above; a full disk is no obstacle
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
