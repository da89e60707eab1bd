"""A quorum as one signature: who may be in it, and what it is for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from p2pflock.errors import InvalidMessageError, LocalProtocolError
from p2pflock.protocol.attestation import build_attestation, verify_attestation
from p2pflock.protocol.committee import Committee
from p2pflock.protocol.messages import Attestation

HEAD = bytes(range(32))


@pytest.fixture(scope="module")
def attestation(swarm) -> Attestation:
    return build_attestation(swarm.committee, swarm.record().cid(), 0, [swarm.vote(s) for s in (3, 2)])


def test_round_trip(swarm, attestation) -> None:
    assert attestation.seats() == {2, 3}  # 70 of 100
    decoded = Attestation.decode(attestation.encode())
    verify_attestation(swarm.committee, decoded, swarm.record(), HEAD)


def test_only_a_quorum_of_the_same_precommits_is_built(swarm) -> None:
    cid = swarm.record().cid()
    for votes in (
        [],
        [swarm.vote(0), swarm.vote(3)],  # 50 of 100
        [swarm.vote(2), swarm.vote(3, step=0)],
        [swarm.vote(2), swarm.vote(3, view=1)],
        [swarm.vote(2), swarm.vote(3, record_digest=b"x" * 32)],
        [swarm.vote(2), swarm.vote(3, rewards_root=b"x" * 32)],
        [swarm.vote(2), replace(swarm.vote(3), validator=b"\0" * 38)],
    ):
        with pytest.raises(LocalProtocolError):
            build_attestation(swarm.committee, cid, 0, votes)


def test_every_forgery_is_refused(swarm, attestation) -> None:
    committee, record = swarm.committee, swarm.record()
    swapped = (*committee.seats[:2], committee.seats[3], committee.seats[2])
    votes = [swarm.vote(s) for s in (2, 3)]
    for reason, args in {
        "another record": (committee, attestation, swarm.record(1), HEAD),
        "another committee": (
            Committee(committee.task, 1, 84532, b"a" * 20, swapped, 1000), attestation, record, HEAD
        ),
        "aggregate": (committee, attestation, record, b"h" * 32),
        "no quorum": (committee, replace(attestation, signers=b"\x03"), record, HEAD),
        "no quorum ": (committee, replace(attestation, signers=b""), record, HEAD),
        "does not exist": (committee, replace(attestation, signers=b"\x1c"), record, HEAD),
        "shortest form": (committee, replace(attestation, signers=b"\x0c\x00"), record, HEAD),
        "aggregate ": (committee, replace(attestation, signers=b"\x0e"), record, HEAD),
        "aggregate  ": (committee, replace(attestation, view=1), record, HEAD),
        "aggregate   ": (committee, replace(attestation, signature=votes[0].signature), record, HEAD),
        "aggregate    ": (committee, replace(attestation, signature=b"\xc0" + bytes(95)), record, HEAD),
    }.items():
        with pytest.raises(InvalidMessageError, match=reason.strip()):
            verify_attestation(*args)
