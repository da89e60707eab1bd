"""A peer's small state on disk: which record is head, which round it is in.

Law: the file holds one map, replaced as a whole; a reader sees the old map or the new one.  A damaged file is
refused, not guessed at.  Values are what DAG-CBOR carries: integers of 64 bits, bytes, text, lists, maps,
booleans, None and CIDs.  At most 1 MiB: weights and records belong into the block store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from p2pflock.errors import EnvironmentError_, InvalidMessageError, LocalProtocolError
from p2pflock.primitives import dagcbor
from p2pflock.storage import durable

_MAGIC = b"P2PFSTA1"
_START = len(_MAGIC) + 32
MAX_BYTES = 1 << 20


class StateFile:
    """Key/value pairs that survive a crash.  One writer."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self._path = path
        self._values = dict(values)

    @classmethod
    def open(cls, path: Path) -> StateFile:
        """Read the file; a missing one is an empty map.  Raises EnvironmentError_ when it is damaged."""
        try:
            with durable.mapped_errors(f"cannot read {path}"), path.open("rb") as source:
                data = source.read(_START + MAX_BYTES + 1)
        except EnvironmentError_ as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return cls(path, {})
            raise
        body = data[_START:]
        if data[:_START] != _MAGIC + hashlib.sha256(body).digest():
            raise _damaged(path)
        try:
            values = dagcbor.decode(body)
        except InvalidMessageError as error:
            raise _damaged(path) from error
        if type(values) is not dict:
            raise _damaged(path)
        return cls(path, values)

    def get(self, key: str, default: Any = None) -> Any:
        return self._values.get(key, default)

    def snapshot(self) -> dict[str, Any]:
        """A copy of the whole map."""
        return dict(self._values)

    def update(self, values: Mapping[str, Any]) -> None:
        """Set several keys at once; None removes one.  Durable on return.

        Raises DiskFullError or EnvironmentError_; file and memory then hold what they held before.
        """
        merged = {k: v for k, v in {**self._values, **values}.items() if v is not None}
        body = dagcbor.encode(merged)
        if len(body) > MAX_BYTES:
            raise LocalProtocolError(f"state of {len(body)} bytes, at most {MAX_BYTES}")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_file(self._path, _MAGIC + hashlib.sha256(body).digest() + body)
        self._values = merged


def _damaged(path: Path) -> EnvironmentError_:
    return EnvironmentError_(f"{path} is damaged", "remove it: the peer finds its place again from the swarm")
