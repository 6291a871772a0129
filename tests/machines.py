"""Processes as they run on machines that lack packages, modules or functions which this one has."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from conftest import ROOT

HIDING = Path(__file__).parent / "hiding"
# What the standard library has on Linux alone, or not on Windows.
NOT_ON_WINDOWS = ("fcntl", "grp", "pwd", "resource", "termios")
NOT_ON_WINDOWS_FUNCTIONS = (
    "os.fork",
    "os.getpgid",
    "os.killpg",
    "os.posix_fallocate",
    "os.sched_getaffinity",
    "os.sched_setaffinity",
    "signal.SIGHUP",
    "signal.SIGKILL",
    "signal.pthread_sigmask",
)


def run_python(
    *arguments: object,
    modules: Iterable[str] = (),
    attributes: Iterable[str] = (),
    folder: Path = ROOT,
    **options: object,
) -> subprocess.CompletedProcess:
    """Run Python in a folder, without these modules and attributes; its output is text.

    What it starts lacks them too. Modules of data/ and records/ can be imported.
    """
    path = [str(HIDING), str(ROOT / "data"), str(ROOT / "records")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "HIDDEN_MODULES": " ".join(modules),
        "HIDDEN_ATTRIBUTES": " ".join(attributes),
    }
    command = [sys.executable, *(str(argument) for argument in arguments)]
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, **options
    )
