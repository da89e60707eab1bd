"""A trainer's own state on disk: inner optimizer and error feedback, as they are and as they were.

Law: one file, replaced atomically and synced, so that a kill at any moment leaves the old or the new one.
A file of another task or model size, or a damaged one, is as good as none: the state starts afresh, which
costs a little learning and nothing else.  Nothing in it is secret, and it is never sent.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from p2pflock.errors import DiskFullError, InvalidMessageError, MissingToolError
from p2pflock.primitives import wire

KIND = "p2pflock/trainer-state/1"
WRITE_BEHIND_BYTES = 4 << 20  # of one vector
WRITER_NICENESS = 10


@dataclass(frozen=True, slots=True)
class LocalState:
    """After training in `round`, and before it.  Empty bytes are a fresh state."""

    round: int
    optimizer_before: bytes
    feedback_before: bytes
    optimizer: bytes
    feedback: bytes

    @classmethod
    def fresh(cls) -> LocalState:
        return cls(0, b"", b"", b"", b"")


class StateFile:
    def __init__(self, directory: Path, task_id: bytes, parameters: int) -> None:
        self._path = directory / "trainer.state"
        self._task = task_id
        self._feedback_bytes = 4 * parameters
        self._max_bytes = 6 * self._feedback_bytes + 4096
        self._writer: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None

    def read(self) -> LocalState | None:
        """The state of this task, or None where there is no usable one."""
        try:
            with self._path.open("rb") as file:
                data = file.read(self._max_bytes + 1)
        except OSError:
            return None
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            return None
        try:
            kind, task, round_, *states = wire.unpack(data[32:], max_bytes=self._max_bytes)
        except (InvalidMessageError, ValueError, TypeError):
            return None
        if kind != KIND or task != self._task or len(states) != 4:
            return None
        state = LocalState(round_, *states)
        return state if self._fits(state.feedback) and self._fits(state.feedback_before) else None

    def _fits(self, feedback: bytes) -> bool:
        if not feedback:
            return True
        return len(feedback) == self._feedback_bytes and bool(np.isfinite(np.frombuffer(feedback, "<f4")).all())

    def write(self, state: LocalState) -> None:
        """Raises DiskFullError, MissingToolError, of a large state at the next call.

        At ten million parameters a write is a quarter of a gigabyte.  A round must not wait for the disk, so it
        happens while the caller goes on."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None
        if self._feedback_bytes < WRITE_BEHIND_BYTES:
            self._write(state)
            return
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="trainer-state", initializer=_give_way)
        self._writing = self._writer.submit(self._write, state)

    def _write(self, state: LocalState) -> None:
        parts = wire.pack_in_parts(
            [
                KIND,
                self._task,
                state.round,
                state.optimizer_before,
                state.feedback_before,
                state.optimizer,
                state.feedback,
            ]
        )
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        staged = self._path.with_suffix(".new")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with staged.open("wb") as file:
                file.write(digest.digest())
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            staged.replace(self._path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFullError(f"no space for {self._path}", "free some space") from error
            raise MissingToolError(f"cannot write {self._path}: {error.strerror}", "check its directory") from error


def _give_way() -> None:
    """Writing behind takes seconds of a processor that a round's scores and votes wait for; on Linux a thread has a
    priority of its own."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WRITER_NICENESS)
