"""Field types of protocol objects: one declaration gives encoding, strict decoding and bounds.

Law: an object has one encoding.  `decode(encode(x)) == x`, and every other byte string that might mean x is
refused.  Unknown, missing or out-of-bounds fields are refused, so no peer can smuggle data or grow memory.
Encoding is DAG-CBOR (dagcbor.py), so every protocol object is also an IPLD block with a CID.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from p2pflock.errors import InvalidMessageError
from p2pflock.primitives import dagcbor
from p2pflock.primitives.cid import CID


@dataclass(frozen=True, slots=True)
class Spec:
    """How one field travels: `to_wire` then `from_wire` is the identity on valid values."""

    to_wire: Callable[[Any], Any]
    from_wire: Callable[[Any], Any]


def _refuse(what: str, value: object) -> InvalidMessageError:
    return InvalidMessageError(f"expected {what}, got {type(value).__name__}")


def integer(low: int, high: int) -> Any:
    """An int in [low, high], within 64 bits.  IntEnum members may be given and come back as equal ints."""

    def check(value: object) -> int:
        if type(value) is not int or not low <= value <= high:
            raise _refuse(f"integer in [{low}, {high}]", value)
        return value

    def to_wire(value: object) -> int:
        return check(int(value) if isinstance(value, enum.IntEnum) else value)

    return dataclasses.field(metadata={"spec": Spec(to_wire, check)})


def uint(bits: int = 63) -> Any:
    return integer(0, (1 << bits) - 1)


def boolean() -> Any:
    def check(value: object) -> bool:
        if type(value) is not bool:
            raise _refuse("bool", value)
        return value

    return dataclasses.field(metadata={"spec": Spec(check, check)})


def fixed_bytes(size: int) -> Any:
    """Exactly `size` bytes."""
    return blob(size, size)


def blob(maximum: int, minimum: int = 0) -> Any:
    def check(value: object) -> bytes:
        if type(value) is not bytes or not minimum <= len(value) <= maximum:
            raise _refuse(f"{minimum}..{maximum} bytes", value)
        return value

    return dataclasses.field(metadata={"spec": Spec(check, check)})


def amount() -> Any:
    """A non-negative integer below 2^256 (wei), as 32 big-endian bytes: CBOR integers end at 64 bits."""

    def to_wire(value: int) -> bytes:
        if type(value) is not int or not 0 <= value < 1 << 256:
            raise _refuse("amount", value)
        return value.to_bytes(32, "big")

    def from_wire(value: object) -> int:
        if type(value) is not bytes or len(value) != 32:
            raise _refuse("32-byte amount", value)
        return int.from_bytes(value, "big")

    return dataclasses.field(metadata={"spec": Spec(to_wire, from_wire)})


def text(maximum_bytes: int) -> Any:
    def check(value: object) -> str:
        # "surrogatepass" only to measure: dagcbor refuses lone surrogates with our own error.
        if type(value) is not str or len(value.encode("utf-8", "surrogatepass")) > maximum_bytes:
            raise _refuse(f"text up to {maximum_bytes} bytes", value)
        return value

    return dataclasses.field(metadata={"spec": Spec(check, check)})


def link() -> Any:
    def check(value: object) -> CID:
        if type(value) is not CID:
            raise _refuse("link", value)
        return value

    return dataclasses.field(metadata={"spec": Spec(check, check)})


def nested(cls: type[Any]) -> Any:
    """Another record of exactly this class, inline."""

    def to_wire(value: object) -> dict[str, Any]:
        if type(value) is not cls:
            raise _refuse(cls.__name__, value)
        return _to_map(value)

    return dataclasses.field(metadata={"spec": Spec(to_wire, lambda wire: _from_map(cls, wire))})


def optional(inner: Any) -> Any:
    spec: Spec = inner.metadata["spec"]
    return dataclasses.field(
        metadata={
            "spec": Spec(
                lambda v: None if v is None else spec.to_wire(v),
                lambda w: None if w is None else spec.from_wire(w),
            )
        }
    )


def sequence(inner: Any, maximum: int) -> Any:
    """A tuple of at most `maximum` items."""
    spec: Spec = inner.metadata["spec"]

    def to_wire(value: tuple[Any, ...]) -> list[Any]:
        if type(value) is not tuple or len(value) > maximum:
            raise _refuse(f"tuple of at most {maximum}", value)
        return [spec.to_wire(item) for item in value]

    def from_wire(value: object) -> tuple[Any, ...]:
        if type(value) is not list or len(value) > maximum:
            raise _refuse(f"list of at most {maximum}", value)
        return tuple(spec.from_wire(item) for item in value)

    return dataclasses.field(metadata={"spec": Spec(to_wire, from_wire)})


_SPECS: dict[type[Any], tuple[tuple[str, Spec], ...]] = {}  # one entry per record class of the program


def _specs(cls: type[Any]) -> tuple[tuple[str, Spec], ...]:
    specs = _SPECS.get(cls)
    if specs is None:
        specs = tuple((f.name, f.metadata["spec"]) for f in dataclasses.fields(cls))
        if any(name == "kind" for name, _ in specs):
            raise TypeError(f"{cls.__name__}: `kind` is the type tag, not a field")
        _SPECS[cls] = specs
    return specs


def _to_map(record: Any) -> dict[str, Any]:
    return {name: spec.to_wire(getattr(record, name)) for name, spec in _specs(type(record))}


def _from_map(cls: type[Any], value: object) -> Any:
    if type(value) is not dict:
        raise _refuse("map", value)
    specs = _specs(cls)
    if value.keys() != {name for name, _ in specs}:
        raise InvalidMessageError(f"{cls.__name__}: wrong set of fields")
    return cls(**{name: spec.from_wire(value[name]) for name, spec in specs})


M = TypeVar("M", bound="Record")


class Record:
    """Base of every encoded protocol object: a frozen dataclass whose fields come from this module.

    `KIND` is the type tag inside the encoding; it keeps one kind of object from being read as another.
    """

    KIND: ClassVar[str]
    MAX_BYTES: ClassVar[int] = 1 << 20
    __slots__ = ()

    def encode(self) -> bytes:
        """The one canonical encoding.  Raises InvalidMessageError where `decode` would refuse the result."""
        data = dagcbor.encode({**_to_map(self), "kind": self.KIND})
        if len(data) > self.MAX_BYTES:
            raise InvalidMessageError(f"{self.KIND}: {len(data)} bytes, at most {self.MAX_BYTES}")
        return data

    @classmethod
    def decode(cls: type[M], data: bytes) -> M:
        """Raises InvalidMessageError for anything that `encode` would not have written."""
        if len(data) > cls.MAX_BYTES:
            raise InvalidMessageError(f"{cls.KIND}: {len(data)} bytes, at most {cls.MAX_BYTES}")
        value = dagcbor.decode(data)
        if type(value) is not dict or value.pop("kind", None) != cls.KIND:
            raise InvalidMessageError(f"not a {cls.KIND}")
        record: M = _from_map(cls, value)
        return record

    def cid(self) -> CID:
        return CID.of_dag_cbor(self.encode())
