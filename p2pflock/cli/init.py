"""`p2pflock init`: the identity of a new peer.

Law: one keystore directory holds the three keys, encrypted under one password; this command makes it and prints
the public halves.  It never overwrites a keystore, because an identity that is lost cannot be made again.
"""

from __future__ import annotations

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
from p2pflock.cli.output import Output, format_address
from p2pflock.errors import KeystoreError


def init(
    home: HomeOption,
    password_file: PasswordFileOption = None,
    fast: Annotated[
        bool, typer.Option("--fast-kdf", help="Weak key stretching: for throw-away test identities only.", hidden=True)
    ] = False,
    form: FormatOption = Format.TEXT,
) -> None:
    """Create this peer's identity: one encrypted keystore with its three keys."""
    from p2pflock.primitives import peerid
    from p2pflock.storage import keystore

    path = keystore_path(home)
    # Before the password is asked for: nobody should choose one in vain.
    if keystore.exists(path):
        raise KeystoreError(f"there is a keystore at {path} already", "use it, or choose another --home")
    password = ask_password(password_file, confirm=True)
    signer = keystore.create(path, password, fast=fast)
    peer = peerid.to_text(signer.peer_id)
    output = Output(form)
    output.document(
        {
            "keystore": str(path),
            "peer": peer,
            "address": format_address(signer.address),
            "bls_public_key": signer.bls_public_key,
        }
    )
    output.pairs(
        "identity created",
        [
            ("keystore", str(path)),
            ("peer id", peer),
            ("address", format_address(signer.address)),
            ("BLS key", "0x" + signer.bls_public_key.hex()),
        ],
    )
    output.line("Back up the keystore directory and the password: nobody can restore them.")
