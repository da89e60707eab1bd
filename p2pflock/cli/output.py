"""How commands speak: tables and a progress line for people, one JSON document for programs.

Law: stdout carries the result and nothing else, stderr carries progress and errors.  With `--format json`
stdout is exactly one JSON document, and progress is one JSON object per line on stderr.  Bytes are printed as
0x-hex, amounts as decimal strings (they exceed what JSON numbers hold).  No secret is ever passed in here.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p2pflock.cli.options import Format
from p2pflock.errors import FlockError

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_WIDTH = 132  # columns of a table in a file or pipe
SAFE_INTEGER = 1 << 53  # beyond it, readers that parse numbers as doubles lose digits
STYLES = {"PASS": "green", "PASSED": "green", "FAIL": "bold red", "PROBLEM": "bold red", "WARNING": "yellow",
          "NOT CHECKED": "dim"}  # fmt: skip


def to_json(value: object) -> Any:
    """Plain JSON value of a result: bytes as 0x-hex, large integers as strings, paths and ids as text."""
    if value is None or isinstance(value, (bool, float, str)):
        return value
    if isinstance(value, int):
        return value if -SAFE_INTEGER <= value <= SAFE_INTEGER else str(value)
    if isinstance(value, (bytes, bytearray)):
        return "0x" + value.hex()
    if isinstance(value, Mapping):
        return {_key(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((to_json(item) for item in value), key=str)
    return str(value)


def _key(key: object) -> str:
    return "0x" + key.hex() if isinstance(key, bytes) else str(key)


def format_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """75 -> '1 min 15 s'."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3_600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3_600} h {whole % 3_600 // 60:02d} min"


def format_flock(wei: int) -> str:
    """Amount in FLOCK, rounded down to six places: nobody is shown more than there is."""
    micro = wei // 10**12
    return f"{micro // 1_000_000:,}.{micro % 1_000_000:06d}".rstrip("0").rstrip(".")


def format_address(address: bytes) -> str:
    """20 bytes -> mixed-case checksum form (ERC-55): a mistyped digit shows."""
    from p2pflock.primitives.keccak import keccak256

    digits = address.hex()
    nibbles = keccak256(digits.encode()).hex()
    return "0x" + "".join(c.upper() if int(n, 16) >= 8 else c for c, n in zip(digits, nibbles, strict=False))


def short_hash(value: bytes, digits: int = 12) -> str:
    """First digits of a hash, for a table."""
    return value.hex()[:digits]


class Output:
    """What a command prints with.  Text methods do nothing in JSON mode, so a command is written once."""

    def __init__(self, form: Format) -> None:
        self.form = form
        self._console: Console | None = None

    @property
    def is_json(self) -> bool:
        return self.form is Format.JSON

    @property
    def console(self) -> Console:
        """Rich console on stdout; made late because Rich is slow to import."""
        if self._console is None:
            from rich.console import Console

            is_terminal = sys.stdout.isatty()
            width = None if is_terminal else PLAIN_WIDTH
            self._console = Console(highlight=False, soft_wrap=not is_terminal, width=width)
        return self._console

    def document(self, value: Mapping[str, object]) -> None:
        """The command's result, in JSON mode."""
        if self.is_json:
            sys.stdout.write(json.dumps(to_json(value), ensure_ascii=False, indent=2) + "\n")
            sys.stdout.flush()

    def line(self, text: str = "") -> None:
        """One line of the result, verbatim, in text mode."""
        if not self.is_json:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()

    def pairs(self, title: str, rows: Iterable[tuple[str, str]]) -> None:
        """Name and value, one below the other; values are never cut, they are meant to be copied."""
        if self.is_json:
            return
        kept = list(rows)
        width = max((len(name) for name, _ in kept), default=0)
        if title:
            self.console.print(title, style="bold", markup=False)
        for name, value in kept:
            self.console.print(f"  {name:<{width}}  {value}", markup=False, soft_wrap=True)

    def table(
        self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()
    ) -> None:
        """A table; verdicts (PASS, FAIL …) are coloured, columns named in `right` are right-aligned."""
        if self.is_json:
            return
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
        for column in columns:
            table.add_column(column, justify="right" if column in right else "left", overflow="fold")
        for row in rows:
            # Text, not str: a peer's name must not be read as Rich markup.
            table.add_row(*(Text(str(cell), style=STYLES.get(str(cell), "")) for cell in row))
        self.console.print(table)


@dataclass(frozen=True, slots=True)
class Progress:
    """What the progress line shows after a round."""

    round: int
    rounds: int  # 0: no end
    loss: float
    peers: int
    accuracy: float | None = None  # in [0, 1]
    eta_seconds: float | None = None

    def text(self) -> str:
        of = f"/{self.rounds}" if self.rounds else ""
        parts = [f"round {self.round}{of}", f"loss {self.loss:.4f}"]
        if self.accuracy is not None:
            parts.append(f"accuracy {self.accuracy:.2%}")
        parts.append(f"{self.peers} peer{'' if self.peers == 1 else 's'}")
        if self.eta_seconds is not None:
            parts.append(f"ETA {format_seconds(self.eta_seconds)}")
        return "  ·  ".join(parts)


class ProgressLine:
    """One line on stderr that is rewritten in place on a terminal, appended elsewhere, JSON when asked.

    The caller passes the time in: `update(..., now=clock.monotonic_seconds())`.
    """

    WINDOW = 5  # rounds the ETA looks back on

    def __init__(self, form: Format, rounds: int, *, started: float) -> None:
        self._form = form
        self._rounds = rounds
        self._marks: deque[tuple[int, float]] = deque([(0, started)], maxlen=self.WINDOW + 1)
        self._is_live = form is Format.TEXT and sys.stderr.isatty()
        self._width = 0

    def update(
        self, round_: int, *, loss: float, peers: int, now: float, accuracy: float | None = None
    ) -> Progress:
        """Show the state after `round_`; returns what was shown."""
        first_round, first_time = self._marks[0]
        if round_ > self._marks[-1][0]:
            self._marks.append((round_, now))
        eta = None
        if self._rounds and round_ > first_round:
            eta = (now - first_time) / (round_ - first_round) * max(0, self._rounds - round_)
        progress = Progress(round_, self._rounds, loss, peers, accuracy, eta)
        if self._form is Format.JSON:
            fields = {name: getattr(progress, name) for name in progress.__dataclass_fields__}
            sys.stderr.write(json.dumps({"progress": fields}) + "\n")
        elif self._is_live:
            text = progress.text()
            sys.stderr.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            sys.stderr.write(progress.text() + "\n")
        sys.stderr.flush()
        return progress

    def note(self, text: str) -> None:
        """A line of its own above the progress line: a peer left, an anchor was made."""
        if self._form is Format.JSON:
            sys.stderr.write(json.dumps({"note": text}) + "\n")
        else:
            sys.stderr.write(("\r" + text.ljust(self._width) if self._is_live else text) + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        """End the line, so that what follows starts on a new one."""
        if self._is_live and self._width:
            sys.stderr.write("\n")
            sys.stderr.flush()
            self._width = 0


def print_error(message: str, hint: str, *, exit_code: int, kind: str, form: Format, log: Path | None = None) -> None:
    """`error:` and `fix:` lines on stderr, or one JSON object there."""
    message, hint = " ".join(message.split()), " ".join(hint.split())
    if form is Format.JSON:
        fields: dict[str, object] = {"kind": kind, "message": message, "fix": hint, "exit_code": exit_code}
        if log is not None:
            fields["log"] = str(log)
        sys.stderr.write(json.dumps({"error": fields}, ensure_ascii=False) + "\n")
    else:
        sys.stderr.write(f"error: {message}\n")
        if hint:
            sys.stderr.write(f"fix: {hint}\n")
    sys.stderr.flush()


def print_flock_error(error: FlockError, form: Format) -> None:
    """One line that says what happened, one that says how to fix it."""
    hint = error.hint or f"see code {error.exit_code} in docs/exit-codes.md"
    print_error(error.message, hint, exit_code=error.exit_code, kind=type(error).__name__, form=form)
