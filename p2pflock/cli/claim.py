"""`p2pflock claim`: take out what this peer has earned."""

from __future__ import annotations

from p2pflock.cli.options import (
    Format,
    FormatOption,
    HomeOption,
    PasswordFileOption,
    ask_password,
    keystore_path,
)
from p2pflock.cli.output import Output, format_address, format_flock


def claim(
    home: HomeOption, password_file: PasswordFileOption = None, form: FormatOption = Format.TEXT
) -> None:
    """Claim the rewards of the newest anchored round whose challenge window is over."""
    from p2pflock.node import claiming
    from p2pflock.storage import keystore

    signer = keystore.unlock(keystore_path(home), ask_password(password_file))
    claimed = claiming.claim_home(home, signer)
    output = Output(form)
    output.document(
        {
            "address": signer.address,
            "round": claimed.round,
            "claimed_wei": str(claimed.amount_wei),
            "transaction": claimed.transaction,
            "balance_wei": str(claimed.balance_wei),
        }
    )
    if not claimed.transaction:
        output.line("nothing is due")
        return
    output.pairs(
        "claimed",
        [
            ("account", format_address(signer.address)),
            ("round", str(claimed.round)),
            ("amount", f"{format_flock(claimed.amount_wei)} FLOCK"),
            ("balance", f"{format_flock(claimed.balance_wei)} FLOCK"),
            ("transaction", claimed.transaction),
        ],
    )
