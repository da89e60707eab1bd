"""A bounded memory with a lifetime.

Law: forgets by age and by number, whichever comes first; time is trio's, so a test can own it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

import trio

Key = TypeVar("Key")
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """A bounded memory with a lifetime."""

    def __init__(self, seconds: float, entries: int) -> None:
        self._seconds = seconds
        self._entries = entries
        self._items: OrderedDict[Key, tuple[float, Value]] = OrderedDict()

    def put(self, key: Key, value: Value) -> None:
        self._items.pop(key, None)
        self._items[key] = (trio.current_time() + self._seconds, value)
        while len(self._items) > self._entries:
            self._items.popitem(last=False)

    def get(self, key: Key) -> Value | None:
        found = self._items.get(key)
        if found is None:
            return None
        if found[0] < trio.current_time():
            del self._items[key]
            return None
        return found[1]
