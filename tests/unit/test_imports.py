"""Imports point one way (docs/design.md, "Layers"), foreign stacks stay behind their adapter, names say something.

The checker reads the syntax tree, so imports inside functions count too; those under `if TYPE_CHECKING` also.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "p2pflock"

ADAPTERS = frozenset({"learning", "gossip", "net", "chain", "storage"})
BASE = frozenset({"errors", "params"})

# What each part of the package may import of the package, beside itself.
ALLOWED: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "params": frozenset({"errors"}),
    "primitives": BASE,
    "protocol": BASE | {"primitives"},
    "ports": BASE | {"primitives", "protocol"},
    "processes": BASE | {"primitives", "protocol", "ports"},
    **{adapter: BASE | {"primitives", "protocol", "ports", "processes"} for adapter in ADAPTERS},
    "node": BASE | ADAPTERS | {"primitives", "protocol", "ports", "processes"},
    "cli": BASE | ADAPTERS | {"primitives", "protocol", "ports", "processes", "node", "__init__"},
    "__main__": frozenset({"cli"}),
    "__init__": frozenset(),
    # The kit drives everything below the command line; nothing imports it back.
    "testing": BASE | ADAPTERS | {"primitives", "protocol", "ports", "processes", "node"},
}

# Foreign modules and the only parts that may import them.
OWNERS: dict[str, frozenset[str]] = {
    "libp2p": frozenset({"net"}),
    "multiaddr": frozenset({"net"}),
    "hivemind": frozenset({"gossip"}),
    "web3": frozenset({"chain"}),
    "eth_account": frozenset({"chain", "storage"}),
    "eth_keyfile": frozenset({"chain", "storage"}),
    "torch": frozenset({"learning", "gossip"}),  # gossip: hivemind's dense average takes tensors
    "safetensors": frozenset({"learning"}),
    "ipfshttpclient": frozenset({"storage"}),
    "typer": frozenset({"cli"}),
    "rich": frozenset({"cli"}),
}

# primitives/ and protocol/ do no I/O, read no clock, draw no randomness, start no thread.
PURE = frozenset({"primitives", "protocol"})
IMPURE = frozenset(
    {
        "anyio", "asyncio", "concurrent", "ctypes", "datetime", "fcntl", "getpass", "http", "httpx", "io",
        "logging", "mmap", "multiprocessing", "os", "pathlib", "pickle", "platform", "queue", "random",
        "requests", "sched", "secrets", "select", "selectors", "shutil", "signal", "socket", "sqlite3", "ssl",
        "subprocess", "sys", "tempfile", "threading", "time", "trio", "urllib", "uuid",
    }
)  # fmt: skip
# Called without an import.
IMPURE_CALLS = frozenset({"open", "input", "print", "exec", "eval", "__import__"})
# Nothing from a peer is ever unpickled or executed, so nothing in the package may even reach for these.
NEVER = frozenset({"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"})
EMPTY_NAMES = ("manager", "handler", "utils", "util", "helpers", "helper", "misc", "common")


def part_of(path: Path, package: Path) -> str:
    """`net` for package/net/host.py, `errors` for package/errors.py."""
    return path.relative_to(package).with_suffix("").parts[0]


def imports(tree: ast.AST, module: tuple[str, ...], is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything imported, relative imports resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                drop = node.level - (1 if is_package else 0)
                base = module[: len(module) - drop]
                prefix = ".".join([*base, node.module] if node.module else base)
            else:
                prefix = node.module or ""
            yield node.lineno, prefix
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call):
            # importlib.import_module("…") with a literal is an import like any other.
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in {"import_module", "__import__"} and node.args:
                argument = node.args[0]
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield node.lineno, argument.value


def violations_in(source: str, path: Path, package: Path) -> list[str]:
    part = part_of(path, package)
    inside = path.relative_to(package).with_suffix("").parts
    is_package = inside[-1] == "__init__"
    module = ("p2pflock", *(inside[:-1] if is_package else inside))
    tree = ast.parse(source)
    known = {entry.stem for entry in package.iterdir() if not entry.name.startswith((".", "__pycache__"))}
    found: list[str] = []

    def report(line: int, what: str) -> None:
        found.append(f"{path.relative_to(package.parent)}:{line}: {what}")

    if part not in ALLOWED:
        report(1, f"{part} has no place in the layering")
        return found
    for line, name in imports(tree, module, is_package):
        pieces = name.split(".")
        top = pieces[0]
        if top == "p2pflock":
            target = pieces[1] if len(pieces) > 1 else "__init__"
            if target not in known and target not in ALLOWED:
                target = "__init__"  # a name such as __version__
            if target == "__init__" and len(pieces) == 1:
                continue  # `from p2pflock import x` also yields p2pflock.x, which decides
            if target != part and target not in ALLOWED[part]:
                report(line, f"{part} imports {target}")
        if top in OWNERS and part not in OWNERS[top] and part != "testing":
            report(line, f"{part} imports {top}, which belongs to {', '.join(sorted(OWNERS[top]))}")
        if part in PURE and top in IMPURE:
            report(line, f"{part} imports {top}: no I/O, clock or randomness there")
        if top in NEVER and part != "testing":  # the kit checks that keys refuse to be pickled
            report(line, f"{part} imports {top}: nothing is unpickled here")
    if part in PURE:
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in IMPURE_CALLS:
                report(node.lineno, f"{part} calls {node.func.id}()")
    return sorted(set(found))


def violations(package: Path) -> list[str]:
    found: list[str] = []
    for path in sorted(package.rglob("*.py")):
        found += violations_in(path.read_text(encoding="utf-8"), path, package)
        stem = path.stem.lower()
        if any(stem == word or stem.endswith(f"_{word}") or stem.startswith(f"{word}_") for word in EMPTY_NAMES):
            found.append(f"{path.relative_to(package.parent)}: the name says nothing")
    return found


def test_the_package_keeps_to_its_layers() -> None:
    assert violations(PACKAGE) == []


def test_every_part_has_a_place() -> None:
    parts = {part_of(path, PACKAGE) for path in PACKAGE.rglob("*.py")}
    assert parts <= ALLOWED.keys()


def test_the_layering_has_no_cycle() -> None:
    order: list[str] = []

    def visit(part: str, trail: tuple[str, ...]) -> None:
        assert part not in trail, f"cycle: {' -> '.join((*trail, part))}"
        if part not in order:
            for below in ALLOWED[part]:
                visit(below, (*trail, part))
            order.append(part)

    for part in ALLOWED:
        visit(part, ())
    for adapter in ADAPTERS:
        assert not ALLOWED[adapter] & ADAPTERS


VIOLATIONS = [
    ("primitives/a.py", "import os", "primitives imports os"),
    ("primitives/a.py", "def f():\n    from time import monotonic", "primitives imports time"),
    ("primitives/a.py", "open('x')", "calls open()"),
    ("primitives/a.py", "from p2pflock.protocol import messages", "primitives imports protocol"),
    ("protocol/a.py", "import random", "protocol imports random"),
    ("protocol/a.py", "from p2pflock import ports", "protocol imports ports"),
    ("net/a.py", "from p2pflock.gossip import dht", "net imports gossip"),
    ("net/a.py", "from ..chain import anchor", "net imports chain"),
    ("net/a.py", "from .. import storage", "net imports storage"),
    ("net/a.py", "import hivemind", "belongs to gossip"),
    ("gossip/a.py", "from libp2p import new_host", "belongs to net"),
    ("chain/a.py", "import torch.nn as nn", "belongs to gossip, learning"),
    ("node/a.py", "import importlib\nimportlib.import_module('web3')", "belongs to chain"),
    ("node/a.py", "from p2pflock.testing import network", "node imports testing"),
    ("node/a.py", "from p2pflock import testing", "node imports testing"),
    ("node/a.py", "from p2pflock.cli import main", "node imports cli"),
    ("storage/a.py", "import pickle", "nothing is unpickled"),
    ("storage/keystore_utils.py", "", "the name says nothing"),
    ("net/handler.py", "", "the name says nothing"),
    ("marketplace/a.py", "", "no place in the layering"),
]


@pytest.mark.parametrize(("where", "source", "expected"), VIOLATIONS)
def test_the_checker_sees_a_violation(tmp_path: Path, where: str, source: str, expected: str) -> None:
    package = tmp_path / "p2pflock"
    for part in ("protocol", "primitives", "net", "gossip", "chain", "storage", "node", "cli", "testing"):
        (package / part).mkdir(parents=True)
    (package / "ports.py").touch()
    path = package / where
    path.parent.mkdir(exist_ok=True)
    path.write_text(source, encoding="utf-8")
    assert any(expected in line for line in violations(package)), violations(package)


def test_the_checker_lets_good_imports_pass(tmp_path: Path) -> None:
    package = tmp_path / "p2pflock"
    (package / "net").mkdir(parents=True)
    (package / "protocol").mkdir()
    (package / "net" / "host.py").write_text(
        "import os, trio, libp2p\n"
        "from p2pflock import errors, ports\n"
        "from p2pflock.protocol import messages\n"
        "from .limits import Limits\n",
        encoding="utf-8",
    )
    (package / "protocol" / "rounds.py").write_text(
        "import dataclasses, enum, typing, collections.abc\nfrom p2pflock.primitives.cid import CID\n",
        encoding="utf-8",
    )
    assert violations(package) == []


def test_the_standard_modules_named_here_exist() -> None:
    foreign = {"anyio", "httpx", "requests", "trio"}
    assert (IMPURE - foreign) <= sys.stdlib_module_names
