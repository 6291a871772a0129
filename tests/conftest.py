"""What the tests share: a tiny model with every feature on, a folder of real data, markers."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import io
import os
import pathlib
import random
import signal
import statistics
import struct
import sys
import textwrap
from pathlib import Path

# Tiny tensors gain nothing from a second thread, and workers of xdist would share the cores. torch
# reads this when it is imported, also in processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell that starts the tests in the background has Ctrl-C ignored, and so would all processes
# that they start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np
import pytest
import sentencepiece
import torch

import train_gpt

ROOT = Path(__file__).resolve().parent.parent
# Of the tokenizer in data_folder.
VOCAB_SIZE = 384
BOS = 1

# Every feature of the model on but for loops and lanes, which need a trunk of some length, at sizes
# that take milliseconds. A row has 20 tokens of text behind 4 memory tokens, and a step has 4 rows.
TINY = dict(
    train_gpt.OF_MARCH_2026,
    embed_wd=0.05,
    matrix_lr=0.025,
    tied_embed_lr=0.035,
    scalar_lr=0.025,
    muon_momentum=0.99,
    num_layers=4,
    model_dim=32,
    vocab_size=64,
    num_heads=4,
    num_kv_heads=2,
    rope_dims=4,
    key_offset_enabled=True,
    xsa_last_n=3,
    sparse_attn_gate_enabled=True,
    gate_window=5,
    negative_slope=0.5,
    skip_gates_enabled=True,
    bigram_vocab_size=32,
    bigram_dim=8,
    memory_tokens=4,
    # Not with memory tokens.
    document_attention=False,
    train_seq_len=24,
    train_batch_tokens=96,
    mtp_num_heads=2,
    iterations=20,
    max_wallclock_seconds=0.0,
    warmdown_iters=10,
    warmup_steps=1,
    muon_momentum_warmup_steps=10,
    swa_every=1,
    ema_every=1,
    eval_seq_len=24,
    eval_stride=5,
    eval_batch_seqs=3,
)
# The trunk of TINY with its second block repeated, and two lanes in its last.
LOOPED = dict(num_loops=1, loop_start=1, loop_end=1)
LANES = dict(parallel_start_layer=3)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU where there is none, and slow ones that nobody asked for."""
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("slow") and "slow" not in config.getoption("markexpr"):
            item.add_marker(pytest.mark.skip(reason="slow: runs with -m slow"))


def quiet(line: str, console: bool = True) -> None:
    """A log that keeps nothing."""


def tiny_settings(**changes) -> train_gpt.Settings:
    """Small settings with every feature of the model on, but for these changes; checked."""
    environment = {"PRESET": "record"}
    for name, value in {**TINY, **changes}.items():
        environment[name.upper()] = train_gpt.as_typed(value)
    return train_gpt.settings_from(environment)[0]


@torch.no_grad()
def stir(model: train_gpt.GPT, seed: int = 7) -> None:
    """Move every parameter off its initial value: a feature that starts at 0 or 1 would be idle."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim:
            noise = torch.randn(parameter.shape, generator=generator)
        else:
            noise = torch.tensor(2.0)
        starts_small = name == "embedding.weight" and parameter.std() < 0.1
        starts_at_zero = not parameter.any()
        parameter.add_(noise, alpha=0.3 if starts_small or starts_at_zero else 0.1)


def tiny_model(
    runtime: train_gpt.Runtime | None = None, seed: int = 0, stirred: bool = True, **changes
) -> train_gpt.GPT:
    """A model of tiny_settings(**changes) in which every parameter acts, unless not stirred."""
    torch.manual_seed(seed)
    model = train_gpt.GPT(tiny_settings(**changes), runtime or train_gpt.Runtime())
    if stirred:
        stir(model)
    return model


def random_tokens(rows: int, length: int, seed: int = 0, vocab_size: int = 64) -> torch.Tensor:
    """Tokens, int64 (rows, length), none of them BOS."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, vocab_size, (rows, length), generator=generator)


def write_shard(path: Path, tokens) -> Path:
    """Write a shard in the field's format: 256 int32 of header, then uint16, little-endian."""
    tokens = np.asarray(tokens, dtype="<u2")
    header = struct.pack("<3i", 20240520, 1, len(tokens)).ljust(256 * 4, b"\0")
    Path(path).write_bytes(header + tokens.tobytes())
    return Path(path)


def documents() -> list[str]:
    """Docstrings of the standard library, the same on every machine with one Python."""
    modules = (
        argparse,
        dataclasses,
        inspect,
        io,
        pathlib,
        random,
        statistics,
        struct,
        sys,
        textwrap,
    )
    found = []
    for module in modules:
        for name in sorted(vars(module)):
            text = inspect.getdoc(vars(module)[name])
            if text and len(text) > 120 and text not in found:
                # SentencePiece's sign for a space is no text of its own.
                found.append(text.replace("\u2581", " "))
    return found


def train_lossless_tokenizer(texts: list[str]) -> bytes:
    """A SentencePiece model of VOCAB_SIZE pieces that gives every text back as it was."""
    lines = []
    for text in texts:
        lines += [line for line in text.splitlines() if line]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        character_coverage=0.9995,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        user_defined_symbols=["\n"],
        pad_id=0,
        bos_id=BOS,
        eos_id=2,
        unk_id=3,
        max_sentence_length=1 << 20,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x_train_000000.bin, x_val_000000.bin and a lossless tokenizer.model of VOCAB_SIZE pieces."""
    folder = tmp_path_factory.mktemp("data")
    texts = documents()
    model = train_lossless_tokenizer(texts)
    (folder / "tokenizer.model").write_bytes(model)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    # Every tenth document is for validation.
    tokens = {"train": [], "val": []}
    for i, text in enumerate(texts):
        split = "train" if i % 10 else "val"
        tokens[split] += [BOS, *tokenizer.encode(text)]
    for split, its_tokens in tokens.items():
        write_shard(folder / f"x_{split}_000000.bin", its_tokens)
    return folder
