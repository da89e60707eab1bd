"""Curve points as the contracts hold them, back into the compressed form that peers use.

Law: encoding only.  The points come from the chain, where a pairing has proven them; whoever verifies a
signature parses what comes out of here again.  Sources: EIP-2537; the ZCash encoding of BLS12-381.
"""

from __future__ import annotations

from p2pflock.errors import InvalidMessageError
from p2pflock.primitives.bls import FIELD_MODULUS

_HALF = (FIELD_MODULUS - 1) // 2
_COMPRESSED, _INFINITY, _LARGER = 0x80, 0x40, 0x20


def _flagged(x: bytes, flags: int) -> bytes:
    return bytes((x[0] | flags,)) + x[1:]


def compress_g1(coordinates: bytes) -> bytes:
    """x(48) y(48) -> 48 bytes."""
    if len(coordinates) != 96:
        raise InvalidMessageError("a G1 point has two coordinates of 48 bytes")
    if not any(coordinates):
        return _flagged(bytes(48), _COMPRESSED | _INFINITY)
    larger = _LARGER if int.from_bytes(coordinates[48:], "big") > _HALF else 0
    return _flagged(coordinates[:48], _COMPRESSED | larger)


def compress_g2(point: bytes) -> bytes:
    """EIP-2537 G2 (256 bytes: x.c0 x.c1 y.c0 y.c1, each padded to 64) -> 96 bytes (x.c1 x.c0)."""
    if len(point) != 256 or any(any(point[i : i + 16]) for i in range(0, 256, 64)):
        raise InvalidMessageError("not a G2 point of EIP-2537")
    x0, x1, y0, y1 = (point[i + 16 : i + 64] for i in range(0, 256, 64))
    if not any(point):
        return _flagged(bytes(96), _COMPRESSED | _INFINITY)
    decisive = int.from_bytes(y1, "big") or int.from_bytes(y0, "big")
    return _flagged(x1, _COMPRESSED | (_LARGER if decisive > _HALF else 0)) + x0


def unpack_key(packed: bytes) -> bytes:
    """A committee snapshot's 96 bytes, xHi(16) yHi(16) xLo(32) yLo(32), -> compressed key."""
    return compress_g1(packed[0:16] + packed[32:64] + packed[16:32] + packed[64:96])
