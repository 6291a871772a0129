"""Which cores a process may use."""

from __future__ import annotations

import os


def usable_cores() -> list[int]:
    """Return the cores that this process may use; all of them where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
