"""Options that several commands share.

Law: a key or a password is never an argument, because arguments show up in process lists and shell histories.
"""

from __future__ import annotations

import enum
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

HOME_VARIABLE = "P2PFLOCK_HOME"
PASSWORD_VARIABLE = "P2PFLOCK_PASSWORD"  # noqa: S105 - the name of a variable, not a password
PASSWORD_FILE_VARIABLE = "P2PFLOCK_PASSWORD_FILE"  # noqa: S105 - same


class Format(str, enum.Enum):
    """How a command prints its result."""

    TEXT = "text"
    JSON = "json"


def default_home() -> Path:
    """Where a peer keeps its keystore, blocks and logs unless told otherwise."""
    return Path(os.environ.get(HOME_VARIABLE) or Path.home() / ".p2pflock")


FormatOption = Annotated[
    Format, typer.Option("--format", help="text for people; json: one document on stdout, for programs")
]
HomeOption = Annotated[
    Path,
    typer.Option(
        "--home",
        envvar=HOME_VARIABLE,
        default_factory=default_home,
        show_default="~/.p2pflock",
        help="Directory of this peer: keystore, blocks, logs.",
        file_okay=False,
    ),
]
PasswordFileOption = Annotated[
    Path | None,
    typer.Option(
        "--password-file",
        envvar=PASSWORD_FILE_VARIABLE,
        help=f"File whose first line is the keystore password. Otherwise ${PASSWORD_VARIABLE}, or a prompt.",
        dir_okay=False,
    ),
]


def keystore_path(home: Path) -> Path:
    """The keystore directory of a peer's home."""
    return home / "keystore"


def ask_password(password_file: Path | None, *, confirm: bool = False) -> str:
    """The keystore password from a file, the environment or, on a terminal, a prompt.

    Args:
        password_file: read its first line, when given.
        confirm: ask twice at a prompt, for a password that is being chosen.

    Raises:
        PasswordError: there is none, or the two entries differ.
        KeystoreError: the file cannot be read, or can be read by others.
    """
    import getpass

    from p2pflock.storage import keystore

    prompt = getpass.getpass if sys.stdin is not None and sys.stdin.isatty() else None
    return keystore.read_password(
        environ=os.environ, password_file=password_file, prompt=prompt, confirm=confirm
    )
