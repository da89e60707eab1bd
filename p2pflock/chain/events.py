"""Contract events, kept in step with a chain that may reorganise.

Law: `events` is exactly what the canonical chain holds up to the synced block.  Every block that gave an
event, and the last heads seen, are remembered by (number, hash); when a remembered hash is no longer
canonical, everything from there on is dropped and fetched again.  A sync either completes or changes nothing.

Base has blocks of 200 ms and one sequencer: reorgs are rare there, and frequent in `anvil_reorg` tests.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from web3 import Web3, exceptions
from web3.contract import Contract

from p2pflock.errors import ChainUnavailableError

RANGE_BLOCKS: Final = 5_000  # of one eth_getLogs; public endpoints refuse more than about 10,000
HEADS: Final = 256  # remembered heads without events
ATTEMPTS: Final = 5  # the chain moved while we were reading


@dataclass(frozen=True, slots=True)
class Event:
    name: str
    values: Mapping[str, Any]
    block_number: int
    block_hash: bytes
    transaction: bytes  # 32-byte hash
    log_index: int


class EventSync:
    """Events of one contract.  Thread-safe; `refresh` before reading."""

    def __init__(self, contract: Contract, names: Sequence[str], start_block: int) -> None:
        self._contract = contract
        self._start = start_block
        self._decoders: dict[bytes, tuple[str, Callable[[Any], Any]]] = {}
        for name in names:
            event = contract.events[name]()
            topic = bytes.fromhex(str(event.topic).removeprefix("0x"))
            self._decoders[topic] = (name, event.process_log)
        self._events: list[Event] = []
        self._heads: list[tuple[int, bytes]] = []  # ascending, newest last
        self._lock = threading.Lock()
        self.reorgs = 0

    def refresh(self, web3: Web3) -> Sequence[Event]:
        """All events up to the newest block, in chain order.  Raises what web3 raises."""
        with self._lock:
            for _ in range(ATTEMPTS):
                if self._advance(web3):
                    return tuple(self._events)
            raise ChainUnavailableError("the chain reorganises faster than it can be read", "try again")

    def _advance(self, web3: Web3) -> bool:
        head = web3.eth.get_block("latest")
        number, head_hash = head["number"], bytes(head["hash"])
        if self._heads and self._heads[-1] == (number, head_hash):
            return True
        ancestor = self._common_ancestor(web3)
        kept = [event for event in self._events if event.block_number <= ancestor]
        found: list[Event] = []
        start = max(ancestor + 1, self._start)
        while start <= number:
            end = min(start + RANGE_BLOCKS - 1, number)
            for log in web3.eth.get_logs(
                {"address": self._contract.address, "fromBlock": start, "toBlock": end}
            ):
                event = self._decode(log)
                if event is not None:
                    found.append(event)
            start = end + 1
        # What was read belongs together only if the head is still canonical.
        if _hash_at(web3, number) != head_hash:
            return False
        if len(kept) < len(self._events):
            self.reorgs += 1
        self._events = kept + sorted(found, key=lambda event: (event.block_number, event.log_index))
        marks = {(event.block_number, event.block_hash) for event in self._events}
        marks.update([mark for mark in self._heads if mark[0] <= ancestor][-HEADS:])
        marks.add((number, head_hash))
        self._heads = sorted(marks)
        return True

    def _common_ancestor(self, web3: Web3) -> int:
        """Newest remembered block that is still canonical; before the start when there is none."""
        for number, block_hash in reversed(self._heads):
            if _hash_at(web3, number) == block_hash:
                return number
        return self._start - 1

    def _decode(self, log: Any) -> Event | None:
        known = self._decoders.get(bytes(log["topics"][0])) if log["topics"] else None
        if known is None:
            return None
        name, decode = known
        return Event(
            name,
            dict(decode(log)["args"]),
            log["blockNumber"],
            bytes(log["blockHash"]),
            bytes(log["transactionHash"]),
            log["logIndex"],
        )


def _hash_at(web3: Web3, number: int) -> bytes | None:
    try:
        return bytes(web3.eth.get_block(number)["hash"])
    except exceptions.BlockNotFound:
        return None
