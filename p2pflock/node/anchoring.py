"""Puts decided rounds on chain, in order, without anybody being in charge.

Law: anyone may submit; to spare gas the members take turns (drawn by the round's beacon) and each waits one
more `STAGGER_SECONDS` than the one before.  With the chain away rounds go on, and the queue is worked off
in order when it is back.  The signature is the attestation we already hold: nothing is signed here but the
transaction.
"""

from __future__ import annotations

import trio

from p2pflock.errors import ChainRejectedError, NetworkError
from p2pflock.node.context import PeerContext
from p2pflock.node.ledger import Decision
from p2pflock.ports import AnchorCall, AnchorReceipt, Chain
from p2pflock.primitives.cid import CID, DAG_CBOR
from p2pflock.protocol.committee import compute_beacon, compute_proposer_order
from p2pflock.protocol.messages import Attestation

STAGGER_SECONDS = 4.0
POLL_SECONDS = 0.3


def build_anchor_call(decision: Decision) -> AnchorCall:
    record, attestation = decision.record, decision.attestation
    assert attestation is not None
    return AnchorCall(
        task=record.task,
        epoch=record.epoch,
        round=record.round,
        view=attestation.view,
        record_digest=decision.cid.digest,
        rewards_root=record.rewards_root,
        signers=int.from_bytes(attestation.signers, "little"),
        signature=attestation.signature,
    )


def read_attestation(chain: Chain, task: bytes, round_: int) -> Attestation | None:
    """The attestation of a round from the chain alone: its anchor carries bitmap and signature."""
    call = chain.anchored_call(task, round_)
    if call is None:
        return None
    return Attestation(
        record=CID(DAG_CBOR, call.record_digest),
        view=call.view,
        signers=call.signers.to_bytes((call.signers.bit_length() + 7) // 8, "little"),
        signature=call.signature,
    )


class Anchoring:
    """Keeps the chain's head up with the ledger's."""

    def __init__(self, context: PeerContext) -> None:
        self._context = context
        self.anchored_round = 0

    async def run(self) -> None:
        """Ends when the last round of the task is on chain."""
        seen = 0.0
        while self.anchored_round < self._context.facts.rounds:
            decision = self._context.ledger.at(self.anchored_round + 1)
            if decision is None:
                seen = self._context.now
                await trio.sleep(POLL_SECONDS)
                continue
            try:
                receipt = await self._anchor(decision, self._context.now - seen)
            except NetworkError as error:
                self._context.events.emit(
                    "anchor_delayed", round=self.anchored_round + 1, reason=error.message
                )
                await trio.sleep(self._context.params.timeouts.anchor_retry_seconds)
                await self._look_again()
                continue
            if receipt is None:
                await trio.sleep(POLL_SECONDS)
                continue
            self.anchored_round += 1
            seen = self._context.now
            self._context.events.emit(
                "anchored",
                round=receipt.round,
                transaction=receipt.transaction.hex(),
                gas_used=receipt.gas_used,
            )

    async def _look_again(self) -> None:
        """After a refusal: a reorganisation may have taken anchors back, which then are to be made again."""
        chain = self._context.chain
        assert chain is not None
        try:
            on_chain = await trio.to_thread.run_sync(chain.task, self._context.facts.task)
        except NetworkError:
            return
        self.anchored_round = min(self.anchored_round, on_chain.last_round)

    async def _anchor(self, decision: Decision, waited: float) -> AnchorReceipt | None:
        """Somebody's receipt, ours if it is our turn, or None while it is another's."""
        chain = self._context.chain
        assert chain is not None
        round_ = decision.record.round
        task = decision.record.task
        receipt = await trio.to_thread.run_sync(chain.anchored, task, round_)
        if receipt is not None or waited < self._turn(decision) * STAGGER_SECONDS:
            return receipt
        call = build_anchor_call(decision)
        try:
            return await trio.to_thread.run_sync(chain.anchor, self._context.signer, call)
        except ChainRejectedError:
            # Two members may submit at once; what counts is whether the round is there.
            receipt = await trio.to_thread.run_sync(chain.anchored, task, round_)
            if receipt is None:
                raise
            return receipt

    def _turn(self, decision: Decision) -> int:
        context = self._context
        beacon = compute_beacon(
            decision.record.task, decision.record.epoch, decision.record.round, decision.cid.digest
        )
        order = compute_proposer_order(context.committee, beacon, 0)
        return order.index(context.seat) if context.seat is not None else len(order)
