"""What people and programs read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from p2pflock.cli import output
from p2pflock.cli.options import Format
from p2pflock.cli.output import Output, ProgressLine


def test_json_is_one_document_and_text_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(Format.JSON)
    out.line("text")
    out.pairs("title", [("a", "b")])
    out.table("title", ["a"], [["b"]])
    out.document({"hash": b"\x01\xff", "wei": 10**20, "n": 3, "at": Path("x"), "seats": {2, 1}, b"\x02": None})
    assert json.loads(capsys.readouterr().out) == {
        "hash": "0x01ff",
        "wei": "100000000000000000000",
        "n": 3,
        "at": "x",
        "seats": [1, 2],
        "0x02": None,
    }


def test_text_prints_no_document(capsys: pytest.CaptureFixture[str]) -> None:
    Output(Format.TEXT).document({"a": 1})
    assert capsys.readouterr().out == ""


def test_cells_are_never_read_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(Format.TEXT)
    out.table("t", ["name", "verdict"], [["[bold]x[/bold] [link=http://evil]", "PASS"]], right=["name"])
    out.pairs("p", [("name", "[red]y")])
    printed = capsys.readouterr().out
    assert "[bold]x[/bold] [link=http://evil]" in printed
    assert "[red]y" in printed


def test_long_values_are_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    Output(Format.TEXT).pairs("", [("key", "0x" + "ab" * 200)])
    assert "0x" + "ab" * 200 in capsys.readouterr().out


@pytest.mark.parametrize(
    ("address"),
    [
        "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed",  # the vectors of ERC-55
        "0xfB6916095ca1df60bB79Ce92cE3Ea74c37c5d359",
        "0xdbF03B407c01E7cD3CBea99509d93f8DDDC8C6FB",
        "0xD1220A0cf47c7B9Be7A2E6BA89F429762e7b9aDb",
    ],
)
def test_addresses_carry_their_checksum(address: str) -> None:
    assert output.format_address(bytes.fromhex(address[2:])) == address


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB"), (3 << 40, "3.0 TiB")],
)
def test_bytes(value: int, text: str) -> None:
    assert output.format_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(-3, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (75, "1 min 15 s"), (7_260, "2 h 01 min")]
)
def test_seconds(value: float, text: str) -> None:
    assert output.format_seconds(value) == text


@pytest.mark.parametrize(
    ("wei", "text"),
    [(0, "0"), (10**18, "1"), (1_500 * 10**18, "1,500"), (10**18 // 4, "0.25"), (1_999_999_999_999, "0.000001")],
)
def test_amounts_are_rounded_down(wei: int, text: str) -> None:
    assert output.format_flock(wei) == text


def test_progress_has_round_loss_peers_and_eta(capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine(Format.TEXT, 10, started=100.0)
    line.update(1, loss=2.3, peers=4, now=110.0)
    line.update(2, loss=1.25, peers=1, now=120.0, accuracy=0.5)
    assert capsys.readouterr().err.splitlines() == [
        "round 1/10  ·  loss 2.3000  ·  4 peers  ·  ETA 1 min 30 s",
        "round 2/10  ·  loss 1.2500  ·  accuracy 50.00%  ·  1 peer  ·  ETA 1 min 20 s",
    ]


def test_the_eta_follows_the_last_rounds() -> None:
    line = ProgressLine(Format.TEXT, 100, started=0.0)
    shown = None
    for round_ in range(1, 51):
        # 100 s a round at first, 1 s after round 20.
        shown = line.update(round_, loss=1.0, peers=2, now=100.0 * min(round_, 20) + max(0, round_ - 20))
    assert shown is not None
    assert shown.eta_seconds == pytest.approx(50.0)


def test_an_endless_run_has_no_eta() -> None:
    assert ProgressLine(Format.TEXT, 0, started=0.0).update(3, loss=1.0, peers=2, now=9.0).eta_seconds is None


def test_progress_and_notes_are_json_lines_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine(Format.JSON, 4, started=0.0)
    line.update(1, loss=0.5, peers=3, now=2.0)
    line.note("peer left")
    line.close()
    captured = capsys.readouterr()
    first, second = map(json.loads, captured.err.splitlines())
    assert first["progress"] == {
        "round": 1, "rounds": 4, "loss": 0.5, "peers": 3, "accuracy": None, "eta_seconds": 6.0,
    }  # fmt: skip
    assert second == {"note": "peer left"}
    assert captured.out == ""


def test_a_terminal_gets_one_line_rewritten(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    line = ProgressLine(Format.TEXT, 2, started=0.0)
    line.update(1, loss=10.0, peers=12, now=1.0)
    line.update(2, loss=1.0, peers=1, now=2.0)
    line.close()
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.endswith("\n")
    first, second = err[1:-1].split("\r")
    assert len(second) == len(first)  # what was longer before is wiped
