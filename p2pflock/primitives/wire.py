"""Canonical msgpack: envelopes between processes of one peer and between peers on a stream.

Law: each value has one encoding (shortest form, map keys strictly ascending by their encoded bytes) and `unpack`
refuses every other, extension types, trailing bytes, deep nesting and more items than asked for.  The msgpack
library does the work; that an encoding is the canonical one is checked by packing the value again.  Signed and
stored objects are DAG-CBOR; this is for transport only, so finite 64-bit floats are allowed (deadlines, rates).

Values: int in [-2^63, 2^64), float (finite), bytes (bytearray and memoryview pack as bytes), str, list (tuples
pack as lists), dict with str, bytes or int keys, bool, None.
Source: https://github.com/msgpack/msgpack/blob/master/spec.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgpack

from p2pflock.errors import InvalidMessageError

MAX_DEPTH = 16
MAX_ITEMS = 1 << 20
MAX_SHORT_LIST = 15
_BYTES_HEADS = ((b"\xc4", 0xFF, 1), (b"\xc5", 0xFFFF, 2), (b"\xc6", 0xFFFFFFFF, 4))  # head, longest, bytes of length


def _sorted(value: Any, depth: int) -> Any:
    """The same value with map keys in canonical order.  Raises InvalidMessageError for what has no encoding."""
    kind = type(value)
    if value is None or kind in (bool, int, str, bytes, bytearray, memoryview):
        return value
    if kind is float:
        if not math.isfinite(value):
            raise InvalidMessageError("float is not finite")
        return value
    if depth <= 0:
        raise InvalidMessageError("nested too deeply")
    if kind is list or kind is tuple:
        return [_sorted(item, depth - 1) for item in value]
    if kind is not dict:
        raise InvalidMessageError(f"{kind.__name__} can not be packed")
    if any(type(key) not in (str, bytes, int) for key in value):
        raise InvalidMessageError("map keys are text, bytes or integers")
    return {key: _sorted(value[key], depth - 1) for key in sorted(value, key=_encode)}


def _encode(value: Any) -> bytes:
    try:
        packed: bytes = msgpack.packb(value, use_bin_type=True, strict_types=True)
    except (OverflowError, ValueError, TypeError) as error:
        raise InvalidMessageError(f"can not be packed: {error}") from error
    return packed


def pack(value: Any) -> bytes:
    """The one encoding of `value`.  Raises InvalidMessageError for what has none."""
    return _encode(_sorted(value, MAX_DEPTH))


def pack_in_parts(values: Sequence[Any]) -> list[bytes]:
    """What `pack` makes of a short list, in pieces that join to it; byte strings stay the objects they are, so that
    hundreds of megabytes need not be copied."""
    if len(values) > MAX_SHORT_LIST:
        raise InvalidMessageError(f"a short list has at most {MAX_SHORT_LIST} items")
    parts = [bytes((0x90 | len(values),))]
    for value in values:
        if type(value) is bytes:
            kind = next(kind for kind in _BYTES_HEADS if len(value) <= kind[1])
            parts += [kind[0] + len(value).to_bytes(kind[2], "big"), value]
        else:
            parts.append(pack(value))
    return parts


# --- reading --------------------------------------------------------------------------------------------
def _refuse_extension(code: int, data: bytes) -> Any:
    raise InvalidMessageError("extension types are not allowed")


class _Reader:
    """Walks the containers itself and leaves the rest to the library.

    Attack: a five-byte head that claims 2^32 items, or a thousand nested ones that claim a megabyte each, makes
    the library allocate lists of that size before it reads an item.  Here no list is longer than what is there.
    """

    def __init__(self, data: bytes, max_items: int) -> None:
        self._data = data
        self._items = max_items
        self._unpacker = msgpack.Unpacker(
            raw=False, strict_map_key=False, ext_hook=_refuse_extension, max_buffer_size=max(1, len(data))
        )
        self._unpacker.feed(data)

    @property
    def position(self) -> int:
        return int(self._unpacker.tell())

    def read(self, depth: int) -> Any:
        if self._items <= 0:
            raise InvalidMessageError("too many items")
        self._items -= 1
        if self.position >= len(self._data):
            raise InvalidMessageError("truncated")
        first = self._data[self.position]
        if 0x90 <= first < 0xA0 or first in (0xDC, 0xDD):
            return [self.read(depth - 1) for _ in range(self._claim(self._unpacker.read_array_header(), depth))]
        if 0x80 <= first < 0x90 or first in (0xDE, 0xDF):
            size = self._claim(self._unpacker.read_map_header(), depth)
            return {self._key(): self.read(depth - 1) for _ in range(size)}
        return self._unpacker.unpack()

    def _claim(self, items: int, depth: int) -> int:
        if depth <= 0:
            raise InvalidMessageError("nested too deeply")
        if items > len(self._data) - self.position or items > self._items:
            raise InvalidMessageError("more items claimed than there can be")
        return items

    def _key(self) -> Any:
        key = self.read(0)
        if type(key) not in (str, bytes, int):
            raise InvalidMessageError("map keys are text, bytes or integers")
        return key


def unpack(data: bytes, *, max_bytes: int, max_items: int = MAX_ITEMS) -> Any:
    """The value whose one encoding is `data`.  Raises InvalidMessageError for everything else."""
    if len(data) > max_bytes:
        raise InvalidMessageError(f"{len(data)} bytes, at most {max_bytes}")
    data = bytes(data)
    reader = _Reader(data, max_items)
    try:
        value = reader.read(MAX_DEPTH)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise InvalidMessageError(f"not msgpack: {error}") from error
    if reader.position != len(data) or pack(value) != data:
        raise InvalidMessageError("not in its canonical form")
    return value
