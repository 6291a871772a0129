"""What a script must not do in the auditor's processes, each thing in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import audit_confinement
from audit_confinement import OLDEST_VERSION, describe, landlock_version, outside_of
from conftest import ROOT
from tiny_runs import PATIENCE

PROGRAM = """
import json, os, socket, subprocess, sys
from pathlib import Path
from audit_guard import Guard

guard = Guard(sys.argv[1:])
guard.install()
raised = False
try:
    exec(sys.stdin.read())
except PermissionError as error:
    raised = "the auditor stopped" in str(error)
sys.stdout.write(json.dumps([guard.stopped, raised]))
"""
REACHES = {
    "the network": ('socket.create_connection(("127.0.0.1", 9), timeout=1)', "socket.getaddrinfo"),
    "another host": ("socket.socket().connect(('127.0.0.1', 9))", "socket.connect"),
    "a name": ("socket.gethostbyname('localhost')", "socket.gethostbyname"),
    "a program": ('subprocess.run(["true"])', "subprocess.Popen"),
    "a shell": ("os.system('true')", "os.system"),
    "another process": ("os.fork()", "os.fork"),
    "a file of the data": ("open('DATA/x_val.bin').read()", "open"),
    "the data": ("list(Path('DATA').iterdir())", "os.listdir"),
    "a place for the decoder": ("open('LEFT', 'w').write('validation text')", "open"),
    "a link out": ("os.symlink('mine', 'LEFT')", "os.symlink"),
    "the data, under another name": ("os.link('DATA/x_val.bin', 'other')", "os.link"),
    "a file of its own, moved out": ("os.rename('mine', 'LEFT')", "os.rename"),
    "the data, removed": ("os.remove('DATA/x_val.bin')", "os.remove"),
    "memory that processes share": ("open('/dev/shm/left', 'w').write('validation text')", "open"),
    "a note at a file": ("os.setxattr('/', 'user.text', b'validation text')", "os.setxattr"),
    "a folder to name files from": ("os.open('/', os.O_RDONLY)", "open"),
    "another folder to work in": ("os.chdir('/')", "os.chdir"),
    "a way up": ("list(Path('..').iterdir())", "os.listdir"),
}


def output_of(program: str, text: str, tmp_path: Path) -> str:
    """What a program prints in a folder of its own, beside DATA; `text` is what it reads."""
    data = tmp_path / "data"
    work = tmp_path / "work" / "inspect-1"
    data.mkdir()
    work.mkdir(parents=True)
    (data / "x_val.bin").write_text("text")
    (work / "mine").write_text("mine")
    done = subprocess.run(
        [sys.executable, "-c", program, str(data), str(work.parent)],
        input=text.replace("DATA", str(data)).replace("LEFT", str(tmp_path / "left")),
        cwd=work,
        env=dict(PYTHONPATH=str(ROOT / "records"), PYTHONDONTWRITEBYTECODE="1"),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert (data / "x_val.bin").read_text() == "text" and not (tmp_path / "left").exists()
    return done.stdout


def guarded(statement: str, tmp_path: Path) -> tuple[list[str], bool]:
    """What the guard noted, and whether it raised, when a statement ran in a folder of its own."""
    stopped, raised = json.loads(output_of(PROGRAM, statement, tmp_path))
    return stopped, raised


@pytest.mark.parametrize("what", REACHES)
def test_what_reaches_out_is_stopped_and_noted(what, tmp_path):
    statement, event = REACHES[what]
    stopped, raised = guarded(statement, tmp_path)
    assert raised and len(stopped) == 1, stopped
    assert stopped[0].split()[0] in (event, event.replace("listdir", "scandir"))


def test_an_attempt_is_noted_though_the_script_goes_on(tmp_path):
    statement = "try:\n    socket.getaddrinfo('localhost', 80)\nexcept OSError:\n    pass"
    stopped, raised = guarded(statement, tmp_path)
    assert len(stopped) == 1 and not raised


@pytest.mark.parametrize(
    "statement",
    [
        "open('made', 'w').write('x'); os.rename('made', 'moved'); os.remove('moved')",
        "os.mkdir('folder'); list(Path('folder').iterdir())",
        "import email.message",
        "open('/dev/null', 'w').write('x')",
        "open('/etc/hostname' if os.path.exists('/etc/hostname') else '/dev/null').read()",
    ],
)
def test_what_a_script_needs_is_allowed(statement, tmp_path):
    assert guarded(statement, tmp_path) == ([], False)


# ---- The kernel
CONFINED = """
import ctypes, os, sys
from pathlib import Path
from audit_confinement import confine

assert confine(sys.argv[1:])
libc = ctypes.CDLL(None, use_errno=True)
sys.stdout.write(str(eval(sys.stdin.read())))
"""
NOT_FOR_PYTHON = {
    "a file of the data, by a library": "libc.open(b'DATA/x_val.bin', 0)",
    "memory that processes share, by a library": "libc.creat(b'/dev/shm/left-by-test', 0o600)",
    "a place for the decoder, by a library": "libc.creat(b'LEFT', 0o600)",
    "a file of the data, from a folder": "libc.openat(libc.open(b'/', 0), b'.DATA/x_val.bin', 0)",
    "the memory of the auditor": "libc.open(b'/proc/%d/mem' % os.getppid(), 0)",
}


def confined(expression: str, tmp_path: Path) -> str:
    """What an expression is in a process that the kernel holds in a folder of its own."""
    return output_of(CONFINED, expression, tmp_path)


needs_landlock = pytest.mark.skipif(
    landlock_version() < OLDEST_VERSION, reason="the kernel has no Landlock"
)


@needs_landlock
@pytest.mark.parametrize("what", NOT_FOR_PYTHON)
def test_the_kernel_denies_what_python_does_not_see(what, tmp_path):
    assert confined(NOT_FOR_PYTHON[what], tmp_path) == "-1"
    assert not (tmp_path / "left").exists()


@needs_landlock
@pytest.mark.parametrize(
    "expression",
    [
        "Path('made').write_text('x') and Path('made').rename('moved').read_text()",
        "open('/dev/null', 'w').write('x') and 'x'",
        "__import__('email.message') and 'x'",
    ],
)
def test_the_kernel_allows_what_a_script_needs(expression, tmp_path):
    assert confined(expression, tmp_path) == "x"


def test_it_is_said_whether_the_kernel_held_the_processes(monkeypatch):
    monkeypatch.setattr(audit_confinement, "landlock_version", lambda: 5)
    assert "held by the kernel, too (Landlock 5)" in describe(True)
    assert describe(False).startswith("not held by the kernel")
    # A process may say so of itself where the kernel cannot.
    monkeypatch.setattr(audit_confinement, "landlock_version", lambda: 0)
    assert describe(True) == describe(False)


def test_rules_stand_for_all_but_what_is_forbidden(tmp_path):
    for name in ("one/deep", "one/other", "two"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "one/deep")
    found = outside_of([tmp_path / "one/deep"], tmp_path)
    assert found == [tmp_path / "one/other", tmp_path / "two"]
