"""Tokenizers: opened, checked, trained, and used to encode documents."""

from __future__ import annotations

import functools
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import sentencepiece
from tqdm import tqdm

from case_operators import ESCAPE, OPERATORS, with_operators, without_operators
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
    # These four neither change nor add to any text.
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    # Pieces of several spaces: 6% fewer tokens on indented text.
    "allow_whitespace_only_pieces": True,
    # Of the text's characters; the rest go through their bytes.
    "character_coverage": 0.9995,
    "num_threads": 1,
    "minloglevel": 2,
}
# SentencePiece drops lines over a limit, which must be at least so many bytes.
LEAST_LINE_LIMIT = 10
# Text that any normalization but identity changes: a ligature, a fraction, a sign for a letter,
# spaces of other kinds, several of them, a tab, line ends, spaces at the end.
PROBE = "x ﬁ ½ Å \u00a0 \u3000 two  spaces\tand\r\nlines \n "
# How often a text is normalized at most: what comes out may have something to normalize in it.
MOST_PASSES = 4


# Stands for the tokenizer of shards of bytes, which has no file.
BYTE_TOKENIZER = Path("byte260")


class Tokenizer:
    """A SentencePiece model. One that has the four operators as pieces writes capitals with them.

    Attributes: `size`, the number of pieces; `case_operators`; `escape`, the id of the operator
    behind which another one is text, or None; `special`, ids for padding and unknown text by name,
    -1 if there is none.
    """

    kind = "sentencepiece"

    def __init__(self, processor: sentencepiece.SentencePieceProcessor):
        self.processor = processor
        self.size = processor.vocab_size()
        unknown = processor.unk_id()
        self.operators = [processor.piece_to_id(operator) for operator in OPERATORS]
        self.case_operators = unknown not in self.operators
        self.escape = processor.piece_to_id(ESCAPE) if self.case_operators else None
        self.special = {"padding": processor.pad_id(), "unknown": unknown}

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without BOS."""
        if self.case_operators:
            texts = [with_operators(text) for text in texts]
        return self.processor.encode(texts, num_threads=1)

    def decode(self, documents: list[list[int]]) -> list[str]:
        """Return the text of each list of ids."""
        texts = self.processor.decode(documents, num_threads=1)
        if self.case_operators:
            texts = [without_operators(text) for text in texts]
        return texts

    def piece(self, number: int) -> str:
        """Return the text of a piece, with spaces as ▁."""
        return self.processor.id_to_piece(number)

    def is_operator(self, number: int) -> bool:
        """Tell whether a piece is one of the operators for letter case."""
        return self.case_operators and number in self.operators

    def is_control(self, number: int) -> bool:
        """Tell whether a piece marks a place, as BOS does."""
        return self.processor.is_control(number)

    def is_silent(self, number: int) -> bool:
        """Tell whether a piece stands for no text."""
        others = (self.processor.is_unknown(number), self.processor.is_unused(number))
        return self.is_control(number) or any(others)

    def is_byte(self, number: int) -> bool:
        """Tell whether a piece stands for one byte."""
        return self.processor.is_byte(number)

    def normalizes(self) -> bool:
        """Tell whether it changes some text: what it decodes to is not what was encoded."""
        return self.decode(self.encode([PROBE])) != [PROBE]

    def strips_first_space(self) -> bool:
        """Tell whether decoding drops a space at the beginning of a document."""
        return self.processor.decode([self.processor.piece_to_id("▁")]) == ""

    def lacks(self) -> list[str]:
        """List what shards of any text need, and train_gpt.py, which counts bytes by the pieces."""
        missing = []
        if self.processor.bos_id() != BOS_ID:
            missing.append(f"BOS with id {BOS_ID}")
        if self.processor.piece_to_id("▁") == self.processor.unk_id():
            missing.append("a piece ▁ of its own (a space would count as three bytes, #897)")
        if sum(self.is_byte(number) for number in range(self.size)) != 256:
            missing.append("a piece for each byte")
        if self.size > MOST_PIECES:
            missing.append(f"{MOST_PIECES:,} pieces or less")
        for number in range(self.size if self.case_operators else 0):
            text = self.piece(number)
            if len(text) > 1 and not set(text).isdisjoint(OPERATORS):
                missing.append(f"operators that are pieces of their own, not a part of {text!r}")
                break
        return missing


class ByteTokenizer:
    """The challenge's byte260: byte b is id b + 4, behind padding, BOS, EOS and unknown."""

    kind = "bytes"
    first = 4
    size = first + 256
    case_operators = False
    escape = None
    special = {"padding": 0, "unknown": 3}

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without BOS."""
        return [[self.first + byte for byte in text.encode()] for text in texts]

    def decode(self, documents: list[list[int]]) -> list[str]:
        """Return the text of each list of ids."""
        texts = []
        for numbers in documents:
            data = bytes(number - self.first for number in numbers)
            texts.append(data.decode(errors="replace"))
        return texts

    def piece(self, number: int) -> str:
        """Return how a piece is called."""
        return f"<{number - self.first}>"

    def is_operator(self, number: int) -> bool:
        """Tell whether a piece is one of the operators for letter case."""
        return False

    def is_control(self, number: int) -> bool:
        """Tell whether a piece marks a place, as BOS does."""
        return number < self.first

    is_silent = is_control

    def is_byte(self, number: int) -> bool:
        """Tell whether a piece stands for one byte."""
        return number >= self.first

    def normalizes(self) -> bool:
        """Tell whether it changes some text."""
        return False

    def strips_first_space(self) -> bool:
        """Tell whether decoding drops a space at the beginning of a document."""
        return False

    def lacks(self) -> list[str]:
        """List what shards of any text need."""
        return []


def open_tokenizer(path: Path) -> Tokenizer | ByteTokenizer:
    """Read a tokenizer from a file; BadInput if it is not a SentencePiece model."""
    if path == BYTE_TOKENIZER:
        return ByteTokenizer()
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError, UnicodeError) as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"{path}: not a SentencePiece model ({reason})") from error
    return Tokenizer(processor)


# ---- Training
def train_tokenizer(
    vocabulary_size: int, case_operators: bool, description: str, documents: Iterable[bytes]
) -> bytes:
    """Train a byte-pair tokenizer and return SentencePiece's serialized model.

    With `case_operators` it is trained on text without capitals, and has pieces for them. The
    documents are read twice. The progress bar shows `description`. BadInput, with what is
    possible, if the text does not allow for so many pieces.
    """
    lines = 0
    longest = LEAST_LINE_LIMIT
    # Behind the control pieces, so that they have the same ids in all tokenizers, 4 to 7.
    symbols = list(OPERATORS) if case_operators else []
    for line in sample_lines(documents, case_operators):
        lines += 1
        longest = max(longest, len(line))
    model = io.BytesIO()
    raised: list[BaseException] = []
    sample = sample_lines(documents, case_operators)
    bar = tqdm(sample, desc=description, total=lines, unit=" lines")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=noting(bar, raised),
            model_writer=model,
            vocab_size=vocabulary_size,
            max_sentence_length=longest,
            user_defined_symbols=[*symbols, "\n"],
            **TRAINING_OPTIONS,
        )
    except (RuntimeError, OSError) as error:
        if raised:
            raise raised[0] from None
        raise BadInput(
            f"cannot train a tokenizer of {vocabulary_size} pieces: {explained(str(error))}"
        ) from error
    return model.getvalue()


def sample_lines(documents: Iterable[bytes], case_operators: bool) -> Iterator[bytes]:
    """Yield the lines that a tokenizer is trained on, without line ends, which are a piece each."""
    left = SAMPLE_BYTES
    for text in documents:
        left -= len(text)
        if left < 0:
            return
        if case_operators:
            text = with_operators(text.decode()).encode()
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


# ---- Normalizing
@dataclass
class Normalization:
    """What a tokenizer that normalizes has made of documents.

    `bytes_before` are those of the text as it was, `bytes` those of the text that is left.
    `bytes_changed` of the first are of characters that are not in the second any more: other ones
    are in their place, or none.
    """

    documents: int = 0
    documents_changed: int = 0
    bytes_before: int = 0
    bytes_changed: int = 0
    bytes: int = 0

    def count(self, before: str, after: str) -> None:
        """Add a document."""
        self.documents += 1
        self.bytes_before += len(before.encode())
        self.bytes += len(after.encode())
        if before != after:
            self.documents_changed += 1
            gone = Counter(before) - Counter(after)
            self.bytes_changed += len("".join(gone.elements()).encode())

    def add(self, more: Normalization) -> None:
        """Add what became of other documents."""
        for field in fields(self):
            total = getattr(self, field.name) + getattr(more, field.name)
            setattr(self, field.name, total)

    def __str__(self) -> str:
        documents = self.documents_changed / max(1, self.documents)
        size = self.bytes_changed / max(1, self.bytes_before)
        return (
            f"{documents:.2%} of the documents ({self.documents_changed:,} of "
            f"{self.documents:,}) and {size:.3%} of the bytes changed, {self.bytes_before:,} "
            f"bytes became {self.bytes:,}"
        )


def normalize(model: Path, texts: list[bytes]) -> tuple[list[bytes], Normalization]:
    """Return documents as a tokenizer gives them back, so that it changes them no more.

    Of one that goes on to change, encode() says so.
    """
    tokenizer = loaded(model)
    before = [text.decode() for text in texts]
    after = before
    for _ in range(MOST_PASSES):
        again = tokenizer.decode(tokenizer.encode(after))
        if again == after:
            break
        after = again
    found = Normalization()
    for old, new in zip(before, after, strict=True):
        found.count(old, new)
    return [text.encode() for text in after], found


# ---- Encoding
@functools.lru_cache(maxsize=1)
def loaded(path: Path) -> Tokenizer | ByteTokenizer:
    """Read a tokenizer once in each process."""
    return open_tokenizer(path)


def encode(model: Path, texts: list[bytes]) -> np.ndarray:
    """Encode documents, each behind a BOS, into one array of little-endian uint16 (tokens,).

    BadInput, with the document's beginning, if one does not decode to itself.
    """
    tokenizer = loaded(model)
    originals = [text.decode() for text in texts]
    encoded = tokenizer.encode(originals)
    for text, back in zip(originals, tokenizer.decode(encoded), strict=True):
        if back != text:
            raise BadInput(
                f"the tokenizer changes the document that begins {text[:60]!r}: leave "
                "--tokenizer out to train one that changes none, or let it with --normalized"
            )
    return np.concatenate([np.array([BOS_ID, *tokens], dtype="<u2") for tokens in encoded])
