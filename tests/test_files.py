"""data/files.py: files are whole or not there, and a folder belongs to one process at a time."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import files
from commands import BadInput
from conftest import ROOT
from files import clear, digest, folder_lock, own_folder, write_atomically

# Takes the folder that is the first argument, says so, and has it until its input is closed.
HOLDER = """
import sys
from pathlib import Path
from files import own_folder
with own_folder(Path(sys.argv[1]), "busy", wait=True) as folder:
    (folder / "left").touch()
    print("has it", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holders():
    """A function that starts a process which takes a folder; they end with the test."""
    started = []

    def start(folder: Path) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder)],
            env={**os.environ, "PYTHONPATH": str(ROOT / "data")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with process:
            process.kill()


# ---- Files
def test_a_file_is_written_whole_with_what_everybody_may_read(tmp_path):
    path = tmp_path / "a"
    path.write_text("before")
    write_atomically(path, b"one", memoryview(b" two"))
    assert path.read_bytes() == b"one two"
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_while_it_is_written_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text("before")

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_digest_reports_every_byte_that_it_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "READ_BYTES", 7)
    path = tmp_path / "a"
    path.write_bytes(b"x" * 20)
    sizes = []
    assert digest(path, sizes.append) == hashlib.sha256(b"x" * 20).hexdigest()
    assert sizes == [7, 7, 6]


# ---- Folders
def test_a_folder_is_made_and_removed_with_all_that_is_in_it(tmp_path):
    path = tmp_path / "new/folder"
    with own_folder(path, "busy") as folder:
        assert folder == path
        (folder / "inner").mkdir()
        (folder / "inner/file").touch()
    assert list(tmp_path.iterdir()) == [tmp_path / "new"]
    assert list((tmp_path / "new").iterdir()) == []


def test_a_folder_is_removed_whatever_happens_in_it(tmp_path):
    with pytest.raises(KeyboardInterrupt), own_folder(tmp_path / "a", "busy") as folder:
        (folder / "file").touch()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_clearing_removes_no_lock_and_follows_no_link(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "lock").touch()
    (folder / "link").symlink_to(kept)
    clear(folder)
    assert [path.name for path in folder.iterdir()] == ["lock"]
    assert (kept / "file").exists()


def test_a_folder_that_another_process_has_is_refused(holders, tmp_path):
    holder = holders(tmp_path / "a")
    assert holder.stdout.readline() == "has it\n"
    with pytest.raises(BadInput, match="a is in use"), own_folder(tmp_path / "a", "a is in use"):
        pass
    assert (tmp_path / "a/left").exists()
    holder.stdin.close()
    assert holder.wait() == 0
    assert not (tmp_path / "a").exists()


def test_who_waits_gets_the_folder_when_it_is_empty(holders, tmp_path):
    first = holders(tmp_path / "a")
    assert first.stdout.readline() == "has it\n"
    second = holders(tmp_path / "a")
    assert second.stderr.readline() == "busy\n"
    first.stdin.close()
    assert second.stdout.readline() == "has it\n"
    second.stdin.close()
    assert (first.wait(), second.wait()) == (0, 0)
    assert not (tmp_path / "a").exists()


def test_a_folder_of_a_process_that_was_killed_is_taken_with_what_is_in_it(holders, tmp_path):
    holder = holders(tmp_path / "a")
    assert holder.stdout.readline() == "has it\n"
    holder.kill()
    holder.wait()
    with own_folder(tmp_path / "a", "busy") as folder:
        assert (folder / "left").exists()
    assert not (tmp_path / "a").exists()


def test_no_other_process_enters_a_folder_before_it_is_empty(tmp_path, monkeypatch):
    folder = tmp_path / "a"
    there = []
    real = os.unlink

    def note(path: object, **options: object) -> None:
        if Path(path).name == files.LOCK:
            there.extend(os.listdir(folder))
        real(path, **options)

    with own_folder(folder, "busy"):
        (folder / "documents").touch()
        (folder / "finished").mkdir()
        monkeypatch.setattr(os, "unlink", note)
    assert there == [files.LOCK] and not folder.exists()


def test_many_processes_that_want_one_folder_have_it_one_after_the_other(holders, tmp_path):
    waiting = [holders(tmp_path / "a") for _ in range(4)]
    for process in waiting:
        process.stdin.close()
    assert [process.wait() for process in waiting] == [0] * 4
    assert list(tmp_path.iterdir()) == []


def test_a_lock_leaves_the_folder_as_it_is(tmp_path):
    with folder_lock(tmp_path / "a", "busy", name=".lock"):
        (tmp_path / "a/file").touch()
    assert (tmp_path / "a/file").exists()
