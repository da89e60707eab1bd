"""A quorum of precommits as one signature: made from votes, checked against a committee.

Law: an attestation holds when the seats in its bitmap weigh more than two thirds and the aggregate verifies
over the vote digest of exactly this record after exactly this head; the anchor contract checks the same.
Aggregation is sound because every key in a committee came with a proof of possession (validate_peer_record,
or the registry contract): nobody can choose a key that cancels the others' out.
"""

from __future__ import annotations

from collections.abc import Iterable

from p2pflock.errors import InvalidMessageError, LocalProtocolError
from p2pflock.primitives import bls
from p2pflock.primitives.cid import CID
from p2pflock.protocol.committee import Committee, compute_vote_root
from p2pflock.protocol.messages import Attestation, RoundRecord, Step, Vote


def build_attestation(committee: Committee, record: CID, view: int, precommits: Iterable[Vote]) -> Attestation:
    """Aggregate verified precommits of one view for one record.

    Raises LocalProtocolError when they are of another view, step or record, or no quorum.
    """
    signatures: dict[int, bytes] = {}
    roots = set()
    for vote in precommits:
        seat = committee.seat_of(vote.validator)
        if seat is None or (vote.view, vote.step, vote.record_digest) != (view, Step.PRECOMMIT, record.digest):
            raise LocalProtocolError("a vote that is no precommit for this record cannot attest it")
        signatures[seat] = vote.signature
        roots.add(vote.rewards_root)
    if len(roots) > 1:
        raise LocalProtocolError("precommits for different rewards sign different digests")
    if not committee.has_quorum(signatures):
        raise LocalProtocolError("precommits of less than a quorum attest nothing")
    return Attestation(
        record=record,
        view=view,
        signers=Attestation.bitmap(frozenset(signatures)),
        signature=bls.aggregate([signatures[seat] for seat in sorted(signatures)]),
    )


def verify_attestation(
    committee: Committee, attestation: Attestation, record: RoundRecord, previous_head: bytes
) -> None:
    """Raises InvalidMessageError with the reason; returns when a quorum of `committee` signed `record`.

    Args:
        previous_head: 32 bytes, chained digest before the record's round.
    """
    if attestation.record != record.cid():
        raise InvalidMessageError("the attestation is for another record")
    if (record.task, record.epoch, record.committee) != (committee.task, committee.epoch, committee.cid()):
        raise InvalidMessageError("the record belongs to another committee")
    if attestation.signers[-1:] == b"\0":
        raise InvalidMessageError("the bitmap is not in its shortest form")
    seats = attestation.seats()
    if any(seat >= len(committee.seats) for seat in seats):
        raise InvalidMessageError("the bitmap names a seat that does not exist")
    if not committee.has_quorum(seats):
        raise InvalidMessageError("the signers are no quorum")
    vote = Vote(
        task=record.task,
        round=record.round,
        view=attestation.view,
        step=int(Step.PRECOMMIT),
        record_digest=record.digest(),
        rewards_root=record.rewards_root,
        validator=b"",  # the digest is the same for every signer
        signature=b"",
    )
    digest = compute_vote_root(committee, vote, previous_head)
    keys = [committee.seats[seat].bls_public_key for seat in sorted(seats)]
    if not bls.fast_aggregate_verify(keys, digest, attestation.signature):
        raise InvalidMessageError("the aggregate signature does not hold")
