"""The DHT records that one node keeps for others, within a fixed budget.

Law: at most MAX_RECORDS records of MAX_TOTAL_BYTES together, and MAX_KEYS_PER_AUTHOR keys for one author.
Records arrive validated (validator.py); this file counts, ages and replaces them.  It has the shape of
hivemind's DHTLocalStorage, which it stands in for, because the stock one

* keeps whatever it is given (attack: 100 records of 1 MB each);
* grows its expiry heap with every *rejected* store, and re-arms it with the older expiry, so that replaying a
  peer's previous record deletes the current one early;
* hands out its own dictionaries, into which a lookup then merges what strangers answered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

MAX_RECORDS = 8192
MAX_TOTAL_BYTES = 32 << 20
MAX_KEYS_PER_AUTHOR = 8

Entry = tuple[bytes, bytes, float]  # author, signed value, expiry in seconds since 1970
BuildAnswer = Callable[[Iterable[Entry]], Any]


class RecordStore:
    """Records by key and author.

    Args:
        now: seconds since 1970.
        build_answer: turns the live entries of a key into what hivemind's protocol serialises.
    """

    def __init__(self, now: Callable[[], float], build_answer: BuildAnswer) -> None:
        self._now = now
        self._build_answer = build_answer
        self._records: dict[Any, dict[bytes, tuple[bytes, float]]] = {}
        self._keys_of: Counter[bytes] = Counter()
        self._count = 0
        self._bytes = 0
        self._next_expiry = float("inf")
        self.refused = 0

    def __len__(self) -> int:
        self._drop_expired()
        return self._count

    @property
    def held_bytes(self) -> int:
        return self._bytes

    def store(self, key: Any, value: Any, expiration_time: float, subkey: Any = None) -> bool:
        """Regular keys have no owner, so they are refused."""
        if type(subkey) is not bytes:
            self.refused += 1
            return False
        return self.store_subkey(key, subkey, value, expiration_time)

    def store_subkey(self, key: Any, subkey: Any, value: Any, expiration_time: float) -> bool:
        """True if this is now the author's record under `key`; only a later expiry replaces an earlier."""
        self._drop_expired()
        if type(subkey) is not bytes or type(value) is not bytes or expiration_time <= self._now():
            self.refused += 1
            return False
        authors = self._records.get(key, {})
        held = authors.get(subkey)
        if held is not None and held[1] >= expiration_time:
            return held == (value, expiration_time)  # a replica handing over what we have is fine
        growth = len(value) - (len(held[0]) if held else 0)
        if self._bytes + growth > MAX_TOTAL_BYTES or (
            held is None
            and (self._count >= MAX_RECORDS or self._keys_of[subkey] >= MAX_KEYS_PER_AUTHOR)
        ):
            self.refused += 1
            return False
        if held is None:
            self._count += 1
            self._keys_of[subkey] += 1
        self._bytes += growth
        self._records.setdefault(key, authors)[subkey] = (value, expiration_time)
        self._next_expiry = min(self._next_expiry, expiration_time)
        return True

    def get(self, key: Any) -> Any:
        """hivemind's answer for a key, or None.  A copy: what the caller does to it stays with the caller."""
        self._drop_expired()
        authors = self._records.get(key)
        return None if authors is None else self._answer(authors)

    def items(self) -> Iterator[tuple[Any, Any]]:
        self._drop_expired()
        return ((key, self._answer(authors)) for key, authors in list(self._records.items()))

    def __contains__(self, key: object) -> bool:
        self._drop_expired()
        return key in self._records

    def _answer(self, authors: dict[bytes, tuple[bytes, float]]) -> Any:
        return self._build_answer((author, *entry) for author, entry in authors.items())

    def _drop_expired(self) -> None:
        now = self._now()
        if now < self._next_expiry:
            return
        self._next_expiry = float("inf")
        for key, authors in list(self._records.items()):
            for author, (value, expiry) in list(authors.items()):
                if expiry > now:
                    self._next_expiry = min(self._next_expiry, expiry)
                    continue
                del authors[author]
                self._count -= 1
                self._bytes -= len(value)
                self._keys_of[author] -= 1
                if not self._keys_of[author]:
                    del self._keys_of[author]
            if not authors:
                del self._records[key]
