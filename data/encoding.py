"""Whether a tokenizer made these shards: their documents, decoded, must encode to their ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scan import Pieces
from shards import BOS_ID, read_shard

# Documents that are encoded again: so many of each shard, and so many of all shards together.
SHARD_DOCUMENTS = 8
SAMPLE_DOCUMENTS = 200
# Tokens at the beginning of a shard that they are taken from.
SAMPLE_TOKENS = 1 << 18
# Tokens before a cut, which may be others than those of the whole document.
CUT_TOKENS = 64


@dataclass
class Sample:
    """What became of documents of one shard that were encoded again.

    `changed` of them have other ids; `first` says where the first of these differs, and how.
    """

    name: str
    documents: int = 0
    changed: int = 0
    first: str = ""

    @property
    def is_foreign(self) -> bool:
        """Whether most documents changed: normalizing changes few of them."""
        return self.changed > 1 and 2 * self.changed > self.documents


def encode_again(paths: list[Path], pieces: Pieces) -> list[Sample]:
    """Decode some documents of each shard and encode them again."""
    most = max(SHARD_DOCUMENTS, SAMPLE_DOCUMENTS // len(paths))
    return [sample_of(path, most, pieces) for path in paths]


def sample_of(path: Path, most: int, pieces: Pieces) -> Sample:
    """Decode the first documents that begin in a shard, and encode them again."""
    tokens = np.asarray(read_shard(path)[:SAMPLE_TOKENS])
    # A shard that is the middle of a document has none.
    begins = np.flatnonzero(tokens == BOS_ID).tolist()
    ends = [*begins, len(tokens)][1:]
    sample = Sample(path.name)
    for begin, end in zip(begins[:most], ends[:most], strict=True):
        # Places of the tokens that stand for text.
        places = begin + np.flatnonzero(~pieces.silent[tokens[begin:end]])
        difference = first_difference(tokens[places].tolist(), pieces)
        sample.documents += 1
        if difference is None:
            continue
        at, how = difference
        place = int(places[at]) if at < len(places) else end
        # The document may go on behind the last token that was read.
        if end == len(tokens) and place >= end - CUT_TOKENS:
            continue
        sample.changed += 1
        if not sample.first:
            sample.first = f"{path.name}, token {place:,}: {how}"
    return sample


def first_difference(ids: list[int], pieces: Pieces) -> tuple[int, str] | None:
    """Return where a document's ids, decoded and encoded again, differ, and how; None if nowhere.

    The place is the number of ids if all of them come back, with more behind them.
    """
    tokenizer = pieces.tokenizer
    (again,) = tokenizer.encode(tokenizer.decode([ids]))
    if again == ids:
        return None
    place = 0
    while place < min(len(ids), len(again)) and ids[place] == again[place]:
        place += 1
    names = []
    for side in (ids, again):
        names.append(repr(tokenizer.piece(side[place])) if place < len(side) else "the end")
    return place, f"{names[0]} there, {names[1]} by {pieces.path.name}"
