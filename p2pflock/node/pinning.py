"""Pins checkpoints at a Kubo-compatible daemon, so that they outlive this peer and any IPFS gateway has them.

Law: a convenience, never a condition: rounds do not wait for it, and a daemon that is away only delays it.
What is pinned is the newest manifest, whose graph holds records, contributions and weights; the one before is
unpinned once the new one is held.
"""

from __future__ import annotations

import trio

from p2pflock.errors import FlockError
from p2pflock.node.context import PeerContext
from p2pflock.node.ledger import build_manifest
from p2pflock.primitives.cid import CID
from p2pflock.storage.kubo import KuboStore

POLL_SECONDS = 1.0
RETRY_SECONDS = 10.0


class Pinning:
    """Keeps the daemon's pin at the ledger's head."""

    def __init__(self, context: PeerContext, address: str) -> None:
        self._context = context
        self._address = address
        self._daemon: KuboStore | None = None  # connected to when there is something to pin
        self._pinned: CID | None = None

    async def run(self) -> None:
        while True:
            head = self._context.ledger.head
            manifest = build_manifest(head.record, self._context.facts.spec).cid()
            if manifest == self._pinned:
                await trio.sleep(POLL_SECONDS)
                continue
            try:
                blocks = await trio.to_thread.run_sync(self._pin, manifest)
            except FlockError as error:
                self._context.events.emit("dropped", what="pin", reason=error.message)
                await trio.sleep(RETRY_SECONDS)
                continue
            self._context.events.emit(
                "pinned", round=head.record.round, checkpoint=str(manifest), blocks=blocks
            )

    def _pin(self, manifest: CID) -> int:
        if self._daemon is None:
            self._daemon = KuboStore(self._address)
        sent = self._daemon.pin_graph(self._context.store, manifest)
        if self._pinned is not None:
            self._daemon.unpin(self._pinned)
        self._pinned = manifest
        return sent
