"""The auditor's own view of the validation text: its tokens, its bytes, and the sliding windows.

Nothing here comes from the audited script. Bytes are those of the text that SentencePiece decodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece

from commands import BadInput
from shards import BOS_ID, read_shard

VALIDATION = "*_val_*.bin"
# Documents that are decoded in one call.
DOCUMENTS = 1000
# What decoding makes of bytes that are no UTF-8.
REPLACEMENT = "\ufffd"


def read_validation(folder: Path) -> np.ndarray:
    """Read the whole validation split in the order of the files' names: uint16 (tokens,)."""
    return np.concatenate([read_shard(path) for path in sorted(folder.glob(VALIDATION))])


def take_validation(folder: Path) -> np.ndarray:
    """Read the validation split and remove its files: no script that runs later can read them."""
    tokens = read_validation(folder)
    remove_validation(folder)
    return tokens


def remove_validation(folder: Path) -> None:
    """Remove the files of the validation split, if there are any."""
    for path in folder.glob(VALIDATION):
        path.unlink()


class Text:
    """The text behind tokens, as SentencePiece decodes it document by document, and its bytes."""

    def __init__(self, path: Path):
        try:
            self.tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise BadInput(f"{path} is no SentencePiece model: check --tokenizer") from error
        self.size = self.tokenizer.vocab_size()
        # Pieces that stand for no text, bool (size,): BOS, padding and the like.
        self.silent = np.array([self.is_silent(piece) for piece in range(self.size)])
        # Bytes of each piece, int64 (size,), at the beginning of a document and behind another
        # piece: decoding may drop a space that begins a document.
        self.bytes_first = self.bytes_behind([])
        self.bytes_inside = self.bytes_behind([self.letter()])

    def is_silent(self, piece: int) -> bool:
        """Whether a piece stands for no text."""
        kinds = (self.tokenizer.is_control, self.tokenizer.is_unknown, self.tokenizer.is_unused)
        return any(kind(piece) for kind in kinds)

    def letter(self) -> int:
        """Return a piece that decodes to one letter or digit."""
        for piece in range(self.size):
            text = self.tokenizer.decode([piece])
            if len(text) == 1 and text.isalnum():
                return piece
        raise BadInput("the tokenizer has no piece of one letter or digit: check --tokenizer")

    def bytes_behind(self, before: list[int]) -> np.ndarray:
        """Return the bytes of each piece behind these pieces of one byte each: int64 (size,)."""
        found = np.zeros(self.size, dtype=np.int64)
        for piece in range(self.size):
            if self.silent[piece]:
                continue
            if self.tokenizer.is_byte(piece):
                found[piece] = 1
                continue
            text = self.tokenizer.decode([*before, piece])
            found[piece] = len(text.encode()) - len(before)
        return found

    def bytes_of_targets(self, tokens: np.ndarray) -> np.ndarray:
        """Return the bytes of text of each of tokens[1:], int64, as decoding each piece says."""
        before = tokens[:-1]
        targets = tokens[1:]
        first = self.silent[before]
        return np.where(first, self.bytes_first[targets], self.bytes_inside[targets])

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
