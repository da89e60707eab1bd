"""Every way a command can end: what is printed where, and with which exit code."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from p2pflock import __version__, errors
from p2pflock.cli import main as cli
from p2pflock.cli.options import Format

HEAVY = {"torch", "hivemind", "libp2p", "web3", "numba", "numpy", "py_ecc", "eth_account"}


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make every command end with this error."""

    def app(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", app)


def all_errors(root: type[errors.FlockError] = errors.FlockError) -> list[type[errors.FlockError]]:
    return [root, *(below for child in root.__subclasses__() for below in all_errors(child))]


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
def test_our_errors_are_two_lines_and_the_code_of_their_class(
    kind: type[errors.FlockError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, kind("it\nbroke", "mend it"))
    assert cli.main([]) == kind.exit_code != 0
    captured = capsys.readouterr()
    assert captured.err == "error: it broke\nfix: mend it\n"
    assert captured.out == ""


def test_errors_are_one_json_object_when_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, errors.PortTakenError("port 4001 is taken", "choose another"))
    assert cli.main(["run", "--format", "json"]) == 20
    assert json.loads(capsys.readouterr().err)["error"] == {
        "kind": "PortTakenError",
        "message": "port 4001 is taken",
        "fix": "choose another",
        "exit_code": 20,
    }


class Group(BaseException):
    """Shaped like ExceptionGroup, which Python 3.10 has only as a backport."""

    def __init__(self, *inner: BaseException) -> None:
        super().__init__("group")
        self.exceptions = inner


def test_an_error_inside_nurseries_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, Group(Group(errors.ChainUnavailableError("no answer"))))
    assert cli.main([]) == 31
    assert capsys.readouterr().err == "error: no answer\nfix: see code 31 in docs/exit-codes.md\n"


def test_a_bug_is_not_hidden_by_an_expected_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, Group(errors.UnavailableError("late"), ZeroDivisionError("division by zero")))
    assert cli.main(["--home", str(tmp_path)]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Group(KeyboardInterrupt()), typer.Abort()])
def test_ctrl_c(error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    raising(monkeypatch, error)
    assert cli.main([]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_a_bug_is_one_line_and_a_log_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, RuntimeError("surprise"))
    assert cli.main(["--home", str(tmp_path)]) == 1
    error, fix = capsys.readouterr().err.splitlines()
    assert error == "error: unexpected RuntimeError: surprise"
    log = Path(re.search(r"\S+\.log", fix)[0])  # type: ignore[index]
    assert log.parent == tmp_path / "logs"
    assert "Traceback" in log.read_text()


def test_the_log_goes_elsewhere_when_the_home_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(cli.tempfile, "gettempdir", lambda: str(tmp_path))
    raising(monkeypatch, RuntimeError("surprise"))
    assert cli.main(["--home", str(tmp_path / "file")]) == 1
    assert f"{tmp_path}/p2pflock-" in capsys.readouterr().err


def test_a_full_disk_is_no_bug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    raising(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "/data/block"))
    assert cli.main([]) == errors.DiskFullError.exit_code
    assert "/data/block" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["no-such-command"], ["cid"], ["cid", "--no-such-option", "x"], ["doctor", "--format", "yaml"], ["doctor", "--peers", "0"]],
)
def test_wrong_usage_is_two_lines(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == errors.UserError.exit_code
    error, fix = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert fix.startswith("fix: see p2pflock")


def test_report_never_prints_a_traceback(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cli.report(RuntimeError("x" * 10_000), Format.TEXT, tmp_path)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_every_command_takes_a_format() -> None:
    for command in cli.COMMANDS:
        assert "form" in command.__annotations__, command.__name__
        assert command.__doc__, command.__name__


def run_module(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "p2pflock", *arguments], capture_output=True, text=True, timeout=60, **options  # type: ignore[call-overload]
    )


def test_python_m_is_the_command() -> None:
    done = run_module("--version")
    assert (done.returncode, done.stdout) == (0, f"p2pflock {__version__}\n")
    done = run_module("nope")
    assert done.returncode == 2
    assert done.stdout == ""


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    probe = (
        "import sys; from p2pflock.cli.main import main; code = main(['--help']);"
        f"print('HEAVY', sorted({HEAVY!r} & sys.modules.keys()), code)"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=True)
    took = time.monotonic() - began
    assert done.stdout.rstrip().endswith("HEAVY [] 0")
    for command in cli.COMMANDS:
        assert command.__name__ in done.stdout
    assert took < 10  # typically 0.3 s; the bound only catches a heavy import that hides under another name


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "p2pflock", "doctor", "--format", "json", "--home", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == b""
    process.stderr.close()
