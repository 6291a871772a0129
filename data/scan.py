"""What the shards of a split hold, read piece by piece: tokens, documents and bytes of text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from case_operators import ESCAPE
from shards import BOS_ID, MOST_PIECES, read_shard
from tokenizer import open_tokenizer

# Tokens of a split that are in memory at once.
PIECE_TOKENS = 1 << 22
HASH_BYTES = 16


@dataclass
class Counts:
    """What a split holds; its bytes are those of the text, by the tokenizer's pieces."""

    shards: int
    tokens: int
    documents: int
    bytes: int

    @property
    def bytes_per_token(self) -> float:
        """The ratio of the two, 0 for a split without tokens."""
        return self.bytes / max(1, self.tokens)


class Pieces:
    """A tokenizer and the bytes of text behind each id, which bits per byte are counted with.

    All arrays are (MOST_PIECES,): `bytes` int64; `begins`, whether a document begins with it;
    `silent`, whether it stands for no text; `stripped`, whether its first space is not part of the
    text where a document begins with it; `operators`, whether it is one for letter case.
    """

    def __init__(self, path: Path):
        self.path = path
        self.tokenizer = open_tokenizer(path)
        self.size = self.tokenizer.size
        self.bytes = np.zeros(MOST_PIECES, np.int64)
        self.begins = np.zeros(MOST_PIECES, bool)
        self.silent = np.zeros(MOST_PIECES, bool)
        self.stripped = np.zeros(MOST_PIECES, bool)
        self.operators = np.zeros(MOST_PIECES, bool)
        strips = self.tokenizer.strips_first_space()
        for piece in range(min(self.size, MOST_PIECES)):
            self.add(piece, strips)

    def add(self, piece: int, strips: bool) -> None:
        """Note what is known of a piece; `strips`: decoding drops a document's first space."""
        text = self.tokenizer.piece(piece)
        self.begins[piece] = self.tokenizer.is_control(piece)
        self.silent[piece] = self.tokenizer.is_silent(piece)
        self.stripped[piece] = strips and text.startswith("▁")
        self.operators[piece] = self.tokenizer.is_operator(piece)
        if self.silent[piece] or self.operators[piece]:
            # An operator that is escaped stands for itself: see Escapes.
            return
        if self.tokenizer.is_byte(piece):
            self.bytes[piece] = 1
        else:
            self.bytes[piece] = len(text.replace("▁", " ").encode())


class Escapes:
    """Finds the operators that stand in the text itself, each behind an ESCAPE.

    The stream is read part by part, which may begin anywhere.
    """

    def __init__(self, pieces: Pieces):
        self.escape = pieces.tokenizer.escape
        self.operators = pieces.operators
        # Whether the last part ended with an ESCAPE that acts on what follows.
        self.open = False

    def literals(self, part: np.ndarray) -> list[int]:
        """Return where in the next part of the stream, uint16 (tokens,), such operators are."""
        if self.escape is None:
            return []
        found = []
        # Where an ESCAPE acts.
        target = 0 if self.open else -1
        for place in np.flatnonzero(self.matters(part)):
            if place == target:
                if self.operators[part[place]]:
                    found.append(int(place))
            elif part[place] == self.escape:
                target = place + 1
        self.open = target == len(part)
        return found

    def matters(self, part: np.ndarray) -> np.ndarray:
        """Return which tokens are an ESCAPE or stand behind a token that may be: bool (tokens,)."""
        is_escape = part == self.escape
        behind = np.concatenate([[self.open], is_escape[:-1]])
        return is_escape | behind


class Sizes:
    """Counts the bytes of text behind each token of a stream that is read part by part."""

    def __init__(self, pieces: Pieces):
        self.pieces = pieces
        self.escapes = Escapes(pieces)
        # The last token of the part before, if there is one.
        self.before = np.empty(0, np.uint16)

    def read(self, part: np.ndarray) -> np.ndarray:
        """Return the bytes behind the tokens of the next part: int64 (tokens,)."""
        sizes = self.pieces.bytes[part]
        places, more = self.exceptions(part)
        sizes[places] += more
        return sizes

    def exceptions(self, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where the next part has other bytes than the pieces alone, and how many more."""
        literal = np.array(self.escapes.literals(part), np.int64)
        dropped = np.empty(0, np.int64)
        if self.pieces.stripped.any():
            # A document may begin at the end of one part and go on in the next.
            joined = np.concatenate([self.before, part])
            begins = self.pieces.begins[joined[:-1]]
            dropped = np.flatnonzero(begins & self.pieces.stripped[joined[1:]])
            dropped += 1 - len(self.before)
            self.before = part[-1:].copy()
        more = np.concatenate(
            [np.full(len(literal), len(ESCAPE.encode())), np.full(len(dropped), -1)]
        )
        return np.concatenate([literal, dropped]), more


class Scan:
    """A split that was read once.

    `histogram` says how often each id occurs, int64 (MOST_PIECES,); `first` is the first id, None
    without tokens; `bytes` are those of the text.
    """

    def __init__(self, paths: list[Path], pieces: Pieces, bar: tqdm):
        self.shards = len(paths)
        self.histogram = np.zeros(MOST_PIECES, np.int64)
        self.first: int | None = None
        exceptions = 0
        sizes = Sizes(pieces)
        for part in stream(paths, bar):
            if self.first is None:
                self.first = int(part[0])
            self.histogram += np.bincount(part, minlength=MOST_PIECES)
            exceptions += int(sizes.exceptions(part)[1].sum())
        self.bytes = int(self.histogram @ pieces.bytes) + exceptions

    def counts(self) -> Counts:
        """Return what the split holds."""
        tokens = int(self.histogram.sum())
        documents = int(self.histogram[BOS_ID])
        return Counts(self.shards, tokens, documents, self.bytes)


def stream(paths: list[Path], bar: tqdm) -> Iterator[np.ndarray]:
    """Yield the tokens of a split in parts, uint16 (at most PIECE_TOKENS,), none of them empty."""
    for path in paths:
        shard = read_shard(path)
        for start in range(0, len(shard), PIECE_TOKENS):
            part = np.asarray(shard[start : start + PIECE_TOKENS])
            yield part
            bar.update(len(part))


def whole_documents(paths: list[Path], bar: tqdm) -> Iterator[list[np.ndarray]]:
    """Yield the documents of a split, each with its BOS, a list for each part of the stream.

    A document may go on in the next shard. The split begins with BOS.
    """
    # The beginning of a document whose end has not been read.
    rest: list[np.ndarray] = []
    for part in stream(paths, bar):
        begins = np.flatnonzero(part == BOS_ID)
        if len(begins) == 0:
            rest.append(part)
            continue
        last = begins[-1]
        ended = np.concatenate([*rest, part[:last]])
        rest = [part[last:]]
        if len(ended):
            yield np.split(ended, np.flatnonzero(ended == BOS_ID)[1:])
    if rest:
        yield [np.concatenate(rest)]


def hashes(documents: list[np.ndarray]) -> list[bytes]:
    """Return HASH_BYTES bytes for each document that depend on all of its tokens."""
    found = []
    for document in documents:
        found.append(hashlib.blake2b(document.data, digest_size=HASH_BYTES).digest())
    return found
