"""Files that are whole or not there, their digests, and folders of one process at a time."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from commands import BadInput, say, uninterrupted

READ_BYTES = 1 << 20
LOCK = "lock"
# Seconds between two attempts to get a lock.
PATIENCE = 0.1


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """Write all of a file or nothing of it: into a file beside it, which then takes its name."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=".partial")
    try:
        with open(handle, "wb") as file:
            for part in parts:
                file.write(part)
        # mkstemp makes files that nobody but their owner can read.
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def ignore(size: int) -> None:
    """Take a report of progress that nobody wants."""


def digest(path: Path, report: Callable[[int], object] = ignore) -> str:
    """Return a file's SHA-256 in hexadecimal digits.

    The file is read in pieces, and `report` is told the bytes of each.
    """
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(READ_BYTES):
            found.update(piece)
            report(len(piece))
    return found.hexdigest()


@contextlib.contextmanager
def folder_lock(
    folder: Path, busy: str, wait: bool = False, name: str = LOCK
) -> Iterator[FileLock]:
    """Hold the lock of a folder, a file of this name in it; the folder is made if it is absent.

    The system frees the lock when this process ends, however it ends. While another process holds
    it: BadInput with the message `busy`, or with `wait` this message once and waiting.
    """
    lock = FileLock(folder / name)
    told = False
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
            break
        except FileNotFoundError:
            # The process that had the folder has removed it since the line above.
            continue
        except Timeout:
            if not wait:
                raise BadInput(busy) from None
        if not told:
            say(busy)
            told = True
        time.sleep(PATIENCE)
    try:
        yield lock
    finally:
        lock.release()


@contextlib.contextmanager
def own_folder(folder: Path, busy: str, wait: bool = False) -> Iterator[Path]:
    """Make a folder that this process alone uses, as folder_lock says, and remove it at the end.

    At first it holds what a process that was killed has left in it.
    """
    try:
        with folder_lock(folder, busy, wait):
            try:
                yield folder
            finally:
                # What cannot be removed is left for the next process that uses the folder.
                with uninterrupted(), contextlib.suppress(OSError):
                    clear(folder)
                    # While the lock is held: a process that waits must not get the lock of a file
                    # that has no name any more. Windows removes no open file.
                    (folder / LOCK).unlink()
    finally:
        # Another process may be in it already.
        with contextlib.suppress(OSError):
            folder.rmdir()


def clear(folder: Path) -> None:
    """Remove all that is in a folder but its lock."""
    for path in folder.iterdir():
        if path.name == LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
