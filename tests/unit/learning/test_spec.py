from __future__ import annotations

import subprocess
import sys
from decimal import Decimal

import pytest

from p2pflock.errors import InvalidMessageError, SpecError
from p2pflock.learning.spec import TaskSpec, builtin_names, load_spec, parse_spec
from p2pflock.primitives import dagcbor

MINIMAL = """
[task]
name = "own"
rounds = 3
[model]
factory = "mine.models:build"
arguments = { width = 8, scale = 0.50, names = ["a", "b"], deep = true }
[data]
factory = "mine.data:load"
[local]
lr = 1e-3
"""


def test_shipped_tasks_load_and_travel():
    assert set(builtin_names()) == {"mnist", "shakespeare"}
    for name in builtin_names():
        spec = load_spec(name)
        assert spec.task.name == name
        assert TaskSpec.decode(spec.encode()) == spec
        assert spec.foreign_modules() == ()
        assert spec.task_id == spec.cid().digest


def test_reads_a_file_and_fills_defaults(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(MINIMAL)
    spec = load_spec(path)
    assert spec == parse_spec(MINIMAL) == TaskSpec.decode(spec.encode())
    assert spec.local.lr == Decimal("0.001")
    assert spec.model.arguments == {
        "width": 8, "scale": Decimal("0.5"), "names": ("a", "b"), "deep": True
    }
    assert spec.codec.k == 128
    assert spec.foreign_modules() == ("mine.data", "mine.models")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("1e-3", "0.00100"),
        ("1e-3", "0.001 # a comment"),
        ("0.50", "5e-1"),
        ("[local]", "[codec]\nk = 128\n[local]"),
        ("[local]", "[local]\nweight_decay = 0"),
        ("[local]", "[local]\nweight_decay = -0.0"),
    ],
)
def test_same_meaning_same_id(old, new):
    assert parse_spec(MINIMAL.replace(old, new)).cid() == parse_spec(MINIMAL).cid()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("1e-3", "0.002"),
        ("rounds = 3", "rounds = 4"),
        ("0.50", '"0.5"'),
        ("width = 8", "width = 8.5"),
        ("deep = true", "deep = 1"),
        ("[task]", 'averaging = "dense"\n[task]'),
    ],
)
def test_other_meaning_other_id(old, new):
    assert parse_spec(MINIMAL.replace(old, new)).cid() != parse_spec(MINIMAL).cid()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('name = "own"', 'nmae = "own"', ["task.nmae", "did you mean name"]),
        ("[local]", "[loacl]", ["[loacl]", "did you mean local"]),
        ("rounds = 3", "", ["task.rounds is missing", "[task]"]),
        ("rounds = 3", "rounds = 0", ["task.rounds = 0", "from 1"]),
        ("rounds = 3", "rounds = true", ["task.rounds", "whole number"]),
        ("rounds = 3", "rounds = 3.0", ["task.rounds", "whole number"]),
        ("1e-3", "-1", ["local.lr", "above 0"]),
        ("1e-3", "0", ["local.lr", "above 0"]),
        ("1e-3", "nan", ["local.lr"]),
        ("1e-3", "inf", ["local.lr"]),
        ("1e-3", '"fast"', ["local.lr"]),
        ("mine.models:build", "mine.models.build", ["model.factory", "package.module:function"]),
        ("mine.models:build", "mine models:build", ["model.factory"]),
        ('name = "own"', 'name = "Own Task"', ["task.name", "lower-case"]),
        ("[local]", '[local]\noptimizer = "adam"', ["local.optimizer", '"adamw"']),
        ("[local]", "[local]\nsteps_max = 29", ["local.steps_max", "below local.steps"]),
        ("[local]", "[local]\nsteps = 20\nsteps_max = 40\nsteps_min = 21", ["local.steps_min", "above local.steps"]),
        ("[local]", "[local]\ntarget_utilisation = 1", ["local.target_utilisation", "0.99"]),
        ("[local]", "[local]\nmicro_batch = 33", ["local.micro_batch", "batch_size"]),
        ("[local]", '[local]\nprecision = "float16"', ["local.precision", '"bfloat16"']),
        ("[local]", "[codec]\nchunk = 64\nk = 65\n[local]", ["codec.k", "codec.chunk"]),
        ("[task]", 'averaging = "mean"\n[task]', ["averaging", '"gossip"']),
        ("width = 8", "width = 1979-05-27", ["model.arguments"]),
        ("width = 8", '"a b" = 8', ["model.arguments"]),
        ("width = 8", "width = { a = 1 }", ["model.arguments"]),
        ("width = 8", "width = 1e999999", ["model.arguments"]),
        ("[local]", "local = 3\n[task2]", ["[task2]"]),
        ("[task]", "[task", ["not TOML"]),
        ("[local]", "[local]\nlr = 1\n", ["not TOML"]),
    ],
)
def test_mistakes_are_named(old, new, words):
    with pytest.raises(SpecError) as raised:
        parse_spec(MINIMAL.replace(old, new, 1), "own.toml")
    for word in ["own.toml", *words]:
        assert word in str(raised.value)
    assert raised.value.hint
    assert "\n" not in str(raised.value)


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(SpecError, match="use one of mnist, shakespeare"):
        load_spec("mnits")
    with pytest.raises(SpecError, match="No such file"):
        load_spec(tmp_path / "absent.toml")
    (tmp_path / "latin.toml").write_bytes(b"[task]\nname = '\xe9'")
    with pytest.raises(SpecError, match="UTF-8"):
        load_spec(tmp_path / "latin.toml")
    (tmp_path / "big.toml").write_bytes(b"#" * 70_000)
    with pytest.raises(SpecError, match="70000 bytes"):
        load_spec(tmp_path / "big.toml")


def changed(**sections):
    wire = dagcbor.decode(parse_spec(MINIMAL).encode())
    for name, values in sections.items():
        if isinstance(values, dict):
            wire[name].update(values)
        else:
            wire[name] = values
    return dagcbor.encode(wire)


@pytest.mark.parametrize(
    "sections",
    [
        {"kind": "p2pflock/spec/2"},
        {"task": {"rounds": 0}},
        {"task": {"colour": 1}},
        {"extra": []},
        {"task": 7},
        {"local": {"lr": "0.001"}},
        {"local": {"lr": {"$": "0.0010"}}},  # another spelling
        {"local": {"lr": {"$": "1e-3"}}},
        {"local": {"lr": {"$": 1}}},
        {"local": {"lr": {"$": "nan"}}},
        {"model": {"arguments": {"x": None}}},
        {"model": {"arguments": {"x": b"\0"}}},
        {"model": {"arguments": {"x": [[[[[[1]]]]]]}}},
        {"model": {"factory": "os"}},
    ],
)
def test_a_peers_spec_is_read_strictly(sections):
    with pytest.raises(InvalidMessageError):
        TaskSpec.decode(changed(**sections))


def test_a_missing_key_is_not_filled_in_for_a_peer():
    wire = dagcbor.decode(parse_spec(MINIMAL).encode())
    del wire["codec"]["k"]
    with pytest.raises(InvalidMessageError, match="canonical"):
        TaskSpec.decode(dagcbor.encode(wire))


@pytest.mark.parametrize("data", [b"", b"\xa0", b"\x80", b"\xff" * 100, bytes(70_000)])
def test_garbage_is_refused(data):
    with pytest.raises(InvalidMessageError):
        TaskSpec.decode(data)


def test_h_is_fixed_unless_there_is_a_range():
    fixed, adapted = (parse_spec(MINIMAL.replace("[local]", f"[local]\n{more}")) for more in ("", "steps_max = 128"))
    assert (fixed.local.is_adaptive, fixed.local.most_steps) == (False, 30)
    assert (adapted.local.is_adaptive, adapted.local.most_steps, adapted.local.steps_min) == (True, 128, 15)


def test_with_rounds():
    spec = load_spec("mnist")
    assert spec.with_rounds(3).task.rounds == 3
    assert spec.with_rounds(3).cid() != spec.cid()
    with pytest.raises(SpecError):
        spec.with_rounds(0)


def test_reading_a_spec_does_not_import_torch():
    script = (
        "import sys, p2pflock.learning.spec as s, p2pflock.learning.client, p2pflock.learning.data;"
        "import p2pflock.learning.fold; s.load_spec('mnist'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
