"""The documents say what the code does: exit codes, terms, links."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import re
from pathlib import Path

import pytest
import typer

from p2pflock import errors
from p2pflock.cli import main as cli
from p2pflock.learning import spec
from p2pflock.protocol import messages

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def subclasses(root: type[errors.FlockError]) -> list[type[errors.FlockError]]:
    return [root, *(below for child in root.__subclasses__() for below in subclasses(child))]


def public(root: type[errors.FlockError]) -> list[type[errors.FlockError]]:
    """Those of the tree; a private subclass of some module may have been imported by another test."""
    return [kind for kind in subclasses(root) if kind.__module__ == errors.__name__]


def documented_codes() -> dict[int, str]:
    rows = re.findall(r"^\| (\d+) \| (?:`(\w+)`)? *\|", (DOCS / "exit-codes.md").read_text(), re.MULTILINE)
    codes = {int(code): name for code, name in rows}
    assert len(codes) == len(rows), "a code is listed twice"
    return codes


def test_exit_codes_are_exactly_those_of_the_classes() -> None:
    own = [kind for kind in public(errors.FlockError) if not issubclass(kind, errors.RemoteProtocolError)]
    expected = {kind.exit_code: kind.__name__ for kind in own}
    assert len(expected) == len(own), "two classes share a code"
    assert documented_codes() == {**expected, 0: "", cli.INTERRUPTED: ""}


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = dict(re.findall(r"(\w+Error_?) +(\d+|–)", errors.__doc__ or ""))
    for kind in public(errors.FlockError):
        shown = drawn.pop(kind.__name__)
        remote = issubclass(kind, errors.RemoteProtocolError)
        assert shown == ("–" if remote else str(kind.exit_code)), kind.__name__
    assert drawn == {}


def glossary_terms() -> set[str]:
    return set(re.findall(r"^\*\*(.+?)\*\*", (DOCS / "glossary.md").read_text(), re.MULTILINE))


def test_every_message_is_in_the_glossary() -> None:
    types = {
        name
        for name, value in vars(messages).items()
        if isinstance(value, type)
        and value.__module__ == messages.__name__
        and (dataclasses.is_dataclass(value) or issubclass(value, enum.Enum))
    }
    assert types <= set(re.findall(r"`(\w+)`", (DOCS / "glossary.md").read_text()))


def test_glossary_terms_are_sorted_and_unique() -> None:
    terms = re.findall(r"^\*\*(.+?)\*\*", (DOCS / "glossary.md").read_text(), re.MULTILINE)
    assert terms == sorted(terms, key=str.lower)
    assert len(terms) == len(glossary_terms())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    for name in re.findall(r"`((?:p2pflock|contracts|tests|docs)/[\w./-]+)`", page.read_text()):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_and_commands_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert re.search(rf"^{target}\b[^=]*:", makefile, re.MULTILINE), f"{page.name} names make {target}"


def test_modules_that_are_named_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"`(p2pflock\.(?:primitives|protocol)\.\w+)`", page.read_text()):
            importlib.import_module(name)


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "own-model.md"], ids=lambda page: page.name)
def test_the_example_spec_is_one(page: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", page.read_text(), re.DOTALL)
    parsed = spec.parse_spec(example)
    assert parsed.task.name == "digits"
    assert parsed.foreign_modules() == ("mytask.digits",)


def test_the_table_of_keys_is_complete() -> None:
    rows = re.findall(r"^\| `\[(\w+)\]` \| (.+) \|$", (DOCS / "own-model.md").read_text(), re.MULTILINE)
    # a key's values stand in brackets behind it
    documented = {name: set(re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", cell))) for name, cell in rows}
    whole = spec.load_spec("mnist")
    sections = {f.name: getattr(whole, f.name) for f in dataclasses.fields(whole) if f.name != "averaging"}
    assert documented == {name: {f.name for f in dataclasses.fields(part)} for name, part in sections.items()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_that_are_shown_exist(page: Path) -> None:
    commands = {command.name: command for command in typer.main.get_group(cli.app).commands.values()}
    shown = "\n".join(re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL))
    for name, rest in re.findall(r"^(?:\.venv/bin/)?p2pflock ([a-z]+)([^#\n]*)", shown, re.MULTILINE):
        known = {option for parameter in commands[name].params for option in parameter.opts} | {"--help"}
        assert set(re.findall(r"--[a-z-]+", rest)) <= known, f"{page.name}: p2pflock {name}{rest}"
