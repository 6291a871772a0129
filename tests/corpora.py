"""Tokenizers and shards for tests of the commands in data/."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import sentencepiece

from conftest import BOS, write_shard
from tokenizer import TRAINING_OPTIONS


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


def write_documents(path: Path, texts: list[str], tokenizer: Path) -> Path:
    """Write a shard of these documents, each behind a BOS."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    tokens = []
    for text in texts:
        tokens.append(BOS)
        tokens.extend(processor.encode(text))
    return write_shard(path, tokens)


def read_documents(paths: list[Path], tokenizer: Path) -> list[str]:
    """Decode the documents in shards, without the code under test."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    tokens = np.concatenate([np.fromfile(path, "<u2", offset=1024) for path in paths])
    texts = []
    for document in np.split(tokens, np.flatnonzero(tokens == BOS)[1:]):
        texts.append(processor.decode(document[1:].tolist()))
    return texts
