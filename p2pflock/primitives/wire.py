"""Canonical msgpack: envelopes between processes of one peer and between peers on a stream.

Law: as in dagcbor.py each value has one encoding (shortest form, map keys strictly ascending by their encoded
bytes) and `unpack` refuses every other, extension types, trailing bytes, deep nesting, and claims of more
items than there are bytes.  Signed and stored objects are DAG-CBOR; this is for transport only, so finite
64-bit floats are allowed (deadlines, rates).

Values: int in [-2^63, 2^64), float (finite), bytes (bytearray and memoryview pack as bytes), str, list (tuples
pack as lists), dict with str, bytes or int keys, bool, None.
Source: https://github.com/msgpack/msgpack/blob/master/spec.md.
"""

from __future__ import annotations

import math
import struct
from typing import Any

from p2pflock.errors import InvalidMessageError

MAX_DEPTH = 16
MAX_ITEMS = 1 << 20

_U16, _U32 = 1 << 16, 1 << 32


# --- packing --------------------------------------------------------------------------------------------
def _pack_int(value: int) -> bytes:
    if value >= 0:
        if value < 0x80:
            return bytes((value,))
        if value < 0x100:
            return bytes((0xCC, value))
        if value < _U16:
            return b"\xcd" + value.to_bytes(2, "big")
        if value < _U32:
            return b"\xce" + value.to_bytes(4, "big")
        if value < 1 << 64:
            return b"\xcf" + value.to_bytes(8, "big")
    elif value >= -32:
        return bytes((value & 0xFF,))
    elif value >= -0x80:
        return b"\xd0" + value.to_bytes(1, "big", signed=True)
    elif value >= -0x8000:
        return b"\xd1" + value.to_bytes(2, "big", signed=True)
    elif value >= -(1 << 31):
        return b"\xd2" + value.to_bytes(4, "big", signed=True)
    elif value >= -(1 << 63):
        return b"\xd3" + value.to_bytes(8, "big", signed=True)
    raise InvalidMessageError("integer beyond 64 bits")


def _pack_size(size: int, fix: int, fix_limit: int, one: int, two: int) -> bytes:
    """Head of a string, list or map; `one` is 0 where the type has no 8-bit form, `two` the 16-bit form."""
    if size < fix_limit:
        return bytes((fix | size,))
    if one and size < 0x100:
        return bytes((one, size))
    if size < _U16:
        return bytes((two,)) + size.to_bytes(2, "big")
    if size < _U32:
        return bytes((two + 1,)) + size.to_bytes(4, "big")
    raise InvalidMessageError("longer than 2^32")


def _pack_scalar(value: Any, out: list[bytes]) -> bool:
    kind = type(value)
    if kind is int:
        out.append(_pack_int(value))
    elif kind is str:
        try:
            raw = value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidMessageError("text with a lone surrogate") from error
        out.append(_pack_size(len(raw), 0xA0, 32, 0xD9, 0xDA))
        out.append(raw)
    elif kind is bytes or kind is bytearray or kind is memoryview:
        raw = value if kind is bytes else bytes(value)
        out.append(_pack_size(len(raw), 0, 0, 0xC4, 0xC5))
        out.append(raw)
    else:
        return False
    return True


def _write(value: Any, depth: int, out: list[bytes]) -> None:
    kind = type(value)
    if _pack_scalar(value, out):
        return
    if value is None:
        out.append(b"\xc0")
    elif kind is bool:
        out.append(b"\xc3" if value else b"\xc2")
    elif kind is float:
        if not math.isfinite(value):
            raise InvalidMessageError("float is not finite")
        out.append(b"\xcb" + struct.pack(">d", value))
    elif kind is list or kind is tuple:
        if depth <= 0:
            raise InvalidMessageError("nested too deeply")
        out.append(_pack_size(len(value), 0x90, 16, 0, 0xDC))
        for item in value:
            _write(item, depth - 1, out)
    elif kind is dict:
        if depth <= 0:
            raise InvalidMessageError("nested too deeply")
        out.append(_pack_size(len(value), 0x80, 16, 0, 0xDE))
        entries = []
        for key, item in value.items():
            raw: list[bytes] = []
            if not _pack_scalar(key, raw):
                raise InvalidMessageError("map keys are text, bytes or integers")
            entries.append((b"".join(raw), item))
        entries.sort(key=lambda entry: entry[0])
        for encoded, item in entries:
            out.append(encoded)
            _write(item, depth - 1, out)
    else:
        raise InvalidMessageError(f"{kind.__name__} can not be packed")


def pack(value: Any) -> bytes:
    """The one encoding of `value`.  Raises InvalidMessageError for what has none."""
    out: list[bytes] = []
    _write(value, MAX_DEPTH, out)
    return b"".join(out)


# --- unpacking ------------------------------------------------------------------------------------------
_UNSIGNED = {0xCC: (1, 0x80), 0xCD: (2, 0x100), 0xCE: (4, _U16), 0xCF: (8, _U32)}  # width, least value
_SIGNED = {0xD0: (1, -32), 0xD1: (2, -0x80), 0xD2: (4, -0x8000), 0xD3: (8, -(1 << 31))}  # width, below this
_BIN = {0xC4: (1, 0), 0xC5: (2, 0x100), 0xC6: (4, _U16)}
_STR = {0xD9: (1, 32), 0xDA: (2, 0x100), 0xDB: (4, _U16)}
_LIST = {0xDC: (2, 16), 0xDD: (4, _U16)}
_MAP = {0xDE: (2, 16), 0xDF: (4, _U16)}


class _Reader:
    __slots__ = ("data", "end", "items", "position")

    def __init__(self, data: bytes, max_items: int) -> None:
        self.data = data
        self.end = len(data)
        self.position = 0
        self.items = max_items

    def take(self, size: int) -> bytes:
        start = self.position
        if size > self.end - start:
            raise InvalidMessageError("truncated")
        self.position = start + size
        return self.data[start : start + size]

    def unsigned(self, form: tuple[int, int]) -> int:
        width, least = form
        value = int.from_bytes(self.take(width), "big")
        if value < least:
            raise InvalidMessageError("not in its shortest form")
        return value

    def text(self, size: int) -> str:
        try:
            return self.take(size).decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidMessageError("text is not UTF-8") from error

    def read(self, depth: int, *, is_key: bool = False) -> Any:
        if self.items <= 0:
            raise InvalidMessageError("too many items")
        self.items -= 1
        first = self.take(1)[0]
        if first < 0x80:
            return first
        if first >= 0xE0:
            return first - 0x100
        if 0xA0 <= first < 0xC0:
            return self.text(first & 31)
        if first in _BIN:
            return self.take(self.unsigned(_BIN[first]))
        if first in _STR:
            return self.text(self.unsigned(_STR[first]))
        if first in _UNSIGNED:
            return self.unsigned(_UNSIGNED[first])
        if first in _SIGNED:
            width, below = _SIGNED[first]
            value = int.from_bytes(self.take(width), "big", signed=True)
            if value >= below:
                raise InvalidMessageError("not in its shortest form")
            return value
        if is_key:
            raise InvalidMessageError("map keys are text, bytes or integers")
        if first == 0xC0:
            return None
        if first == 0xC2:
            return False
        if first == 0xC3:
            return True
        if first == 0xCB:
            number: float = struct.unpack(">d", self.take(8))[0]
            if not math.isfinite(number):
                raise InvalidMessageError("float is not finite")
            return number
        if 0x90 <= first < 0xA0 or first in _LIST:
            size = first & 15 if first < 0xA0 else self.unsigned(_LIST[first])
            self.check_claim(size, depth)
            return [self.read(depth - 1) for _ in range(size)]
        if first < 0x90 or first in _MAP:
            size = first & 15 if first < 0x90 else self.unsigned(_MAP[first])
            self.check_claim(2 * size, depth)
            return self.map(size, depth - 1)
        raise InvalidMessageError("extension types and 32-bit floats are not allowed")

    def check_claim(self, items: int, depth: int) -> None:
        if depth <= 0:
            raise InvalidMessageError("nested too deeply")
        # Attack: a five-byte head that claims 2^32 items makes a naive reader allocate 32 GiB.
        if items > self.end - self.position or items > self.items:
            raise InvalidMessageError("more items claimed than there can be")

    def map(self, size: int, depth: int) -> dict[Any, Any]:
        result: dict[Any, Any] = {}
        previous = b""
        for _ in range(size):
            start = self.position
            key = self.read(0, is_key=True)
            encoded = self.data[start : self.position]
            if encoded <= previous:
                raise InvalidMessageError("map keys out of order or repeated")
            previous = encoded
            result[key] = self.read(depth)
        return result


def unpack(data: bytes, *, max_bytes: int, max_items: int = MAX_ITEMS) -> Any:
    """The value whose one encoding is `data`.  Raises InvalidMessageError for everything else."""
    if len(data) > max_bytes:
        raise InvalidMessageError(f"{len(data)} bytes, at most {max_bytes}")
    reader = _Reader(bytes(data), max_items)
    value = reader.read(MAX_DEPTH)
    if reader.position != reader.end:
        raise InvalidMessageError("trailing bytes")
    return value
