"""docs/benchmarks/README.md says what the JSON files beside it say, and shows what missed its target."""

from __future__ import annotations

import json

import pytest

from benchmarks import table


def test_the_document_has_the_figures_of_the_files() -> None:
    document = (table.DOCS / "README.md").read_text(encoding="utf-8")
    assert table.insert(document, table.build(table.DOCS)) == document, "run make bench-table"


def test_a_missed_target_is_shown(tmp_path) -> None:
    rows = [
        {"what": "speed", "measured": 3.14159, "relation": ">=", "target": 5, "met": False},
        {"what": "size", "measured": 2, "relation": "<=", "target": 3.0, "met": True},
    ]
    (tmp_path / "some.json").write_text(json.dumps({"targets": rows}))
    assert table.build(tmp_path).splitlines()[2:] == [
        "| some | speed | 3.142 | >= 5 | **missed** |",
        "| some | size | 2 | <= 3 | met |",
    ]


def test_only_what_is_between_the_marks_changes() -> None:
    document = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    assert table.insert(document, "new") == f"before\n{table.BEGIN}\nnew\n{table.END}\nafter\n"
    with pytest.raises(AssertionError):
        table.insert("no marks", "new")
