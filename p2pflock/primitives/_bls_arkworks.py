"""BLS12-381 group operations over arkworks (Rust).  Encoding flags are checked by bls.py before we see bytes:
arkworks itself accepts stray bits in an encoding of infinity.  Scalar multiplication is not promised to be
constant time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from py_arkworks_bls12381 import GT, G1Point, G2Point, Scalar

NAME = "arkworks"
NEGATIVE_GENERATOR: Any = -G1Point()
IDENTITY: Any = G1Point.identity()


def read_g1(data: bytes) -> Any:
    """Point on the curve and in the subgroup; ValueError otherwise."""
    return G1Point.from_compressed_bytes(data)


def read_g2(data: bytes) -> Any:
    return G2Point.from_compressed_bytes(data)


def write_g2(point: Any) -> bytes:
    return bytes(point.to_compressed_bytes())


def sum_g1(points: Sequence[Any]) -> Any:
    total = G1Point.identity()
    for point in points:
        total = total + point
    return total


def sum_g2(points: Sequence[Any]) -> Any:
    total = G2Point.identity()
    for point in points:
        total = total + point
    return total


def is_infinity_g1(point: Any) -> bool:
    return bool(point == IDENTITY)


def public_key(scalar: int) -> bytes:
    return bytes((G1Point() * Scalar.from_be_bytes(scalar.to_bytes(32, "big"))).to_compressed_bytes())


def hash_to_g2(message: bytes, dst: bytes) -> Any:
    return G2Point.hash_to_curve(message, dst)


def multiply_g2(point: Any, scalar: int) -> Any:
    return point * Scalar.from_be_bytes(scalar.to_bytes(32, "big"))


def is_pairing_product_one(g1: Sequence[Any], g2: Sequence[Any]) -> bool:
    return bool(GT.pairing_check(list(g1), list(g2)))


def affine_g1(point: Any) -> bytes:
    """Affine x ‖ y, 48 bytes each; zeros for infinity."""
    return bytes(point.to_xy_bytes_be())


def affine_g2(point: Any) -> bytes:
    """Affine x.c0 ‖ x.c1 ‖ y.c0 ‖ y.c1, 48 bytes each; zeros for infinity."""
    return bytes(point.to_xy_bytes_be())
