"""What every command of data/ and records/ shares: its options, its errors, its end.

It imports the standard library only, so that a command whose packages are missing can say so. A
command reads:

    from commands import BadInput, Parser, command, packages_from

    with packages_from("data/requirements.txt"):
        import numpy as np
        from shards import read_shard


    def parse(arguments: list[str] | None) -> argparse.Namespace:
        parser = Parser(description=__doc__)
        ...
        return parser.parse_args(arguments)


    @command(stopped="interrupted: nothing half done is left")
    def main(arguments: list[str] | None = None) -> int:
        options = parse(arguments)
        ...
        return 0


    if __name__ == "__main__":
        sys.exit(main())

Imports that need a package from elsewhere, by themselves or through another module of this
repository, stand in the `with` block; those of the standard library stand above it. A command in
records/ puts data/ on the path first:

    # The commands share modules of data/.
    sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "data"))

A function that finds something wrong that people can mend raises BadInput. Modules that are
imported, and are no commands themselves, import what they need plainly.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

STOPPING = (signal.SIGINT, signal.SIGTERM)
# Characters of an error's description.
LONGEST_DESCRIPTION = 300


class BadInput(Exception):
    """What people can mend: one line says what is wrong, where, and what to do."""


class Stopped(KeyboardInterrupt):
    """The command was stopped by the signal whose number is the first argument."""


class Parser(argparse.ArgumentParser):
    """Reports wrong options like everything else that is wrong: as BadInput, in one line."""

    def error(self, message: str) -> NoReturn:
        """Raise BadInput with argparse's message."""
        raise BadInput(f"{message}; --help lists the options")


def say(line: str) -> None:
    """Print a line on standard error at once, above the progress bars that are shown."""
    # Whatever shows a bar has imported tqdm before.
    tqdm = sys.modules.get("tqdm")
    if tqdm is None:
        print(line, file=sys.stderr, flush=True)
    else:
        tqdm.tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()


def described(error: BaseException) -> str:
    """Describe an error that was not foreseen, in one line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}"[:LONGEST_DESCRIPTION]


@contextlib.contextmanager
def packages_from(requirements: str) -> Iterator[None]:
    """Import in this context what needs packages from elsewhere.

    If one is missing, the process ends with status 1 after one line. It says which, and that
    `requirements`, a path below the repository's root, lists it.
    """
    try:
        yield
    except ImportError as error:
        raise SystemExit(f"error: {error}: pip install -r {requirements}") from None


def command(
    stopped: str = "interrupted", stopped_status: int | None = None
) -> Callable[[Callable[[list[str] | None], int | None]], Callable[[list[str] | None], int]]:
    """Decorate a command's main(arguments), so that it ends with one line instead of a traceback.

    - It returns a status, or None for 0: the exit status is that.
    - BadInput, or an OSError such as a full disk: `error: ...`, and the exit status is 2.
    - SIGINT (Ctrl-C) or SIGTERM: the line `stopped`, and the exit status is `stopped_status`, or
      without it 128 and the signal's number (130, 143).

    Within main() both signals raise Stopped, which is a KeyboardInterrupt; uninterrupted() puts
    them off.
    """

    def decorate(
        main: Callable[[list[str] | None], int | None],
    ) -> Callable[[list[str] | None], int]:
        @functools.wraps(main)
        def framed(arguments: list[str] | None = None) -> int:
            show_every_character()
            handlers = {number: signal.signal(number, raise_stopped) for number in STOPPING}
            try:
                return main(arguments) or 0
            except BadInput as error:
                say(f"error: {error}")
                return 2
            except OSError as error:
                say(f"error: {explained(error)}")
                return 2
            except KeyboardInterrupt as error:
                say(stopped)
                if stopped_status is not None:
                    return stopped_status
                number = error.args[0] if isinstance(error, Stopped) else signal.SIGINT
                return 128 + number
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)

        return framed

    return decorate


def show_every_character() -> None:
    """Let print() write an escape for a character that the encoding of the output lacks.

    Without it, that would be a traceback: on Windows, output to a file has 256 characters.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def explained(error: OSError) -> str:
    """Say in one line which file the system refused, and why."""
    reason = error.strerror or str(error)
    if error.filename:
        return f"{error.filename}: {reason}"
    return reason


def raise_stopped(number: int, frame: object) -> NoReturn:
    """Handle a signal: raise Stopped."""
    raise Stopped(number)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let the signals that stop a command wait until this context is left."""
    caught: list[int] = []

    def note(number: int, frame: object) -> None:
        caught.append(number)

    handlers = {number: signal.signal(number, note) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if caught:
        signal.raise_signal(caught[0])
