"""Parameter golf in one file: train, average, quantize, pack, read back, score.

    python train_gpt.py                                    # two CPU cores or one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt.py  # the record configuration on 8xH100
    ARTIFACT=final_model.int6.ptz python train_gpt.py      # score an artifact without training

Where no data is named or found, it builds a demo corpus with data/demo_corpus.py.

Every setting is an environment variable (see --help): `BACKOUT_ENABLED=0 python train_gpt.py` is an
ablation. The file reads as it runs:

    Settings        what can be set, presets, and what cannot work together
    Attention       one interface, four backends
    Layers          attention, MLP, block; one class for each feature
    GPT             the trunk over an explicit order of layers, and the loss
    Optimizers      the table of roles; Muon, AdamW, and what pieces that are spelled alike share
    Schedule        what changes during a run, and when; averages of the weights
    Data            shards, the order of training rows, batches, the bytes of text behind tokens
    Quantization    steps and codes
    Artifact        entropy coding, packing under the cap, reading back
    Evaluation      plan windows, score them; score documents, and learn from them (track B)
    Machine         device, type, attention, compiler, ranks, signals, the log file
    Training        clock, steps, checkpoints
    Main            one run from settings to score

Features of the model, each with an off value that adds no parameter: partial rotary positions, key
offset, XSA, sparse attention gate, leaky ReLU, LN scale, skip gates, loops, two lanes, SmearGate,
BigramHash, memory tokens, backout, multi-token prediction, untied embeddings.
Numbers such as #339 are pull requests of openai/parameter-golf.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import datetime
import difflib
import errno
import functools
import glob
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

try:
    import numpy as np
    import sentencepiece
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    import zstandard
    from torch import Tensor, nn
except ImportError as error:
    raise SystemExit(f"error: {error}: pip install -r requirements.txt") from None

try:
    import resource
except ImportError:
    # Windows has no such module; there the peak of memory is not known.
    resource = None


# ==================================================================================================
# Settings
# ==================================================================================================


class UserError(Exception):
    """Something that the person at the keyboard can mend: one line on stderr, exit status 2."""


def require(holds: object, problem: str, kind: type[Exception] = UserError) -> None:
    """Raise an error with this message unless the condition holds."""
    if not holds:
        raise kind(problem)


def setting(
    group: str,
    default: object,
    help: str,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
):
    """Declare one setting. Its environment variable is its name in capitals.

    Where other entries have a name for it, that name is kept, since run scripts use it. `group`
    decides who stores the value: artifacts "model" and "evaluation", checkpoints all but "run".
    """
    metadata = dict(group=group, help=help, low=low, high=high, choices=choices)
    return dataclasses.field(default=default, metadata=metadata)


# The share that the distribution behind an earlier occurrence of the last n tokens gets at first,
# for n from 1 on. Nearly the best fixed shares on library documentation and on books alike.
NGRAM_SHARES = (0.05, 0.07, 0.1, 0.1, 0.1, 0.15, 0.15, 0.2)

# A setting of each group.
of_run = functools.partial(setting, "run")
of_model = functools.partial(setting, "model")
of_training = functools.partial(setting, "training")
of_artifact = functools.partial(setting, "artifact")
of_evaluation = functools.partial(setting, "evaluation")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every setting of a run. Defaults are PRESET=record's; PRESETS has the other presets."""

    # ---- The run: what to do, with which data, on which device.
    preset: str = of_run(
        "auto",
        "which defaults; auto: record with CUDA, else pocket",
        choices=("auto", "record", "pocket", "entry_339", "entry_352"),
    )
    run_id: str = of_run("", "name of the files in logs/; empty: date, time, process and seed")
    checkpoint_every: float = of_run(0.0, "seconds between checkpoints in logs/; 0: none", low=0.0)
    resume: bool = of_run(
        False, "go on from the last checkpoint of RUN_ID or, without it, of the last run"
    )
    artifact: str = of_run("", "file to score instead of training a model")
    sample: str = of_run("", "text that the model in ARTIFACT continues instead of scoring")
    sample_tokens: int = of_run(200, "most tokens that SAMPLE adds", low=1)
    sample_temperature: float = of_run(
        0.8, "randomness of SAMPLE; 0: always the likeliest token", low=0.0
    )
    data_path: str = of_run(
        "", "folder of shards; empty: FineWeb's with VOCAB_SIZE pieces, else the demo corpus"
    )
    tokenizer_path: str = of_run(
        "", "SentencePiece model, or byte260 for shards of bytes; empty: the one of DATA_PATH"
    )
    device: str = of_run(
        "auto", "where to compute; auto: CUDA if there is a GPU", choices=("auto", "cuda", "cpu")
    )
    dtype: str = of_run(
        "auto",
        "type of activations; auto: bfloat16 where it is fast",
        choices=("auto", "bfloat16", "float32"),
    )
    attention: str = of_run(
        "auto",
        "attention backend; auto: the fastest that is installed and fits the device",
        choices=("auto", "flash3", "flash2", "sdpa", "blocked"),
    )
    compile: str = of_run(
        "auto", "torch.compile; auto: on if a compiler works", choices=("auto", "0", "1")
    )
    micro_batch_tokens: int = of_run(
        0, "most positions of a training pass; 0: as many as memory holds", low=0
    )
    eval_batch_seqs: int = of_run(
        256, "most windows of an evaluation pass, if memory holds them", low=1
    )
    train_log_every: int = of_run(200, "steps between log lines; 0: first and last only", low=0)

    # ---- The model: shape.
    num_layers: int = of_model(11, "transformer blocks", low=1, high=256)
    model_dim: int = of_model(512, "width of the residual stream", low=2, high=16384)
    vocab_size: int = of_model(
        0, "pieces of the tokenizer; 0: as many as the data's has", low=0, high=65536
    )
    train_seq_len: int = of_model(
        2048, "positions of a training row, memory tokens included", low=2, high=1 << 20
    )
    # Attention.
    num_heads: int = of_model(8, "query heads", low=1, high=1024)
    num_kv_heads: int = of_model(
        4, "key and value heads (grouped-query attention)", low=1, high=1024
    )
    qk_gain_init: float = of_model(5.0, "initial gain of each query head, after the norm", low=0.0)
    rope_dims: int = of_model(16, "rotated dimensions of a head (partial RoPE); 0: all", low=0)
    rope_base: float = of_model(10000.0, "base of the rotary frequencies", low=1.0)
    key_offset_enabled: bool = of_model(
        True, "take the dimensions of a key that do not rotate from the position before"
    )
    xsa_last_n: int = of_model(
        11, "last blocks with exclusive self-attention (XSA); 0: none", low=0, high=256
    )
    sparse_attn_gate_enabled: bool = of_model(
        True, "gate each head by the first channels of what attention reads"
    )
    gate_window: int = of_model(12, "channels that the sparse attention gate reads", low=1)
    sparse_attn_gate_scale: float = of_model(
        0.5, "factor before the sigmoid of the sparse attention gate", low=0.0
    )
    document_attention: bool = of_model(
        True, "attend to tokens of the same document only; off with memory tokens"
    )
    # MLP and norms.
    mlp_mult: float = of_model(4.0, "hidden width of the MLP over MODEL_DIM", low=0.01, high=64)
    negative_slope: float = of_model(
        0.5, "slope of the MLP's squared ReLU below 0 (leaky ReLU)", low=0.0, high=1.0
    )
    ln_scale: bool = of_model(True, "scale the norms of a block by 1 / sqrt(layer + 1)")
    # Trunk.
    skip_gates_enabled: bool = of_model(
        True, "blend skip connections into the stream by gates instead of adding them"
    )
    num_loops: int = of_model(
        2, "how often the blocks LOOP_START to LOOP_END are repeated; 0: no loops", low=0, high=64
    )
    loop_start: int = of_model(3, "first block of the loop", low=0)
    loop_end: int = of_model(5, "last block of the loop", low=0)
    parallel_start_layer: int = of_model(
        8, "first block in which attention and MLP have a lane each; 0: none", low=0
    )
    # Features.
    smear_enabled: bool = of_model(True, "SmearGate: blend each embedding with the one before")
    bigram_vocab_size: int = of_model(
        4096, "BigramHash: rows of the table; 0: off", low=0, high=1 << 24
    )
    bigram_dim: int = of_model(128, "BigramHash: width of the table", low=1, high=16384)
    memory_tokens: int = of_model(0, "learned vectors before every row; 0: off", low=0, high=16384)
    backout_enabled: bool = of_model(True, "backout: at the end, subtract lambda * a middle state")
    backout_lambda_init: float = of_model(0.2, "initial lambda of backout")
    backout_layer: int = of_model(-1, "block that is backed out; -1: NUM_LAYERS // 2", low=-1)
    tie_embeddings: bool = of_model(True, "use the embedding as the output matrix")
    logit_softcap: float = of_model(20.0, "c in logits = c * tanh(logits / c)", low=1e-3)

    # ---- Training: initial values, auxiliary loss.
    seed: int = of_training(
        1337, "decides the initial weights and the order of the data", low=0, high=2**63 - 1
    )
    tied_embed_init_std: float = of_training(
        0.005, "initial deviation of a tied embedding", low=0.0
    )
    mtp_num_heads: int = of_training(0, "auxiliary heads that predict further ahead; 0: off", low=0)
    mtp_loss_weight: float = of_training(0.2, "weight of the mean loss of the MTP heads", low=0.0)
    # Loops.
    enable_looping_at: float = of_training(
        0.35, "share of the run after which the loops begin", low=0.0, high=1.0
    )
    # Batch and length of the run.
    train_batch_tokens: int = of_training(786432, "positions of a step over all ranks", low=1)
    iterations: int = of_training(9000, "most steps", low=1)
    max_wallclock_seconds: float = of_training(
        600.0, "most seconds of training; 0: no limit", low=0.0
    )
    warmdown_iters: int = of_training(9000, "steps of linear decay to 0 at the end", low=0)
    warmdown_fraction: float = of_training(
        0.85, "most of a run that WARMDOWN_ITERS may take", low=0.0, high=1.0
    )
    min_lr: float = of_training(0.1, "least learning-rate scale of the warmdown", low=0.0, high=1.0)
    warmup_steps: int = of_training(20, "steps to compile before the clock starts; undone", low=0)
    # Muon.
    matrix_lr: float = of_training(0.026, "learning rate of Muon", low=0.0)
    muon_momentum: float = of_training(
        0.97, "momentum of Muon after its warm-up", low=0.0, high=0.9999
    )
    muon_momentum_warmup_start: float = of_training(
        0.92, "momentum of Muon at step 0", low=0.0, high=0.9999
    )
    muon_momentum_warmup_steps: int = of_training(
        1500, "steps until MUON_MOMENTUM is reached", low=0
    )
    muon_backend_steps: int = of_training(5, "Newton-Schulz iterations of Muon", low=1, high=100)
    muon_row_normalize: bool = of_training(
        True, "give the rows of an update one length before Newton-Schulz (MuonEq-R)"
    )
    muon_wd: float = of_training(0.095, "decoupled weight decay of Muon", low=0.0)
    # AdamW.
    tied_embed_lr: float = of_training(
        0.03, "learning rate of tied embedding, memory, bigram table", low=0.0
    )
    spelling_lr: float = of_training(
        0.0, "learning rate of what pieces that are spelled alike share; 0: off", low=0.0
    )
    embed_lr: float = of_training(0.6, "learning rate of an untied embedding", low=0.0)
    head_lr: float = of_training(
        0.008, "learning rate of an untied output matrix and MTP heads", low=0.0
    )
    scalar_lr: float = of_training(0.02, "learning rate of vectors, gates and scalars", low=0.0)
    embed_wd: float = of_training(
        0.085, "weight decay of embeddings and of the bigram table", low=0.0
    )
    adam_wd: float = of_training(
        0.02, "weight decay of AdamW elsewhere; memory tokens have none", low=0.0
    )
    beta1: float = of_training(0.9, "decay of AdamW's mean of gradients", low=0.0, high=0.9999)
    beta2: float = of_training(0.99, "decay of AdamW's mean of squares", low=0.0, high=0.9999)
    adam_eps: float = of_training(1e-8, "epsilon in AdamW's denominator", low=0.0)
    grad_clip_norm: float = of_training(
        0.3, "largest norm of the gradient; 0: no clipping", low=0.0
    )
    # Averages of the weights.
    swa_enabled: bool = of_training(False, "export the mean of the weights near the end (SWA)")
    swa_every: int = of_training(50, "steps between samples of SWA", low=1)
    swa_start_scale: float = of_training(0.2, "learning-rate scale under which SWA starts", low=0.0)
    ema_enabled: bool = of_training(True, "export an exponential average (EMA), not SWA")
    ema_decay: float = of_training(0.997, "decay of EMA per step", low=0.0, high=1.0)
    ema_span: float = of_training(
        0.06,
        "share of the run that EMA spans, in place of EMA_DECAY; 0: EMA_DECAY counts",
        low=0.0,
        high=1.0,
    )
    ema_every: int = of_training(10, "steps between updates of EMA", low=1)
    ema_start_scale: float = of_training(0.5, "learning-rate scale under which EMA starts", low=0.0)
    # Late QAT and validation during training.
    late_qat_threshold: float = of_training(
        0.1,
        "learning-rate scale under which late QAT starts; 0: never",
        low=0.0,
        high=1.0,
    )
    val_loss_every: int = of_training(0, "steps between validation passes; 0: none", low=0)

    # ---- The artifact.
    quant: str = of_artifact(
        "fit",
        "fit: quantization steps that fill the cap; rows: one step a row",
        choices=("fit", "rows"),
    )
    int5_mlp: str = of_artifact(
        "auto",
        "QUANT=rows: 1: int5 in the MLP, int6 elsewhere; 0 or auto: int6",
        choices=("auto", "0", "1"),
    )
    codec: str = of_artifact("rans", "what codes are compressed with", choices=("rans", "zstd"))
    zstd_level: int = of_artifact(22, "level of zstd, for what is not in rANS", low=1, high=22)
    artifact_max_bytes: int = of_artifact(16_000_000, "cap on code + model", low=1)

    # ---- Evaluation.
    eval_seq_len: int = of_evaluation(
        2048, "positions of a sliding window, memory tokens included", low=2, high=1 << 20
    )
    eval_stride: int = of_evaluation(64, "targets that each sliding window adds", low=1)
    # A further score, of track B: see AdaptiveEvaluator.
    ttt_enabled: bool = of_evaluation(
        False, "score once more, learning from what has been scored of each document (track B)"
    )
    ttt_lr: float = of_evaluation(
        0.08, "learning rate of a document's own matrices; 0: they stay as they are", low=0.0
    )
    ttt_chunk_size: int = of_evaluation(64, "targets that are scored before they are learnt", low=1)
    ttt_batch_size: int = of_evaluation(32, "documents that are scored side by side", low=1)
    ttt_ngram_order: int = of_evaluation(
        8,
        "most tokens whose earlier occurrences say what may follow; 0: no n-grams",
        low=0,
        high=len(NGRAM_SHARES),
    )

    # ---- What follows from these.
    @property
    def head_dim(self) -> int:
        """Dimensions of an attention head."""
        return self.model_dim // self.num_heads

    @property
    def rotary_dims(self) -> int:
        """Dimensions of a head that rotate with the position."""
        return self.rope_dims or self.head_dim

    @property
    def mlp_hidden(self) -> int:
        """Hidden units of an MLP."""
        return int(self.mlp_mult * self.model_dim)

    def visited_layers(self, num_loops: int) -> list[int]:
        """The blocks in the order in which the trunk runs them, with so many repetitions."""
        layers = list(range(self.num_layers))
        loop = layers[self.loop_start : self.loop_end + 1]
        return layers[: self.loop_start] + num_loops * loop + layers[self.loop_start :]

    @property
    def num_visits(self) -> int:
        """Blocks that the trunk runs, each repetition counted."""
        return len(self.visited_layers(self.num_loops))

    @property
    def num_skips(self) -> int:
        """Skip connections of the U-Net: one from each visit of its first half."""
        return self.num_visits // 2

    @property
    def middle_layer(self) -> int:
        """The block whose output is backed out."""
        return self.num_layers // 2 if self.backout_layer < 0 else self.backout_layer

    @property
    def row_tokens(self) -> int:
        """Tokens of text in a training row; memory tokens take its other positions."""
        return self.train_seq_len - self.memory_tokens

    @property
    def window_tokens(self) -> int:
        """Tokens of text in a sliding window; memory tokens take its other positions."""
        return self.eval_seq_len - self.memory_tokens

    @property
    def step_rows(self) -> int:
        """Rows of an optimizer step over all ranks."""
        return self.train_batch_tokens // self.train_seq_len


# What the two entries of March 2026 had in common, where later records do otherwise.
OF_MARCH_2026 = dict(
    qk_gain_init=1.5,
    key_offset_enabled=False,
    xsa_last_n=0,
    sparse_attn_gate_enabled=False,
    document_attention=False,
    mlp_mult=3.0,
    negative_slope=0.0,
    skip_gates_enabled=False,
    num_loops=0,
    parallel_start_layer=0,
    logit_softcap=30.0,
    warmdown_iters=3000,
    warmdown_fraction=0.6,
    min_lr=0.0,
    muon_momentum_warmup_start=0.92,
    muon_momentum_warmup_steps=1500,
    muon_row_normalize=False,
    muon_wd=0.04,
    embed_wd=0.04,
    adam_wd=0.04,
    beta2=0.95,
    swa_enabled=True,
    swa_every=50,
    swa_start_scale=0.2,
    ema_enabled=False,
    ema_span=0.0,
)

# What a preset sets, by name of the setting; for the rest it has the defaults. The two entries set
# what their run commands named, also where that is the default today.
PRESETS: dict[str, dict] = {
    "record": {},
    # For two CPU cores in 150 seconds. A small model that takes many steps learns most: four blocks
    # of width 128 take 840 on slow cores, eleven of width 192 take 270. Momentum must forget within
    # 10 steps, AdamW's within 5, logits learn best within 15, an average of weights loses more than
    # it brings, and three Newton-Schulz iterations do as well as five. With shared spelling what is
    # a piece's own, and the bigram table, learn best at two fifths of the rate without (0.025).
    "pocket": dict(
        num_layers=4,
        model_dim=128,
        num_heads=2,
        num_kv_heads=1,
        bigram_vocab_size=2048,
        bigram_dim=64,
        mlp_mult=3.0,
        qk_gain_init=1.5,
        logit_softcap=15.0,
        num_loops=0,
        parallel_start_layer=3,
        train_seq_len=256,
        train_batch_tokens=2048,
        micro_batch_tokens=2048,
        iterations=20000,
        max_wallclock_seconds=150.0,
        warmup_steps=2,
        warmdown_fraction=0.5,
        matrix_lr=0.03,
        muon_momentum=0.9,
        muon_momentum_warmup_start=0.85,
        muon_momentum_warmup_steps=200,
        muon_backend_steps=3,
        muon_wd=0.04,
        embed_wd=0.04,
        adam_wd=0.04,
        tied_embed_lr=0.01,
        spelling_lr=0.0025,
        scalar_lr=0.03,
        beta1=0.8,
        grad_clip_norm=0.0,
        swa_every=5,
        ema_enabled=False,
        # As many bits for a weight as the record's 16 MB give.
        artifact_max_bytes=785_000,
        train_log_every=50,
        eval_seq_len=256,
        eval_batch_seqs=32,
        ttt_batch_size=16,
    ),
    # Entry A of March 2026: "11L Backout + Int6 + SWA", 1.1364 bpb, as published in #339: no memory
    # tokens yet, rotary positions on whole heads, six SWA samples 200 steps apart.
    "entry_339": dict(
        OF_MARCH_2026,
        vocab_size=1024,
        num_layers=11,
        bigram_vocab_size=4096,
        memory_tokens=0,
        rope_dims=0,
        ln_scale=False,
        backout_enabled=True,
        backout_lambda_init=0.2,
        iterations=9000,
        max_wallclock_seconds=600.0,
        matrix_lr=0.025,
        muon_momentum=0.99,
        tied_embed_lr=0.035,
        scalar_lr=0.025,
        swa_every=200,
        swa_start_scale=0.4,
        late_qat_threshold=0.0,
        quant="rows",
        int5_mlp="0",
        codec="zstd",
        eval_stride=64,
    ),
    # Entry B of March 2026: "Memory Tokens + Mixed Quantization", 1.1659 bpb, as published in #352.
    "entry_352": dict(
        OF_MARCH_2026,
        vocab_size=1024,
        num_layers=10,
        bigram_vocab_size=10240,
        memory_tokens=64,
        backout_enabled=False,
        mtp_num_heads=2,
        mtp_loss_weight=0.2,
        train_batch_tokens=524288,
        iterations=20000,
        matrix_lr=0.04,
        muon_momentum=0.95,
        tied_embed_lr=0.05,
        scalar_lr=0.04,
        ema_enabled=True,
        ema_decay=0.997,
        ema_every=10,
        late_qat_threshold=0.1,
        val_loss_every=1000,
        quant="rows",
        int5_mlp="1",
        codec="zstd",
        eval_seq_len=1024,
        eval_stride=128,
        eval_batch_seqs=256,
    ),
}


def fields_of(*groups: str) -> list[dataclasses.Field]:
    """The settings of these groups, or all of them, in their order."""
    fields = dataclasses.fields(Settings)
    if not groups:
        return list(fields)
    return [field for field in fields if field.metadata["group"] in groups]


def stored_settings(settings: Settings, *groups: str) -> dict:
    """The values of these groups of settings by name."""
    return {field.name: getattr(settings, field.name) for field in fields_of(*groups)}


BOOLEANS = {"0": False, "1": True, "false": False, "true": True}


def parse_value(field: dataclasses.Field, text: str):
    """The typed value of an environment variable. ValueError says what would have been right."""
    # Types are text, since annotations are not evaluated in this file.
    try:
        if field.type == "bool":
            value = BOOLEANS[text.strip().lower()]
        elif field.type == "int":
            value = int(text)
        elif field.type == "float":
            value = float(text)
        else:
            value = text
    except (ValueError, KeyError):
        wanted = {"bool": "0 or 1", "int": "a whole number", "float": "a number"}
        raise ValueError(f"must be {wanted[field.type]}") from None

    low = field.metadata["low"]
    high = field.metadata["high"]
    choices = field.metadata["choices"]
    if choices and value not in choices:
        raise ValueError(f"must be one of {', '.join(choices)}")
    if field.type == "float" and not math.isfinite(value):
        raise ValueError("must be finite")
    if low is not None and value < low or high is not None and value > high:
        above = "" if high is None else f" and at most {high}"
        raise ValueError(f"must be at least {low}{above}")
    return value


def as_typed(value: object) -> str:
    """A value as one would type it after `NAME=`."""
    return str(int(value)) if isinstance(value, bool) else str(value)


def combination_problems(s: Settings, trains: bool) -> list[str]:
    """What cannot work together, in a run that trains a model or in one that uses an artifact."""
    problems = model_problems(s) + row_problems(s)
    if trains:
        problems += batch_problems(s)
    return problems + run_problems(s)


def model_problems(s: Settings) -> list[str]:
    """Why there is no model of this shape."""
    problems = []
    if s.model_dim % s.num_heads != 0:
        problems.append(f"MODEL_DIM={s.model_dim} must be a multiple of NUM_HEADS")
    if s.num_heads % s.num_kv_heads != 0:
        problems.append(f"NUM_HEADS={s.num_heads} must be a multiple of NUM_KV_HEADS")
    if s.rotary_dims % 2 != 0 or s.rope_dims > s.head_dim:
        problems.append(
            f"ROPE_DIMS={s.rope_dims} must be even and at most the {s.head_dim} dimensions of a "
            "head"
        )
    if s.backout_layer >= s.num_layers:
        problems.append(f"BACKOUT_LAYER={s.backout_layer} must be below NUM_LAYERS")
    if s.mlp_hidden < 1:
        problems.append(f"MLP_MULT={s.mlp_mult} leaves the MLP no hidden units")
    if s.key_offset_enabled and s.rotary_dims >= s.head_dim:
        problems.append(
            f"KEY_OFFSET_ENABLED needs dimensions that do not rotate: ROPE_DIMS={s.rope_dims} "
            f"leaves none of the {s.head_dim} of a head"
        )
    if s.sparse_attn_gate_enabled and s.gate_window > s.model_dim:
        problems.append(f"GATE_WINDOW={s.gate_window} exceeds MODEL_DIM={s.model_dim}")
    if s.num_loops and not s.loop_start <= s.loop_end < s.num_layers:
        problems.append(
            f"LOOP_START={s.loop_start} to LOOP_END={s.loop_end} are no blocks of "
            f"NUM_LAYERS={s.num_layers}"
        )
    elif s.parallel_start_layer:
        problems += lane_problems(s)
    return problems


def row_problems(s: Settings) -> list[str]:
    """Why rows and windows cannot be as the settings say."""
    problems = []
    if s.row_tokens < 2 or s.window_tokens < 1:
        problems.append(f"MEMORY_TOKENS={s.memory_tokens} leaves no room in TRAIN_ or EVAL_SEQ_LEN")
    if 0 < s.window_tokens < s.eval_stride:
        problems.append(f"EVAL_STRIDE={s.eval_stride} exceeds a window's {s.window_tokens} tokens")
    if s.ttt_enabled and 0 < s.window_tokens < s.ttt_chunk_size:
        problems.append(
            f"TTT_CHUNK_SIZE={s.ttt_chunk_size} exceeds a window's {s.window_tokens} tokens"
        )
    if s.memory_tokens and s.document_attention:
        problems.append(
            f"MEMORY_TOKENS={s.memory_tokens} stand before a row, where its later documents would "
            "not see them: it needs DOCUMENT_ATTENTION=0"
        )
    return problems


def batch_problems(s: Settings) -> list[str]:
    """Why a training step cannot be made of such rows."""
    problems = []
    if s.train_batch_tokens % s.train_seq_len != 0:
        problems.append(
            f"TRAIN_BATCH_TOKENS={s.train_batch_tokens} must be a multiple of "
            f"TRAIN_SEQ_LEN={s.train_seq_len}"
        )
    if 0 < s.micro_batch_tokens < s.train_seq_len:
        problems.append(
            f"MICRO_BATCH_TOKENS={s.micro_batch_tokens} must hold a row of "
            f"TRAIN_SEQ_LEN={s.train_seq_len}"
        )
    if s.mtp_num_heads >= max(s.row_tokens, 1):
        problems.append(f"MTP_NUM_HEADS must be below {s.row_tokens}, a row's tokens")
    return problems


def run_problems(s: Settings) -> list[str]:
    """Why a run cannot do what it shall."""
    problems = []
    if s.quant == "fit" and s.int5_mlp != "auto":
        problems.append("INT5_MLP is for QUANT=rows")
    if s.sample and not s.artifact:
        problems.append("SAMPLE needs ARTIFACT, the model that continues the text")
    if s.resume and s.artifact:
        problems.append("RESUME goes on training; it cannot be set with ARTIFACT")
    if set(s.run_id) & set("/\\\0"):
        problems.append(f"RUN_ID={s.run_id} must be a file name, not a path")
    elif s.run_id:
        # A run that has ended has a .json; one that has begun has a .txt.
        taken_by = Path("logs", f"{s.run_id}.{'json' if s.resume else 'txt'}")
        if taken_by.exists():
            problems.append(f"RUN_ID={s.run_id} is taken: {taken_by} exists; choose another")
    return problems


def lane_problems(s: Settings) -> list[str]:
    """Why the stream cannot split into two lanes at PARALLEL_START_LAYER."""
    first = s.parallel_start_layer
    # What is pushed, looped or backed out is a stream of one lane.
    in_one_lane = s.visited_layers(s.num_loops)[: s.num_skips]
    if s.num_loops:
        in_one_lane.append(s.loop_end)
    if s.backout_enabled:
        in_one_lane.append(s.middle_layer)
    last = max(in_one_lane, default=-1)
    if first <= last:
        return [
            f"PARALLEL_START_LAYER={first} must be above block {last}: encoder, loops and the "
            "middle state have one lane"
        ]
    return []


# ---- Names that the scripts of other entries read and this one does not. People bring such run
# scripts, and a name that is ignored without a word looks as if it were on.

# Other names of settings here, with the same values.
RENAMED_SETTINGS = {
    "ADAMW_WEIGHT_DECAY": "adam_wd",
    "ADAM_WEIGHT_DECAY": "adam_wd",
    "ARTIFACT_CODEC": "codec",
    "BACKOUT": "backout_enabled",
    "BACKOUT_INIT": "backout_lambda_init",
    "BIGRAM_BUCKETS": "bigram_vocab_size",
    "BIGRAM_EMBED_DIM": "bigram_dim",
    "BIGRAM_HASH_BUCKETS": "bigram_vocab_size",
    "BIGRAM_HASH_DIM": "bigram_dim",
    "BIGRAM_HASH_EMBED_DIM": "bigram_dim",
    "BIGRAM_HASH_SIZE": "bigram_vocab_size",
    "CKPT_EVERY_SECS": "checkpoint_every",
    "COMPRESSOR": "codec",
    "COMPRESS_METHOD": "codec",
    "EMA": "ema_enabled",
    "EMA_UPDATE_EVERY": "ema_every",
    "EMBED_WEIGHT_DECAY": "embed_wd",
    "EVAL_WINDOW_STRIDE": "eval_stride",
    "GRAD_CLIP": "grad_clip_norm",
    "LEAKY_RELU_SLOPE": "negative_slope",
    "LEAKY_RELU_SQ_SLOPE": "negative_slope",
    "MIN_LR_FRAC": "min_lr",
    "MLP_LEAKY_RELU_SLOPE": "negative_slope",
    "MLP_NEGATIVE_SLOPE": "negative_slope",
    "MODEL_CODEC": "codec",
    "MODEL_COMPRESSOR": "codec",
    "MTP_HEADS": "mtp_num_heads",
    "MTP_WEIGHT": "mtp_loss_weight",
    "MUON_LR": "matrix_lr",
    "MUON_MOM_WARMUP_START": "muon_momentum_warmup_start",
    "MUON_MOM_WARMUP_STEPS": "muon_momentum_warmup_steps",
    "MUON_WEIGHT_DECAY": "muon_wd",
    "NUM_MEMORY_TOKENS": "memory_tokens",
    "PARTIAL_ROPE_DIMS": "rope_dims",
    "QAT_THRESHOLD": "late_qat_threshold",
    "RESUME_CKPT": "resume",
    "ROPE_PARTIAL_DIMS": "rope_dims",
    "SEQ_LEN": "train_seq_len",
    "SERIAL_COMPRESSOR": "codec",
    "SIGMOID_SKIP_GATES": "skip_gates_enabled",
    "SLIDING_BATCH_SIZE": "eval_batch_seqs",
    "SLIDING_EVAL_STRIDE": "eval_stride",
    "SMEAR": "smear_enabled",
    "SMEARGATE": "smear_enabled",
    "SMEAR_GATE": "smear_enabled",
    "SMEAR_GATE_ENABLED": "smear_enabled",
    "SUBMISSION_SIZE_CAP_BYTES": "artifact_max_bytes",
    "SWA": "swa_enabled",
    "SWA_INTERVAL": "swa_every",
    "SW_SEQ_LEN": "eval_seq_len",
    "SW_STRIDE": "eval_stride",
    "USE_EMA": "ema_enabled",
    "USE_LN_SCALE": "ln_scale",
    "USE_SMEARGATE": "smear_enabled",
    "USE_SMEAR_GATE": "smear_enabled",
    "USE_SWA": "swa_enabled",
}
# Switches, 1 or 0, of what a number or a choice turns on here.
SWITCHES_OF_SETTINGS = {
    "BIGRAM": "bigram_vocab_size",
    "BIGRAM_HASH": "bigram_vocab_size",
    "BIGRAM_HASH_ENABLED": "bigram_vocab_size",
    "COMPILE_ENABLED": "compile",
    "COMPILE_MODEL": "compile",
    "LATE_QAT": "late_qat_threshold",
    "LEAKY_RELU": "negative_slope",
    "LEAKY_RELU_ENABLED": "negative_slope",
    "MTP_ENABLED": "mtp_num_heads",
    "QAT": "late_qat_threshold",
    "TORCH_COMPILE": "compile",
    "USE_BIGRAM_HASH": "bigram_vocab_size",
    "USE_COMPILE": "compile",
    "USE_LATE_QAT": "late_qat_threshold",
    "USE_QAT": "late_qat_threshold",
    "USE_XSA": "xsa_last_n",
    "XSA": "xsa_last_n",
    "XSA_ALL_LAYERS": "xsa_last_n",
    "XSA_ENABLED": "xsa_last_n",
}
OTHER_NAMES = {**RENAMED_SETTINGS, **SWITCHES_OF_SETTINGS}
# Switches of what is always on here.
ALWAYS_ON = """
    EVAL_SLIDING ORTHO_INIT QK_NORM SLIDING_EVAL SLIDING_WINDOW_ENABLED UNET_SKIPS USE_ORTHO_INIT
    USE_SLIDING_EVAL
"""
# Near a setting here, which means something else.
RELATED_SETTINGS = {
    "CASEOPS_ENABLED": "the tokenizer says whether it has case operators",
    "CHECKPOINT_PATH": "ARTIFACT is the file to score",
    "DATA_DIR": "DATA_PATH is the folder of the shards itself",
    "ENABLE_LOOPING_AT_STEP": "ENABLE_LOOPING_AT is a share of the run",
    "EVAL_ONLY": "ARTIFACT is the file to score",
    "GRAD_ACCUM_STEPS": "MICRO_BATCH_TOKENS is the most positions of a pass",
    "MLP_HIDDEN": "MLP_MULT is the hidden width over MODEL_DIM",
    "MTP_LAMBDA": "MTP_LOSS_WEIGHT is for the mean over all heads",
    "ROPE_FRAC": "ROPE_DIMS is the number of rotated dimensions",
    "SWA_START_FRAC": "SWA_START_SCALE is a learning-rate scale",
    "WARMDOWN_FRAC": "WARMDOWN_FRACTION is the most of a run that WARMDOWN_ITERS takes",
    "WEIGHT_DECAY": "MUON_WD, EMBED_WD and ADAM_WD",
    "XSA_START_LAYER": "XSA_LAST_N counts from the last block",
}
# What this script does not have; a star stands for any end. By topic: data, layers, depth,
# training, quantization, evaluation. Whoever adds a setting takes its name out.
ABSENT_SETTINGS = """
    ARTIFACT_DIR CKPT_DIR COPRIME_* COPY_ARTIFACT_TO_CKPT_DIR LOADER_MODE TOKENIZER_META_PATH
    TRAIN_SHARD_LIMIT VAL_BATCH_SIZE VAL_BATCH_TOKENS VAL_DOC_FRACTION VAL_MAX_TOKENS
    VAL_TOKEN_LIMIT

    ACTIVATION_* ASYM_LOGIT_* ATTENTION_SINK ATTN_OUT_GATE_* ATTN_SCALE_INIT BIGRAM_HASH_MODE
    CANON_LAST_N DTG_ENABLED EMBEDDING_DIM ENGRAM_* GATED_* HEAD_DROP LAYER_DROP MLP_ACT
    MLP_SCALE_INIT MOE_* MTP_OFFSET MTP_SHARE_LM_HEAD QK_GAIN_DEPTH_* RESID_MIX_*
    ROPE_TRAIN_SEQ_LEN ROPE_YARN SMEAR_GATE_BOS_FIX SPARSE_ATTN_GATE_INIT_STD STAR_RELU TRIGRAM*
    USE_MOE USE_SWIGLU VALUE_RESID* VE_DIM VE_ENABLED VE_LAYERS VRL_ENABLED

    DEPTH_RECUR* ENABLE_PARALLEL_RESIDUAL_* EVAL_LOOP_DEPTH LOOP_COUNT LOOP_PHASE2_AT LOOP_SCHEDULE
    LORA_* NUM_SHARED_BLOCKS NUM_UNIQUE_LAYERS PARALLEL_FINAL_LANE PARALLEL_FREEZE_LANE0
    PARALLEL_FROM_LAYER PARALLEL_RESIDUAL* RECURRENCE_* RECUR_* TRAIN_LOOP_PHASE_DEPTHS
    UNTIE_LOOP_MLPS

    ADAM_FUSED BATCH_MUON BETA2_NORMUON BYTE_WEIGHTED_* COMPILE_* DDP_BUCKET_CAP_MB DECODER_LR_MULT
    DEEP_SUPERVISION* EMA_END_DECAY EMA_EVAL_AFTER_APPLY EMA_START_DECAY EMA_START_FRAC
    EMA_START_STEP ENTROPY_LOSS ENTROPY_REG FA3_ENABLED FC_LR_MULT FINAL_SELECT_METRIC
    FUSED_CE_ENABLED FUSE_QKV GRADIENT_CHECKPOINT_ENABLED LAWA_* LAYER_LR_SCALE LR_SCHEDULE*
    MOUSSE_* MUON_BETA2 MUON_MOMENTUM_WARMUP_FRACTION MUON_POST_NORM PERLAYER_TRAIN_LR PROJ_LR_MULT
    SDPA_BACKEND SEQ_CHANGE_WARMUP_STEPS SEQ_LEN_BUMP_FRAC SKYLIGHT_MUON SWA_DECAY SWA_DYNAMIC*
    SWA_FRAC SWA_START_STEP SWA_STEPS TRAIN_BATCH_TOKENS_SCHEDULE* TRAIN_SEQ_LEN_END
    TRAIN_SEQ_SCHEDULE* TRITON_ENABLED USE_FA3 USE_NORMUON UW_FLOOR WARMDOWN_SHAPE WD_TAPER_* Z_LOSS

    AR_CALIB_* ATTN_CLIP_SIGMAS ATTN_QUANT_BITS AWQ_* BANK_QAT_* BLOCKWISE_* BROTLI_* BYTE_SHUFFLE*
    EMBED_BITS EMBED_CLIP_SIGMAS FP16_EMBED* FP16_LATE_K_LAYERS GPTQ_* HESSIAN_* INT6_QAT
    INT8_ATTN_LAYERS INT8_GROUP_OVERRIDES INT8_KEEP_FLOAT_* INT8_MLP_LAYERS KEEP_FLOAT_EXTRA
    LATE_K_FP16 LOWBIT_* LQER_* MAIN_QUANT_BITS MATRIX_BITS MATRIX_CLIP_SIGMAS MIXED_QUANT_*
    MLP_CLIP_SIGMAS MLP_FC_QUANT_BITS MLP_PROJ_QUANT_BITS MLP_QUANT_BITS MODEL_CODEC_LEVEL
    N_INT6_LAYERS OUTLIER_QUANT PRUNE_* QAT_* QUANT_BITS* QUANT_CLIP_RANGE QUANT_LEVELS QUANT_MODE
    QUANT_PRESET SDCLIP_* SOFT_ROUND_* TARGET_MB USE_GPTQ USE_INT6* USE_ZSTD

    ADAPTIVE_LR* AGREE_ADD_BOOST DOC_ISOLATED_EVAL EVAL_INCLUDE_TAIL EVAL_MODE EVAL_TEMPERATURE
    EVAL_TIMEOUT_SECONDS EXPERT_* FAST_EVAL_ONLY GLOBAL_TTT_* LAMBDA_HI LAMBDA_LO MIXER_* NGRAM_*
    PHASED_TTT_* POST_EMA_DIAGNOSTIC PPM_* REPTILE_TTT SKIP_FINAL_EVAL SKIP_SLIDING_WINDOW
    SKIP_TRAINING SLIDING_EVAL_MAX_TOKENS SLOT_* STRIDE_OGD* TEMPERATURE_SCALE TOKEN_BOOST
    TOKEN_ORDER TOKEN_THRESHOLD TTT_BATCH_SEQS TTT_BETA* TTT_CAUSAL TTT_CHUNK_TOKENS
    TTT_COSINE_* TTT_EPOCHS TTT_EVAL_* TTT_EVERY_* TTT_FREEZE_* TTT_GRAD_* TTT_K_* TTT_LOCAL_*
    TTT_LORA_* TTT_LR_* TTT_M* TTT_O* TTT_P* TTT_Q_* TTT_S* TTT_T* TTT_U* TTT_V_* TTT_W*
    USE_HEDGE_MIXER WITHIN_* WORD_BOOST WORD_NORMALIZE WORD_ORDER WORD_TAU
"""


def is_foreign_setting(variable: str) -> bool:
    """Whether a variable, which is no setting, is a name that other entries read."""
    if variable in OTHER_NAMES or variable in RELATED_SETTINGS or variable in ALWAYS_ON.split():
        return True
    absent = ABSENT_SETTINGS.split()
    beginnings = tuple(name[:-1] for name in absent if name.endswith("*"))
    return variable in absent or variable.startswith(beginnings)


def is_off(text: str) -> bool:
    """Whether a value, as one types it, switches its feature off."""
    try:
        return float(text) == 0
    except ValueError:
        return text.strip().lower() in ("false", "off", "no", "none")


def is_met(variable: str, text: str, s: Settings) -> bool:
    """Whether a run does anyway what one of OTHER_NAMES asks for."""
    name = OTHER_NAMES[variable]
    value = getattr(s, name)
    if variable in SWITCHES_OF_SETTINGS:
        return is_off(text) == is_off(as_typed(value))
    (field,) = [field for field in fields_of() if field.name == name]
    try:
        return parse_value(field, text) == value
    except ValueError:
        return False


def switched_off_elsewhere(environment: Mapping[str, str], s: Settings, trains: bool) -> list[str]:
    """What names of other entries would switch off, but is on in this run."""
    used = {field.name for field in fields_of("run", "model", "evaluation")}
    if trains:
        used = {field.name for field in fields_of()}

    problems = []
    for variable, text in sorted(environment.items()):
        if not text or not is_off(text):
            continue
        if variable in ALWAYS_ON.split():
            problems.append(f"{variable}={text} switches off what is always on here: unset it")
        name = OTHER_NAMES.get(variable, "")
        if name not in used:
            continue
        value = as_typed(getattr(s, name))
        if not is_off(value):
            problems.append(f"{variable}={text} is {name.upper()} here, which is {value}: set that")
    return problems


def foreign_settings(environment: Mapping[str, str], s: Settings) -> list[str]:
    """Warnings of names of other entries that ask for what this run does not do, a line a kind.

    None for a name that asks for what the run does anyway, or switches off what is not here.
    """
    explained = {*ALWAYS_ON.split(), *(field.name.upper() for field in fields_of())}
    renamed = []
    related = []
    absent = []
    for variable, text in sorted(environment.items()):
        if not text or variable in explained:
            continue
        if variable in OTHER_NAMES:
            name = OTHER_NAMES[variable]
            if not is_met(variable, text, s):
                value = as_typed(getattr(s, name))
                renamed.append(f"{variable}={text} is {name.upper()} (now {value})")
        elif variable in RELATED_SETTINGS:
            related.append(f"{variable}={text} ({RELATED_SETTINGS[variable]})")
        elif is_foreign_setting(variable) and not is_off(text):
            absent.append(f"{variable}={text}")

    warnings = []
    if renamed:
        warnings.append(f"warning: another name here, ignored: {', '.join(renamed)}")
    if related:
        warnings.append(f"warning: set otherwise here, ignored: {', '.join(related)}")
    if absent:
        warnings.append(f"warning: not here, ignored: {', '.join(absent)}")
    return warnings


def mistyped_settings(environment: Mapping[str, str]) -> list[str]:
    """A warning for each variable that is no setting but looks like one (NUM_LAYER, LR_MATRIX)."""
    names = [field.name.upper() for field in fields_of()]
    # A name with its words in another order is looked for under its words in order of the alphabet.
    by_words = {"_".join(sorted(name.split("_"))): name for name in names}
    candidates = {**by_words, **{name: name for name in names}}

    warnings = []
    for variable in environment:
        if variable in names or is_foreign_setting(variable):
            continue
        swapped = "_".join(sorted(variable.split("_")))
        if swapped in candidates:
            meant = candidates[swapped]
        else:
            close = difflib.get_close_matches(variable, candidates, n=1, cutoff=0.88)
            if not close:
                continue
            meant = candidates[close[0]]
        warnings.append(f"warning: {variable} is not a setting; did you mean {meant}?")
    return warnings


def choose_preset(given: Mapping) -> tuple[str, str]:
    """The name of the preset for what is given, and why it was chosen."""
    wanted = given.get("preset", "auto")
    if wanted != "auto":
        return wanted, "asked for"
    device = given.get("device", "auto")
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return "record", "CUDA is there"
    return "pocket", "no CUDA"


def settings_from(
    environment: Mapping[str, str], stored: Mapping | None = None
) -> tuple[Settings, str]:
    """Settings from environment variables, and a line that says which preset was chosen.

    A variable wins over `stored`, the settings in an artifact or a checkpoint, and that over the
    preset. But no variable can change the model of an artifact, or anything that a checkpoint
    stores. Raises a UserError that lists all problems at once.
    """
    stored = dict(stored or {})
    given = {}
    problems = []
    for field in fields_of():
        text = environment.get(field.name.upper(), "")
        if not text:
            continue
        try:
            given[field.name] = parse_value(field, text)
        except ValueError as error:
            problems.append(f"{field.name.upper()}={text} {error}")

    if "vocab_size" in stored and given.get("vocab_size") == 0:
        # The model was made for a vocabulary: it cannot follow another one.
        given.pop("vocab_size")

    trains = not given.get("artifact")
    fixed_fields = fields_of() if trains else fields_of("model")
    for field in fixed_fields:
        name = field.name
        if name in stored and name in given and given[name] != stored[name]:
            problems.append(
                f"{name.upper()}={given[name]} differs from the stored model's {stored[name]}"
            )

    # Either of these two settings, given alone, says what the other one must be.
    if given.get("int5_mlp", "auto") != "auto":
        given.setdefault("quant", "rows")
    elif given.get("quant") == "fit":
        given.setdefault("int5_mlp", "auto")

    # So does an average: what a preset has in its place would hide it.
    if given.get("swa_enabled"):
        given.setdefault("ema_enabled", False)
    if "ema_decay" in given:
        given.setdefault("ema_span", 0.0)

    preset, reason = choose_preset(given)
    settings = Settings(**{**PRESETS[preset], **stored, **given})
    problems += combination_problems(settings, trains)
    problems += switched_off_elsewhere(environment, settings, trains)
    require(not problems, "settings: " + "; ".join(problems))
    return settings, f"preset:{preset} ({reason})"


def help_text() -> str:
    """What --help prints: every setting with its type, defaults and purpose."""
    lines = [
        "usage: [SETTING=value ...] python train_gpt.py",
        "",
        "Settings are environment variables. Defaults are PRESET=record's; [PRESET=pocket's].",
    ]
    for group in ("run", "model", "training", "artifact", "evaluation"):
        lines += ["", f"{group}:"]
        for field in fields_of(group):
            default = as_typed(field.default) or "empty"
            pocket = PRESETS["pocket"].get(field.name, field.default)
            if pocket != field.default:
                default += f" [{as_typed(pocket)}]"
            purpose = field.metadata["help"]
            if field.metadata["choices"]:
                purpose += f" ({', '.join(field.metadata['choices'])})"
            lines.append(f"  {field.name.upper()} {field.type} = {default}: {purpose}")
    return "\n".join(lines)


# The token that begins every document.
BOS = 1
# A target that does not count.
IGNORED = -1


# ==================================================================================================
# Attention: one interface, four backends
# ==================================================================================================


class AttentionInputs(NamedTuple):
    """All that a backend gets."""

    # (batch, positions, heads, head_dim)
    queries: Tensor
    # (batch, positions, kv_heads, head_dim), as is `values`; each serves heads / kv_heads queries.
    keys: Tensor
    values: Tensor
    # What keeps a query to its segment, which is what a row has of one document, in the backend's
    # form; None: a row is one segment.
    limits: Tensor | None = None


def segment_mask(starts: Tensor) -> Tensor:
    """Which keys a query may attend to: itself and what is before it in its segment.

    `starts` says where segments begin, bool (batch, positions) -> bool (batch, queries, keys).
    """
    segments = starts.cumsum(1)
    same = segments[:, :, None] == segments[:, None, :]
    return same.tril()


def segment_ends(starts: Tensor) -> Tensor:
    """Where each segment begins in the rows laid end to end, and where the last ends: int32 (n,).

    n does not depend on the tokens, since each number of segments would need a compiled graph of
    its own: what is left over are empty segments. There is room for one in 64 positions and three
    more in each row, on average; documents beyond that are joined to the one before.
    """
    batch, length = starts.shape
    total = starts.numel()
    most = batch * (length // 64 + 4)
    positions = torch.arange(total, device=starts.device)
    begins_row = positions % length == 0
    begins_inside = starts.flatten() & ~begins_row
    has_room = begins_inside.cumsum(0) <= most - batch
    begins = begins_row | begins_inside & has_room
    found = torch.where(begins, positions, total).sort().values[:most]
    return F.pad(found, (0, 1), value=total).int()


def in_segments(attend: Callable, inputs: AttentionInputs) -> Tensor:
    """Attention of a package's function for sequences of several lengths, laid end to end."""
    batch, length = inputs.queries.shape[:2]
    ends = inputs.limits
    flat = [x.flatten(0, 1) for x in (inputs.queries, inputs.keys, inputs.values)]
    return attend(*flat, ends, ends, length, length, causal=True)


def attend_flash3(inputs: AttentionInputs) -> Tensor:
    """FlashAttention-3 (Shah et al. 2024), for Hopper."""
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

    if inputs.limits is None:
        out = flash_attn_func(inputs.queries, inputs.keys, inputs.values, causal=True)
    else:
        out = in_segments(flash_attn_varlen_func, inputs)
    # Versions differ in whether the row sums come with it.
    out = out[0] if isinstance(out, tuple) else out
    return out.view_as(inputs.queries)


def attend_flash2(inputs: AttentionInputs) -> Tensor:
    """FlashAttention-2 (Dao 2023), for Ampere and newer."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    if inputs.limits is None:
        return flash_attn_func(inputs.queries, inputs.keys, inputs.values, causal=True)
    return in_segments(flash_attn_varlen_func, inputs).view_as(inputs.queries)


def attend_sdpa(inputs: AttentionInputs) -> Tensor:
    """torch's own kernels."""
    q = inputs.queries.transpose(1, 2)
    k = inputs.keys.transpose(1, 2)
    v = inputs.values.transpose(1, 2)
    if q.dtype == torch.float32:
        # CUDA's kernel that saves memory in float32 takes no grouped queries.
        group = q.size(1) // k.size(1)
        k = k.repeat_interleave(group, 1)
        v = v.repeat_interleave(group, 1)
    mask = None if inputs.limits is None else inputs.limits[:, None]
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
    return out.transpose(1, 2)


def attend_blocked(inputs: AttentionInputs) -> Tensor:
    """Plain products for CPUs, block of queries by block, each with just the keys up to its end.

    Compiled, it is 2.6 times as fast as SDPA on two cores with 256 positions: a quarter of the
    products are never made (44% from 1,024 positions on), and the compiler fuses the rest. Queries
    that share a key head become rows of one product; weights are normalized after their product
    with the values, which is smaller.
    """
    batch, length, heads, head_dim = inputs.queries.shape
    kv_heads = inputs.keys.size(2)
    group = heads // kv_heads
    block = max(128, -(-length // 8))

    # q: (batch * kv_heads, length * group, head_dim); k and v: (batch * kv_heads, length, head_dim)
    q = inputs.queries * head_dim**-0.5
    q = q.view(batch, length, kv_heads, group, head_dim).transpose(1, 2)
    q = q.flatten(0, 1).flatten(1, 2)
    k = inputs.keys.transpose(1, 2).reshape(-1, length, head_dim)
    v = inputs.values.transpose(1, 2).reshape(-1, length, head_dim)

    allowed = inputs.limits
    if allowed is None:
        positions = torch.arange(length, dtype=torch.int32, device=q.device)
        allowed = (positions <= positions[:, None])[None]
    # (batch or 1, 1, queries, 1, keys)
    hidden = torch.where(allowed, 0.0, -math.inf)[:, None, :, None]
    outputs = []
    for start in range(0, length, block):
        end = min(start + block, length)
        scores = torch.bmm(q[:, start * group : end * group], k[:, :end].transpose(1, 2))
        scores = scores.view(batch, kv_heads, -1, group, end).float()
        scores = scores + hidden[:, :, start:end, :, :end]
        largest = scores.detach().amax(-1, keepdim=True)
        weights = (scores - largest).exp().to(v.dtype).view(len(q), -1, end)
        out = torch.bmm(weights, v[:, :end]).float() / weights.float().sum(-1, keepdim=True)
        outputs.append(out.to(v.dtype))
    out = torch.cat(outputs, 1).view(batch, kv_heads, length, group, head_dim)
    return out.transpose(1, 2).reshape(batch, length, heads, head_dim)


class AttentionBackend(NamedTuple):
    """Causal attention, and the form in which it takes limits."""

    # AttentionInputs -> (batch, positions, heads, head_dim).
    attend: Callable[[AttentionInputs], Tensor]
    # Where segments begin, bool (batch, positions) -> the limits.
    limits_of: Callable[[Tensor], Tensor]


ATTENTION_BACKENDS = {
    "flash3": AttentionBackend(attend_flash3, segment_ends),
    "flash2": AttentionBackend(attend_flash2, segment_ends),
    "sdpa": AttentionBackend(attend_sdpa, segment_mask),
    "blocked": AttentionBackend(attend_blocked, segment_mask),
}


# ==================================================================================================
# Layers: attention, MLP, block, and one class for each feature
#
# `parameter_roles` of a module names a role, a row of the table ROLES, for each of its parameters.
# ==================================================================================================


class Context(NamedTuple):
    """What all blocks of one forward pass share."""

    # The embeddings, normed and blended, memory tokens first: (batch, positions, model_dim).
    embedding: Tensor
    # The tokens of the text, without memory tokens: int64 (batch, tokens).
    tokens: Tensor
    # Cosines and sines of the positions, see Rotary: float32 (2, positions, 1, rotary_dims / 2).
    rotation: Tensor
    # Where the segments begin that attention does not leave, bool (batch, positions), and the same
    # in the backend's form; None: rows are not divided.
    starts: Tensor | None = None
    limits: Tensor | None = None


def norm(x: Tensor) -> Tensor:
    """RMSNorm without weights over the last dimension, in x's type.

    The type is said, since under a caller's CUDA autocast torch 2.12 and newer return float32.
    """
    return F.rms_norm(x, (x.size(-1),)).to(x.dtype)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in x's type. Weights are kept in float32.

    A matrix is (out, in), or (batch, out, in): each row of x (batch, positions, in) has its own.
    """
    weight = weight.to(x.dtype)
    return F.linear(x, weight) if weight.ndim == 2 else x @ weight.mT


def vectors_of(tokens: Tensor, table: Tensor) -> Tensor:
    """The vectors of tokens, int64 (batch, tokens) -> (batch, tokens, dim).

    The table is (pieces, dim), or (batch, pieces, dim): each row of tokens has its own.
    """
    if table.ndim == 2:
        return F.embedding(tokens, table)
    first = table.size(1) * torch.arange(len(table), device=tokens.device)
    return F.embedding(tokens + first[:, None], table.flatten(0, 1))


def orthogonal(rows: int, columns: int, gain: float = 1.0) -> nn.Parameter:
    """A matrix with orthonormal rows or columns, whichever are fewer, times gain."""
    return nn.Parameter(nn.init.orthogonal_(torch.empty(rows, columns), gain=gain))


def constant(*shape: int, value: float) -> nn.Parameter:
    """A parameter that starts as a constant."""
    return nn.Parameter(torch.full(shape, value))


class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021) on the first `dims` of each head.

    The other dimensions know no position (partial RoPE, #315). Beyond the training length the base
    is rescaled (NTK-aware), so that far positions turn like known ones.
    """

    def __init__(self, s: Settings):
        super().__init__()
        self.train_length = s.train_seq_len
        longest = max(s.eval_seq_len, s.train_seq_len)
        # Buffers, made once: a table that grows on demand would need another compiled graph.
        self.register_buffer("near", self.table(s, s.train_seq_len), persistent=False)
        self.register_buffer("far", self.table(s, longest), persistent=False)

    @staticmethod
    def table(s: Settings, length: int) -> Tensor:
        """Cosines and sines, float32 (2, length, 1, rotary_dims / 2)."""
        dims = s.rotary_dims
        base = s.rope_base * (length / s.train_seq_len) ** (dims / max(dims - 2, 1))
        frequencies = base ** (-torch.arange(0, dims, 2, dtype=torch.float32) / dims)
        positions = torch.arange(length, dtype=torch.float32)
        angles = torch.outer(positions, frequencies)[:, None, :]
        return torch.stack((angles.cos(), angles.sin()))

    def forward(self, length: int) -> Tensor:
        """Cosines and sines of the first `length` positions."""
        table = self.near if length <= self.train_length else self.far
        return table[:, :length]


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the first dimensions of x (batch, positions, heads, head_dim) by their positions."""
    cos, sin = rotation.to(x.dtype)
    half = rotation.size(-1)
    first, second, still = x.split((half, half, x.size(-1) - 2 * half), dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos, still), dim=-1)


def offset_keys(keys: Tensor, rotary_dims: int, starts: Tensor | None = None) -> Tensor:
    """Keys whose dimensions behind `rotary_dims` are those of the position before.

    So a query can ask what came after a token like its own, in one layer: induction needs two
    otherwise. The first position of a row keeps its own, and so do those where segments start, bool
    (batch, positions). From modded-nanogpt #169; keys are (batch, positions, kv_heads, head_dim).
    """
    turning = keys[..., :rotary_dims]
    still = keys[..., rotary_dims:]
    before = torch.cat((still[:, :1], still[:, :-1]), dim=1)
    if starts is not None:
        before = torch.where(starts[..., None, None], still, before)
    return torch.cat((turning, before), dim=-1)


def exclude_own_value(attended: Tensor, values: Tensor) -> Tensor:
    """What attention gathered, less its component along the position's own value (XSA).

    What a position knows anyway need not take room in what it learns of others (arXiv 2603.09078,
    #265). `attended` is (batch, positions, heads, head_dim), `values` have kv_heads. The first
    position, which attends to itself alone, gets 0.
    """
    num_kv_heads = values.size(2)
    # Query heads by the value head that they share.
    grouped = attended.unflatten(2, (num_kv_heads, -1))
    direction = F.normalize(values, dim=-1)[:, :, :, None]
    own = (grouped * direction).sum(-1, keepdim=True) * direction
    return (grouped - own).flatten(2, 3)


class SparseAttentionGate(nn.Module):
    """A gate on each head, which reads the first channels of attention's input (#1787).

    At first all gates are half open.
    """

    parameter_roles = {"weight": "vector"}

    def __init__(self, s: Settings):
        super().__init__()
        self.scale = s.sparse_attn_gate_scale
        self.weight = constant(s.num_heads, s.gate_window, value=0.0)

    def forward(self, x: Tensor, attended: Tensor) -> Tensor:
        """x (batch, positions, dim); attended (batch, positions, heads, head_dim) -> gated."""
        window = x[..., : self.weight.size(1)].contiguous()
        gate = torch.sigmoid(self.scale * linear(window, self.weight))
        return gate[..., None] * attended


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al. 2023).

    Queries and keys are normalized (Henry et al. 2020), with a learned gain for each query head.
    """

    parameter_roles = {
        "query": "attention",
        "key": "attention",
        "value": "attention",
        "out": "attention",
        "gain": "vector",
    }

    def __init__(self, s: Settings, layer: int, attend: Callable[[AttentionInputs], Tensor]):
        super().__init__()
        self.layer = layer
        self.attend = attend
        self.head_dim = s.head_dim
        self.offsets_keys = s.key_offset_enabled
        self.excludes_own_value = layer >= s.num_layers - s.xsa_last_n
        self.query = orthogonal(s.model_dim, s.model_dim)
        self.key = orthogonal(s.num_kv_heads * s.head_dim, s.model_dim)
        self.value = orthogonal(s.num_kv_heads * s.head_dim, s.model_dim)
        # Small, so that the stream does not grow with the number of layers (GPT-2).
        self.out = orthogonal(s.model_dim, s.model_dim, gain=(2 * s.num_layers) ** -0.5)
        self.gain = constant(s.num_heads, value=s.qk_gain_init)
        self.gate = SparseAttentionGate(s) if s.sparse_attn_gate_enabled else None

    def forward(self, x: Tensor, context: Context, scale: Tensor) -> Tensor:
        """x (batch, positions, dim), normed -> what to add to the stream, times scale (dim,)."""
        # One product for queries, keys and values: fewer launches, x is read once.
        heads = linear(x, torch.cat((self.query, self.key, self.value), dim=-2))
        heads = heads.unflatten(-1, (-1, self.head_dim))
        num_queries = len(self.gain)
        num_keys = self.key.size(-2) // self.head_dim
        queries_and_keys, values = heads.split((num_queries + num_keys, num_keys), dim=-2)

        # Keys have a gain of 1. The gains are expanded first, so that their gradient is summed over
        # a head's dimensions where it is made, and only then over all positions.
        gain = torch.cat((self.gain, self.gain.new_ones(num_keys)))
        gain = gain.expand(queries_and_keys.shape[:-1])
        queries_and_keys = norm(queries_and_keys) * gain[..., None]
        queries_and_keys = rotate(queries_and_keys, context.rotation).to(x.dtype)
        queries, keys = queries_and_keys.split((num_queries, num_keys), dim=-2)
        if self.offsets_keys:
            keys = offset_keys(keys, 2 * context.rotation.size(-1), context.starts)

        attended = self.attend(AttentionInputs(queries, keys, values, context.limits))
        if self.excludes_own_value:
            attended = exclude_own_value(attended, values)
        if self.gate is not None:
            attended = self.gate(x, attended)
        # To scale the matrix costs less than to scale what it gives.
        return linear(attended.flatten(2), scale[:, None] * self.out)


class SquaredReLU(torch.autograd.Function):
    """relu(x) ** 2 (So et al. 2021).

    The backward pass needs the result, which the next product keeps anyway, but not x.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """The square of what is positive."""
        result = x.relu().square()
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        """2 relu(x) times the gradient."""
        (result,) = ctx.saved_tensors
        return 2 * gradient * result.sqrt()


class MLP(nn.Module):
    """Two matrices around a squared ReLU (So et al. 2021), which may be leaky (#549).

    A leaky one has y = (slope * x)^2 below 0, so that no unit is ever without gradient.
    """

    parameter_roles = {"up": "mlp", "down": "mlp"}

    def __init__(self, s: Settings):
        super().__init__()
        self.negative_slope = s.negative_slope
        self.up = orthogonal(s.mlp_hidden, s.model_dim)
        self.down = orthogonal(s.model_dim, s.mlp_hidden, gain=(2 * s.num_layers) ** -0.5)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """x (batch, positions, dim), normed -> what to add to the stream, times scale (dim,)."""
        hidden = linear(x, self.up)
        if self.negative_slope:
            hidden = F.leaky_relu(hidden, self.negative_slope).square()
        else:
            hidden = SquaredReLU.apply(hidden)
        return linear(hidden, scale[:, None] * self.down)


class LaneWeights(nn.Module):
    """How the two lanes of a block keep what they have and take what the block writes (#1530)."""

    parameter_roles = {"keep": "vector", "write": "vector"}

    def __init__(self):
        super().__init__()
        self.keep = constant(2, value=1.1)
        # What attention and MLP write, each into both lanes.
        self.write = constant(2, 2, value=1.0)

    def forward(self, lanes: tuple[Tensor, Tensor], written: tuple[Tensor, Tensor]) -> list[Tensor]:
        """The lanes before, what attention and MLP add, (batch, positions, dim) each -> lanes."""
        attended, transformed = written
        results = []
        for number, lane in enumerate(lanes):
            keep = self.keep[number].to(lane.dtype)
            write = self.write[:, number].to(lane.dtype)
            results.append(keep * lane + write[0] * attended + write[1] * transformed)
        return results


class Block(nn.Module):
    """Attention and MLP, each normed before (Xiong et al. 2020) and scaled per channel after.

    The stream is first mixed with the embedding, channel by channel, as in modded-nanogpt.
    """

    parameter_roles = {"mix": "vector", "attention_scale": "vector", "mlp_scale": "vector"}

    def __init__(self, s: Settings, layer: int, attend: Callable[[AttentionInputs], Tensor]):
        super().__init__()
        self.layer = layer
        self.attention = Attention(s, layer, attend)
        self.mlp = MLP(s)
        self.mix = nn.Parameter(torch.stack([torch.ones(s.model_dim), torch.zeros(s.model_dim)]))
        self.attention_scale = constant(s.model_dim, value=1.0)
        self.mlp_scale = constant(s.model_dim, value=1.0)
        # LN scale (#315): deeper blocks read a smaller input. A tensor and not a number, so that
        # all blocks share their compiled code.
        norm_scale = (layer + 1) ** -0.5 if s.ln_scale else 1.0
        self.register_buffer("norm_scale", torch.tensor(norm_scale), persistent=False)
        has_lanes = s.parallel_start_layer and layer >= s.parallel_start_layer
        self.lane_weights = LaneWeights() if has_lanes else None

    def mixed(self, x: Tensor, context: Context) -> Tensor:
        """The stream, mixed with the embedding."""
        return self.mix[0].to(x.dtype) * x + self.mix[1].to(x.dtype) * context.embedding

    def attend(self, x: Tensor, context: Context) -> Tensor:
        """What attention adds to a stream (batch, positions, dim)."""
        return self.attention(norm(x) * self.norm_scale, context, self.attention_scale)

    def transform(self, x: Tensor) -> Tensor:
        """What the MLP adds to a stream (batch, positions, dim)."""
        return self.mlp(norm(x) * self.norm_scale, self.mlp_scale)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """The stream before the block (batch, positions, dim) -> the stream after it."""
        x = self.mixed(x, context)
        x = x + self.attend(x, context)
        return x + self.transform(x)

    def forward_in_lanes(self, lanes: tuple[Tensor, Tensor], context: Context) -> list[Tensor]:
        """Attention reads the first lane and the MLP the second, both write into both.

        Neither waits for what the other writes in this block.
        """
        attended = self.attend(self.mixed(lanes[0], context), context)
        transformed = self.transform(lanes[1])
        return self.lane_weights(lanes, (attended, transformed))


class TokenEmbedding(nn.Module):
    """A vector for each piece; if it is tied, the output matrix too (Press and Wolf 2017)."""

    def __init__(self, s: Settings):
        super().__init__()
        # A tied embedding starts small, since logits shall be near 0 at first.
        std = s.tied_embed_init_std if s.tie_embeddings else 1.0
        self.weight = nn.Parameter(torch.randn(s.vocab_size, s.model_dim) * std)
        role = "tied_embedding" if s.tie_embeddings else "embedding"
        self.parameter_roles = {"weight": role}

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """int64 (batch, tokens) -> (batch, tokens, model_dim)."""
        return vectors_of(tokens, self.weight).to(dtype)


class OutputHead(nn.Module):
    """An output matrix of its own, where the embedding is not tied. At first all logits are 0."""

    parameter_roles = {"weight": "head"}

    def __init__(self, s: Settings):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(s.vocab_size, s.model_dim))


class SmearGate(nn.Module):
    """Blend each embedding with the one before it, through a learned gate for each channel (#162).

    A position knows its predecessor before any attention. The gate is shut at BOS, so that no
    document sees the one before it (#1851). A row's first token is blended with itself.
    """

    parameter_roles = {"gate": "vector"}

    def __init__(self, s: Settings):
        super().__init__()
        # sigmoid(0): half open.
        self.gate = constant(s.model_dim, value=0.0)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x (batch, tokens, dim) and its tokens (batch, tokens) -> x, blended."""
        before = torch.cat((x[:, :1], x[:, :-1]), dim=1)
        blended = x + torch.sigmoid(self.gate).to(x.dtype) * (before - x)
        return torch.where((tokens == BOS)[..., None], x, blended)


class BigramHash(nn.Module):
    """A small embedding of each hashed (previous, current) pair, projected to the width (#162).

    It gives statistics of pairs of tokens for the price of a look-up. Rows start at 0: those that
    no pair of the training text hits stay 0 and pack well. At BOS the pair reaches into the
    document before, which tells nothing about the next one.
    """

    parameter_roles = {
        "table": "bigram_table",
        "projection": "bigram_projection",
        "scale": "vector",
    }

    def __init__(self, s: Settings):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(s.bigram_vocab_size, s.bigram_dim))
        self.projection = orthogonal(s.model_dim, s.bigram_dim)
        self.scale = constant(value=0.05)

    def bucket(self, tokens: Tensor) -> Tensor:
        """The table's row for each token and the one before it, int64; token 0 is before all."""
        previous = F.pad(tokens[:, :-1], (1, 0))
        # The multipliers are two primes of the hash function xxHash.
        mixed = previous * 0x9E3779B1 + tokens * 0x85EBCA77
        return ((mixed ^ (mixed >> 17)) & 0x7FFFFFFF) % self.table.size(0)

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """What to add to the embeddings, (batch, tokens, model_dim)."""
        rows = F.embedding(self.bucket(tokens), self.table).to(dtype)
        return linear(rows, self.projection) * self.scale.to(dtype)


class MemoryTokens(nn.Module):
    """Learned vectors in front of every row, which all tokens can attend to (#352).

    They predict nothing. In training they take the positions of a row's first tokens, whose targets
    are left out: so rows, and steps, have as many positions as without memory tokens. In evaluation
    they stand before the window, which is shorter by their number: so no token loses its score.
    Settings.row_tokens and .window_tokens count the tokens that are left.
    """

    parameter_roles = {"vectors": "memory"}

    def __init__(self, s: Settings):
        super().__init__()
        self.vectors = nn.Parameter(0.02 * torch.randn(s.memory_tokens, s.model_dim))

    def prepend_to(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) -> (batch, memory tokens + tokens, dim)."""
        vectors = norm(self.vectors.to(x.dtype))
        return torch.cat((vectors.expand(len(x), -1, -1), x), dim=1)


class SkipConnections(nn.Module):
    """The U-Net's: a decoder block adds an encoder block's output, scaled per channel.

    With gates (#1218) it does not add the two but blends them, channel by channel. A gate starts
    half open.
    """

    parameter_roles = {"scales": "vector", "gates": "vector"}

    def __init__(self, s: Settings):
        super().__init__()
        self.scales = constant(s.num_skips, s.model_dim, value=1.0)
        self.gates = None
        if s.skip_gates_enabled:
            self.gates = constant(s.num_skips, s.model_dim, value=0.0)

    def forward(self, x: Tensor, skip: int, pushed: Tensor) -> Tensor:
        """x with the pushed output, by the scale and the gate with number `skip`."""
        scaled = self.scales[skip].to(x.dtype) * pushed
        if self.gates is None:
            return x + scaled
        return torch.lerp(scaled, x, torch.sigmoid(self.gates[skip]).to(x.dtype))


class Backout(nn.Module):
    """At the end, subtract lambda times the middle state: x <- x - lambda * middle (#339).

    What earlier blocks wrote into the stream for later blocks need not reach the output. Where the
    middle block is looped, its last visit counts.
    """

    parameter_roles = {"amount": "vector"}

    def __init__(self, s: Settings):
        super().__init__()
        self.amount = constant(value=s.backout_lambda_init)

    def forward(self, x: Tensor, middle: Tensor) -> Tensor:
        """The last state without its share of the middle state."""
        return x - self.amount.to(x.dtype) * middle


class MultiTokenPrediction(nn.Module):
    """Auxiliary heads: head i predicts the token i places further on (Gloeckle et al. 2024).

    They train the trunk to look ahead, and are not exported.
    """

    parameter_roles = {"heads": "mtp_head"}

    def __init__(self, s: Settings):
        super().__init__()
        self.loss_weight = s.mtp_loss_weight
        self.heads = nn.Parameter(torch.zeros(s.mtp_num_heads, s.vocab_size, s.model_dim))

    def targets_ahead(self, targets: Tensor, places: int) -> Tensor:
        """The targets `places` further on, in the same shape, so that all heads share one graph."""
        return F.pad(targets[:, places:], (0, places), value=IGNORED)


def softcapped_logits(states: Tensor, output: Tensor, softcap: float) -> Tensor:
    """Score of every piece, float32 (..., vocabulary), within ±softcap (Gemma 2, 2024)."""
    return softcap * torch.tanh(linear(states, output).float() / softcap)


def softcapped_losses(states: Tensor, output: Tensor, softcap: float, targets: Tensor) -> Tensor:
    """Nats for each target, float32, in targets' shape; 0 where it is IGNORED."""
    logits = softcapped_logits(states, output, softcap).flatten(0, -2)
    losses = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(targets.shape)


def losses_and_slopes(logits: Tensor, softcap: float, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Softcapped losses of targets (n,), and how they change with the logits (n, vocabulary).

    The logits are those before the softcap. Losses are float32, slopes have the logits' type. In
    place of c tanh(x / c) scores are 2c sigmoid(2x / c), which is c more everywhere and gives the
    same losses (#1787): it costs less, and so does to find the largest before it.
    """
    turn = 2 / softcap
    capped = torch.sigmoid(turn * logits.float())
    largest = torch.sigmoid(turn * logits.amax(1, keepdim=True).float())
    weights = (2 * softcap * (capped - largest)).exp()
    total = weights.sum(1, keepdim=True)

    is_scored = (targets != IGNORED)[:, None]
    columns = targets.clamp(min=0)[:, None]
    of_target = torch.sigmoid(turn * logits.gather(1, columns).float())
    losses = total.log() - 2 * softcap * (of_target - largest)
    is_target = torch.arange(logits.size(1), device=logits.device) == columns
    # Probabilities less 1 for the target, times the softcap's own slope.
    slopes = (weights / total - is_target.float()) * (4 * capped * (1 - capped))
    losses = torch.where(is_scored, losses, 0.0)[:, 0]
    return losses, torch.where(is_scored, slopes, 0.0).to(logits.dtype)


# The most logits that are stored at once. On a CPU 8 MB of float32 stay in its cache. A GPU must be
# filled by the products of a chunk: those of 16,384 positions and 8,192 pieces do, and their logits
# take 256 MB in bfloat16.
MOST_LOGITS = 1 << 21
MOST_LOGITS_ON_GPU = 1 << 27


def chunks_of(positions: Tensor, vocabulary: int) -> tuple[Tensor, ...]:
    """Parts of (n, ...), equal but for the last, so small that the logits of one may be stored."""
    most = MOST_LOGITS_ON_GPU if positions.is_cuda else MOST_LOGITS
    count = -(-len(positions) * vocabulary // most)
    return positions.split(-(-len(positions) // count))


def after(targets: Tensor, result: Tensor) -> Tensor:
    """The targets, which wait until a number of another chunk is known.

    A compiler would else work on several chunks at once, and store all their logits.
    """
    # Never true, of NaN and infinity neither; but no compiler can know that.
    return targets + (result.flatten()[0] * 0 == 1)


class SummedLoss(torch.autograd.Function):
    """The sum of softcapped losses, which never stores the logits of more than a chunk.

    The gradients are computed with the loss, so that logits are neither kept nor computed twice
    (Liger Kernel, Hsu et al. 2024). The backward pass scales them.
    """

    @staticmethod
    def forward(
        ctx, states: Tensor, output: Tensor, softcap: float, targets: Tensor, rule: Callable
    ) -> Tensor:
        """Of states (..., dim) and targets (...); `rule` is losses_and_slopes or its compiled code.

        `output` is (vocabulary, dim).
        """
        weight = output.to(states.dtype)
        losses = []
        states_gradients = []
        # Summed in the weights' own float32.
        output_gradient = torch.zeros_like(output)
        chunks = chunks_of(states.flatten(0, -2), len(output))
        targets_of_chunks = chunks_of(targets.flatten(), len(output))
        for chunk, chunk_targets in zip(chunks, targets_of_chunks, strict=True):
            chunk_targets = after(chunk_targets, output_gradient)
            chunk_losses, slopes = rule(linear(chunk, weight), softcap, chunk_targets)
            losses.append(chunk_losses)
            states_gradients.append(slopes @ weight)
            output_gradient = output_gradient + slopes.T @ chunk
        ctx.save_for_backward(torch.cat(states_gradients).view_as(states), output_gradient)
        return torch.cat(losses).sum()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of states and output, times that of the sum."""
        states_gradient, output_gradient = ctx.saved_tensors
        scaled = states_gradient * gradient.to(states_gradient.dtype)
        return scaled, output_gradient * gradient, None, None, None


# ==================================================================================================
# GPT: the trunk over an explicit order of layers, and the loss
# ==================================================================================================


class Visit(NamedTuple):
    """One place in the order in which the trunk runs its blocks."""

    layer: int
    # Whether its output is pushed, for a later visit to take.
    pushes: bool = False
    # The number of the skip connection through which it first takes the last pushed output.
    skip: int | None = None


def trunk_order(s: Settings, num_loops: int) -> list[Visit]:
    """The U-Net: visits of the first half push their outputs, later ones take them in reverse.

    The blocks LOOP_START to LOOP_END are repeated `num_loops` times (#1394, #1420): more depth, no
    more weights. With an odd number of visits the last takes nothing.
    """
    layers = s.visited_layers(num_loops)
    half = len(layers) // 2
    encoder = [Visit(layer, pushes=True) for layer in layers[:half]]
    decoder = []
    for skip, layer in enumerate(layers[half:]):
        decoder.append(Visit(layer, skip=skip if skip < half else None))
    return encoder + decoder


class GPT(nn.Module):
    """The model: embedding, a U-Net of blocks, and logits. Losses are in nats."""

    def __init__(self, s: Settings, runtime: Runtime):
        super().__init__()
        self.dtype = runtime.dtype
        self.softcap = s.logit_softcap
        self.memory_tokens = s.memory_tokens
        self.separates_documents = s.document_attention
        # Without and with the loops.
        self.plain_order = trunk_order(s, num_loops=0)
        self.looped_order = trunk_order(s, s.num_loops)
        self.middle_layer = s.middle_layer
        self.run_block = runtime.compile(Block.forward, "blocks")
        self.run_block_in_lanes = runtime.compile(Block.forward_in_lanes, "blocks")
        self.losses_of_chunk = runtime.compile(softcapped_losses, "blocks")
        self.losses_and_slopes = runtime.compile(losses_and_slopes, "blocks")

        # Initial values are drawn in this order, which is a part of what SEED means.
        backend = ATTENTION_BACKENDS[runtime.attention]
        self.limits_of = backend.limits_of
        embedding = TokenEmbedding(s)
        blocks = [Block(s, layer, backend.attend) for layer in range(s.num_layers)]
        bigram = BigramHash(s) if s.bigram_vocab_size else None
        memory = MemoryTokens(s) if s.memory_tokens else None

        # Artifacts hold the parameters without their names, in this order.
        self.embedding = embedding
        self.head = None if s.tie_embeddings else OutputHead(s)
        self.skips = SkipConnections(s) if s.num_skips else None
        self.memory = memory
        self.backout = Backout(s) if s.backout_enabled else None
        self.mtp = MultiTokenPrediction(s) if s.mtp_num_heads else None
        self.rotary = Rotary(s)
        self.blocks = nn.ModuleList(blocks)
        self.bigram = bigram
        self.smear = SmearGate(s) if s.smear_enabled else None

    def roles(self) -> dict[str, str]:
        """The role of every parameter by its name: a key of the table ROLES."""
        found = {}
        for prefix, module in self.named_modules():
            for name, _ in module.named_parameters(recurse=False):
                found[f"{prefix}.{name}"] = module.parameter_roles[name]
        return found

    @property
    def output(self) -> Tensor:
        """The output matrix, (vocabulary, model_dim)."""
        return self.embedding.weight if self.head is None else self.head.weight

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 (batch, tokens) -> normed embeddings (batch, memory tokens + tokens, dim)."""
        x = self.embedding(tokens, self.dtype)
        if self.bigram is not None:
            x = x + self.bigram(tokens, self.dtype)
        x = norm(x)
        if self.smear is not None:
            x = self.smear(x, tokens)
        if self.memory is not None:
            x = self.memory.prepend_to(x)
        return x

    def trunk(self, x: Tensor, context: Context, order: list[Visit]) -> Tensor:
        """Run the blocks in this order: (batch, positions, dim) -> the same."""
        pushed = []
        # The MLP's lane, from the block on where attention and MLP have a lane each.
        second = None
        for visit in order:
            block = self.blocks[visit.layer]
            if block.lane_weights is not None and second is None:
                second = x
            if visit.skip is not None:
                x = self.skips(x, visit.skip, pushed.pop())
            if second is None:
                x = self.run_block(block, x, context)
            else:
                x, second = self.run_block_in_lanes(block, (x, second), context)
            if visit.pushes:
                pushed.append(x)
            if visit.layer == self.middle_layer:
                middle = x
        if second is not None:
            x = (x + second) / 2
        if self.backout is not None:
            x = self.backout(x, middle)
        return x

    def document_starts(self, tokens: Tensor) -> Tensor | None:
        """Where rows and documents begin, bool (batch, tokens); None if rows are not divided."""
        if not self.separates_documents:
            return None
        positions = torch.arange(tokens.size(1), device=tokens.device)
        return (positions == 0) | (tokens == BOS)

    def hidden(self, tokens: Tensor, looped: bool = True) -> Tensor:
        """Final states of the tokens, normed: int64 (batch, tokens) -> (batch, tokens, dim).

        Without `looped` each block runs once, as early in training.
        """
        embedding = self.embed(tokens)
        starts = self.document_starts(tokens)
        limits = None if starts is None else self.limits_of(starts)
        rotation = self.rotary(embedding.size(1))
        context = Context(embedding, tokens, rotation, starts, limits)
        # Another view: were x the very tensor in the context, the first block would be compiled as
        # a case of its own.
        order = self.looped_order if looped else self.plain_order
        x = self.trunk(embedding.view_as(embedding), context, order)
        return norm(x[:, self.memory_tokens :])

    def logits(self, tokens: Tensor) -> Tensor:
        """Scores of the next piece: int64 (batch, tokens) -> float32 (..., vocabulary)."""
        return softcapped_logits(self.hidden(tokens), self.output, self.softcap)

    def token_losses(
        self, tokens: Tensor, targets: Tensor, positions: Tensor | None = None
    ) -> Tensor:
        """Nats of each target, float32 in the targets' shape.

        Targets follow each token, int64 (batch, tokens), or those at `positions` (batch, n): the
        output layer works for these alone.
        """
        hidden = self.hidden(tokens)
        if positions is not None:
            hidden = torch.take_along_dim(hidden, positions[..., None], dim=1)
        losses = []
        chunks = chunks_of(hidden.flatten(0, 1), len(self.output))
        targets_of_chunks = chunks_of(targets.flatten(), len(self.output))
        for chunk, chunk_targets in zip(chunks, targets_of_chunks, strict=True):
            if losses:
                chunk_targets = after(chunk_targets, losses[-1])
            losses.append(self.losses_of_chunk(chunk, self.output, self.softcap, chunk_targets))
        return torch.cat(losses).view(targets.shape)

    def summed_loss(self, states: Tensor, output: Tensor, targets: Tensor) -> Tensor:
        """Nats of all targets, float32, by an output matrix."""
        return SummedLoss.apply(states, output, self.softcap, targets, self.losses_and_slopes)

    def forward(
        self, tokens: Tensor, targets: Tensor, looped: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Training losses of rows, int64 (rows, train_seq_len) each, summed over their targets.

        Returns what to minimise and, without gradient, its part that predicts the next token.
        """
        # Memory tokens take the positions of a row's first tokens.
        tokens = tokens[:, self.memory_tokens :]
        targets = targets[:, self.memory_tokens :]
        hidden = self.hidden(tokens, looped)
        loss = self.summed_loss(hidden, self.output, targets)
        objective = loss
        if self.mtp is not None:
            weight = self.mtp.loss_weight / len(self.mtp.heads)
            for places, head in enumerate(self.mtp.heads, start=1):
                ahead = self.mtp.targets_ahead(targets, places)
                head_loss = self.summed_loss(hidden, head, ahead)
                objective = objective + weight * head_loss
        return objective, loss.detach()


# ==================================================================================================
# Optimizers: one table of roles; Muon and AdamW
# ==================================================================================================


class Role(NamedTuple):
    """How parameters of a role are trained, and how they are stored in the artifact."""

    # "muon" or "adamw".
    optimizer: str
    # The settings that hold learning rate and weight decay; no decay: None.
    learning_rate: str
    weight_decay: str | None
    # How they are stored with QUANT=rows and with QUANT=fit: a key of STORAGE, or None: not at all.
    stored_rows: str | None
    stored_fit: str | None

    def stored(self, quant: str) -> str | None:
        """How they are stored under a value of QUANT."""
        return self.stored_fit if quant == "fit" else self.stored_rows


# fmt: off
ROLES: dict[str, Role] = {
    # role                     optimizer  learning rate     weight decay  QUANT=rows  QUANT=fit
    "attention":         Role("muon",    "matrix_lr",      "muon_wd",    "int6",     "fitted"),
    "mlp":               Role("muon",    "matrix_lr",      "muon_wd",    "int6_or_int5", "fitted"),
    "bigram_projection": Role("muon",    "matrix_lr",      "muon_wd",    "int6",     "fitted"),
    "bigram_table":      Role("adamw",   "tied_embed_lr",  "embed_wd",   "int6",     "fitted"),
    "tied_embedding":    Role("adamw",   "tied_embed_lr",  "embed_wd",   "float16",  "fitted"),
    "embedding":         Role("adamw",   "embed_lr",       "embed_wd",   "float16",  "fitted"),
    "head":              Role("adamw",   "head_lr",        "adam_wd",    "float16",  "fitted"),
    # No decay on memory tokens (#351): they are normed where they are used.
    "memory":            Role("adamw",   "tied_embed_lr",  None,         "float16",  "fitted"),
    "vector":            Role("adamw",   "scalar_lr",      "adam_wd",    "float16",  "float16"),
    "mtp_head":          Role("adamw",   "head_lr",        "adam_wd",    None,       None),
}
# fmt: on


class ParameterGroup(NamedTuple):
    """Parameters that are trained alike."""

    role: str
    parameters: list[nn.Parameter]
    learning_rate: float
    weight_decay: float


def parameter_groups(model: GPT, s: Settings, optimizer: str) -> list[ParameterGroup]:
    """A group for each role that this optimizer trains, in the model's order."""
    members = collections.defaultdict(list)
    for name, role in model.roles().items():
        if ROLES[role].optimizer == optimizer:
            members[role].append(model.get_parameter(name))
    groups = []
    for role, parameters in members.items():
        learning_rate = getattr(s, ROLES[role].learning_rate)
        decay = ROLES[role].weight_decay
        weight_decay = getattr(s, decay) if decay else 0.0
        groups.append(ParameterGroup(role, parameters, learning_rate, weight_decay))
    return groups


def newton_schulz(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Nearly orthogonal matrices (Jordan et al. 2024): wide (n, rows, columns) -> same, dtype."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = (matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(steps):
        # x <- a x + (b G + c G^2) x, with G = x x^T
        gram = torch.bmm(x, x.transpose(1, 2))
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def as_wide(matrix: Tensor) -> Tensor:
    """The matrix, transposed if it has more rows than columns."""
    return matrix.T if matrix.size(0) > matrix.size(1) else matrix


def with_equal_rows(matrices: Tensor, is_tall: Tensor) -> Tensor:
    """The matrices (n, rows, columns) with rows of norm 1 (MuonEq-R, #1260).

    A row belongs to an output; of tall matrices, which are transposed here, it is a column.
    """
    of_rows = matrices.norm(dim=2, keepdim=True)
    of_columns = matrices.norm(dim=1, keepdim=True)
    lengths = torch.where(is_tall, of_columns, of_rows)
    return matrices / lengths.clamp(min=1e-7)


class MuonBatch(NamedTuple):
    """Matrices of one shape, tall ones transposed, that are updated together."""

    parameters: list[nn.Parameter]
    # This rank's share of them, and their momentum: float32 (share, rows, columns).
    mine: list[nn.Parameter]
    momentum_buffer: Tensor
    # Which of this rank's are transposed: (len(mine), 1, 1).
    is_tall: Tensor
    # Factor of the learning rate for each matrix, by its shape: (parameters, 1, 1).
    shape_factors: Tensor
    learning_rate: float
    weight_decay: float


class Muon:
    """Nesterov momentum, orthogonalised, with decoupled weight decay (Jordan et al. 2024).

    All matrices of a shape go through Newton-Schulz together. Each rank has the momentum of its
    share of them, and gathers the updates of all.
    """

    def __init__(self, groups: list[ParameterGroup], settings: Settings, runtime: Runtime):
        self.iterations = settings.muon_backend_steps
        self.normalizes_rows = settings.muon_row_normalize
        self.runtime = runtime
        alike = collections.defaultdict(list)
        for group in groups:
            for parameter in group.parameters:
                shape = min(parameter.shape), max(parameter.shape)
                alike[shape, group.learning_rate, group.weight_decay].append(parameter)
        self.batches = []
        for (shape, learning_rate, weight_decay), parameters in alike.items():
            share = -(-len(parameters) // runtime.world_size)
            mine = parameters[runtime.rank * share : (runtime.rank + 1) * share]
            momentum_buffer = torch.zeros(share, *shape, device=runtime.device)
            # Jordan's factor: the columns of an orthogonal tall matrix have norm 1, its rows less.
            factors = [max(1.0, p.size(0) / p.size(1)) ** 0.5 for p in parameters]
            factors = torch.tensor(factors, device=runtime.device)[:, None, None]
            is_tall = [parameter.size(0) > parameter.size(1) for parameter in mine]
            self.batches.append(
                MuonBatch(
                    parameters=parameters,
                    mine=mine,
                    momentum_buffer=momentum_buffer,
                    is_tall=torch.tensor(is_tall, device=runtime.device)[:, None, None],
                    shape_factors=factors,
                    learning_rate=learning_rate,
                    weight_decay=weight_decay,
                )
            )

    def updates_of_share(self, batch: MuonBatch, momentum: float) -> Tensor:
        """Advance the momentum of this rank's share; its orthogonal updates."""
        updates = torch.zeros_like(batch.momentum_buffer, dtype=self.runtime.dtype)
        count = len(batch.mine)
        if count:
            gradients = torch.stack([as_wide(parameter.grad) for parameter in batch.mine])
            batch.momentum_buffer[:count].lerp_(gradients, 1 - momentum)
            gradients.lerp_(batch.momentum_buffer[:count], momentum)
            if self.normalizes_rows:
                gradients = with_equal_rows(gradients, batch.is_tall)
            updates[:count] = newton_schulz(gradients, self.iterations, self.runtime.dtype)
        return updates

    @torch.no_grad()
    def step(self, scale: float, momentum: float) -> None:
        """One update of every matrix, at `scale` times the learning rates.

        Communication of one shape overlaps computation of the next.
        """
        under_way = []
        for batch in self.batches:
            under_way.append(self.runtime.gather(self.updates_of_share(batch, momentum)))
        for batch, (updates, wait) in zip(self.batches, under_way, strict=True):
            wait()
            learning_rate = scale * batch.learning_rate
            torch._foreach_mul_(batch.parameters, 1 - learning_rate * batch.weight_decay)
            changes = updates[: len(batch.parameters)] * (learning_rate * batch.shape_factors)
            torch._foreach_sub_([as_wide(p) for p in batch.parameters], list(changes))

    def momentum_buffers(self) -> list[Tensor]:
        """The momentum of each batch on every rank, (parameters, rows, columns) each."""
        under_way = [self.runtime.gather(batch.momentum_buffer) for batch in self.batches]
        momentum_buffers = []
        for batch, (whole, wait) in zip(self.batches, under_way, strict=True):
            wait()
            momentum_buffers.append(whole[: len(batch.parameters)].clone())
        return momentum_buffers

    def load(self, momentum_buffers: list[Tensor]) -> None:
        """Take this rank's share of what momentum_buffers() gave, on any number of ranks."""
        for batch, whole in zip(self.batches, momentum_buffers, strict=True):
            first = self.runtime.rank * len(batch.momentum_buffer)
            count = len(batch.mine)
            batch.momentum_buffer[:count] = whole[first : first + count]


def flat_gradients(parameters: list[nn.Parameter]) -> Tensor:
    """One float32 buffer that all gradients are views of.

    So they are zeroed, summed over ranks and clipped at once.
    """
    # Each view begins on a cache line.
    sizes = [-(-parameter.numel() // 64) * 64 for parameter in parameters]
    buffer = torch.zeros(sum(sizes), device=parameters[0].device)
    for parameter, part in zip(parameters, buffer.split(sizes), strict=True):
        parameter.grad = part[: parameter.numel()].view_as(parameter)
    return buffer


def spellings_of(piece: str) -> list[tuple]:
    """What a piece, a text with ▁ for spaces, can have in common with others; nothing if it is "".

    That is a space before, the kind of its letters, its word, and how this begins and ends.
    """
    if not piece:
        return []
    word = piece.lstrip("▁")
    spellings = [
        ("space", word != piece),
        ("kind", word.isalpha(), word.isdigit(), word.isupper(), word[:1].isupper()),
    ]
    word = word.lower()
    spellings.append(("word", word))
    for length in range(1, min(len(word), 4) + 1):
        spellings.append(("beginning", word[:length]))
        spellings.append(("end", word[-length:]))
    return spellings


class RowSums:
    """Sums of chosen rows of a matrix, always added in the same order: so all ranks agree."""

    def __init__(self, chosen: list[list[int]], device: torch.device):
        """`chosen` are the rows of each sum."""
        sizes = torch.tensor([len(rows) for rows in chosen], dtype=torch.int64)
        self.first = (sizes.cumsum(0) - sizes).to(device)
        rows = list(itertools.chain(*chosen))
        self.rows = torch.tensor(rows, dtype=torch.int64, device=device)

    def __call__(self, matrix: Tensor) -> Tensor:
        """(rows, dim) -> (sums, dim)."""
        return F.embedding_bag(self.rows, matrix, self.first, mode="sum")


class SharedSpelling:
    """Pieces that are spelled alike share a part of what they learn (new here).

    A piece's vector is seen as the sum of one of its own and those of its spellings, as fastText
    makes vectors of words (Bojanowski et al. 2017). AdamW trains them all, but what spellings learn
    is added to the vectors of their pieces at once: so model and artifact know nothing of it, and
    weight decay is that of the sum. A rare piece learns from its relatives what it shares with
    them, which counts most in a short run.
    """

    def __init__(self, vectors: nn.Parameter, pieces: Sequence[str]):
        """`vectors` are those of pieces: (vocabulary, dim). ValueError if their numbers differ."""
        require(len(pieces) == len(vectors), "SPELLING_LR needs the pieces", ValueError)
        members = collections.defaultdict(list)
        for token, piece in enumerate(pieces):
            for spelling in spellings_of(piece):
                members[spelling].append(token)
        shared = [tokens for tokens in members.values() if len(tokens) > 1]
        spellings = [[] for _ in pieces]
        for number, tokens in enumerate(shared):
            for token in tokens:
                spellings[token].append(number)
        self.vectors = vectors
        self.over_pieces = RowSums(shared, vectors.device)
        self.over_spellings = RowSums(spellings, vectors.device)
        # What AdamW changes, 0 between steps: (spellings, dim).
        self.change = nn.Parameter(vectors.new_zeros(len(shared), vectors.size(1)))

    def take_gradients(self) -> None:
        """The gradient of a spelling is the sum of those of its pieces."""
        self.change.grad = self.over_pieces(self.vectors.grad)

    @torch.no_grad()
    def hand_on(self) -> None:
        """Add to each piece's vector what its spellings have learned."""
        self.vectors += self.over_spellings(self.change)
        self.change.zero_()


class Optimizer:
    """Muon and AdamW, each on the parameters that the table ROLES gives it."""

    def __init__(
        self, model: GPT, settings: Settings, runtime: Runtime, pieces: Sequence[str] = ()
    ):
        """`pieces` are the texts of the vocabulary, for SPELLING_LR."""
        s = settings
        self.settings = s
        self.gradients = flat_gradients(list(model.parameters()))
        self.muon = Muon(parameter_groups(model, s, "muon"), s, runtime)
        groups = []
        for group in parameter_groups(model, s, "adamw"):
            groups.append(
                dict(
                    params=group.parameters,
                    role=group.role,
                    base_lr=group.learning_rate,
                    weight_decay=group.weight_decay,
                )
            )
        self.spellings = []
        if s.spelling_lr:
            self.spellings.append(SharedSpelling(model.embedding.weight, pieces))
            if model.head is not None:
                self.spellings.append(SharedSpelling(model.head.weight, pieces))
            groups.append(
                dict(
                    params=[spelling.change for spelling in self.spellings],
                    role="spelling",
                    base_lr=s.spelling_lr,
                    weight_decay=0.0,
                )
            )
        self.adamw = torch.optim.AdamW(
            groups, lr=0.0, betas=(s.beta1, s.beta2), eps=s.adam_eps, fused=True
        )

    def step(self, scale: float, momentum: float) -> None:
        """Clip and apply the summed gradients, at `scale` times the learning rates; zero them."""
        limit = self.settings.grad_clip_norm
        if limit:
            norm_of_all = self.gradients.norm() + 1e-6
            self.gradients.mul_((limit / norm_of_all).clamp(max=1.0))
        self.muon.step(scale, momentum)
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * scale
        for spelling in self.spellings:
            spelling.take_gradients()
        self.adamw.step()
        for spelling in self.spellings:
            spelling.hand_on()
        self.gradients.zero_()


# ==================================================================================================
# Schedule: what changes during a run, and when; averages of the weights
# ==================================================================================================


class StepPlan(NamedTuple):
    """What holds during one optimizer step: rates, and which phases of the run are on."""

    # Factor of all learning rates.
    scale: float
    # Momentum of Muon.
    momentum: float
    # Whether the model runs with its loops.
    looped: bool = True
    # Whether late QAT is to be on from this step at the latest. Once on, it stays on.
    late_qat_due: bool = False
    # Whether its gradients are a sample of what errors in the weights cost (QUANT=fit).
    samples_costs: bool = False
    # Whether the weights after it are a sample of the average that is exported, and the decay of
    # the samples before it.
    samples_weights: bool = False
    average_decay: float = 1.0


class Phase(NamedTuple):
    """A kind of step that needs a compiled graph of its own."""

    looped: bool
    with_qat: bool


class Schedule:
    """The one place that says what changes during a run, and when.

    A run ends by its steps or by its clock. `progress` is the share of it that is over; everything
    else follows from the step and that share.
    """

    # QUANT=fit samples costs in the last steps, whose weights are nearly those it will round.
    COSTS_START_SCALE = 0.2

    def __init__(self, settings: Settings):
        s = settings
        self.settings = s
        if s.ema_enabled:
            self.average = "ema"
            self.average_every = s.ema_every
            self.average_start_scale = s.ema_start_scale
        elif s.swa_enabled:
            self.average = "swa"
            self.average_every = s.swa_every
            self.average_start_scale = s.swa_start_scale
        else:
            self.average = "none"
            self.average_every = 1
            self.average_start_scale = 0.0

    def progress(self, step: int, seconds: float, reserve: float = 0.0) -> float:
        """Share of the run that is over before `step`, after `seconds` of training.

        1 if less time is left than a step takes on average, or than `reserve` seconds.
        """
        limit = self.settings.max_wallclock_seconds
        by_steps = step / self.settings.iterations
        if not limit or not step:
            return min(1.0, by_steps)
        needed = max(seconds / step, reserve)
        if seconds + needed > limit:
            return 1.0
        return min(1.0, max(by_steps, seconds / limit))

    def expected_steps(self, step: int, progress: float) -> float:
        """The steps that the run will have taken at its end."""
        return step / progress if progress else self.settings.iterations

    def remaining(self, step: int, progress: float) -> float:
        """1, then linear to 0 over the warmdown, however the run will end."""
        s = self.settings
        expected_steps = self.expected_steps(step, progress)
        warmdown = min(s.warmdown_iters, s.warmdown_fraction * expected_steps)
        if not warmdown:
            return 1.0
        return min(1.0, (expected_steps - step) / warmdown)

    def average_decay(self, step: int, progress: float) -> float:
        """What is left of the weight of earlier samples with each sample of an average."""
        s = self.settings
        if self.average != "ema":
            return 1.0
        if s.ema_span:
            return math.exp(-s.ema_every / (s.ema_span * self.expected_steps(step, progress)))
        return s.ema_decay**s.ema_every

    def momentum(self, step: int) -> float:
        """Muon's momentum, which rises linearly during its warm-up."""
        s = self.settings
        warm = 1.0
        if s.muon_momentum_warmup_steps:
            warm = min(1.0, step / s.muon_momentum_warmup_steps)
        return (1 - warm) * s.muon_momentum_warmup_start + warm * s.muon_momentum

    def plan(self, step: int, progress: float) -> StepPlan:
        """What holds during `step`, counted from 0. Every phase of a run is a line here.

        Thresholds are of the warmdown as it would be without MIN_LR. Late QAT begins at the first
        step under its own in which the loops are on. Under theirs, costs are sampled in every step,
        and weights every `average_every` steps.
        """
        s = self.settings
        remaining = self.remaining(step, progress)
        looped = not s.num_loops or progress >= s.enable_looping_at
        takes_sample = (step + 1) % self.average_every == 0
        return StepPlan(
            scale=max(remaining, s.min_lr),
            momentum=self.momentum(step),
            looped=looped,
            late_qat_due=looped and remaining < s.late_qat_threshold,
            samples_costs=s.quant == "fit" and remaining < self.COSTS_START_SCALE,
            samples_weights=takes_sample and remaining < self.average_start_scale,
            average_decay=self.average_decay(step, progress),
        )

    def phases(self) -> list[Phase]:
        """The kinds of steps that a run may have, in their order."""
        s = self.settings
        phases = []
        if s.num_loops and s.enable_looping_at:
            phases.append(Phase(looped=False, with_qat=False))
        phases.append(Phase(looped=True, with_qat=False))
        if s.late_qat_threshold:
            phases.append(Phase(looped=True, with_qat=True))
        return phases


class WeightAverage:
    """Mean (SWA, Izmailov et al. 2018) or exponential moving average (EMA) of weights, in float32.

    With each sample the weight of all earlier ones is multiplied by a decay: 1 for a mean. Initial
    weights are never a part of it.
    """

    def __init__(self):
        self.samples = 0
        # Of all samples together; the last has 1.
        self.total = 0.0
        self.weights: list[Tensor] = []

    def add(self, parameters: list[nn.Parameter], decay: float) -> None:
        """Take a sample of the weights."""
        if not self.weights:
            self.weights = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        self.samples += 1
        self.total = decay * self.total + 1
        torch._foreach_lerp_(self.weights, [p.detach() for p in parameters], 1 / self.total)

    def load_into(self, parameters: list[nn.Parameter]) -> bool:
        """Replace the parameters by their average; whether there is one."""
        if not self.samples:
            return False
        torch._foreach_copy_([p.detach() for p in parameters], self.weights)
        return True

    def state(self) -> dict:
        """What a checkpoint keeps of it."""
        return dict(samples=self.samples, total=self.total, weights=self.weights)

    def load_state(self, state: dict) -> None:
        """Go on from a checkpoint."""
        self.samples = state["samples"]
        self.total = state["total"]
        self.weights = state["weights"]


# ==================================================================================================
# Data: shards of uint16 tokens, the order in which training sees them, the bytes behind them
# ==================================================================================================

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_INTS = 256
SHARD_NAME = re.compile(r"(.+)_(train|val)_(\d+)\.bin")


def count_tokens(path: Path) -> int:
    """The tokens of a shard as its header says. UserError if it is damaged."""
    start = 4 * SHARD_HEADER_INTS
    size = path.stat().st_size
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    known = size >= start and tuple(header[:2]) == (SHARD_MAGIC, SHARD_VERSION)
    require(
        known,
        f"{path}: no token shard: magic {SHARD_MAGIC}, version {SHARD_VERSION} are not there",
    )
    num_tokens = int(header[2])
    require(
        size == start + 2 * num_tokens,
        f"{path}: damaged: {size} bytes, but {num_tokens} tokens",
    )
    return num_tokens


def open_shard(path: Path) -> np.ndarray:
    """A shard's tokens, memory-mapped, uint16 (tokens,). UserError if it is damaged."""
    if count_tokens(path) == 0:
        return np.empty(0, dtype="<u2")
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * SHARD_HEADER_INTS)


def check_tokens(tokens: np.ndarray, vocab_size: int, path: Path) -> None:
    """UserError if a token is outside of the vocabulary."""
    largest = tokens.max(initial=0)
    require(largest < vocab_size, f"{path}: token {largest} is outside of VOCAB_SIZE={vocab_size}")


def find_shards(folder: Path, split: str) -> list[Path]:
    """The files of a split in order of their numbers, not opened.

    Byte files (NAME_val_bytes_000000.bin) are no shards. UserError where there are none, where they
    are of several data sets, where two have one number, and where one of the validation split is
    missing, whose numbers begin at 0.
    """
    data_sets: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob(f"*_{split}_*.bin")):
        match = SHARD_NAME.fullmatch(path.name)
        if not match or match[2] != split:
            continue
        files = data_sets.setdefault(match[1], {})
        number = int(match[3])
        require(
            number not in files,
            f"{path}: {files.get(number)} has the same number: remove the one that is not of this "
            "data set",
        )
        files[number] = path
    require(data_sets, f"{folder}: no {split} shards (*_{split}_*.bin)")
    require(
        len(data_sets) == 1,
        f"{folder}: {split} shards of several data sets ({', '.join(data_sets)}): give each a "
        "folder of its own",
    )
    (files,) = data_sets.values()
    missing = "" if split == "train" else missing_numbers(files, 0)
    require(
        not missing,
        f"{folder}: {split} shards {missing} are missing: a score would leave out their text; get "
        "or make them again, or number them from 0 if these are all",
    )
    return [files[number] for number in sorted(files)]


def missing_numbers(numbers: Collection[int], first: int) -> str:
    """The numbers that are left out from `first` to the largest, three at most; empty if none."""
    largest = max(numbers)
    count = largest + 1 - first - len(numbers)
    if not count:
        return ""
    missing = (number for number in range(first, largest) if number not in numbers)
    named = str(list(itertools.islice(missing, 3)))
    return named if count <= 3 else f"{named} and {count - 3} more"


def read_tokens(path: Path, first: int, count: int) -> np.ndarray:
    """So many tokens of a shard from the token `first` on, uint16. UserError if that fails."""
    tokens = np.empty(count, dtype="<u2")
    try:
        with open(path, "rb") as file:
            file.seek(4 * SHARD_HEADER_INTS + 2 * first)
            size = file.readinto(tokens)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    require(size == tokens.nbytes, f"{path}: damaged: shorter than when it was opened")
    return tokens


def in_background(function: Callable, argument: object) -> concurrent.futures.Future:
    """What the function will return or raise, from a thread for which no exit waits."""
    future = concurrent.futures.Future()

    def work() -> None:
        try:
            future.set_result(function(argument))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=work, name="background", daemon=True).start()
    return future


class Chunk(NamedTuple):
    """Consecutive rows of a shard, which are read at once."""

    path: Path
    # The place of its first token in the shard, before an epoch's offset.
    first_token: int
    # The numbers of its rows among those of all shards.
    rows: range


class Epoch(NamedTuple):
    """The order of an epoch: its windows one after the other, each with its rows at random."""

    number: int
    # Where every shard's first row begins.
    offset: int
    # The numbers of the rows in the order in which training sees them.
    order: np.ndarray
    # Of each chunk, its window; of each window, the number of rows up to its end.
    window_of_chunk: np.ndarray
    window_ends: np.ndarray


class Window(NamedTuple):
    """What is in memory for some positions of the training order."""

    positions: range
    # The numbers of the rows at these positions, and the tokens of their chunks by number.
    rows: np.ndarray
    tokens: dict[int, np.ndarray]


NO_WINDOW = Window(range(0), np.empty(0), {})


class TrainingRows:
    """Rows of `length + 1` tokens in an order that SEED draws, read ahead of their use.

    Each epoch has a new order, and cuts the shards into rows at another offset. A row depends on
    its position in the training order alone.

    To find each row of a full shuffle on a disk takes 1 to 3 ms. So chunks from all over the shards
    make a window, each of them is one read, and the window's rows are shuffled in memory. Data that
    fit one window are shuffled fully. Each rank reads every window by itself: what one has read,
    its host has in memory for the others.
    """

    # To read so much takes a disk about as long as to find it.
    CHUNK_BYTES = 2**20
    # 43 steps of 786,432 tokens. A window may be larger by a chunk, and two are in memory: the next
    # is read while one is in use.
    WINDOW_BYTES = 2**26

    def __init__(self, files: list[Path], length: int, seed: int, vocab_size: int):
        self.files = files
        self.length = length
        self.seed = seed
        self.vocab_size = vocab_size
        self.chunks: list[Chunk] = []
        self.num_rows = 0
        most_rows = max(1, self.CHUNK_BYTES // (2 * length))
        for path in files:
            # A shard's rows, whatever the offset.
            rows_of_shard = max(0, (len(open_shard(path)) - length) // length)
            for first in range(0, rows_of_shard, most_rows):
                end = self.num_rows + min(most_rows, rows_of_shard - first)
                self.chunks.append(Chunk(path, first * length, range(self.num_rows, end)))
                self.num_rows = end
        require(
            self.num_rows,
            f"{files[0].parent}: the training split is empty or below two rows of {length}",
        )
        self.chunk_rows = np.array([len(chunk.rows) for chunk in self.chunks], dtype=np.int64)
        self.chunk_ends = np.cumsum(self.chunk_rows)
        self.num_windows = math.ceil(2 * length * self.num_rows / self.WINDOW_BYTES)
        self.epoch = self.draw_epoch(0)
        # No row is read before one is asked for: then the clock of training runs.
        self.window = NO_WINDOW
        self.ahead: concurrent.futures.Future | None = None
        # Whether no row will be asked for any more.
        self.closed = False
        # Seconds for which rows had to wait for their window.
        self.waited = 0.0

    def draw_epoch(self, number: int) -> Epoch:
        """The offset and order of an epoch."""
        generator = np.random.default_rng((self.seed, number))
        offset = int(generator.integers(self.length))
        # Windows of random chunks, which differ in size by less than a chunk.
        shuffled = np.random.default_rng((self.seed, number, 1)).permutation(len(self.chunks))
        sizes = self.chunk_rows[shuffled]
        rows_before = np.cumsum(sizes) - sizes
        # numpy sorts numbers of 16 bits in linear time.
        window_of_chunk = np.empty(len(self.chunks), dtype=np.uint16)
        window_of_chunk[shuffled] = rows_before * self.num_windows // self.num_rows
        window_of_row = np.repeat(window_of_chunk, self.chunk_rows)
        window_ends = np.cumsum(np.bincount(window_of_row))
        order = np.argsort(window_of_row, kind="stable")
        for rows_of_window in np.split(order, window_ends[:-1]):
            generator.shuffle(rows_of_window)
        return Epoch(number, offset, order, window_of_chunk, window_ends)

    def read_window(self, position: int) -> Window:
        """Read the window to which a position of the endless training order belongs."""
        number, index = divmod(position, self.num_rows)
        if number != self.epoch.number:
            self.epoch = self.draw_epoch(number)
        epoch = self.epoch
        window = int(np.searchsorted(epoch.window_ends, index, side="right"))
        tokens = {}
        for chunk_number in np.flatnonzero(epoch.window_of_chunk == window).tolist():
            if self.closed:
                return NO_WINDOW
            chunk = self.chunks[chunk_number]
            # Behind its rows stands a token that is only a target.
            count = len(chunk.rows) * self.length + 1
            first_token = chunk.first_token + epoch.offset
            tokens[chunk_number] = read_tokens(chunk.path, first_token, count)
        first = int(epoch.window_ends[window - 1]) if window else 0
        rows = epoch.order[first : int(epoch.window_ends[window])]
        start = number * self.num_rows + first
        return Window(range(start, start + len(rows)), rows, tokens)

    def take_window(self, position: int) -> None:
        """Make this position's window the one in use, and begin to read the next."""
        started = time.perf_counter()
        # What is not needed any more makes room first.
        self.window = NO_WINDOW
        if self.ahead is not None:
            self.window = self.ahead.result()
        if position not in self.window.positions:
            # The first row of a run, or one out of turn.
            self.window = self.read_window(position)
        self.ahead = in_background(self.read_window, self.window.positions.stop)
        self.waited += time.perf_counter() - started

    def settle(self) -> None:
        """Wait for what is being read ahead."""
        if self.ahead is not None:
            concurrent.futures.wait([self.ahead])

    def close(self) -> None:
        """Read no further, so that nothing is read when the clock of training has stopped."""
        self.closed = True
        self.settle()

    def row(self, position: int) -> np.ndarray:
        """The row at a position of the endless training order, int64 (length + 1,)."""
        if position not in self.window.positions:
            self.take_window(position)
        row = int(self.window.rows[position - self.window.positions.start])
        chunk_number = int(np.searchsorted(self.chunk_ends, row, side="right"))
        chunk = self.chunks[chunk_number]
        start = (row - chunk.rows.start) * self.length
        tokens = self.window.tokens[chunk_number][start : start + self.length + 1].astype(np.int64)
        check_tokens(tokens, self.vocab_size, chunk.path)
        return tokens


class BatchPlan:
    """How the rows of a step, the same for every world size, fall on ranks and micro-batches.

    Each rank makes `micro_steps` passes of `micro_batch_rows` rows. Rows with ignored targets fill
    up the last.
    """

    # A run of a block keeps 21 numbers for each position and channel until the backward pass, 28
    # uncompiled, as counted on simulated tensors. With what comes and goes 40 are planned for: the
    # record preset's looped model, 98,304 positions a GPU, took 41.7 GB in a public record (#1855).
    NUMBERS_KEPT = 40
    # For weights, optimizer and the logits of a chunk.
    OTHER_BYTES = 2e9

    def __init__(self, s: Settings, runtime: Runtime):
        self.rank = runtime.rank
        self.step_rows = s.step_rows
        self.rank_rows = -(-self.step_rows // runtime.world_size)
        position_bytes = runtime.dtype.itemsize * s.num_visits * s.model_dim
        fitting = (runtime.memory_bytes() - self.OTHER_BYTES) / (self.NUMBERS_KEPT * position_bytes)
        micro_batch_tokens = int(s.micro_batch_tokens or fitting)
        most_rows = max(1, micro_batch_tokens // s.train_seq_len)
        self.micro_steps = -(-self.rank_rows // most_rows)
        self.micro_batch_rows = -(-self.rank_rows // self.micro_steps)

    def batch(self, data: TrainingRows, step: int, micro_step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one forward pass, int64 (micro_batch_rows, length) each."""
        first = micro_step * self.micro_batch_rows
        last = min(
            first + self.micro_batch_rows,
            self.rank_rows,
            self.step_rows - self.rank * self.rank_rows,
        )
        real_rows = max(0, last - first)
        # The position of this rank's first row of the step in the training order.
        start = step * self.step_rows + self.rank * self.rank_rows
        tokens = np.zeros((self.micro_batch_rows, data.length + 1), dtype=np.int64)
        for i in range(real_rows):
            tokens[i] = data.row(start + first + i)
        targets = tokens[:, 1:].copy()
        targets[real_rows:] = IGNORED
        inputs = np.ascontiguousarray(tokens[:, :-1])
        return torch.from_numpy(inputs), torch.from_numpy(targets)


# ---- Where data and tokenizer are
DATASETS = Path("data", "datasets")
# The exports of the challenge's text, which are folders fineweb10B_VARIANT; of several that are
# here the first is used. Operators for letter case took 0.0064 bpb off (#1755), and a vocabulary of
# 8,192 pieces about 0.03.
CASE_OPERATOR_EXPORT = "sp8192_lossless_caps_caseops_v1_reserved"
FINEWEB_VARIANTS = (CASE_OPERATOR_EXPORT, "sp8192", "sp4096", "sp1024", "byte260")
# The validation split of all is the same documents. It has about so many tokens.
FINEWEB_DOCUMENTS = 50_000
FINEWEB_VALIDATION = {
    CASE_OPERATOR_EXPORT: 47_850_000,
    "sp8192": 40_540_000,
    "sp1024": 62_022_000,
    "byte260": 151_130_000,
}
# Name, pieces and ending of a folder; the tokenizer's file has the same.
EXPORT_NAME = re.compile(r"(.+?)(?:10B)?_sp(\d+)(_\w+)?")
# Stands for the tokenizer of shards of bytes, which has no file.
BYTE_TOKENIZER = Path("byte260")


def read_data_manifest(folder: Path) -> dict:
    """What is noted beside the shards, by data/prepare.py for example; empty if nothing is."""
    for name in ("manifest.json", "meta.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            manifest = None
        require(isinstance(manifest, dict), f"{path}: no JSON object: make it again, or remove it")
        return manifest
    return {}


def table_of(manifest: dict, name: str) -> dict:
    """The table under a name of a manifest; empty if there is none."""
    found = manifest.get(name)
    return found if isinstance(found, dict) else {}


def vocabulary_of(variant: str) -> int:
    """The pieces that a variant's name tells."""
    return int(re.match(r"(?:sp|byte)(\d+)", variant)[1])


def find_fineweb(vocab_size: int) -> tuple[Path, str] | None:
    """The folder of the challenge's text to use, and why; None if none is here.

    That is the first of FINEWEB_VARIANTS with this many pieces, of all if it is 0. UserError if
    there are others alone.
    """
    here = []
    for variant in FINEWEB_VARIANTS:
        # A download that was stopped leaves a folder without shards.
        if any((DATASETS / f"fineweb10B_{variant}").glob("*_val_*.bin")):
            here.append(variant)
    if not here:
        return None
    fitting = [v for v in here if vocab_size in (0, vocabulary_of(v))]
    require(
        fitting,
        f"no data with VOCAB_SIZE={vocab_size}: {DATASETS} has {', '.join(here)}; download it with "
        "data/download.py, set DATA_PATH, or leave VOCAB_SIZE out",
    )
    reason = "the only one that is here"
    if len(here) > 1:
        reason = f"the first with VOCAB_SIZE={vocab_size or 'any'} of {', '.join(here)}"
    return DATASETS / f"fineweb10B_{fitting[0]}", reason


def build_demo_corpus(vocab_size: int, runtime: Runtime, log: Logger) -> Path:
    """The folder of the demo corpus, which data/demo_corpus.py builds if it is not there yet."""
    for root in (Path(), Path(__file__).resolve().parent):
        builder = root / "data/demo_corpus.py"
        if builder.is_file():
            break
    else:
        raise UserError(
            f"no data: set DATA_PATH; neither {DATASETS} nor data/demo_corpus.py exists"
        )
    folder = builder.parent / "demo"
    command = [sys.executable, str(builder)]
    if vocab_size and read_data_manifest(folder).get("vocabulary_size") != vocab_size:
        folder = builder.parent / f"demo_sp{vocab_size}"
        command += ["--vocab-size", str(vocab_size)]
    log(f"data: DATA_PATH is not set and FineWeb is absent: using the demo corpus, {folder}")
    # One process of each host builds it; the others wait.
    if runtime.local_rank == 0:
        done = subprocess.run([*command, "--output", str(folder)])
        require(done.returncode == 0, f"{builder} failed, see above")
    runtime.meet()
    return folder


def find_data_of(artifact: dict, vocab_size: int) -> Path:
    """The folder with the data that an artifact was made with, by its manifest.

    UserError, with what the data are, if they are not here: nothing is built or guessed.
    """
    name = str(artifact.get("data"))
    folders = sorted(DATASETS.glob("*"))
    for root in (Path(), Path(__file__).resolve().parent):
        folders += [root / "data/demo", root / f"data/demo_sp{vocab_size}"]
    others = ""
    for folder in folders:
        # A download that was stopped leaves a folder without shards.
        if not any(folder.glob("*_val_*.bin")):
            continue
        if name not in names_of(folder, read_data_manifest(folder)):
            continue
        with contextlib.suppress(UserError):
            if digest_of(find_tokenizer(folder)) == artifact["tokenizer"]:
                return folder
        others = f" ({folder} has another tokenizer)"
    advice = "set DATA_PATH to them"
    if name.startswith("fineweb10B_"):
        advice += f", or get them: data/download.py --variant {name} --train-shards 0"
    elif name == "demo":
        advice += (
            f", or build them: data/demo_corpus.py --vocab-size {vocab_size} --output "
            f"data/demo_sp{vocab_size}"
        )
    operators = " and case operators" if artifact.get("case_operators") else ""
    raise UserError(
        f"the data of this ARTIFACT are not here{others}: {name}, {vocab_size} pieces{operators}, "
        f"sha256 of the tokenizer {artifact['tokenizer'][:16]}: {advice}"
    )


def find_data(
    settings: Settings, runtime: Runtime, log: Logger, artifact: dict | None = None
) -> tuple[Path, Path]:
    """The folder of shards and the tokenizer: as set, else FineWeb's, else the demo corpus.

    With an artifact's manifest those that it was made with, if none are set.
    """
    if settings.data_path:
        folder = Path(settings.data_path)
        require(folder.is_dir(), f"DATA_PATH={folder} is not a folder")
        return folder, find_tokenizer(folder, settings.tokenizer_path)
    if artifact:
        folder = find_data_of(artifact, settings.vocab_size)
        log(f"data: DATA_PATH is not set: {folder}, which the artifact names")
        return folder, find_tokenizer(folder, settings.tokenizer_path)

    fineweb = find_fineweb(settings.vocab_size)
    if fineweb is None:
        folder = build_demo_corpus(settings.vocab_size, runtime, log)
    else:
        folder, reason = fineweb
        log(f"data: DATA_PATH is not set: {folder}, {reason}")
    return folder, find_tokenizer(folder, settings.tokenizer_path)


def find_tokenizer(folder: Path, given: str = "") -> Path:
    """The tokenizer that made the shards in a folder: data/manifest.py has the same rule.

    It is the given one, else the one that the manifest names, else tokenizer.model in the folder,
    else, where the folder is named as the challenge's exports are, theirs. UserError if it is not
    there, or if the manifest says another SHA-256.
    """
    folder = folder.absolute()
    manifest = table_of(read_data_manifest(folder), "tokenizer")
    of_export = EXPORT_NAME.fullmatch(folder.name)
    if given:
        path = Path(given)
    elif manifest.get("kind") == "bytes" or folder.name.endswith("_byte260"):
        path = BYTE_TOKENIZER
    elif isinstance(manifest.get("file"), str):
        path = Path(os.path.normpath(folder / manifest["file"]))
    elif (folder / "tokenizer.model").is_file() or not of_export:
        path = folder / "tokenizer.model"
    else:
        name, pieces, more = of_export.groups(default="")
        path = folder.parent.parent / "tokenizers" / f"{name}_{pieces}_bpe{more}.model"
    require(
        path == BYTE_TOKENIZER or path.is_file(),
        f"{folder}: no tokenizer at {path}: TOKENIZER_PATH must name the one of these shards, or "
        f"{BYTE_TOKENIZER} for shards of bytes",
    )
    stated = manifest.get("sha256")
    require(
        stated in (None, digest_of(path)),
        f"{path} is not the tokenizer of {folder}: its manifest has another SHA-256: check "
        "TOKENIZER_PATH, or get the tokenizer again",
    )
    return path


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, or of what stands for the tokenizer of bytes."""
    data = str(path).encode() if path == BYTE_TOKENIZER else path.read_bytes()
    return hashlib.sha256(data).hexdigest()


# ---- Letter case as operators: lossless_caps_v2 of #1729, the rule of data/case_operators.py
TITLE = "\ue001"
ALL_CAPS = "\ue002"
CAP_NEXT = "\ue003"
ESCAPE = "\ue004"
OPERATORS = (TITLE, ALL_CAPS, CAP_NEXT, ESCAPE)
# A run of letters with a capital in it, or an operator.
TO_REWRITE = re.compile(r"(?<![A-Za-z])[a-z]*+[A-Z][A-Za-z]*|[\ue001-\ue004]")
# An escaped operator, a run in capitals, one capital, or an operator with nothing to act on.
TO_UNDO = re.compile(
    r"\ue004([\ue001-\ue004])|\ue002([a-z]+)|[\ue001\ue003]([a-z])|[\ue001-\ue004]"
)


def rewritten(match: re.Match) -> str:
    """What stands for a run of letters with a capital in it, or for an operator in the text."""
    run = match[0]
    if run in OPERATORS:
        return ESCAPE + run
    first = run[0]
    rest = run[1:]
    if first.isupper() and (not rest or rest.islower()):
        return TITLE + run.lower()
    if run.isupper():
        return ALL_CAPS + run.lower()
    if first.isupper():
        first = TITLE + first.lower()
    return first + re.sub("[A-Z]", marked, rest)


def marked(match: re.Match) -> str:
    """What stands for a capital within a run of letters."""
    return CAP_NEXT + match[0].lower()


def undone(match: re.Match) -> str:
    """What an operator and what it acts on stand for."""
    literal, run, letter = match.groups(default="")
    if literal:
        return literal
    return (run + letter).upper()


# ---- Tokenizers
# Text that any normalization but identity changes: letters and spaces of other kinds, line ends.
TO_NORMALIZE = "x ﬁ ½ Å \u00a0 \u3000 two  spaces\tand\r\nlines \n "


class Tokenizer:
    """All that this script asks of a tokenizer, answered by a SentencePiece model.

    One that has the four operators as pieces of its own writes capitals with them.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor):
        self.processor = processor
        self.vocab_size = processor.vocab_size()
        # The tokens of the four operators, or none.
        self.operators = [processor.piece_to_id(operator) for operator in OPERATORS]
        if processor.unk_id() in self.operators:
            self.operators = []

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without BOS."""
        if self.operators:
            text = TO_REWRITE.sub(rewritten, text)
        return self.processor.encode(text)

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens."""
        text = self.processor.decode(tokens)
        if self.operators:
            text = TO_UNDO.sub(undone, text)
        return text

    def piece_text(self, token: int) -> str:
        """The text that a token stands for, with spaces as ▁."""
        return self.processor.id_to_piece(token)

    def is_control(self, token: int) -> bool:
        """Whether a token marks a place, such as the beginning of a document."""
        return self.processor.is_control(token)

    def is_byte(self, token: int) -> bool:
        """Whether a token stands for one byte (byte fallback)."""
        return self.processor.is_byte(token)

    def is_silent(self, token: int) -> bool:
        """Whether a token stands for no text."""
        processor = self.processor
        return (
            processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token)
        )

    def piece_with_operator(self) -> str | None:
        """A piece that has an operator for letter case beside other text; None if none has."""
        for token in range(self.vocab_size if self.operators else 0):
            text = self.piece_text(token)
            if len(text) > 1 and not set(text).isdisjoint(OPERATORS):
                return text
        return None

    def normalizes(self) -> bool:
        """Whether it changes some text: what it decodes to is not what was encoded."""
        return self.decode(self.encode(TO_NORMALIZE)) != TO_NORMALIZE

    def has_space_piece(self) -> bool:
        """Whether the space has a piece of its own."""
        return self.processor.piece_to_id("▁") != self.processor.unk_id()

    def strips_first_space(self) -> bool:
        """Whether decoding drops a space at the beginning of a document."""
        return self.processor.decode([self.processor.piece_to_id("▁")]) == ""


class ByteTokenizer:
    """The challenge's byte260: byte b is token b + 4, behind padding, BOS, EOS and unknown."""

    FIRST = 4
    vocab_size = FIRST + 256
    operators = ()

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without BOS."""
        return [self.FIRST + byte for byte in text.encode()]

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens."""
        data = bytes(token - self.FIRST for token in tokens if token >= self.FIRST)
        return data.decode(errors="replace")

    def piece_text(self, token: int) -> str:
        """How a token is called."""
        return f"<{token - self.FIRST}>"

    def is_control(self, token: int) -> bool:
        """Whether a token marks a place."""
        return token < self.FIRST

    def is_byte(self, token: int) -> bool:
        """Whether a token stands for one byte."""
        return token >= self.FIRST

    is_silent = is_control

    def normalizes(self) -> bool:
        """Whether it changes some text."""
        return False

    def strips_first_space(self) -> bool:
        """Whether decoding drops a space at the beginning of a document."""
        return False


def load_tokenizer(path: Path, vocab_size: int = 0) -> Tokenizer | ByteTokenizer:
    """Read a tokenizer. UserError if it is none, has another size, or cannot be counted exactly."""
    if path == BYTE_TOKENIZER:
        tokenizer = ByteTokenizer()
    else:
        try:
            processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: not a SentencePiece model ({reason})") from None
        tokenizer = Tokenizer(processor)
        require(
            tokenizer.has_space_piece(),
            f"{path}: no piece ▁ of its own: a space would count as three bytes (#897)",
        )
        merged = tokenizer.piece_with_operator()
        require(
            merged is None,
            f"{path}: the piece {merged!r} holds an operator for letter case beside other text, so "
            "its bytes cannot be counted: make one in which operators are pieces of their own",
        )
    require(
        vocab_size in (0, tokenizer.vocab_size),
        f"{path}: {tokenizer.vocab_size} pieces, but VOCAB_SIZE={vocab_size}: leave VOCAB_SIZE "
        "out, or name data with so many",
    )
    return tokenizer


def texts_of_pieces(tokenizer: Tokenizer | ByteTokenizer) -> list[str]:
    """The text of each token, with ▁ for spaces; "" of those that have none of their own.

    Such are tokens that mark a place, and bytes that are no character by themselves.
    """
    texts = []
    for token in range(tokenizer.vocab_size):
        text = ""
        if tokenizer.is_byte(token):
            decoded = tokenizer.decode([token])
            if decoded.isascii():
                text = decoded
        elif not tokenizer.is_silent(token):
            text = tokenizer.piece_text(token)
        texts.append(text)
    return texts


class ByteTable:
    """Bytes of text behind each token, exactly as many as decoding gives.

    A piece counts its UTF-8 bytes with ▁ as one space, a byte piece one, a control token none, and
    an operator for letter case none, but for one that is escaped, which stands for itself. Where
    decoding drops a space before a document, a ▁ that begins the document counts none.
    """

    def __init__(self, tokenizer: Tokenizer | ByteTokenizer):
        tokens = range(tokenizer.vocab_size)
        sizes = []
        for token in tokens:
            if tokenizer.is_silent(token) or token in tokenizer.operators:
                sizes.append(0)
            elif tokenizer.is_byte(token):
                sizes.append(1)
            else:
                sizes.append(len(tokenizer.piece_text(token).replace("▁", " ").encode()))
        self.bytes = np.array(sizes, dtype=np.uint16)
        self.begins_document = np.array([tokenizer.is_control(token) for token in tokens])
        # Pieces that lose their space at the beginning of a document.
        strips = tokenizer.strips_first_space()
        self.stripped = np.array(
            [strips and tokenizer.piece_text(token).startswith("▁") for token in tokens]
        )
        self.is_operator = np.array([token in tokenizer.operators for token in tokens])
        self.escape = tokenizer.operators[-1] if tokenizer.operators else None

    def sizes(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes behind each token of a text that begins with BOS: uint16 (tokens,)."""
        sizes = self.bytes[tokens]
        sizes[1:] -= self.stripped[tokens[1:]] & self.begins_document[tokens[:-1]]
        if self.escape is not None:
            literal = behind_escapes(tokens == self.escape) & self.is_operator[tokens]
            sizes[literal] = len(ESCAPE.encode())
        return sizes


def behind_escapes(is_escape: np.ndarray) -> np.ndarray:
    """Which tokens stand behind an ESCAPE that is not itself escaped: bool (tokens,).

    In a run of ESCAPEs that is every second one, and the token behind a run of an odd length.
    """
    places = np.flatnonzero(is_escape)
    begins_run = np.diff(places, prepend=-2) > 1
    run_begins = np.maximum.accumulate(np.where(begins_run, places, 0))
    behind = places[(places - run_begins) % 2 == 0] + 1
    found = np.zeros_like(is_escape)
    found[behind[behind < len(found)]] = True
    return found


# ---- What is refused: text and tokenizer that do not belong together
# Characters that no text has by itself, as operators are.
PRIVATE_USE = re.compile("[\ue000-\uf8ff]")
# Of text without capitals more than this share of such characters are operators.
MOST_PRIVATE_USE = 0.005
# Tokens of a split that are encoded again, from the beginnings of all shards together, but so many
# of each at least.
SAMPLE_TOKENS = 1 << 16
LEAST_SAMPLE = 1 << 10
# How many of them may be others: some where the sample is cut, perhaps within a character, and some
# where a tokenizer that normalizes does not find its own text again. With another tokenizer of as
# many pieces, 0.014 to 0.26 of them are others, as measured.
MOST_CUT = 12
MOST_OTHERS = 0.005


def check_documents(
    files: list[Path], tokenizer: Tokenizer | ByteTokenizer, tokenizer_path: Path
) -> None:
    """UserError unless text at the beginning of each shard, decoded, has the same tokens again.

    Shards of another tokenizer with as many pieces look right in every other way. So do shards of
    rewritten text without a tokenizer that knows the operators.
    """
    is_control = np.array([tokenizer.is_control(token) for token in range(tokenizer.vocab_size)])
    length = max(LEAST_SAMPLE, SAMPLE_TOKENS // len(files))
    decoded = []
    for path in files:
        tokens = open_shard(path)[:length].astype(np.int64)
        check_tokens(tokens, tokenizer.vocab_size, path)
        # What stands between two control tokens is of one document.
        places = np.flatnonzero(~is_control[tokens])
        others = 0
        difference = ""
        for document in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1):
            found = tokens[document].tolist()
            text = tokenizer.decode(found)
            decoded.append(text)
            again = tokenizer.encode(text)
            same = (collections.Counter(found) & collections.Counter(again)).total()
            others += max(len(found), len(again)) - same
            if not difference and found != again:
                begin = same_beginning(found, again)
                names = [piece_name(tokenizer, side[begin:]) for side in (found, again)]
                place = f"token {document[0] + begin}"
                difference = f"{place} is {names[0]} there, {names[1]} by this tokenizer"
        require(
            others <= MOST_CUT + MOST_OTHERS * len(places),
            f"{path}: tokenizer {tokenizer_path} did not make this shard: {difference}; check "
            "TOKENIZER_PATH",
        )
    require(
        not is_rewritten("".join(decoded)),
        f"{files[0].parent}: capitals are rewritten as operators, which tokenizer {tokenizer_path} "
        "does not have as four pieces of their own: their bytes cannot be counted; make the data "
        "again (data/prepare.py --case-operators)",
    )


def is_rewritten(text: str) -> bool:
    """Whether decoded text has operators, of any rule, in the place of capitals."""
    operators = len(PRIVATE_USE.findall(text))
    return operators > MOST_PRIVATE_USE * len(text) and re.search("[A-Z]", text) is None


def same_beginning(one: list[int], other: list[int]) -> int:
    """How many tokens are the same at the beginning of two lists."""
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return min(len(one), len(other))


def piece_name(tokenizer: Tokenizer | ByteTokenizer, tokens: list[int]) -> str:
    """How the first of some tokens is called in a message."""
    return repr(tokenizer.piece_text(tokens[0])) if tokens else "the end"


def check_beginning(files: list[Path], split: str) -> None:
    """UserError unless documents of a split stand behind BOS.

    The validation split must begin with one. Training shards may be some of many, cut anywhere.
    """
    first = open_shard(files[0])[: 1 if split == "val" else SAMPLE_TOKENS]
    require(
        BOS in first,
        f"{files[0]}: begins with token {first[:1].tolist()}, not with BOS ({BOS}): its documents "
        "have no beginnings, or an earlier shard is not here",
    )


def check_operators(manifest: dict, folder: Path, tokenizer: Tokenizer | ByteTokenizer) -> None:
    """UserError if the manifest says otherwise whether the tokenizer has operators."""
    stated = table_of(manifest, "tokenizer").get("case_operators")
    require(
        stated in (None, bool(tokenizer.operators)),
        f"{folder}: the manifest says case_operators: {json.dumps(stated)}, but its tokenizer has "
        f"{len(tokenizer.operators)} of the four operators",
    )


def check_files(manifest: dict, folder: Path, train_files: list[Path], scored: list[Path]) -> None:
    """UserError if files that a run will read are others than the manifest lists, where it does.

    `scored` are the validation shards and their byte files. Of training shards there may be fewer
    or more.
    """
    listed = table_of(manifest, "files")
    if not listed:
        return
    for path in scored:
        require(
            path.name in listed,
            f"{path}: the manifest does not list it: move it, or make the data again",
        )
    for name in sorted(listed):
        here = not scored or "_val_" not in name or (folder / name).is_file()
        require(here, f"{folder / name}: is not here, but the manifest lists it: get it")
    for path in [*train_files, *scored]:
        size = path.stat().st_size
        due = table_of(listed, path.name).get("bytes", size)
        require(
            size == due,
            f"{path}: {size} bytes, but {due} in the manifest: get or make it again",
        )


# ---- The validation text
class Text(NamedTuple):
    """A text to score: its tokens, and the bytes behind each of them, both uint16 (tokens,)."""

    tokens: np.ndarray
    sizes: np.ndarray


# How many tokens may have other bytes in a byte file than by their pieces, and how much the sums
# may differ: a tokenizer that normalizes changes some text, which byte files count as it was.
MOST_OTHER_SIZES = 0.02
MOST_OTHER_BYTES = 0.005
# What counts as the whole of a split whose number of tokens is known to four digits.
WHOLE = 0.999


# The export of case operators that its script wrote at first, with 40,000 of the 50,000 validation
# documents in the training split, had so many training shards (issue #2127).
LEAKED_SHARDS = 1499


class ValidationExtent(NamedTuple):
    """The tokens of the validation split that is here, and those of the whole, 0 if not known."""

    tokens: int
    known: int

    @property
    def is_part(self) -> bool:
        """Whether text of the whole split is not here."""
        return self.tokens < WHOLE * self.known

    @property
    def is_more(self) -> bool:
        """Whether there is text that is not of the split."""
        return 0 < self.known < WHOLE * self.tokens

    def __str__(self) -> str:
        if not self.known:
            return "not known"
        if self.is_part:
            return f"part: {self.tokens} of {self.known} tokens"
        if self.is_more:
            return f"more: {self.tokens} tokens, not {self.known}"
        return "whole"


def normalization_of(manifest: dict, tokenizer: Tokenizer | ByteTokenizer) -> str:
    """What normalizing has changed of the text, whose bytes are then those of what is left of it.

    Empty where the tokenizer changes no text. data/prepare.py --normalized notes it.
    """
    noted = table_of(manifest, "normalized")
    if noted:
        numbers = [noted.get(f"{unit}_changed", "some") for unit in ("documents", "bytes")]
        wholes = [noted.get(name, "all") for name in ("documents", "bytes_before")]
        return (
            f"{numbers[0]} of {wholes[0]} documents and {numbers[1]} of {wholes[1]} bytes of the "
            "original text are changed"
        )
    return "by the tokenizer; what it changed is not stated" if tokenizer.normalizes() else ""


def names_of(folder: Path, manifest: dict) -> tuple[str, str]:
    """What the data in a folder are called."""
    return folder.absolute().name, str(manifest.get("name"))


def validation_extent(folder: Path, manifest: dict, files: list[Path]) -> ValidationExtent:
    """How much of the validation split is here, by the headers of its shards alone.

    The whole is known from the manifest and, for the challenge's exports, from what is public.
    """
    stated = table_of(manifest, "val").get("tokens")
    known = stated if isinstance(stated, int) else 0
    for variant, tokens in FINEWEB_VALIDATION.items():
        if f"fineweb10B_{variant}" in names_of(folder, manifest):
            known = tokens
    return ValidationExtent(sum(count_tokens(path) for path in files), known)


def find_byte_files(files: list[Path]) -> list[Path]:
    """The byte files beside the shards of a validation split, or none of them.

    UserError if some lack, if one is of no shard, or not for as many tokens as its shard has.
    """
    if not files:
        return []
    found = []
    for path in files:
        name, split, number = SHARD_NAME.fullmatch(path.name).groups()
        found.append(path.with_name(f"{name}_{split}_bytes_{number}.bin"))
    there = [path for path in found if path.is_file()]
    require(
        len(there) in (0, len(found)),
        f"{files[0].parent}: byte files for {len(there)} of {len(found)} validation shards: get "
        "the others, or remove them all",
    )
    stray = set(files[0].parent.glob("*_val_bytes_*.bin")) - set(found)
    require(
        not stray,
        f"{min(stray, default='')}: a byte file without its validation shard: get the shard, or "
        "remove the file",
    )
    for path, shard in zip(there, files, strict=False):
        num_sizes = count_tokens(path)
        num_tokens = count_tokens(shard)
        require(
            num_sizes == num_tokens,
            f"{path}: {num_sizes} sizes for {num_tokens} tokens: not of these shards",
        )
    return there


def sizes_from_files(files: list[Path], tokens: np.ndarray, table: ByteTable) -> np.ndarray:
    """Bytes of the original text behind each token, uint16 (tokens,), from byte files.

    UserError unless they agree with the table, but for what a tokenizer has normalized.
    """
    by_pieces = table.sizes(tokens)
    sizes = np.concatenate([open_shard(path) for path in files])
    # A control token, or an operator that is not escaped.
    loud = np.flatnonzero((sizes > 0) & (by_pieces == 0) & (table.bytes[tokens] == 0))
    require(
        not len(loud),
        f"{files[0]}: bytes behind token {loud[:1]}, which stands for none: not of these shards",
    )
    other = np.flatnonzero(sizes != by_pieces)
    total = int(sizes.sum(dtype=np.int64))
    by_pieces_total = int(by_pieces.sum(dtype=np.int64))
    require(
        len(other) <= MOST_OTHER_SIZES * len(sizes)
        and abs(total - by_pieces_total) <= MOST_OTHER_BYTES * by_pieces_total,
        f"{files[0]}: {total} bytes, but {by_pieces_total} by the pieces, first different at token "
        f"{other[:1]}: not of these shards",
    )
    return sizes


def load_validation(files: list[Path], vocab_size: int) -> np.ndarray:
    """The whole validation split, uint16 (tokens,)."""
    shards = []
    for path in files:
        tokens = open_shard(path)
        check_tokens(tokens, vocab_size, path)
        shards.append(tokens)
    whole = np.concatenate(shards)
    require(len(whole) > 1, f"{files[0].parent}: the validation split is empty")
    return whole


# ==================================================================================================
# Quantization: a step for every row and column, and whole numbers (codes) of such steps
# ==================================================================================================

# Largest codes; symmetric, so that zero stays zero. INT13 is the most that the codecs hold.
INT5 = 15
INT6 = 31
INT13 = 4095

# Of each coded matrix: weight (i, j) has the step row_steps[i] * column_steps[j].
Grid = dict[str, tuple[Tensor, Tensor]]


def storage_of(model: GPT, quant: str) -> dict[str, HalfStorage | CodeStorage]:
    """How each parameter that an artifact holds is stored, in its order."""
    storage = {}
    for name, role in model.roles().items():
        kind = ROLES[role].stored(quant)
        if kind is not None:
            storage[name] = STORAGE[kind]
    return storage


def stored_parameters(model: GPT, quant: str) -> dict[str, nn.Parameter]:
    """The parameters that an artifact holds, in its order."""
    return {name: model.get_parameter(name) for name in storage_of(model, quant)}


def coded_parameters(model: GPT, quant: str) -> dict[str, nn.Parameter]:
    """The matrices of these that are stored as codes."""
    parameters = {}
    for name, storage in storage_of(model, quant).items():
        if storage.coded:
            parameters[name] = model.get_parameter(name)
    return parameters


def quantize(weight: Tensor, row_steps: Tensor, column_steps: Tensor) -> Tensor:
    """The nearest codes, whole numbers in float32 (rows, columns)."""
    steps = row_steps[:, None] * column_steps
    return torch.where(steps > 0, weight / steps, 0.0).round().clamp(-INT13, INT13)


def dequantize(codes: Tensor, row_steps: Tensor, column_steps: Tensor) -> Tensor:
    """What the model computes with, float32 (rows, columns)."""
    return codes.float() * (row_steps[:, None] * column_steps)


def fake_quantize(weight: Tensor, row_steps: Tensor, column_steps: Tensor) -> Tensor:
    """The weight as it will be read back; gradients pass straight through (Bengio et al. 2013)."""
    codes = quantize(weight, row_steps, column_steps)
    read_back = dequantize(codes, row_steps, column_steps)
    return weight + (read_back - weight).detach()


def row_grid(model: GPT, s: Settings) -> Grid:
    """The entries' steps: each row's largest value over 31, or over 15 in an int5 MLP.

    2^-25, half of float16's smallest number, keeps the step of a tiny row from rounding to 0.
    """
    storage = storage_of(model, s.quant)
    grid = {}
    for name, parameter in coded_parameters(model, s.quant).items():
        weight = parameter.detach()
        largest_code = storage[name].largest_code(s)
        row_steps = (weight.abs().amax(1) / largest_code + 2**-25).half().float()
        grid[name] = row_steps, torch.ones_like(weight[0])
    return grid


def half_octaves(x: Tensor) -> Tensor:
    """The nearest powers of the root of 2: few values, so they pack well."""
    return torch.exp2((2 * x.log2()).round() / 2)


class FittedSteps(NamedTuple):
    """The steps that Fit gives a matrix, before the multiplier that all matrices share."""

    row_steps: Tensor
    column_steps: Tensor
    # The finest step of each row: any finer, and a code would exceed INT13.
    finest: Tensor


class Fit:
    """QUANT=fit: steps in inverse proportion to the root of what an error costs.

    So each weight does the same harm. One multiplier of all steps is then solved for the cap.

    An error E (rows, columns) in a matrix costs about

        sum over rows i of row_costs[i] * E[i] @ column_costs @ E[i]

    with row_costs (rows,) and column_costs (columns, columns): the Fisher information with rows and
    columns as if independent (Martens and Grosse 2015). Both are sampled in the last training steps
    from the differences of consecutive gradients, whose mean is about 0. That needs no pass and no
    data of its own, and its time is training time.

    Columns are rounded one after the other, and later ones make up for the errors of earlier ones
    (GPTQ, Frantar et al. 2022). With `factor`, the upper Cholesky factor of the inverse of
    column_costs, an error in column j then costs 1 / factor[j, j]^2.
    """

    # Added to all costs, as a part of their mean: samples are few, and may miss what matters.
    DAMPING = 0.05

    def __init__(self, weights: dict[str, nn.Parameter]):
        self.parameters = list(weights.values())
        # Views, not copies: they are what the parameters are at the time of use.
        self.weights = {name: parameter.detach() for name, parameter in weights.items()}
        self.previous_gradients: list[Tensor] = []
        self.samples = 0
        self.row_costs = [torch.zeros_like(p[:, 0]) for p in self.weights.values()]
        self.column_costs = [p.new_zeros(p.size(1), p.size(1)) for p in self.weights.values()]
        self.steps: dict[str, FittedSteps] = {}
        self.factors: dict[str, Tensor] = {}

    def observe(self) -> None:
        """Take a sample of the gradients, which all ranks share."""
        gradients = [parameter.grad for parameter in self.parameters]
        if self.previous_gradients:
            changes = torch._foreach_sub(gradients, self.previous_gradients)
            for i, change in enumerate(changes):
                self.row_costs[i] += change.square().sum(1)
                self.column_costs[i].addmm_(change.T, change)
            self.samples += 1
        self.previous_gradients = [gradient.clone() for gradient in gradients]

    def finish(self) -> None:
        """Steps and factors from the samples. Without any: equal steps, no feedback."""
        costs = zip(self.weights.items(), self.row_costs, self.column_costs, strict=True)
        for (name, weight), row_costs, column_costs in costs:
            if not row_costs.sum() > 0:
                row_costs = torch.ones_like(row_costs)
                column_costs = torch.eye(len(column_costs), device=column_costs.device)
            row_costs = (row_costs + self.DAMPING * row_costs.mean()) / column_costs.size(1)
            column_costs = (column_costs / column_costs.diagonal().mean()).double()
            column_costs.diagonal().add_(self.DAMPING)
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(column_costs))
            factor = torch.linalg.cholesky(inverse, upper=True).float()

            row_steps = half_octaves(row_costs.rsqrt())
            column_steps = half_octaves(factor.diagonal())
            # 0.7: rounding may lower a step by a quarter octave (16%); the rest is for feedback.
            finest = half_octaves((weight.abs() / column_steps).amax(1) / (0.7 * INT13))
            finest = finest.clamp(min=2.0**-20)
            self.steps[name] = FittedSteps(row_steps, column_steps, finest)
            self.factors[name] = factor

    def log2_multiplier(self, size: float) -> float:
        """About the logarithm of the multiplier at which all codes take `size` bytes.

        A weight as large as its step takes about three bits, and one bit more each time the step is
        halved. More than seven bits for each would gain nothing, as measured.
        """
        logarithms = []
        for name, weight in self.weights.items():
            steps = self.steps[name]
            in_steps = weight / (steps.row_steps[:, None] * steps.column_steps)
            logarithms.append(in_steps.abs().log2().flatten())
        logarithms = torch.cat(logarithms)
        bits = min(7.0, 8 * size / len(logarithms))
        return float(logarithms.nan_to_num(nan=0.0, posinf=0.0, neginf=-20.0).mean()) + 3 - bits

    def grid(self, log2_multiplier: float) -> Grid:
        """The steps as float16 holds them; none so fine that a code would exceed INT13."""
        grid = {}
        for name, steps in self.steps.items():
            row_steps = (steps.row_steps * 2.0**log2_multiplier).clamp(max=6e4)
            row_steps = torch.maximum(row_steps, steps.finest).half().float()
            grid[name] = row_steps, steps.column_steps
        return grid

    def codes(self, grid: Grid) -> dict[str, Tensor]:
        """The codes of all matrices, rounded with feedback."""
        codes = {}
        for name, weight in self.weights.items():
            row_steps, column_steps = grid[name]
            factor = self.factors[name]
            codes[name] = round_with_feedback(weight, row_steps, column_steps, factor)
        return codes

    def state(self) -> dict:
        """What a checkpoint keeps of it."""
        return dict(
            previous_gradients=self.previous_gradients,
            samples=self.samples,
            row_costs=self.row_costs,
            column_costs=self.column_costs,
        )

    def load_state(self, state: dict) -> None:
        """Go on from a checkpoint."""
        self.previous_gradients = state["previous_gradients"]
        self.samples = state["samples"]
        self.row_costs = state["row_costs"]
        self.column_costs = state["column_costs"]


def round_with_feedback(
    weight: Tensor, row_steps: Tensor, column_steps: Tensor, factor: Tensor
) -> Tensor:
    """Codes (rows, columns), one column after the other, each making up for those before (GPTQ).

    `factor` (columns, columns) is the upper Cholesky factor of the inverse of the columns' costs.
    Within a block of 64 columns corrections are made at once, beyond it a block at a time.
    """
    block = 64
    # Columns become rows, which are contiguous.
    weight = weight.T.clone(memory_format=torch.contiguous_format)
    codes = torch.empty_like(weight)
    for start in range(0, len(weight), block):
        end = min(start + block, len(weight))
        errors = torch.empty_like(weight[start:end])
        for j in range(start, end):
            codes[j] = quantize(weight[j, :, None], row_steps, column_steps[j])[:, 0]
            error = weight[j] - codes[j] * (row_steps * column_steps[j])
            errors[j - start] = error / factor[j, j]
            weight[j + 1 : end] -= torch.outer(factor[j, j + 1 : end], errors[j - start])
        weight[end:] -= factor[start:end, end:].T @ errors
    return codes.T


# How a kind of parameter is stored is a class with three methods: `count_halves`, how many numbers
# of float16 a parameter of a shape takes; `halves`, these numbers; `restore`, the parameter of its
# numbers and codes. `coded` says whether there is a code for each weight beside them.


class HalfStorage:
    """Float16, each value by itself."""

    coded = False

    def count_halves(self, shape: torch.Size) -> int:
        """One for each value."""
        return math.prod(shape)

    def halves(self, parameter: Tensor, grid: Grid, name: str) -> Tensor:
        """The values, in any type."""
        return parameter.detach().flatten()

    def restore(self, halves: Tensor, codes: Tensor | None, shape: torch.Size) -> Tensor:
        """The parameter, float32."""
        return halves.view(shape)


class CodeStorage:
    """A code for each weight, and the steps of rows and columns as float16."""

    coded = True

    def __init__(self, int5_if_asked: bool = False):
        self.int5_if_asked = int5_if_asked

    def largest_code(self, s: Settings) -> int:
        """The code of a row's largest value, with steps for rows (QUANT=rows)."""
        return INT5 if self.int5_if_asked and s.int5_mlp == "1" else INT6

    def count_halves(self, shape: torch.Size) -> int:
        """A step for each row and each column."""
        return sum(shape)

    def halves(self, parameter: Tensor, grid: Grid, name: str) -> Tensor:
        """The steps of rows, then of columns."""
        return torch.cat(grid[name])

    def restore(self, halves: Tensor, codes: Tensor | None, shape: torch.Size) -> Tensor:
        """The parameter, float32: codes times steps."""
        row_steps, column_steps = halves.split(tuple(shape))
        return dequantize(codes.view(shape), row_steps, column_steps)


# The kinds of storage that the table ROLES names.
STORAGE = {
    "float16": HalfStorage(),
    "int6": CodeStorage(),
    "int6_or_int5": CodeStorage(int5_if_asked=True),
    "fitted": CodeStorage(),
}


# ==================================================================================================
# Artifact: entropy coding, packing under the cap, reading back
# ==================================================================================================

# The names that other entries use, whatever is inside.
ARTIFACT_NAME = "final_model.int6.ptz"
OVER_CAP_NAME = "over_the_cap.int6.ptz"
ARTIFACT_MAGIC = b"GOLF"
ARTIFACT_FORMAT = 2
# Magic, format, codec, size of the first part, size of its compressed form, 16 bytes of SHA-256.
ARTIFACT_HEADER = struct.Struct("<4sBBQQ16s")
# The most bytes that a reader unpacks at once, whatever a file says.
MOST_BYTES = 1 << 28

Compress = Callable[[bytes], bytes]

# Of rANS: states that take turns.
LANES = 256
# The frequencies of a context sum to 2 ** FREQUENCY_BITS.
FREQUENCY_BITS = 15
# Contexts, each with frequencies of its own.
CONTEXTS = 48
# Symbols are codes + INT13; one more, so that their number is even.
ALPHABET = 2 * INT13 + 2
# numpy's 64-bit numbers, as states are.
FREQUENCY_MASK = np.uint64((1 << FREQUENCY_BITS) - 1)
FREQUENCY_SHIFT = np.uint64(FREQUENCY_BITS)
WORD_BITS = np.uint64(32)
# A state is at least this; below, a word is read.
LOWEST_STATE = np.uint64(1 << 31)


def unzstd(data: memoryview, size: int) -> memoryview:
    """What a zstd frame holds, which must be `size` bytes. ValueError for any other."""
    holds = size <= MOST_BYTES and zstandard.get_frame_parameters(data).content_size == size
    require(holds, f"{size} bytes are not what it holds", ValueError)
    return memoryview(zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False))


def split_planes(numbers: list[np.ndarray], dtype: str) -> bytes:
    """Numbers of two bytes as all low bytes, then all high ones, which are alike and pack well."""
    together = np.concatenate([part.ravel() for part in numbers]).astype(dtype).view(np.uint8)
    return together[::2].tobytes() + together[1::2].tobytes()


def join_planes(planes: memoryview, dtype: str) -> np.ndarray:
    """The numbers that split_planes was given."""
    low_and_high = np.frombuffer(planes, dtype=np.uint8).reshape(2, -1)
    return np.ascontiguousarray(low_and_high.T).view(dtype).ravel()


def levels_of(codes: np.ndarray) -> np.ndarray:
    """The mean size of a matrix's rows and columns, in half octaves, int8 (rows + columns,).

    Levels of rows are relative to the matrix's mean, those of columns are absolute.
    """
    size = np.abs(codes).astype(np.float32) + 1e-3
    means = np.append(size.mean(1) / size.mean(), size.mean(0))
    return np.rint(2 * np.log2(means)).astype(np.int8)


def contexts_of(levels: list[np.ndarray], shapes: list[tuple[int, int]]) -> np.ndarray:
    """The table that each code is coded with, uint8 (codes,): by the size to be expected there."""
    contexts = []
    for level, (rows, _) in zip(levels, shapes, strict=True):
        expected = level[:rows, None].astype(np.int16) + level[rows:]
        contexts.append((expected + 16).clip(0, CONTEXTS - 1).astype(np.uint8).ravel())
    return np.concatenate(contexts)


def frequencies_of(contexts: np.ndarray, symbols: np.ndarray) -> np.ndarray:
    """The frequency of each symbol in each context, int64 (CONTEXTS, ALPHABET).

    Those of a context sum to 2 ** FREQUENCY_BITS; a symbol that occurs has at least 1.
    """
    pairs = contexts.astype(np.int32) * ALPHABET + symbols
    counts = np.bincount(pairs, minlength=CONTEXTS * ALPHABET).reshape(CONTEXTS, ALPHABET)
    total = counts.sum(1, keepdims=True).clip(min=1)
    whole = 1 << FREQUENCY_BITS
    # These may need a frequency that is rounded up to 1; the others divide what is left.
    rare = (counts > 0) & (counts * whole < 2 * total)
    left = whole - rare.sum(1, keepdims=True)
    frequencies = np.maximum(counts * left // total, counts > 0)
    # What rounding leaves goes to the commonest symbol of each context that is used.
    rest = np.where(counts.any(1), whole, 0) - frequencies.sum(1)
    frequencies[np.arange(CONTEXTS), frequencies.argmax(1)] += rest
    return frequencies


def encode_rans(matrices: list[np.ndarray], compress: Compress) -> bytes:
    """Codes near their entropy: an asymmetric numeral system (rANS, Duda 2013).

    LANES states take turns, so that numpy works on all of them at once. The result is: the size of
    the side information; levels and frequencies, compressed; the last states; words, in the order
    of reading.
    """
    levels = [levels_of(codes) for codes in matrices]
    contexts = contexts_of(levels, [codes.shape for codes in matrices])
    symbols = np.concatenate([codes.ravel() for codes in matrices]) + np.int16(INT13)
    frequencies = frequencies_of(contexts, symbols)
    ends = np.cumsum(frequencies, 1)

    states = np.full(LANES, LOWEST_STATE)
    words = []
    # Backwards, since a decoder takes the last first.
    for start in reversed(range(0, len(symbols), LANES)):
        pick = contexts[start : start + LANES], symbols[start : start + LANES]
        frequency = frequencies[pick].astype(np.uint64)
        end = ends[pick].astype(np.uint64)
        state = states[: len(frequency)]
        # A state that the symbol would bring to 2 ** 63 or more gives a word first.
        full = state >> (np.uint64(63) - FREQUENCY_SHIFT) >= frequency
        words.append(state[full].astype("<u4"))
        state[full] >>= WORD_BITS
        turns, rest = np.divmod(state, frequency)
        state[:] = (turns << FREQUENCY_SHIFT) + rest + end - frequency
    side = compress(b"".join([*levels, frequencies.astype("<u2")]))
    return b"".join([struct.pack("<I", len(side)), side, states.astype("<u8"), *words[::-1]])


def read_side_information(
    data: memoryview, shapes: list[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Contexts (codes,) and frequencies, uint64 (CONTEXTS, ALPHABET), as encode_rans had them."""
    sizes = [rows + columns for rows, columns in shapes]
    side = unzstd(data, sum(sizes) + 2 * CONTEXTS * ALPHABET)
    levels = np.frombuffer(side, dtype=np.int8)[: sum(sizes)]
    levels = np.split(levels, np.cumsum(sizes)[:-1])
    frequencies = np.frombuffer(side[sum(sizes) :], dtype="<u2").reshape(CONTEXTS, ALPHABET)
    frequencies = frequencies.astype(np.uint64)
    contexts = contexts_of(levels, shapes)
    used = frequencies.any(1)
    holds = (frequencies.sum(1)[used] == FREQUENCY_MASK + 1).all() and used[contexts].all()
    require(holds, "its tables of shares do not add up", ValueError)
    return contexts, frequencies


def decode_rans(data: memoryview, shapes: list[tuple[int, int]]) -> np.ndarray:
    """What encode_rans was given, int16, flat. ValueError for what it cannot have made."""
    side_end = 4 + struct.unpack_from("<I", data)[0]
    contexts, frequencies = read_side_information(data[4:side_end], shapes)
    begins = np.cumsum(frequencies, 1) - frequencies
    # The symbol of each slot of 2 ** FREQUENCY_BITS, by context.
    symbol_of_slot = np.zeros((CONTEXTS, 1 << FREQUENCY_BITS), dtype=np.int16)
    for context in np.flatnonzero(frequencies.any(1)):
        slots = frequencies[context].astype(np.int64)
        symbol_of_slot[context] = np.repeat(np.arange(ALPHABET), slots)

    words_start = side_end + 8 * LANES
    states = np.frombuffer(data[side_end:words_start], dtype="<u8").astype(np.uint64)
    words = np.frombuffer(data[words_start:], dtype="<u4")
    words_read = 0
    symbols = np.empty(len(contexts), dtype=np.int16)
    for start in range(0, len(symbols), LANES):
        context = contexts[start : start + LANES]
        state = states[: len(context)]
        slot = state & FREQUENCY_MASK
        symbol = symbol_of_slot[context, slot]
        symbols[start : start + LANES] = symbol
        turns = state >> FREQUENCY_SHIFT
        state[:] = frequencies[context, symbol] * turns + slot - begins[context, symbol]
        low = np.flatnonzero(state < LOWEST_STATE)
        state[low] = state[low] << WORD_BITS | words[words_read : words_read + len(low)]
        words_read += len(low)
    ended = words_read == len(words) and (states == LOWEST_STATE).all()
    require(ended, "its codes end elsewhere", ValueError)
    return symbols - np.int16(INT13)


def encode_zstd(matrices: list[np.ndarray], compress: Compress) -> bytes:
    """Codes as two planes of bytes, compressed: the entries' way."""
    return compress(split_planes([codes + np.int16(128) for codes in matrices], "<i2"))


def decode_zstd(data: memoryview, shapes: list[tuple[int, int]]) -> np.ndarray:
    """What encode_zstd was given, int16, flat. ValueError for what it cannot have made."""
    size = 2 * sum(rows * columns for rows, columns in shapes)
    return join_planes(unzstd(data, size), "<i2") - np.int16(128)


class Codec(NamedTuple):
    """Two functions: int16 matrices of codes to bytes; these to all codes, int16, flat."""

    encode: Callable[[list[np.ndarray], Compress], bytes]
    decode: Callable[[memoryview, list[tuple[int, int]]], np.ndarray]


# An artifact's header has a codec's place in this table.
CODECS = {
    "rans": Codec(encode_rans, decode_rans),
    "zstd": Codec(encode_zstd, decode_zstd),
}


def pack(
    model: GPT, codes: dict[str, Tensor], grid: Grid, manifest: dict, settings: Settings
) -> bytes:
    """The artifact: header; the manifest and all float16 numbers, compressed; the codes.

    UserError for weights beyond float16.
    """
    compress = zstandard.ZstdCompressor(level=settings.zstd_level).compress
    storage = storage_of(model, settings.quant)
    halves = []
    for name, parameter in stored_parameters(model, settings.quant).items():
        numbers = storage[name].halves(parameter, grid, name).half().cpu().numpy()
        require(
            np.isfinite(numbers).all(),
            f"{name} is beyond float16: it has diverged; no artifact was written",
        )
        halves.append(numbers)
    text = json.dumps({**manifest, "quant": settings.quant}, sort_keys=True).encode()
    first = struct.pack("<I", len(text)) + text + split_planes(halves, "<f2")
    packed_first = compress(first)

    matrices = [matrix.to(torch.int16).cpu().numpy() for matrix in codes.values()]
    body = packed_first + CODECS[settings.codec].encode(matrices, compress)
    header = ARTIFACT_HEADER.pack(
        ARTIFACT_MAGIC,
        ARTIFACT_FORMAT,
        list(CODECS).index(settings.codec),
        len(first),
        len(packed_first),
        hashlib.sha256(body).digest()[:16],
    )
    return header + body


def pack_rows(model: GPT, settings: Settings, manifest: dict) -> bytes:
    """The artifact of QUANT=rows, whatever its size."""
    grid = row_grid(model, settings)
    codes = {}
    for name, (row_steps, column_steps) in grid.items():
        weight = model.get_parameter(name).detach()
        codes[name] = quantize(weight, row_steps, column_steps)
    return pack(model, codes, grid, manifest, settings)


class CapSearch:
    """The search for the multiplier of all steps with which a file spends a budget.

    Larger steps give a smaller file. Until one file is over the budget and one under it, it goes
    on by ever longer strides; then it interpolates between the nearest two.
    """

    MOST_TRIES = 12
    # It aims a little under the budget, and is content this near to its aim.
    AIM = 0.9998
    NEAR = 0.0002

    def __init__(self, fit: Fit, budget: int):
        self.fit = fit
        self.budget = budget
        self.tried: dict[float, bytes] = {}
        self.log2_multiplier = fit.log2_multiplier(budget)
        # Where weights have all the bits that are of use.
        self.finest = fit.log2_multiplier(math.inf)
        # How far the multiplier moves if a file shall shrink from the budget to 45% of it.
        self.stride = fit.log2_multiplier(0.45 * budget) - fit.log2_multiplier(budget)

    def add(self, data: bytes) -> None:
        """Take the file that the multiplier gave, and choose the multiplier to try next."""
        self.tried[self.log2_multiplier] = data
        excess = len(data) - self.AIM * self.budget
        is_near = abs(excess) <= self.NEAR * self.budget
        if not is_near and len(self.tried) < self.MOST_TRIES:
            self.log2_multiplier = self.next_multiplier(excess)

    def is_done(self) -> bool:
        """Whether there is no other multiplier to try."""
        return self.log2_multiplier in self.tried

    def next_multiplier(self, excess: float) -> float:
        """The multiplier to try after a file that is so many bytes over the aim."""
        over = [tried for tried, data in self.tried.items() if len(data) > self.budget]
        under = [tried for tried, data in self.tried.items() if len(data) <= self.budget]
        if over and under:
            nearest = [max(over), min(under)]
            sizes = [-len(self.tried[tried]) for tried in nearest]
            return float(np.interp(-self.AIM * self.budget, sizes, nearest))
        step = 2 ** len(self.tried) * self.stride * excess / self.budget
        # No finer than is of use; with steps 2^30 times as coarse all codes are 0.
        return min(max(self.log2_multiplier + step, self.finest), self.finest + 30)

    def result(self) -> bytes:
        """The largest file within the budget, or if there is none the smallest."""
        by_size = {len(data): data for data in self.tried.values()}
        within = [size for size in by_size if size <= self.budget]
        return by_size[max(within, default=min(by_size))]


def pack_under_cap(
    model: GPT, settings: Settings, manifest: dict, budget: int, fit: Fit | None
) -> bytes:
    """The artifact of QUANT=rows; with `fit` the largest of at most `budget` bytes.

    If no steps are coarse enough for the budget, it is the smallest that there is.
    """
    if fit is None:
        return pack_rows(model, settings, manifest)
    search = CapSearch(fit, max(budget, 1))
    while not search.is_done():
        grid = fit.grid(search.log2_multiplier)
        search.add(pack(model, fit.codes(grid), grid, manifest, settings))
    return search.result()


def write_atomically(path: Path, *parts: bytes) -> None:
    """Write all of the file or none of it."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class ArtifactParts(NamedTuple):
    """An artifact, cut by its header and unpacked as far as bytes go."""

    codec: Codec
    manifest: dict
    # Behind the manifest: all numbers of float16, as two planes of bytes.
    halves: memoryview
    # The codes, as the codec made them.
    codes: memoryview


def read_header(data: bytes, name: str) -> tuple[Codec, memoryview, int, int]:
    """Codec, body, and the two sizes of its first part. UserError unless the file is whole.

    The sizes are those of the part unpacked and as it stands in the body.
    """
    require(
        len(data) >= ARTIFACT_HEADER.size and data.startswith(ARTIFACT_MAGIC),
        f"{name}: not an artifact of this script",
    )
    _, version, codec, size, packed_size, digest = ARTIFACT_HEADER.unpack_from(data)
    body = memoryview(data)[ARTIFACT_HEADER.size :]
    require(
        version == ARTIFACT_FORMAT and codec < len(CODECS),
        f"{name}: format {version} with codec {codec}, which this script does not read",
    )
    require(
        hashlib.sha256(body).digest()[:16] == digest,
        f"{name}: damaged: its checksum does not match",
    )
    return list(CODECS.values())[codec], body, size, packed_size


def read_manifest(
    codec: Codec, body: memoryview, size: int, packed_size: int, name: str
) -> ArtifactParts:
    """Unpack the first part and check the manifest: its settings must make a model."""
    first = unzstd(body[:packed_size], size)
    end = 4 + struct.unpack_from("<I", first)[0]
    manifest = json.loads(bytes(first[4:end]))

    fields = {field.name: field for field in fields_of("model", "evaluation")}
    values = {}
    for setting_name, value in manifest["settings"].items():
        values[setting_name] = parse_value(fields[setting_name], as_typed(value))
    # A default of today is not what an older script, without the setting, did.
    missing = [field.name.upper() for field in fields_of("model") if field.name not in values]
    require(
        not missing,
        f"{name}: another version of this script made it, without {', '.join(missing)}: score it "
        "with that one",
    )
    problems = combination_problems(Settings(**values), trains=False)
    require(not problems, "; ".join(problems), ValueError)
    known = manifest["quant"] in ("fit", "rows") and isinstance(manifest["tokenizer"], str)
    require(known, "quant or tokenizer is of no known kind", TypeError)
    return ArtifactParts(codec, {**manifest, "settings": values}, first[end:], body[packed_size:])


def read_weights(parts: ArtifactParts) -> dict[str, Tensor]:
    """The weights, float32 by name. All sizes are checked before memory is taken."""
    quant = parts.manifest["quant"]
    with torch.device("meta"):
        # Shapes without memory.
        model = GPT(Settings(**parts.manifest["settings"]), Runtime())
    storage = storage_of(model, quant)
    shapes = {name: p.shape for name, p in stored_parameters(model, quant).items()}
    coded_shapes = [tuple(shape) for name, shape in shapes.items() if storage[name].coded]
    counts = [storage[name].count_halves(shape) for name, shape in shapes.items()]
    num_codes = [math.prod(shape) for shape in coded_shapes]

    # A few bytes of rANS may stand for many codes, but not for more than these.
    fits = len(parts.halves) / 2 == sum(counts)
    fits = fits and sum(num_codes) <= 64 * len(parts.codes) + (1 << 20)
    require(fits, "its numbers do not fit the model that its settings describe", ValueError)
    numbers = join_planes(parts.halves, "<f2").astype(np.float32)
    require(np.isfinite(numbers).all(), "some of its numbers are not finite", ValueError)

    codes = torch.from_numpy(parts.codec.decode(parts.codes, coded_shapes).copy())
    codes_of_matrices = iter(codes.split(num_codes))
    weights = {}
    halves_of_parameters = torch.from_numpy(numbers).split(counts)
    for (name, shape), halves in zip(shapes.items(), halves_of_parameters, strict=True):
        its_codes = next(codes_of_matrices) if storage[name].coded else None
        weights[name] = storage[name].restore(halves, its_codes, shape)
    return weights


# What a forged or damaged artifact may raise on its way through numpy, torch, json and zstandard.
DAMAGE = (
    struct.error,
    zstandard.ZstdError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def read_artifact(data: bytes, name: str) -> tuple[dict, dict[str, Tensor]]:
    """Manifest and weights, float32 by name.

    UserError if an artifact is not whole, unchanged and of this format, or forged: memory and time
    are bounded by its size, and nothing in it is executed.
    """
    codec, body, size, packed_size = read_header(data, name)
    try:
        parts = read_manifest(codec, body, size, packed_size, name)
        return parts.manifest, read_weights(parts)
    except DAMAGE as error:
        raise UserError(f"{name}: damaged: {' '.join(str(error).split())}") from None


# ==================================================================================================
# Evaluation: plan windows, score them; then, if asked for, score documents and learn from them
# ==================================================================================================


class Score(NamedTuple):
    """Nats a target, bits a byte of text, and how many there were of each."""

    val_loss: float
    val_bpb: float
    targets: int
    bytes: int
    seconds: float


class Pass(NamedTuple):
    """A way to score a text: windows of so many tokens, each of which adds so many targets."""

    window: int
    stride: int


class WindowBatch(NamedTuple):
    """Windows that are scored in one forward pass, as arrays of numpy."""

    # Tokens of the windows, int64 (batch, window).
    inputs: np.ndarray
    # Where in its window each scored target is predicted, int64 (batch, stride).
    positions: np.ndarray
    # The targets, int64 (batch, stride), and the bytes of text behind them.
    targets: np.ndarray
    bytes: np.ndarray
    # Which of them are scored here, bool (batch, stride). The others fill up a row or the batch.
    is_scored: np.ndarray


def plan_windows(targets: int, window: int, stride: int) -> np.ndarray:
    """Rows (start of a window, first position in it that is scored, how many are), int64 (rows, 3).

    Target i, the token i + 1, is predicted at token i. No row scores more than `stride` targets, so
    that all batches have one shape: the first window, which scores all its targets, is there once
    for each `stride` of them. Each later window ends `stride` targets on, the last with the last
    target. Each target is scored once.
    """
    first_ends = np.arange(stride, window, stride)
    later_ends = np.arange(window, targets + stride, stride)
    ends = np.unique(np.append(first_ends, later_ends).clip(max=targets))
    begins = np.append(0, ends[:-1])
    starts = np.maximum(ends - window, 0)
    return np.stack([starts, begins - starts, ends - begins], axis=1)


def bits_per_byte(totals: Tensor) -> float:
    """Bits over bytes, of float64 (nats, bytes, targets)."""
    return float(totals[0] / math.log(2) / totals[1])


def final_score(totals: Tensor, targets: int, seconds: float) -> Score:
    """The score of float64 (nats, bytes, targets), summed over all ranks.

    UserError unless each of so many targets was scored.
    """
    nats, size, count = totals.tolist()
    require(
        count == targets and math.isfinite(nats),
        f"evaluation failed: {count:.0f} of {targets} targets scored, {nats} nats",
    )
    return Score(nats / count, bits_per_byte(totals), int(count), int(size), seconds)


class Progress:
    """The clock of a pass, with a line in the log at each tenth of it."""

    def __init__(self, label: str, log: Callable):
        self.label = label
        self.log = log
        self.started = time.perf_counter()
        self.tenths = 0

    @property
    def seconds(self) -> float:
        """How long the pass has taken so far."""
        return time.perf_counter() - self.started

    def report(self, done: float, bpb: float) -> None:
        """Say the score so far and the seconds left, if another tenth is done."""
        if int(10 * done) > self.tenths:
            self.tenths = int(10 * done)
            seconds = self.seconds
            left = seconds / done - seconds
            self.log(f"{self.label} {100 * done:.0f}% bpb:{bpb:.4f} left:{left:.0f}s")


class Evaluator:
    """Scores models: `plain`, in windows of the training length side by side, or `sliding`."""

    def __init__(self, settings: Settings, runtime: Runtime, table: ByteTable, log: Callable):
        s = settings
        self.runtime = runtime
        self.table = table
        self.log = log
        self.passes = {
            "plain": Pass(s.row_tokens, s.row_tokens),
            "sliding": Pass(s.window_tokens, s.eval_stride),
        }
        # About what a row needs: states of one layer, and scores where they are stored. Logits are
        # made in chunks.
        length = max(s.train_seq_len, s.eval_seq_len)
        position_bytes = 32 * runtime.dtype.itemsize * s.model_dim
        if runtime.attention == "blocked":
            position_bytes += 12 * s.num_heads * length
        fitting = int(0.3 * runtime.memory_bytes() / (length * position_bytes))
        self.batch = min(s.eval_batch_seqs, max(1, fitting))
        self.token_losses = runtime.compile(GPT.token_losses, "graph")

    @torch.no_grad()
    def warm_up(self, model: GPT) -> None:
        """Compile the forward passes on synthetic tokens, outside of any clock."""
        for window, stride in self.passes.values():
            device = self.runtime.device
            inputs = torch.zeros(self.batch, window, device=device).long()
            targets = torch.zeros(self.batch, stride, device=device).long()
            positions = torch.zeros(self.batch, stride, device=device).long()
            self.token_losses(model, inputs, targets, positions)

    def make_batch(
        self, tokens: np.ndarray, sizes: np.ndarray, plan: np.ndarray, first: int, kind: Pass
    ) -> WindowBatch:
        """The windows from row `first` of a plan on.

        Tokens and the bytes behind each of them have a window of padding at their end.
        """
        # The last batch is filled up by repeats, which do not count.
        rows = plan[np.arange(first, first + self.batch).clip(max=len(plan) - 1)]
        # Columns (batch, 1), to go with rows of positions.
        starts, first_positions, num_scored = np.split(rows, 3, axis=1)
        num_scored[len(plan) - first :] = 0
        positions = np.minimum(first_positions + np.arange(kind.stride), kind.window - 1)
        target_positions = starts + positions + 1
        # No row holds text behind its last scored target, which the model must not see.
        in_window = np.arange(kind.window)
        inputs = tokens[starts + in_window].astype(np.int64)
        inputs[in_window >= first_positions + num_scored] = 0
        return WindowBatch(
            inputs=inputs,
            positions=positions,
            targets=tokens[target_positions].astype(np.int64),
            bytes=sizes[target_positions],
            is_scored=np.arange(kind.stride) < num_scored,
        )

    def score_batch(self, model: GPT, batch: WindowBatch, totals: Tensor) -> None:
        """Add a batch's nats, bytes and targets to the totals, float64 (3,) on the device."""
        totals[1] += int(batch.bytes[batch.is_scored].sum(dtype=np.int64))
        totals[2] += int(batch.is_scored.sum())
        device = self.runtime.device
        inputs = torch.from_numpy(batch.inputs).to(device)
        targets = torch.from_numpy(batch.targets).to(device)
        positions = torch.from_numpy(batch.positions).to(device)
        is_scored = torch.from_numpy(batch.is_scored).to(device)
        losses = self.token_losses(model, inputs, targets, positions)
        totals[0] += torch.where(is_scored, losses.double(), 0.0).sum()

    @torch.no_grad()
    def score(
        self,
        model: GPT,
        tokens: np.ndarray,
        name: str,
        sizes: np.ndarray | None = None,
    ) -> Score:
        """Score all targets of uint16 (tokens,). Ranks share the windows; all get the result.

        `sizes` are the bytes behind each token, if they are known better than from its piece.
        """
        progress = Progress("sliding_window", self.log)
        targets = len(tokens) - 1
        kind = self.passes[name]
        plan = plan_windows(targets, kind.window, kind.stride)
        share = np.array_split(plan, self.runtime.world_size)[self.runtime.rank]
        if sizes is None:
            sizes = self.table.sizes(tokens)
        padded = np.pad(tokens, (0, kind.window))
        padded_sizes = np.pad(sizes, (0, kind.window))
        totals = torch.zeros(3, dtype=torch.float64, device=self.runtime.device)
        for first in range(0, len(share), self.batch):
            batch = self.make_batch(padded, padded_sizes, share, first, kind)
            self.score_batch(model, batch, totals)
            if name == "sliding":
                done = min(first + self.batch, len(share)) / len(share)
                progress.report(done, bits_per_byte(totals))

        return final_score(self.runtime.sum_over_ranks(totals), targets, progress.seconds)


# ---- Track B: documents, each scored chunk by chunk, and learnt from
class Occurrences(NamedTuple):
    """Where the last tokens have stood before in their document, for a chunk of places.

    A row for each earlier place that ends with the same token, int64 (n,).
    """

    # The place, counted through all documents' chunks, and how many tokens up to it are the same.
    places: Tensor
    lengths: Tensor
    # The token behind the earlier place.
    next_tokens: Tensor
    # Earlier places by the tokens that are the same at least, float32 (orders, documents, chunk).
    counts: Tensor


def find_occurrences(tokens: Tensor, chunk: int, orders: int) -> Occurrences:
    """Earlier occurrences of the 1 to `orders` tokens that end at each of the last `chunk` places.

    `tokens` is int64 (documents, length). An occurrence ends before the place, so that the token
    behind it is known there.
    """
    documents, length = tokens.shape
    first = length - chunk
    positions = torch.arange(length, device=tokens.device)
    alike = tokens[:, first:, None] == tokens[:, None]
    alike &= positions < positions[first:, None]
    rows, columns, earlier = alike.nonzero(as_tuple=True)
    # Both with a different token before the beginning, so that nothing is alike there.
    before_place = F.pad(tokens, (orders, 0), value=-1)
    before_earlier = F.pad(tokens, (orders, 0), value=-2)
    still = torch.ones_like(rows, dtype=torch.bool)
    lengths = torch.ones_like(rows)
    for back in range(1, orders):
        one = before_place[rows, orders + first + columns - back]
        still &= one == before_earlier[rows, orders + earlier - back]
        lengths += still
    places = rows * chunk + columns
    by_length = torch.zeros(documents * chunk * orders, device=tokens.device)
    by_length.index_add_(0, places * orders + lengths - 1, torch.ones_like(places).float())
    # Each counts for the shorter lengths too.
    counts = by_length.view(documents, chunk, orders).flip(2).cumsum(2).flip(2)
    next_tokens = tokens[rows, earlier + 1]
    return Occurrences(places, lengths, next_tokens, counts.permute(2, 0, 1))


class NgramMixture:
    """Mixes the model's distribution with what followed earlier occurrences in the document.

    From the longest n-gram down, each that has occurred takes its share of what longer ones have
    left, and the model the rest. The shares are learnt for each document from its scored targets,
    as by expectation maximization, and start anew with the next.
    """

    # So many targets are the first shares worth, against those of the document.
    PRIOR_TARGETS = 30.0

    def __init__(self, orders: int, documents: int, device: torch.device):
        first = torch.tensor(NGRAM_SHARES[:orders], device=device)
        # For each order, (orders, documents): targets that it was asked for, and those it explains.
        self.asked = torch.full((orders, documents), self.PRIOR_TARGETS, device=device)
        self.explained = first[:, None] * self.asked

    def weights(self, seen: Occurrences) -> Tensor:
        """Weight of each order's distribution, and last of the model's.

        float32 (orders + 1, documents, chunk).
        """
        shares = (self.explained / self.asked)[..., None] * (seen.counts > 0)
        left = torch.ones_like(shares[0])
        weights = []
        for share in shares.flip(0):
            weights.append(left * share)
            left = left * (1 - share)
        return torch.stack([*weights[::-1], left])

    def mix(self, probabilities: Tensor, seen: Occurrences, weights: Tensor) -> Tensor:
        """The model's full distributions, (documents, chunk, vocabulary) -> the mixture's."""
        mixed = weights[-1][..., None] * probabilities
        # What an occurrence adds to its next token: a part of each order's weight up to its length.
        parts = (weights[:-1] / seen.counts.clamp(min=1)).cumsum(0).flatten(1)
        added = parts[seen.lengths - 1, seen.places]
        vocabulary = probabilities.size(-1)
        mixed.view(-1).index_add_(0, seen.places * vocabulary + seen.next_tokens, added)
        return mixed

    def learn(
        self, targets: Tensor, is_scored: Tensor, scored: Tensor, seen: Occurrences, weights: Tensor
    ) -> None:
        """Count what each order explains of targets (documents, chunk).

        `scored` are the probabilities that the mixture gave them.
        """
        is_hit = seen.next_tokens == targets.flatten()[seen.places]
        by_length = torch.zeros_like(seen.counts).flatten()
        which = (seen.lengths - 1) * targets.numel() + seen.places
        by_length.index_add_(0, which, is_hit.float())
        hits = by_length.view_as(seen.counts).flip(0).cumsum(0).flip(0)
        explained = weights[:-1] * hits / seen.counts.clamp(min=1) / scored * is_scored
        # An order is asked for what no longer one explains.
        by_longer = explained.flip(0).cumsum(0).flip(0) - explained
        asked = (is_scored.float() - by_longer) * (seen.counts > 0)
        self.explained += explained.sum(-1)
        self.asked += asked.sum(-1)


class DocumentLearner:
    """Predicts documents side by side, and learns from what was scored of each (track B).

    A document begins with the artifact's model and moves matrices of its own by gradient descent on
    the loss of each chunk, once that is scored (dynamic evaluation, Krause et al. 2018). What was
    learnt from one document touches no other, so neither order nor batch nor rank matter.
    """

    # Roles of the matrices that are moved.
    ROLES = ("attention", "mlp", "tied_embedding", "head")
    # Occurrences are sought no further back than so many tokens before a chunk.
    REACH = 4096
    # Windows are halved while they hold the document, at most so often: each length is compiled.
    HALVINGS = 5

    def __init__(self, model: GPT, settings: Settings, runtime: Runtime):
        """`model` is not changed."""
        s = settings
        self.runtime = runtime
        self.window = s.window_tokens
        self.chunk = s.ttt_chunk_size
        self.documents = s.ttt_batch_size
        self.learning_rate = s.ttt_lr
        self.orders = s.ttt_ngram_order
        # Blocks are not compiled one by one: there would be a case for each shape.
        self.model = build_model(s, dataclasses.replace(runtime, compiled="no"))
        self.model.load_state_dict(model.state_dict(), strict=False)
        self.model.requires_grad_(False)
        self.compiled_hidden = runtime.compile(GPT.hidden, "graph")
        self.first_matrices = {}
        if self.learning_rate:
            for name, role in self.model.roles().items():
                if role in self.ROLES:
                    self.first_matrices[name] = self.model.get_parameter(name).detach()
        # One for each document, (documents, rows, columns).
        self.matrices = []
        self.begin()

    def begin(self) -> None:
        """All documents are new: forget what was learnt."""
        self.set_matrices([x.repeat(self.documents, 1, 1) for x in self.first_matrices.values()])
        self.mixture = None
        if self.orders:
            self.mixture = NgramMixture(self.orders, self.documents, self.runtime.device)
        # What was predicted last, with the graph behind it, and how it was mixed.
        self.predicted = None
        self.mixed_by = None

    def set_matrices(self, matrices: list[Tensor]) -> None:
        """Have the model compute with these: a matrix for each document and name."""
        self.matrices = [nn.Parameter(matrix) for matrix in matrices]
        for name, own in zip(self.first_matrices, self.matrices, strict=True):
            owner, _, attribute = name.rpartition(".")
            setattr(self.model.get_submodule(owner), attribute, own)

    def keep(self, rows: int) -> None:
        """The documents behind the first `rows` have ended: only those are computed from here."""
        self.set_matrices([own.detach()[:rows] for own in self.matrices])
        if self.mixture is not None:
            self.mixture.asked = self.mixture.asked[:, :rows]
            self.mixture.explained = self.mixture.explained[:, :rows]

    def model_probabilities(self, tokens: Tensor) -> Tensor:
        """What the documents' models say of the last chunk: (documents, chunk, vocabulary)."""
        end = tokens.size(1)
        length = self.window
        for _ in range(self.HALVINGS):
            if length % 2 == 0 and length // 2 >= max(end, self.chunk):
                length //= 2
        start = max(0, end - length)
        inputs = F.pad(tokens[:, start:], (0, length - (end - start)))
        # Fewer rows, at the end of a batch of documents, are other shapes.
        hidden = self.compiled_hidden if len(tokens) == self.documents else GPT.hidden
        states = hidden(self.model, inputs)[:, end - start - self.chunk : end - start]
        return softcapped_logits(states, self.model.output, self.model.softcap).softmax(-1)

    def predict(self, tokens: Tensor) -> Tensor:
        """Probabilities of what follows each of the documents' last `chunk` tokens.

        `tokens` is int64 (documents, length), from each document's first on, length a multiple of
        the chunk. Returns float32 (documents, chunk, vocabulary): whole distributions, which no
        token behind their place changes. All documents that were kept are there.
        """
        with torch.set_grad_enabled(bool(self.matrices)):
            probabilities = self.model_probabilities(tokens)
            if self.mixture is not None:
                recent = tokens[:, -(self.REACH + self.chunk) :]
                seen = find_occurrences(recent, self.chunk, self.orders)
                weights = self.mixture.weights(seen)
                probabilities = self.mixture.mix(probabilities, seen, weights)
                self.mixed_by = (seen, weights)
        self.predicted = probabilities
        return probabilities.detach()

    def learn(self, targets: Tensor, is_scored: Tensor) -> None:
        """Learn from the last prediction's targets, int64 (documents, chunk), which were scored.

        What is not scored, bool (documents, chunk), is not learnt from either.
        """
        scored = self.predicted.gather(2, targets[..., None])[..., 0]
        if self.mixture is not None:
            self.mixture.learn(targets, is_scored, scored.detach(), *self.mixed_by)
        if self.matrices:
            loss = torch.where(is_scored, -scored.log(), 0.0).sum() / self.chunk
            gradients = torch.autograd.grad(loss, self.matrices)
            with torch.no_grad():
                torch._foreach_add_(self.matrices, gradients, alpha=-self.learning_rate)
        self.predicted = None


def documents_of(tokens: np.ndarray) -> np.ndarray:
    """Rows (first token, targets) of the documents of a text, int64 (documents, 2).

    A document's targets are its tokens behind BOS and the BOS of the next: that it ends there is
    predicted too.
    """
    starts = np.flatnonzero(tokens == BOS)
    require(len(starts) and starts[0] == 0, "a text to learn from must begin with BOS")
    targets = np.diff(np.append(starts, len(tokens) - 1))
    return np.stack([starts, targets], axis=1)[targets > 0]


class AdaptiveEvaluator:
    """Scores a text document by document and learns from what was scored: a score of track B.

    Documents of like length are scored side by side, a chunk of each at a time: first a whole
    distribution for each of its targets, then their nats, which are final; then it is learnt.
    """

    def __init__(self, settings: Settings, runtime: Runtime, table: ByteTable, log: Callable):
        self.settings = settings
        self.runtime = runtime
        self.table = table
        self.log = log

    @property
    def description(self) -> str:
        """What adapts, in which order, and when a score is final."""
        s = self.settings
        learnt = []
        if s.ttt_lr:
            learnt.append(f"a document's own matrices by gradient descent at {s.ttt_lr}")
        if s.ttt_ngram_order:
            learnt.append(f"shares of the n-grams up to {s.ttt_ngram_order} of the document")
        return (
            f"final_int6_ttt, document by document, each from the artifact as it is: of "
            f"{s.ttt_chunk_size} targets full distributions, then their nats, which are final, and "
            f"only then are learnt: {', '.join(learnt) or 'nothing'}"
        )

    def warm_up(self, model: GPT) -> None:
        """Compile all lengths of windows on synthetic tokens, outside of any clock."""
        learner = DocumentLearner(model, self.settings, self.runtime)
        device = self.runtime.device
        is_scored = torch.ones(learner.documents, learner.chunk, dtype=torch.bool, device=device)
        for end in range(learner.chunk, learner.window + learner.chunk, learner.chunk):
            tokens = torch.zeros(learner.documents, end, dtype=torch.int64, device=device)
            learner.predict(tokens)
            learner.learn(tokens[:, -learner.chunk :], is_scored)

    def score_documents(
        self, learner: DocumentLearner, tokens: np.ndarray, documents: np.ndarray, nats: np.ndarray
    ) -> None:
        """Write the nats of all targets of some documents, rows of documents_of, longest first."""
        chunk = learner.chunk
        length = chunk * int(-(-documents[:, 1].max() // chunk))
        rows = np.zeros((learner.documents, length + 1), dtype=np.int64)
        is_target = np.zeros((learner.documents, length), dtype=bool)
        for row, (start, targets) in enumerate(documents):
            rows[row, : targets + 1] = tokens[start : start + targets + 1]
            is_target[row, :targets] = True
        text = torch.from_numpy(rows).to(self.runtime.device)
        is_target = torch.from_numpy(is_target).to(self.runtime.device)
        learner.begin()
        kept = learner.documents
        for first in range(0, length, chunk):
            end = first + chunk
            # The longest documents come first. Rows are halved, so that there are few shapes.
            going_on = np.count_nonzero(documents[:, 1] > first)
            while kept // 2 >= going_on:
                kept //= 2
                learner.keep(kept)
            probabilities = learner.predict(text[:kept, :end])
            targets = text[:kept, first + 1 : end + 1]
            losses = -probabilities.gather(2, targets[..., None])[..., 0].double().log()
            losses = losses.cpu().numpy()
            for row, (start, num_targets) in enumerate(documents[:kept]):
                count = int(np.clip(num_targets - first, 0, chunk))
                nats[start + first : start + first + count] = losses[row, :count]
            # These are final. Nobody would use what the last chunk teaches.
            if end < length:
                learner.learn(targets, is_target[:kept, first:end])

    def nats(
        self, model: GPT, tokens: np.ndarray, after_batch: Callable | None = None
    ) -> np.ndarray:
        """Nats of each target of uint16 (tokens,), float64 (tokens - 1,).

        Those of other ranks' documents are NaN. `after_batch` gets the nats so far and the share of
        this rank's batches that is done.
        """
        learner = DocumentLearner(model, self.settings, self.runtime)
        documents = documents_of(tokens)
        chunks = -(-documents[:, 1] // learner.chunk)
        documents = documents[np.argsort(-chunks, kind="stable")]
        batches = [
            documents[first : first + learner.documents]
            for first in range(0, len(documents), learner.documents)
        ]
        share = batches[self.runtime.rank :: self.runtime.world_size]
        nats = np.full(len(tokens) - 1, np.nan)
        for number, batch in enumerate(share, start=1):
            self.score_documents(learner, tokens, batch, nats)
            if after_batch is not None:
                after_batch(nats, number / len(share))
        return nats

    def score(self, model: GPT, tokens: np.ndarray, sizes: np.ndarray | None = None) -> Score:
        """Score all targets of uint16 (tokens,). Ranks share the documents; all get the result.

        `sizes` are the bytes behind each token, if they are known better than from its piece.
        """
        progress = Progress("ttt", self.log)
        if sizes is None:
            sizes = self.table.sizes(tokens)
        sizes = sizes[1:]

        def totals_of(nats: np.ndarray) -> Tensor:
            is_scored = ~np.isnan(nats)
            size = int(sizes[is_scored].sum(dtype=np.int64))
            totals = [nats[is_scored].sum(), size, is_scored.sum()]
            return torch.tensor(totals, dtype=torch.float64, device=self.runtime.device)

        def report(nats: np.ndarray, done: float) -> None:
            progress.report(done, bits_per_byte(totals_of(nats)))

        totals = totals_of(self.nats(model, tokens, report))
        # A rank with the longest documents may end minutes behind the others, and NCCL waits for
        # one minute only.
        self.runtime.meet()
        totals = self.runtime.sum_over_ranks(totals)
        return final_score(totals, len(tokens) - 1, progress.seconds)


# ==================================================================================================
# Machine: all that depends on where this runs, chosen once
# ==================================================================================================

OLDEST_TORCH = (2, 9)

# Inductor's options on a GPU: small kernels join into one launch, and generated matrix products,
# which fuse adjacent operations, compete with the library's.
GPU_COMPILE_OPTIONS = {"combo_kernels": True, "max_autotune_gemm": True}


def check_torch_version() -> None:
    """UserError under a torch that is too old. 2.9 to 2.13 were tried."""
    # By the first two numbers: the vendors' images have builds such as 2.9.0a0, before 2.9.0.
    release = tuple(int(number) for number in torch.__version__.split(".")[:2])
    oldest = ".".join(map(str, OLDEST_TORCH))
    require(
        release >= OLDEST_TORCH,
        f"torch {torch.__version__} is too old: this script needs {oldest} or newer",
    )


def start_all_gather(whole: Tensor, share: Tensor):
    """Begin to gather the shares of all ranks into `whole`; returns a handle with wait().

    torch 2.13 renamed the function. The older name ends with support for torch 2.12.
    """
    if hasattr(dist, "all_gather_single"):
        return dist.all_gather_single(whole, share, async_op=True)
    return dist.all_gather_into_tensor(whole, share, async_op=True)


def bfloat16_features_of_cpu() -> list[str]:
    """The instructions of this CPU for products of bfloat16; none where torch cannot tell.

    torch 2.9 has no torch.cpu.get_capabilities; the check ends with support for it.
    """
    if not hasattr(torch.cpu, "get_capabilities"):
        return []
    capabilities = torch.cpu.get_capabilities()
    return [name for name in ("amx_bf16", "avx512_bf16") if capabilities.get(name)]


def no_wait() -> None:
    """Wait for nothing: what a lone process gathers is there."""


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Where this process runs and with what; `reasons` says how each choice was made."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    attention: str = "sdpa"
    # What is compiled: "graph": whole functions, "blocks": the blocks one by one, or "no".
    compiled: str = "no"
    reasons: tuple[str, ...] = ()
    # The group in which hosts meet: gloo beside NCCL, or None, the default group.
    control: object = None

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU, on which work goes on while Python is ahead of it."""
        return self.device.type == "cuda"

    def compile(self, function: Callable, unit: str) -> Callable:
        """The function as one compiled graph if this runtime compiles such units, else as it is."""
        if self.compiled != unit:
            return function
        options = GPU_COMPILE_OPTIONS if self.on_gpu else None
        return torch.compile(function, fullgraph=True, dynamic=False, options=options)

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """The sum of the tensor over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, share: Tensor) -> tuple[Tensor, Callable[[], object]]:
        """The shares of all ranks one after the other, and a function that waits for them."""
        if self.world_size == 1:
            return share, no_wait
        whole = share.new_empty(self.world_size * len(share), *share.shape[1:])
        return whole, start_all_gather(whole, share).wait

    def from_main(self, value):
        """Rank 0's value on every rank. The hosts wait for each other, their devices do not."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def meet(self) -> None:
        """Wait until the hosts of all ranks are here."""
        if self.world_size > 1:
            dist.barrier(group=self.control)

    def memory_bytes(self) -> float:
        """Memory to plan batches for: the GPU's, or 4 GB."""
        if self.on_gpu:
            return torch.cuda.get_device_properties(self.device).total_memory
        return 4e9

    def synchronize(self) -> None:
        """Wait until the GPU has done all that it was given."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def peak_memory_bytes(self) -> int:
        """The most memory allocated on a GPU, or resident on a CPU; 0 where nobody counts it."""
        if self.on_gpu:
            return torch.cuda.max_memory_allocated(self.device)
        if resource is None:
            return 0
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def gpu_capability(device: torch.device) -> tuple[int, int]:
    """The GPU's compute capability, (8, 0) for Ampere, (9, 0) for Hopper; (0, 0) for a CPU."""
    if device.type != "cuda":
        return (0, 0)
    return torch.cuda.get_device_capability(device)


def check_kernels(device: torch.device, name: str) -> None:
    """UserError where torch was built for other generations of GPUs: its first kernel fails."""
    try:
        torch.zeros(1, device=device).add_(1)
    except RuntimeError as error:
        major, minor = gpu_capability(device)
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"this torch cannot compute on {name} (sm_{major}{minor}): {reason}; install a build "
            "of torch for this GPU, or use DEVICE=cpu"
        ) from None


def choose_device(settings: Settings, local_rank: int) -> tuple[torch.device, str]:
    """CUDA if it is there, with the reason."""
    if settings.device == "cpu":
        return torch.device("cpu"), "asked for"
    if settings.device == "auto" and not torch.cuda.is_available():
        return torch.device("cpu"), "no CUDA"
    require(torch.cuda.is_available(), "DEVICE=cuda: torch sees no GPU here")
    require(
        local_rank < torch.cuda.device_count(),
        f"no GPU for rank {local_rank}: lower --nproc_per_node",
    )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(local_rank)
    name = torch.cuda.get_device_name(local_rank)
    check_kernels(device, name)
    return device, name


def choose_dtype(settings: Settings, device: torch.device) -> tuple[torch.dtype, str]:
    """bfloat16 where the hardware has instructions for its products, else float32, with the reason.

    GPUs have them since Ampere (capability 8.0). Before, torch would emulate them.
    """
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype), "asked for"
    if device.type == "cuda":
        if gpu_capability(device) >= (8, 0):
            return torch.bfloat16, "tensor cores"
    else:
        features = bfloat16_features_of_cpu()
        if features:
            return torch.bfloat16, features[0]
    return torch.float32, "no bfloat16 products here"


def importable(name: str) -> bool:
    """Whether a package is there and works. One that was built for another torch fails somehow."""
    try:
        importlib.import_module(name)
    except Exception:
        return False
    return True


def attention_obstacles(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What speaks against each backend here, the fastest first; empty text where nothing does."""
    capability = gpu_capability(device)
    in_bfloat16 = device.type == "cuda" and dtype == torch.bfloat16
    obstacles = {"flash3": "", "flash2": "", "sdpa": ""}
    # FlashAttention-3 is written for Hopper alone: Ampere and Blackwell (10.0, 12.0) cannot run it.
    if not in_bfloat16 or capability[0] != 9 or not importable("flash_attn_interface"):
        obstacles["flash3"] = "needs bfloat16 on an H100 and the package flash_attn_interface"
    if not in_bfloat16 or capability < (8, 0) or not importable("flash_attn"):
        obstacles["flash2"] = "needs bfloat16 on an Ampere or newer GPU and the package flash-attn"
    if device.type != "cuda":
        obstacles["sdpa"] = "is slower on a CPU"
    return obstacles


def choose_attention(
    settings: Settings, device: torch.device, dtype: torch.dtype
) -> tuple[str, str]:
    """The fastest backend that works here, with the reason. UserError for an impossible wish."""
    obstacles = attention_obstacles(device, dtype)
    wish = settings.attention
    if wish in ("flash3", "flash2"):
        require(not obstacles[wish], f"ATTENTION={wish} {obstacles[wish]}")
    if wish != "auto":
        return wish, "asked for"
    passed_over = []
    for name, obstacle in obstacles.items():
        if not obstacle:
            return name, "; ".join(passed_over) or "the fastest"
        passed_over.append(f"{name} {obstacle}")
    return "blocked", "; ".join(passed_over)


def choose_compilation(settings: Settings, device: torch.device) -> tuple[str, str]:
    """What to compile, with the reason: on a CPU one block at a time, since all would take minutes.

    Whether a compiler works is known only by trying: a missing compiler, header or library, or a
    GPU that is too old for Triton, shows as an error of one of many types.
    """
    if settings.compile == "0":
        return "no", "asked for"
    short = settings.iterations < 100 or 0 < settings.max_wallclock_seconds < 30
    trains = not settings.artifact
    if settings.compile == "auto" and device.type == "cpu" and trains and short:
        return "no", "the run is too short to earn it back"
    unit = "graph" if device.type == "cuda" else "blocks"
    try:
        compiled = Runtime(device=device, compiled=unit).compile(torch.tanh, unit)
        compiled(torch.ones(64, device=device))
    except Exception as error:
        reason = "torch.compile fails: " + " ".join(str(error).split())[:200]
        require(settings.compile != "1", f"COMPILE=1: {reason}")
        return "no", reason
    return unit, "a compiler works"


def join_ranks(device: torch.device) -> object:
    """Meet the other processes that torchrun started; returns the group in which hosts meet.

    On GPUs the hosts meet over gloo before each collective, so NCCL waits for seconds at most, and
    a rank that died ends the others after a minute.
    """
    if device.type != "cuda":
        dist.init_process_group("gloo")
        return None
    dist.init_process_group("nccl", device_id=device, timeout=datetime.timedelta(minutes=1))
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=30))


# Parameters of glibc's mallopt (malloc.h).
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones.

    They may have 1 GB each, 32 MB before glibc 2.35. Else a step on a CPU asks the system for
    thousands of pages that the last one gave back, which takes a tenth of its time. Nothing happens
    where the C library has no mallopt.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_TRIM_THRESHOLD, -1)
    if not mallopt(M_MMAP_THRESHOLD, 1 << 30):
        # Before glibc 2.35 no more than this was taken.
        mallopt(M_MMAP_THRESHOLD, 1 << 25)


def start_runtime(settings: Settings) -> Runtime:
    """Choose device, type, attention and compiler, and join the ranks that torchrun started."""
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    # TF32 for products that are left in float32.
    torch.set_float32_matmul_precision("high")
    device, device_reason = choose_device(settings, local_rank)
    if device.type == "cpu":
        keep_freed_memory()
    dtype, dtype_reason = choose_dtype(settings, device)
    attention, attention_reason = choose_attention(settings, device, dtype)
    compiled, compile_reason = choose_compilation(settings, device)
    control = join_ranks(device) if world_size > 1 else None
    reasons = (
        f"world_size:{world_size} (threads:{torch.get_num_threads()})",
        f"device:{device} ({device_reason})",
        f"dtype:{str(dtype).removeprefix('torch.')} ({dtype_reason})",
        f"attention:{attention} ({attention_reason})",
        f"compile:{compiled} ({compile_reason})",
    )
    return Runtime(
        rank, world_size, local_rank, device, dtype, attention, compiled, reasons, control
    )


class Logger:
    """Rank 0's lines for the console and for logs/<run_id>.txt, which begins with this source."""

    def __init__(self, run_id: str, runtime: Runtime, resumes: bool = False):
        self.run_id = run_id
        self.file = None
        # Whether there is something to keep: a step, a score, or what an earlier run has written.
        self.has_begun = False
        if runtime.rank == 0:
            mode = "a" if resumes else "x"
            self.file = open(f"logs/{run_id}.txt", mode, encoding="utf-8", buffering=1)  # noqa: SIM115
            self.has_begun = self.file.tell() > 0
            source = "" if self.has_begun else Path(__file__).read_text("utf-8")
            self(source + "=" * 100, console=False)

    def __call__(self, line: str, console: bool = True) -> None:
        """Write a line. A full disk or a closed console is no reason for a run to end."""
        if self.file is None:
            return
        outputs = [self.file, sys.stdout] if console else [self.file]
        for output in outputs:
            with contextlib.suppress(OSError):
                print(line, file=output, flush=True)

    def discard(self) -> None:
        """Remove the log of a run that failed before it began: its RUN_ID is free again."""
        if self.file is None or self.has_begun:
            return
        with contextlib.suppress(OSError):
            self.file.close()
            Path(self.file.name).unlink()
        self.file = None


class StopSignals:
    """SIGTERM and Ctrl-C end a run at once or, while they are held, when they are released.

    With CHECKPOINT_EVERY training holds them, so that a checkpoint is written before the run ends.
    """

    # Launchers send a signal twice within moments. One that comes later than this many seconds is
    # somebody who does not want to wait.
    PATIENCE = 5.0

    def __init__(self):
        # The number of the first signal that came; 0: none.
        self.number = 0
        self.received_at = 0.0
        self.held = False

    def install(self) -> None:
        """Receive these signals from now on."""
        signal.signal(signal.SIGINT, self.receive)
        signal.signal(signal.SIGTERM, self.receive)

    def receive(self, number: int, frame: object) -> None:
        """What Python calls when a signal comes."""
        if self.number == 0:
            self.number = number
            self.received_at = time.monotonic()
            if not self.held:
                raise KeyboardInterrupt
        elif time.monotonic() > self.received_at + self.PATIENCE:
            self.release()

    def hold(self) -> None:
        """Let signals wait until release()."""
        self.held = True

    def release(self) -> None:
        """Hold signals no longer; one that has come meanwhile ends the run now."""
        self.held = False
        if self.number:
            raise KeyboardInterrupt


STOP = StopSignals()


def claim_disk(size: float) -> None:
    """UserError if `size` bytes cannot be written here and in logs/: before training, not after."""
    size = int(size)
    for folder in (Path.cwd(), Path.cwd() / "logs"):
        try:
            folder.mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as probe:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(probe.fileno(), 0, size)
                elif shutil.disk_usage(folder).free < size:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise UserError(
                f"cannot write {size:.0f} bytes into {folder}: {error.strerror}"
            ) from None


# ==================================================================================================
# Training: clock, steps, checkpoints
# ==================================================================================================


def training_loss(
    model: GPT,
    coded: dict[str, Tensor],
    grid: Grid | None,
    looped: bool,
    tokens: Tensor,
    targets: Tensor,
) -> tuple[Tensor, Tensor]:
    """GPT.forward; with a grid, on fake-quantized coded weights (late QAT).

    The switches are arguments, for which torch.compile makes graphs of their own. An attribute of a
    class was folded into the first graph, and late QAT never began (#1032).
    """
    if grid is None:
        return model(tokens, targets, looped)
    weights = {}
    for name, weight in coded.items():
        row_steps, column_steps = grid[name]
        weights[name] = fake_quantize(weight, row_steps, column_steps)
    return torch.func.functional_call(model, weights, (tokens, targets, looped))


class Clock:
    """Seconds of training, and whether a rank must stop.

    All ranks go by rank 0's clock, so they decay and stop alike.
    """

    # Steps that the host may be ahead of its GPU.
    MOST_IN_FLIGHT = 2

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self.in_flight = self.MOST_IN_FLIGHT if runtime.on_gpu else 0
        # Marks at the ends of steps that the GPU may not have done yet.
        self.events = collections.deque()
        # What was counted until the clock was last started.
        self.seconds = 0.0
        self.started = 0.0
        # The number of the signal that one of the ranks has received.
        self.stopped = 0

    def start(self) -> None:
        """Count from now on."""
        self.runtime.synchronize()
        self.started = time.perf_counter()

    def wait_for_gpu(self) -> None:
        """Hold the host back if it is far ahead of its GPU: the clock would time launches."""
        event = torch.cuda.Event()
        event.record()
        self.events.append(event)
        if len(self.events) > self.in_flight:
            self.events.popleft().synchronize()

    def read(self) -> float:
        """The seconds so far, the same on every rank."""
        if self.runtime.on_gpu:
            self.wait_for_gpu()
        # Other ranks send 0 seconds, so that the maximum is rank 0's clock, and any rank's signal.
        passed = time.perf_counter() - self.started if self.runtime.rank == 0 else 0.0
        both = torch.tensor([passed, STOP.number], dtype=torch.float64)
        if self.runtime.world_size > 1:
            dist.all_reduce(both, dist.ReduceOp.MAX, group=self.runtime.control)
        self.stopped = int(both[1])
        if self.stopped and not STOP.number:
            STOP.number = self.stopped
        return self.seconds + float(both[0])

    def pause(self) -> float:
        """Stop counting; the seconds so far."""
        self.runtime.synchronize()
        self.seconds += self.runtime.from_main(time.perf_counter() - self.started)
        return self.seconds


class Trainer:
    """Everything that a training step touches."""

    # Where the times of steps vary by a tenth, one run in thirty would end late by a step that took
    # longer than the one before; none takes a quarter longer.
    RESERVE = 1.25

    def __init__(
        self,
        model: GPT,
        settings: Settings,
        runtime: Runtime,
        log: Callable,
        data: TrainingRows,
        code_bytes: int,
        pieces: Sequence[str] = (),
    ):
        """`pieces` are the texts of the vocabulary, for SPELLING_LR."""
        s = settings
        self.model = model
        self.settings = s
        self.runtime = runtime
        self.log = log
        self.data = data
        self.code_bytes = code_bytes
        self.loss = runtime.compile(training_loss, "graph")
        self.batches = BatchPlan(s, runtime)
        self.clock = Clock(runtime)
        self.schedule = Schedule(s)
        self.optimizer = Optimizer(model, s, runtime, pieces)
        self.average = WeightAverage()
        # What is averaged and exported, and what of it becomes codes.
        self.stored = list(stored_parameters(model, s.quant).values())
        self.coded = coded_parameters(model, s.quant)
        self.fit = Fit(self.coded) if s.quant == "fit" else None
        # What late QAT quantizes the coded weights with; None: it is not on yet.
        self.grid: Grid | None = None
        self.targets_per_step = s.step_rows * s.row_tokens

        self.steps = 0
        self.qat_steps = 0
        self.epoch = 0
        # The steps at which this run was resumed.
        self.resumed_at: list[int] = []
        # Losses of steps that nobody has looked at yet, on the device; and the last that was good.
        self.unchecked_losses: list[Tensor] = []
        self.train_loss = math.nan
        # Seconds that must be left for another step.
        self.reserve = 0.0

    def state(self) -> dict:
        """What the next steps depend on, for any number of ranks: the same on every rank.

        Rows of data need no state, since a row depends on its position alone.
        """
        return dict(
            trainer=dict(
                steps=self.steps,
                qat_steps=self.qat_steps,
                epoch=self.epoch,
                resumed_at=self.resumed_at,
                train_loss=self.train_loss,
                reserve=self.reserve,
                grid=self.grid,
                seconds=self.clock.seconds,
            ),
            average=self.average.state(),
            fit=self.fit.state() if self.fit is not None else None,
            weights=[p.detach().clone() for p in self.model.parameters()],
            random=torch.get_rng_state(),
            muon=self.optimizer.muon.momentum_buffers(),
            adamw=self.optimizer.adamw.state_dict(),
        )

    def load(self, state: dict) -> None:
        """Go on from a state."""
        own = state["trainer"]
        self.steps = own["steps"]
        self.qat_steps = own["qat_steps"]
        self.epoch = own["epoch"]
        self.resumed_at = own["resumed_at"]
        self.train_loss = own["train_loss"]
        self.reserve = own["reserve"]
        self.grid = own["grid"]
        self.clock.seconds = own["seconds"]
        self.average.load_state(state["average"])
        if self.fit is not None:
            self.fit.load_state(state["fit"])
        torch._foreach_copy_([p.detach() for p in self.model.parameters()], state["weights"])
        self.optimizer.muon.load(state["muon"])
        self.optimizer.adamw.load_state_dict(state["adamw"])
        torch.set_rng_state(state["random"].cpu())

    def forward_backward(
        self, tokens: Tensor, targets: Tensor, grid: Grid | None, looped: bool = True
    ) -> Tensor:
        """Add a micro-batch to the gradients; its share of the step's mean loss, on the device."""
        if self.runtime.on_gpu:
            device = self.runtime.device
            tokens = tokens.pin_memory().to(device, non_blocking=True)
            targets = targets.pin_memory().to(device, non_blocking=True)
        objective, loss = self.loss(self.model, self.coded, grid, looped, tokens, targets)
        (objective / self.targets_per_step).backward()
        return loss / self.targets_per_step

    def warm_up(self) -> None:
        """Run every training graph on synthetic tokens, then put all that it changed back."""
        s = self.settings
        state = self.state()
        rows = self.batches.micro_batch_rows
        tokens = (torch.arange(rows * s.train_seq_len) % s.vocab_size).view(rows, -1)
        for phase in self.schedule.phases():
            grid = row_grid(self.model, s) if phase.with_qat else None
            for step in range(s.warmup_steps):
                self.forward_backward(tokens, tokens.clone(), grid, phase.looped)
                # A rank may compile for longer than the others' GPUs would wait.
                self.runtime.meet()
                self.optimizer.step(1.0, self.schedule.momentum(step))
        self.load(state)

    def begin_late_qat(self, scale: float) -> None:
        """From now on train on the weights about as they will be read back.

        With QUANT=fit the grid follows from the costs sampled so far. Without samples all
        quantization steps are equal.
        """
        s = self.settings
        if self.fit is None:
            self.grid = row_grid(self.model, s)
        else:
            self.fit.finish()
            budget = s.artifact_max_bytes - self.code_bytes
            self.grid = self.fit.grid(self.fit.log2_multiplier(budget))
        self.log(f"late_qat:on step:{self.steps} scale:{scale:.4f} quant:{s.quant}")

    def step(self, plan: StepPlan) -> Tensor:
        """One optimizer step; this rank's share of its mean loss, on the device."""
        if plan.late_qat_due and self.grid is None:
            self.begin_late_qat(plan.scale)
        if self.grid is not None:
            self.qat_steps += 1

        loss = 0.0
        for micro_step in range(self.batches.micro_steps):
            tokens, targets = self.batches.batch(self.data, self.steps, micro_step)
            loss = loss + self.forward_backward(tokens, targets, self.grid, plan.looped)
        self.runtime.sum_over_ranks(self.optimizer.gradients)

        if plan.samples_costs:
            self.fit.observe()
        self.optimizer.step(plan.scale, plan.momentum)
        self.steps += 1
        if plan.samples_weights:
            self.average.add(self.stored, plan.average_decay)
        return loss

    def progress(self, seconds: float) -> float:
        """Share of the run that is over."""
        return self.schedule.progress(self.steps, seconds, self.reserve)

    def run(self, validate: Callable, save: Callable | None = None) -> None:
        """Train to the end of the schedule.

        Calls `validate(steps, seconds)` where VAL_LOSS_EVERY says so, and `save(state)` where
        CHECKPOINT_EVERY does, at the end, and before a signal ends the run.
        """
        s = self.settings
        if s.checkpoint_every:
            STOP.hold()
        self.clock.start()
        seconds = self.clock.seconds
        saved_at = seconds
        progress = self.progress(seconds)
        while progress < 1.0 and not self.clock.stopped:
            self.unchecked_losses.append(self.step(self.schedule.plan(self.steps, progress)))

            before = seconds
            seconds = self.clock.read()
            # The last step must end before the limit: leave time for one as long as this, but not
            # less than the mean or, if this one was an exception, more than twice as much, and for
            # those that the GPU is behind.
            mean = seconds / self.steps
            step_seconds = min(max(seconds - before, mean), 2 * mean)
            self.reserve = self.RESERVE * step_seconds * (1 + self.clock.in_flight)
            progress = self.progress(seconds)

            is_last = progress == 1.0
            if self.is_logged(is_last):
                self.report(seconds)
            if s.val_loss_every and self.steps % s.val_loss_every == 0:
                # Reading training data is on the clock.
                self.data.settle()
                validate(self.steps, self.clock.pause())
                self.clock.start()
            is_due = is_last or self.clock.stopped or seconds - saved_at >= s.checkpoint_every
            if s.checkpoint_every and is_due:
                saved_at = self.write_checkpoint(save)
                seconds = self.clock.read()
                progress = self.progress(seconds)
                if progress == 1.0:
                    # There is no further step: writing this one took no time from training.
                    self.clock.start()
        self.data.close()
        self.clock.pause()
        STOP.release()

    def write_checkpoint(self, save: Callable) -> float:
        """Hand the state to `save`, with the clock going on; the seconds until now."""
        self.check_losses()
        seconds = self.clock.pause()
        self.clock.start()
        save(self.state())
        return seconds

    def is_logged(self, is_last: bool) -> bool:
        """Whether the step that was just done has a line in the log."""
        every = self.settings.train_log_every
        return self.steps == 1 or is_last or (every > 0 and self.steps % every == 0)

    def check_losses(self) -> None:
        """UserError for the first loss that is no number. Waits for the device."""
        if not self.unchecked_losses:
            return
        losses = self.runtime.sum_over_ranks(torch.stack(self.unchecked_losses)).tolist()
        self.unchecked_losses = []
        for step, loss in enumerate(losses, start=self.steps - len(losses) + 1):
            require(
                math.isfinite(loss),
                f"train_loss is {loss} at step {step}; the last good one was "
                f"{self.train_loss:.4f}: it has diverged; lower the learning rates or "
                "GRAD_CLIP_NORM",
            )
            self.train_loss = loss

    def report(self, seconds: float) -> None:
        """A line for a step, in the shape of other entries; and a line for a new epoch."""
        self.check_losses()
        self.log(
            f"step:{self.steps}/{self.settings.iterations} train_loss:{self.train_loss:.4f} "
            f"train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / self.steps:.2f}ms"
        )
        before = self.epoch
        self.epoch = (self.steps * self.batches.step_rows - 1) // self.data.num_rows
        if self.epoch > before:
            self.log(
                f"data: epoch {self.epoch + 1}: the rows repeat, in a new order and cut at other "
                "places"
            )


def checkpoint_name(run_id: str, steps: int) -> str:
    """The name of a checkpoint in logs/."""
    return f"{run_id}.step{steps:08}.checkpoint"


def checkpoints_of(run_id: str, more: str = "") -> list[Path]:
    """A run's checkpoints, newest first; `more` matches what may stand behind their names.

    Each is 32 bytes of SHA-256, then a state of Trainer and the run's identity.
    """
    pattern = f"{glob.escape(run_id)}.step{'?' * 8}.checkpoint{more}"
    return sorted(Path("logs").glob(pattern), reverse=True)


def find_checkpoint(run_id: str) -> tuple[str, bytes]:
    """The run that RESUME=1 means, and its newest checkpoint that is whole.

    b"" for a named run without any. UserError where there is nothing to go on from.
    """
    if not run_id:
        checkpoints = Path("logs").glob("*.step*.checkpoint")
        newest = max(checkpoints, key=os.path.getmtime, default=None)
        require(newest, "RESUME=1: there is no checkpoint in logs/; with RUN_ID a run would start")
        run_id = newest.name.rpartition(".step")[0]
    paths = checkpoints_of(run_id)
    for path in paths:
        data = path.read_bytes()
        if hashlib.sha256(data[32:]).digest() == data[:32]:
            return run_id, data[32:]
        print(
            f"warning: {path} is cut short or damaged; the one before it is used", file=sys.stderr
        )
    require(not paths, f"RESUME=1: no checkpoint of {run_id} is whole; take a new RUN_ID")
    return run_id, b""


def read_checkpoint(data: bytes, device: torch.device) -> dict:
    """A checkpoint's state, {} for b"": plain values and tensors, no code."""
    if not data:
        return {}
    return torch.load(io.BytesIO(data), map_location=device, weights_only=True)


# ==================================================================================================
# Main: one run from settings to score
# ==================================================================================================


def build_model(settings: Settings, runtime: Runtime) -> GPT:
    """A model on the device with the initial weights that SEED gives."""
    torch.manual_seed(settings.seed)
    return GPT(settings, runtime).to(runtime.device)


# Stages in which nothing is trained or scored yet.
PREPARATIONS = ("data", "opening", "warmup_training", "warmup_evaluation", "reading")
# The passes over the artifact that was read back, by their labels in log and results. The last one
# is of track B.
FINAL_PASSES = {
    "final_int6_roundtrip": "plain",
    "final_int6_sliding_window": "sliding",
    "final_int6_ttt": "ttt",
}


class Run:
    """One run of the script: its data, its log, the time of each stage, and the results so far."""

    def __init__(
        self, settings: Settings, runtime: Runtime, log: Logger, artifact: dict | None = None
    ):
        """`artifact` is the manifest of the one that the settings name, if they do."""
        self.runtime = runtime
        self.log = log
        script = Path(__file__)
        self.code_bytes = script.stat().st_size
        self.stages: dict[str, float] = {}

        self.folder, self.tokenizer_path = self.stage(
            "data", find_data, settings, runtime, log, artifact
        )
        self.tokenizer = load_tokenizer(self.tokenizer_path, settings.vocab_size)
        self.tokenizer_digest = digest_of(self.tokenizer_path)
        # From here on the vocabulary is that of the data.
        s = dataclasses.replace(settings, vocab_size=self.tokenizer.vocab_size)
        self.settings = s
        log(
            f"data:{self.folder} tokenizer:{self.tokenizer_path} "
            f"sha256:{self.tokenizer_digest[:16]}\n"
            f"vocab_size:{s.vocab_size} case_operators:{int(bool(self.tokenizer.operators))}"
        )
        log(f"settings:{json.dumps(dataclasses.asdict(s))}", console=False)

        self.manifest = read_data_manifest(self.folder)
        check_operators(self.manifest, self.folder, self.tokenizer)
        self.train_files = [] if s.artifact else find_shards(self.folder, "train")
        self.val_files = [] if s.sample else find_shards(self.folder, "val")
        # The validation split, once it is opened, and when that was.
        self.validation: Text | None = None
        self.validation_opened = "never"
        self.byte_files = find_byte_files(self.val_files)
        scored = self.val_files + self.byte_files
        check_files(self.manifest, self.folder, self.train_files, scored)
        self.extent = validation_extent(self.folder, self.manifest, self.val_files)
        self.normalization = normalization_of(self.manifest, self.tokenizer)
        self.data_warnings = self.check_splits()

        versions = {m.__name__: m.__version__ for m in (torch, np, sentencepiece, zstandard)}
        versions["python"] = sys.version.split()[0]
        self.results: dict = dict(
            run_id=log.run_id,
            seed=s.seed,
            settings=dataclasses.asdict(s),
            stages=self.stages,
            runtime=runtime.reasons,
            versions=versions,
            device=str(runtime.device),
            world_size=runtime.world_size,
            bytes_code=self.code_bytes,
        )

        table = ByteTable(self.tokenizer)
        self.evaluator = Evaluator(s, runtime, table, log)
        self.adaptive = AdaptiveEvaluator(s, runtime, table, log) if s.ttt_enabled else None
        # What a checkpoint shares with a run that goes on from it.
        self.identity = dict(
            settings=stored_settings(s, "model", "training", "artifact", "evaluation"),
            script=digest_of(script),
            tokenizer=self.tokenizer_digest,
            data=[[path.name, path.stat().st_size] for path in self.train_files],
        )

    def stage(self, name: str, function: Callable, *arguments):
        """Call a function once all hosts are here, and note how long it took."""
        self.runtime.meet()
        if name not in PREPARATIONS:
            self.log.has_begun = True
        started = time.perf_counter()
        value = function(*arguments)
        self.runtime.synchronize()
        self.stages[name] = time.perf_counter() - started
        self.log(f"stage:{name} {self.stages[name]:.1f}s")
        return value

    def check_splits(self) -> list[str]:
        """What can be wrong with the splits, in the log too, seen before training.

        Of the validation split this reads sizes, headers and the first token. UserError where
        nothing can be scored.
        """
        warnings = []
        for split, files in (("train", self.train_files), ("val", self.val_files)):
            if files:
                check_beginning(files, split)
        if self.val_files and (self.extent.is_part or self.extent.is_more):
            warnings.append(f"the validation split is a {self.extent}: no score of the challenge")
        if table_of(self.manifest, "normalized"):
            warnings.append(
                f"the text is normalized ({self.normalization}), and the bytes are those of what "
                "is left: no score of the challenge"
            )
        if self.tokenizer.operators and len(self.train_files) == LEAKED_SHARDS:
            warnings.append(
                f"{LEAKED_SHARDS} training shards with case operators: the public export of which "
                "40,000 validation documents are among the training documents (issue #2127)"
            )
        numbers = {int(SHARD_NAME.fullmatch(path.name)[3]) for path in self.train_files}
        missing = missing_numbers(numbers, min(numbers)) if numbers else ""
        if missing:
            warnings.append(f"training shards are missing: {missing}")
        for warning in warnings:
            self.log(f"warning: data: {warning}")
        return warnings

    # ---- Scores
    def open_validation(self) -> None:
        """Read the validation split: after packing, or for VAL_LOSS_EVERY during training."""
        s = self.settings
        check_documents(self.val_files, self.tokenizer, self.tokenizer_path)
        tokens = load_validation(self.val_files, s.vocab_size)
        if self.byte_files:
            sizes = sizes_from_files(self.byte_files, tokens, self.evaluator.table)
        else:
            sizes = self.evaluator.table.sizes(tokens)
        self.validation = Text(tokens, sizes)
        # A resumed run may have opened it before it was stopped. Without a number of steps in the
        # results, this is during training.
        steps = self.results.get("steps", math.inf)
        early = not s.artifact and 0 < s.val_loss_every <= steps
        self.validation_opened = "during training" if early else "after packing"
        documents = int(np.count_nonzero(tokens == BOS))
        self.results["validation_documents"] = documents
        names = names_of(self.folder, self.manifest)
        is_fineweb = any(name.startswith("fineweb10B_") for name in names)
        if is_fineweb and documents != FINEWEB_DOCUMENTS:
            warning = f"{documents} validation documents, not the challenge's {FINEWEB_DOCUMENTS}"
            self.data_warnings.append(warning)
            self.log(f"warning: data: {warning}")
        self.log(
            f"val_loader:shards:{len(self.val_files)} tokens:{len(tokens)} "
            f"documents:{documents} "
            f"bytes_by:{'byte files' if self.byte_files else 'pieces'} split:{self.extent}"
        )

    def score(self, model: GPT, name: str) -> Score:
        """Score a model on the validation split in one of the passes."""
        if self.validation is None:
            self.open_validation()
        text = self.validation
        if name == "ttt":
            return self.adaptive.score(model, text.tokens, text.sizes)
        return self.evaluator.score(model, text.tokens, name, sizes=text.sizes)

    def warm_up_evaluation(self, model: GPT) -> None:
        """Compile all passes on synthetic tokens, outside of any clock."""
        self.evaluator.warm_up(model)
        if self.adaptive is not None:
            self.adaptive.warm_up(model)

    def validate(self, model: GPT, steps: int, seconds: float) -> Score:
        """A plain pass during training or after it, with a line in the shape of other entries."""
        score = self.score(model, "plain")
        milliseconds = 1000 * seconds
        self.log(
            f"step:{steps}/{self.settings.iterations} val_loss:{score.val_loss:.4f} "
            f"val_bpb:{score.val_bpb:.4f} train_time:{milliseconds:.0f}ms "
            f"step_avg:{milliseconds / steps:.2f}ms"
        )
        return score

    # ---- Training
    def save_checkpoint(self, state: dict) -> None:
        """Write what RESUME=1 goes on from, and keep the one before. A full disk ends no run."""
        if self.runtime.rank != 0:
            return
        name = checkpoint_name(self.log.run_id, state["trainer"]["steps"])
        file = io.BytesIO()
        torch.save({**state, **self.identity}, file)
        data = file.getbuffer()
        try:
            write_atomically(Path("logs", name), hashlib.sha256(data).digest(), data)
            for old in checkpoints_of(self.log.run_id)[2:]:
                old.unlink()
            self.log(f"checkpoint:{name}")
        except OSError as error:
            self.log(f"warning: {name} was not written: {error.strerror}")

    def resume(self, trainer: Trainer, checkpoint: bytes) -> None:
        """Go on from a checkpoint. UserError if it belongs to another run."""
        state = read_checkpoint(checkpoint, self.runtime.device)
        if not state:
            return
        changed = [name for name, value in self.identity.items() if state[name] != value]
        require(
            not changed,
            f"RESUME=1: not the {', '.join(changed)} with which the checkpoint was made",
        )
        trainer.load(state)
        trainer.resumed_at.append(trainer.steps)
        milliseconds = 1000 * trainer.clock.seconds
        self.log(f"resumed at step:{trainer.steps} train_time:{milliseconds:.0f}ms")

    def train(self, checkpoint: bytes) -> tuple[GPT, Fit | None]:
        """A model with the weights to export, and how to fit steps to them."""
        s = self.settings
        runtime = self.runtime
        log = self.log
        data = self.stage("opening", self.open_training)
        model = build_model(s, runtime)
        pieces = texts_of_pieces(self.tokenizer)
        trainer = Trainer(model, s, runtime, log, data, self.code_bytes, pieces)
        num_parameters = sum(p.numel() for p in model.parameters())
        batches = trainer.batches
        log(f"model_params:{num_parameters} seed:{s.seed} average:{trainer.schedule.average}")
        log(
            f"train_loader:shards:{len(data.files)} rows:{data.num_rows} "
            f"step_rows:{batches.step_rows} "
            f"micro_batch:{batches.micro_batch_rows}x{s.train_seq_len} "
            f"grad_accum_steps:{batches.micro_steps}"
        )
        if s.checkpoint_every and runtime.rank == 0:
            # Room for three checkpoints, at about 24 bytes a parameter, or 32 with SPELLING_LR.
            claim_disk(96 * num_parameters)

        self.stage("warmup_training", trainer.warm_up)
        self.stage("warmup_evaluation", self.warm_up_evaluation, model)
        # To open the shards reads training data, so it is on the clock.
        trainer.clock.seconds = runtime.from_main(self.stages["opening"])
        self.resume(trainer, checkpoint)
        self.stage(
            "training", trainer.run, functools.partial(self.validate, model), self.save_checkpoint
        )
        exported = self.load_average(trainer)
        self.note_training(trainer, num_parameters, exported)
        return model, trainer.fit

    def open_training(self) -> TrainingRows:
        """The training rows, if they are of this tokenizer: that reads some documents."""
        s = self.settings
        check_documents(self.train_files, self.tokenizer, self.tokenizer_path)
        return TrainingRows(self.train_files, s.train_seq_len, s.seed, s.vocab_size)

    def load_average(self, trainer: Trainer) -> str:
        """Put the average into the model, if one was taken; says what is exported."""
        name = trainer.schedule.average
        if trainer.average.load_into(trainer.stored):
            self.log(f"weights: {name} of {trainer.average.samples} samples")
            return name
        self.log("weights: the last step's (no average was taken)")
        return "last step"

    def note_training(self, trainer: Trainer, num_parameters: int, exported: str) -> None:
        """Put what training was into log and results."""
        steps = trainer.steps
        seconds = trainer.clock.seconds
        tokens = steps * self.settings.train_batch_tokens
        self.log(
            f"late_qat_steps:{trainer.qat_steps} tokens:{tokens} "
            f"tokens_per_second:{tokens / seconds:.0f}"
        )
        self.results.update(
            parameters=num_parameters,
            steps=steps,
            tokens=tokens,
            train_seconds=seconds,
            # Of a resumed run, those since then.
            data_wait_seconds=trainer.data.waited,
            step_avg_ms=1000 * seconds / steps,
            train_loss=trainer.train_loss,
            late_qat_steps=trainer.qat_steps,
            exported=exported,
            resumed_at=trainer.resumed_at,
        )

    # ---- The artifact
    def write_artifact(self, model: GPT, fit: Fit | None) -> bytes:
        """Pack the model, write it, read it back from disk; the bytes on every rank.

        One that is over the cap gets another name, and a UserError.
        """
        if fit is not None:
            fit.finish()
        data = self.pack_and_write(model, fit) if self.runtime.rank == 0 else None
        data = self.runtime.from_main(data)
        self.count_bytes(data)
        return data

    def pack_and_write(self, model: GPT, fit: Fit | None) -> bytes:
        """What rank 0 does of that."""
        s = self.settings
        manifest = dict(
            settings=stored_settings(s, "model", "evaluation"),
            tokenizer=self.tokenizer_digest,
            case_operators=bool(self.tokenizer.operators),
            data=self.manifest.get("name", self.folder.absolute().name),
        )
        packed = pack_under_cap(model, s, manifest, s.artifact_max_bytes - self.code_bytes, fit)
        fits = len(packed) + self.code_bytes <= s.artifact_max_bytes
        path = Path(ARTIFACT_NAME if fits else OVER_CAP_NAME)
        # The copy in logs/ is for keeps; the next run replaces the other.
        write_atomically(Path("logs", f"{self.log.run_id}.{path.name}"), packed)
        write_atomically(path, packed)
        data = path.read_bytes()
        scheme = f"gradient_changes:{fit.samples}" if fit else f"int5_mlp:{s.int5_mlp}"
        self.log(
            f"artifact:{path} sha256:{hashlib.sha256(data).hexdigest()} quant:{s.quant} "
            f"codec:{s.codec} {scheme}"
        )
        return data

    def count_bytes(self, data: bytes) -> None:
        """Put the submission's size into results and log. UserError if it is over the cap."""
        cap = self.settings.artifact_max_bytes
        total = len(data) + self.code_bytes
        self.results.update(
            bytes_model=len(data),
            bytes_total=total,
            under_cap=total <= cap,
            artifact_sha256=hashlib.sha256(data).hexdigest(),
        )
        # In the words that other entries' logs have, whatever QUANT is.
        self.log(
            f"Serialized model int6+zstd: {len(data)} bytes\n"
            f"Code size: {self.code_bytes} bytes\n"
            f"Total submission size int6+zstd: {total} bytes"
        )
        if total > cap:
            self.finish()
            raise UserError(
                f"{total - cap} bytes over the cap: no score ({OVER_CAP_NAME}); use QUANT=fit or a "
                "smaller model"
            )

    def read_model(
        self, manifest: dict, weights: dict[str, Tensor], runtime: Runtime | None = None
    ) -> GPT:
        """A fresh model with an artifact's weights. UserError if its tokenizer was another."""
        theirs = manifest["tokenizer"]
        ours = self.tokenizer_digest
        require(
            theirs == ours,
            f"tokenizer {ours[:9]} is not the artifact's, {theirs[:9]}: TOKENIZER_PATH",
        )
        model = build_model(self.settings, runtime or self.runtime)
        # MTP heads are not in an artifact.
        model.load_state_dict(weights, strict=False)
        return model

    def score_artifact(self, model: GPT) -> None:
        """Score a model that was read from an artifact. All scores are final, or none is."""
        for label, kind in FINAL_PASSES.items():
            if kind == "ttt" and self.adaptive is None:
                continue
            self.results[label] = self.stage(label, self.score, model, kind)._asdict()
        self.finish()

    # ---- The end
    def final_scores(self) -> dict[str, Score]:
        """The scores of the artifact by their labels."""
        return {
            label: Score(**self.results[label]) for label in FINAL_PASSES if label in self.results
        }

    def compliance(self, scores: dict[str, Score]) -> dict:
        """What makes the score valid, as far as the run itself knows."""
        results = self.results
        train_seconds = results.get("train_seconds")
        eval_seconds = results["eval_seconds"]
        normalized = {"normalized": self.normalization} if self.normalization else {}
        adaptation = {}
        if self.adaptive is not None:
            adaptation["adaptation"] = self.adaptive.description
        return dict(
            track="A" if self.adaptive is None else "B",
            **adaptation,
            validation_opened=self.validation_opened,
            validation_split=str(self.extent),
            validation_documents=results.get("validation_documents"),
            data_warnings=self.data_warnings,
            artifact_sha256=results["artifact_sha256"],
            targets=[score.targets for score in scores.values()],
            bytes=[score.bytes for score in scores.values()],
            train_seconds=train_seconds,
            eval_seconds=eval_seconds,
            resumed_at=results.get("resumed_at"),
            train_under_600s=None if train_seconds is None else train_seconds <= 600,
            eval_under_600s=eval_seconds <= 600 if scores else None,
            artifact_under_16mb=results["bytes_total"] <= 16_000_000,
            **normalized,
        )

    def finish(self) -> None:
        """What was checked, the scores, and all results for programs.

        Evaluation's clock counts reading the artifact back and all passes over the validation text
        after training. Packing, which reads no data, is on neither clock.
        """
        results = self.results
        scores = self.final_scores()
        eval_stages = ("pre_quantization", "reading", *FINAL_PASSES)
        results["eval_seconds"] = sum(self.stages.get(name, 0.0) for name in eval_stages)
        results["peak_memory_bytes"] = self.runtime.peak_memory_bytes()
        results["compliance"] = self.compliance(scores)
        self.log(
            f"eval_seconds:{results['eval_seconds']:.1f} "
            f"peak_memory:{results['peak_memory_bytes']}\n"
            f"compliance:{json.dumps(results['compliance'])}"
        )
        for label, score in scores.items():
            self.log(
                f"{label} val_loss:{score.val_loss:.4f} val_bpb:{score.val_bpb:.4f} "
                f"eval_time:{1000 * score.seconds:.0f}ms targets:{score.targets} "
                f"bytes:{score.bytes}\n"
                f"{label}_exact val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f}"
            )
        if self.runtime.rank == 0:
            path = Path("logs", f"{self.log.run_id}.json")
            write_atomically(path, json.dumps(results, indent=1).encode())
            # The .partial of a checkpoint that was being written too.
            for checkpoint in checkpoints_of(self.log.run_id, "*"):
                checkpoint.unlink()


def train_and_score(run: Run, checkpoint: bytes) -> None:
    """Train, average, quantize, pack, read back, score."""
    model, fit = run.train(checkpoint)
    data = run.stage("packing", run.write_artifact, model, fit)
    steps = run.results["steps"]
    seconds = run.results["train_seconds"]
    score = run.stage("pre_quantization", run.validate, model, steps, seconds)
    run.results["pre_quantization"] = score._asdict()

    def read_back() -> GPT:
        manifest, weights = read_artifact(data, ARTIFACT_NAME)
        return run.read_model(manifest, weights)

    run.score_artifact(run.stage("reading", read_back))


def score_existing(run: Run, data: bytes, manifest: dict, weights: dict[str, Tensor]) -> None:
    """Score an artifact that an earlier run has made."""
    run.count_bytes(data)
    model = run.stage("reading", run.read_model, manifest, weights)
    run.stage("warmup_evaluation", run.warm_up_evaluation, model)
    run.score_artifact(model)


@torch.no_grad()
def continue_text(run: Run, manifest: dict, weights: dict[str, Tensor]) -> None:
    """Print SAMPLE and what the model writes after it."""
    s = run.settings
    # Not compiled, since the length grows with each token.
    eager = dataclasses.replace(run.runtime, compiled="no")
    model = run.read_model(manifest, weights, eager)
    generator = torch.Generator().manual_seed(s.seed)
    tokens = [BOS, *run.tokenizer.encode(s.sample)]
    for _ in range(s.sample_tokens):
        context = torch.tensor([tokens[-s.row_tokens :]], device=run.runtime.device)
        logits = model.logits(context)[0, -1].cpu()
        probabilities = torch.softmax(logits / max(s.sample_temperature, 1e-6), -1)
        token = int(torch.multinomial(probabilities, 1, generator=generator))
        tokens.append(token)
        if token == BOS:
            # The document has ended.
            break
    run.log(run.tokenizer.decode(tokens))


def start(environment: Mapping[str, str]) -> None:
    """Settings, runtime and log, and then what the settings ask for."""
    check_torch_version()
    is_main = environment.get("RANK", "0") == "0"
    warnings = mistyped_settings(environment)
    if is_main:
        for warning in warnings:
            print(warning, file=sys.stderr)

    # What an artifact or a checkpoint says of the settings.
    artifact = environment.get("ARTIFACT", "")
    resumes = BOOLEANS.get(environment.get("RESUME", "").strip().lower(), False)
    stored = {}
    manifest = {}
    checkpoint = b""
    if artifact:
        require(Path(artifact).is_file(), f"ARTIFACT={artifact} is not a file")
        data = Path(artifact).read_bytes()
        manifest, weights = read_artifact(data, artifact)
        stored = manifest["settings"]
    elif resumes:
        run_id, checkpoint = find_checkpoint(environment.get("RUN_ID", ""))
        state = read_checkpoint(checkpoint, torch.device("cpu"))
        # The checkpoint of another script, which Run.resume refuses later, may have other settings.
        for name, value in state.get("settings", {}).items():
            if hasattr(Settings, name):
                stored[name] = value
        stored["run_id"] = run_id

    settings, preset_line = settings_from(environment, stored)
    for warning in foreign_settings(environment, settings):
        warnings.append(warning)
        if is_main:
            print(warning, file=sys.stderr)
    runtime = start_runtime(settings)
    if runtime.rank == 0:
        claim_disk(min(settings.artifact_max_bytes, MOST_BYTES))
    default_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-seed{settings.seed}"
    run_id = runtime.from_main(settings.run_id or default_id)
    log = Logger(run_id, runtime, settings.resume)
    for warning in warnings:
        # The console has it already.
        log(warning, console=False)
    log("\n".join((preset_line, *runtime.reasons)))

    try:
        run = Run(settings, runtime, log, manifest)
        if not artifact:
            train_and_score(run, checkpoint)
        elif settings.sample:
            continue_text(run, manifest, weights)
        else:
            score_existing(run, data, manifest, weights)
    except BaseException:
        log.discard()
        raise
    # Rank 0 serves the others: leave together.
    runtime.meet()


def main() -> int:
    """Exit status: 0; 2 after one line that says what to mend; 128 + the signal; 1 for a bug."""
    for stream in (sys.stdout, sys.stderr):
        # A console that cannot show a letter shows its number; it does not end the run.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text())
        return 0
    STOP.install()
    try:
        unknown = sys.argv[1:]
        require(not unknown, f"{unknown}: settings are environment variables, see --help")
        start(os.environ)
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
        return 0
    except KeyboardInterrupt:
        print(
            f"error: stopped by {signal.Signals(STOP.number).name}; RESUME=1 goes on from the last "
            "checkpoint, if CHECKPOINT_EVERY had one written",
            file=sys.stderr,
        )
        return 128 + STOP.number
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    status = main()
    if "RANK" in os.environ:
        # Threads of gloo may abort an interpreter that ends in the ordinary way.
        os._exit(status)
    sys.exit(status)
