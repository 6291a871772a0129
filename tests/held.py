"""What stands for a function of data/ in processes that a test stops or kills at a known moment."""

from __future__ import annotations

import os
import time
from pathlib import Path


def encode(model: Path, texts: list[bytes]) -> None:
    """Make the file that HELD names, then go on for ever."""
    Path(os.environ["HELD"]).touch()
    while True:
        time.sleep(60)
