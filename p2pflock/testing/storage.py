"""The storage ports in memory: for simulations and unit tests of everything above storage.

Law: behaves as the conformance suite (conformance_storage.py) demands of any BlobStore; nothing more is
promised.  `damage` and `lose` are the faults a disk can have.
"""

from __future__ import annotations

from collections.abc import Iterator

from p2pflock.errors import DiskFullError, InvalidMessageError, UnavailableError
from p2pflock.primitives.cid import CID


class MemoryStore:
    """A BlobStore in a dictionary.

    Args:
        quota_bytes: sum of block sizes allowed; None for no limit.
    """

    def __init__(self, *, quota_bytes: int | None = None) -> None:
        self._blocks: dict[CID, bytes] = {}
        self._pins: dict[CID, None] = {}
        self._quota_bytes = quota_bytes
        self.used_bytes = 0

    def put(self, cid: CID, data: bytes) -> None:
        if not cid.matches(data):
            raise InvalidMessageError(f"block does not hash to {cid}")
        if cid in self._blocks:
            return
        if self._quota_bytes is not None and self.used_bytes + len(data) > self._quota_bytes:
            raise DiskFullError("the block store's quota is used up", "raise the quota, or unpin and collect")
        self._blocks[cid] = bytes(data)
        self.used_bytes += len(data)

    def get(self, cid: CID) -> bytes:
        data = self._blocks.get(cid)
        if data is None:
            raise UnavailableError(f"block {cid} is not here")
        if not cid.matches(data):
            self.lose(cid)
            raise UnavailableError(f"block {cid} was damaged")
        return data

    def has(self, cid: CID) -> bool:
        return cid in self._blocks

    def pin(self, cid: CID) -> None:
        self._pins[cid] = None

    def unpin(self, cid: CID) -> None:
        self._pins.pop(cid, None)

    def pins(self) -> Iterator[CID]:
        return iter(sorted(self._pins))

    def blocks(self) -> Iterator[CID]:
        return iter(sorted(self._blocks))

    def damage(self, cid: CID) -> None:
        """Flip one bit of a stored block, as a failing disk would."""
        data = self._blocks[cid]
        self._blocks[cid] = bytes((data[0] ^ 1,)) + data[1:] if data else b"\0"

    def lose(self, cid: CID) -> None:
        """Remove a block behind everybody's back."""
        self.used_bytes -= len(self._blocks.pop(cid))
