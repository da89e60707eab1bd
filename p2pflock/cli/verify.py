"""`p2pflock verify`: five verdicts on a checkpoint; exits with 40 when any of them is FAIL.

Law: this command chooses sources and prints; the verdicts are protocol/provenance.py's.  A chain that was asked for
must answer; the one that a home remembers may be gone, and then lineage is NOT CHECKED and says so.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from p2pflock.cli.options import Format, FormatOption, HomeOption
from p2pflock.cli.output import Output
from p2pflock.errors import InvalidMessageError, UserError, VerificationError


def verify(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint id (b…) or a FILE.car.", metavar="CID|FILE.car")],
    home: HomeOption,
    rpc: Annotated[str, typer.Option("--rpc", help="Chain to compare with. Default: the one of this home.")] = "",
    address_book: Annotated[Path | None, typer.Option("--address-book", help="Its contract addresses.")] = None,
    committee: Annotated[Path | None, typer.Option("--committee", help="Committee to trust without a chain.")] = None,
    recompute: Annotated[bool, typer.Option("--recompute/--no-recompute", help="Run the fold again.")] = True,
    trust_module: Annotated[
        list[str] | None, typer.Option("--trust-module", help="Module outside p2pflock that the task may import.")
    ] = None,
    export: Annotated[
        Path | None, typer.Option("--export", help="Also write what verify needs to this CAR file, unless a verdict is FAIL.")
    ] = None,
    form: FormatOption = Format.TEXT,
) -> None:
    """Verify a checkpoint: integrity, authorship, lineage, participation, recomputed."""
    from p2pflock.node import assembly, verification
    from p2pflock.params import LOCAL
    from p2pflock.primitives.cid import CID

    output = Output(form)
    if rpc and committee is not None:
        raise UserError("--rpc and --committee name two roots of trust", "pass one of them")
    is_asked = bool(rpc)
    if checkpoint.endswith(".car"):
        cid, source = verification.open_car(Path(checkpoint))
    else:
        try:
            cid = CID.parse(checkpoint)
        except InvalidMessageError as error:
            raise UserError(f"{checkpoint} is neither a checkpoint id nor a .car file", "give one of them") from error
        facts = assembly.read_run_file(home)
        source = verification.open_home(home)
        if not rpc and committee is None:
            rpc = facts["rpc"]
            address_book = Path(facts["address_book"]) if facts["address_book"] else None
            configured = Path(facts["committee"]) if facts["committee"] else home / assembly.COMMITTEE_FILE
            committee = configured if facts["committee"] or (not rpc and configured.exists()) else None
    chain = assembly.open_chain(rpc, address_book, LOCAL) if rpc else None
    report = verification.verify(
        cid,
        source,
        chain=chain,
        is_chain_required=is_asked,
        committee_file=committee,
        recompute=recompute,
        trusted_modules=tuple(trust_module or ()),
        progress=_tell if sys.stderr.isatty() and not output.is_json else lambda _: None,
    )
    found = verification.describe(report)
    head = report.record
    output.document(
        {
            "checkpoint": str(cid),
            "round": head.round if head else None,
            "model_hash": head.model_hash.hex() if head else None,
            "verdicts": found,
        }
    )
    output.table(
        f"checkpoint {cid}",
        ("question", "verdict", "reason"),
        [(name, entry["verdict"], entry["reason"]) for name, entry in found.items()],
    )
    if report.failed:
        raise VerificationError(
            f"checkpoint {str(cid)[:16]}… FAILs: {', '.join(report.failed)}", "do not use it; the reasons are above"
        )
    if export is not None:
        count = verification.export_car(source, cid, export)
        output.line(f"{export}: {count} blocks")


def _tell(text: str) -> None:
    sys.stderr.write(f"\r\x1b[K{text}\r")
    sys.stderr.flush()
