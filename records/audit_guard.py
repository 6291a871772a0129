"""A hook that stops what an audited script must not do in one of the auditor's processes.

It catches mistakes and ordinary tricks. A script that is written to fool it can reach round it.
"""

from __future__ import annotations

import os
import sys

# Names of the audit events of Python that stand for each kind of reach.
CONNECTIONS = {
    "socket.connect",
    "socket.bind",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "socket.gethostbyaddr",
    "socket.getnameinfo",
    "socket.sendto",
    "socket.sendmsg",
}
PROGRAMS = {
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
}
CHANGES = {
    "os.link",
    "os.symlink",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.utime",
    "os.setxattr",
    "os.removexattr",
    "os.chdir",
}
OPENINGS = {"open", "os.listdir", "os.scandir"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# Characters of a note.
LONGEST = 160


def folder_name(path: str) -> str:
    """Return a path with all links followed and a separator at its end.

    It is a prefix of whatever is in that folder.
    """
    return os.path.realpath(path) + os.sep


class Guard:
    """Stops, and notes in `stopped`, whatever reaches further than the current folder.

    Stopped are connections, other programs, reading below the forbidden folders, and changing
    anything outside of the current folder. Reading Python itself is allowed, though it may lie in a
    forbidden folder.
    """

    def __init__(self, forbidden: list[str]):
        self.stopped: list[str] = []
        self.here = folder_name(".")
        self.python = (folder_name(sys.prefix), folder_name(sys.base_prefix))
        self.forbidden = tuple(folder_name(path) for path in forbidden)

    def install(self) -> None:
        """From now on, until the process ends, stop what is not allowed."""
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        """Raise PermissionError for an event that is not allowed: Python's audit hook."""
        reach = self.reach(event, arguments)
        if reach is not None:
            self.stopped.append(reach[:LONGEST])
            raise PermissionError(f"the auditor stopped {reach[:LONGEST]}")

    def reach(self, event: str, arguments: tuple) -> str | None:
        """Say what an event does that is not allowed; None if it is allowed."""
        if event in CONNECTIONS:
            return f"{event} {arguments[-1]}"
        if event in PROGRAMS:
            # A fork has no arguments.
            return " ".join([event, *map(str, arguments[:1])])
        if event in CHANGES:
            for path in named_paths(arguments):
                if not folder_name(path).startswith(self.here):
                    return f"{event} {path}"
        if event in OPENINGS:
            for path in named_paths(arguments[:1]):
                place = folder_name(path)
                is_opened = event == "open"
                writes = is_opened and bool(arguments[2] & WRITING)
                if self.is_closed(place, is_opened, writes):
                    return f"{event} {place.rstrip(os.sep)}"
        return None

    def is_closed(self, place: str, is_opened: bool, writes: bool) -> bool:
        """Whether a file or folder may not be opened, for writing or for reading, or listed."""
        if place.startswith(self.here):
            return False
        if writes and place != folder_name(os.devnull):
            return True
        # From an open folder files can be named that the hook does not see.
        if is_opened and os.path.isdir(place):
            return True
        return place.startswith(self.forbidden) and not place.startswith(self.python)


def named_paths(arguments: tuple) -> list[str]:
    """Return the paths among the arguments of an event; a file may be named by its number, too."""
    return [os.fsdecode(path) for path in arguments if isinstance(path, (str, bytes, os.PathLike))]
