"""The field's token shards and their tokenizers, for the commands in this folder. A shard is 256
little-endian int32 (magic 20240520, version 1, number of tokens, zeros), then the tokens as uint16. Every
document begins with BOS."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import sentencepiece
from commands import BadInput

# Under their former place, until every caller imports them from files.
from files import digest, write_atomically  # noqa: F401

TRAINER = Path(__file__).resolve().parents[1] / "train_gpt.py"
MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_INTS
BOS_ID = 1
MOST_PIECES = 65_536  # that a uint16 can number


def header(tokens: int) -> bytes:
    """The header of a shard with this many tokens."""
    numbers = np.zeros(HEADER_INTS, dtype="<i4")
    numbers[:3] = MAGIC, VERSION, tokens
    return numbers.tobytes()


def count_tokens(path: Path) -> int:
    """The number of tokens in a shard, by its header; BadInput unless its size is what the header says."""
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
    if size != HEADER_BYTES + 2 * count:
        raise BadInput(
            f"{path}: {count:,} tokens in its header, which need {HEADER_BYTES + 2 * count:,} "
            f"bytes, but it has {size:,}: get or make it again"
        )
    return count


def read_shard(path: Path) -> np.ndarray:
    """The tokens of a shard, uint16 (count,), memory-mapped; BadInput as from count_tokens."""
    count = count_tokens(path)
    return (
        np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES) if count else np.empty(0, "<u2")
    )


def open_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    """The tokenizer in a file; BadInput if it is not a SentencePiece model."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError, UnicodeError) as error:
        raise BadInput(
            f"{path}: not a SentencePiece model ({' '.join(str(error).split())})"
        ) from error


def lacks(tokenizer: sentencepiece.SentencePieceProcessor) -> list[str]:
    """What a tokenizer lacks that shards of any text need, and train_gpt.py, which counts bytes by its
    pieces."""
    size = tokenizer.vocab_size()
    met = {
        f"BOS with id {BOS_ID}": tokenizer.bos_id() == BOS_ID,
        "a piece ▁ of its own (a space would count as three bytes, #897)": tokenizer.piece_to_id(
            "▁"
        )
        != tokenizer.unk_id(),
        "a piece for each byte": sum(map(tokenizer.is_byte, range(size))) == 256,
        f"{MOST_PIECES:,} pieces or less": size <= MOST_PIECES,
    }
    return [need for need in met if not met[need]]


def command_to_train(folder: Path, tokenizer: Path, pieces: int, launcher: str = "python") -> str:
    """The command that trains on shards, as it works in the current folder."""
    here = Path.cwd()
    shards, model, script = (
        shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))
        for path in (folder.resolve(), tokenizer.resolve(), TRAINER)
    )
    return f"DATA_PATH={shards} TOKENIZER_PATH={model} VOCAB_SIZE={pieces} {launcher} {script}"
