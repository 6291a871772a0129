"""data/commands.py: how a command ends, whatever happens in it."""

from __future__ import annotations

import io
import itertools
import signal
import sys

import pytest

import check
import demo_corpus
import download
import prepare
import submit
from commands import (
    BadInput,
    Parser,
    Stopped,
    command,
    described,
    packages_from,
    say,
    uninterrupted,
)
from machines import run_python


def ends_with(error: BaseException | None, status: int | None = None) -> int:
    """Return the exit status of a command that raises this error, or returns this status."""

    @command(stopped="stopped: it can go on")
    def main(arguments: list[str] | None = None) -> int | None:
        if error is not None:
            raise error
        return status

    return main([])


@pytest.mark.parametrize("returned, status", [(None, 0), (0, 0), (1, 1), (3, 3)])
def test_a_commands_exit_status_is_what_it_returns(returned, status, capsys):
    assert ends_with(None, returned) == status
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "error, status, line",
    [
        (BadInput("x is wrong: mend it"), 2, "error: x is wrong: mend it"),
        (OSError("no reason"), 2, "error: no reason"),
        (OSError(28, "No space left", "a/b"), 2, "error: a/b: No space left"),
        (PermissionError(13, "Permission denied"), 2, "error: Permission denied"),
        (KeyboardInterrupt(), 130, "stopped: it can go on"),
        (Stopped(signal.SIGINT), 130, "stopped: it can go on"),
        (Stopped(signal.SIGTERM), 143, "stopped: it can go on"),
    ],
    ids=repr,
)
def test_what_people_can_mend_is_one_line_and_a_status(error, status, line, capsys):
    assert ends_with(error) == status
    assert capsys.readouterr() == ("", f"{line}\n")


def test_a_fault_of_the_program_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        ends_with(ZeroDivisionError())


def test_a_command_gives_the_signals_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    ends_with(BadInput("wrong"))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_command_where_it_is(number, capsys):
    done = []

    @command(stopped="stopped")
    def main(arguments: list[str] | None = None) -> None:
        signal.raise_signal(number)
        done.append("too late")

    assert main([]) == 128 + number
    assert capsys.readouterr().err == "stopped\n" and done == []


def test_signals_wait_for_what_must_not_be_half_done():
    done = []

    @command(stopped="stopped")
    def main(arguments: list[str] | None = None) -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            done.append("all")
        done.append("too late")

    assert main([]) == 128 + signal.SIGTERM
    assert done == ["all"]


def test_wrong_options_are_bad_input():
    parser = Parser()
    parser.add_argument("--number", type=int)
    with pytest.raises(BadInput, match="invalid int value: 'x'; --help lists the options"):
        parser.parse_args(["--number", "x"])


def test_what_an_output_cannot_show_is_escaped(monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", output)

    @command()
    def main(arguments: list[str] | None = None) -> None:
        print("▁é")

    assert main([]) == 0
    output.flush()
    assert output.buffer.getvalue().decode("cp1252").splitlines() == ["\\u2581é"]


def test_a_line_stands_above_the_bars_that_are_shown(capsys):
    tqdm = pytest.importorskip("tqdm")
    with tqdm.tqdm(total=2, desc="bar") as bar:
        bar.update()
        say("a line")
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert "a line" in lines


def test_a_line_needs_no_package():
    done = run_python("-c", "import commands\ncommands.say('a line')", modules=["tqdm"])
    assert (done.returncode, done.stderr) == (0, "a line\n")


def test_a_missing_package_ends_the_process_with_the_file_that_lists_it():
    with pytest.raises(SystemExit) as ended, packages_from("x/requirements.txt"):
        import no_such_package  # noqa: F401
    assert ended.value.code == (
        "error: No module named 'no_such_package': pip install -r x/requirements.txt"
    )


def test_an_unforeseen_error_is_described_in_one_short_line():
    assert described(ValueError("two\n  lines")) == "ValueError: two lines"
    assert len(described(ValueError("x" * 1000))) == 300


@pytest.mark.parametrize("module", [prepare, download, check, demo_corpus, submit])
def test_help_says_what_the_docstring_says(module, capsys):
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and module.__doc__.strip() in said
    for line, following in itertools.pairwise(said.splitlines()):
        # What an option is for stands behind it or, indented, below it.
        if line.startswith("  -"):
            assert "  " in line.strip() or following.startswith(" " * 20), line
