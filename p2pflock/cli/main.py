"""The `p2pflock` command: registration of the commands, and the one place where errors become exit codes.

Law: a command raises, this file prints.  A FlockError becomes an `error:` and a `fix:` line and the exit code of
its class (docs/exit-codes.md); anything else is a bug, and becomes one line and a log file with the traceback.
Command modules import torch, libp2p and web3 inside their functions: `p2pflock --help` stays instant.
"""

from __future__ import annotations

import datetime as dt
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from p2pflock import __version__
from p2pflock.cli.cid import cid
from p2pflock.cli.claim import claim
from p2pflock.cli.doctor import doctor
from p2pflock.cli.init import init
from p2pflock.cli.options import Format, default_home
from p2pflock.cli.output import print_error, print_flock_error
from p2pflock.cli.run import run as run_command
from p2pflock.cli.stake import launch, stake
from p2pflock.cli.status import status
from p2pflock.cli.up import up
from p2pflock.cli.verify import verify
from p2pflock.errors import DiskFullError, FlockError, UserError

# In the order of `p2pflock --help`.  A new command is an import above and a line here.
COMMANDS: tuple[Callable[..., None], ...] = (
    init,
    doctor,
    up,
    run_command,
    stake,
    launch,
    status,
    verify,
    claim,
    cid,
)

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
UNEXPECTED = 1
_NO_SPACE = {28, 122}  # ENOSPC, EDQUOT

app = typer.Typer(
    name="p2pflock",
    help="Train models in a peer-to-peer swarm, with provenance anyone can check.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"p2pflock {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train models in a peer-to-peer swarm, with provenance anyone can check."""


for _command in COMMANDS:
    app.command(name=_command.__name__)(_command)

# Typer carries its own copy of click, older releases used click itself; this reaches either.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The single exceptions of a (nested) exception group, which is how trio reports failures of nurseries."""
    inner = getattr(error, "exceptions", None)
    if isinstance(inner, tuple):
        for item in inner:
            yield from leaves(item)
    else:
        yield error


def report(error: BaseException, form: Format, logs: Path) -> int:
    """Print an error that ended a command; returns the exit code.  A traceback goes to a file in `logs`."""
    parts = list(leaves(error))
    if any(isinstance(part, (KeyboardInterrupt, typer.Abort)) for part in parts):
        print_error("interrupted", "", exit_code=INTERRUPTED, kind="KeyboardInterrupt", form=form)
        return INTERRUPTED
    for part in parts:
        if isinstance(part, SystemExit) and isinstance(part.code, int):
            return part.code
    # A bug beside an expected error must not be hidden by it.
    foreign = [part for part in parts if not isinstance(part, FlockError) and _translate(part) is None]
    if not foreign:
        known = [part if isinstance(part, FlockError) else _translate(part) for part in parts]
        worst = max((part for part in known if part is not None), key=lambda part: part.exit_code)
        print_flock_error(worst, form)
        return worst.exit_code
    log = _write_log(error, logs)
    first = foreign[0]
    print_error(
        f"unexpected {type(first).__name__}: {first}"[:300],
        f"this is a bug in p2pflock; please report it with {log}",
        exit_code=UNEXPECTED,
        kind=type(first).__name__,
        form=form,
        log=log,
    )
    return UNEXPECTED


def _translate(error: BaseException) -> FlockError | None:
    """Our error for a foreign one that needs no traceback."""
    if isinstance(error, _UsageError):
        message = str(getattr(error, "format_message", lambda: error)())
        context = getattr(error, "ctx", None)
        path = getattr(context, "command_path", "p2pflock")
        return UserError(message.rstrip("."), f"see {path} --help")
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return DiskFullError(
            f"no space left on the device{f': {error.filename}' if error.filename else ''}",
            "free some space, or choose another --home",
        )
    return None


def _write_log(error: BaseException, logs: Path) -> Path:
    """The traceback, in the peer's log directory, or the temporary one where that cannot be written."""
    stamp = dt.datetime.now(dt.timezone.utc).strftime("%Y%m%dT%H%M%S")
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    for directory in (logs, Path(tempfile.gettempdir())):
        path = directory / f"p2pflock-{stamp}-{os.getpid()}.log"
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.write_text(f"p2pflock {__version__}, Python {sys.version}\n{text}", encoding="utf-8")
        except OSError:
            continue
        return path
    sys.stderr.write(text)
    return Path(os.devnull)


def _asked(arguments: Sequence[str], option: str) -> str | None:
    """An option's value as given, known even when parsing failed."""
    for here, after in zip(arguments, (*arguments[1:], ""), strict=False):
        if here == option:
            return after
        if here.startswith(option + "="):
            return here.removeprefix(option + "=")
    return None


def main(arguments: Sequence[str]) -> int:
    """Run one command; returns its exit code and never raises."""
    form = Format.JSON if _asked(arguments, "--format") == "json" else Format.TEXT
    logs = Path(_asked(arguments, "--home") or default_home()) / "logs"
    try:
        result = app(args=list(arguments), prog_name="p2pflock", standalone_mode=False)
    except BaseException as error:  # noqa: BLE001 - the outermost frame: everything ends in an exit code
        if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):
            return 0  # `p2pflock status | head`: the reader has what it wanted
        return report(error, form, logs)
    return result if isinstance(result, int) else 0


def run() -> NoReturn:
    """Entry point of the console script."""
    sys.exit(main(sys.argv[1:]))
