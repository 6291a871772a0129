"""The auditor's own view of the validation text: its tokens, bytes, sliding windows, documents.

Nothing here comes from the audited script. Bytes are those of the text that SentencePiece decodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from case_operators import ESCAPE
from commands import BadInput
from shards import BOS_ID, byte_files_of, read_shard, shards_of
from tokenizer import open_tokenizer

# Windows of a forward pass, wherever what is computed shall be what is scored.
BATCH = 8
# Targets of a window whose nats are told together, and that are decoded together.
PART = 4
# Documents that are decoded in one call.
DOCUMENTS = 1000
# What decoding makes of bytes that are no UTF-8.
REPLACEMENT = "\ufffd"


def read_validation(folder: Path) -> np.ndarray:
    """Read the whole validation split in the order of the files' names: uint16 (tokens,)."""
    return np.concatenate([read_shard(path) for path in shards_of(folder, "val")])


def read_byte_files(folder: Path) -> np.ndarray | None:
    """Read the bytes behind each token from the byte files: uint16 (tokens,); None if none are."""
    files = byte_files_of(folder)
    if not files:
        return None
    return np.concatenate([read_shard(path) for path in files])


def take_validation(folder: Path) -> np.ndarray:
    """Read the validation split and remove its files: no script that runs later can read them."""
    tokens = read_validation(folder)
    remove_validation(folder)
    return tokens


def remove_validation(folder: Path) -> None:
    """Remove the files of the validation split, if there are any."""
    for path in shards_of(folder, "val"):
        path.unlink()


class Text:
    """The text behind tokens, as it is decoded document by document, and its bytes.

    Operators for letter case are undone.
    """

    def __init__(self, path: Path):
        try:
            self.tokenizer = open_tokenizer(path)
        except BadInput as error:
            raise BadInput(f"{path} is no SentencePiece model: check --tokenizer") from error
        self.size = self.tokenizer.size
        pieces = range(self.size)
        # Pieces that stand for no text, bool (size,): BOS, padding and the like.
        self.silent = np.array([self.tokenizer.is_silent(piece) for piece in pieces])
        self.operators = np.array([self.tokenizer.is_operator(piece) for piece in pieces])
        # Bytes of each piece, int64 (size,), at the beginning of a document and behind another
        # piece: decoding may drop a space that begins a document.
        self.bytes_first = self.bytes_behind([])
        self.bytes_inside = self.bytes_behind([self.letter()])

    def letter(self) -> int:
        """Return a piece that decodes to one letter or digit."""
        for piece in range(self.size):
            (text,) = self.tokenizer.decode([[] if self.silent[piece] else [piece]])
            if len(text) == 1 and text.isalnum():
                return piece
        raise BadInput("the tokenizer has no piece of one letter or digit: check --tokenizer")

    def bytes_behind(self, before: list[int]) -> np.ndarray:
        """Return the bytes of each piece behind these pieces of one byte each: int64 (size,)."""
        found = np.zeros(self.size, dtype=np.int64)
        for piece in range(self.size):
            if self.silent[piece] or self.operators[piece]:
                continue
            if self.tokenizer.is_byte(piece):
                found[piece] = 1
                continue
            (text,) = self.tokenizer.decode([[*before, piece]])
            found[piece] = len(text.encode()) - len(before)
        return found

    def bytes_of_targets(self, tokens: np.ndarray) -> np.ndarray:
        """Return the bytes of text of each of tokens[1:], int64, as decoding each piece says.

        An operator is none, unless the one before it says that it stands for itself.
        """
        before = tokens[:-1]
        targets = tokens[1:]
        first = self.silent[before]
        sizes = np.where(first, self.bytes_first[targets], self.bytes_inside[targets])
        # Where an operator was last found to stand for itself.
        literal = -1
        for place in np.flatnonzero(before == self.tokenizer.escape):
            if literal != place and self.operators[targets[place]]:
                sizes[place] = len(ESCAPE.encode())
                literal = place + 1
        return sizes

    def documents(self, tokens: np.ndarray) -> Iterator[list[list[int]]]:
        """Yield the pieces of each document that stand for text, many documents at once."""
        starts = np.flatnonzero(tokens == BOS_ID).tolist()
        ends = [*starts[1:], len(tokens)]
        for at in range(0, len(starts), DOCUMENTS):
            pieces = []
            some = slice(at, at + DOCUMENTS)
            for start, end in zip(starts[some], ends[some], strict=True):
                part = tokens[start:end]
                pieces.append(part[~self.silent[part]].tolist())
            yield pieces

    def decode(self, tokens: np.ndarray) -> bytes:
        """Return the text of all documents, one after the other, in UTF-8."""
        texts = []
        for documents in self.documents(tokens):
            texts.extend(self.tokenizer.decode(documents))
        return "".join(texts).encode()

    def count(self, tokens: np.ndarray) -> int:
        """Return the bytes of the decoded text.

        Byte pieces that are no UTF-8 decode to U+FFFD, three bytes each. A document with such is
        counted by its pieces, a byte piece as one byte.
        """
        total = 0
        for documents in self.documents(tokens):
            texts = self.tokenizer.decode(documents)
            for pieces, text in zip(documents, texts, strict=True):
                size = len(text.encode())
                if REPLACEMENT in text:
                    by_pieces = self.bytes_of_targets(np.array([BOS_ID, *pieces]))
                    size = int(by_pieces.sum())
                total += size
        return total


def sliding_windows(targets: int, window: int, stride: int) -> np.ndarray:
    """Return the windows of the sliding evaluation: int64 (windows, 3).

    A row is the first token, the first target that is scored, and the end of the targets. Target i
    is token i + 1. The first window scores all of its targets. Each later one adds `stride` targets
    and ends with its last target; the last one ends with the text.
    """
    later = np.arange(window + stride, targets + stride, stride)
    ends = np.append(min(window, targets), later.clip(max=targets))
    starts = np.maximum(ends - window, 0)
    firsts = np.append(0, ends[:-1])
    return np.stack([starts, firsts, ends], axis=1)


def drawn_windows(targets: int, window: int, stride: int, seed: int) -> np.ndarray:
    """Return all rows of sliding_windows in the order in which they are scored at random."""
    windows = sliding_windows(targets, window, stride)
    return windows[np.random.default_rng((seed, 7)).permutation(len(windows))]


def split_documents(tokens: np.ndarray) -> np.ndarray:
    """Return first and end target of each document that has targets: int64 (documents, 2).

    A document is a BOS and what is behind it. Target i is token i + 1: the tokens of a document
    behind its BOS, and the BOS of the next one.
    """
    starts = np.flatnonzero(tokens == BOS_ID)
    ends = np.append(starts[1:], len(tokens) - 1)
    documents = np.stack([starts, ends], axis=1)
    return documents[ends > starts]


def drawn_documents(tokens: np.ndarray, seed: int) -> np.ndarray:
    """Return all rows of split_documents in the order in which they are scored at random."""
    documents = split_documents(tokens)
    return documents[np.random.default_rng((seed, 8)).permutation(len(documents))]


def chunks_of(documents: np.ndarray, chunk: int) -> np.ndarray:
    """Return how many chunks each document has: int64 (documents,)."""
    return -(-(documents[:, 1] - documents[:, 0]) // chunk)
