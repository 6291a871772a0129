"""Tokenizers and shards for tests of the commands in data/."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import sentencepiece

import tokenizer
from conftest import BOS, write_shard
from tokenizer import BYTE_TOKENIZER, TRAINING_OPTIONS


def train_tokenizer(path: Path, texts: list[str], vocabulary_size: int, **changes: object) -> Path:
    """Train a tokenizer as data/prepare.py does, but for these options, and write it."""
    lines = []
    for text in texts:
        lines.extend(line for line in text.split("\n") if line)
    options = {
        **TRAINING_OPTIONS,
        "vocab_size": vocabulary_size,
        "max_sentence_length": 1 << 20,
        **changes,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, **options
    )
    path.write_bytes(model.getvalue())
    return path


def write_documents(path: Path, texts: list[str], model: Path) -> Path:
    """Write a shard of these documents, each behind a BOS."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokens = []
    for text in texts:
        tokens.append(BOS)
        tokens.extend(processor.encode(text))
    return write_shard(path, tokens)


def read_documents(paths: list[Path], model: Path) -> list[str]:
    """Decode the documents in shards, without the code under test."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokens = np.concatenate([read_tokens(path) for path in paths])
    texts = []
    for document in np.split(tokens, np.flatnonzero(tokens == BOS)[1:]):
        texts.append(processor.decode(document[1:].tolist()))
    return texts


# ---- Data sets with a tokenizer of any kind
def train_of_kind(path: Path, texts: list[str], pieces: int, case_operators: bool) -> Path:
    """Train a tokenizer as data/prepare.py does, with case operators or without, and write it."""
    encoded = [text.encode() for text in texts]
    path.write_bytes(tokenizer.train_tokenizer(pieces, case_operators, "test", encoded))
    return path


def tokens_of(model: Path, texts: list[str]) -> np.ndarray:
    """Encode documents by a tokenizer of any kind, each behind a BOS: uint16 (tokens,)."""
    return tokenizer.encode(model, [text.encode() for text in texts])


def read_tokens(path: Path) -> np.ndarray:
    """Read the tokens of a shard, uint16 (tokens,), without the code under test."""
    return np.fromfile(path, "<u2", offset=1024)


def write_dataset(
    folder: Path, model: Path, training: list[str], validation: list[str], has_model: bool = True
) -> Path:
    """Write a shard of each split, x_train_000000.bin and x_val_000000.bin, and tokenizer.model."""
    folder.mkdir(parents=True)
    write_shard(folder / "x_train_000000.bin", tokens_of(model, training))
    write_shard(folder / "x_val_000000.bin", tokens_of(model, validation))
    if has_model and model != BYTE_TOKENIZER:
        shutil.copy(model, folder / "tokenizer.model")
    return folder
