"""SentencePiece tokenizers: opened, checked, trained, and used to encode documents."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece
from tqdm import tqdm

from commands import BadInput
from shards import BOS_ID, MOST_PIECES

# Bytes of text that a tokenizer is trained on at most.
SAMPLE_BYTES = 100_000_000
# At least the special pieces, 256 bytes, the characters and some merges.
VOCABULARY_SIZES = range(512, MOST_PIECES + 1)
TRAINING_OPTIONS = {
    "model_type": "bpe",
    "hard_vocab_limit": True,
    "pad_id": 0,
    "bos_id": BOS_ID,
    "eos_id": 2,
    "unk_id": 3,
    # These five neither change nor add to any text.
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "user_defined_symbols": ["\n"],
    # Pieces of several spaces: 6% fewer tokens on indented text.
    "allow_whitespace_only_pieces": True,
    # Of the text's characters; the rest go through their bytes.
    "character_coverage": 0.9995,
    "num_threads": 1,
    "minloglevel": 2,
}
# SentencePiece drops lines over a limit, which must be at least so many bytes.
LEAST_LINE_LIMIT = 10


def open_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Read a tokenizer from a file; BadInput if it is not a SentencePiece model."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError, UnicodeError) as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"{path}: not a SentencePiece model ({reason})") from error


def lacks(tokenizer: sentencepiece.SentencePieceProcessor) -> list[str]:
    """List what a tokenizer lacks.

    Shards of any text need it, and so does train_gpt.py, which counts bytes by the pieces.
    """
    size = tokenizer.vocab_size()
    byte_pieces = sum(tokenizer.is_byte(piece) for piece in range(size))
    missing = []
    if tokenizer.bos_id() != BOS_ID:
        missing.append(f"BOS with id {BOS_ID}")
    if tokenizer.piece_to_id("▁") == tokenizer.unk_id():
        missing.append("a piece ▁ of its own (a space would count as three bytes, #897)")
    if byte_pieces != 256:
        missing.append("a piece for each byte")
    if size > MOST_PIECES:
        missing.append(f"{MOST_PIECES:,} pieces or less")
    return missing


# ---- Training
def train_tokenizer(vocabulary_size: int, description: str, documents: Iterable[bytes]) -> bytes:
    """Train a byte-pair tokenizer and return SentencePiece's serialized model.

    The documents are read twice. The progress bar shows `description`. BadInput, with what is
    possible, if the text does not allow for so many pieces.
    """
    lines = 0
    longest = LEAST_LINE_LIMIT
    for line in sample_lines(documents):
        lines += 1
        longest = max(longest, len(line))
    model = io.BytesIO()
    raised: list[BaseException] = []
    bar = tqdm(sample_lines(documents), desc=description, total=lines, unit=" lines")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=noting(bar, raised),
            model_writer=model,
            vocab_size=vocabulary_size,
            max_sentence_length=longest,
            **TRAINING_OPTIONS,
        )
    except (RuntimeError, OSError) as error:
        if raised:
            raise raised[0] from None
        raise BadInput(
            f"cannot train a tokenizer of {vocabulary_size} pieces: {explained(str(error))}"
        ) from error
    return model.getvalue()


def sample_lines(documents: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines that a tokenizer is trained on, without line ends, which are a piece each."""
    left = SAMPLE_BYTES
    for text in documents:
        left -= len(text)
        if left < 0:
            return
        for line in text.split(b"\n"):
            if line:
                yield line


def noting(items: Iterable, raised: list[BaseException]) -> Iterator:
    """Yield the items, and note what is raised: SentencePiece makes a RuntimeError of it."""
    try:
        yield from items
    except (Exception, KeyboardInterrupt) as error:
        raised.append(error)
        raise


def explained(reason: str) -> str:
    """Say in one line why SentencePiece trains no tokenizer, and what to do."""
    reason = " ".join(reason.split())
    too_high = re.search(r"too high.*<= (\d+)", reason)
    if too_high:
        least = VOCABULARY_SIZES.start
        return (
            f"this text has enough for at most {too_high[1]} (the least is {least}): give more "
            "text or a smaller --vocab-size"
        )
    too_small = re.search(r"smaller than required_chars.* vs (\d+)", reason)
    if too_small:
        return f"the characters of this text alone need {too_small[1]}: give a larger --vocab-size"
    return reason


# ---- Encoding
@functools.lru_cache(maxsize=1)
def loaded(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Read a tokenizer once in each process."""
    return open_tokenizer(path)


def encode(model: Path, texts: list[bytes]) -> np.ndarray:
    """Encode documents, each behind a BOS, into one array of little-endian uint16 (tokens,).

    BadInput, with the document's beginning, if one does not decode to itself.
    """
    tokenizer = loaded(model)
    encoded = tokenizer.encode(texts, num_threads=1)
    decoded = tokenizer.decode(encoded, num_threads=1)
    for text, back in zip(texts, decoded, strict=True):
        if back.encode() != text:
            raise BadInput(
                f"the tokenizer changes the document that begins {text.decode()[:60]!r}: leave "
                "--tokenizer out to train one that changes none"
            )
    return np.concatenate([np.array([BOS_ID, *tokens], dtype="<u2") for tokens in encoded])
