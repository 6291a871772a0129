"""What a script must not do in the auditor's processes, each thing in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
    "a way up": ("list(Path('..').iterdir())", "os.listdir"),
}


def guarded(statement: str, tmp_path: Path) -> tuple[list[str], bool]:
    """What the guard noted, and whether it raised, when a statement ran in a folder of its own."""
    data = tmp_path / "data"
    work = tmp_path / "work" / "inspect-1"
    data.mkdir()
    work.mkdir(parents=True)
    (data / "x_val.bin").write_text("text")
    (work / "mine").write_text("mine")
    statement = statement.replace("DATA", str(data)).replace("LEFT", str(tmp_path / "left"))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(data), str(work.parent)],
        input=statement,
        cwd=work,
        env=dict(PYTHONPATH=str(ROOT / "records"), PYTHONDONTWRITEBYTECODE="1"),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert (data / "x_val.bin").read_text() == "text" and not (tmp_path / "left").exists()
    stopped, raised = json.loads(done.stdout)
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
