"""What crosses between the contracts' forms and ours, without a chain."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pflock.chain import artifacts, failures, points
from p2pflock.chain.addresses import AddressBook
from p2pflock.chain.deployment import compute_committee_lifetime_seconds
from p2pflock.chain.evm import EvmChain
from p2pflock.errors import ChainRejectedError, InvalidMessageError, SpecError
from p2pflock.params import PRESETS
from p2pflock.primitives import bls

ROOT = Path(__file__).resolve().parents[3]
BOOK = AddressBook(84532, 7, *(bytes([i]) * 20 for i in range(1, 7)))


@settings(max_examples=20, deadline=None)
@given(st.binary(min_size=32, max_size=32))
def test_points_come_back_compressed(seed: bytes) -> None:
    secret = bls.keygen(seed)
    key, signature = bls.secret_to_public(secret), bls.sign(secret, seed)
    g1 = bls.g1_to_eip2537(key)
    assert points.compress_g1(g1[16:64] + g1[80:128]) == key
    packed = g1[16:32] + g1[80:96] + g1[32:64] + g1[96:128]  # as in the committee's code
    assert points.unpack_key(packed) == key
    assert points.compress_g2(bls.g2_to_eip2537(signature)) == signature


def test_infinity_and_malformed_points() -> None:
    assert points.compress_g2(bytes(256)) == bls.INFINITY_SIGNATURE
    assert points.compress_g1(bytes(96)) == b"\xc0" + bytes(47)
    for bad in (bytes(255), b"\x01" + bytes(255)):
        with pytest.raises(InvalidMessageError):
            points.compress_g2(bad)
    with pytest.raises(InvalidMessageError):
        points.compress_g1(bytes(95))


def test_address_book_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "book.json"
    BOOK.save(path)
    assert AddressBook.load(path) == BOOK


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        BOOK.to_json().replace("84532", '"84532"'),
        BOOK.to_json().replace("84532", "-1"),
        BOOK.to_json().replace("0x" + "01" * 20, "0x" + "01" * 19),
        BOOK.to_json().replace("0x" + "01" * 20, "no hex"),
        BOOK.to_json().replace('"token"', '"tokens"'),
    ],
)
def test_malformed_address_book_is_one_line(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        AddressBook.from_json(text)
    assert "\n" not in str(caught.value)


def test_missing_address_book(tmp_path: Path) -> None:
    with pytest.raises(SpecError):
        AddressBook.load(tmp_path / "none.json")


def test_custom_errors_are_named_with_their_arguments() -> None:
    selector = bytes.fromhex(hashlib.sha256(b"").hexdigest())[:4]
    assert failures.describe_revert(selector) == ("", "reverted with 0x" + selector.hex())
    from p2pflock.primitives.keccak import keccak256

    data = keccak256(b"WrongRound(uint64,uint64)")[:4] + (2).to_bytes(32, "big") + (5).to_bytes(32, "big")
    error = failures.rejected("anchor round 5", data)
    assert isinstance(error, ChainRejectedError)
    assert error.message == "anchor round 5: WrongRound(expected=2, actual=5)"
    assert error.hint
    assert failures.describe_revert(data[:20])[0] == "WrongRound"  # cut short: the name at least


def test_every_artifact_loads() -> None:
    for name in artifacts.NAMES:
        artifact = artifacts.get_artifact(name)
        assert bytes.fromhex(artifact.bytecode[2:])
        assert any(item["type"] == "function" for item in artifact.abi)


def test_committees_expire_while_their_stake_can_still_be_slashed() -> None:
    for preset in PRESETS.values():
        params = preset.chain
        lifetime = compute_committee_lifetime_seconds(params)
        assert params.epoch_seconds <= lifetime  # no gap between two epochs
        assert lifetime + params.challenge_window_seconds + params.finality_seconds <= params.cooldown_seconds


def test_a_url_that_is_none_is_refused() -> None:
    with pytest.raises(SpecError):
        EvmChain("localhost:8545", BOOK)


def test_forge_vectors_are_what_primitives_make() -> None:
    script = ROOT / "contracts" / "test" / "vectors" / "make_vectors.py"
    done = subprocess.run(
        [sys.executable, str(script), "--check"], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, timeout=60
    )
    assert done.returncode == 0
