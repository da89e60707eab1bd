"""Claims what a peer has earned: the newest anchored round whose challenge window is over.

Law: the amount and the proof come from the attested record, the contract checks both; claiming twice pays
once, because amounts are cumulative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from p2pflock.errors import ChainRejectedError, UserError
from p2pflock.node.assembly import open_chain, read_run_file
from p2pflock.node.ledger import Ledger
from p2pflock.params import LOCAL, NetworkParams
from p2pflock.ports import Chain, Signer
from p2pflock.primitives import merkle
from p2pflock.protocol.messages import Reward, RoundRecord
from p2pflock.protocol.settlement import Tables
from p2pflock.storage.blocks import DiskStore
from p2pflock.storage.journal import VoteJournal


@dataclass(frozen=True, slots=True)
class Claimed:
    """amount_wei is what this claim paid; 0 with an empty transaction when nothing was due."""

    round: int
    amount_wei: int
    transaction: str
    balance_wei: int


def build_proof(task: bytes, rewards: Sequence[Reward], address: bytes) -> tuple[int, list[bytes]]:
    """Cumulative amount and Merkle path of an account; (0, []) when it earned nothing.

    Args:
        rewards: the whole table of the round that is claimed against (settlement.Tables)."""
    mine = next((r for r in rewards if r.address == address), None)
    if mine is None:
        return 0, []
    leaves = [merkle.leaf_hash(task, r.address, r.cumulative_wei) for r in rewards]
    return mine.cumulative_wei, merkle.proof(leaves, list(rewards).index(mine))


def claim(chain: Chain, signer: Signer, records: list[RoundRecord]) -> Claimed:
    """`records`: all of them, oldest first.  Raises ChainRejectedError for any refusal but an open challenge window."""
    task = records[0].task
    before = chain.claimed(task, signer.address)
    refused: ChainRejectedError | None = None
    tables = list(accumulate(records, Tables.after, initial=Tables()))[1:]
    for record, table in zip(reversed(records), reversed(tables), strict=True):
        if record.round == 0 or chain.anchored(task, record.round) is None:
            continue
        cumulative, proof = build_proof(task, table.rewards, signer.address)
        if cumulative <= before:
            break
        try:
            transaction = chain.claim(signer, task, record.round, cumulative, proof)
        except ChainRejectedError as error:
            if "ChallengeWindowOpen" not in str(error):
                raise
            refused = error
            continue
        return Claimed(
            record.round, cumulative - before, "0x" + transaction.hex(), chain.balance(signer.address)
        )
    if refused is not None:
        raise ChainRejectedError(
            "the challenge window of every unclaimed round is still open", "claim again later"
        ) from refused
    return Claimed(0, 0, "", chain.balance(signer.address))


def claim_home(home: Path, signer: Signer, network: NetworkParams = LOCAL) -> Claimed:
    """Claim for the peer of this home.  Raises UserError without a chain, NetworkError."""
    facts = read_run_file(home)
    if not facts["rpc"]:
        raise UserError("this peer ran without a chain: there is nothing to claim", "run it with --rpc URL")
    chain = open_chain(facts["rpc"], Path(facts["address_book"]), network)
    store = DiskStore.open_readonly(home / "blocks")
    index = VoteJournal.read(home / f"ledger-{facts['task'][:16]}.journal")
    records = [RoundRecord.decode(store.get(cid)) for cid, _ in Ledger.read_index(index)]
    if not records:
        raise UserError("no round was decided yet", "wait for the first one")
    return claim(chain, signer, records)


