"""BLS12-381 group operations over py_ecc: pure Python, about 150 times slower than arkworks.

The fallback where no arkworks wheel exists, and the oracle in tests.  Encoding flags are checked by bls.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from eth_utils.exceptions import ValidationError
from py_ecc.bls.g2_primitives import (
    G1_to_pubkey,
    G2_to_signature,
    pubkey_to_G1,
    signature_to_G2,
    subgroup_check,
)
from py_ecc.bls.hash_to_curve import hash_to_G2
from py_ecc.fields import optimized_bls12_381_FQ12 as FQ12
from py_ecc.optimized_bls12_381.optimized_curve import G1 as GENERATOR
from py_ecc.optimized_bls12_381.optimized_curve import Z1, Z2, add, is_inf, multiply, neg, normalize
from py_ecc.optimized_bls12_381.optimized_pairing import final_exponentiate, pairing

NAME = "py_ecc"
NEGATIVE_GENERATOR: Any = neg(GENERATOR)


def _checked(read: Any, data: bytes) -> Any:
    try:
        point = read(data)
    except (ValidationError, AssertionError) as error:
        raise ValueError(str(error)) from error
    if not subgroup_check(point):
        raise ValueError("not in the subgroup")
    return point


def read_g1(data: bytes) -> Any:
    """Point on the curve and in the subgroup; ValueError otherwise."""
    return _checked(pubkey_to_G1, data)


def read_g2(data: bytes) -> Any:
    return _checked(signature_to_G2, data)


def write_g2(point: Any) -> bytes:
    return bytes(G2_to_signature(point))


def sum_g1(points: Sequence[Any]) -> Any:
    total: Any = Z1
    for point in points:
        total = add(total, point)
    return total


def sum_g2(points: Sequence[Any]) -> Any:
    total: Any = Z2
    for point in points:
        total = add(total, point)
    return total


def is_infinity_g1(point: Any) -> bool:
    return bool(is_inf(point))


def public_key(scalar: int) -> bytes:
    return bytes(G1_to_pubkey(multiply(GENERATOR, scalar)))


def hash_to_g2(message: bytes, dst: bytes) -> Any:
    sha256: Any = hashlib.sha256  # py_ecc annotates the instance where it takes the constructor
    return hash_to_G2(message, dst, sha256)


def multiply_g2(point: Any, scalar: int) -> Any:
    return multiply(point, scalar)


def is_pairing_product_one(g1: Sequence[Any], g2: Sequence[Any]) -> bool:
    product: Any = FQ12.one()
    for left, right in zip(g1, g2, strict=True):
        product = product * pairing(right, left, final_exponentiate=False)
    return bool(final_exponentiate(product) == FQ12.one())


def affine_g1(point: Any) -> bytes:
    """Affine x ‖ y, 48 bytes each; zeros for infinity."""
    if is_inf(point):
        return bytes(96)
    return b"".join(int(value).to_bytes(48, "big") for value in normalize(point))


def affine_g2(point: Any) -> bytes:
    """Affine x.c0 ‖ x.c1 ‖ y.c0 ‖ y.c1, 48 bytes each; zeros for infinity."""
    if is_inf(point):
        return bytes(192)
    x, y = normalize(point)
    return b"".join(int(value).to_bytes(48, "big") for value in (*x.coeffs, *y.coeffs))
