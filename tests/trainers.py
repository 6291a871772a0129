"""Trainers of a tiny model on real text, and a clock that moves when it is told to."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path

import pytest

import train_gpt
from conftest import VOCAB_SIZE, quiet, tiny_settings
from train_gpt import Runtime, Trainer, TrainingRows


def build_trainer(
    folder: Path, log: Callable = quiet, runtime: Runtime | None = None, **changes
) -> Trainer:
    """A trainer of a tiny model, with these changes to its settings, on a folder of shards."""
    runtime = runtime or Runtime()
    settings = tiny_settings(vocab_size=VOCAB_SIZE, **changes)
    files = train_gpt.find_shards(folder, "train")
    data = TrainingRows(files, settings.train_seq_len, settings.seed, VOCAB_SIZE)
    model = train_gpt.build_model(settings, runtime)
    pieces = train_gpt.texts_of_pieces(
        train_gpt.load_tokenizer(folder / "tokenizer.model", VOCAB_SIZE)
    )
    return Trainer(model, settings, runtime, log, data, code_bytes=0, pieces=pieces)


class ManualClock:
    """A clock that moves only when it is told to, in place of train_gpt.time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        clock = types.SimpleNamespace(perf_counter=self.read, monotonic=self.read)
        monkeypatch.setattr(train_gpt, "time", clock)

    def read(self) -> float:
        """Seconds."""
        return self.now
