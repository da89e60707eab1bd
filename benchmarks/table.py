"""The table of results in docs/benchmarks/README.md, written from the JSON files beside it.

Law: no figure in that document is typed by hand.  What stands between the two marks is exactly what the JSON files
say; a target that was missed is in the table like any other.  tests/unit/test_benchmark_table.py holds it to that.

    python benchmarks/table.py [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs/benchmarks"
BEGIN, END = "<!-- begin: make bench-table -->", "<!-- end -->"


def build(folder: Path) -> str:
    """Markdown: one row per target of every JSON file in `folder`, files by name."""
    rows = ["| benchmark | what | measured | target | |", "|---|---|---|---|---|"]
    for path in sorted(folder.glob("*.json")):
        body = json.loads(path.read_text(encoding="utf-8"))
        for target in _list(body.get("targets", [])):
            verdict = "met" if target["met"] else "**missed**"
            rows.append(
                f"| {path.stem} | {target['what']} | {target['measured']:.4g} "
                f"| {target['relation']} {target['target']:g} | {verdict} |"
            )
    return "\n".join(rows)


def _list(targets: Any) -> list[dict[str, Any]]:
    """The rows of report.py; codec.json has them by name."""
    if isinstance(targets, list):
        return targets
    return [
        {
            "what": what,
            "measured": row["value"],
            "relation": ">=" if row["is_least"] else "<=",
            "target": row["target"],
            "met": row["is_met"],
        }
        for what, row in targets.items()
    ]


def insert(document: str, table: str) -> str:
    """The document with `table` between the marks."""
    before, _, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"the document has no {BEGIN} ... {END}"
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/table.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if the document is not up to date")
    options = parser.parse_args(arguments)
    path = DOCS / "README.md"
    document = path.read_text(encoding="utf-8")
    wanted = insert(document, build(DOCS))
    if options.check:
        print("up to date" if wanted == document else f"{path.name}: run make bench-table")
        return int(wanted != document)
    path.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
