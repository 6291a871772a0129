"""Has the kernel hold one of the auditor's processes in its folder: Landlock, of Linux.

The hook in audit_guard.py sees what Python does. Libraries open files without it, by their own
code, and by ways that do not say where they lead. What the kernel denies, it denies to all of them.
"""

from __future__ import annotations

import ctypes
import json
import os
import site
import struct
import sys
from pathlib import Path

# System calls, the same on all machines that Linux has them on (but Alpha).
CREATE_RULESET = 444
ADD_RULE = 445
RESTRICT_SELF = 446
PR_SET_NO_NEW_PRIVS = 38
GET_VERSION = 1
PATH_BENEATH = 1
# The oldest version that lets files be moved between the folders of a process's own.
OLDEST_VERSION = 2
# Rights to files and folders, as bits in the order of linux/landlock.h.
EXECUTE = 1 << 0
WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_FOLDER = 1 << 3
TRUNCATE = 1 << 14
READ = EXECUTE | READ_FILE | READ_FOLDER
# Those that each version knows; and those that a file can have, and no folder.
KNOWN = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE
# Binding and connecting TCP, from version 4 on; sockets without a file and signals, from 6 on.
CONNECTIONS = 0b11
OUT_OF_REACH = 0b11


def landlock_version() -> int:
    """Return the version of Landlock that this kernel has; 0 if it has none."""
    if sys.platform != "linux":
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    return max(0, libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), GET_VERSION))


def confine_worker() -> bool:
    """Confine one of the auditor's processes, in its folder, as its job says.

    Return whether the kernel holds it there.
    """
    job = json.loads(Path("job.json").read_text(encoding="utf-8"))
    return bool(job["forbidden"]) and confine(job["forbidden"])


def describe(held: bool) -> str:
    """Say whether the kernel held a process, as that says itself, and as the kernel can."""
    version = landlock_version()
    if held and version >= OLDEST_VERSION:
        return f"held by the kernel, too (Landlock {version})"
    return "not held by the kernel: what libraries read is not seen"


def confine(forbidden: list[str]) -> bool:
    """From now on this process reads nothing in the forbidden folders, and changes nothing outside.

    It may change the current folder, which may lie in a forbidden one, and read Python's packages.
    Return whether the kernel can do that. Threads that run already are not held.
    """
    version = landlock_version()
    if version < OLDEST_VERSION:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    rights = KNOWN[min(version, max(KNOWN))]
    # What is denied unless a rule allows it. A kernel takes no more fields than it knows.
    denied = [rights]
    if version >= 4:
        denied.append(CONNECTIONS)
    if version >= 6:
        denied.append(OUT_OF_REACH)
    attributes = struct.pack(f"={len(denied)}Q", *denied)
    ruleset = libc.syscall(CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return False
    for path in outside_of([Path(each).resolve() for each in forbidden]):
        allow(libc, ruleset, path, READ)
    packages = [sys.prefix, sys.base_prefix, *site.getsitepackages(), site.getusersitepackages()]
    for path in packages:
        allow(libc, ruleset, Path(path), READ)
    allow(libc, ruleset, Path(os.devnull), READ | WRITE_FILE)
    allow(libc, ruleset, Path.cwd(), rights)
    held = libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    held = held and libc.syscall(RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return held


def allow(libc: ctypes.CDLL, ruleset: int, path: Path, granted: int) -> None:
    """Add a rule to a ruleset: rights to a file, or to all that is in a folder, if it is there."""
    try:
        file = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    if not path.is_dir():
        granted &= OF_FILES
    rule = struct.pack("=Qi", granted, file)
    libc.syscall(ADD_RULE, ruleset, PATH_BENEATH, rule, 0)
    os.close(file)


def outside_of(forbidden: list[Path], folder: Path = Path("/")) -> list[Path]:
    """Return files and folders that together are all in a folder but what is forbidden."""
    if folder in forbidden:
        return []
    if not any(folder in path.parents for path in forbidden):
        return [folder]
    found = []
    try:
        inside = sorted(folder.iterdir())
    except OSError:
        return []
    for path in inside:
        # A link leads to what has its own rule.
        if not path.is_symlink():
            found += outside_of(forbidden, path)
    return found
