"""Digests against vectors that eth-abi and pycryptodome made (tests/vectors/generate.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from p2pflock.errors import InvalidMessageError
from p2pflock.primitives import bls, signing
from p2pflock.primitives.keccak import keccak256

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "signing.json").read_text())


def raw(text: str) -> bytes:
    return bytes.fromhex(text[2:])


def number(text: str) -> int:
    return int(text, 16)


def vote_arguments(vote):
    return {
        "chain_id": number(vote["chainId"]),
        "anchor": raw(vote["anchor"]),
        "task": raw(vote["task"]),
        "epoch": number(vote["epoch"]),
        "round_": number(vote["round"]),
        "view": number(vote["view"]),
        "step": number(vote["step"]),
        "record_digest": raw(vote["recordDigest"]),
        "rewards_root": raw(vote["rewardsRoot"]),
        "previous_head": raw(vote["previousHead"]),
    }


def test_keccak_is_not_sha3():
    assert keccak256(b"").hex() == "c5d2460186f7233c927e7db2dcc703c0e500b653ca82273b7bfad8045d85a470"


def test_typehashes():
    assert raw(VECTORS["voteTypehash"]) == signing.VOTE_TYPEHASH
    assert raw(VECTORS["headTypehash"]) == signing.HEAD_TYPEHASH
    assert raw(VECTORS["possessionTypehash"]) == signing.POSSESSION_TYPEHASH


@pytest.mark.parametrize("vote", VECTORS["votes"])
def test_vote_digest(vote):
    assert signing.compute_vote_digest(**vote_arguments(vote)) == raw(vote["digest"])


def test_every_field_of_a_vote_counts():
    arguments = vote_arguments(VECTORS["votes"][0])
    digests = {signing.compute_vote_digest(**arguments)}
    for name, value in arguments.items():
        other = value + 1 if isinstance(value, int) else bytes((value[0] ^ 1,)) + value[1:]
        digests.add(signing.compute_vote_digest(**{**arguments, name: other}))
    assert len(digests) == 1 + len(arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("chain_id", 1 << 256),
        ("chain_id", -1),
        ("anchor", bytes(32)),
        ("task", bytes(31)),
        ("epoch", 1 << 64),
        ("round_", -1),
        ("view", 1 << 64),
        ("step", 256),
        ("step", True),
        ("round_", 1.0),
        ("record_digest", b""),
        ("rewards_root", bytes(33)),
        ("previous_head", bytes(20)),
    ],
)
def test_values_outside_their_solidity_type(name, value):
    with pytest.raises(InvalidMessageError):
        signing.compute_vote_digest(**{**vote_arguments(VECTORS["votes"][0]), name: value})


def test_heads_chain_from_the_task():
    head = raw(VECTORS["heads"][0]["task"])
    for step in VECTORS["heads"]:
        assert raw(step["previousHead"]) == head
        head = signing.compute_head(
            task=raw(step["task"]),
            round_=number(step["round"]),
            record_digest=raw(step["recordDigest"]),
            rewards_root=raw(step["rewardsRoot"]),
            previous_head=head,
        )
        assert head == raw(step["head"])


@pytest.mark.parametrize("case", VECTORS["possessions"])
def test_possession(case):
    assert keccak256(raw(case["peerId"])) == raw(case["peerIdHash"])
    assert keccak256(bls.g1_to_eip2537(raw(case["publicKey"]))) == raw(case["keyHash"])
    root = signing.compute_possession_root(
        chain_id=number(case["chainId"]),
        registry=raw(case["registry"]),
        operator=raw(case["operator"]),
        peer_id_hash=raw(case["peerIdHash"]),
        bls_public_key=raw(case["publicKey"]),
    )
    assert root == raw(case["root"])
    assert bls.verify_possession(raw(case["publicKey"]), root, raw(case["proof"]))
    assert not bls.verify(raw(case["publicKey"]), root, raw(case["proof"]))  # another domain
    assert bls.g2_to_eip2537(raw(case["proof"])) == raw(case["proofEip2537"])


def test_possession_root_refuses_an_invalid_key():
    with pytest.raises(InvalidMessageError):
        signing.compute_possession_root(
            chain_id=1,
            registry=bytes(20),
            operator=bytes(20),
            peer_id_hash=bytes(32),
            bls_public_key=b"\xc0" + bytes(47),
        )


@pytest.mark.parametrize("case", VECTORS["roots"])
def test_roots(case):
    domain = signing.Domain(case["domain"])
    assert signing.compute_root(domain, raw(case["task"]), raw(case["body"])) == raw(case["root"])


def test_roots_differ_by_domain_task_and_body():
    roots = {
        signing.compute_root(domain, task, body)
        for domain in signing.Domain
        for task in (bytes(32), b"\1" * 32)
        for body in (b"", b"a")
    }
    assert len(roots) == 4 * len(signing.Domain)
    assert {case["domain"] for case in VECTORS["roots"]} == {domain.value for domain in signing.Domain}
    with pytest.raises(InvalidMessageError):
        signing.compute_root(signing.Domain.SCORECARD, b"", b"")
