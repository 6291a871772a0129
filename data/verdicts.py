"""What a check found: one line of a table."""

from __future__ import annotations

from typing import NamedTuple


class Check(NamedTuple):
    """The verdict of a check: its name, whether it passed, and what was found on how much.

    `passed` is None for what is only said, or where nothing could be checked.
    """

    name: str
    passed: bool | None
    figure: str
