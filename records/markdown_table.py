"""Markdown for reports."""

from __future__ import annotations

from collections.abc import Iterable


def table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Return the lines of a table, and an empty one."""
    lines = []
    for row in (head, ["---"] * len(head), *rows):
        lines.append(f"| {' | '.join(row)} |")
    return [*lines, ""]
