"""The field's token shards, for the commands in this folder: 256 little-endian int32 (magic 20240520, version 1,
number of tokens, zeros), then the tokens as uint16. Every document begins with BOS."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_INTS
BOS_ID = 1


class DataError(Exception):
    """What is wrong, where and what to do, in one line: the commands print it and exit with 2."""


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """Write all of a file or nothing of it: into a file beside it, which then takes its name."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=".partial")
    try:
        with open(handle, "wb") as file:
            for part in parts:
                file.write(part)
        os.chmod(name, 0o644)  # mkstemp's are its owner's alone
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def header(tokens: int) -> bytes:
    """The header of a shard with this many tokens."""
    numbers = np.zeros(HEADER_INTS, dtype="<i4")
    numbers[:3] = MAGIC, VERSION, tokens
    return numbers.tobytes()


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write token ids, (count,) of any integer type below 65,536, as one shard: all of it or nothing."""
    write_atomically(path, header(len(tokens)), np.ascontiguousarray(tokens, dtype="<u2").data)


def count_tokens(path: Path) -> int:
    """The number of tokens in a shard, by its header; DataError unless its size is what the header says."""
    try:
        size = path.stat().st_size
        numbers = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    if size < HEADER_BYTES or tuple(numbers[:2]) != (MAGIC, VERSION):
        raise DataError(f"{path}: no token shard: magic {MAGIC} and version {VERSION} are not at its beginning")
    count = int(numbers[2])
    if size != HEADER_BYTES + 2 * count:
        raise DataError(f"{path}: {count:,} tokens in its header, which need {HEADER_BYTES + 2 * count:,} bytes, "
                        f"but it has {size:,}: get or make it again")
    return count


def read_shard(path: Path) -> np.ndarray:
    """The tokens of a shard, uint16 (count,), memory-mapped; DataError as from count_tokens."""
    count = count_tokens(path)
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES) if count else np.empty(0, "<u2")


def digest(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits, read in pieces."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()
