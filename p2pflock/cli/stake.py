"""`p2pflock stake` and `p2pflock launch`: what a peer does on a chain before its first round.

Law: amounts are decimal FLOCK, turned into integer wei without rounding; both commands say what they spent.
"""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated

import typer

from p2pflock.cli.options import (
    Format,
    FormatOption,
    HomeOption,
    PasswordFileOption,
    ask_password,
    keystore_path,
)
from p2pflock.cli.output import Output, format_address, format_flock
from p2pflock.cli.run import TaskOption, read_task
from p2pflock.errors import UserError

RpcOption = Annotated[str, typer.Option("--rpc", help="RPC endpoint of the chain.")]
BookOption = Annotated[Path, typer.Option("--address-book", help="Contract addresses on that chain (JSON).")]


def parse_flock(text: str) -> int:
    """Decimal FLOCK as wei.  Raises UserError for anything that is no positive multiple of 1e-18 below 1e9."""
    try:
        wei = Decimal(text) * 10**18
    except InvalidOperation:
        wei = Decimal(0)
    if not 0 < wei <= 10**27 or wei != int(wei):
        raise UserError(f"{text!r} is no amount of FLOCK", "give a number like 100 or 0.5")
    return int(wei)


def stake(
    amount: Annotated[str, typer.Argument(help="FLOCK to stake, on top of what is staked.", metavar="AMOUNT")],
    rpc: RpcOption,
    address_book: BookOption,
    home: HomeOption,
    password_file: PasswordFileOption = None,
    form: FormatOption = Format.TEXT,
) -> None:
    """Register this peer on chain, with proof of possession of its BLS key, and stake for a seat."""
    from p2pflock.node.assembly import open_chain
    from p2pflock.params import LOCAL
    from p2pflock.storage import keystore

    amount_wei = parse_flock(amount)
    signer = keystore.unlock(keystore_path(home), ask_password(password_file))
    chain = open_chain(rpc, address_book, LOCAL)
    chain.register(signer)
    chain.stake(signer, amount_wei)
    balance_wei = chain.balance(signer.address)
    output = Output(form)
    output.document({"address": signer.address, "staked_wei": str(amount_wei), "balance_wei": str(balance_wei)})
    output.pairs(
        "staked",
        [
            ("account", format_address(signer.address)),
            ("amount", f"{format_flock(amount_wei)} FLOCK"),
            ("balance left", f"{format_flock(balance_wei)} FLOCK"),
        ],
    )


def launch(
    task: TaskOption,
    reward: Annotated[str, typer.Option("--reward", help="FLOCK to put in escrow for all rounds.")],
    rpc: RpcOption,
    address_book: BookOption,
    home: HomeOption,
    password_file: PasswordFileOption = None,
    form: FormatOption = Format.TEXT,
) -> None:
    """Put a task on chain with its reward in escrow, and open its first epoch: peers that staked get seats."""
    from p2pflock.node.assembly import EPOCH, open_chain
    from p2pflock.params import LOCAL
    from p2pflock.storage import keystore

    spec = read_task(task)
    reward_wei = parse_flock(reward)
    signer = keystore.unlock(keystore_path(home), ask_password(password_file))
    chain = open_chain(rpc, address_book, LOCAL)
    chain.create_task(signer, spec.task_id, spec.task.rounds, reward_wei)
    chain.open_epoch(signer, spec.task_id, EPOCH)
    seats = len(chain.committee(spec.task_id, EPOCH))
    output = Output(form)
    output.document(
        {"task": spec.task_id, "rounds": spec.task.rounds, "reward_wei": str(reward_wei), "seats": seats}
    )
    output.pairs(
        "task launched",
        [
            ("task", spec.task_id.hex()),
            ("rounds", str(spec.task.rounds)),
            ("reward", f"{format_flock(reward_wei)} FLOCK in escrow"),
            ("committee", f"{seats} seats"),
        ],
    )
