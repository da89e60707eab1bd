"""`p2pflock cid FILE`: the content id a file has in p2pflock and in IPFS.

Law: nothing is stored and nothing is sent; the file is read once, in chunks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from p2pflock.cli.options import Format, FormatOption
from p2pflock.cli.output import Output
from p2pflock.errors import UserError


def cid(
    file: Annotated[Path, typer.Argument(help="A file, or - for standard input.", show_default=False)],
    form: FormatOption = Format.TEXT,
) -> None:
    """Print the content id of a file: what `ipfs add --cid-version=1 --raw-leaves` would print."""
    from p2pflock.primitives import unixfs

    output = Output(form)
    size = 0

    def chunks(stream: BinaryIO) -> Iterator[bytes]:
        nonlocal size
        while chunk := stream.read(unixfs.CHUNK_BYTES):
            size += len(chunk)
            yield chunk

    try:
        if str(file) == "-":
            root = unixfs.build(chunks(sys.stdin.buffer), lambda _cid, _block: None)
        else:
            with file.open("rb") as stream:
                root = unixfs.build(chunks(stream), lambda _cid, _block: None)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}", "give the path of a readable file") from error
    output.document({"cid": str(root), "bytes": size, "file": str(file)})
    output.line(str(root))
