"""The field's token shards.

A shard is 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros), then the
tokens as uint16. Every document begins with BOS.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from commands import BadInput

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
BOS_ID = 1
# A uint16 can number so many pieces of a tokenizer.
MOST_PIECES = 65_536
TOKENS_PER_SHARD = 100_000_000
# A byte file, NAME_val_bytes_000000.bin, is no shard.
NAME = re.compile(r"(.+)_(train|val)_(\d+)\.bin")


def shards_of(folder: Path, split: str) -> list[Path]:
    """Return the shards of a split in the order of names and numbers.

    BadInput if two have one name and number, as x_val_0.bin and x_val_000000.bin.
    """
    found: dict[tuple[str, int], Path] = {}
    for path in folder.glob(f"*_{split}_*.bin"):
        match = NAME.fullmatch(path.name)
        if not match or match[2] != split:
            continue
        key = match[1], int(match[3])
        if key in found:
            raise BadInput(
                f"{path}: {found[key].name} has the same number: remove the one that is not of "
                "this data set"
            )
        found[key] = path
    return [found[key] for key in sorted(found)]


def byte_files_of(folder: Path) -> list[Path]:
    """Return the byte files of the validation split in the order of their names."""
    return sorted(folder.glob("*_val_bytes_*.bin"))


def header(tokens: int) -> bytes:
    """Return the header of a shard with this many tokens."""
    numbers = np.zeros(HEADER_INTS, dtype="<i4")
    numbers[:3] = MAGIC, VERSION, tokens
    return numbers.tobytes()


def count_tokens(path: Path) -> int:
    """Return the number of tokens in a shard's header; BadInput unless its size fits to that."""
    try:
        size = path.stat().st_size
        numbers = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from error
    if size < HEADER_BYTES or tuple(numbers[:2]) != (MAGIC, VERSION):
        raise BadInput(
            f"{path}: no token shard: magic {MAGIC} and version {VERSION} are not at its beginning"
        )
    count = int(numbers[2])
    due = HEADER_BYTES + 2 * count
    if size != due:
        raise BadInput(
            f"{path}: {count:,} tokens in its header, which need {due:,} bytes, but it has "
            f"{size:,}: get or make it again"
        )
    return count


def read_shard(path: Path) -> np.ndarray:
    """Map the tokens of a shard into memory, uint16 (count,); BadInput as from count_tokens."""
    if count_tokens(path) == 0:
        # A file of nothing but a header cannot be mapped from its end on.
        return np.empty(0, "<u2")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)


class ShardWriter:
    """Writes a stream of tokens to name_000000.bin, name_000001.bin and so on.

    Each shard has TOKENS_PER_SHARD tokens, the last one the rest. close() completes them.
    """

    def __init__(self, folder: Path, name: str):
        self.folder = folder
        self.name = name
        # The tokens of each shard.
        self.counts: list[int] = []

    @property
    def tokens(self) -> int:
        """The tokens of all shards together."""
        return sum(self.counts)

    def path(self, index: int) -> Path:
        """The place of a shard."""
        return self.folder / f"{self.name}_{index:06d}.bin"

    def add(self, tokens: np.ndarray) -> None:
        """Append tokens, little-endian uint16 (count,)."""
        while len(tokens):
            if not self.counts or self.counts[-1] == TOKENS_PER_SHARD:
                self.path(len(self.counts)).write_bytes(header(0))
                self.counts.append(0)
            last = len(self.counts) - 1
            part = tokens[: TOKENS_PER_SHARD - self.counts[last]]
            with open(self.path(last), "ab") as file:
                file.write(part.data)
            self.counts[last] += len(part)
            tokens = tokens[len(part) :]

    def close(self) -> None:
        """Write the number of tokens into each shard's header: only now it is known."""
        for index, count in enumerate(self.counts):
            with open(self.path(index), "r+b") as file:
                file.write(header(count))
