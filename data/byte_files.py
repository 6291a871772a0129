"""Byte files: the bytes of the original text behind each token of the validation split.

The public export with operators for letter case has them (openai/parameter-golf #1729). Beside the
validation shard NAME_val_000000.bin lies NAME_val_bytes_000000.bin, with the same header and one
uint16 for each token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from commands import BadInput
from scan import Pieces, Sizes, stream
from shards import NAME, byte_files_of, read_shard

# A tokenizer that normalizes changes some text, which byte files count as it was: of so many tokens
# the bytes may be others than those of the pieces, and the sums may differ by so much.
MOST_OTHER_SIZES = 0.02
MOST_OTHER_BYTES = 0.005


def match_byte_files(folder: Path, shards: list[Path]) -> list[Path]:
    """Return the byte file of each validation shard, in their order; empty if there are none.

    BadInput if some shards have none, or if one belongs to no shard.
    """
    there = byte_files_of(folder)
    if not there:
        return []
    due = []
    for path in shards:
        name, split, number = NAME.fullmatch(path.name).groups()
        due.append(path.with_name(f"{name}_{split}_bytes_{number}.bin"))
    missing = [path for path in due if path not in there]
    if missing:
        raise BadInput(
            f"{missing[0].name} is not there ({len(due) - len(missing)} byte files for {len(due)} "
            "validation shards): get it, or remove all of them"
        )
    stray = [path for path in there if path not in due]
    if stray:
        raise BadInput(f"{stray[0].name} belongs to no validation shard: remove it")
    return due


@dataclass
class Comparison:
    """What byte files say beside what the pieces say.

    `tokens` were compared; `other` of them have other bytes; `first` is where the first of them is.
    `bytes` is the sum of the files, `by_pieces` that of the pieces.
    """

    tokens: int = 0
    other: int = 0
    first: str = ""
    bytes: int = 0
    by_pieces: int = 0

    @property
    def agrees(self) -> bool:
        """Whether the differences are no more than normalizing makes."""
        apart = abs(self.bytes - self.by_pieces)
        return (
            self.other <= MOST_OTHER_SIZES * self.tokens
            and apart <= MOST_OTHER_BYTES * self.by_pieces
        )

    def __str__(self) -> str:
        text = f"{self.bytes:,} bytes, {self.by_pieces:,} by the pieces"
        if self.other:
            share = self.other / self.tokens
            text += f"; {self.other:,} tokens ({share:.2%}) have others, first {self.first}"
        return text


def compare_byte_files(
    byte_files: list[Path], shards: list[Path], pieces: Pieces, bar: tqdm
) -> Comparison:
    """Compare the byte files of validation shards with the bytes of the pieces.

    BadInput if one has not as many sizes as its shard has tokens, or bytes where there is no text.
    """
    found = Comparison()
    sizes = Sizes(pieces)
    for byte_file, path in zip(byte_files, shards, strict=True):
        stated = read_shard(byte_file)
        tokens = len(read_shard(path))
        if len(stated) != tokens:
            raise BadInput(
                f"{byte_file.name} has {len(stated):,} sizes for {tokens:,} tokens: not of this "
                "shard, get it again"
            )
        start = 0
        for part in stream([path], bar):
            theirs = stated[start : start + len(part)].astype(np.int64)
            add_part(found, part, theirs, sizes, f"{byte_file.name}, token", start)
            start += len(part)
    return found


def add_part(
    found: Comparison, part: np.ndarray, theirs: np.ndarray, sizes: Sizes, place: str, start: int
) -> None:
    """Compare a part of the stream, uint16 (tokens,), with its sizes in a byte file."""
    pieces = sizes.pieces
    ours = sizes.read(part)
    operators = pieces.operators[part] & (ours == 0)
    loud = np.flatnonzero((pieces.silent[part] | operators) & (theirs != 0))
    if len(loud):
        first = loud[0]
        raise BadInput(
            f"{place} {start + first:,}: {theirs[first]} bytes behind "
            f"{pieces.tokenizer.piece(int(part[first]))!r}, which stands for none: not of this "
            "shard, get it again"
        )
    other = np.flatnonzero(theirs != ours)
    if len(other) and not found.first:
        first = other[0]
        found.first = f"{place} {start + first:,}: {theirs[first]}, by the pieces {ours[first]}"
    found.tokens += len(part)
    found.other += len(other)
    found.bytes += int(theirs.sum())
    found.by_pieces += int(ours.sum())
