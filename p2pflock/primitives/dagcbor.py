"""Strict DAG-CBOR: the one encoding of every protocol object.

Law: each value has exactly one encoding and `decode` accepts nothing else: definite lengths, shortest
integers, text map keys strictly ascending (length first, then bytewise), valid UTF-8, links as tag 42 around a
0x00-prefixed CID, no other tag, no float, no undefined.  Sizes are checked against what is really there
before anything is allocated, so a short message can not claim gigabytes.

Values: int in [-2^64, 2^64), bytes, str, list (tuples encode as lists), dict with str keys, bool, None, CID.
Source: https://ipld.io/specs/codecs/dag-cbor/spec/ (strictness), RFC 8949.
"""

from __future__ import annotations

from typing import Any

from p2pflock.errors import InvalidMessageError
from p2pflock.primitives.cid import CID, SIZE_BYTES

MAX_DEPTH = 16
MAX_ITEMS = 65_536

_LINK_HEAD = b"\xd8\x2a\x58\x25\x00"  # tag 42, byte string of 37 bytes, multibase identity prefix
_LINK_BYTES = len(_LINK_HEAD) + SIZE_BYTES


# --- encoding -------------------------------------------------------------------------------------------
def _head(major: int, argument: int) -> bytes:
    top = major << 5
    if argument < 24:
        return bytes((top | argument,))
    if argument < 0x100:
        return bytes((top | 24, argument))
    if argument < 0x1_0000:
        return bytes((top | 25,)) + argument.to_bytes(2, "big")
    if argument < 0x1_0000_0000:
        return bytes((top | 26,)) + argument.to_bytes(4, "big")
    if argument < 0x1_0000_0000_0000_0000:
        return bytes((top | 27,)) + argument.to_bytes(8, "big")
    raise InvalidMessageError("integer beyond 64 bits")


def _text(value: str) -> bytes:
    try:
        return value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidMessageError("text with a lone surrogate") from error


def _write(value: Any, depth: int, out: list[bytes]) -> None:
    kind = type(value)
    if kind is int:
        out.append(_head(0, value) if value >= 0 else _head(1, -1 - value))
    elif kind is bytes:
        out.append(_head(2, len(value)))
        out.append(value)
    elif kind is str:
        raw = _text(value)
        out.append(_head(3, len(raw)))
        out.append(raw)
    elif kind is CID:
        out.append(_LINK_HEAD)
        out.append(value.to_bytes())
    elif value is None:
        out.append(b"\xf6")
    elif kind is bool:
        out.append(b"\xf5" if value else b"\xf4")
    elif kind is list or kind is tuple:
        if depth <= 0:
            raise InvalidMessageError("nested too deeply")
        out.append(_head(4, len(value)))
        for item in value:
            _write(item, depth - 1, out)
    elif kind is dict:
        if depth <= 0:
            raise InvalidMessageError("nested too deeply")
        if not all(type(key) is str for key in value):
            raise InvalidMessageError("map keys are text")
        out.append(_head(5, len(value)))
        for _, raw, item in sorted((len(raw), raw, key) for key in value for raw in (_text(key),)):
            out.append(_head(3, len(raw)))
            out.append(raw)
            _write(value[item], depth - 1, out)
    else:
        raise InvalidMessageError(f"{kind.__name__} has no DAG-CBOR form")


def encode(value: Any, *, max_depth: int = MAX_DEPTH) -> bytes:
    """The one encoding of `value`.

    Raises InvalidMessageError for floats, foreign types, integers beyond 64 bits and deep nesting.
    """
    out: list[bytes] = []
    _write(value, max_depth, out)
    return b"".join(out)


# --- decoding -------------------------------------------------------------------------------------------
_WIDTH = {24: 1, 25: 2, 26: 4, 27: 8}
_LEAST = {24: 24, 25: 0x100, 26: 0x1_0000, 27: 0x1_0000_0000}


class _Reader:
    __slots__ = ("data", "end", "items", "position")

    def __init__(self, data: bytes, max_items: int) -> None:
        self.data = data
        self.end = len(data)
        self.position = 0
        self.items = max_items

    def read(self, depth: int) -> Any:
        position = self.position
        if position >= self.end:
            raise InvalidMessageError("truncated")
        if self.items <= 0:
            raise InvalidMessageError("too many items")
        self.items -= 1
        first = self.data[position]
        major = first >> 5
        if major == 7:
            self.position = position + 1
            if first == 0xF4:
                return False
            if first == 0xF5:
                return True
            if first == 0xF6:
                return None
            raise InvalidMessageError("floats and other simple values are not allowed")
        if major == 6:
            return self._link(position)
        argument = self._argument(first & 31, position + 1)
        if major == 0:
            return argument
        if major == 1:
            return -1 - argument
        if major == 2:
            return self._take(argument)
        if major == 3:
            return self._utf8(self._take(argument))
        if depth <= 0:
            raise InvalidMessageError("nested too deeply")
        # Attack: a nine-byte head that claims 2^40 items.  Every item takes a byte and a unit of the budget.
        claimed = argument if major == 4 else 2 * argument
        if claimed > self.end - self.position or claimed > self.items:
            raise InvalidMessageError("more items claimed than there can be")
        if major == 4:
            return [self.read(depth - 1) for _ in range(argument)]
        return self._map(argument, depth - 1)

    def _argument(self, low: int, position: int) -> int:
        if low < 24:
            self.position = position
            return low
        width = _WIDTH.get(low)
        if width is None:
            raise InvalidMessageError("indefinite length or reserved head")
        stop = position + width
        if stop > self.end:
            raise InvalidMessageError("truncated")
        value = int.from_bytes(self.data[position:stop], "big")
        if value < _LEAST[low]:
            raise InvalidMessageError("integer not in its shortest form")
        self.position = stop
        return value

    def _take(self, size: int) -> bytes:
        start = self.position
        if size > self.end - start:
            raise InvalidMessageError("truncated")
        self.position = start + size
        return self.data[start : start + size]

    @staticmethod
    def _utf8(raw: bytes) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidMessageError("text is not UTF-8") from error

    def _link(self, position: int) -> CID:
        if self.data[position : position + len(_LINK_HEAD)] != _LINK_HEAD:
            raise InvalidMessageError("only tag 42 with a CIDv1 is allowed")
        self.position = position
        return CID.from_bytes(self._take(_LINK_BYTES)[len(_LINK_HEAD) :])

    def _map(self, size: int, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        previous = b""
        for index in range(size):
            if self.position >= self.end or self.data[self.position] >> 5 != 3:
                raise InvalidMessageError("map keys are text")
            self.items -= 1
            raw = self._take(self._argument(self.data[self.position] & 31, self.position + 1))
            if index and (len(raw), raw) <= (len(previous), previous):
                raise InvalidMessageError("map keys out of order or repeated")
            previous = raw
            result[self._utf8(raw)] = self.read(depth)
        return result


def decode(data: bytes, *, max_depth: int = MAX_DEPTH, max_items: int = MAX_ITEMS) -> Any:
    """The value whose one encoding is `data`.

    Args:
        data: the whole message; trailing bytes are refused.
        max_depth: how deeply lists and maps may nest.
        max_items: how many values, map keys included, there may be in all.

    Raises InvalidMessageError for anything `encode` would not have written.
    """
    reader = _Reader(bytes(data), max_items)
    value = reader.read(max_depth)
    if reader.position != reader.end:
        raise InvalidMessageError("trailing bytes")
    return value
