"""The base of the command line: exit statuses, one line per error, and what every command has in common."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib import import_module

import pytest

from uspace_mm import __version__, cli
from uspace_mm.errors import InputError, KernelError, UnsupportedError, UspaceError


class Scripted:
    """A command that does as the test says."""

    name = "scripted"
    help = "does as it is told"

    def __init__(self, result: int | BaseException) -> None:
        self._result = result

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--flag", action="store_true")

    def run(self, args: argparse.Namespace) -> int:
        if isinstance(self._result, BaseException):
            raise self._result
        return self._result


def run_scripted(monkeypatch: pytest.MonkeyPatch, result: int | BaseException) -> int:
    module = type(sys)("uspace_mm.cli.scripted")
    module.Command = lambda: Scripted(result)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "uspace_mm.cli.scripted", module)
    monkeypatch.setattr(cli, "COMMANDS", ("scripted",))
    return cli.main(["scripted"])


@pytest.mark.parametrize("status", [0, 1])
def test_the_commands_own_status_is_passed_on(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    assert run_scripted(monkeypatch, status) == status


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UspaceError("it is not so"), 1),
        (KernelError("mmap", 12), 1),
        (InputError("size 'x': expected a number"), 2),
        (UnsupportedError("this kernel lacks userfaultfd"), 3),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_error_becomes_one_line_on_stderr_and_its_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, status: int
) -> None:
    assert run_scripted(monkeypatch, error) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("uspace-mm scripted: ")
    assert captured.err.count("\n") == 1
    if isinstance(error, UspaceError):
        assert str(error) in captured.err


def test_errors_that_nobody_planned_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        run_scripted(monkeypatch, ZeroDivisionError())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"uspace-mm {__version__}\n"


@pytest.mark.parametrize("argv", [[], ["no-such-command"], ["doctor", "--no-such-flag"]])
def test_bad_usage_exits_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert "usage: uspace-mm" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = import_module(f"uspace_mm.cli.{name}").Command()
    assert command.name == name
    assert len(command.help) > 10
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    assert command.help.split()[0] in capsys.readouterr().out


def test_a_reader_that_goes_away_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "uspace_mm.cli", "doctor", "--json"],
            stdout=closed,
            stderr=subprocess.PIPE,
            check=False,
            timeout=60,
        )
    assert b"Traceback" not in done.stderr
    assert b"BrokenPipe" not in done.stderr
